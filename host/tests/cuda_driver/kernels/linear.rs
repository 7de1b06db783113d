use spinkv::backend::cuda::driver::{DeviceBuffer, DriverError};
use spinkv::backend::cuda::kernels::{Kernels, Linear, LinearOutput, LinearVariant};
use spinkv_kernels::abi::{gemm, linear};

use super::{ANY, operand, short};
use crate::driver;

#[test]
fn linear_layers_are_checked_and_launched() {
    let driver = driver();
    let (context, stream) = driver.open();
    let kernels = Kernels::load(&context).unwrap();
    let words = |len| DeviceBuffer::zeroed(&stream, len).unwrap();
    let floats = |len| DeviceBuffer::<f32>::zeroed(&stream, len).unwrap();
    // 272 rows of 40 words: three tiles of five chunks, which three blocks stream past 9 tokens.
    let (weights, x, bf16, f32) = (words(272 * 40), words(100 * 40), words(100 * 34), floats(100 * 272));
    let [few_weights, few_x, few_bf16] = [272 * 40 - 1, 9 * 40 - 1, 9 * 34 - 1].map(words);
    let (half_bf16, few_half, few_f32) = (words(9 * 17), words(9 * 17 - 1), floats(9 * 272 - 1));
    let of_blocks = linear::partial_words(16, 3) as usize;
    assert!(of_blocks < Linear::partials(&kernels));
    let (partials, few_partials) = (words(of_blocks), words(of_blocks - 1));
    let arrivals = DeviceBuffer::<u32>::zeroed(&stream, Linear::arrivals(272)).unwrap();
    let few_arrivals = DeviceBuffer::<u32>::zeroed(&stream, 2).unwrap();
    let right = Linear {
        weights: &weights,
        x: &x,
        tokens: 9,
        n: 272,
        k_words: 40,
        output: LinearOutput::Bf16(&bf16),
        partials: &partials,
        arrivals: &arrivals,
        overlaps: false,
    };
    driver.log();
    // SAFETY: the stand-in's kernels touch nothing.
    let launch = |linear: Linear<'_>| unsafe { linear.launch(&kernels, &stream) };
    // SAFETY: as above.
    let launch_as = |variant, linear: Linear<'_>| unsafe { linear.launch_as(variant, &kernels, &stream) };

    for (what, value, min, wrong) in [
        ("linear n", 0, 1, Linear { n: 0, ..right }),
        ("linear k_words", 0, 1, Linear { k_words: 0, ..right }),
        ("linear words of weights", 272 * ANY, 0, Linear { k_words: u32::MAX, ..right }),
        ("linear words of x", 40 * ANY, 0, Linear { tokens: u32::MAX, ..right }),
        ("linear products", 272 * ANY, 0, Linear { tokens: u32::MAX, k_words: 1, ..right }),
    ] {
        assert_eq!(launch(wrong), Err(operand(what, value, min, ANY)));
    }
    let gated = Linear { output: LinearOutput::GatedBf16(&half_bf16), ..right };
    for (value, of, wrong) in [(276, 8, Linear { n: 276, ..right }), (264, 16, Linear { n: 264, ..gated })] {
        assert_eq!(launch(wrong), Err(DriverError::Multiple { what: "linear n", value, of }));
    }
    for (what, len, wrong) in [
        ("linear weights", 272 * 40, Linear { weights: &few_weights, ..right }),
        ("linear x", 9 * 40, Linear { x: &few_x, ..right }),
        ("linear output", 9 * 34, Linear { output: LinearOutput::Bf16(&few_bf16), ..right }),
        ("linear output", 9 * 17, Linear { output: LinearOutput::GatedBf16(&few_half), ..right }),
        ("linear output", 9 * 272, Linear { output: LinearOutput::F32(&few_f32), ..right }),
        ("linear output", 9 * 272, Linear { output: LinearOutput::AddF32(&few_f32), ..right }),
        ("linear partials", of_blocks, Linear { partials: &few_partials, ..right }),
        ("linear arrivals", 3, Linear { arrivals: &few_arrivals, ..right }),
    ] {
        assert_eq!(launch(wrong), Err(short(what, len, len - 1)));
    }
    let many = Linear { tokens: 100, ..right };
    assert_eq!(
        launch_as(LinearVariant::Stream, many),
        Err(operand("linear tokens to stream", 100, 1, linear::MAX_TOKENS.into()))
    );
    launch(Linear { tokens: 0, ..right }).unwrap();
    assert_eq!(driver.log(), [""; 0], "nothing was launched");

    let operands = |tokens: u32, epilogue: u32| {
        format!("{:#x} {:#x} {tokens} 272 40 {epilogue}", weights.address(), x.address())
    };
    let scratch = format!("{:#x} {:#x}", partials.address(), arrivals.address());
    let streamed = |kernel: &str, tokens: u32, epilogue: u32, output: u64| {
        let shared = linear::shared_bytes(linear::token_tile(tokens));
        let operands = operands(tokens, epilogue);
        format!("launch {kernel} 3 1 1, 256 1 1, {shared}: {operands} {scratch} {output:#x} {output:#x}")
    };
    launch(right).unwrap();
    assert_eq!(driver.log(), [streamed("linear_16", 9, 0, bf16.address())]);
    launch(Linear { overlaps: true, ..right }).unwrap();
    assert_eq!(driver.log(), [format!("overlapping {}", streamed("linear_16", 9, 0, bf16.address()))]);
    launch(Linear { output: LinearOutput::F32(&f32), tokens: 1, ..right }).unwrap();
    assert_eq!(driver.log(), [streamed("linear_8", 1, 1, f32.address())]);
    launch(Linear { output: LinearOutput::AddF32(&f32), tokens: 8, ..right }).unwrap();
    assert_eq!(driver.log(), [streamed("linear_8", 8, 2, f32.address())]);
    launch(gated).unwrap();
    assert_eq!(driver.log(), [streamed("linear_16", 9, 3, half_bf16.address())]);
    let enough = words(linear::partial_words(64, 3) as usize);
    let scratch = format!("{:#x} {:#x}", enough.address(), arrivals.address());
    driver.log();
    for (kernel, tokens, tile) in [("linear_32", 17, 32), ("linear_64", 64, 64)] {
        launch(Linear { tokens, partials: &enough, ..right }).unwrap();
        let (shared, output) = (linear::shared_bytes(tile), bf16.address());
        let line = format!("launch {kernel} 3 1 1, 256 1 1, {shared}: {} {scratch}", operands(tokens, 0));
        assert_eq!(driver.log(), [format!("{line} {output:#x} {output:#x}")]);
    }

    let tiled = |start: &str, shared: u32| {
        let output = bf16.address();
        format!("launch {start}, {shared}: {} {output:#x} {output:#x}", operands(100, 0))
    };
    // The stand-in is a Hopper: products of a warpgroup are its choice.
    assert_eq!(Linear::variant(&kernels, 64), LinearVariant::Stream);
    assert_eq!(Linear::variant(&kernels, 65), LinearVariant::Wgmma);
    launch(many).unwrap();
    let shared = gemm::shared_bytes(gemm::wgmma::ROWS, gemm::wgmma::STAGES);
    assert_eq!(driver.log(), [tiled("gemm_wgmma 2 1 1, 256 1 1", shared)]);
    launch_as(LinearVariant::Mma, many).unwrap();
    let shared = gemm::shared_bytes(gemm::mma::ROWS, gemm::mma::STAGES);
    assert_eq!(driver.log(), [tiled("gemm 3 1 1, 128 1 1", shared)]);
}
