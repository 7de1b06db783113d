//! Attention of prompts against f64.

use spinkv::backend::cuda::driver::DeviceBuffer;
use spinkv::backend::cuda::kernels::{Prefill, PrefillVariant};
use spinkv_kernel_tests::prefill::PrefillCase;

use super::{Machine, Outcome, Test, test};

pub fn tests() -> Vec<Test> {
    vec![
        test("prefill::random_shapes", |machine| {
            machine.on_seeds(|seed| prefill(machine, PrefillVariant::Mma, &PrefillCase::random(seed)))
        }),
        test("prefill::logits_that_rise", |machine| {
            each(machine, PrefillVariant::Mma, 8, PrefillCase::rising)
        }),
        test("prefill::long_prompts", |machine| each(machine, PrefillVariant::Mma, 4, PrefillCase::large)),
        test("prefill_wgmma::random_shapes", |machine| {
            machine.on_seeds(|seed| prefill(machine, PrefillVariant::Wgmma, &PrefillCase::random(seed)))
        }),
        test("prefill_wgmma::logits_that_rise", |machine| {
            each(machine, PrefillVariant::Wgmma, 8, PrefillCase::rising)
        }),
        test("prefill_wgmma::long_prompts", |machine| {
            each(machine, PrefillVariant::Wgmma, 4, PrefillCase::large)
        }),
    ]
}

fn each(machine: &Machine, variant: PrefillVariant, rounds: u64, case: fn(u64) -> PrefillCase) -> Outcome {
    (0..rounds).try_for_each(|round| prefill(machine, variant, &case(machine.seed + round)))
}

fn prefill(machine: &Machine, variant: PrefillVariant, case: &PrefillCase) -> Outcome {
    let Machine { stream, kernels, .. } = machine;
    if variant == PrefillVariant::Wgmma && Prefill::variant(kernels) != variant {
        println!("skipped: the PTX for this GPU has no prefill_wgmma");
        return Ok(());
    }
    let outputs = DeviceBuffer::from_slice(stream, &case.outputs())?;
    let lse = DeviceBuffer::from_slice(stream, &case.lse())?;
    let requests = case.first_tile.len() - 1;
    let launch = Prefill {
        queries: &DeviceBuffer::from_slice(stream, &case.queries)?,
        keys: &DeviceBuffer::from_slice(stream, &case.keys)?,
        values: &DeviceBuffer::from_slice(stream, &case.values)?,
        first_query: &DeviceBuffer::from_slice(stream, &case.first_query)?,
        first_key: &DeviceBuffer::from_slice(stream, &case.first_key)?,
        first_tile: &DeviceBuffer::from_slice(stream, &case.first_tile)?,
        query_tokens: case.first_query[requests],
        key_tokens: case.first_key[requests],
        tiles: case.tiles,
        kv_heads: case.kv_heads as u32,
        group: case.group as u32,
        head_words: case.head_words as u32,
        scale: case.scale,
        outputs: &outputs,
        lse: &lse,
    };
    // SAFETY: the case's prefix sums are right; nothing else uses the buffers.
    unsafe { launch.launch_as(variant, kernels, stream)? };
    Ok(case.check(&outputs.to_vec(stream)?, &lse.to_vec(stream)?)?)
}
