//! One test for each mistake that users of other systems reported and that a row's cache could make, named after the
//! rule against it, and the edges of I9.

use spinkv::Error;
use spinkv::memory::PhysicalPage;
use spinkv::paging::{BucketedLru, FlatMap, Resolution, RowCache, SlotId, SlotMap, StepClock};

use super::{physical, select};

struct Row {
    map: FlatMap,
    cache: RowCache<BucketedLru>,
    clock: StepClock,
    out: Resolution,
}

impl Row {
    fn new(slots: u32) -> Self {
        Self {
            map: FlatMap::new(64),
            cache: RowCache::new(physical(100..100 + slots), BucketedLru::default()),
            clock: StepClock::default(),
            out: Resolution::default(),
        }
    }

    fn step(&mut self, keys: &[u32]) -> &Resolution {
        self.try_step(keys).unwrap();
        &self.out
    }

    fn try_step(&mut self, keys: &[u32]) -> spinkv::Result<()> {
        self.clock.tick();
        self.cache.begin_step(self.clock);
        self.cache.resolve(&mut self.map, &select(keys), &mut self.out)
    }

    fn keys(&self) -> Vec<u32> {
        self.cache.resident().map(|(key, _)| key).collect()
    }

    fn pin(&mut self, key: u32) -> SlotId {
        let slot = self.map.get(key).unwrap();
        self.cache.pin(slot);
        slot
    }
}

/// vLLM #56158: pages whose only copy was on the GPU were evicted once the context spilled.
#[test]
fn a_page_that_the_host_lacks_is_never_a_victim() {
    let mut row = Row::new(4);
    row.step(&[0, 1, 2, 3]);
    row.pin(0);
    for key in 10..30 {
        assert!(!row.step(&[key]).evicted.contains(&0));
    }
    assert_eq!(row.keys()[0], 0);
}

/// vLLM #46951, #34526: blocks were handed out again while a transfer was in flight.
#[test]
fn no_physical_page_is_reused_while_a_transfer_touches_it() {
    let mut row = Row::new(4);
    let flying = row.step(&[0, 1, 2, 3]).copies[2];
    let slot = row.pin(flying.key);
    // Neither a miss, nor an adoption, nor shrinking, nor the end of the request gets at it.
    assert!(row.step(&[7, 8, 9]).copies.iter().all(|copy| copy.page != flying.page));
    let adopted = row.cache.adopt(&mut row.map, 20, PhysicalPage(5));
    assert_eq!((adopted.spare, adopted.evicted), (PhysicalPage(5), None), "a full cache hands the page back");
    let gone = row.cache.release_all(&mut row.map);
    assert_eq!(gone.pages, physical([100, 101, 103]));
    assert_eq!((row.cache.capacity(), row.cache.pinned()), (1, 1));
    assert_eq!(row.cache.lookup(&row.map, flying.key), Some(flying.page));
    // It comes back when the transfer is over.
    row.cache.unpin(slot);
    let rest = row.cache.release_all(&mut row.map);
    assert_eq!((rest.pages, rest.evicted), (physical([102]), vec![flying.key]));
    assert_eq!(row.cache.capacity(), 0);
}

/// vLLM #47282: a load overwrote blocks that were still being read.
#[test]
fn a_page_that_this_step_reads_is_no_victim_of_its_adoptions() {
    let mut row = Row::new(3);
    row.step(&[0, 1, 2]);
    let adoption = row.cache.adopt(&mut row.map, 9, PhysicalPage(50));
    assert_eq!((adoption.spare, adoption.evicted), (PhysicalPage(50), None));
    row.clock.tick();
    row.cache.begin_step(row.clock);
    let adoption = row.cache.adopt(&mut row.map, 9, PhysicalPage(50));
    assert_eq!((adoption.spare, adoption.evicted), (PhysicalPage(100), Some(0)));
}

/// vLLM #54914: the first eviction, when the cache filled up for the first time, failed.
#[test]
fn the_first_eviction_comes_when_the_last_slot_is_full_and_works() {
    let mut row = Row::new(130);
    for key in 0..130 {
        row.map = FlatMap::new(200);
        row.cache = RowCache::new(physical(0..key), BucketedLru::default());
        let all: Vec<_> = (0..key).collect();
        assert!(row.step(&all).evicted.is_empty());
        if key > 0 {
            assert_eq!(row.step(&[key]).evicted, [0]);
        }
    }
}

/// sglang#26357: a hang with little available and much evictable memory; and a pinned cache must not loop either.
#[test]
fn eviction_is_driven_by_demand_and_a_pinned_cache_refuses_instead_of_looping() {
    let mut row = Row::new(4);
    row.step(&[0, 1, 2, 3]);
    assert_eq!(row.step(&[4, 5, 6, 7]).evicted, [0, 1, 2, 3]);
    (4..8).for_each(|key| {
        row.pin(key);
    });
    let before = (row.keys(), row.cache.states().bytes().to_vec());
    let error = row.cache.resolve(&mut row.map, &select(&[4, 9]), &mut row.out).unwrap_err();
    assert_eq!(error, Error::SelectionExceedsCapacity { selected: 2, capacity: 4, pinned: 3 });
    assert_eq!((row.keys(), row.cache.states().bytes().to_vec()), before);
    assert_eq!(row.step(&[4, 5, 6, 7]).hits(), 4);
}

/// RetroInfer: pages beyond the execution buffer were skipped without a word.
#[test]
fn too_large_a_selection_is_refused_and_changes_nothing() {
    let mut row = Row::new(2);
    row.step(&[1, 2]);
    let error = row.try_step(&[3, 4, 5]).unwrap_err();
    assert_eq!(error, Error::SelectionExceedsCapacity { selected: 3, capacity: 2, pinned: 0 });
    assert_eq!(row.keys(), [1, 2]);
}

/// vLLM's unique-id assumption: a repeated id must not take two slots.
#[test]
#[should_panic(expected = "page 4 is selected twice")]
fn a_repeated_miss_is_refused() {
    Row::new(4).step(&[4, 2, 4]);
}

#[test]
#[should_panic(expected = "page 4 is selected twice")]
fn a_repeated_hit_is_refused() {
    let mut row = Row::new(4);
    row.step(&[4]);
    row.step(&[4, 4]);
}

/// vLLM #56699: ids out of range are misses, not reads of foreign memory.
#[test]
fn a_key_out_of_range_is_absent() {
    let row = Row::new(2);
    assert_eq!(row.map.get(64), None);
    assert_eq!(row.map.get(u32::MAX), None);
    assert_eq!(row.cache.lookup(&row.map, u32::MAX), None);
    assert_eq!(row.cache.owner(SlotId(2)), None);
}

/// I14, vLLM's missing host row: a slot whose bytes did not come loses its owner and is used again.
#[test]
fn a_slot_whose_bytes_did_not_come_is_withdrawn() {
    let mut row = Row::new(2);
    row.step(&[1, 2]);
    assert!(row.cache.withdraw(&mut row.map, 1));
    assert!(!row.cache.withdraw(&mut row.map, 1));
    assert_eq!(row.keys(), [2]);
    let out = row.step(&[1]);
    assert_eq!((out.copies[0].page, out.evicted.len()), (PhysicalPage(100), 0));
}

/// vLLM #46014 and friends: what a transfer holds survives preemption; coming back does not age.
#[test]
fn a_paused_request_does_not_age() {
    let (mut row, mut paused) = (Row::new(3), Row::new(3));
    for row in [&mut row, &mut paused] {
        row.step(&[0]);
        row.step(&[1]);
        row.step(&[2]);
    }
    // Other requests take thousands of steps; this one's clock stands still.
    paused.cache.begin_step(paused.clock);
    assert_eq!(row.step(&[3]).evicted, paused.step(&[3]).evicted);
}

/// A count of pins, not a flag: the second reason to stay outlives the first.
#[test]
fn a_slot_pinned_twice_needs_two_unpins() {
    let mut row = Row::new(1);
    row.step(&[0]);
    let slot = row.pin(0);
    row.cache.pin(slot);
    row.cache.unpin(slot);
    assert!(row.try_step(&[1]).is_err());
    row.cache.unpin(slot);
    assert_eq!(row.step(&[1]).evicted, [0]);
}

/// sglang#13501: what is given back twice belongs to two owners.
#[test]
#[should_panic(expected = "unpinned as often as it was pinned")]
fn a_pin_is_taken_off_once() {
    let mut row = Row::new(1);
    row.step(&[0]);
    let slot = row.pin(0);
    row.cache.unpin(slot);
    row.cache.unpin(slot);
}

#[test]
#[should_panic(expected = "pinned and cannot be withdrawn")]
fn a_pinned_page_is_not_withdrawn() {
    let mut row = Row::new(1);
    row.step(&[0]);
    row.pin(0);
    row.cache.withdraw(&mut row.map, 0);
}

#[test]
#[should_panic(expected = "steady and cached at once")]
fn a_page_that_is_cached_cannot_be_adopted() {
    let mut row = Row::new(2);
    row.cache.adopt(&mut row.map, 4, PhysicalPage(2));
    row.cache.adopt(&mut row.map, 4, PhysicalPage(3));
}

/// I9: nothing selected, no slots, all hits, all misses, as many slots as selected, fewer keys than a step may take.
#[test]
fn edges_are_legal() {
    let mut none = Row::new(0);
    assert_eq!(none.step(&[]).pages.len(), 0);
    assert!(none.try_step(&[1]).is_err());
    assert_eq!(none.cache.shrink(&mut none.map, 5).pages.len(), 0);
    none.cache.grow(physical([1]));
    assert_eq!(none.step(&[1]).copies.len(), 1);

    let mut row = Row::new(3);
    assert_eq!(row.step(&[5, 6, 7]).copies.len(), 3);
    assert_eq!(row.step(&[5, 6, 7]).hits(), 3);
    assert_eq!(row.step(&[]).pages.len(), 0);
    let out = row.step(&[8, 9, 10]);
    assert_eq!((out.copies.len(), out.evicted.as_slice()), (3, [5, 6, 7].as_slice()));
    assert_eq!(row.step(&[8]).hits(), 1);
}

/// Slots keep their numbers when others go, and gaps are filled before the end grows.
#[test]
fn shrinking_moves_nothing() {
    let mut row = Row::new(4);
    row.step(&[0, 1, 2, 3]);
    row.step(&[0, 2, 3]);
    assert_eq!(row.cache.shrink(&mut row.map, 1).evicted, [1]);
    assert_eq!([0, 2, 3].map(|key| row.map.get(key)), [0, 2, 3].map(|slot| Some(SlotId(slot))));
    assert_eq!(row.cache.states().bytes().len(), 4);
    row.cache.grow(physical([7, 8]));
    assert_eq!(row.cache.physical_pages().collect::<Vec<_>>(), physical([100, 7, 102, 103, 8]));
    row.cache.release_all(&mut row.map);
    assert_eq!(row.cache.states().bytes().len(), 0);
}
