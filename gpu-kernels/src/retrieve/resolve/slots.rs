use cuda_std::atomic::{Order, Scope};
use cuda_std::{Shared, shared, thread};

use super::row::{Row, is_on_host};
use crate::abi::resolve::BLOCK;
use crate::abi::{SEGMENT_KEYS, SLOT_HELD, SLOT_PINNED, SLOT_STAMP, WARP, host_page};
use crate::block::Exchange;

/// Warps of a block.
const WARPS: u32 = BLOCK / WARP;

/// Slots whose pages are in a line of 128 bytes.
const LINE_SLOTS: u32 = 32;

/// Ages of a slot.
pub(super) const AGES: u32 = SLOT_STAMP as u32 + 1;

/// What the threads of a block hand to each other, in shared memory.
pub(super) struct Scratch {
    /// `[64]`: slots of each age that may leave.
    pub histogram: Shared<u32>,
    pub warps: Exchange,
    /// `[slot capacity / 4]`: the slots' bytes.
    pub states: Shared<u32>,
    /// `[slot capacity / 32]`: bits of the slots that the selection uses.
    touched: Shared<u32>,
    /// `[segment capacity]`: the request's directory.
    pub directory: Shared<u32>,
    /// `[list]`: the misses' page keys.
    pub miss_keys: Shared<u32>,
    /// `[list]`: their positions in the selection.
    pub miss_positions: Shared<u32>,
    /// `[list]`: their host pages.
    pub sources: Shared<u32>,
    /// `[list]`: the slots that they get.
    pub targets: Shared<u32>,
}

impl Scratch {
    #[inline(always)]
    pub unsafe fn carve(slots: u32, segments: u32, list: u32) -> Self {
        let (slots, segments, list) = (slots as usize, segments as usize, list as usize);
        let (histogram, of_warps) = (AGES as usize, Exchange::words(WARPS));
        let states = histogram + of_warps;
        let touched = states + slots / 4;
        let directory = touched + slots.div_ceil(32);
        let lists = directory + segments;
        Self {
            histogram: shared::dynamic(0, histogram),
            warps: Exchange::new(shared::dynamic(4 * histogram, of_warps), WARPS),
            states: shared::dynamic(4 * states, slots / 4),
            touched: shared::dynamic(4 * touched, slots.div_ceil(32)),
            directory: shared::dynamic(4 * directory, segments),
            miss_keys: shared::dynamic(4 * lists, list),
            miss_positions: shared::dynamic(4 * (lists + list), list),
            sources: shared::dynamic(4 * (lists + 2 * list), list),
            targets: shared::dynamic(4 * (lists + 3 * list), list),
        }
    }

    /// Notes that the selection uses `slot`.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    pub unsafe fn touch(&self, slot: u32) {
        self.touched.atomic_or((slot / 32) as usize, 1 << (slot % 32), Order::Relaxed, Scope::Block);
    }

    /// The slots of word `word` that the selection uses: bits 0 to 3.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    pub unsafe fn touched(&self, word: u32) -> u32 {
        self.touched.load((word / 8) as usize) >> (word % 8 * 4) & 15
    }

    /// Notes the host page of the miss of rank `awaited`, if there is one, and whether it is complete.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    pub unsafe fn settle(&self, awaited: u32, key: u32, slab: u32, valid: u32) -> bool {
        if awaited == u32::MAX {
            return true;
        }
        self.sources.store(awaited as usize, host_page(slab, key));
        is_on_host(valid, key)
    }
}

/// A word of four slots' bytes, and what becomes of them. A set of the four slots is a mask of their highest bits.
#[derive(Clone, Copy)]
pub(super) struct Four {
    pub bytes: u32,
    /// Those that the selection uses, as bits 0 to 3.
    pub touched: u32,
}

/// One in each byte.
const ONES: u32 = 0x0101_0101;
const STAMPS: u32 = SLOT_STAMP as u32 * ONES;
const PINNED: u32 = SLOT_PINNED as u32 * ONES;
const HELD: u32 = SLOT_HELD as u32 * ONES;

impl Four {
    /// Word `word` of the scratch.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    pub unsafe fn load(scratch: &Scratch, word: u32) -> Self {
        Self { bytes: scratch.states.load(word as usize), touched: scratch.touched(word) }
    }

    /// The slots that exist and hold no page.
    #[inline(always)]
    pub fn empty(self) -> u32 {
        !(self.bytes | (self.bytes << 1)) & HELD
    }

    /// The slots whose pages may leave: no pin and no selection keeps them.
    #[inline(always)]
    pub fn leaving(self) -> u32 {
        self.bytes & !(self.bytes << 1) & HELD & !self.touched_bytes()
    }

    /// Steps since each page was used, at a clock of `now`.
    #[inline(always)]
    pub fn ages(self, now: u32) -> u32 {
        // No byte borrows from the next: each minuend has a bit above the stamps.
        ((PINNED | (now * ONES)) - (self.bytes & STAMPS)) & STAMPS
    }

    /// The slots that the selection uses, whole bytes.
    #[inline(always)]
    fn touched_bytes(self) -> u32 {
        ((self.touched * 0x0020_4081) & ONES) * 0xff
    }

    /// With the stamps that a clock of `now` would lap moved along with it: those that equal it are a whole round old, and become
    /// those of the largest age.
    #[inline(always)]
    fn clamped(bytes: u32, now: u32) -> u32 {
        let differ = (bytes ^ (now * ONES)) & STAMPS;
        // The bit above a stamp is set where a bit of it differs.
        let lapped = !(differ + STAMPS) & PINNED;
        let mask = (lapped >> 6) * SLOT_STAMP as u32;
        (bytes & !mask) | ((((now + 1) & SLOT_STAMP as u32) * ONES) & mask)
    }

    /// The bytes, used slots held and stamped with `now`.
    #[inline(always)]
    fn stamped(self, now: u32) -> u32 {
        let mask = self.touched_bytes();
        (self.bytes & !mask) | (((self.bytes & PINNED) | HELD | (now * ONES)) & mask)
    }
}

/// The slots of `ages` that are older than `age`, at most 64; see [`Four`].
#[inline(always)]
pub(super) fn older(ages: u32, age: u32) -> u32 {
    (ages + (0x7f - age) * ONES) & HELD
}

/// Reads the row's directory and its slots' bytes, old stamps clamped, and clears the rest of the scratch. What else is read of the first `keys` keys is asked
/// for. No barrier follows.
#[inline(always)]
pub(super) unsafe fn read(row: &Row, scratch: &Scratch, keys: u32) {
    let (thread, words) = (thread::thread_idx_x(), row.entry.slots / 4);
    let mut word = thread;
    while word < words {
        let bytes = row.states.load(word as usize);
        scratch.states.store(word as usize, Four::clamped(bytes, row.entry.clock));
        word += BLOCK;
    }
    let mut segment = thread;
    while segment < row.segments() {
        let at = row.directories.load((row.entry.directory + segment) as usize);
        scratch.directory.store(segment as usize, at);
        if segment * SEGMENT_KEYS < keys {
            row.prefetch_segment(at);
        }
        segment += BLOCK;
    }
    let mut bits = thread;
    while bits < row.entry.slots.div_ceil(32) {
        scratch.touched.store(bits as usize, 0);
        bits += BLOCK;
    }
    // Where a page is found to be is read behind the ids, and each of these then behind the other.
    let mut line = thread * LINE_SLOTS;
    while line < row.entry.slots {
        row.physical.as_global().prefetch(line as usize);
        line += BLOCK * LINE_SLOTS;
    }
    if thread < AGES {
        scratch.histogram.store(thread as usize, 0);
    }
}

/// Writes the slots' bytes back; `stamp`: those that the selection uses are of this step.
#[inline(always)]
pub(super) unsafe fn write(row: &Row, scratch: &Scratch, stamp: bool) {
    let (mut word, words) = (thread::thread_idx_x(), row.entry.slots / 4);
    while word < words {
        let four = Four::load(scratch, word);
        let four = if stamp { four } else { Four { touched: 0, ..four } };
        row.states.store(word as usize, four.stamped(row.entry.clock));
        word += BLOCK;
    }
}
