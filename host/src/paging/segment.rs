use super::SlotId;
use crate::Result;
use crate::memory::{Allocator, Stamped};
use crate::partition::SelectedPage;

/// Page keys of one segment.
pub const SEGMENT_KEYS: usize = 512;

/// The most slots of a row: slot ids are 16 bits wide in segments, and the two highest say that a page is absent and
/// that a segment was freed.
pub const MAX_SLOTS: usize = POISON as usize;

/// The entry of a page that has no slot.
const ABSENT: u16 = u16::MAX;

/// All entries of a segment that nobody holds.
const POISON: u16 = u16::MAX - 1;

/// A segment, with its generation: a directory that kept it too long is found out.
pub type SegmentId = Stamped<u32>;

/// The second level of the tables from page keys to slots: segments of [`SEGMENT_KEYS`] page keys, each for all
/// rows of one request, `[rows][512]` slot ids of 16 bits. All rows of a request hold the same number of tokens, so
/// one allocation serves them all.
#[derive(Debug)]
pub struct SegmentPool {
    rows: usize,
    allocator: Allocator,
    segments: Vec<Segment>,
    free: Vec<u32>,
}

#[derive(Debug)]
struct Segment {
    generation: u32,
    slots: Box<[u16]>,
}

impl SegmentPool {
    /// A pool for requests of `rows` rows.
    pub fn new(rows: usize, allocator: Allocator) -> Self {
        Self { rows, allocator, segments: Vec::new(), free: Vec::new() }
    }

    /// Bytes of one segment.
    pub fn segment_bytes(&self) -> usize {
        self.rows * SEGMENT_KEYS * size_of::<u16>()
    }

    /// Segments that directories hold.
    pub fn used(&self) -> usize {
        self.segments.len() - self.free.len()
    }

    /// Segments that the next [`take`](Self::take) can give out without asking the system.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Takes a segment; all pages are absent in it.
    ///
    /// # Errors
    /// [`AllocationFailed`](crate::Error::AllocationFailed); nothing is then changed.
    pub fn take(&mut self) -> Result<SegmentId> {
        let id = match self.free.pop() {
            Some(id) => id,
            None => {
                let slots = self.allocator.zeroed(self.rows * SEGMENT_KEYS, "a page table segment")?;
                self.segments.push(Segment { generation: 0, slots });
                self.segments.len() as u32 - 1
            }
        };
        let segment = &mut self.segments[id as usize];
        segment.slots.fill(ABSENT);
        Ok(SegmentId { id, generation: segment.generation })
    }

    /// Gives a segment back. Its entries are poisoned, so that whoever reads on is found out.
    ///
    /// # Panics
    /// If it was given back already.
    pub fn give_back(&mut self, segment: SegmentId) {
        self.current(segment);
        let state = &mut self.segments[segment.id as usize];
        state.slots.fill(POISON);
        state.generation = state.generation.wrapping_add(1);
        self.free.push(segment.id);
    }

    /// The slot of page `key` in `row`, or `None` if it is absent; `segment` is that of the key.
    ///
    /// # Panics
    /// If the segment was given back.
    pub fn slot(&self, segment: SegmentId, row: usize, key: u32) -> Option<SlotId> {
        let entry = self.current(segment)[Self::place(row, key)];
        assert_ne!(entry, POISON, "the segment of page {key} was freed");
        (entry != ABSENT).then_some(SlotId(u32::from(entry)))
    }

    /// Appends the slot of each of `pages` in `row` to `found`, as [`slot`](Self::slot) gives it; `segment` is that of
    /// all their keys.
    ///
    /// # Panics
    /// If the segment was given back.
    pub fn find(
        &self,
        segment: SegmentId,
        row: usize,
        pages: &[SelectedPage],
        found: &mut Vec<Option<SlotId>>,
    ) {
        let entries = self.row(segment, row);
        let mut poisoned = false;
        found.extend(pages.iter().map(|page| {
            let entry = entries[page.key as usize % SEGMENT_KEYS];
            poisoned |= entry == POISON;
            (entry != ABSENT).then_some(SlotId(u32::from(entry)))
        }));
        assert!(!poisoned, "segment {} was freed", segment.id);
    }

    /// Records the slot of page `key` in `row`, or that it has none.
    ///
    /// # Panics
    /// If the segment was given back, or for a slot beyond [`MAX_SLOTS`].
    pub fn set_slot(&mut self, segment: SegmentId, row: usize, key: u32, slot: Option<SlotId>) {
        self.current(segment);
        let entry = slot.map_or(ABSENT, |slot| {
            assert!(slot.index() < MAX_SLOTS, "slot {} does not fit 16 bits", slot.0);
            slot.0 as u16
        });
        self.segments[segment.id as usize].slots[Self::place(row, key)] = entry;
    }

    /// The entries of a segment, `[rows][512]`.
    fn current(&self, segment: SegmentId) -> &[u16] {
        let state = &self.segments[segment.id as usize];
        assert_eq!(state.generation, segment.generation, "segment {} is stale", segment.id);
        &state.slots
    }

    /// The entries of one row.
    fn row(&self, segment: SegmentId, row: usize) -> &[u16; SEGMENT_KEYS] {
        let entries = &self.current(segment)[row * SEGMENT_KEYS..][..SEGMENT_KEYS];
        entries.try_into().expect("a row of a segment")
    }

    fn place(row: usize, key: u32) -> usize {
        row * SEGMENT_KEYS + key as usize % SEGMENT_KEYS
    }
}

#[cfg(test)]
mod tests {
    use super::super::Directory;
    use super::*;

    /// A pool, and a directory that kept its only segment when that was freed.
    fn kept() -> (SegmentPool, Directory) {
        let allocator = Allocator::default();
        let mut pool = SegmentPool::new(2, allocator.clone());
        let segment = pool.take().unwrap();
        pool.set_slot(segment, 1, 3, Some(SlotId(7)));
        let mut directory = Directory::new(1, &allocator).unwrap();
        directory.push(segment);
        assert_eq!(directory.slot(&pool, 1, 3), Some(SlotId(7)));
        pool.give_back(segment);
        (pool, directory)
    }

    #[test]
    #[should_panic(expected = "segment 0 is stale")]
    fn a_freed_segment_is_stale() {
        let (pool, directory) = kept();
        directory.slot(&pool, 1, 3);
    }

    /// After 2^32 frees a generation comes again: then only the poison tells.
    #[test]
    #[should_panic(expected = "the segment of page 3 was freed")]
    fn a_freed_segment_is_poisoned() {
        let (mut pool, directory) = kept();
        pool.segments[0].generation = 0;
        directory.slot(&pool, 1, 3);
    }

    #[test]
    #[should_panic(expected = "segment 0 was freed")]
    fn a_search_finds_the_poison_too() {
        let (mut pool, directory) = kept();
        pool.segments[0].generation = 0;
        let page = SelectedPage { key: 3, tokens: 1 };
        pool.find(directory.segment(3).unwrap(), 1, &[page], &mut Vec::new());
    }
}
