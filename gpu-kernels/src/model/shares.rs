//! Sums over a row of logits by a block of [`BLOCK`] threads, and where they reach a number.

use cuda_std::atomic::{Order, Scope};
use cuda_std::prelude::*;
use cuda_std::shared_layout;
use cuda_std::warp::{FULL_MASK, WARP_SIZE, warp_reduce_max, warp_shuffle_idx, warp_shuffle_up};

use crate::abi::WARP;
use crate::abi::model::QUAD;
use crate::abi::model::sample::{BLOCK, WARPS};
use crate::select::key_of;

shared_layout! {
    /// What the threads hand to each other.
    pub struct Scratch {
        low: [u32; 2048],
        high: [u32; 2048],
        warps: [u64; 32],
        found: [u64; 2],
    }
}

const _: () = assert!(BLOCK == 1024 && WARPS == WARP, "as the layout has it");

/// A row of logits.
#[derive(Clone, Copy)]
pub struct Row {
    pub logits: Global<U32x4>,
    pub vocab: u32,
}

impl Row {
    #[inline(always)]
    fn words(&self) -> u32 {
        self.vocab.div_ceil(QUAD)
    }

    /// Hands the keys of `start`, `start + step`, … below `end` to `take`, with their ids. Four words are in flight.
    #[inline(always)]
    unsafe fn each(&self, start: u32, end: u32, step: u32, mut take: impl FnMut(u32, u32)) {
        let load = |word: u32| {
            if word < end {
                self.logits.load_with(word as usize, LoadCache::ReadOnly)
            } else {
                U32x4::default()
            }
        };
        let mut take = |word: u32, loaded: U32x4| {
            let (four, mut at) = (loaded.to_array(), 0);
            while at < four.len() {
                let (logit, id) = (f32::from_bits(four[at]), QUAD * word + at as u32);
                if word < end && id < self.vocab && logit.is_finite() {
                    // Adding zero makes -0 equal to 0.
                    take(key_of(logit + 0.0), id);
                }
                at += 1;
            }
        };
        let mut word = start;
        while word < end {
            let words = [load(word), load(word + step), load(word + 2 * step), load(word + 3 * step)];
            take(word, words[0]);
            take(word + step, words[1]);
            take(word + 2 * step, words[2]);
            take(word + 3 * step, words[3]);
            word += 4 * step;
        }
    }

    /// All keys, each a thread's.
    #[inline(always)]
    unsafe fn all(&self, take: impl FnMut(u32, u32)) {
        self.each(thread::thread_idx_x(), self.words(), BLOCK, take);
    }
}

/// Where a sum along the order, likeliest first, reaches a number.
#[derive(Clone, Copy)]
pub struct Reached {
    /// The last key that it takes.
    pub key: u32,
    /// How many of the tokens that have it, by id.
    pub ties: u32,
    /// The sum before them.
    pub before: u64,
}

impl Reached {
    /// Takes all.
    pub const ALL: Self = Self { key: 0, ties: 0, before: 0 };
}

/// The sum of the values of the threads before this one, and of all.
///
/// # Safety
/// All threads of the block are here.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
unsafe fn scan(value: u64) -> (u64, u64) {
    let (warp, lane) = (thread::thread_idx_x() / WARP, warp::lane_id());
    let inclusive = scan_warp(value, lane);
    let warps = Scratch::warps();
    if lane == WARP - 1 {
        warps.store(warp as usize, inclusive);
    }
    thread::sync_threads();
    let sum = warps.load(lane as usize);
    let sums = scan_warp(sum, lane);
    let before = warp_shuffle_idx(FULL_MASK, sums - sum, warp, WARP_SIZE);
    let total = warp_shuffle_idx(FULL_MASK, sums, WARP - 1, WARP_SIZE);
    // The next scan writes the same words.
    thread::sync_threads();
    (before + inclusive - value, total)
}

#[inline(always)]
unsafe fn scan_warp(value: u64, lane: u32) -> u64 {
    let (mut sum, mut distance) = (value, 1);
    while distance < WARP_SIZE {
        let below = warp_shuffle_up(FULL_MASK, sum, distance, WARP_SIZE);
        sum += if lane >= distance { below } else { 0 };
        distance *= 2;
    }
    sum
}

/// The greatest key of a row, and how many keys there are. Clears the bins for [`reach`].
///
/// # Safety
/// All threads of the block are here.
#[inline(always)]
pub unsafe fn greatest(row: &Row) -> (u32, u32) {
    let (low, high) = (Scratch::low(), Scratch::high());
    let (thread, next) = (thread::thread_idx_x() as usize, (thread::thread_idx_x() + BLOCK) as usize);
    low.store(thread, 0);
    low.store(next, 0);
    high.store(thread, 0);
    high.store(next, 0);
    let (mut greatest, mut count) = (0_u32, 0_u64);
    row.all(|key, _| {
        greatest = greatest.max(key);
        count += 1;
    });
    let (_, count) = scan(count);
    let warps = Scratch::warps();
    let greatest = warp_reduce_max(FULL_MASK, greatest);
    if warp::lane_id() == 0 {
        warps.store((thread::thread_idx_x() / WARP) as usize, greatest.into());
    }
    thread::sync_threads();
    let greatest = warp_reduce_max(FULL_MASK, warps.load(warp::lane_id() as usize) as u32);
    thread::sync_threads();
    (greatest, count as u32)
}

/// The sum of `weight` over all keys.
///
/// # Safety
/// All threads of the block are here.
#[inline(always)]
pub unsafe fn sum(row: &Row, weight: impl Fn(u32) -> u64) -> u64 {
    let mut sum = 0;
    row.all(|key, _| sum += weight(key));
    scan(sum).1
}

/// Where the sum of `weight` along the order reaches `target`, which is 1 at least and the sum of all at most. The bins are clear before
/// and after.
///
/// # Safety
/// All threads of the block are here.
#[inline(always)]
pub unsafe fn reach(row: &Row, target: u64, weight: impl Fn(u32) -> u64) -> Reached {
    let (low, high, found) = (Scratch::low(), Scratch::high(), Scratch::found());
    let (mut prefix, mut rest, mut shift, mut bits) = (0_u32, target, 21_u32, 11_u32);
    loop {
        row.all(|key, _| {
            // In two steps: at the first digit all 32 bits go.
            let weight = if key >> shift >> bits == prefix { weight(key) } else { 0 };
            if weight > 0 {
                let bin = ((key >> shift) & ((1 << bits) - 1)) as usize;
                // Shared memory adds 32 bits in one instruction, 64 in a loop.
                let part = weight as u32;
                let before = low.atomic_add(bin, part, Order::Relaxed, Scope::Block);
                let carry = u32::from(before.checked_add(part).is_none());
                let part = (weight >> 32) as u32 + carry;
                if part > 0 {
                    high.atomic_add(bin, part, Order::Relaxed, Scope::Block);
                }
            }
        });
        thread::sync_threads();
        // The highest bins are the first thread's.
        let first = (2 * BLOCK - 1 - 2 * thread::thread_idx_x()) as usize;
        let of_bin = |bin: usize| u64::from(high.load(bin)) << 32 | u64::from(low.load(bin));
        let sums = [of_bin(first), of_bin(first - 1)];
        low.store(first, 0);
        low.store(first - 1, 0);
        high.store(first, 0);
        high.store(first - 1, 0);
        let (before, _) = scan(sums[0] + sums[1]);
        if before < rest && rest - before <= sums[0] + sums[1] {
            let in_first = rest - before <= sums[0];
            found.store(0, if in_first { first as u64 } else { first as u64 - 1 });
            found.store(1, if in_first { before } else { before + sums[0] });
        }
        // Also between cleared bins and the next digit's.
        thread::sync_threads();
        rest -= found.load(1);
        prefix = prefix << bits | found.load(0) as u32;
        // Others still read what the next digit's finder writes, until the barrier after its counts.
        if shift == 0 {
            let ties = rest.div_ceil(weight(prefix));
            let before = target - rest;
            return Reached { key: prefix, ties: ties as u32, before };
        }
        bits = if shift == 21 { 11 } else { 10 };
        shift -= bits;
    }
}

/// Writes the id at which the sum of `weight` along the ids reaches `target`, which is 1 at least and the sum of all at most.
///
/// Each warp adds up a run of the row; then the block shares the run in which the target lies.
///
/// # Safety
/// All threads of the block are here.
#[inline(always)]
pub unsafe fn locate(row: &Row, target: u64, weight: impl Fn(u32) -> u64, id: GlobalMut<u32>) {
    let (warp, lane) = (thread::thread_idx_x() / WARP, warp::lane_id());
    let run = row.words().div_ceil(WARPS);
    let end_of = |warp: u32| ((warp + 1) * run).min(row.words());
    let mut sum = 0;
    row.each(warp * run + lane, end_of(warp), WARP, |key, _| sum += weight(key));
    let (before, _) = scan(sum);
    // Of the warp.
    let (start, end) = (
        warp_shuffle_idx(FULL_MASK, before, 0, WARP_SIZE),
        warp_shuffle_idx(FULL_MASK, before + sum, WARP - 1, WARP_SIZE),
    );
    let found = Scratch::found();
    if lane == 0 && start < target && target <= end {
        found.store(0, warp.into());
        found.store(1, start);
    }
    thread::sync_threads();
    let (warp, mut rest) = (found.load(0) as u32, target - found.load(1));

    let share = run.div_ceil(BLOCK);
    let first = warp * run + thread::thread_idx_x() * share;
    let last = (first + share).min(end_of(warp));
    let mut sum = 0;
    row.each(first, last, 1, |key, _| sum += weight(key));
    let (before, _) = scan(sum);
    if before < rest && rest - before <= sum {
        rest -= before;
        row.each(first, last, 1, |key, at| {
            let weight = weight(key);
            if rest > 0 && rest <= weight {
                id.store(0, at);
            }
            rest = rest.saturating_sub(weight);
        });
    }
}
