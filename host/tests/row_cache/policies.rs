//! What single policies promise, and what holds for all of them.

use std::sync::Arc;

use proptest::prelude::*;
use spinkv::paging::{
    Belady, BucketedLru, Deduplicator, EvictionPolicy, Fifo, FlatMap, Future, Lru, PreviousStep, Random,
    Resolution, RowCache, SaturatingLru, StepClock,
};

use super::{physical, select};

const KEYS: u32 = 24;

/// The misses of each step.
fn misses<P: EvictionPolicy>(policy: P, capacity: u32, steps: &[Vec<u32>]) -> Vec<usize> {
    let mut cache = RowCache::new(physical(0..capacity), policy);
    let (mut map, mut out, mut clock) = (FlatMap::new(KEYS), Resolution::default(), StepClock(7));
    let mut resolve = |keys: &Vec<u32>| {
        clock.tick();
        cache.begin_step(clock);
        cache.resolve(&mut map, &select(keys), &mut out).unwrap();
        assert_eq!(out.pages.len(), keys.len());
        out.copies.len()
    };
    steps.iter().map(&mut resolve).collect()
}

fn future(steps: &[Vec<u32>]) -> Arc<Future> {
    Arc::new(Future::new(KEYS, steps.iter().map(Vec::as_slice)))
}

/// The fewest misses with which `steps` can be served, by trying everything that can stay.
fn fewest_misses(capacity: u32, steps: &[Vec<u32>]) -> usize {
    use std::collections::HashMap;
    let mut reached: HashMap<u32, usize> = HashMap::from([(0, 0)]);
    for keys in steps {
        let selected = keys.iter().fold(0u32, |set, key| set | 1 << key);
        let mut next: HashMap<u32, usize> = HashMap::new();
        for (held, misses) in reached {
            let misses = misses + (selected & !held).count_ones() as usize;
            let others = held & !selected;
            // Any part of the rest may stay, if it fits.
            let mut kept = others;
            loop {
                if (kept | selected).count_ones() <= capacity {
                    let best = next.entry(kept | selected).or_insert(usize::MAX);
                    *best = misses.min(*best);
                }
                if kept == 0 {
                    break;
                }
                kept = (kept - 1) & others;
            }
        }
        reached = next;
    }
    reached.into_values().min().unwrap()
}

/// Selections of at most `largest` keys out of `keys`.
fn steps(keys: u32, largest: usize, count: usize) -> impl Strategy<Value = Vec<Vec<u32>>> {
    let step = prop::collection::btree_set(0..keys, 0..=largest);
    prop::collection::vec(step.prop_map(|keys| keys.into_iter().collect()), 0..count)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn belady_misses_as_little_as_can_be(capacity in 3u32..6, steps in steps(8, 3, 14)) {
        let total: usize = misses(Belady::new(future(&steps)), capacity, &steps).iter().sum();
        prop_assert_eq!(total, fewest_misses(capacity, &steps));
    }

    #[test]
    fn no_policy_misses_less_than_belady(capacity in 6u32..16, steps in steps(KEYS, 6, 60), seed: u64) {
        let total = |counts: Vec<usize>| counts.iter().sum::<usize>();
        let least = total(misses(Belady::new(future(&steps)), capacity, &steps));
        prop_assert!(least <= total(misses(Lru::default(), capacity, &steps)));
        prop_assert!(least <= total(misses(Fifo::default(), capacity, &steps)));
        prop_assert!(least <= total(misses(Random::new(seed), capacity, &steps)));
        prop_assert!(least <= total(misses(BucketedLru::<64>::default(), capacity, &steps)));
        prop_assert!(least <= total(misses(PreviousStep::default(), capacity, &steps)));
    }

    #[test]
    fn previous_step_hits_what_the_step_before_selected_whatever_the_capacity(capacity in 6u32..24, steps in steps(KEYS, 6, 40)) {
        let found = misses(PreviousStep::default(), capacity, &steps);
        let mut before: &[u32] = &[];
        for (keys, misses) in steps.iter().zip(found) {
            prop_assert_eq!(misses, keys.iter().filter(|key| !before.contains(key)).count());
            before = keys;
        }
    }

    #[test]
    fn a_cache_of_one_step_is_the_previous_step_under_every_lru(steps in steps(KEYS, 6, 60)) {
        // With selections of one size there is room for nothing else.
        let steps: Vec<_> = steps.into_iter().filter(|keys| keys.len() == 6).collect();
        let expected = misses(PreviousStep::default(), 6, &steps);
        prop_assert_eq!(&misses(Lru::default(), 6, &steps), &expected);
        prop_assert_eq!(&misses(BucketedLru::<4>::default(), 6, &steps), &expected);
        prop_assert_eq!(&misses(Belady::new(future(&steps)), 6, &steps), &expected);
    }

    #[test]
    fn with_no_more_steps_than_states_bucketed_lru_is_lru(capacity in 6u32..16, steps in steps(KEYS, 6, 63)) {
        prop_assert_eq!(misses(BucketedLru::<64>::default(), capacity, &steps), misses(Lru::default(), capacity, &steps));
        prop_assert_eq!(misses(SaturatingLru::<64>::default(), capacity, &steps), misses(Lru::default(), capacity, &steps));
    }

    /// I8: a selection with repeated ids leaves the same tables as one without.
    #[test]
    fn repeated_ids_change_nothing(steps in prop::collection::vec(prop::collection::vec(0..KEYS, 0..14), 0..40)) {
        let mut dedup = Deduplicator::new(KEYS);
        let (mut once, mut sorted) = (Vec::new(), Vec::new());
        for ids in &steps {
            let mut keys = ids.clone();
            let repeated = dedup.first_occurrences(&mut keys);
            let mut ascending = ids.clone();
            ascending.sort();
            prop_assert_eq!(Deduplicator::ascending(&mut ascending), repeated);
            let mut by_sort = keys.clone();
            by_sort.sort();
            prop_assert_eq!(&by_sort, &ascending);
            once.push(keys);
            sorted.push(ascending);
        }
        // The order of a selection decides which slot a miss gets, never what hits.
        prop_assert_eq!(misses(Lru::default(), KEYS, &once), misses(Lru::default(), KEYS, &sorted));
    }

    #[test]
    fn random_follows_its_seed(capacity in 6u32..16, steps in steps(KEYS, 6, 40), seed: u64) {
        prop_assert_eq!(misses(Random::new(seed), capacity, &steps), misses(Random::new(seed), capacity, &steps));
    }
}

#[test]
fn random_picks_every_slot_about_as_often() {
    let mut left = [0usize; 8];
    let mut cache = RowCache::new(physical(0..8), Random::new(3));
    let (mut map, mut out) = (FlatMap::new(5000), Resolution::default());
    cache.resolve(&mut map, &select(&[0, 1, 2, 3, 4, 5, 6, 7]), &mut out).unwrap();
    for key in 8..4008 {
        cache.resolve(&mut map, &select(&[key]), &mut out).unwrap();
        left[out.copies[0].page.0 as usize] += 1;
    }
    assert!(left.iter().all(|count| (420..580).contains(count)), "{left:?}");
}
