use spinkv_kernel_tests::resolve::ResolveCase;
use spinkv_kernels::abi::resolve::{LIST_TOO_LONG, NOT_ON_HOST, TOO_FEW_SLOTS};

use super::{SCHEDULES, SHAPES};

#[test]
fn on_random_batches() {
    let mut faults = [0; 3];
    for seed in 0..SHAPES {
        let case = ResolveCase::random(seed);
        case.emulate(seed).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
        for (count, fault) in faults.iter_mut().zip([LIST_TOO_LONG, TOO_FEW_SLOTS, NOT_ON_HOST]) {
            *count += case.faults(fault);
        }
    }
    assert!(faults.iter().all(|count| *count > 0), "every fault occurs: {faults:?}");
}

#[test]
fn in_random_orders() {
    let case = ResolveCase::random(SHAPES + 3);
    for schedule in 0..SCHEDULES {
        case.emulate(1000 * schedule).unwrap_or_else(|wrong| panic!("schedule {schedule}: {wrong}"));
    }
}

#[test]
fn while_the_clock_goes_round() {
    for seed in 0..3 {
        ResolveCase::long(seed).emulate(seed).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
    }
}
