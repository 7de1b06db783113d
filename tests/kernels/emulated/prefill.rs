use spinkv_kernel_tests::prefill::PrefillCase;

use super::{SCHEDULES, SHAPES};

#[test]
fn prefill_on_random_shapes() {
    for seed in 0..SHAPES {
        let case = PrefillCase::random(seed);
        let (outputs, lse) = case.emulate(seed).unwrap_or_else(|fault| panic!("seed {seed}: {fault}"));
        case.check(&outputs, &lse).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
    }
}

#[test]
fn prefill_where_logits_rise() {
    for seed in 0..4 {
        let case = PrefillCase::rising(seed);
        let (outputs, lse) = case.emulate(seed).unwrap_or_else(|fault| panic!("seed {seed}: {fault}"));
        case.check(&outputs, &lse).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
    }
}

#[test]
fn prefill_in_random_orders() {
    let case = PrefillCase::small(SHAPES);
    let first = case.emulate(0).unwrap();
    case.check(&first.0, &first.1).unwrap();
    for schedule in 1..SCHEDULES {
        assert_eq!(case.emulate(schedule).unwrap(), first, "schedule {schedule}");
    }
}

#[test]
fn prefill_wgmma_on_random_shapes() {
    for seed in 0..SHAPES {
        let case = PrefillCase::random(seed);
        let (outputs, lse) = case.emulate_wgmma(seed).unwrap_or_else(|fault| panic!("seed {seed}: {fault}"));
        case.check(&outputs, &lse).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
    }
}

#[test]
fn prefill_wgmma_where_logits_rise() {
    for seed in 0..4 {
        let case = PrefillCase::rising(seed);
        let (outputs, lse) = case.emulate_wgmma(seed).unwrap_or_else(|fault| panic!("seed {seed}: {fault}"));
        case.check(&outputs, &lse).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
    }
}

#[test]
fn prefill_wgmma_in_random_orders() {
    let case = PrefillCase::small(SHAPES);
    let first = case.emulate_wgmma(0).unwrap();
    case.check(&first.0, &first.1).unwrap();
    for schedule in 1..SCHEDULES {
        assert_eq!(case.emulate_wgmma(schedule).unwrap(), first, "schedule {schedule}");
    }
}
