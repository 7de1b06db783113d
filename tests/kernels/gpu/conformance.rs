//! Each function of `cuda_std` on the GPU and on the emulator: the same bits.

use cuda_std_conformance::{CASES, Case, Needs, inputs, ptx, run_on_emulator};
use libtest_mimic::Failed;
use rayon::prelude::*;
use spinkv::backend::cuda::driver::{DeviceBuffer, LaunchShape, Module, launch_with};

use super::{Machine, Outcome, Test, test};

/// Inputs of a case.
const SEEDS: u64 = 8;

/// An approximate function of the special function unit.
type Unary = fn(f32) -> f32;

const SPECIAL_FUNCTIONS: [(&str, Unary); 3] = [
    ("math_exp2_approx", cuda_std::math::exp2_approx),
    ("math_reciprocal_approx", cuda_std::math::reciprocal_approx),
    ("math_rsqrt_approx", cuda_std::math::rsqrt_approx),
];

pub fn tests() -> Vec<Test> {
    let cases = CASES
        .iter()
        .map(|case| test(format!("conformance::{}", case.name), |machine| conforms(machine, case)));
    let exhaustive = SPECIAL_FUNCTIONS.iter().map(|&(kernel, function)| {
        test(format!("exhaustive::{kernel}"), move |machine| agrees_on_all_inputs(machine, kernel, function))
    });
    cases.chain(exhaustive).collect()
}

/// The module that a case stands in: what runs on sm_80 in that of sm_80, which runs on anything newer.
fn module(machine: &Machine, case: &Case) -> Result<Module, Failed> {
    let own = machine.context.device().ptx_arch()?.name();
    let architecture = if case.needs == Needs::Sm80 { "sm_80" } else { own };
    let mut loaded =
        machine.conformance.lock().map_err(|_| "an earlier test failed while it loaded the module")?;
    if let Some(module) = loaded.get(architecture) {
        return Ok(module.clone());
    }
    let text = ptx(architecture).expect("PTX of the conformance kernels");
    let module = Module::from_ptx(&machine.context, text)?;
    loaded.insert(architecture, module.clone());
    Ok(module)
}

fn conforms(machine: &Machine, case: &Case) -> Outcome {
    let own = machine.context.device().ptx_arch()?.name();
    if case.needs != Needs::Sm80 && !case.needs.architectures().contains(&own) {
        println!(
            "skipped: {} needs PTX for {}, and this GPU has {own}",
            case.name,
            case.needs.architectures().join(" or ")
        );
        return Ok(());
    }
    let function = module(machine, case)?.function(case.name)?;
    let shape =
        LaunchShape { grid: case.grid, block: case.block, shared_bytes: case.shared_bytes, overlaps: false };
    for seed in machine.seed..machine.seed + SEEDS {
        let input = inputs(case, seed);
        let emulated = run_on_emulator(case, &input, seed)?;
        let out = DeviceBuffer::<u32>::zeroed(&machine.stream, case.output_words().max(1))?;
        // A case without input still has its parameter.
        let on_device = if input.is_empty() { &[0][..] } else { &input };
        let on_device = DeviceBuffer::from_slice(&machine.stream, on_device)?;
        // SAFETY: the case's own launch: its kernel reads and writes the rows of its threads.
        unsafe { launch_with(&function, &shape, &machine.stream, [(&on_device).into(), (&out).into()])? };
        let found = &out.to_vec(&machine.stream)?[..emulated.len()];
        let differing = found.iter().zip(&emulated).filter(|(gpu, emulator)| gpu != emulator).count();
        if let Some(at) = found.iter().zip(&emulated).position(|(gpu, emulator)| gpu != emulator) {
            let (thread, word) = (at / case.out_words as usize, at % case.out_words as usize);
            let row = &input[thread * case.in_words as usize..][..case.in_words as usize];
            return Err(format!(
                "seed {seed}: {differing} of {} words differ; first in thread {thread}, word {word}: GPU {:#010x}, emulator \
                 {:#010x}; its input {row:x?}",
                emulated.len(),
                found[at],
                emulated[at]
            )
            .into());
        }
    }
    Ok(())
}

/// All 2^32 inputs.
fn agrees_on_all_inputs(machine: &Machine, kernel: &str, function: Unary) -> Outcome {
    const PER_LAUNCH: u32 = 1 << 26;
    const BLOCK: u32 = 256;
    let case = CASES.iter().find(|case| case.name == kernel).ok_or("no such case")?;
    let kernel = module(machine, case)?.function(kernel)?;
    let input = DeviceBuffer::<u32>::uninit(&machine.context, PER_LAUNCH as usize)?;
    let out = DeviceBuffer::<u32>::uninit(&machine.context, PER_LAUNCH as usize)?;
    let shape = LaunchShape::linear(PER_LAUNCH / case.in_words / BLOCK, BLOCK);
    let (mut given, mut found) = (vec![0u32; PER_LAUNCH as usize], vec![0u32; PER_LAUNCH as usize]);
    for launch in 0..(1u64 << 32) / u64::from(PER_LAUNCH) {
        let first = launch as u32 * PER_LAUNCH;
        given.par_iter_mut().enumerate().for_each(|(at, bits)| *bits = first + at as u32);
        input.write(&machine.stream, 0, &given)?;
        // SAFETY: a row of input and of output for each thread.
        unsafe { launch_with(&kernel, &shape, &machine.stream, [(&input).into(), (&out).into()])? };
        out.read(&machine.stream, 0, &mut found)?;
        let wrong = found
            .par_iter()
            .zip(&given)
            .find_any(|(gpu, bits)| function(f32::from_bits(**bits)).to_bits() != **gpu);
        if let Some((gpu, bits)) = wrong {
            let emulated = function(f32::from_bits(*bits)).to_bits();
            return Err(format!("input {bits:#010x}: GPU {gpu:#010x}, emulator {emulated:#010x}").into());
        }
    }
    Ok(())
}
