use cuda_std::atomic::{Fence, Scope, fence};
use cuda_std::{GlobalMut, U32x4, bf16, math};

use crate::abi::{WORD_ELEMENTS, summary_parts};

/// Loads that a thread starts before it uses the first of them.
const LOADS: usize = 8;

/// What an Index operator keeps of one word (8 channels) of the keys of a partition.
///
/// Arrays are indexed by counters throughout: LLVM unrolls those loops, where iterators would put the arrays into local memory.
pub(super) trait Operator: Copy {
    /// Words of a summary for each word of a key.
    const PARTS: u32;

    /// Of no token.
    fn new() -> Self;

    /// Takes in the word of the next token.
    fn add(&mut self, word: U32x4);

    /// The words of the summary, `PARTS` of them; `scale` is 1 / tokens.
    fn parts(self, scale: f32) -> [U32x4; 2];
}

/// Walks a partition: token 0 of it to token `tokens - 1`, whose word of the key `load` gives. This order is that of all sums.
#[inline(always)]
pub(super) unsafe fn walk<O: Operator>(tokens: u32, load: impl Fn(u32) -> U32x4) -> O {
    let mut kept = O::new();
    let mut words = [U32x4::default(); LOADS];
    let mut token = 0;
    while tokens - token >= LOADS as u32 {
        let mut next = 0;
        while next < LOADS {
            words[next] = load(token + next as u32);
            next += 1;
        }
        together();
        // One by one: LLVM does not unroll a loop this long, and would keep the array in local memory.
        kept.add(words[0]);
        kept.add(words[1]);
        kept.add(words[2]);
        kept.add(words[3]);
        kept.add(words[4]);
        kept.add(words[5]);
        kept.add(words[6]);
        kept.add(words[7]);
        token += LOADS as u32;
    }
    // Fewer than 8 are left, of a partition that is no multiple: 4, 2, 1.
    let rest = tokens - token;
    if rest & 4 != 0 {
        let words = [load(token), load(token + 1), load(token + 2), load(token + 3)];
        together();
        kept.add(words[0]);
        kept.add(words[1]);
        kept.add(words[2]);
        kept.add(words[3]);
        token += 4;
    }
    if rest & 2 != 0 {
        let words = [load(token), load(token + 1)];
        kept.add(words[0]);
        kept.add(words[1]);
        token += 2;
    }
    if rest & 1 != 0 {
        kept.add(load(token));
    }
    kept
}

/// Keeps the loads before it ahead of all use of them. Without it ptxas saves registers by moving loads down to their additions, two in
/// flight; nothing is ordered that others see.
#[inline(always)]
pub(super) fn together() {
    fence(Fence::AcqRel, Scope::Block);
}

/// Writes word `word` of each part of a summary.
#[inline(always)]
pub(super) unsafe fn store<O: Operator>(
    kept: O,
    tokens: u32,
    summary: GlobalMut<U32x4>,
    head_words: u32,
    word: u32,
) {
    let parts = kept.parts(1.0 / tokens as f32);
    let mut part = 0;
    while part < O::PARTS {
        summary.store((part * head_words + word) as usize, parts[part as usize]);
        part += 1;
    }
}

/// The mean: f32 sums in token order times 1 / tokens, rounded to bf16.
#[derive(Clone, Copy)]
pub(super) struct Mean {
    pub(super) sums: [f32; WORD_ELEMENTS],
}

impl Operator for Mean {
    const PARTS: u32 = summary_parts::MEAN;

    #[inline(always)]
    fn new() -> Self {
        Self { sums: [0.0; WORD_ELEMENTS] }
    }

    #[inline(always)]
    fn add(&mut self, word: U32x4) {
        let pairs = word.to_array();
        let mut pair = 0;
        while pair < 4 {
            let (low, high) = bf16::unpack(pairs[pair]);
            self.sums[2 * pair] += low;
            self.sums[2 * pair + 1] += high;
            pair += 1;
        }
    }

    #[inline(always)]
    fn parts(self, scale: f32) -> [U32x4; 2] {
        let [a, b, c, d, e, f, g, h] = self.sums;
        let mean = U32x4 {
            x: bf16::pack(a * scale, b * scale),
            y: bf16::pack(c * scale, d * scale),
            z: bf16::pack(e * scale, f * scale),
            w: bf16::pack(g * scale, h * scale),
        };
        [mean, U32x4::default()]
    }
}

/// The least and the greatest, exactly: bf16 in, the same bf16 out. A NaN in a channel makes both NaN.
#[derive(Clone, Copy)]
pub(super) struct Bounds {
    least: [f32; WORD_ELEMENTS],
    greatest: [f32; WORD_ELEMENTS],
    /// Bits 15 and 31 of a pair: there was a NaN in its lower, its upper half. The other bits mean nothing.
    nan: [u32; 4],
}

impl Operator for Bounds {
    const PARTS: u32 = summary_parts::BOUNDS;

    #[inline(always)]
    fn new() -> Self {
        Self {
            least: [f32::INFINITY; WORD_ELEMENTS],
            greatest: [f32::NEG_INFINITY; WORD_ELEMENTS],
            nan: [0; 4],
        }
    }

    #[inline(always)]
    fn add(&mut self, word: U32x4) {
        let pairs = word.to_array();
        let mut pair = 0;
        while pair < 4 {
            let (low, high) = bf16::unpack(pairs[pair]);
            self.least[2 * pair] = math::min(self.least[2 * pair], low);
            self.least[2 * pair + 1] = math::min(self.least[2 * pair + 1], high);
            self.greatest[2 * pair] = math::max(self.greatest[2 * pair], low);
            self.greatest[2 * pair + 1] = math::max(self.greatest[2 * pair + 1], high);
            // Both leave out NaN. Without its sign a bf16 above infinity, 0x7f80, is one; adding 0x7f carries it into the sign's bit.
            self.nan[pair] |= (pairs[pair] & 0x7fff_7fff) + 0x007f_007f;
            pair += 1;
        }
    }

    #[inline(always)]
    fn parts(self, _: f32) -> [U32x4; 2] {
        let (mut least, mut greatest) = ([0; 4], [0; 4]);
        let mut pair = 0;
        while pair < 4 {
            // 0x7fff, the NaN of bf16::pack, in the halves that had one.
            let halves = self.nan[pair] >> 15 & 0x0001_0001;
            let (nan, numbers) = (halves * 0x7fff, !(halves * 0xffff));
            least[pair] = bf16::pack(self.least[2 * pair], self.least[2 * pair + 1]) & numbers | nan;
            greatest[pair] = bf16::pack(self.greatest[2 * pair], self.greatest[2 * pair + 1]) & numbers | nan;
            pair += 1;
        }
        [of(least), of(greatest)]
    }
}

#[inline(always)]
fn of([x, y, z, w]: [u32; 4]) -> U32x4 {
    U32x4 { x, y, z, w }
}
