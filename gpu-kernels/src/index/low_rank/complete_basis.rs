use cuda_std::math::{fma, rsqrt_approx};
use cuda_std::prelude::*;
use cuda_std::shared;
use cuda_std::warp::{FULL_MASK, warp_sum, warp_vote_any};

use crate::abi::WARP;
use crate::abi::low_rank::complete_basis::{BLOCK, exchange_start};
use crate::block::Exchange;

/// Fills up the rows of zero of `vectors`, the others being orthonormal: each becomes the axis of which the rows have least (the lowest of
/// those), less what they have of it, at length 1. What `complete` on the CPU does in f64. Of keys with as many dimensions as the rank nothing is
/// to do, and nothing is written.
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `vectors` | `[rank, width]` | read and written |
/// | `rank` | 1 to [`MAX_RANK`](crate::abi::low_rank::MAX_RANK) | |
/// | `width` | at least `rank` | |
///
/// # Mapping
/// A warp looks at every 32nd row; after that a thread has every 1024th axis.
///
/// # Launch
/// One block of [`BLOCK`] threads, [`shared_bytes`](crate::abi::low_rank::complete_basis::shared_bytes) of shared memory.
///
/// # Safety
/// The view has the shape above, and nothing else uses it until the launch has ended.
#[kernel(collectives(barrier = 4, shuffle = 5, vote = 1, reduce = 2))]
pub unsafe fn complete_basis(vectors: GlobalMut<f32>, rank: u32, width: u32) {
    let (thread, lane, warp) = (thread::thread_idx_x(), warp::lane_id(), thread::thread_idx_x() / WARP);
    let left = shared::dynamic::<f32>(0, width as usize);
    let added = shared::dynamic::<f32>(4 * width as usize, width as usize);
    let empty = shared::dynamic::<u32>(8 * width as usize, rank as usize);
    let warps = BLOCK / WARP;
    let squares = shared::dynamic::<f32>((8 * width + 4 * rank) as usize, warps as usize);
    let values = shared::dynamic(exchange_start(rank, width) as usize, Exchange::words(warps));
    let exchange = Exchange::new(values, warps);
    let of = |row: u32, axis: u32| (row * width + axis) as usize;

    let mut row = warp;
    while row < rank {
        let mut some = false;
        let mut axis = lane;
        while axis < width {
            some |= vectors.load(of(row, axis)) != 0.0;
            axis += WARP;
        }
        if !warp_vote_any(FULL_MASK, some) && lane == 0 {
            empty.store(row as usize, 1);
        } else if lane == 0 {
            empty.store(row as usize, 0);
        }
        row += warps;
    }
    thread::sync_threads();
    let mut row = 0;
    while row < rank && empty.load(row as usize) == 0 {
        row += 1;
    }
    if row == rank {
        return;
    }

    let mut axis = thread;
    while axis < width {
        let mut rest = 1.0;
        let mut other = 0;
        while other < rank {
            let element = vectors.load(of(other, axis));
            rest = fma(-element, element, rest);
            other += 1;
        }
        left.store(axis as usize, rest);
        axis += BLOCK;
    }
    // A thread looks at its own axes of `left` alone; of the vectors at others', behind the exchange's barriers.
    while row < rank {
        if empty.load(row as usize) == 0 {
            row += 1;
            continue;
        }
        // What is not negative is ordered as its bits are.
        let (mut most, mut own) = (0, u32::MAX);
        let mut axis = thread;
        while axis < width {
            let rest = left.load(axis as usize).max(0.0).to_bits();
            if own == u32::MAX || rest > most {
                (most, own) = (rest, axis);
            }
            axis += BLOCK;
        }
        let greatest = !exchange.least(0, !most);
        let chosen = exchange.least(1, if most == greatest { own } else { u32::MAX });

        // What the rows have of an axis is their element there. Once is enough: f32 leaves far less than the rounding of the basis to bf16.
        let mut square = 0.0;
        let mut axis = thread;
        while axis < width {
            let mut element = if axis == chosen { 1.0 } else { 0.0 };
            let mut other = 0;
            while other < rank {
                element = fma(-vectors.load(of(other, chosen)), vectors.load(of(other, axis)), element);
                other += 1;
            }
            added.store(axis as usize, element);
            square = fma(element, element, square);
            axis += BLOCK;
        }
        let square = warp_sum(square);
        if lane == 0 {
            squares.store(warp as usize, square);
        }
        thread::sync_threads();
        let mut all = 0.0;
        let mut other = 0;
        while other < warps {
            all += squares.load(other as usize);
            other += 1;
        }
        let scale = rsqrt_approx(all);
        let mut axis = thread;
        while axis < width {
            let element = added.load(axis as usize) * scale;
            vectors.store(of(row, axis), element);
            left.store(axis as usize, fma(-element, element, left.load(axis as usize)));
            axis += BLOCK;
        }
        row += 1;
    }
}
