use spinkv_kernel_tests::linear::LinearCase;

use super::{SCHEDULES, SHAPES};

#[test]
fn linear_on_random_shapes() {
    for seed in 0..SHAPES {
        let case = LinearCase::random(seed);
        let products = case.emulate(seed).unwrap_or_else(|fault| panic!("seed {seed}: {fault}"));
        case.check(&products).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
    }
}

#[test]
fn linear_in_random_orders() {
    let case = LinearCase::shared(SHAPES);
    let first = case.emulate(0).unwrap();
    case.check(&first).unwrap();
    for schedule in 1..SCHEDULES {
        // In bits: sums are of random numbers, so that their order shows.
        let products = case.emulate(schedule).unwrap();
        assert_eq!(format!("{products:?}"), format!("{first:?}"), "schedule {schedule}");
    }
}

/// Tiles of 128 tokens and rows take their time whatever is in them.
const TILED_SHAPES: u64 = 24;

#[test]
fn gemm_on_random_shapes() {
    for seed in 0..TILED_SHAPES {
        let case = LinearCase::many_tokens(seed);
        let products = case.emulate_gemm(seed).unwrap_or_else(|fault| panic!("seed {seed}: {fault}"));
        case.check(&products).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
    }
}

#[test]
fn gemm_wgmma_on_random_shapes() {
    for seed in 0..TILED_SHAPES {
        let case = LinearCase::many_tokens(seed);
        let products = case.emulate_gemm_wgmma(seed).unwrap_or_else(|fault| panic!("seed {seed}: {fault}"));
        case.check(&products).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
    }
}
