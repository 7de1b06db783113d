use cuda_std::atomic::{Order, Scope};
use cuda_std::{thread, warp};

use super::row::Row;
use super::slots::{AGES, Four, Scratch, older};
use crate::abi::WARP;
use crate::abi::resolve::BLOCK;

/// Finds slots for `missing` pages: the lowest empty ones, then those of victims, in slot order. Whether there are as many; no
/// barrier follows. Two rounds of the scratch, from `round`.
///
/// A thread has a run of slots of its own, so a scan over the threads ranks slots in their order.
#[inline(always)]
pub(super) unsafe fn find(row: &Row, scratch: &Scratch, round: u32, missing: u32) -> bool {
    let words = row.entry.slots / 4;
    let run = words.div_ceil(BLOCK);
    let first = (thread::thread_idx_x() * run).min(words);
    let end = (first + run).min(words);

    let clock = row.entry.clock;
    let mut empty = 0;
    let mut word = first;
    while word < end {
        let four = Four::load(scratch, word);
        empty += four.empty().count_ones();
        let (leaving, ages) = (four.leaving(), four.ages(clock));
        let mut slot = 0;
        while slot < 4 {
            if leaving >> (8 * slot + 7) & 1 != 0 {
                let age = ages >> (8 * slot) & 0xff;
                scratch.histogram.atomic_add(age as usize, 1, Order::Relaxed, Scope::Block);
            }
            slot += 1;
        }
        word += 1;
    }
    let (mut empty_before, all_empty) = scratch.warps.scan(round, empty);
    let from_empty = missing.min(all_empty);
    let need = missing - from_empty;
    let Some(Threshold { age: threshold, of_age }) = threshold(scratch, need) else { return false };

    // Slots older than the threshold in the low half, of its very age in the high half.
    let mut counts = 0;
    let mut word = first;
    while word < end {
        let four = Four::load(scratch, word);
        let (oldest, equal) = four.parted(clock, threshold);
        counts += oldest.count_ones() | equal.count_ones() << 16;
        word += 1;
    }
    let (before, _) = scratch.warps.scan(round + 1, counts);
    let (mut older_before, mut equal_before) = (before & 0xffff, before >> 16);
    let mut word = first;
    while word < end {
        let four = Four::load(scratch, word);
        let (oldest, equal) = four.parted(clock, threshold);
        let mut rest = four.empty() | oldest | equal;
        while rest != 0 {
            let slot = rest & rest.wrapping_neg();
            rest &= rest - 1;
            let number = 4 * word + slot.trailing_zeros() / 8;
            if slot & (oldest | equal) == 0 {
                if empty_before < from_empty {
                    scratch.targets.store(empty_before as usize, number);
                }
                empty_before += 1;
            } else {
                if slot & oldest != 0 || equal_before < of_age {
                    let rank = older_before + equal_before.min(of_age);
                    scratch.targets.store((from_empty + rank) as usize, number);
                }
                older_before += (slot & oldest != 0) as u32;
                equal_before += (slot & equal != 0) as u32;
            }
        }
        word += 1;
    }
    true
}

impl Four {
    /// The slots whose pages may leave and are older than `threshold`, and those of that very age.
    #[inline(always)]
    fn parted(self, now: u32, threshold: u32) -> (u32, u32) {
        let (leaving, ages) = (self.leaving(), self.ages(now));
        let above = older(ages, threshold);
        // An age of the threshold or more, that is older than the one before; of threshold 0, all.
        let from = if threshold == 0 { leaving } else { older(ages, threshold - 1) };
        (leaving & above, leaving & from & !above)
    }
}

/// Who leaves: all above an age, and some of that age.
struct Threshold {
    age: u32,
    of_age: u32,
}

/// The threshold for `need` victims, by the histogram; `None` if there are too few. Every warp works it out for itself, which
/// takes less time than to wait for one.
#[inline(always)]
unsafe fn threshold(scratch: &Scratch, need: u32) -> Option<Threshold> {
    if need == 0 {
        return Some(Threshold { age: AGES, of_age: 0 });
    }
    // A lane has two ages, the oldest first.
    let oldest = AGES - 1 - 2 * warp::lane_id();
    let count = scratch.histogram.load(oldest as usize);
    let pair = count + scratch.histogram.load(oldest as usize - 1);
    let up_to = warp::warp_inclusive_scan_add(pair);
    let enough = warp::warp_vote_ballot(warp::FULL_MASK, up_to >= need);
    if enough == 0 {
        return None;
    }
    let older = up_to - pair;
    // Of other lanes than the first with enough these are of no use, and may wrap.
    let (age, of_age) = if older + count >= need {
        (oldest, need.wrapping_sub(older))
    } else {
        (oldest - 1, need.wrapping_sub(older + count))
    };
    let lane = enough.trailing_zeros();
    Some(Threshold {
        age: warp::warp_shuffle_idx(warp::FULL_MASK, age, lane, WARP),
        of_age: warp::warp_shuffle_idx(warp::FULL_MASK, of_age, lane, WARP),
    })
}
