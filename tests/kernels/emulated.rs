//! The kernels' own sources under the emulator, against the CPU reference: random ragged shapes, random schedules.

#[path = "emulated/attend.rs"]
mod attend;
#[path = "emulated/cluster.rs"]
mod cluster;
#[path = "emulated/drift.rs"]
mod drift;
#[path = "emulated/estimate.rs"]
mod estimate;
#[path = "emulated/fill_random.rs"]
mod fill_random;
#[path = "emulated/gate.rs"]
mod gate;
#[path = "emulated/index.rs"]
mod index;
#[path = "emulated/linear.rs"]
mod linear;
#[path = "emulated/low_rank.rs"]
mod low_rank;
#[path = "emulated/model.rs"]
mod model;
#[path = "emulated/offload.rs"]
mod offload;
#[path = "emulated/outliers.rs"]
mod outliers;
#[path = "emulated/prefill.rs"]
mod prefill;
#[path = "emulated/resolve.rs"]
mod resolve;
#[path = "emulated/select.rs"]
mod select;

use spinkv_kernel_tests::gather::GatherCase;

/// Shapes of a kernel, each in an order of its own.
const SHAPES: u64 = 120;
/// Orders of one shape.
const SCHEDULES: u64 = 100;

#[test]
fn gather_on_random_shapes() {
    for seed in 0..SHAPES {
        let case = GatherCase::random(seed);
        let (pool, arrived) =
            case.emulate(seed).unwrap_or_else(|fault| panic!("seed {seed}: {fault}\n{case:?}"));
        case.check(&pool, &arrived).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
    }
}

#[test]
fn gather_coded_on_random_shapes() {
    for seed in 0..SHAPES {
        let case = GatherCase::coded(seed);
        let (pool, arrived) =
            case.emulate(seed).unwrap_or_else(|fault| panic!("seed {seed}: {fault}\n{case:?}"));
        case.check(&pool, &arrived).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
    }
}

#[test]
fn gather_bulk_on_random_shapes() {
    for seed in 0..SHAPES {
        let case = GatherCase::random(seed);
        let (pool, arrived) =
            case.emulate_bulk(seed).unwrap_or_else(|fault| panic!("seed {seed}: {fault}\n{case:?}"));
        case.check(&pool, &arrived).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
    }
}

#[test]
fn gather_bulk_in_random_orders() {
    let case = GatherCase::ring();
    let first = case.emulate_bulk(0).unwrap();
    case.check(&first.0, &first.1).unwrap();
    for schedule in 1..SCHEDULES {
        assert_eq!(case.emulate_bulk(schedule).unwrap(), first, "schedule {schedule}");
    }
}

#[test]
fn gather_in_random_orders() {
    for case in [GatherCase::random(SHAPES), GatherCase::coded(SHAPES)] {
        let first = case.emulate(0).unwrap();
        case.check(&first.0, &first.1).unwrap();
        for schedule in 1..SCHEDULES {
            assert_eq!(case.emulate(schedule).unwrap(), first, "schedule {schedule}");
        }
    }
}
