//! The parts of the KV memory, each against a naive model written here.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use proptest::prelude::*;
use spinkv::algorithms::ShadowKv;
use spinkv::memory::{
    Allocator, Direction, FlatLayout, HostArena, HostMemory, HostPage, KvDtype, PageLayout, PagePool,
    PhysicalPage, PlainMemory, RequestPlan, RowId, SLAB_PAGES, Share, SlabId, Transfer, Transfers, Word,
    footprint, share_out, slot_array_bytes,
};
use spinkv::paging::{
    BucketedLru, Directory, FlatMap, HostTable, MAX_SLOTS, Resolution, RowCache, RowSlots, SEGMENT_KEYS,
    SegmentPool, SlotId, SlotMap, SteadyPages,
};
use spinkv::partition::SelectedPage;
use spinkv::pipeline::{Budget, RequestId, SteadyZone};
use spinkv::{Error, KvConfig, KvShape};

fn layout() -> PageLayout {
    PageLayout::new(1, 8, KvDtype::Bf16).unwrap()
}

fn arena(layers: usize, limit: Option<u64>) -> HostArena {
    HostArena::new(layout(), layers, limit, PlainMemory::default())
}

fn page_of(arena: &HostArena, page: HostPage) -> Vec<Word> {
    let mut words = vec![0; layout().page_words()];
    arena.read(page, &mut words);
    words
}

proptest! {
    #[test]
    fn pages_are_free_or_held_once_and_keep_their_bytes(
        limit in prop::option::of(0usize..60),
        turns in prop::collection::vec((0usize..12, any::<prop::sample::Index>(), any::<bool>()), 0..40),
    ) {
        let mut pool = PagePool::new(layout(), limit, Allocator::default());
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
    fn slabs_are_vacant_or_held_and_the_limit_is_kept(
        layers in 1usize..4,
        limit in prop::option::of(0usize..12),
        turns in prop::collection::vec((0usize..4, 0usize..5, any::<prop::sample::Index>(), any::<bool>()), 0..30),
    ) {
        // Half a slab more than whole ones: it is of no use.
        let bytes = limit.map(|slabs| (layers * slabs * SLAB_PAGES * 32 + SLAB_PAGES * 16) as u64);
        let mut arena = arena(layers, bytes);
        prop_assert_eq!(arena.slab_bytes(), (SLAB_PAGES * 32) as u64);
        // Slabs of each request, with their layer and what is written in them.
        let mut requests: Vec<(usize, Vec<(SlabId, u128)>)> = Vec::new();
        for (turn, (layer, count, which, take)) in turns.into_iter().enumerate() {
            let layer = layer % layers;
            let of_layer = |requests: &[(usize, Vec<_>)]| -> usize {
                requests.iter().filter(|(at, _)| *at == layer).map(|(_, slabs)| slabs.len()).sum()
            };
            if take {
                // Each layer has its part of the whole.
                let fits = limit.is_none_or(|limit| of_layer(&requests) + count <= limit);
                match arena.take(layer, count) {
                    Ok(slabs) => {
                        prop_assert!(fits);
                        prop_assert_eq!(slabs.len(), count);
                        for slab in &slabs {
                            for index in 0..SLAB_PAGES {
                                let words = vec![(turn * SLAB_PAGES + index) as u128 + 1; layout().page_words()];
                                arena.write(HostPage { slab: *slab, index }, &words);
                            }
                        }
                        requests.push((layer, slabs.into_iter().map(|slab| (slab, turn as u128)).collect()));
                    }
                    Err(Error::OutOfHostMemory { limit, .. }) => prop_assert!(!fits && Some(limit) == bytes),
                    Err(other) => prop_assert!(false, "{}", other),
                }
            } else if !requests.is_empty() {
                let (_, taken) = requests.swap_remove(which.index(requests.len()));
                taken.iter().for_each(|(slab, _)| arena.release(*slab));
            }
            prop_assert_eq!(arena.used_slabs(), requests.iter().map(|(_, slabs)| slabs.len()).sum::<usize>());
            for (slab, turn) in requests.iter().flat_map(|(_, slabs)| slabs) {
                for index in 0..SLAB_PAGES {
                    let mark = turn * SLAB_PAGES as u128 + index as u128 + 1;
                    let page = page_of(&arena, HostPage { slab: *slab, index });
                    prop_assert!(page.iter().all(|word| *word == mark), "{slab:?} changed");
                }
            }
        }
    }

    #[test]
    fn steady_pages_are_conserved_and_leave_in_order(
        (sinks, ring) in (0usize..4, 1usize..8),
        first in 0u32..9,
        turns in prop::collection::vec((any::<bool>(), 0u32..4), 0..50),
    ) {
        let count = sinks + ring;
        let mut steady = SteadyPages::new((0..count as u32).map(PhysicalPage).collect(), sinks);
        let mut model: BTreeMap<u32, PhysicalPage> = BTreeMap::new();
        let mut spare = PhysicalPage(count as u32);
        // A prompt may leave out what lies between the sinks and the tail.
        let mut next = 0;
        for (push, length) in turns {
            let tail = model.keys().filter(|key| **key >= sinks as u32).count();
            if push && tail < ring {
                if next == sinks as u32 && tail == 0 {
                    next += first;
                }
                model.insert(next, steady.push(next));
                next += 1;
            } else if !push {
                let start = model.keys().find(|key| **key >= sinks as u32).copied().unwrap_or(next);
                let left = steady.leave(&(start..start + length));
                let expected = model.get(&start).filter(|_| length > 0).map(|page| (start, *page));
                prop_assert_eq!(left, expected);
                if let Some((key, page)) = left {
                    model.remove(&key);
                    steady.replace(key, std::mem::replace(&mut spare, page));
                }
            }
            prop_assert!(steady.sinks().chain(steady.tail()).eq(model.clone()));
            for key in 0..next + 2 {
                prop_assert_eq!(steady.lookup(key), model.get(&key).copied());
            }
            let all: BTreeSet<u32> =
                steady.physical_pages().iter().chain([&spare]).map(|page| page.0).collect();
            prop_assert!(all.into_iter().eq(0..=count as u32));
        }
        prop_assert_eq!(steady.bytes(), 4 * count + 8);
    }

    #[test]
    fn host_pages_are_found_by_key_and_published_in_any_order(
        slabs in 0usize..6,
        computed in 0u32..110,
        keys in prop::collection::vec(0u32..110, 0..60),
    ) {
        let mut arena = arena(1, None);
        let ids = arena.take(0, slabs).unwrap();
        let mut table = HostTable::default();
        table.extend(ids.clone());
        table.set_computed(computed);
        for key in 0..((slabs + 1) * SLAB_PAGES) as u32 {
            let (slab, index) = (key as usize / SLAB_PAGES, key as usize % SLAB_PAGES);
            prop_assert_eq!(table.lookup(key), ids.get(slab).map(|slab| HostPage { slab: *slab, index }));
        }
        let mut published = BTreeSet::new();
        for key in keys {
            let fine = key < computed && (key as usize) < slabs * SLAB_PAGES && !published.contains(&key);
            let done = catch_unwind(AssertUnwindSafe(|| table.publish(key))).is_ok();
            prop_assert_eq!(done, fine, "page {}", key);
            if fine {
                published.insert(key);
            }
            for key in 0..112 {
                prop_assert_eq!(table.published(key).is_some(), published.contains(&key));
            }
        }
        prop_assert_eq!(table.valid_pages(), published.len());
        prop_assert_eq!(table.bytes(), 6 * slabs + 4);
    }

    /// Walk(flat) == walk(two-level): several requests, growing, used and ended, over one pool.
    #[test]
    fn two_level_maps_are_flat_maps(
        rows in 1usize..5,
        turns in prop::collection::vec((0usize..3, 0usize..5, 0u32..2048, prop::option::of(0u32..MAX_SLOTS as u32)), 0..200),
    ) {
        let allocator = Allocator::default();
        let mut pool = SegmentPool::new(rows, allocator.clone());
        let new = || Directory::new(4, &allocator).unwrap();
        let mut requests: Vec<(Directory, Vec<FlatMap>)> = (0..3).map(|_| (new(), vec![FlatMap::new(2048); rows])).collect();
        for (request, row, key, slot) in turns {
            let (directory, flat) = &mut requests[request];
            if row == rows {
                // The request ends, and another takes its place.
                while let Some(segment) = directory.pop() {
                    pool.give_back(segment);
                }
                *flat = vec![FlatMap::new(2048); rows];
            } else if row < rows {
                while directory.segment(key).is_none() {
                    directory.push(pool.take().unwrap());
                }
                let mut map = RowSlots { pool: &mut pool, directory, row };
                match slot {
                    Some(slot) => {
                        map.set(key, SlotId(slot));
                        flat[row].set(key, SlotId(slot));
                    }
                    None => {
                        map.clear(key);
                        flat[row].clear(key);
                    }
                }
            }
            prop_assert_eq!(pool.used(), requests.iter().map(|(directory, _)| directory.len()).sum::<usize>());
        }
        for (directory, flat) in &requests {
            for (row, flat) in flat.iter().enumerate() {
                let map = RowSlots { pool: &mut pool, directory, row };
                for key in (0..2048).chain([2048, u32::MAX - 1]) {
                    prop_assert_eq!(map.get(key), flat.get(key));
                }
                // Together as one by one, whatever the order.
                let page = |key| SelectedPage { key, tokens: 1 };
                let keys = (0..2100).step_by(7).chain([u32::MAX - 1, 3, 2047, 0]);
                let selection: Vec<_> = keys.map(page).collect();
                let mut found = vec![None];
                map.find(&selection, &mut found);
                prop_assert_eq!(found[0], None, "find appends");
                prop_assert!(found[1..].iter().copied().eq(selection.iter().map(|page| flat.get(page.key))));
            }
        }
    }

    /// Max-min fair: nobody could have a page more without it being taken from one whose ratio is no larger.
    #[test]
    fn buffering_is_shared_out_fairly(
        wants in prop::collection::vec((1usize..20, 0usize..60), 0..8),
        pages in 0usize..300,
    ) {
        let shares: Vec<_> = wants.iter().map(|(mandatory, wanted)| Share { mandatory: *mandatory, wanted: *wanted }).collect();
        let given = share_out(&shares, pages);
        let all: usize = shares.iter().map(|share| share.wanted).sum();
        prop_assert_eq!(given.iter().sum::<usize>(), pages.min(all));
        for (poor, poor_share) in given.iter().zip(&shares) {
            prop_assert!(*poor <= poor_share.wanted);
            for (rich, rich_share) in given.iter().zip(&shares) {
                if *poor < poor_share.wanted && *rich > 0 {
                    // Before its last page, the rich one had no larger ratio than the poor one has.
                    prop_assert!((rich - 1) * poor_share.mandatory <= poor * rich_share.mandatory);
                }
            }
        }
        prop_assert_eq!(share_out(&shares, pages), given);
    }

    #[test]
    fn slot_arrays_take_what_the_formula_says(slots in 0usize..400) {
        let cache = RowCache::new((0..slots as u32).map(PhysicalPage).collect(), BucketedLru::<64>::default());
        prop_assert_eq!(cache.bytes() as u64, slot_array_bytes(slots as u64));
    }
}

/// Segment borders at 511, 512 and 513 page keys, and what lies beyond: a miss, never another row's entry.
#[test]
fn a_key_beyond_the_context_is_a_miss() {
    let allocator = Allocator::default();
    let mut pool = SegmentPool::new(2, allocator.clone());
    let mut directory = Directory::new(2, &allocator).unwrap();
    directory.push(pool.take().unwrap());
    for row in 0..2 {
        let mut map = RowSlots { pool: &mut pool, directory: &directory, row };
        map.set(511, SlotId(row as u32));
        assert_eq!(
            [510, 511, 512, 513].map(|key| map.get(key)),
            [None, Some(SlotId(row as u32)), None, None]
        );
        assert_eq!(map.get(u32::MAX), None);
    }
    assert!(
        catch_unwind(AssertUnwindSafe(|| {
            RowSlots { pool: &mut pool, directory: &directory, row: 0 }.set(512, SlotId(1));
        }))
        .is_err()
    );
    directory.push(pool.take().unwrap());
    let mut map = RowSlots { pool: &mut pool, directory: &directory, row: 1 };
    map.set(512, SlotId(MAX_SLOTS as u32 - 1));
    assert_eq!(
        [511, 512, 513].map(|key| map.get(key)),
        [Some(SlotId(1)), Some(SlotId(MAX_SLOTS as u32 - 1)), None]
    );
    assert!(catch_unwind(AssertUnwindSafe(|| map.set(513, SlotId(MAX_SLOTS as u32)))).is_err());
}

/// An entry of a directory that outlived its request is found out, also once another request has the segment.
#[test]
fn a_stale_segment_is_found_out() {
    let allocator = Allocator::default();
    let mut pool = SegmentPool::new(1, allocator.clone());
    let segment = pool.take().unwrap();
    pool.give_back(segment);
    assert!(catch_unwind(AssertUnwindSafe(|| pool.slot(segment, 0, 3))).is_err());
    let page = SelectedPage { key: 3, tokens: 1 };
    let find = |pool: &SegmentPool, segment| {
        catch_unwind(AssertUnwindSafe(|| pool.find(segment, 0, &[page], &mut Vec::new())))
    };
    assert!(find(&pool, segment).is_err());
    let again = pool.take().unwrap();
    assert_eq!((again.id, again.generation), (segment.id, segment.generation + 1));
    assert_eq!(pool.slot(again, 0, 3), None);
    assert!(catch_unwind(AssertUnwindSafe(|| pool.slot(segment, 0, 3))).is_err());
    assert!(find(&pool, segment).is_err() && find(&pool, again).is_ok());
    assert!(catch_unwind(AssertUnwindSafe(|| pool.give_back(segment))).is_err());
}

/// A page that the host does not have was claimed by a slot (I14); the slot must be withdrawn.
#[test]
fn a_page_without_a_host_copy_is_not_kept() {
    let mut cache = RowCache::new(vec![PhysicalPage(5)], BucketedLru::<64>::default());
    let mut map = FlatMap::new(8);
    let mut out = Resolution::default();
    cache.resolve(&mut map, &[SelectedPage { key: 3, tokens: 1 }], &mut out).unwrap();
    assert!(cache.withdraw(&mut map, 3));
    assert_eq!((map.get(3), cache.len(), cache.lookup(&map, 3)), (None, 0, None));
    assert_eq!(HostTable::default().published(3), None);
}

#[test]
fn a_shared_slab_is_freed_by_the_last_to_let_go() {
    let mut arena = arena(1, None);
    let slab = arena.take(0, 1).unwrap()[0];
    let stamped = arena.stamp(slab);
    arena.retain(slab);
    arena.release(slab);
    assert_eq!((arena.references(slab), arena.used_slabs(), arena.is_current(stamped)), (1, 1, true));
    arena.release(slab);
    assert_eq!((arena.used_slabs(), arena.is_current(stamped)), (0, false));
    assert_eq!(arena.take(0, 1).unwrap(), [slab]);
    assert!(!arena.is_current(stamped), "the slab is another's now");
}

/// Host memory was freed twice (sglang 13501).
#[test]
#[should_panic(expected = "released twice")]
fn a_slab_cannot_be_released_twice() {
    let mut arena = arena(1, None);
    let slab = arena.take(0, 1).unwrap()[0];
    arena.release(slab);
    arena.release(slab);
}

#[test]
#[should_panic(expected = "given back twice")]
fn a_page_cannot_be_given_back_twice() {
    let mut pool = PagePool::new(layout(), None, Allocator::default());
    let pages = pool.take(1).unwrap();
    pool.give_back(pages.clone());
    pool.give_back(pages);
}

/// Slabs of one layer lie side by side, whatever order requests come in.
#[test]
fn the_arena_is_layer_major() {
    let mut arena = arena(2, None);
    arena.reserve(8, &mut |_| {}).unwrap();
    let slabs = [0, 1, 0, 1].map(|layer| arena.take(layer, 4).unwrap());
    let sorted = |a: &[SlabId], b: &[SlabId]| {
        let mut all = [a, b].concat();
        all.sort();
        all
    };
    assert!(sorted(&slabs[0], &slabs[2]).last() < sorted(&slabs[1], &slabs[3]).first());
    assert_eq!(arena.vacant_slabs(), 0);
}

/// One registration of hundreds of GiB failed (vLLM 51080), and nobody saw how far it was.
#[test]
fn host_memory_comes_in_bounded_chunks_with_progress() {
    let mut memory = PlainMemory::lazy(Allocator::default());
    let mut heard = Vec::new();
    // 2.5 GiB of addresses, none of which is touched.
    memory.extend(5 << 25, &mut |progress| heard.push((progress.ready_bytes, progress.total_bytes))).unwrap();
    assert_eq!(heard, [(1 << 30, 5 << 29), (2 << 30, 5 << 29), (5 << 29, 5 << 29)]);
    let mut touched = PlainMemory::touched(Allocator::default());
    touched.extend(1 << 18, &mut |_| {}).unwrap();
    touched.write((1 << 18) - 2, &[7, 8]);
    let mut words = [1; 3];
    touched.read((1 << 18) - 3, &mut words);
    assert_eq!(words, [0, 7, 8]);
}

/// One refused pin poisoned the next call (vLLM 51080).
#[test]
fn a_refused_reservation_leaves_no_trace() {
    let allocator = Allocator::default();
    let mut arena = HostArena::new(layout(), 2, None, PlainMemory::lazy(allocator.clone()));
    allocator.refuse_after(0);
    assert!(matches!(arena.reserve(4, &mut |_| {}), Err(Error::AllocationFailed { .. })));
    assert!(matches!(arena.take(1, 2), Err(Error::AllocationFailed { .. })));
    assert_eq!((arena.used_slabs(), arena.vacant_slabs()), (0, 0));
    allocator.refuse_after(u64::MAX);
    assert_eq!(arena.take(1, 2).unwrap().len(), 2);
}

/// Transfers land whenever they like; no page or slab that one touches is anybody else's before.
#[test]
fn late_transfers_hold_what_they_touch() {
    let row = RowId { request: RequestId(1), row: 0 };
    let mut orders = BTreeSet::new();
    for seed in 0..20 {
        let mut pool = PagePool::new(layout(), Some(8), Allocator::default());
        let mut arena = arena(1, None);
        let slab = arena.take(0, 1).unwrap()[0];
        let pages = pool.take(4).unwrap();
        let mut transfers = Transfers::late(seed);
        for (index, page) in pages.iter().enumerate() {
            pool.page_mut(*page).fill(index as u128 + 1);
            let mut transfer = Transfer::new(row, Direction::ToHost);
            transfer.add(index as u32, *page, HostPage { slab, index });
            assert!(transfers.start(transfer, &mut pool, &mut arena).is_none());
        }
        // The request ends.
        pool.give_back(pages.clone());
        arena.release(slab);
        let census = pool.census();
        assert_eq!((census.free, census.used, census.in_flight), (4, 0, 4));
        let others: HashMap<_, _> = pool.take(4).unwrap().into_iter().map(|page| (page, ())).collect();
        assert!(pages.iter().all(|page| !others.contains_key(page)));
        assert_eq!(arena.references(slab), 4);
        let mut order = Vec::new();
        while let [done] = &transfers.complete(1, &mut pool, &mut arena)[..] {
            let key = done.keys().next().unwrap();
            order.push(key);
            if arena.used_slabs() > 0 {
                let page = page_of(&arena, HostPage { slab, index: key as usize });
                assert_eq!(page, vec![u128::from(key) + 1; layout().page_words()]);
            }
        }
        orders.insert(order);
        assert_eq!((pool.census().in_flight, pool.free_pages(), arena.used_slabs()), (0, 4, 0));
    }
    assert!(orders.len() > 5, "transfers complete in few orders: {orders:?}");
}

/// A row of more slots than 16-bit ids can name is refused by name.
#[test]
fn more_slots_than_ids_are_refused() {
    let shape = KvShape::new(1, 1, 1, 8).unwrap();
    let method =
        ShadowKv { budget: Budget::Fraction(1.0), steady: SteadyZone { sinks: 0, window: 1 }, outliers: 0 };
    let config = KvConfig::new(shape, layout(), Arc::new(method)).unwrap();
    let refused = RequestPlan::new(&config, 70_000, 0.0).unwrap_err();
    assert!(
        matches!(refused, Error::TooManySlots { mandatory, limit, .. } if mandatory > limit && limit == MAX_SLOTS)
    );
    let config =
        KvConfig::new(shape, layout(), Arc::new(ShadowKv { budget: Budget::Fraction(0.5), ..method }))
            .unwrap();
    assert_eq!(RequestPlan::new(&config, 100_000, 9.0).unwrap().row.slots(), MAX_SLOTS);
}

/// The figures of the issue: every table byte on the GPU at 128K, batch 32, partitions of 8 tokens, 1.56 % budget and
/// 5x buffering, under both flat layouts.
#[test]
fn gpu_tables_are_far_smaller_than_flat_ones() {
    for (layers, query_heads, expected_segments) in [(40, 40, 320u64 << 20), (80, 64, 640 << 20)] {
        let shape = KvShape::new(layers, query_heads, 8, 128).unwrap();
        let layout = PageLayout::new(8, 128, KvDtype::Bf16).unwrap();
        let method =
            ShadowKv { budget: Budget::Fraction(0.0156), steady: SteadyZone::default(), outliers: 0 };
        let config = KvConfig::new(shape, layout, Arc::new(method)).unwrap();
        let plan = RequestPlan::new(&config, 131_072, 5.0).unwrap();
        assert_eq!((plan.row.mandatory_pages, plan.row.buffering_pages), (255, 1275));
        let gpu = footprint(&config, &plan, 131_072, 2).gpu;
        let tables = 32 * gpu.tables();
        assert_eq!(32 * gpu.segments, expected_segments);
        let flat = |layout: FlatLayout| layout.bytes(32, shape.rows() as u64, 16_384) as f64 / tables as f64;
        let (f1, f2) = (flat(FlatLayout::OnePage), flat(FlatLayout::PageLists { max_pages: 32 }));
        assert!(f1 >= 6.5 && f2 >= 78.0, "{layers} layers: F1 {f1:.2}x, F2 {f2:.1}x");
        // 16,384 landmarks of 128 bf16 elements a row: beside the tables, and far more than they.
        assert_eq!(gpu.summaries, shape.rows() as u64 * 16_384 * 256);
    }
    assert_eq!(SEGMENT_KEYS, 512);
}
