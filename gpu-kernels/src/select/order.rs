//! Exact selection of the greatest of a row's keys: a radix descent to the least key that is taken, then a list of ids.
//!
//! Scores of a row are close to each other, and so share their first bits. Digits are therefore of a key's distance from the row's least, which ranges over
//! what they are there to tell apart: the first one mostly does.
//!
//! A key is a score's bits, mapped so that keys compare as `f32::total_cmp` does. Key 0 stands for what is never taken and
//! key `u32::MAX` for what is taken first; scores have the keys between, for which the outermost two NaN patterns of each sign
//! share one.

use cuda_std::atomic::{Order, Scope};
use cuda_std::prelude::*;
use cuda_std::warp::FULL_MASK;
use cuda_std::{shared, shared_layout};

use super::block::exclusive_scan;
use crate::abi::WARP;
use crate::abi::select::{FORCED_KEY, KEYS_A_QUAD, LEAST_BLOCK, MASKED_KEY, MAX_BLOCK};

/// Bins of a digit: 11 bits; the last has as many as are left.
pub const BINS: u32 = 2048;

/// Words of four bins, one of each of the first threads.
const BIN_QUADS: u32 = BINS / 4;

shared_layout! {
    /// What the threads of a row's block hand to each other. The keys, where they fit, follow it.
    pub struct Scratch {
        bins: [u32; 2048],
        warps: [u32; 32],
        // The least keys, the greatest, and how many are forced, of each warp.
        spans: [u32; 96],
        found: [u32; 4],
        offsets: [f32; 16],
    }
}

const _: () = assert!(BINS == 2048 && MAX_BLOCK == 32 * WARP, "as the layout has it");
const _: () = assert!(BIN_QUADS <= LEAST_BLOCK, "each has a thread");
const _: () = assert!(Scratch::BYTES == crate::abi::select::SCRATCH_BYTES as usize, "as the host has it");

/// The key of a score.
#[inline(always)]
pub fn key_of(score: f32) -> u32 {
    let bits = score.to_bits();
    let ordered = bits ^ ((bits as i32 >> 31) as u32 | 1 << 31);
    ordered.clamp(MASKED_KEY + 1, FORCED_KEY - 1)
}

/// The score of a key that has one.
#[inline(always)]
pub fn score_of(key: u32) -> f32 {
    f32::from_bits(key ^ (!((key as i32 >> 31) as u32) | 1 << 31))
}

/// A row's keys, in quads of four: in shared memory if they fit, else in global memory.
#[derive(Clone, Copy)]
pub struct Keys {
    /// Behind [`Scratch`].
    pub shared: Shared<U32x4>,
    /// Elsewhere.
    pub global: GlobalMut<U32x4>,
    /// Which of them holds the keys.
    pub resident: bool,
    /// Quads of the row; the last is filled up with masked keys.
    pub quads: u32,
}

impl Keys {
    /// Four keys.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    pub unsafe fn load(&self, quad: u32) -> [u32; KEYS_A_QUAD as usize] {
        // With a cache hint, so that LLVM does not make one generic access of the two.
        let keys = if self.resident {
            self.shared.load(quad as usize)
        } else {
            self.global.as_global().load_with(quad as usize, LoadCache::Global)
        };
        keys.to_array()
    }

    /// Writes four keys.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    pub unsafe fn store(&self, quad: u32, [x, y, z, w]: [u32; KEYS_A_QUAD as usize]) {
        let keys = U32x4 { x, y, z, w };
        if self.resident {
            self.shared.store(quad as usize, keys);
        } else {
            self.global.store_with(quad as usize, keys, StoreCache::Global);
        }
    }

    /// The sum of `of` over all keys, in every thread.
    ///
    /// # Safety
    /// All threads of the block are here.
    #[inline(always)]
    pub unsafe fn sum(&self, of: impl Fn(u32) -> u32) -> u32 {
        let mut sum = 0_u32;
        let mut quad = thread::thread_idx_x();
        while quad < self.quads {
            let keys = self.load(quad);
            let mut at = 0;
            while at < keys.len() {
                sum = sum.wrapping_add(of(keys[at]));
                at += 1;
            }
            quad += thread::block_dim_x();
        }
        let (_, total) = exclusive_scan(sum, Scratch::warps());
        // The next scan writes the same words.
        thread::sync_threads();
        total
    }
}

/// Which keys are taken: those above `key`, and of those equal to it the first `ties`, by id.
#[derive(Clone, Copy)]
pub struct Threshold {
    pub key: u32,
    pub ties: u32,
}

impl Threshold {
    /// Takes no key.
    pub const NONE: Self = Self { key: FORCED_KEY, ties: 0 };
    /// Takes every key but masked ones.
    pub const ALL: Self = Self { key: MASKED_KEY, ties: 0 };

    /// Whether `key` is taken, for a walk along ascending ids; `seen` counts the ties so far.
    #[inline(always)]
    fn takes(self, key: u32, seen: &mut u32) -> bool {
        if key != self.key {
            return key > self.key;
        }
        *seen += 1;
        *seen <= self.ties
    }
}

/// Makes all bins zero. A barrier must follow before they count.
///
/// # Safety
/// The block has [`Scratch`], and nothing else uses the bins.
#[inline(always)]
pub unsafe fn clear_bins() {
    if thread::thread_idx_x() < BIN_QUADS {
        bin_quads().store(thread::thread_idx_x() as usize, U32x4::default());
    }
}

/// The bins, four a word.
#[inline(always)]
unsafe fn bin_quads() -> Shared<U32x4> {
    // They are the first of the scratch.
    shared::dynamic(0, BIN_QUADS as usize)
}

/// What scores' keys lie between, forced and masked ones aside.
#[derive(Clone, Copy)]
pub struct Span {
    least: u32,
    greatest: u32,
    /// How many keys are forced.
    forced: u32,
}

impl Span {
    /// Of no keys.
    pub const NONE: Self = Self { least: FORCED_KEY, greatest: MASKED_KEY, forced: 0 };

    /// With one more key.
    #[inline(always)]
    pub fn with(self, key: u32) -> Self {
        if key == FORCED_KEY {
            Self { forced: self.forced + 1, ..self }
        } else if key == MASKED_KEY {
            self
        } else {
            Self { least: self.least.min(key), greatest: self.greatest.max(key), ..self }
        }
    }

    /// The span of all threads' keys, in every thread. Its barrier is also that between keys and their readers.
    ///
    /// # Safety
    /// All threads of the block are here, once in a launch.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    pub unsafe fn of_block(self) -> Self {
        let (spans, warp) = (Scratch::spans(), (thread::thread_idx_x() / WARP) as usize);
        let lane = warp::lane_id() as usize;
        let least = warp::warp_reduce_min(FULL_MASK, self.least);
        let greatest = warp::warp_reduce_max(FULL_MASK, self.greatest);
        let forced = warp::warp_reduce_add(FULL_MASK, self.forced);
        if lane == 0 {
            spans.store(warp, least);
            spans.store(32 + warp, greatest);
            spans.store(64 + warp, forced);
        }
        thread::sync_threads();
        let mut all = Self::NONE;
        if lane < (thread::block_dim_x() / WARP) as usize {
            all = Self {
                least: spans.load(lane),
                greatest: spans.load(32 + lane),
                forced: spans.load(64 + lane),
            };
        }
        let (least, greatest) =
            (warp::warp_reduce_min(FULL_MASK, all.least), warp::warp_reduce_max(FULL_MASK, all.greatest));
        let forced = warp::warp_reduce_add(FULL_MASK, all.forced);
        // Without a score there is one that no key has the place of.
        if least > greatest { Self { forced, ..Self::EMPTY } } else { Self { least, greatest, forced } }
    }

    /// One key wide, below all that is forced.
    const EMPTY: Self = Self { least: MASKED_KEY + 1, greatest: MASKED_KEY + 1, forced: 0 };
}

/// The most bits of a digit.
const DIGIT_BITS: u32 = BINS.trailing_zeros();

/// The threshold at which the weights of the taken keys reach `target` (or all keys, if they never do): the greatest keys first,
/// each with its `weight`, digit by digit. With `EXACT` the weight of every key is 1 and exactly `target` keys are taken; without,
/// `weight` ascends with the key, is 0 of forced ones, and the fewest keys are taken.
///
/// The bins are clear before and after.
///
/// # Safety
/// All threads of the block are here, after a barrier; the bins are as above and the keys are in place, within `span`; the weights add up to less than
/// 2^32.
#[inline(always)]
pub unsafe fn descend<const EXACT: bool>(
    keys: &Keys,
    span: Span,
    target: u32,
    weight: impl Fn(u32) -> u32,
) -> Threshold {
    if EXACT && target <= span.forced {
        return Threshold { key: FORCED_KEY, ties: target };
    }
    let bins = Scratch::bins();
    let width = span.greatest - span.least;
    let (mut prefix, mut rest) = (0_u32, if EXACT { target - span.forced } else { target });
    let mut bits = DIGIT_BITS;
    let mut shift = (u32::BITS - width.leading_zeros()).saturating_sub(bits);
    loop {
        let mut quad = thread::thread_idx_x();
        while quad < keys.quads {
            let four = keys.load(quad);
            let mut at = 0;
            while at < four.len() {
                let distance = four[at].wrapping_sub(span.least);
                // In two steps: at the first digit all 32 bits may go. What is forced or masked is beyond the width.
                if distance <= width && distance >> shift >> bits == prefix {
                    let bin = (distance >> shift) & ((1 << bits) - 1);
                    // The result is not used and a count adds a constant: ptxas has an instruction for that.
                    let weight = if EXACT { 1 } else { weight(four[at]) };
                    bins.atomic_add(bin as usize, weight, Order::Relaxed, Scope::Block);
                }
                at += 1;
            }
            quad += thread::block_dim_x();
        }
        thread::sync_threads();
        let Some(Bin { bin, before, within }) = find_bin(rest) else {
            return if target == 0 { Threshold::NONE } else { Threshold::ALL };
        };
        rest -= before;
        prefix = prefix << bits | bin;
        let least_of_bin = span.least + (prefix << shift);
        if EXACT && within == rest {
            // The whole bin is taken, so the digits below don't matter.
            return Threshold { key: least_of_bin - 1, ties: 0 };
        }
        if shift == 0 {
            let ties = if EXACT { rest } else { rest.div_ceil(weight(least_of_bin)) };
            return Threshold { key: least_of_bin, ties };
        }
        bits = shift.min(DIGIT_BITS);
        shift -= bits;
    }
}

/// A bin, what lies in those above it, and what in itself.
struct Bin {
    bin: u32,
    before: u32,
    within: u32,
}

/// The bin in which a sum from the highest bin down reaches `target`: none if the target is 0 or above the sum of all. Clears the
/// bins.
///
/// # Safety
/// All threads of the block are here, after a barrier.
#[inline(always)]
unsafe fn find_bin(target: u32) -> Option<Bin> {
    let (quads, found) = (bin_quads(), Scratch::found());
    // The highest bins are the first thread's.
    let quad = BIN_QUADS.wrapping_sub(1 + thread::thread_idx_x());
    let mut of_thread = U32x4::default();
    if quad < BIN_QUADS {
        of_thread = quads.load(quad as usize);
        quads.store(quad as usize, U32x4::default());
    }
    let U32x4 { x, y, z, w } = of_thread;
    let sum = x + y + z + w;
    let (before, total) = exclusive_scan(sum, Scratch::warps());
    if before < target && target - before <= sum {
        // Down to the bin that reaches it.
        let or_next = |here: Bin, next: u32| {
            if target - here.before <= here.within {
                here
            } else {
                Bin { bin: here.bin - 1, before: here.before + here.within, within: next }
            }
        };
        let highest = Bin { bin: 4 * quad + 3, before, within: w };
        let reached = or_next(or_next(or_next(highest, z), y), x);
        found.store(0, reached.bin);
        found.store(1, reached.before);
        found.store(2, reached.within);
    }
    // Also between this scan and the next, and between cleared bins and counts.
    thread::sync_threads();
    if target == 0 || total < target {
        return None;
    }
    Some(Bin { bin: found.load(0), before: found.load(1), within: found.load(2) })
}

/// A threshold, and the ties before this thread's part of the row.
#[derive(Clone, Copy)]
pub struct Walk {
    threshold: Threshold,
    seen: u32,
}

impl Walk {
    /// Takes nothing.
    pub const NONE: Self = Self { threshold: Threshold::NONE, seen: 0 };
}

/// Writes the ids of the keys that `threshold` takes and `but` does not, ascending, the first key's being `first_id`; returns how many
/// they are, and the walk of this threshold.
///
/// A thread has a run of the row. Runs are an odd number of quads, so that eight threads side by side read from all banks.
///
/// # Safety
/// All threads of the block are here, after a barrier; the keys are in place; `ids` has room.
#[inline(always)]
pub unsafe fn list(
    keys: &Keys,
    threshold: Threshold,
    but: Walk,
    first_id: u32,
    ids: GlobalMut<u32>,
) -> (u32, Walk) {
    let run = keys.quads.div_ceil(thread::block_dim_x()) | 1;
    let start = (thread::thread_idx_x() * run).min(keys.quads);
    let end = (start + run).min(keys.quads);

    let mut walk = Walk { threshold, seen: 0 };
    if threshold.ties > 0 {
        let mut ties = 0;
        let mut quad = start;
        while quad < end {
            let four = keys.load(quad);
            let mut at = 0;
            while at < four.len() {
                ties += u32::from(four[at] == threshold.key);
                at += 1;
            }
            quad += 1;
        }
        (walk.seen, _) = exclusive_scan(ties, Scratch::warps());
        // The next scan writes the same words.
        thread::sync_threads();
    }

    let mut taken = 0;
    let (mut seen, mut seen_by_but) = (walk.seen, but.seen);
    let mut quad = start;
    while quad < end {
        let four = keys.load(quad);
        let mut at = 0;
        while at < four.len() {
            let excluded = but.threshold.takes(four[at], &mut seen_by_but);
            taken += u32::from(threshold.takes(four[at], &mut seen) && !excluded);
            at += 1;
        }
        quad += 1;
    }
    let (mut place, total) = exclusive_scan(taken, Scratch::warps());
    if taken > 0 {
        let (mut seen, mut seen_by_but) = (walk.seen, but.seen);
        let mut quad = start;
        while quad < end {
            let four = keys.load(quad);
            let mut at = 0;
            while at < four.len() {
                let excluded = but.threshold.takes(four[at], &mut seen_by_but);
                if threshold.takes(four[at], &mut seen) && !excluded {
                    ids.store(place as usize, first_id + KEYS_A_QUAD * quad + at as u32);
                    place += 1;
                }
                at += 1;
            }
            quad += 1;
        }
    }
    (total, walk)
}
