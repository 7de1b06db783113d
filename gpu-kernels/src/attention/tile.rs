//! A tile: 16 tokens of K and V, on their way through a warp's ring and through the tensor cores.
//!
//! Which lane needs which word is free as far as products and sums over all elements go, so lanes have whole words of eight elements.
//! With `g = lane / 4` and `t = lane % 4`:
//!
//! - K is the left side of `K Q^T`. A lane has words `t`, `t + 4`, … of tokens `g` and `g + 8`; queries are laid out alike.
//! - The result has tokens in rows and heads in columns. Its transpose, rounded to bf16, is the right side of `V^T P`, so that what
//!   belongs to a head is always in the same lanes.
//! - V^T is the left side: a lane has words `g` (and `g + 8`) of tokens `2 t`, `2 t + 1`, `2 t + 8` and `2 t + 9`, and pairs tokens
//!   up, element by element. Rows of a product are elements far apart; outputs of a lane are elements of its words.
//!
//! Copies are of rows end to end, since whole lines of 128 bytes are all that the L2 is fast at. In shared memory the words of a row
//! stand in another order in each row, so that the eight lanes that read at once read from all banks.

use cuda_std::copy::copy_async_or_zero;
use cuda_std::mma::mma_m16n8k16_bf16;
use cuda_std::prelude::*;
use cuda_std::warp::{FULL_MASK, WARP_SIZE, warp_shuffle_idx};

use super::context::Context;
use crate::abi::WARP;
use crate::abi::attend::{RUN, TILE};

/// A lane's words of K, or of V, in a tile, for heads of `WORDS` words.
pub const fn lane_words(words: u32) -> u32 {
    TILE * words / WARP
}

/// Physical pages of the two runs of a tile.
pub type Pages = [u32; 2];

/// The pages of a warp's tiles, every `STEP`-th of the row: of sixteen at a time, two runs each, a lane looks up one run's, long
/// before they are asked for, so that copies do not wait for page numbers.
#[derive(Clone, Copy)]
pub struct Lookup<const STEP: u32> {
    /// Tiles since the first of those in `now`.
    passed: u32,
    now: u32,
    coming: u32,
}

impl<const STEP: u32> Lookup<STEP> {
    const TILES: u32 = WARP / 2;

    /// From tile `tile` on.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    pub unsafe fn new(context: &Context, tile: u32) -> Self {
        let now = Self::ask(context, tile);
        Self { passed: 0, now, coming: Self::ask(context, tile + Self::TILES * STEP) }
    }

    /// Asks for this lane's of the pages from tile `tile` on.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    unsafe fn ask(context: &Context, tile: u32) -> u32 {
        context.page(2 * (tile + warp::lane_id() / 2 * STEP) + warp::lane_id() % 2)
    }

    /// Those of tile `tile`, `STEP` after the last one's.
    ///
    /// # Safety
    /// All lanes of the warp are here, with the same tile.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    pub unsafe fn next(&mut self, context: &Context, tile: u32) -> Pages {
        if self.passed == Self::TILES {
            self.passed = 0;
            self.now = self.coming;
            self.coming = Self::ask(context, tile + Self::TILES * STEP);
        }
        let of = |run| warp_shuffle_idx(FULL_MASK, self.now, 2 * self.passed + run, WARP_SIZE);
        let pages = [of(0), of(1)];
        self.passed += 1;
        pages
    }
}

/// Where word `word` of token `token` of a tile is among its words of K.
#[inline(always)]
fn place_of_key<const WORDS: u32>(token: u32, word: u32) -> u32 {
    token * WORDS + (word ^ (4 * (token % 2)))
}

/// Where word `word` of token `token` of a tile is in a stage if it is one of V.
#[inline(always)]
fn place_of_value<const WORDS: u32>(token: u32, word: u32) -> u32 {
    (TILE + token) * WORDS + (word ^ (token & 6))
}

/// Starts copying tile `tile` to a warp's stage, `[2, 16, WORDS]`. Tokens that are none become zeroes: what lies there may be no number.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn copy<const WORDS: u32>(
    context: &Context,
    pool: Global<U32x4>,
    page_words: u32,
    tile: u32,
    pages: Pages,
    stage: Shared<U32x4>,
) {
    let lane = warp::lane_id();
    let pool = pool.rows(page_words as usize);
    // Where the tokens of a run begin in its page.
    let in_page = |half: u32| ((2 * tile + half) & ((1 << context.log_runs) - 1)) * RUN;
    let mut half = 0;
    while half < 2 {
        let page = pool.row(pages[half as usize] as usize);
        let mut step = 0;
        while step < lane_words(WORDS) / 2 {
            let at = step * WARP + lane;
            let (token, word) = (half * RUN + at / WORDS, at % WORDS);
            let valid = tile * TILE + token < context.tokens;
            let from = in_page(half) * WORDS + at;
            let copy =
                |to: u32, from: u32| copy_async_or_zero(stage, to as usize, page, from as usize, valid);
            copy(place_of_key::<WORDS>(token, word), from);
            // V begins in the middle of a page.
            copy(place_of_value::<WORDS>(token, word), page_words / 2 + from);
            step += 1;
        }
        half += 1;
    }
}

/// Logits of a tile: of tokens `g` and `g + 8`, each heads `2 t` and `2 t + 1`.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn logits<const WORDS: u32>(stage: Shared<U32x4>, queries: &[U32x4; 4]) -> [f32; 4] {
    let (group, pair) = (warp::lane_id() / 4, warp::lane_id() % 4);
    let mut sums = [0.0; 4];
    let mut step = 0;
    while step < WORDS / 4 {
        let low = stage.load(place_of_key::<WORDS>(group, pair + 4 * step) as usize);
        let high = stage.load(place_of_key::<WORDS>(group + RUN, pair + 4 * step) as usize);
        let query = queries[step as usize];
        sums = mma_m16n8k16_bf16([low.x, high.x, low.y, high.y], [query.x, query.y], sums);
        sums = mma_m16n8k16_bf16([low.z, high.z, low.w, high.w], [query.z, query.w], sums);
        step += 1;
    }
    sums
}

/// Adds the values of a tile, weighted: `weights` as the right side of the product.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn add_values<const WORDS: u32>(
    stage: Shared<U32x4>,
    weights: [u32; 2],
    outputs: &mut [[f32; 4]; 8],
) {
    let lane = warp::lane_id();
    let of = |half: u32, odd: u32, step: u32| {
        let token = half * RUN + lane % 4 * 2 + odd;
        stage.load(place_of_value::<WORDS>(token, lane / 4 + 8 * step) as usize).to_array()
    };
    // Of the rows of a product the lower eight are of one half of a lane's elements, the upper eight of the other.
    let second = WORDS / 8 - 1;
    let low = [of(0, 0, 0), of(0, 1, 0), of(1, 0, 0), of(1, 1, 0)];
    let high = [of(0, 0, second), of(0, 1, second), of(1, 0, second), of(1, 1, second)];
    let mut word = 0;
    while word < WORDS as usize / 4 {
        let upper = if second == 0 { word + 2 } else { word };
        let mut odd = 0;
        while odd < 2 {
            let fragment = [
                pair(low[0][word], low[1][word], odd),
                pair(high[0][upper], high[1][upper], odd),
                pair(low[2][word], low[3][word], odd),
                pair(high[2][upper], high[3][upper], odd),
            ];
            let output = &mut outputs[2 * word + odd];
            *output = mma_m16n8k16_bf16(fragment, weights, *output);
            odd += 1;
        }
        word += 1;
    }
}

/// The lower (or, if `odd`, the upper) halves of two words, that of `first` below.
#[inline(always)]
fn pair(first: u32, second: u32, odd: usize) -> u32 {
    if odd == 0 { first & 0xffff | second << 16 } else { first >> 16 | second & 0xffff_0000 }
}

/// The element of a head that output `part` of product `product` is, for a lane with `group`; parts 2 and 3 are of the upper rows.
#[inline(always)]
pub fn element<const WORDS: u32>(group: u32, product: u32, upper: bool) -> u32 {
    let distance = if WORDS == 8 { 4 } else { 64 };
    8 * group + product + if upper { distance } else { 0 }
}
