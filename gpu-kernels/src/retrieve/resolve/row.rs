use cuda_std::{Global, GlobalMut};

use super::slots::Scratch;
use crate::abi::{ABSENT_SLOT, Entry, NO_KEY, SEGMENT_KEYS, SLAB_PAGES};

/// Keys whose slots are in a line of 128 bytes.
const LINE_KEYS: usize = 64;

/// The tables of the block's row.
pub(super) struct Row {
    pub entry: Entry,
    pub row: u32,
    request_rows: u32,
    pub directories: Global<u32>,
    segments: GlobalMut<u16>,
    /// `[slots]`.
    pub owners: GlobalMut<u32>,
    /// `[slots]`.
    pub physical: GlobalMut<u32>,
    /// `[slots / 4]`.
    pub states: GlobalMut<u32>,
    pub steady: GlobalMut<u32>,
    host_slabs: Global<u32>,
    host_valid: Global<u32>,
}

impl Row {
    #[inline(always)]
    #[allow(clippy::too_many_arguments, reason = "the kernel's parameters, in its names")]
    pub unsafe fn of(
        entry: Entry,
        row: u32,
        request_rows: u32,
        directories: Global<u32>,
        segments: GlobalMut<u16>,
        owners: GlobalMut<u32>,
        physical: GlobalMut<u32>,
        states: GlobalMut<u32>,
        steady: GlobalMut<u32>,
        host_slabs: Global<u32>,
        host_valid: Global<u32>,
    ) -> Self {
        let (first, slots) = ((entry.first_slot + row * entry.slot_stride) as usize, entry.slots as usize);
        let slab = entry.slab_place(row, 0) as usize;
        Self {
            row,
            request_rows,
            directories,
            segments,
            owners: owners.slice(first, slots),
            physical: physical.slice(first, slots),
            states: states.slice(first / 4, slots / 4),
            steady,
            host_slabs: host_slabs.slice(slab, entry.slab_stride as usize),
            host_valid: host_valid.slice(slab, entry.slab_stride as usize),
            entry,
        }
    }

    /// Segments of the request's directory, which is as long as its host tables.
    #[inline(always)]
    pub fn segments(&self) -> u32 {
        self.entry.slab_stride.div_ceil(SEGMENT_KEYS / SLAB_PAGES)
    }

    /// The slot of page `key`.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    pub unsafe fn slot(&self, scratch: &Scratch, key: u32) -> Option<u32> {
        let slot = self.segments.load(self.place(scratch, key));
        if slot == ABSENT_SLOT { None } else { Some(slot as u32) }
    }

    /// The slab of page `key`'s host page, and the bits of the slab's complete pages.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    pub unsafe fn host(&self, key: u32) -> (u32, u32) {
        let slab = (key / SLAB_PAGES) as usize;
        (self.host_slabs.load(slab), self.host_valid.load(slab))
    }

    /// Gives `slot` to page `key`, whoever had it, and returns its physical page.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    pub unsafe fn install(&self, scratch: &Scratch, key: u32, slot: u32) -> u32 {
        let owner = self.owners.load(slot as usize);
        let page = self.physical.load(slot as usize);
        if owner != NO_KEY {
            self.segments.store(self.place(scratch, owner), ABSENT_SLOT);
        }
        self.owners.store(slot as usize, key);
        self.segments.store(self.place(scratch, key), slot as u16);
        page
    }

    /// Asks for the row's part of a segment, which is read behind the ids.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    pub unsafe fn prefetch_segment(&self, segment: u32) {
        let first = self.first_key(segment);
        let mut key = 0;
        while key < SEGMENT_KEYS as usize {
            self.segments.as_global().prefetch(first + key);
            key += LINE_KEYS;
        }
    }

    /// The first entry of the row in a segment.
    #[inline(always)]
    fn first_key(&self, segment: u32) -> usize {
        (segment as usize * self.request_rows as usize + self.row as usize) * SEGMENT_KEYS as usize
    }

    /// The entry of page `key` in the segments.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    unsafe fn place(&self, scratch: &Scratch, key: u32) -> usize {
        let segment = scratch.directory.load((key / SEGMENT_KEYS) as usize);
        self.first_key(segment) + (key % SEGMENT_KEYS) as usize
    }
}

/// Whether `valid`, the bits of the slab of `key`, has its bit.
#[inline(always)]
pub(super) fn is_on_host(valid: u32, key: u32) -> bool {
    valid >> (key % SLAB_PAGES) & 1 != 0
}
