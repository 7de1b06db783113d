//! Selections that drift, exactly.

use spinkv::backend::cuda::driver::DeviceBuffer;
use spinkv::backend::cuda::kernels::Drift;
use spinkv_kernel_tests::WILD;
use spinkv_kernel_tests::drift::DriftCase;

use super::{Machine, Outcome, Test, test};

pub fn tests() -> Vec<Test> {
    vec![test("drift::random_shapes", |machine| {
        machine.on_seeds(|seed| drift(machine, &DriftCase::random(seed)))
    })]
}

fn drift(machine: &Machine, case: &DriftCase) -> Outcome {
    let (stream, rows) = (&machine.stream, case.rows());
    let entries = DeviceBuffer::from_slice(stream, &case.entries)?;
    let ids = DeviceBuffer::from_slice(stream, &vec![WILD; rows * case.capacity as usize])?;
    let selected = DeviceBuffer::from_slice(stream, &vec![WILD; rows])?;
    let DriftCase { first_row, kv_heads, pace, capacity, .. } = *case;
    let launch =
        Drift { entries: &entries, first_row, kv_heads, pace, capacity, ids: &ids, selected: &selected };
    // SAFETY: all buffers are this test's alone.
    unsafe { launch.launch(&machine.kernels, stream) }?;
    Ok(case.check(&ids.to_vec(stream)?, &selected.to_vec(stream)?)?)
}
