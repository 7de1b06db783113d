use spinkv_kernel_tests::cluster::{ClusterCase, Stage, State};

use super::SCHEDULES;

/// A case has a dozen and more launches, tiles of 128 tokens among them.
const CLUSTERED_SHAPES: u64 = 24;

/// The state after all stages, each of them checked.
fn clustered(case: &ClusterCase, name: &str, schedule: u64) -> State {
    case.stages().into_iter().fold(case.state(), |before, stage| {
        let after = case
            .emulate(stage, &before, schedule)
            .unwrap_or_else(|fault| panic!("{name}, {stage:?}: {fault}"));
        case.check(stage, &before, &after, true).unwrap_or_else(|wrong| panic!("{name}, {stage:?}: {wrong}"));
        after
    })
}

#[test]
fn cluster_on_random_shapes() {
    let (mut empty, mut split) = (0, 0);
    for seed in 0..CLUSTERED_SHAPES {
        let case = ClusterCase::random(seed);
        let state = clustered(&case, &format!("seed {seed}"), seed);
        empty += state.sizes.iter().filter(|size| **size == 0).count();
        let most = case.page_tokens as u32;
        split += state.sizes.iter().filter(|size| **size > most).count();
        let members: u32 = state.sizes.iter().sum();
        assert_eq!(members as usize, case.kv_heads * case.tokens, "seed {seed}: every token is in a cluster");
    }
    assert!(empty > 20 && split > 20, "{empty} empty clusters, {split} of several pages");
}

#[test]
fn cluster_of_a_long_run() {
    let case = ClusterCase::long(1);
    let state = clustered(&case, "long", 1);
    assert!(state.sizes.iter().any(|size| *size > 1000), "{:?}", state.sizes);
}

#[test]
fn cluster_assign_of_whole_numbers() {
    for seed in 0..CLUSTERED_SHAPES {
        let (case, before) = ClusterCase::whole(seed);
        for stage in [Stage::Assign, Stage::AssignAll] {
            let after = case
                .emulate(stage, &before, seed)
                .unwrap_or_else(|fault| panic!("seed {seed}, {stage:?}: {fault}"));
            case.check(stage, &before, &after, true)
                .unwrap_or_else(|wrong| panic!("seed {seed}, {stage:?}: {wrong}"));
        }
    }
}

#[test]
fn cluster_finds_the_kinds_that_there_are() {
    for seed in 0..4 {
        let case = ClusterCase::kinds(seed);
        let state = clustered(&case, &format!("seed {seed}"), seed);
        case.check_kinds(&state).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
    }
}

#[test]
fn cluster_in_random_orders() {
    let case = ClusterCase { iterations: 1, ..ClusterCase::random(CLUSTERED_SHAPES) };
    let mut before = case.state();
    for stage in case.stages() {
        let first = case.emulate(stage, &before, 0).unwrap();
        for schedule in 1..SCHEDULES / 10 {
            assert_eq!(
                case.emulate(stage, &before, schedule).unwrap(),
                first,
                "schedule {schedule}, {stage:?}"
            );
        }
        before = first;
    }
}
