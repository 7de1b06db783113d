use super::SlotId;
use crate::Result;
use crate::memory::{Allocator, Stamped};

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

    fn place(row: usize, key: u32) -> usize {
        row * SEGMENT_KEYS + key as usize % SEGMENT_KEYS
    }
}
