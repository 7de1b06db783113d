use cuda_std::math::{fma, rsqrt_approx};
use cuda_std::prelude::*;
use cuda_std::shared;
use cuda_std::warp::FULL_MASK;

use crate::abi::WARP;
use crate::abi::low_rank::inverse_factor::{BLOCK, LEAST_KEPT, LEAST_RAISED};

/// The inverse of the lower Cholesky factor of `products`, the dot products of `rank` vectors: sums of the vectors with its rows as weights
/// are orthonormal.
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `products` | `[rank, rank]` | symmetric |
/// | `rank` | 1 to [`MAX_RANK`](crate::abi::low_rank::MAX_RANK) | |
/// | `drops` | 0 or 1 | what becomes of vectors that nearly depend on those before them: their pivots are raised to [`LEAST_RAISED`] and nothing of them is taken from those behind, or those below [`LEAST_KEPT`] drop their vectors |
/// | `factor` | `[rank, rank]` | written; 0 above the diagonal, and in row and column of a vector that is dropped or has length 0 |
///
/// Vectors count as of length 1. What [`inverse_factor`] on the CPU does in f64, in its order.
///
/// # Mapping
/// Gaussian elimination in place, in shared memory: of a pivot's step a warp has every 32nd row below it, a lane every 32nd element of that. A
/// barrier a step.
///
/// # Launch
/// One block of [`BLOCK`] threads, [`shared_bytes`](crate::abi::low_rank::inverse_factor::shared_bytes) of shared memory.
///
/// # Safety
/// The views have the shapes above.
///
/// [`inverse_factor`]: ../../spinkv/backend/cpu/low_rank/fn.inverse_factor.html
#[kernel(collectives(barrier = 4))]
pub unsafe fn inverse_factor(products: Global<f32>, rank: u32, drops: u32, factor: GlobalMut<f32>) {
    let rest = shared::dynamic::<f32>(0, (rank * rank) as usize);
    let scales = shared::dynamic::<f32>((4 * rank * rank) as usize, rank as usize);
    let (thread, lane) = (thread::thread_idx_x(), warp::lane_id());
    if thread < rank {
        let square = products.load((thread * rank + thread) as usize);
        scales.store(thread as usize, inverse_root(square));
    }
    thread::sync_threads();
    let mut at = thread;
    while at < rank * rank {
        let scale = scales.load((at / rank) as usize) * scales.load((at % rank) as usize);
        rest.store(at as usize, products.load(at as usize) * scale);
        at += BLOCK;
    }
    thread::sync_threads();

    let mut step = 0;
    while step < rank {
        let pivot_row = rest.slice((step * rank) as usize, rank as usize);
        let pivot = pivot_row.load(step as usize);
        // Nothing of a small pivot's vector is taken from those behind: it would be rounding more than direction.
        let takes = pivot >= least(drops) && scales.load(step as usize) > 0.0;
        let inverse = if takes { 1.0 / pivot } else { 0.0 };
        let mut row = step + 1 + thread / WARP;
        while row < rank {
            let own = rest.slice((row * rank) as usize, rank as usize);
            let multiplier = own.load(step as usize) * inverse;
            // All lanes have it before one of them writes there.
            warp::sync_warp(FULL_MASK);
            let mut column = lane;
            while column < rank {
                let element = if column == step {
                    -multiplier
                } else {
                    fma(-multiplier, pivot_row.load(column as usize), own.load(column as usize))
                };
                own.store(column as usize, element);
                column += WARP;
            }
            row += BLOCK / WARP;
        }
        thread::sync_threads();
        step += 1;
    }

    let mut at = thread;
    while at < rank * rank {
        let (row, column) = (at / rank, at % rank);
        let diagonal = rest.load((row * rank + row) as usize);
        let root = if diagonal >= least(drops) {
            inverse_root(diagonal)
        } else if drops == 0 {
            inverse_root(LEAST_RAISED)
        } else {
            0.0
        };
        let root = if scales.load(row as usize) > 0.0 { root } else { 0.0 };
        let element = if column < row {
            rest.load(at as usize)
        } else if column == row {
            1.0
        } else {
            0.0
        };
        factor.store(at as usize, element * root * scales.load(column as usize));
        at += BLOCK;
    }
}

/// The least pivot that stays as it is.
#[inline(always)]
fn least(drops: u32) -> f32 {
    if drops != 0 { LEAST_KEPT } else { LEAST_RAISED }
}

/// 1 / sqrt, 0 of what is not above 0.
#[inline(always)]
fn inverse_root(square: f32) -> f32 {
    if square > 0.0 { rsqrt_approx(square) } else { 0.0 }
}
