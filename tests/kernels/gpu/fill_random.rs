//! Random fills, exactly.

use spinkv::backend::cuda::driver::DeviceBuffer;
use spinkv::backend::cuda::kernels::FillRandom;
use spinkv_kernel_tests::fill_random::FillRandomCase;

use super::{Machine, Outcome, Test, test};

pub fn tests() -> Vec<Test> {
    vec![
        test("fill_random::random_shapes", |machine| {
            machine.on_seeds(|seed| fill(machine, &FillRandomCase::random(seed)))
        }),
        test("fill_random::large", |machine| {
            let words = 3_000_001;
            fill(machine, &FillRandomCase { words, seed: machine.seed, deviation: 0.02, grid: 1 })
        }),
    ]
}

fn fill(machine: &Machine, case: &FillRandomCase) -> Outcome {
    let out = DeviceBuffer::zeroed(&machine.stream, case.words)?;
    let FillRandomCase { seed, deviation, .. } = *case;
    FillRandom { out: &out, seed, deviation }.launch(&machine.kernels, &machine.stream)?;
    Ok(case.check(&out.to_vec(&machine.stream)?)?)
}
