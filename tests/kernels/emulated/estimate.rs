use spinkv_kernel_tests::estimate::{EstimateCase, GatherRunCase};

use super::{SCHEDULES, SHAPES};

#[test]
fn estimate_on_random_shapes() {
    let mut estimates = 0;
    for seed in 0..SHAPES {
        let case = EstimateCase::random(seed);
        estimates += case.counts.iter().filter(|count| **count > 0).count() as u64;
        let (outputs, lse) = case.emulate(seed).unwrap_or_else(|fault| panic!("seed {seed}: {fault}"));
        case.check(&outputs, &lse).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
        let biases = case.emulate_biases(seed).unwrap_or_else(|fault| panic!("seed {seed}: {fault}"));
        case.check_biases(&biases).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
    }
    assert!(estimates > SHAPES, "cases that do something");
}

#[test]
fn estimate_in_random_orders() {
    let many = |case: &EstimateCase| case.counts.iter().any(|count| (64..999).contains(count));
    let case = (SHAPES..).map(EstimateCase::random).find(many).unwrap();
    let first = case.emulate(0).unwrap();
    case.check(&first.0, &first.1).unwrap();
    for schedule in 1..SCHEDULES {
        assert_eq!(case.emulate(schedule).unwrap(), first, "schedule {schedule}");
    }
}

#[test]
fn gather_run_on_random_shapes() {
    for seed in 0..SHAPES {
        let case = GatherRunCase::random(seed);
        let found = case.emulate(seed).unwrap_or_else(|fault| panic!("seed {seed}: {fault}\n{case:?}"));
        assert!(found == case.expected(), "seed {seed}");
    }
}
