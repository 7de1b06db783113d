use spinkv_kernel_tests::outliers::{MarkCase, SpreadCase};

use super::{SCHEDULES, SHAPES};

#[test]
fn chunk_spread_on_random_shapes() {
    let mut chunks = 0;
    for seed in 0..SHAPES {
        let case = SpreadCase::random(seed);
        chunks += case.chunks();
        let spreads = case.emulate(seed).unwrap_or_else(|fault| panic!("seed {seed}: {fault}\n{case:?}"));
        case.check(&spreads).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
    }
    assert!(chunks as u64 > SHAPES, "cases that do something");
}

#[test]
fn chunk_spread_in_random_orders() {
    let case = SpreadCase::random(SHAPES + 1);
    assert!(case.chunks() > 0, "a case that does something");
    let first = case.emulate(0).unwrap();
    case.check(&first).unwrap();
    for schedule in 1..SCHEDULES {
        let spreads = case.emulate(schedule).unwrap();
        assert!(spreads.iter().zip(&first).all(|(a, b)| a.to_bits() == b.to_bits()), "schedule {schedule}");
    }
}

#[test]
fn mark_on_random_shapes() {
    for seed in 0..SHAPES {
        let case = MarkCase::random(seed);
        let marks = case.emulate(seed).unwrap_or_else(|fault| panic!("seed {seed}: {fault}\n{case:?}"));
        case.check(&marks).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
    }
}

#[test]
fn mark_in_random_orders() {
    let case = (SHAPES..).map(MarkCase::random).find(|case| case.ids.len() > 60).unwrap();
    let first = case.emulate(0).unwrap();
    case.check(&first).unwrap();
    for schedule in 1..SCHEDULES {
        assert_eq!(case.emulate(schedule).unwrap(), first, "schedule {schedule}");
    }
}
