use std::collections::HashSet;

use spinkv_kernel_tests::drift::DriftCase;
use spinkv_kernels::abi::drift::{DriftRow, PACE};

use super::SHAPES;

#[test]
fn drift_on_random_shapes() {
    for seed in 0..SHAPES {
        let case = DriftCase::random(seed);
        let (ids, selected) =
            case.emulate(seed).unwrap_or_else(|fault| panic!("seed {seed}: {fault}\n{case:?}"));
        case.check(&ids, &selected).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}\n{case:?}"));
    }
}

fn selection(row: u32, tokens: u32, partitions: u32, count: u32, pace: u32) -> Vec<u32> {
    let drawn = DriftRow { row, tokens, partitions, count, pace };
    (0..count).map(|at| drawn.partition(at)).collect()
}

#[test]
fn drawn_partitions_are_ascending_and_among_those_that_there_are() {
    for (partitions, count) in
        [(2, 1), (3, 2), (40, 39), (63, 1), (64, 63), (65, 64), (1000, 999), (131_071, 256)]
    {
        for tokens in [1, 2, 3, 77_777, 2_000_000] {
            let drawn = selection(5, tokens, partitions, count, PACE);
            assert!(drawn.is_sorted_by(|a, b| a < b), "{partitions}, {count}: {drawn:?}");
            assert!(drawn.iter().all(|id| *id < partitions), "{partitions}, {count}: {drawn:?}");
        }
    }
}

/// As many change as the pace says, other ones in other rows, all at pace 0 stay; a partition more cuts nothing anew.
#[test]
fn selections_change_at_their_pace() {
    let changed = |row, pace, step: u32| {
        let before: HashSet<u32> = selection(row, step, 4096 + step / 8, 256, pace).into_iter().collect();
        selection(row, step + 1, 4096 + (step + 1) / 8, 256, pace)
            .iter()
            .filter(|id| !before.contains(id))
            .count()
    };
    let of_row = |row, pace| (0..100).map(|step| changed(row, pace, step)).sum::<usize>();
    assert_eq!(of_row(0, 0), 0);
    // Some of those that are drawn anew are drawn again.
    let share = of_row(0, PACE) as f64 / 25_600.0;
    assert!((0.2..0.36).contains(&share), "{share} of a selection are new in a step");
    assert_ne!(selection(0, 9, 4096, 256, PACE), selection(1, 9, 4096, 256, PACE));
}

/// What `PACE` says of caches, which are the paging tables' own.
#[test]
fn caches_miss_as_often_as_is_said() {
    use spinkv::memory::PhysicalPage;
    use spinkv::paging::{BucketedLru, FlatMap, Resolution, RowCache, StepClock};
    use spinkv::partition::SelectedPage;

    for (times, expected) in [(1, 0.21), (2, 0.13), (4, 0.09)] {
        let slots = (0..times * 256).map(PhysicalPage).collect();
        let mut cache = RowCache::new(slots, BucketedLru::<64>::default());
        let (mut map, mut clock, mut out) = (FlatMap::new(8192), StepClock::default(), Resolution::default());
        let mut misses = 0;
        for step in 0..500 {
            let pages: Vec<_> = selection(3, 30_000 + step, 4096, 256, PACE)
                .into_iter()
                .map(|key| SelectedPage { key, tokens: 8 })
                .collect();
            clock.tick();
            cache.begin_step(clock);
            cache.resolve(&mut map, &pages, &mut out).unwrap();
            misses += if step >= 150 { out.copies.len() } else { 0 };
        }
        let share = misses as f64 / (350.0 * 256.0);
        assert!((share - expected).abs() < 0.02, "{times} times: {share} missed");
    }
}
