//! Random sequences of everything that can be done to a cache.

use std::collections::BTreeSet;

use proptest::prelude::*;
use proptest::sample::Index;
use spinkv::Error;
use spinkv::memory::PhysicalPage;
use spinkv::paging::{
    BucketedLru, Deduplicator, EvictionPolicy, Fifo, FlatMap, Lru, Resolution, RowCache, SaturatingLru,
    SlotId, SlotMap, StepClock,
};

use super::model::{Model, Rank};
use super::{physical, select};

const KEYS: u32 = 40;

#[derive(Clone, Debug)]
enum Use {
    /// Ids as a selector gives them: in any order, some twice.
    Step(Vec<u32>),
    /// Another selection within the same step.
    Again(Vec<u32>),
    Adopt(u32),
    /// Steps of the request that touch nothing of this row.
    Idle(u32),
    /// Steps of the request in which this row is not even asked.
    Skip(u32),
    /// The request is preempted and comes back: nothing happens, and no page ages.
    Pause,
    Grow(usize),
    Shrink(usize),
    Pin(Index),
    Unpin(Index),
    Withdraw(Index),
    Release,
}

fn uses() -> impl Strategy<Value = Vec<Use>> {
    let selection = || prop::collection::vec(0u32..30, 0..12);
    let one = prop_oneof![
        12 => selection().prop_map(Use::Step),
        2 => selection().prop_map(Use::Again),
        4 => (0u32..KEYS).prop_map(Use::Adopt),
        2 => (1u32..90).prop_map(Use::Idle),
        2 => (1u32..200).prop_map(Use::Skip),
        1 => Just(Use::Pause),
        2 => (0usize..6).prop_map(Use::Grow),
        2 => (0usize..8).prop_map(Use::Shrink),
        3 => any::<Index>().prop_map(Use::Pin),
        3 => any::<Index>().prop_map(Use::Unpin),
        1 => any::<Index>().prop_map(Use::Withdraw),
        1 => Just(Use::Release),
    ];
    prop::collection::vec(one, 0..80)
}

/// Where a request's clock stands when the row is made, wrap-around included.
fn phases() -> impl Strategy<Value = u32> {
    prop_oneof![0u32..130, (u32::MAX - 300)..=u32::MAX]
}

fn unique(ids: &[u32]) -> Vec<u32> {
    let mut kept = Vec::new();
    for id in ids {
        if !kept.contains(id) {
            kept.push(*id);
        }
    }
    kept
}

/// Map, pages by key, physical pages and states of a row, for comparison.
type Seen = (FlatMap, Vec<(u32, PhysicalPage)>, Vec<PhysicalPage>, Vec<u8>);

/// A row and everything around it.
struct Row<P> {
    map: FlatMap,
    cache: RowCache<P>,
    out: Resolution,
}

impl<P: EvictionPolicy> Row<P> {
    fn new(pages: &[u32], policy: P) -> Self {
        let cache = RowCache::new(physical(pages.iter().copied()), policy);
        Self { map: FlatMap::new(KEYS), cache, out: Resolution::default() }
    }

    /// Everything that can be seen of the row.
    fn seen(&self) -> Seen {
        let cache = &self.cache;
        let states = cache.states().bytes().to_vec();
        (self.map.clone(), cache.resident().collect(), cache.physical_pages().collect(), states)
    }
}

/// Carries out `uses` on the cache, on a twin (I13) and on the model, and compares all three after each.
fn run<P: EvictionPolicy>(
    policy: impl Fn() -> P,
    rank: Rank,
    capacity: u32,
    phase: u32,
    uses: &[Use],
) -> Result<(), TestCaseError> {
    let start: Vec<u32> = (100..100 + capacity).collect();
    let (mut row, mut twin) = (Row::new(&start, policy()), Row::new(&start, policy()));
    let mut clock = StepClock(phase);
    let mut model = Model::new(&start, 0, rank);
    // Physical pages outside of the cache, as a pool and a steady zone hold them.
    let mut outside: Vec<u32> = (0..12).collect();
    let all: BTreeSet<u32> = outside.iter().copied().chain(start.iter().copied()).collect();
    let mut dedup = Deduplicator::new(KEYS);
    for row in [&mut row, &mut twin] {
        row.cache.begin_step(clock);
    }

    for one in uses {
        match one {
            Use::Idle(steps) => {
                for _ in 0..*steps {
                    clock.tick();
                    for row in [&mut row, &mut twin] {
                        row.cache.begin_step(clock);
                    }
                    model.step(model.now + 1);
                }
            }
            Use::Skip(steps) => {
                clock = StepClock(clock.0.wrapping_add(*steps));
                for row in [&mut row, &mut twin] {
                    row.cache.begin_step(clock);
                }
                model.step(model.now + u64::from(*steps));
            }
            Use::Pause => {}
            Use::Step(ids) | Use::Again(ids) => {
                if matches!(one, Use::Step(_)) {
                    clock.tick();
                    for row in [&mut row, &mut twin] {
                        row.cache.begin_step(clock);
                    }
                    model.step(model.now + 1);
                }
                let mut keys = ids.clone();
                let repeated = dedup.first_occurrences(&mut keys);
                // I8: duplicates change nothing.
                prop_assert_eq!(&keys, &unique(ids));
                prop_assert_eq!(repeated, ids.len() - keys.len());

                let (before, empty, oldest) = (row.seen(), model.empty().len(), model.clone());
                let pinned_before: Vec<_> = model.held().filter(|held| held.2.pins > 0).collect();
                let Row { map, cache, out } = &mut row;
                let found = cache.resolve(map, &select(&keys), out);
                let Row { map, cache, out } = &mut twin;
                prop_assert_eq!(&found, &cache.resolve(map, &select(&keys), out));
                let answer = model.resolve(&keys);
                let out = &row.out;
                let Some(answer) = answer else {
                    let pinned = pinned_before.iter().filter(|held| !keys.contains(&held.2.key)).count();
                    let (selected, capacity) = (keys.len(), oldest.capacity());
                    prop_assert!(selected + pinned > capacity);
                    prop_assert_eq!(
                        found,
                        Err(Error::SelectionExceedsCapacity { selected, capacity, pinned })
                    );
                    prop_assert_eq!(row.seen(), before);
                    prop_assert!(out.pages.is_empty() && out.copies.is_empty() && out.evicted.is_empty());
                    continue;
                };
                prop_assert_eq!(found, Ok(()));
                prop_assert_eq!(&(out.pages.clone(), out.copies.clone(), out.evicted.clone()), &answer);

                // I2: every selected page is resident, where the answer says.
                for (key, page) in keys.iter().zip(&out.pages) {
                    prop_assert_eq!(row.cache.lookup(&row.map, *key), Some(*page));
                }
                // I3: nothing that is selected or pinned left.
                prop_assert!(out.evicted.iter().all(|key| !keys.contains(key)));
                prop_assert!(pinned_before.iter().all(|held| !out.evicted.contains(&held.2.key)));
                // I4: no more left than had to.
                prop_assert_eq!(out.evicted.len(), out.copies.len().saturating_sub(empty));
                // I5: no survivor was worth less than a victim.
                let worth = |slot: usize| {
                    let held = oldest.slots[slot].unwrap().1.unwrap();
                    (oldest.rank)(oldest.now - held.used, oldest.now - held.admitted)
                };
                let (mut gone, mut stayed) = (Vec::new(), Vec::new());
                for (slot, _, held) in oldest.held() {
                    if out.evicted.contains(&held.key) {
                        gone.push(worth(slot));
                    } else if held.pins == 0 && !keys.contains(&held.key) {
                        stayed.push(worth(slot));
                    }
                }
                if let (Some(least), Some(most)) = (gone.iter().min(), stayed.iter().max()) {
                    prop_assert!(most <= least);
                }
            }
            Use::Adopt(key) if model.slot(*key).is_some() || outside.is_empty() => {}
            Use::Adopt(key) => {
                let page = outside.remove(0);
                let adoption = row.cache.adopt(&mut row.map, *key, PhysicalPage(page));
                prop_assert_eq!(adoption, twin.cache.adopt(&mut twin.map, *key, PhysicalPage(page)));
                prop_assert_eq!((adoption.spare.0, adoption.evicted), model.adopt(*key, page));
                outside.push(adoption.spare.0);
            }
            Use::Grow(count) => {
                let pages: Vec<_> = outside.drain(..(*count).min(outside.len())).collect();
                for row in [&mut row, &mut twin] {
                    row.cache.grow(physical(pages.iter().copied()));
                }
                model.grow(&pages);
            }
            Use::Shrink(_) | Use::Release => {
                let [shrunk, again] = [&mut row, &mut twin].map(|Row { map, cache, .. }| match one {
                    Use::Shrink(count) => cache.shrink(map, *count),
                    _ => cache.release_all(map),
                });
                prop_assert_eq!(&shrunk, &again);
                let count = if let Use::Shrink(count) = one { *count } else { usize::MAX };
                prop_assert_eq!(&shrunk, &model.shrink(count));
                outside.extend(shrunk.pages.iter().map(|page| page.0));
                if matches!(one, Use::Release) {
                    prop_assert_eq!(row.cache.capacity(), row.cache.pinned());
                }
            }
            Use::Pin(which) | Use::Unpin(which) | Use::Withdraw(which) => {
                let held: Vec<_> = model.held().collect();
                if held.is_empty() {
                    continue;
                }
                let (slot, _, held) = held[which.index(held.len())];
                let id = SlotId(slot as u32);
                match one {
                    Use::Pin(_) if held.pins < 255 => {
                        for row in [&mut row, &mut twin] {
                            row.cache.pin(id);
                        }
                        model.held_mut(slot).pins += 1;
                    }
                    Use::Unpin(_) if held.pins > 0 => {
                        for row in [&mut row, &mut twin] {
                            row.cache.unpin(id);
                        }
                        model.held_mut(slot).pins -= 1;
                    }
                    Use::Withdraw(_) if held.pins == 0 => {
                        let gone =
                            [&mut row, &mut twin].map(|row| row.cache.withdraw(&mut row.map, held.key));
                        prop_assert_eq!(gone, [true, true]);
                        model.withdraw(slot);
                    }
                    _ => {}
                }
            }
        }
        same(&row, &model)?;
        prop_assert_eq!(row.seen(), twin.seen(), "I13: two runs agree");
        // I6 and I12: every physical page is in one place.
        let held = row.cache.physical_pages().map(|page| page.0);
        let places: Vec<_> = held.chain(outside.iter().copied()).collect();
        prop_assert_eq!(places.len(), all.len());
        prop_assert_eq!(&places.into_iter().collect::<BTreeSet<_>>(), &all);
    }
    Ok(())
}

/// The row holds what the model does, and its tables agree with each other (I1, I6).
fn same<P: EvictionPolicy>(row: &Row<P>, model: &Model) -> Result<(), TestCaseError> {
    let Row { map, cache, .. } = row;
    let held: Vec<_> = model.held().map(|(_, page, held)| (held.key, PhysicalPage(page))).collect();
    prop_assert!(cache.resident().eq(held.iter().copied()));
    prop_assert_eq!(cache.physical_pages().map(|page| page.0).collect::<Vec<_>>(), model.pages());
    prop_assert_eq!((cache.len(), cache.capacity()), (held.len(), model.capacity()));
    prop_assert_eq!((cache.is_empty(), cache.pinned()), (held.is_empty(), model.pinned()));
    for key in 0..KEYS + 5 {
        let slot = model.slot(key);
        prop_assert_eq!(map.get(key), slot.map(|slot| SlotId(slot as u32)));
        if let Some(slot) = map.get(key) {
            prop_assert_eq!(cache.owner(slot), Some(key));
            prop_assert!(cache.states().is_held(slot));
            let pins = model.slots[slot.index()].unwrap().1.unwrap().pins;
            prop_assert_eq!(cache.states().is_pinned(slot), pins > 0);
        }
    }
    for slot in 0..model.slots.len() {
        let key = model.slots[slot].and_then(|(_, held)| held.map(|held| held.key));
        prop_assert_eq!(cache.owner(SlotId(slot as u32)), key);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn bucketed_lru_evicts_by_clamped_age(capacity in 0u32..14, phase in phases(), uses in uses()) {
        run(BucketedLru::<64>::default, |unused, _| unused.min(63), capacity, phase, &uses)?;
    }

    #[test]
    fn bucketed_lru_of_16_states_evicts_by_clamped_age(capacity in 0u32..14, phase in phases(), uses in uses()) {
        run(BucketedLru::<16>::default, |unused, _| unused.min(15), capacity, phase, &uses)?;
    }

    #[test]
    fn bucketed_lru_of_4_states_evicts_by_clamped_age(capacity in 0u32..14, phase in phases(), uses in uses()) {
        run(BucketedLru::<4>::default, |unused, _| unused.min(3), capacity, phase, &uses)?;
    }

    #[test]
    fn saturating_lru_evicts_by_clamped_age(capacity in 0u32..14, phase in phases(), uses in uses()) {
        run(SaturatingLru::<64>::default, |unused, _| unused.min(63), capacity, phase, &uses)?;
    }

    #[test]
    fn lru_evicts_what_was_used_longest_ago(capacity in 0u32..14, phase in phases(), uses in uses()) {
        run(Lru::default, |unused, _| unused, capacity, phase, &uses)?;
    }

    #[test]
    fn fifo_evicts_what_came_first(capacity in 0u32..14, phase in phases(), uses in uses()) {
        run(Fifo::default, |_, held| held, capacity, phase, &uses)?;
    }

    /// The same for caches of more than one block of slots.
    #[test]
    fn bucketed_lru_evicts_by_clamped_age_from_large_caches(
        capacity in 60u32..200,
        phase in phases(),
        steps in prop::collection::vec(prop::collection::btree_set(0u32..600, 0..60), 0..60),
    ) {
        let pages: Vec<_> = (0..capacity).collect();
        let mut cache = RowCache::new(physical(pages.iter().copied()), BucketedLru::<16>::default());
        let mut map = FlatMap::new(600);
        let mut out = Resolution::default();
        let mut model = Model::new(&pages, 0, |unused, _| unused.min(15));
        let mut clock = StepClock(phase);
        for keys in steps {
            let keys: Vec<_> = keys.into_iter().take(capacity as usize).collect();
            clock.tick();
            cache.begin_step(clock);
            model.step(model.now + 1);
            cache.resolve(&mut map, &select(&keys), &mut out).unwrap();
            let answer = model.resolve(&keys).unwrap();
            prop_assert_eq!(&(out.pages.clone(), out.copies.clone(), out.evicted.clone()), &answer);
        }
    }
}
