//! Sixteen query rows in a warp's registers, as the tensor cores leave them: their softmax, step by step, and their outputs.
//!
//! With `g = lane / 4` and `t = lane % 4` a lane has rows `g` and `g + 8`, of each eight columns `2 t` and `2 t + 1`: parts 0 and 1 of
//! four are of the first row, 2 and 3 of the second.

use core::f32::consts::LN_2;

use cuda_std::bf16;
use cuda_std::math::{exp2_approx, fma, max};
use cuda_std::prelude::*;
use cuda_std::warp::{FULL_MASK, WARP_SIZE, warp_shuffle_xor};

use crate::softmax::ln;
use crate::unroll::unrolled;

/// How far above what is subtracted, in units of log2, a logit may be before all is rescaled. Weights are then at most 2^8, which costs
/// no precision, and after its first tile a row is hardly ever rescaled.
const SLACK: f32 = 8.0;

/// Logits, and then weights, of `EIGHTS` times eight keys.
pub type Logits<const EIGHTS: usize> = [[f32; 4]; EIGHTS];

/// What is known of a lane's two rows.
#[derive(Clone, Copy)]
pub struct Rows {
    /// What is subtracted from a row's logits, in units of log2: at most [`SLACK`] below the greatest so far. The same in a row's lanes.
    shifts: [f32; 2],
    /// A lane's share of the sum of weights.
    sums: [f32; 2],
}

impl Rows {
    /// Before the first tile.
    pub const NEW: Self = Self { shifts: [f32::NEG_INFINITY; 2], sums: [0.0; 2] };

    /// Lets each row see its first keys of a tile alone: `seen` of the lane's first row, eight more of its second.
    #[inline(always)]
    pub fn mask<const EIGHTS: usize>(logits: &mut Logits<EIGHTS>, seen: i32) {
        let column = (warp::lane_id() % 4 * 2) as i32;
        unrolled!(eight < EIGHTS, {
            let mut part = 0;
            while part < 4 {
                let key = 8 * eight as i32 + column + part % 2;
                if key >= seen + part / 2 * 8 {
                    logits[eight][part as usize] = f32::NEG_INFINITY;
                }
                part += 1;
            }
        });
    }

    /// The greatest of a lane's logits in each row.
    #[inline(always)]
    pub fn greatest<const EIGHTS: usize>(logits: &Logits<EIGHTS>) -> [f32; 2] {
        let mut greatest = [f32::NEG_INFINITY; 2];
        unrolled!(eight < EIGHTS, {
            let [a, b, c, d] = logits[eight];
            greatest[0] = max(greatest[0], max(a, b));
            greatest[1] = max(greatest[1], max(c, d));
        });
        greatest
    }

    /// Whether a lane's greatest logits are too far above what is subtracted; `scale` makes them units of log2.
    #[inline(always)]
    pub fn outgrown(&self, greatest: [f32; 2], scale: f32) -> bool {
        greatest[0] * scale > self.shifts[0] + SLACK || greatest[1] * scale > self.shifts[1] + SLACK
    }

    /// Subtracts the greatest logits from here on, and gives the factors for what was summed up before.
    ///
    /// # Safety
    /// All lanes of the warp are here, with a tile of which every row sees a key, now or before.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    pub unsafe fn raise(&mut self, greatest: [f32; 2], scale: f32) -> [f32; 2] {
        let mut factors = [0.0; 2];
        unrolled!(row < 2, {
            let of_pair = max(greatest[row], warp_shuffle_xor(FULL_MASK, greatest[row], 1, WARP_SIZE));
            let of_row = max(of_pair, warp_shuffle_xor(FULL_MASK, of_pair, 2, WARP_SIZE));
            let shift = max(self.shifts[row], of_row * scale);
            // 0 before the first tile.
            factors[row] = exp2_approx(self.shifts[row] - shift);
            self.shifts[row] = shift;
            self.sums[row] *= factors[row];
        });
        factors
    }

    /// Makes weights of logits, and adds them up.
    #[inline(always)]
    pub fn weigh<const EIGHTS: usize>(&mut self, logits: &mut Logits<EIGHTS>, scale: f32) {
        unrolled!(eight < EIGHTS, {
            let mut part = 0;
            while part < 4 {
                let weight = exp2_approx(fma(logits[eight][part], scale, -self.shifts[part / 2]));
                self.sums[part / 2] += weight;
                logits[eight][part] = weight;
                part += 1;
            }
        });
    }

    /// Divides outputs by the sums of weights, and writes them and the logarithms of the sums: those of rows below `end`. `outputs` and
    /// `lse` begin with the head's of the first of the sixteen rows; those of the next follow `words` and `heads` later.
    ///
    /// # Safety
    /// All lanes of the warp are here; the views have the rows.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    pub unsafe fn finish<const WORDS: usize>(
        &self,
        products: &[[f32; 4]; WORDS],
        end: u32,
        outputs: GlobalMut<U32x4>,
        lse: GlobalMut<f32>,
        heads: u32,
    ) {
        let (group, pair) = (warp::lane_id() / 4, warp::lane_id() % 4);
        unrolled!(half < 2, {
            let row = group + 8 * half as u32;
            let of_pair = self.sums[half] + warp_shuffle_xor(FULL_MASK, self.sums[half], 1, WARP_SIZE);
            let sum = of_pair + warp_shuffle_xor(FULL_MASK, of_pair, 2, WARP_SIZE);
            let factor = 1.0 / sum;
            unrolled!(four < WORDS / 4, {
                let pair_of = |word: usize| {
                    let [a, b, c, d] = products[4 * four + word];
                    let (low, high) = if half == 0 { (a, b) } else { (c, d) };
                    bf16::pack(low * factor, high * factor)
                };
                let [x, y, z, w] = transpose_quad([pair_of(0), pair_of(1), pair_of(2), pair_of(3)]);
                if row < end {
                    let place = row * heads * WORDS as u32 + 4 * four as u32 + pair;
                    outputs.store(place as usize, U32x4 { x, y, z, w });
                }
            });
            if row < end && pair == 0 {
                lse.store((row * heads) as usize, self.shifts[half] * LN_2 + ln(sum));
            }
        });
    }
}

/// Weights of 16 keys, from eight `2 * sixteen` on, as the left side of a product.
#[inline(always)]
pub fn left_side<const EIGHTS: usize>(weights: &Logits<EIGHTS>, sixteen: usize) -> [u32; 4] {
    let [low, high] = [weights[2 * sixteen], weights[2 * sixteen + 1]];
    [
        bf16::pack(low[0], low[1]),
        bf16::pack(low[2], low[3]),
        bf16::pack(high[0], high[1]),
        bf16::pack(high[2], high[3]),
    ]
}

/// The transpose of a 4 x 4 matrix of which each of four neighbouring lanes has a row.
///
/// # Safety
/// All lanes of the warp are here.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
unsafe fn transpose_quad([a, b, c, d]: [u32; 4]) -> [u32; 4] {
    // The lower lane keeps the first and gives the second, the upper one the other way round. It is done by bits: where a condition
    // stands before and after a shuffle LLVM makes two branches with a shuffle each.
    let swap = |first: u32, second: u32, distance: u32| {
        let upper = 0_u32.wrapping_sub(u32::from(warp::lane_id() & distance != 0));
        let differ = (first ^ second) & upper;
        let (kept, given) = (first ^ differ, second ^ differ);
        let got = warp_shuffle_xor(FULL_MASK, given, distance, WARP_SIZE);
        let differ = (kept ^ got) & upper;
        (kept ^ differ, got ^ differ)
    };
    let ((a, c), (b, d)) = (swap(a, c, 2), swap(b, d, 2));
    let ((a, b), (c, d)) = (swap(a, b, 1), swap(c, d, 1));
    [a, b, c, d]
}
