use spinkv_kernel_tests::gate::{GateKeyCase, GateQueryCase};

use super::{SCHEDULES, SHAPES};

#[test]
fn gate_keys_on_random_shapes() {
    let mut chunks = 0;
    for seed in 0..SHAPES / 2 {
        let case = GateKeyCase::random(seed);
        chunks += case.chunks();
        let prompts = case.emulate(seed).unwrap_or_else(|fault| panic!("seed {seed}: {fault}"));
        case.check(&prompts).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
        let step = case.emulate_step(seed).unwrap_or_else(|fault| panic!("seed {seed}, step: {fault}"));
        assert_eq!(step, prompts, "seed {seed}: a step gives other bits than the prompt");
    }
    assert!(chunks as u64 > SHAPES / 2, "cases that do something");
}

#[test]
fn gate_keys_in_random_orders() {
    let case = (0..).map(GateKeyCase::random).find(|case| case.chunks() > 2).unwrap();
    let first = case.emulate(0).unwrap();
    case.check(&first).unwrap();
    for schedule in 1..SCHEDULES / 4 {
        assert_eq!(case.emulate(schedule).unwrap(), first, "schedule {schedule}");
        assert_eq!(case.emulate_step(schedule).unwrap(), first, "schedule {schedule}, step");
    }
}

#[test]
fn gate_queries_on_random_shapes_and_in_random_orders() {
    for seed in 0..SHAPES {
        let case = GateQueryCase::random(seed);
        let found = case.emulate(seed).unwrap_or_else(|fault| panic!("seed {seed}: {fault}"));
        case.check(&found).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
        if seed < 5 {
            for schedule in 1..SCHEDULES / 10 {
                assert_eq!(case.emulate(schedule).unwrap(), found, "seed {seed}, schedule {schedule}");
            }
        }
    }
}
