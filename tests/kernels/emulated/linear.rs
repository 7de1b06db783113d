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
