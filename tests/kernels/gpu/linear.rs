//! Linear layers against f64.

use spinkv::backend::cuda::driver::DeviceBuffer;
use spinkv::backend::cuda::kernels::{Linear, LinearOutput, LinearVariant};
use spinkv_kernel_tests::linear::{LinearCase, Products};
use spinkv_kernels::abi::linear::epilogue;

use super::{Machine, Outcome, Test, test};

pub fn tests() -> Vec<Test> {
    vec![
        test("linear::random_shapes", |machine| {
            machine.on_seeds(|seed| check(machine, LinearVariant::Stream, &LinearCase::random(seed)))
        }),
        test("linear::layers_of_models", |machine| {
            [1, 8, 13, 16, 32, 64].into_iter().try_for_each(|tokens| {
                let case = LinearCase::large(machine.seed + tokens, tokens as usize);
                check(machine, LinearVariant::Stream, &case)
            })
        }),
        test("linear::the_same_each_time", |machine| {
            // Whichever block comes last; and launches that overlap, each of which adds to what the one before has left.
            let case = LinearCase::adding(machine.seed, 16);
            let first = products(machine, LinearVariant::Stream, &case, 5, false)?;
            for overlaps in [false, true, false, true] {
                let again = products(machine, LinearVariant::Stream, &case, 5, overlaps)?;
                if again != first {
                    return Err(format!("other products; overlaps: {overlaps}").into());
                }
            }
            Ok(())
        }),
        test("gemm::random_shapes", |machine| {
            machine.on_seeds(|seed| check(machine, LinearVariant::Mma, &LinearCase::many_tokens(seed)))
        }),
        test("gemm::layers_of_models", |machine| {
            check(machine, LinearVariant::Mma, &LinearCase::large(machine.seed, 2300))
        }),
        test("gemm_wgmma::random_shapes", |machine| {
            machine.on_seeds(|seed| check(machine, LinearVariant::Wgmma, &LinearCase::many_tokens(seed)))
        }),
        test("gemm_wgmma::layers_of_models", |machine| {
            check(machine, LinearVariant::Wgmma, &LinearCase::large(machine.seed, 2300))
        }),
    ]
}

fn check(machine: &Machine, variant: LinearVariant, case: &LinearCase) -> Outcome {
    let most = u32::try_from(case.tokens).map_or(u32::MAX, |tokens| tokens.max(65));
    if variant == LinearVariant::Wgmma && Linear::variant(&machine.kernels, most) != variant {
        println!("skipped: the PTX for this GPU has no gemm_wgmma");
        return Ok(());
    }
    Ok(case.check(&products(machine, variant, case, 1, false)?)?)
}

/// The products after so many launches.
fn products(
    machine: &Machine,
    variant: LinearVariant,
    case: &LinearCase,
    launches: usize,
    overlaps: bool,
) -> Result<Products, libtest_mimic::Failed> {
    let Machine { stream, kernels, .. } = machine;
    let before = case.products();
    let bf16 = DeviceBuffer::from_slice(stream, bytemuck::cast_slice(&before.bf16))?;
    let f32 = DeviceBuffer::from_slice(stream, &before.f32)?;
    let partials = DeviceBuffer::zeroed(stream, Linear::partials(kernels))?;
    partials.fill_bytes(stream, 0..partials.len(), 0xff)?;
    let arrivals = DeviceBuffer::zeroed(stream, Linear::arrivals(case.n as u32))?;
    let launch = Linear {
        weights: &DeviceBuffer::from_slice(stream, bytemuck::cast_slice(&case.weights))?,
        x: &DeviceBuffer::from_slice(stream, bytemuck::cast_slice(&case.x))?,
        tokens: case.tokens as u32,
        n: case.n as u32,
        k_words: case.k_words as u32,
        output: match case.epilogue {
            epilogue::STORE_BF16 => LinearOutput::Bf16(&bf16),
            epilogue::STORE_F32 => LinearOutput::F32(&f32),
            epilogue::ADD_F32 => LinearOutput::AddF32(&f32),
            _ => LinearOutput::GatedBf16(&bf16),
        },
        partials: &partials,
        arrivals: &arrivals,
        overlaps,
    };
    for _ in 0..launches {
        // SAFETY: arrivals are 0; nothing else uses the buffers.
        unsafe { launch.launch_as(variant, kernels, stream)? };
    }
    if arrivals.to_vec(stream)?.iter().any(|arrived| *arrived != 0) {
        return Err("arrivals are not 0 for the next launch".into());
    }
    Ok(Products { bf16: bytemuck::pod_collect_to_vec(&bf16.to_vec(stream)?), f32: f32.to_vec(stream)? })
}
