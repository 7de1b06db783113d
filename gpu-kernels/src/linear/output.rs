//! What becomes of products.

use core::f32::consts::LOG2_E;

use cuda_std::bf16;
use cuda_std::math::{exp2_approx, reciprocal_approx};
use cuda_std::prelude::*;
use cuda_std::warp::{FULL_MASK, WARP_SIZE, warp_shuffle_xor};

use crate::abi::linear::epilogue::{ADD_F32, GATED_BF16, STORE_BF16};

/// The products of a launch, `[tokens, rows]`.
///
/// Rows of weights come in pairs, in the order of [`source`](Self::source): one row and the next, or a gate's and what it lets through.
#[derive(Clone, Copy)]
pub struct Output {
    /// `[tokens, n / 2]` pairs of bf16, or `[tokens, n / 4]` if gated.
    pub bf16: GlobalMut<u32>,
    /// `[tokens, n / 2]` pairs of f32.
    pub f32: GlobalMut<u64>,
    pub tokens: u32,
    /// Rows of weights.
    pub n: u32,
    /// One of [`epilogue`](crate::abi::linear::epilogue).
    pub epilogue: u32,
}

impl Output {
    /// The row of the weights that stands at place `place` of all rows, in pairs. There is one if `place` is below `n`.
    #[inline(always)]
    pub fn source(&self, place: u32) -> u32 {
        if self.epilogue == GATED_BF16 { place % 2 * (self.n / 2) + place / 2 } else { place }
    }

    /// Takes the products of two tokens and the pair of rows at `place`, an even number; there may be neither. Of lanes `DISTANCE` apart
    /// that differ in that bit of their numbers, one has `place` and the other `place + 2`, a multiple of 4 being the first, of the same tokens.
    ///
    /// # Safety
    /// All lanes of the warp are here; no other thread has these products.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    pub unsafe fn take<const DISTANCE: u32>(&self, tokens: [u32; 2], place: u32, products: [[f32; 2]; 2]) {
        if self.epilogue == GATED_BF16 {
            // Each lane stores two results of one token. Both are handed over, though one is enough: a choice of what to give would be a
            // branch with a shuffle on either side.
            let upper = warp::lane_id() & DISTANCE != 0;
            let own = [gated(products[0]), gated(products[1])];
            let got = [
                warp_shuffle_xor(FULL_MASK, own[0], DISTANCE, WARP_SIZE),
                warp_shuffle_xor(FULL_MASK, own[1], DISTANCE, WARP_SIZE),
            ];
            let (token, pair) = if upper {
                (tokens[1], bf16::pack(got[1], own[1]))
            } else {
                (tokens[0], bf16::pack(own[0], got[0]))
            };
            if token < self.tokens && place < self.n {
                self.bf16.store(token as usize * (self.n / 4) as usize + (place / 4) as usize, pair);
            }
            return;
        }
        let mut at = 0;
        while at < 2 {
            let (token, [first, second]) = (tokens[at], products[at]);
            if token < self.tokens && place < self.n {
                let index = token as usize * (self.n / 2) as usize + (place / 2) as usize;
                if self.epilogue == STORE_BF16 {
                    self.bf16.store(index, bf16::pack(first, second));
                } else if self.epilogue == ADD_F32 {
                    let [low, high] = halves(self.f32.load(index));
                    self.f32.store(index, whole([low + first, high + second]));
                } else {
                    self.f32.store(index, whole([first, second]));
                }
            }
            at += 1;
        }
    }
}

/// `silu(gate) * up`.
#[inline(always)]
fn gated([gate, up]: [f32; 2]) -> f32 {
    gate * reciprocal_approx(1.0 + exp2_approx(-gate * LOG2_E)) * up
}

#[inline(always)]
fn halves(pair: u64) -> [f32; 2] {
    [f32::from_bits(pair as u32), f32::from_bits((pair >> 32) as u32)]
}

#[inline(always)]
fn whole([low, high]: [f32; 2]) -> u64 {
    u64::from(low.to_bits()) | u64::from(high.to_bits()) << 32
}
