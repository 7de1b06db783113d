use spinkv_kernel_tests::score::ScoreCase;
use spinkv_kernel_tests::select::SelectCase;
use spinkv_kernel_tests::top_k::TopKCase;

use super::{SCHEDULES, SHAPES};

#[test]
fn score_on_random_shapes() {
    for seed in 0..SHAPES {
        let case = ScoreCase::random(seed);
        let (logits, statistics) = case.emulate(seed).unwrap_or_else(|fault| panic!("seed {seed}: {fault}"));
        case.check(&logits, &statistics).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
    }
}

#[test]
fn score_in_random_orders() {
    let case = ScoreCase::small(SHAPES);
    let first = case.emulate(0).unwrap();
    case.check(&first.0, &first.1).unwrap();
    for schedule in 1..SCHEDULES {
        assert_eq!(case.emulate(schedule).unwrap(), first, "schedule {schedule}");
    }
}

#[test]
fn select_on_random_shapes() {
    for seed in 0..SHAPES {
        let case = SelectCase::random(seed);
        let found = case.emulate(seed).unwrap_or_else(|fault| panic!("seed {seed}: {fault}"));
        case.check(&found).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
    }
}

#[test]
fn select_in_random_orders() {
    let case = SelectCase::full(SHAPES);
    let first = case.emulate(0).unwrap();
    case.check(&first).unwrap();
    assert!(first.selected[0] > 20 && first.estimated[0] == 20, "a case that does something: {first:?}");
    for schedule in 1..SCHEDULES {
        assert_eq!(case.emulate(schedule).unwrap(), first, "schedule {schedule}");
    }
}

#[test]
fn top_k_on_random_shapes() {
    for seed in 0..SHAPES {
        let case = TopKCase::random(seed);
        let (ids, selected) = case.emulate(seed).unwrap_or_else(|fault| panic!("seed {seed}: {fault}"));
        case.check(&ids, &selected).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
    }
}

#[test]
fn top_k_in_random_orders() {
    let case = TopKCase::random(SHAPES);
    assert!(case.rows() > 0, "a case that does something");
    let first = case.emulate(0).unwrap();
    case.check(&first.0, &first.1).unwrap();
    for schedule in 1..SCHEDULES {
        assert_eq!(case.emulate(schedule).unwrap(), first, "schedule {schedule}");
    }
}
