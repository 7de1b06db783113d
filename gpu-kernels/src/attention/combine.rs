//! Puts together what warps, or splits, found in their shares of a row's tokens: outputs that are not yet divided by their sums.
//!
//! A part has, for each of eight heads, a [`Statistic`] of its logits, and the output, weighted but not divided.

use core::f32::consts::LN_2;

use cuda_std::bf16;
use cuda_std::math::{exp2_approx, max};
use cuda_std::prelude::*;
use cuda_std::shared;
use cuda_std::warp::{FULL_MASK, WARP_SIZE, warp_shuffle_xor};

use super::tile::element;
use crate::abi::WARP;
use crate::abi::attend::{BLOCK, HEADS, WARPS, partial_words};
use crate::softmax::{ln, shift_of};

/// What a part knows of a head's logits.
#[derive(Clone, Copy)]
pub struct Statistic {
    /// The greatest, in units of log2, rounded up.
    pub greatest: f32,
    /// Of the exponentials of what each is below it, the sum.
    pub sum: f32,
    /// The same of the exponentials as V is weighted with them, rounded to bf16: what outputs are divided by, so that their weights
    /// add up to 1.
    pub weights: f32,
}

impl Statistic {
    /// Of no logit.
    pub const NONE: Self = Self { greatest: f32::NEG_INFINITY, sum: 0.0, weights: 0.0 };

    #[inline(always)]
    fn of(U32x4 { x, y, z, .. }: U32x4) -> Self {
        Self { greatest: f32::from_bits(x), sum: f32::from_bits(y), weights: f32::from_bits(z) }
    }

    #[inline(always)]
    fn word(self) -> U32x4 {
        bits([self.greatest, self.sum, self.weights, 0.0])
    }
}

/// Where parts lie: in shared memory those of a block's warps, in global memory those of a row's splits.
pub trait Parts<const WORDS: u32> {
    /// How many.
    fn count(&self) -> u32;

    /// That of a head's logits in a part.
    ///
    /// # Safety
    /// The part is there.
    unsafe fn statistic(&self, part: u32, head: u32) -> Statistic;

    /// Word `word` of a part's outputs, `[heads, 2 * WORDS]`, four f32.
    ///
    /// # Safety
    /// The part is there.
    unsafe fn output(&self, part: u32, word: u32) -> U32x4;

    /// The statistic of a head, and eight elements of its output: word `word` of `WORDS`. Of `AT_ONCE` parts the loads are on
    /// their way at once.
    ///
    /// # Safety
    /// All parts are there.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    unsafe fn combined<const AT_ONCE: usize>(&self, head: u32, word: u32) -> (Statistic, [f32; 8]) {
        let first = (head * WORDS + word) * 2;
        let (mut all, mut elements) = (Statistic::NONE, [0.0; 8]);
        let mut part = 0;
        while part < self.count() {
            let mut statistics = [Statistic::NONE; AT_ONCE];
            let mut outputs = [[U32x4::default(); 2]; AT_ONCE];
            let mut at = 0;
            while at < AT_ONCE {
                // Beyond the last part there is another of it, without weight.
                let from = (part + at as u32).min(self.count() - 1);
                if part + (at as u32) < self.count() {
                    statistics[at] = self.statistic(from, head);
                }
                outputs[at] = [self.output(from, first), self.output(from, first + 1)];
                at += 1;
            }
            let before = all.greatest;
            let mut at = 0;
            while at < AT_ONCE {
                all.greatest = max(all.greatest, statistics[at].greatest);
                at += 1;
            }
            let rescale = exp2_approx(before - shift_of(all.greatest));
            all.sum *= rescale;
            all.weights *= rescale;
            let mut element = 0;
            while element < 8 {
                elements[element] *= rescale;
                element += 1;
            }
            let mut at = 0;
            while at < AT_ONCE {
                let own = statistics[at];
                let factor = exp2_approx(own.greatest - shift_of(all.greatest));
                all.sum += own.sum * factor;
                all.weights += own.weights * factor;
                let [low, high] = outputs[at];
                let (low, high) = (low.to_array(), high.to_array());
                let mut element = 0;
                while element < 4 {
                    elements[element] += f32::from_bits(low[element]) * factor;
                    elements[element + 4] += f32::from_bits(high[element]) * factor;
                    element += 1;
                }
                at += 1;
            }
            part += AT_ONCE as u32;
        }
        (all, elements)
    }

    /// Writes outputs and logarithms of sums of `heads` heads.
    ///
    /// # Safety
    /// All parts are there, and all threads of the block are here.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    unsafe fn finish<const AT_ONCE: usize>(
        &self,
        heads: u32,
        outputs: GlobalMut<U32x4>,
        lse: GlobalMut<f32>,
    ) {
        let mut place = thread::thread_idx_x();
        while place < heads * WORDS {
            let (head, word) = (place / WORDS, place % WORDS);
            let (Statistic { greatest, sum, weights }, elements) = self.combined::<AT_ONCE>(head, word);
            let factor = if weights > 0.0 { 1.0 / weights } else { 0.0 };
            let [a, b, c, d, e, f, g, h] = elements;
            let output = U32x4 {
                x: bf16::pack(a * factor, b * factor),
                y: bf16::pack(c * factor, d * factor),
                z: bf16::pack(e * factor, f * factor),
                w: bf16::pack(g * factor, h * factor),
            };
            outputs.store(place as usize, output);
            if word == 0 {
                lse.store(head as usize, greatest * LN_2 + ln(sum));
            }
            place += BLOCK;
        }
    }
}

/// The parts of a block's warps.
pub struct OfWarps<const WORDS: u32> {
    outputs: Shared<U32x4>,
    statistics: Shared<U32x4>,
}

impl<const WORDS: u32> OfWarps<WORDS> {
    /// Outputs at the start of shared memory, statistics from byte `statistics` of it.
    ///
    /// # Safety
    /// Shared memory is as large, and used by nothing else.
    #[inline(always)]
    pub unsafe fn at(statistics: u32) -> Self {
        Self {
            outputs: shared::dynamic(0, (WARPS * HEADS * 2 * WORDS) as usize),
            statistics: shared::dynamic(statistics as usize, (WARPS * HEADS) as usize),
        }
    }

    /// Stores this warp's part, from the lanes' parts of heads `2 t` and `2 t + 1`: the greatest logit is that of all lanes, sums and products
    /// are each lane's own.
    ///
    /// # Safety
    /// All lanes of the warp are here. A barrier must follow before anybody reads.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    pub unsafe fn store(&self, statistics: [Statistic; 2], products: &[[f32; 4]; 8]) {
        let (warp, lane) = (thread::thread_idx_x() / WARP, warp::lane_id());
        let (group, pair) = (lane / 4, lane % 4);
        let mut head = 0;
        while head < 2 {
            let mut statistic = statistics[head];
            let mut distance = 4;
            while distance < WARP {
                statistic.sum += warp_shuffle_xor(FULL_MASK, statistic.sum, distance, WARP_SIZE);
                statistic.weights += warp_shuffle_xor(FULL_MASK, statistic.weights, distance, WARP_SIZE);
                distance *= 2;
            }
            if group == 0 {
                self.statistics.store((warp * HEADS + 2 * pair) as usize + head, statistic.word());
            }
            head += 1;
        }
        let mut head = 0;
        while head < 2 {
            let of_head = (warp * HEADS + 2 * pair + head) * 2 * WORDS;
            let mut first = 0;
            while first < WORDS / 2 {
                let mut upper = 0;
                while upper < 2 {
                    let part = (2 * upper + head) as usize;
                    let of = |product: u32| products[product as usize][part];
                    let four = [of(first), of(first + 1), of(first + 2), of(first + 3)];
                    let word = element::<WORDS>(group, first, upper != 0) / 4;
                    self.outputs.store((of_head + turned(2 * pair, word)) as usize, bits(four));
                    upper += 1;
                }
                first += 4;
            }
            head += 1;
        }
    }
}

impl<const WORDS: u32> Parts<WORDS> for OfWarps<WORDS> {
    #[inline(always)]
    fn count(&self) -> u32 {
        WARPS
    }

    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    unsafe fn statistic(&self, part: u32, head: u32) -> Statistic {
        Statistic::of(self.statistics.load((part * HEADS + head) as usize))
    }

    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    unsafe fn output(&self, part: u32, word: u32) -> U32x4 {
        let (head, word) = (word / (2 * WORDS), word % (2 * WORDS));
        self.outputs.load(((part * HEADS + head) * 2 * WORDS + turned(head, word)) as usize)
    }
}

/// Where word `word` of a head's outputs stands among them: turned about so that the eight lanes that store at once, four pairs of
/// heads and two words two apart, store to all banks.
#[inline(always)]
fn turned(head: u32, word: u32) -> u32 {
    word ^ ((head / 2 % 2) + 4 * (head / 4 % 2))
}

/// The parts of a row's splits, in global memory.
pub struct OfSplits<const WORDS: u32> {
    parts: GlobalMut<U32x4>,
    splits: u32,
}

impl<const WORDS: u32> OfSplits<WORDS> {
    /// Those of unit `unit`.
    ///
    /// # Safety
    /// `partials` has them.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    pub unsafe fn of_unit(partials: GlobalMut<U32x4>, unit: u32, splits: u32) -> Self {
        let words = splits as usize * partial_words(WORDS) as usize;
        Self { parts: partials.slice(unit as usize * words, words), splits }
    }

    /// Stores what the warps of this block, split `split`, make together, of `heads` heads.
    ///
    /// # Safety
    /// The warps' parts are there, and all threads of the block are here.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    pub unsafe fn store(&self, split: u32, of_warps: &OfWarps<WORDS>, heads: u32) {
        let part = self.parts.slice((split * partial_words(WORDS)) as usize, partial_words(WORDS) as usize);
        let mut place = thread::thread_idx_x();
        while place < heads * WORDS {
            let (head, word) = (place / WORDS, place % WORDS);
            let (statistic, [a, b, c, d, e, f, g, h]) = of_warps.combined::<{ WARPS as usize }>(head, word);
            part.store_with((2 * place) as usize, bits([a, b, c, d]), StoreCache::Global);
            part.store_with((2 * place + 1) as usize, bits([e, f, g, h]), StoreCache::Global);
            if word == 0 {
                part.store_with((HEADS * 2 * WORDS + head) as usize, statistic.word(), StoreCache::Global);
            }
            place += BLOCK;
        }
    }
}

impl<const WORDS: u32> Parts<WORDS> for OfSplits<WORDS> {
    #[inline(always)]
    fn count(&self) -> u32 {
        self.splits
    }

    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    unsafe fn statistic(&self, part: u32, head: u32) -> Statistic {
        let place = part * partial_words(WORDS) + HEADS * 2 * WORDS + head;
        Statistic::of(self.parts.as_global().load_with(place as usize, LoadCache::Global))
    }

    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    unsafe fn output(&self, part: u32, word: u32) -> U32x4 {
        let place = part * partial_words(WORDS) + word;
        self.parts.as_global().load_with(place as usize, LoadCache::Global)
    }
}

#[inline(always)]
fn bits([x, y, z, w]: [f32; 4]) -> U32x4 {
    U32x4 { x: x.to_bits(), y: y.to_bits(), z: z.to_bits(), w: w.to_bits() }
}
