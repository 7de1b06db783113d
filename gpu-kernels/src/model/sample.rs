use core::f32::consts::LOG2_E;

use cuda_std::math::exp2_approx;
use cuda_std::prelude::*;

use super::shares::{Reached, Row, Scratch, greatest, locate, reach, sum};
use crate::abi::model::QUAD;
use crate::abi::model::argmax::NONE;
use crate::abi::model::sample::{DRAW_BITS, SHARED_BYTES, WEIGHT_OF_ONE};
use crate::select::score_of;

const _: () = assert!(Scratch::BYTES == SHARED_BYTES as usize, "as the host has it");

/// Draws a token of each row by its logits: temperature, then top-k, top-p and min-p, as the engine's `SamplingParams` has them.
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `logits` | `[batch, stride]` f32, in words | NaN and infinities are never drawn |
/// | `vocab` | at least 1, at most `stride` | logits of a row; what follows them is not looked at |
/// | `stride` | a multiple of 4 | |
/// | `params` | `[batch]` [`SampleParams`](crate::abi::model::sample::SampleParams) in words | |
/// | `ids` | `[batch]` | written: [`NONE`] for a row without a finite logit |
///
/// What is left is a run of the tokens in their order, likeliest first and of equals the lowest ids; the draw is a point on the sum of
/// their weights `e^((logit - greatest) / temperature)`. If top-k or top-p cut something off, that sum is along this order, else along the
/// ids. Weights are whole numbers, 2^40 for the likeliest, so that sums don't depend on an order. They come from f32
/// exponentials: where a sum of f64 is within about 1e-6 of the draw, or of top-p's share, a neighbour may be taken.
///
/// # Mapping
/// A block has a row, which it reads several times: where a sum along the order reaches a number is found by a radix descent over
/// the logits' keys, 11, 11 and 10 bits.
///
/// # What bounds it
/// On an H100: its passes over the row, one behind the other, by one block with 56 registers: 88 us at 151,936 logits with temperature alone, 255 with top-p, 303 with
/// top-k and top-p, whether one row or 64.
///
/// # Launch
/// `batch` blocks of [`BLOCK`](crate::abi::model::sample::BLOCK) threads, with [`SHARED_BYTES`] of shared memory.
///
/// # Safety
/// The views have the shapes above.
#[kernel(collectives(barrier = 30, shuffle = 248, reduce = 2))]
pub unsafe fn sample(
    logits: Global<U32x4>,
    vocab: u32,
    stride: u32,
    params: Global<U32x4>,
    ids: GlobalMut<u32>,
) {
    let row = thread::block_idx_x() as usize;
    let U32x4 { x: temperature, y: top_k, z: top_p, w: min_p } = params.load(2 * row);
    let U32x4 { x: low, y: high, .. } = params.load(2 * row + 1);
    let draw = u64::from(high) << 32 | u64::from(low);
    let [temperature, top_p, min_p] = [temperature, top_p, min_p].map(f32::from_bits);
    let row = Row { logits: logits.rows((stride / QUAD) as usize).row(row), vocab };
    let id = ids.slice(thread::block_idx_x() as usize, 1);

    let (best, count) = greatest(&row);
    if count == 0 {
        if thread::thread_idx_x() == 0 {
            id.store(0, NONE);
        }
        return;
    }
    let (key, place) = if temperature == 0.0 {
        (best, 1)
    } else {
        let (greatest, scale) = (score_of(best), LOG2_E / temperature);
        let weight = |key: u32| {
            let below = score_of(key) - greatest;
            // Of the likeliest the scale may be infinite.
            if key == best { WEIGHT_OF_ONE } else { whole(exp2_approx(below * scale)) }
        };
        let cuts = top_k != 0 && top_k < count;
        let by_k = if cuts { reach(&row, top_k.into(), |_| 1) } else { Reached::ALL };
        let least = whole(min_p);
        let mut total = sum(&row, |key| if key > by_k.key { weight(key) } else { 0 });
        if by_k.ties > 0 {
            total += u64::from(by_k.ties) * weight(by_k.key);
        }
        if top_p < 1.0 {
            let by_p = reach(&row, share(top_p, total), weight);
            total = by_p.before + u64::from(by_p.ties) * weight(by_p.key);
        }
        let likely = |key: u32| {
            let weight = weight(key);
            if weight >= least { weight } else { 0 }
        };
        if min_p > 0.0 {
            // Each leaves a run from the likeliest on: the shorter one counts.
            total = total.min(sum(&row, likely));
        }
        // Below the total, since the draw is below 1.
        let target = ((u128::from(draw) * u128::from(total)) >> DRAW_BITS) as u64 + 1;
        if !cuts && top_p >= 1.0 {
            return locate(&row, target, likely, id);
        }
        let drawn = reach(&row, target, weight);
        (drawn.key, drawn.ties)
    };
    locate(&row, place.into(), |other| u64::from(other == key), id);
}

/// A number of 0 to 1 as a weight.
#[inline(always)]
fn whole(of_one: f32) -> u64 {
    (of_one * WEIGHT_OF_ONE as f32) as u64
}

/// The least whole number that is at least `share` of `total`, from 1 to `total`.
#[inline(always)]
fn share(share: f32, total: u64) -> u64 {
    let exact = f64::from(share) * total as f64;
    let whole = exact as u64;
    let whole = if (whole as f64) < exact { whole + 1 } else { whole };
    whole.clamp(1, total)
}
