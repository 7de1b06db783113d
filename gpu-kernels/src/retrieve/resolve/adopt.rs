use cuda_std::thread;

use super::row::{Row, is_on_host};
use super::slots::{AGES, Four, Scratch};
use crate::abi::SLOT_HELD;
use crate::abi::resolve::BLOCK;

/// No slot can be had.
const NONE: u32 = u32::MAX;

/// Takes over the pages that leave the steady zone, each into the lowest empty slot, or that of the least recently used page, the
/// lowest of equals. If no slot can be had the page is dropped. Returns whether the host has all of them; those that it has not are not
/// taken over, and stay where they are.
///
/// Rare (once in as many steps as a page has tokens) and short, so one page after another.
#[inline(always)]
pub(super) unsafe fn adopt(row: &Row, scratch: &Scratch) -> bool {
    let mut all_there = true;
    let mut page = 0;
    while page < row.entry.leaving {
        let key = row.entry.leaving_key + page;
        let (_, valid) = row.host(key);
        let slot = first_to_leave(row, scratch, page);
        if !is_on_host(valid, key) {
            all_there = false;
        } else if slot != NONE && thread::thread_idx_x() == 0 {
            let place = row.entry.steady_place(row.row, key) as usize;
            let spare = row.install(scratch, key, slot);
            row.physical.store(slot as usize, row.steady.load(place));
            row.steady.store(place, spare);
            let (word, shift) = ((slot / 4) as usize, 8 * (slot % 4));
            let rest = scratch.states.load(word) & !(0xff << shift);
            scratch.states.store(word, rest | (SLOT_HELD as u32 | row.entry.clock) << shift);
        }
        // The tables are read again, by this loop or by the selection's lookups.
        thread::sync_threads();
        page += 1;
    }
    all_there
}

/// The slot that a page gets before the selection is looked at, or [`NONE`].
#[inline(always)]
unsafe fn first_to_leave(row: &Row, scratch: &Scratch, round: u32) -> u32 {
    let mut best = NONE;
    let mut word = thread::thread_idx_x();
    while word < row.entry.slots / 4 {
        let four = Four { bytes: scratch.states.load(word as usize), touched: 0 };
        let (empty, leaving, ages) = (four.empty(), four.leaving(), four.ages(row.entry.clock));
        let mut slot = 0;
        while slot < 4 {
            // Empty ones first, then by age; below 2^16 by number.
            let rank = if empty >> (8 * slot + 7) & 1 != 0 {
                0
            } else if leaving >> (8 * slot + 7) & 1 != 0 {
                AGES - (ages >> (8 * slot) & 0xff)
            } else {
                NONE >> 16
            };
            best = best.min(rank << 16 | (4 * word + slot));
            slot += 1;
        }
        word += BLOCK;
    }
    let least = scratch.warps.least(round, best);
    if least >> 16 <= AGES { least & 0xffff } else { NONE }
}
