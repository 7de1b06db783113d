use spinkv_kernel_tests::index::{Operator, StepIndexCase};

use super::{SCHEDULES, SHAPES};

fn on_random_shapes(operator: Operator) {
    let mut chunks = 0;
    for seed in 0..SHAPES {
        let case = StepIndexCase::random(operator, seed);
        let prompts = &case.prompts;
        chunks += prompts.chunks();
        let summaries =
            prompts.emulate(seed).unwrap_or_else(|fault| panic!("seed {seed}: {fault}\n{prompts:?}"));
        prompts.check(&summaries).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
        let step = case.emulate(seed).unwrap_or_else(|fault| panic!("seed {seed}, step: {fault}\n{case:?}"));
        assert_eq!(step, summaries, "seed {seed}: a step gives other bits than the prompt");
    }
    assert!(chunks as u64 > SHAPES, "cases that do something");
}

fn in_random_orders(operator: Operator) {
    let case = StepIndexCase::random(operator, SHAPES + 3);
    assert!(case.prompts.chunks() > 0, "a case that does something");
    let first = case.prompts.emulate(0).unwrap();
    case.prompts.check(&first).unwrap();
    for schedule in 1..SCHEDULES {
        assert_eq!(case.prompts.emulate(schedule).unwrap(), first, "schedule {schedule}");
        assert_eq!(case.emulate(schedule).unwrap(), first, "schedule {schedule}, step");
    }
}

#[test]
fn chunk_mean_on_random_shapes() {
    on_random_shapes(Operator::Mean);
}

#[test]
fn chunk_mean_in_random_orders() {
    in_random_orders(Operator::Mean);
}

#[test]
fn chunk_bounds_on_random_shapes() {
    on_random_shapes(Operator::Bounds);
}

#[test]
fn chunk_bounds_in_random_orders() {
    in_random_orders(Operator::Bounds);
}
