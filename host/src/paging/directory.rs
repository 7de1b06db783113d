use super::{SEGMENT_KEYS, SegmentId, SegmentPool, SlotId, SlotMap};
use crate::Result;
use crate::memory::Allocator;
use crate::partition::SelectedPage;

/// The first level of the tables from page keys to slots, one a request: the segment of each 512 page keys, as far
/// as the context has grown.
#[derive(Debug)]
pub struct Directory {
    /// `[segments at the longest]`, of which the first `len` are there.
    segments: Box<[SegmentId]>,
    len: usize,
}

impl Directory {
    /// A directory without segments, with room for `segments`.
    ///
    /// # Errors
    /// [`AllocationFailed`](crate::Error::AllocationFailed).
    pub fn new(segments: usize, allocator: &Allocator) -> Result<Self> {
        Ok(Self { segments: allocator.zeroed(segments, "a directory")?, len: 0 })
    }

    /// Segments that are there.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no segment is there.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds the next segment.
    ///
    /// # Panics
    /// Beyond the directory's room.
    pub fn push(&mut self, segment: SegmentId) {
        self.segments[self.len] = segment;
        self.len += 1;
    }

    /// Takes the last segment out.
    pub fn pop(&mut self) -> Option<SegmentId> {
        self.len = self.len.checked_sub(1)?;
        Some(self.segments[self.len])
    }

    /// The segment of page `key`, or `None` where the context has not come yet.
    pub fn segment(&self, key: u32) -> Option<SegmentId> {
        self.segments[..self.len].get(key as usize / SEGMENT_KEYS).copied()
    }

    /// The slot of page `key` in `row`.
    pub fn slot(&self, pool: &SegmentPool, row: usize, key: u32) -> Option<SlotId> {
        pool.slot(self.segment(key)?, row, key)
    }

    /// Bytes of the directory.
    pub fn bytes(&self) -> usize {
        size_of_val(&*self.segments)
    }
}

/// The two-level map of one row: request directory, segment, entry.
#[derive(Debug)]
pub struct RowSlots<'a> {
    /// Where the segments are.
    pub pool: &'a mut SegmentPool,
    /// That of the row's request.
    pub directory: &'a Directory,
    /// The row within the request.
    pub row: usize,
}

impl SlotMap for RowSlots<'_> {
    fn get(&self, key: u32) -> Option<SlotId> {
        self.directory.slot(self.pool, self.row, key)
    }

    fn find(&self, selection: &[SelectedPage], found: &mut Vec<Option<SlotId>>) {
        let segment = |page: &SelectedPage| page.key as usize / SEGMENT_KEYS;
        for pages in selection.chunk_by(|a, b| segment(a) == segment(b)) {
            match self.directory.segment(pages[0].key) {
                Some(segment) => self.pool.find(segment, self.row, pages, found),
                None => found.resize(found.len() + pages.len(), None),
            }
        }
    }

    fn set(&mut self, key: u32, slot: SlotId) {
        let segment = self.directory.segment(key).expect("segments come before the pages that they name");
        self.pool.set_slot(segment, self.row, key, Some(slot));
    }

    fn clear(&mut self, key: u32) {
        let segment = self.directory.segment(key).expect("a page that had a slot has a segment");
        self.pool.set_slot(segment, self.row, key, None);
    }
}
