use spinkv_kernel_tests::attend::AttendCase;

use super::{SCHEDULES, SHAPES};

#[test]
fn attend_on_random_shapes() {
    for seed in 0..SHAPES {
        let case = AttendCase::random(seed);
        let (outputs, lse) = case.emulate(seed).unwrap_or_else(|fault| panic!("seed {seed}: {fault}"));
        case.check(&outputs, &lse).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
    }
}

#[test]
fn attend_on_long_rows() {
    for seed in 0..6 {
        let case = AttendCase::long(seed);
        let (outputs, lse) = case.emulate(seed).unwrap_or_else(|fault| panic!("seed {seed}: {fault}"));
        case.check(&outputs, &lse).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
    }
}

#[test]
fn attend_in_random_orders() {
    let case = AttendCase::small(SHAPES);
    let first = case.emulate(0).unwrap();
    case.check(&first.0, &first.1).unwrap();
    for schedule in 1..SCHEDULES {
        assert_eq!(case.emulate(schedule).unwrap(), first, "schedule {schedule}");
    }
}
