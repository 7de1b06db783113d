//! What holds for all inputs, each against a naive model written here.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use proptest::prelude::*;
use spinkv::algorithms::ShadowKv;
use spinkv::backend::cpu::{mean_key, top_k};
use spinkv::memory::{
    HostArena, HostPage, KvDtype, PageLayout, PagePool, PhysicalPage, RequestPlan, SLAB_PAGES,
};
use spinkv::paging::{HostTable, Lru, PageCopy, Resolution, RowCache, SteadyPages};
use spinkv::partition::{ClusterTable, PartitionKind, PartitionMap, SelectedPage};
use spinkv::pipeline::{Budget, SteadyZone, Zones};
use spinkv::{Error, KvConfig, KvShape};

/// A steady zone, the pages' tokens and the unit, which is a multiple of them.
fn zone_parts() -> impl Strategy<Value = (SteadyZone, usize, usize)> {
    (0usize..40, 1usize..80, 1usize..=16, 1usize..=4).prop_map(|(sinks, window, page_tokens, pages)| {
        (SteadyZone { sinks, window }, page_tokens, pages * page_tokens)
    })
}

proptest! {
    #[test]
    fn zones_cover_each_token_once_and_keep_sinks_and_window((steady, _, unit) in zone_parts(), tokens in 0usize..600) {
        let zones = Zones::at(tokens, &steady, unit);
        let range = zones.retrievable.clone();
        prop_assert_eq!(zones.tokens, tokens);
        prop_assert!(range.start <= range.end && range.end <= tokens);
        if !range.is_empty() {
            prop_assert_eq!((range.start % unit, range.end % unit), (0, 0));
        }
        for token in 0..tokens {
            let first = token / unit * unit;
            let retrievable = first >= steady.sinks && first + unit + steady.window <= tokens;
            prop_assert_eq!(range.contains(&token), retrievable, "token {}", token);
            prop_assert_eq!(zones.is_steady(token), !retrievable);
            if token < steady.sinks || token + steady.window >= tokens {
                prop_assert!(zones.is_steady(token));
            }
        }
        prop_assert!(!zones.is_steady(tokens), "a token that is not there has no zone");
    }

    #[test]
    fn a_token_never_comes_back_to_the_steady_zone((steady, _, unit) in zone_parts()) {
        let mut last = Zones::at(0, &steady, unit).retrievable;
        for tokens in 1..400 {
            let next = Zones::at(tokens, &steady, unit).retrievable;
            prop_assert!(last.is_empty() || next.start == last.start && next.end >= last.end);
            prop_assert!(next.len() - last.len() == 0 || next.len() - last.len() == unit);
            last = next;
        }
    }

    #[test]
    fn the_bound_on_steady_pages_holds_at_all_lengths_and_is_reached((steady, page_tokens, unit) in zone_parts()) {
        let bound = steady.max_pages(unit, page_tokens);
        let most = (0..=steady.sinks + steady.window + 4 * unit).map(|tokens| {
            let zones = Zones::at(tokens, &steady, unit);
            (0..tokens.div_ceil(page_tokens)).filter(|page| zones.is_steady(page * page_tokens)).count()
        });
        prop_assert_eq!(most.max().unwrap(), bound);
    }

    #[test]
    fn chunks_expand_to_all_their_pages(page_tokens in 1usize..=16, pages in 1u32..=8, ids in prop::collection::btree_set(0u32..200, 0..40)) {
        let kind = PartitionKind::Chunk { tokens: pages as usize * page_tokens };
        let map = PartitionMap::new(kind, page_tokens, "m").unwrap();
        let ids: Vec<_> = ids.into_iter().collect();
        let mut found = Vec::new();
        map.expand(&ids, &mut found);
        let mut expected = Vec::new();
        for token in 0..200 * pages as usize * page_tokens {
            let partition = (token / (pages as usize * page_tokens)) as u32;
            if token % page_tokens == 0 && ids.contains(&partition) {
                expected.push(SelectedPage { key: (token / page_tokens) as u32, tokens: page_tokens as u32 });
            }
        }
        prop_assert_eq!(&found, &expected);
        prop_assert_eq!(map.max_pages(ids.len()), Some(found.len()));
        prop_assert_eq!(kind.zone_unit(page_tokens), pages as usize * page_tokens);
    }

    #[test]
    fn tokens_expand_to_each_of_their_pages_once(page_tokens in 1usize..=16, ids in prop::collection::btree_set(0u32..500, 0..100)) {
        let map = PartitionMap::new(PartitionKind::Token, page_tokens, "m").unwrap();
        let ids: Vec<_> = ids.into_iter().collect();
        let mut found = Vec::new();
        map.expand(&ids, &mut found);
        let keys: BTreeSet<u32> = ids.iter().map(|id| id / page_tokens as u32).collect();
        prop_assert!(found.iter().map(|page| page.key).eq(keys));
        prop_assert!(found.iter().all(|page| page.tokens as usize == page_tokens));
        prop_assert!(found.len() <= map.max_pages(ids.len()).unwrap());
    }

    #[test]
    fn a_chunk_is_whole_pages_or_refused(page_tokens in 1usize..=16, tokens in 0usize..=64) {
        let map = PartitionMap::new(PartitionKind::Chunk { tokens }, page_tokens, "m");
        if tokens > 0 && tokens % page_tokens == 0 {
            prop_assert!(map.is_ok());
        } else {
            let method = "m".to_owned();
            let error = Error::PageSizeDoesNotDivide { method, page_tokens, partition_tokens: tokens };
            prop_assert_eq!(map, Err(error));
        }
    }

    #[test]
    fn clusters_cover_their_tokens_on_pages_of_their_own(
        page_tokens in 1usize..=16,
        sizes in prop::collection::vec(0u32..70, 0..30),
        wanted in prop::collection::btree_set(0usize..30, 0..30),
    ) {
        let mut table = ClusterTable::new(page_tokens);
        prop_assert!(table.is_empty());
        for (id, size) in sizes.iter().enumerate() {
            prop_assert_eq!(table.push(*size), id as u32);
        }
        prop_assert_eq!(table.len(), sizes.len());
        let mut next = 0;
        for (id, size) in sizes.iter().enumerate() {
            let pages: Vec<_> = table.pages(id as u32).collect();
            // Runs are disjoint and leave no gap; every page but the last is full, and none is empty.
            for (index, page) in pages.iter().enumerate() {
                prop_assert_eq!(page.key, next);
                next += 1;
                let full = page.tokens as usize == page_tokens;
                prop_assert!(full || index == pages.len() - 1 && page.tokens > 0);
            }
            prop_assert_eq!(pages.iter().map(|page| page.tokens).sum::<u32>(), *size);
        }
        prop_assert_eq!(table.total_pages(), next);
        // Each cluster pads less than one page.
        let padding = next as usize * page_tokens - sizes.iter().sum::<u32>() as usize;
        prop_assert!(padding <= sizes.len() * (page_tokens - 1));

        let ids: Vec<_> = wanted.into_iter().filter(|id| *id < sizes.len()).map(|id| id as u32).collect();
        let expected: Vec<_> = ids.iter().flat_map(|id| table.pages(*id)).collect();
        let mut found = Vec::new();
        PartitionMap::Cluster(table).expand(&ids, &mut found);
        prop_assert!(found.is_sorted_by(|a, b| a.key < b.key));
        prop_assert_eq!(found, expected);
    }
}

/// What is done to a cache.
#[derive(Clone, Debug)]
enum Use {
    Step(BTreeSet<u32>),
    /// Another selection within the same step.
    Again(BTreeSet<u32>),
    Adopt(u32),
    Idle,
}

fn uses() -> impl Strategy<Value = Vec<Use>> {
    let selection = || prop::collection::btree_set(0u32..30, 0..10);
    let one = prop_oneof![
        5 => selection().prop_map(Use::Step),
        1 => selection().prop_map(Use::Again),
        3 => (0u32..45).prop_map(Use::Adopt),
        1 => Just(Use::Idle),
    ];
    prop::collection::vec(one, 0..60)
}

/// A cache as the documents describe it, by search.
#[derive(Clone)]
struct Model {
    now: u64,
    /// Slot to (key, step of its last use).
    slots: Vec<Option<(u32, u64)>>,
    physical: Vec<u32>,
}

impl Model {
    fn slot(&self, key: u32) -> Option<usize> {
        self.slots.iter().position(|slot| slot.is_some_and(|(owner, _)| owner == key))
    }

    fn resident(&self) -> BTreeMap<u32, u32> {
        let owned = self.slots.iter().zip(&self.physical);
        owned.filter_map(|(slot, page)| slot.map(|(key, _)| (key, *page))).collect()
    }

    /// Empty slots, lowest first; then the slots used longest ago, of equals the lowest, in slot order. Nothing
    /// that `keep` names leaves.
    fn room(&self, need: usize, keep: &BTreeSet<u32>) -> (Vec<usize>, Vec<u32>) {
        let empty = (0..self.slots.len()).filter(|slot| self.slots[*slot].is_none());
        let mut targets: Vec<_> = empty.take(need).collect();
        let mut victims: Vec<(u64, usize)> = Vec::new();
        for (slot, held) in self.slots.iter().enumerate() {
            if let Some((key, used)) = held
                && !keep.contains(key)
            {
                victims.push((*used, slot));
            }
        }
        victims.sort();
        let mut victims: Vec<_> = victims[..need - targets.len()].iter().map(|(_, slot)| *slot).collect();
        victims.sort();
        let evicted = victims.iter().map(|slot| self.slots[*slot].unwrap().0).collect();
        targets.extend(victims);
        (targets, evicted)
    }

    fn resolve(&mut self, selection: &BTreeSet<u32>) -> Resolution {
        let missing: Vec<_> = selection.iter().copied().filter(|key| self.slot(*key).is_none()).collect();
        let (targets, evicted) = self.room(missing.len(), selection);
        let mut copies = Vec::new();
        for (key, slot) in missing.iter().zip(targets) {
            self.slots[slot] = Some((*key, self.now));
            copies.push(PageCopy { key: *key, page: PhysicalPage(self.physical[slot]) });
        }
        let mut pages = Vec::new();
        for key in selection {
            let slot = self.slot(*key).unwrap();
            self.slots[slot] = Some((*key, self.now));
            pages.push(PhysicalPage(self.physical[slot]));
        }
        Resolution { pages, copies, evicted }
    }
}

fn selection_of(keys: &BTreeSet<u32>) -> Vec<SelectedPage> {
    keys.iter().map(|key| SelectedPage { key: *key, tokens: 8 }).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    /// Invariants I1 to I6, I9 and I13 of the design: each answer is the model's, which has them by construction,
    /// and those that tables can break are checked once more on the tables.
    #[test]
    fn the_cache_of_a_row_is_least_recently_used_to_the_step(capacity in 0usize..12, uses in uses()) {
        let first = 100u32;
        let start: Vec<u32> = (first..first + capacity as u32).collect();
        let new = || RowCache::<Lru>::new(start.iter().copied().map(PhysicalPage).collect(), 64);
        let (mut cache, mut twin) = (new(), new());
        let mut model = Model { now: 0, slots: vec![None; capacity], physical: start.clone() };
        let (mut out, mut twin_out) = (Resolution::default(), Resolution::default());
        // Physical pages outside the cache, as a steady zone holds them.
        let mut outside: Vec<u32> = (0..5).collect();

        for one in &uses {
            match one {
                Use::Idle => {
                    cache.tick();
                    twin.tick();
                    model.now += 1;
                }
                Use::Step(keys) | Use::Again(keys) => {
                    if matches!(one, Use::Step(_)) {
                        cache.tick();
                        twin.tick();
                        model.now += 1;
                    }
                    let before: Vec<_> = cache.resident().collect();
                    let found = cache.resolve(&selection_of(keys), &mut out);
                    prop_assert_eq!(&found, &twin.resolve(&selection_of(keys), &mut twin_out));
                    if keys.len() > capacity {
                        let selected = keys.len();
                        prop_assert_eq!(found, Err(Error::SelectionExceedsCapacity { selected, capacity }));
                        prop_assert!(cache.resident().eq(before));
                        prop_assert!(out.pages.is_empty() && out.copies.is_empty() && out.evicted.is_empty());
                        continue;
                    }
                    prop_assert_eq!(found, Ok(()));
                    prop_assert_eq!(&out, &twin_out);
                    let free = capacity - before.len();
                    let misses = keys.iter().filter(|key| !before.iter().any(|(held, _)| held == *key)).count();
                    prop_assert_eq!(out.copies.len(), misses);
                    prop_assert_eq!(out.hits(), keys.len() - misses);
                    prop_assert_eq!(out.evicted.len(), misses.saturating_sub(free));
                    prop_assert!(out.evicted.iter().all(|key| !keys.contains(key)));
                    for (key, page) in keys.iter().zip(&out.pages) {
                        prop_assert_eq!(cache.lookup(*key), Some(*page));
                    }
                    prop_assert_eq!(&out, &model.resolve(keys));
                }
                Use::Adopt(key) if model.slot(*key).is_some() => {}
                Use::Adopt(key) => {
                    let page = outside.remove(0);
                    let adoption = cache.adopt(*key, PhysicalPage(page));
                    prop_assert_eq!(adoption, twin.adopt(*key, PhysicalPage(page)));
                    outside.push(adoption.spare.0);
                    if capacity == 0 {
                        prop_assert_eq!((adoption.spare.0, adoption.evicted), (page, None));
                        continue;
                    }
                    prop_assert_eq!(cache.lookup(*key), Some(PhysicalPage(page)));
                    let (targets, evicted) = model.room(1, &BTreeSet::new());
                    prop_assert_eq!(adoption.evicted, evicted.first().copied());
                    prop_assert_eq!(adoption.spare.0, model.physical[targets[0]]);
                    model.slots[targets[0]] = Some((*key, model.now));
                    model.physical[targets[0]] = page;
                }
            }
            let resident: BTreeMap<u32, u32> = cache.resident().map(|(key, page)| (key, page.0)).collect();
            prop_assert_eq!(&resident, &model.resident());
            prop_assert_eq!(cache.resident().count(), resident.len());
            prop_assert_eq!((cache.len(), cache.capacity()), (resident.len(), capacity));
            prop_assert_eq!(cache.is_empty(), resident.is_empty());
            for key in 0..50 {
                prop_assert_eq!(cache.lookup(key).map(|page| page.0), resident.get(&key).copied());
            }
            let held = cache.physical_pages().iter().map(|page| page.0);
            let all: BTreeSet<u32> = held.chain(outside.iter().copied()).collect();
            prop_assert!(all.into_iter().eq((0..5).chain(start.iter().copied())), "a physical page was lost");
        }
    }

    #[test]
    fn pages_are_free_or_held_once_and_keep_their_bytes(
        limit in prop::option::of(0usize..60),
        turns in prop::collection::vec((0usize..12, any::<prop::sample::Index>(), any::<bool>()), 0..40),
    ) {
        let mut pool = PagePool::new(PageLayout::new(1, 8, KvDtype::Bf16).unwrap(), limit);
        let mut held: Vec<(Vec<PhysicalPage>, u128)> = Vec::new();
        for (turn, (count, which, give_back)) in turns.into_iter().enumerate() {
            let used: usize = held.iter().map(|(pages, _)| pages.len()).sum();
            if give_back && !held.is_empty() {
                let (pages, _) = held.swap_remove(which.index(held.len()));
                pool.give_back(pages);
            } else if count <= limit.map_or(usize::MAX, |limit| limit - used) {
                let pages = pool.take(count).unwrap();
                prop_assert_eq!(pages.len(), count);
                pages.iter().for_each(|page| pool.page_mut(*page).fill(turn as u128));
                held.push((pages, turn as u128));
            }
            let ids: BTreeSet<_> = held.iter().flat_map(|(pages, _)| pages).collect();
            let used: usize = held.iter().map(|(pages, _)| pages.len()).sum();
            prop_assert_eq!(ids.len(), used, "a page was given out twice");
            prop_assert_eq!(pool.used_pages(), used);
            prop_assert_eq!(pool.free_pages(), pool.limit() - used);
            if let Some(limit) = limit {
                prop_assert_eq!(pool.limit(), limit);
                prop_assert!(ids.iter().all(|page| (page.0 as usize) < limit));
            }
            for (pages, mark) in &held {
                for page in pages {
                    prop_assert!(pool.page(*page).iter().all(|word| word == mark), "{page:?} changed");
                }
            }
        }
    }

    #[test]
    fn slabs_are_vacant_or_held_once_and_the_limit_is_kept(
        limit in prop::option::of(0usize..12),
        turns in prop::collection::vec((0usize..5, any::<prop::sample::Index>(), any::<bool>()), 0..30),
    ) {
        let layout = PageLayout::new(1, 8, KvDtype::Bf16).unwrap();
        // Half a slab more than whole ones: it is of no use.
        let bytes = limit.map(|slabs| (slabs * SLAB_PAGES * 32 + SLAB_PAGES * 16) as u64);
        let mut arena = HostArena::new(layout, bytes);
        prop_assert_eq!(arena.slab_bytes(), (SLAB_PAGES * 32) as u64);
        // Slabs of each request, with what is written in them.
        let mut requests: Vec<Vec<(spinkv::memory::SlabId, u128)>> = Vec::new();
        for (turn, (count, which, take)) in turns.into_iter().enumerate() {
            let used: usize = requests.iter().map(Vec::len).sum();
            if take {
                let fits = limit.is_none_or(|limit| used + count <= limit);
                match arena.take(count) {
                    Ok(slabs) => {
                        prop_assert!(fits);
                        prop_assert_eq!(slabs.len(), count);
                        for slab in &slabs {
                            for index in 0..SLAB_PAGES {
                                let page = arena.page_mut(HostPage { slab: *slab, index });
                                prop_assert!(page.iter().all(|word| *word == 0), "a slab with old bytes");
                                page.fill((turn * SLAB_PAGES + index) as u128 + 1);
                            }
                        }
                        requests.push(slabs.into_iter().map(|slab| (slab, turn as u128)).collect());
                    }
                    Err(Error::OutOfHostMemory { needed, free, limit: of, .. }) => {
                        prop_assert!(!fits);
                        prop_assert_eq!(needed, count as u64 * arena.slab_bytes());
                        prop_assert_eq!((free, Some(of)), (of - used as u64 * arena.slab_bytes(), bytes));
                    }
                    Err(other) => prop_assert!(false, "{}", other),
                }
            } else if !requests.is_empty() {
                let taken = requests.swap_remove(which.index(requests.len()));
                taken.iter().for_each(|(slab, _)| arena.give_back(*slab));
            }
            prop_assert_eq!(arena.used_slabs(), requests.iter().map(Vec::len).sum::<usize>());
            for (slab, turn) in requests.iter().flatten() {
                for index in 0..SLAB_PAGES {
                    let mark = turn * SLAB_PAGES as u128 + index as u128 + 1;
                    let page = arena.page(HostPage { slab: *slab, index });
                    prop_assert!(page.iter().all(|word| *word == mark), "{slab:?} changed");
                }
            }
        }
    }

    #[test]
    fn steady_pages_are_conserved_and_leave_in_order(
        count in 1usize..12,
        turns in prop::collection::vec((any::<bool>(), 0u32..4, 0u32..8), 0..50),
    ) {
        let mut steady = SteadyPages::new((0..count as u32).map(PhysicalPage).collect());
        let mut model: BTreeMap<u32, PhysicalPage> = BTreeMap::new();
        let mut next = 0;
        for (push, skip, length) in turns {
            if push && model.len() < count {
                next += skip;
                model.insert(next, steady.push(next));
                next += 1;
            } else if !push {
                let first = model.keys().next().copied().unwrap_or(0) + skip;
                let expected = model.range(first..first + length).next().map(|(key, page)| (*key, *page));
                let left = steady.leave(first..first + length);
                prop_assert_eq!(left, expected);
                if let Some((key, page)) = left {
                    model.remove(&key);
                    steady.recycle(page);
                }
            }
            prop_assert!(steady.pages().iter().copied().eq(model.clone()));
            for key in 0..next + 2 {
                prop_assert_eq!(steady.lookup(key), model.get(&key).copied());
            }
            let all: BTreeSet<u32> = steady.physical_pages().map(|page| page.0).collect();
            prop_assert!(all.into_iter().eq(0..count as u32));
            prop_assert_eq!(steady.physical_pages().count(), count);
        }
    }
}

/// Round to nearest, ties to even, on the bits.
fn bf16_of(value: f32) -> f32 {
    let bits = value.to_bits();
    f32::from_bits((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff_0000)
}

proptest! {
    #[test]
    fn pages_read_back_what_was_written_rounded_to_their_type(
        (page_tokens, head_dim) in (1usize..=16, (1usize..=6).prop_map(|eights| eights * 8)),
        dtype in prop_oneof![Just(KvDtype::F32), Just(KvDtype::Bf16)],
        writes in prop::collection::vec((any::<prop::sample::Index>(), -1e4f32..1e4), 1..40),
    ) {
        let layout = PageLayout::new(page_tokens, head_dim, dtype).unwrap();
        prop_assert_eq!(layout.page_words() * 16, layout.page_bytes());
        let round = |value: f32| if dtype == KvDtype::F32 { value } else { bf16_of(value) };
        let mut page = vec![0; layout.page_words()];
        let (mut keys, mut values) = (vec![vec![0f32; head_dim]; page_tokens], vec![vec![0f32; head_dim]; page_tokens]);
        for (token, seed) in writes {
            let token = token.index(page_tokens);
            let key: Vec<f32> = (0..head_dim).map(|i| seed + 0.37 * i as f32).collect();
            let value: Vec<f32> = (0..head_dim).map(|i| -1.7 * seed * i as f32).collect();
            layout.write_token(&mut page, token, &key, &value);
            keys[token] = key.into_iter().map(round).collect();
            values[token] = value.into_iter().map(round).collect();
        }
        for token in 0..page_tokens {
            let mut out = vec![f32::NAN; head_dim];
            layout.read_key(&page, token, &mut out);
            prop_assert_eq!(&out, &keys[token]);
            prop_assert!(keys[token].iter().all(|element| dtype.round(*element) == *element));
            let mut out = vec![f32::NAN; (token + 1) * head_dim];
            layout.read_keys(&page, &mut out);
            prop_assert_eq!(&out, &keys[..=token].concat());
            layout.read_values(&page, &mut out);
            prop_assert_eq!(&out, &values[..=token].concat());
        }
    }

    #[test]
    fn a_pages_bytes_are_those_of_its_tokens(page_tokens in 1usize..=16, tokens in 0usize..300) {
        let layout = PageLayout::new(page_tokens, 8, KvDtype::Bf16).unwrap();
        let touched: BTreeSet<_> = (0..tokens).map(|token| token / page_tokens).collect();
        prop_assert_eq!(layout.pages(tokens), touched.len());
        prop_assert_eq!(layout.page_bytes(), page_tokens * (8 * 2 + 8 * 2));
    }

    #[test]
    fn budgets_are_whole_partitions_of_the_context(
        context in 0usize..200_000, partition in 1usize..=64, tokens in 1usize..10_000, thousandths in 1usize..=1000,
    ) {
        prop_assert_eq!(Budget::Tokens(tokens).partitions(context, partition), (tokens / partition).max(1));
        let fraction = Budget::Fraction(thousandths as f64 / 1000.0);
        // In whole numbers, so without rounding.
        let exact = thousandths * context / 1000 / partition;
        prop_assert_eq!(fraction.partitions(context, partition), exact.max(1));
        prop_assert!(fraction.partitions(context + 1, partition) >= fraction.partitions(context, partition));
        prop_assert_eq!(format!("{}%", thousandths as f64 / 10.0).parse::<Budget>().map(|b| b.partitions(context, partition)), Ok(exact.max(1)));
        prop_assert_eq!(tokens.to_string().parse(), Ok(Budget::Tokens(tokens)));
    }

    #[test]
    fn a_budget_that_passes_its_check_is_sound(tokens in 0usize..100, fraction in -0.5f64..1.5, sinks in 0usize..40, window in 1usize..40) {
        let steady = SteadyZone { sinks, window };
        prop_assert_eq!(Budget::Tokens(tokens).check(&steady).is_ok(), tokens >= sinks + window);
        prop_assert_eq!(Budget::Fraction(fraction).check(&steady).is_ok(), fraction > 0.0 && fraction <= 1.0);
    }

    /// Few distinct scores, so that ties are everywhere.
    #[test]
    fn top_k_is_the_head_of_a_full_sort_with_ties_to_the_lower_index(
        scores in prop::collection::vec((0i8..5).prop_map(|score| f32::from(score) / 2.0), 0..80),
        k in 0usize..90,
        already in prop::collection::vec(any::<u32>(), 0..3),
    ) {
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|a, b| scores[*b].partial_cmp(&scores[*a]).unwrap().then(a.cmp(b)));
        let mut best: Vec<u32> = order.into_iter().take(k).map(|index| index as u32).collect();
        best.sort();
        let mut found = already.clone();
        top_k(&scores, k, &mut found);
        prop_assert_eq!(&found[..already.len()], &already);
        prop_assert_eq!(&found[already.len()..], best);
    }

    #[test]
    fn a_landmark_is_the_mean_of_its_keys(tokens in 1usize..20, head_dim in 1usize..40, seed in 0u32..1000) {
        let keys: Vec<f32> = (0..(tokens * head_dim) as u32).map(|i| ((i * 37 + seed) % 101) as f32 / 7.0).collect();
        let mut summary = vec![f32::NAN; head_dim];
        mean_key(&keys, &mut summary);
        for (element, found) in summary.iter().enumerate() {
            let sum: f64 = (0..tokens).map(|token| f64::from(keys[token * head_dim + element])).sum();
            prop_assert!((f64::from(*found) - sum / tokens as f64).abs() < 1e-5);
        }
    }

    #[test]
    fn host_pages_are_found_by_key_and_valid_in_order(slabs in 0usize..6, publish in 0usize..400) {
        let layout = PageLayout::new(1, 8, KvDtype::Bf16).unwrap();
        let mut arena = HostArena::new(layout, None);
        let ids = arena.take(slabs).unwrap();
        let mut table = HostTable::new(ids.clone());
        for key in 0..(slabs + 1) * SLAB_PAGES {
            let expected = ids.get(key / SLAB_PAGES).map(|slab| HostPage { slab: *slab, index: key % SLAB_PAGES });
            prop_assert_eq!(table.lookup(key as u32), expected);
        }
        prop_assert_eq!(table.slabs(), ids);
        let publish = publish.min(slabs * SLAB_PAGES);
        (0..publish as u32).for_each(|key| table.publish(key));
        prop_assert_eq!(table.valid_pages(), publish);
        let hole = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| table.publish(publish as u32 + 1)));
        prop_assert!(hole.is_err(), "a hole was published");
    }
}

proptest! {
    #[test]
    fn a_plan_covers_every_length_up_to_its_own(
        (sinks, window) in (0usize..20, 1usize..40),
        page_tokens in prop_oneof![Just(1usize), Just(2), Just(4), Just(8)],
        budget in prop_oneof![(60usize..300).prop_map(Budget::Tokens), (1u32..=100).prop_map(|p| Budget::Fraction(f64::from(p) / 100.0))],
        max_tokens in 1usize..500,
        buffering in 0.0f64..8.0,
        (free, total) in (0usize..2000, 2000usize..3000),
    ) {
        let shape = KvShape::new(3, 4, 2, 8).unwrap();
        let layout = PageLayout::new(page_tokens, 8, KvDtype::Bf16).unwrap();
        let steady = SteadyZone { sinks, window };
        let method = ShadowKv { budget, steady };
        let config = KvConfig::new(shape, layout, Arc::new(method)).unwrap();
        let plan = RequestPlan::new(&config, max_tokens, buffering).unwrap();
        let (mut most_selectable, mut most_selected) = (0, 0);
        for tokens in 1..=max_tokens {
            let steady_token = |token: &usize| {
                let chunk = token / 8 * 8;
                chunk < sinks || chunk + 8 + window > tokens
            };
            let steady_pages: BTreeSet<_> = (0..tokens).filter(steady_token).map(|token| token / page_tokens).collect();
            prop_assert!(steady_pages.len() <= plan.row.steady_pages);
            let chunks = (0..tokens / 8).filter(|chunk| !steady_token(&(chunk * 8))).count();
            let wanted = match budget {
                Budget::Tokens(wanted) => wanted / 8,
                Budget::Fraction(fraction) => ((fraction * tokens as f64 + 1e-6) as usize / 8).max(1),
            };
            most_selectable = most_selectable.max(chunks * 8 / page_tokens);
            most_selected = most_selected.max(wanted.min(chunks) * 8 / page_tokens);
        }
        prop_assert_eq!(plan.row.mandatory_pages, most_selected);
        let wanted = (most_selected as f64 * buffering) as usize;
        prop_assert_eq!(plan.row.buffering_pages, wanted.min(most_selectable - most_selected));
        prop_assert_eq!(plan.row.host_slabs, (max_tokens / page_tokens).div_ceil(SLAB_PAGES));
        prop_assert_eq!(plan.gpu_pages(), 6 * (plan.row.steady_pages + plan.row.slots()));
        prop_assert_eq!(plan.host_slabs(), 6 * plan.row.host_slabs);

        let least = 6 * (plan.row.steady_pages + plan.row.mandatory_pages);
        match plan.fit(free, total) {
            Ok(fitted) => {
                prop_assert!(least <= free && fitted.gpu_pages() <= free);
                prop_assert_eq!(fitted.row.mandatory_pages, plan.row.mandatory_pages);
                prop_assert_eq!(fitted.row.steady_pages, plan.row.steady_pages);
                // One page more for each row would be too many, or more than was wanted.
                let whole = fitted.row.buffering_pages == plan.row.buffering_pages;
                prop_assert!(whole || fitted.row.buffering_pages < plan.row.buffering_pages && fitted.gpu_pages() + 6 > free);
            }
            Err(Error::OutOfGpuPages { needed, free: reported, total: of, .. }) => {
                prop_assert!(least > free);
                prop_assert_eq!((needed, reported, of), (least, free, total));
            }
            Err(other) => prop_assert!(false, "{}", other),
        }
    }
}

#[test]
#[should_panic(expected = "steady and cached at once")]
fn a_page_that_is_cached_cannot_be_adopted() {
    let mut cache = RowCache::<Lru>::new(vec![PhysicalPage(0), PhysicalPage(1)], 8);
    cache.adopt(4, PhysicalPage(2));
    cache.adopt(4, PhysicalPage(3));
}

#[test]
#[should_panic(expected = "given back twice")]
fn a_slab_cannot_be_given_back_twice() {
    let mut arena = HostArena::new(PageLayout::new(1, 8, KvDtype::F32).unwrap(), None);
    let slab = arena.take(1).unwrap()[0];
    arena.give_back(slab);
    arena.give_back(slab);
}
