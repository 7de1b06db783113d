use cuda_std::atomic::{Order, Scope};
use cuda_std::prelude::*;
use cuda_std::shared_layout;
use cuda_std::warp::{FULL_MASK, warp_reduce_max};

use super::elements::quad_of;
use crate::abi::WARP;
use crate::abi::model::QUAD;
use crate::abi::model::argmax::{BLOCK, NONE, SHARED_BYTES, WORDS, parts};
use crate::select::key_of;
use crate::unroll::unrolled;

shared_layout! {
    struct Scratch {
        warps: [u64; 8],
    }
}

const _: () = assert!(Scratch::BYTES == SHARED_BYTES as usize && BLOCK == 8 * WARP, "as the host has it");

/// The greatest finite logit of each row: its id, of equals the lowest (-0 equals 0).
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `logits` | `[batch, stride]` f32, in words | NaN and infinities are passed over |
/// | `vocab` | at least 1, at most `stride` | logits of a row; what follows them is not looked at |
/// | `stride` | a multiple of 4 | |
/// | `greatest` | `[batch]` | scratch: 0 before and after |
/// | `arrivals` | `[batch]` | scratch: 0 before and after |
/// | `ids` | `[batch]` | written: [`NONE`] for a row without a finite logit |
///
/// # Mapping
/// [`parts`] blocks have a row, each thread all its logits in flight. A logit and its id make one number, of which the greatest is the answer:
/// the block that comes last writes it down.
///
/// # What bounds it
/// On an H100: a row of 151,936 logits alone the trips to memory and the last block's turn, 4.5 us; 64 rows memory, 0.75 of a copy's bandwidth, 48 registers.
///
/// # Launch
/// `batch * parts(vocab)` blocks of [`BLOCK`] threads, with [`SHARED_BYTES`] of shared memory.
///
/// # Safety
/// The views have the shapes above.
#[kernel(collectives(barrier = 1, reduce = 4))]
pub unsafe fn argmax(
    logits: Global<U32x4>,
    vocab: u32,
    stride: u32,
    greatest: GlobalMut<u64>,
    arrivals: GlobalMut<u32>,
    ids: GlobalMut<u32>,
) {
    let parts = parts(vocab);
    let (row, part) = (thread::block_idx_x() / parts, thread::block_idx_x() % parts);
    let row = row as usize;
    let words = vocab.div_ceil(QUAD);
    let logits = logits.rows((stride / QUAD) as usize).row(row);
    let first = part * BLOCK * WORDS + thread::thread_idx_x();
    let mut loaded = [U32x4::default(); WORDS as usize];
    unrolled!(at < WORDS as usize, {
        let word = first + at as u32 * BLOCK;
        if word < words {
            loaded[at] = logits.load_with(word as usize, LoadCache::ReadOnlyOnce);
        }
    });
    let mut best = 0;
    unrolled!(at < WORDS as usize, {
        let id = QUAD * (first + at as u32 * BLOCK);
        let quad = quad_of(loaded[at]);
        best = greater(best, quad[0], id, vocab);
        best = greater(best, quad[1], id + 1, vocab);
        best = greater(best, quad[2], id + 2, vocab);
        best = greater(best, quad[3], id + 3, vocab);
    });

    let warps = Scratch::warps();
    let best = greatest_of_warp(best);
    if warp::lane_id() == 0 {
        warps.store((thread::thread_idx_x() / WARP) as usize, best);
    }
    thread::sync_threads();
    if thread::thread_idx_x() >= WARP {
        return;
    }
    let lane = warp::lane_id();
    let best = greatest_of_warp(if lane < BLOCK / WARP { warps.load(lane as usize) } else { 0 });
    if lane == 0 {
        greatest.atomic_max(row, best, Order::Relaxed, Scope::Device);
        if arrivals.atomic_add(row, 1, Order::AcqRel, Scope::Device) + 1 == parts {
            // Both as they were, for the next launch.
            let best = greatest.atomic_exchange(row, 0, Order::Relaxed, Scope::Device);
            arrivals.store(row, 0);
            ids.store(row, if best == 0 { NONE } else { !(best as u32) });
        }
    }
}

/// The greater of `best` and what stands for a logit and its id, if it is one.
#[inline(always)]
fn greater(best: u64, logit: f32, id: u32, vocab: u32) -> u64 {
    // Adding zero makes -0 equal to 0.
    let key = u64::from(key_of(logit + 0.0)) << 32 | u64::from(!id);
    if id < vocab && logit.is_finite() && key > best { key } else { best }
}

/// The greatest of the lanes' numbers.
#[inline(always)]
unsafe fn greatest_of_warp(value: u64) -> u64 {
    let high = warp_reduce_max(FULL_MASK, (value >> 32) as u32);
    let low = if (value >> 32) as u32 == high { value as u32 } else { 0 };
    u64::from(high) << 32 | u64::from(warp_reduce_max(FULL_MASK, low))
}
