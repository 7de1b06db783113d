//! Tiles of queries, keys and values in shared memory, and their products.
//!
//! A tile is rows of tokens, each a head's words. Of row `r` word `w` lies where word `w ^ (r % 8)` would: eight rows are read from all
//! banks at once, and rows are written whole.

use cuda_std::copy::copy_async;
use cuda_std::mma::{load_8x8x4, load_transposed_8x8x4, mma_m16n8k16_bf16};
use cuda_std::prelude::*;

use super::rows::{self, left_side};
use crate::abi::prefill::{BLOCK, KEY_TILE};
use crate::unroll::unrolled;

/// Eights of keys in a tile.
pub const KEY_EIGHTS: usize = (KEY_TILE / 8) as usize;

type Logits = rows::Logits<KEY_EIGHTS>;

/// Sixteens of keys in a tile.
const KEY_SIXTEENS: usize = KEY_EIGHTS / 2;

/// Where a tile lies.
#[derive(Clone, Copy)]
pub struct Tile<const WORDS: usize> {
    /// All of the block's shared memory. With a view of the tile alone, places of fragments would be the same in every turn, and
    /// keeping them would cost the registers that this kernel has least of.
    pub shared: Shared<U32x4>,
    /// Its first word: a multiple of a row's.
    pub first: u32,
}

impl<const WORDS: usize> Tile<WORDS> {
    /// Where word `word` of row `row` lies. Word `word ^ w` of the row lies at this place `^ w`, and `word` of the row eight further on
    /// `8 * WORDS` further.
    #[inline(always)]
    fn place(self, row: u32, word: u32) -> usize {
        (self.first + row * WORDS as u32 + (word ^ (row % 8))) as usize
    }
}

/// A head's rows in a tensor of all heads.
#[derive(Clone, Copy)]
pub struct Source {
    /// From the head's word 0 of the first row on.
    pub words: Global<U32x4>,
    /// From a row to the next.
    pub stride: u32,
    /// How many there are.
    pub rows: u32,
}

impl Source {
    /// Head `head` of `heads`, of `rows` rows from `first` on.
    ///
    /// # Safety
    /// `tensor` has them.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    pub unsafe fn new<const WORDS: usize>(
        tensor: Global<U32x4>,
        first: u32,
        rows: u32,
        head: u32,
        heads: u32,
    ) -> Self {
        let stride = heads * WORDS as u32;
        let start = first * stride + head * WORDS as u32;
        let len = (rows - 1) * stride + WORDS as u32;
        Self { words: tensor.slice(start as usize, len as usize), stride, rows }
    }

    /// Starts copying `ROWS` rows from row `first` on to a tile. For rows that there are not the last comes: keys that nobody sees and
    /// their values are numbers then, and what becomes of queries that there are not is not written.
    ///
    /// # Safety
    /// All threads of the block are here; the tile is as large.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    pub unsafe fn copy<const WORDS: usize, const ROWS: u32>(&self, first: u32, tile: Tile<WORDS>) {
        let (own, word) = (thread::thread_idx_x() / WORDS as u32, thread::thread_idx_x() % WORDS as u32);
        let to = tile.place(own, word);
        let mut row = 0;
        while row < ROWS {
            let from = (first + own + row).min(self.rows - 1) * self.stride + word;
            copy_async(tile.shared, to + row as usize * WORDS, self.words, from as usize);
            row += BLOCK / WORDS as u32;
        }
    }
}

/// Thirty-two queries of 16 elements, words `2 * step` and the next, as the left sides of two products.
///
/// # Safety
/// All lanes of the warp are here; the tile has the rows from `first` on.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn queries<const WORDS: usize>(tile: Tile<WORDS>, first: u32, step: usize) -> [[u32; 4]; 2] {
    let lane = warp::lane_id();
    let at = tile.place(first + lane % 16, lane / 16) ^ (2 * step);
    [load_8x8x4(tile.shared, at), load_8x8x4(tile.shared, at + 16 * WORDS)]
}

/// Logits of thirty-two queries, from row `first` of theirs on, and a tile of keys; without their scale.
///
/// # Safety
/// All lanes of the warp are here; the tiles are.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn logits<const WORDS: usize>(
    query_tile: Tile<WORDS>,
    first: u32,
    keys: Tile<WORDS>,
) -> [Logits; 2] {
    let lane = warp::lane_id();
    let first_key = keys.place(lane / 16 * 8 + lane % 8, lane / 8 % 2);
    let mut logits = [[[0.0; 4]; KEY_EIGHTS]; 2];
    unrolled!(step < WORDS / 2, {
        let query = queries::<WORDS>(query_tile, first, step);
        unrolled!(sixteen < KEY_SIXTEENS, {
            let [a, b, c, d] = load_8x8x4(keys.shared, (first_key ^ (2 * step)) + 16 * sixteen * WORDS);
            let mut half = 0;
            while half < 2 {
                let of_half = &mut logits[half];
                of_half[2 * sixteen] = mma_m16n8k16_bf16(query[half], [a, b], of_half[2 * sixteen]);
                of_half[2 * sixteen + 1] = mma_m16n8k16_bf16(query[half], [c, d], of_half[2 * sixteen + 1]);
                half += 1;
            }
        });
    });
    logits
}

/// Adds the values of a tile, weighted, to the outputs of thirty-two queries.
///
/// # Safety
/// All lanes of the warp are here; the tile is.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn add_values<const WORDS: usize>(
    values: Tile<WORDS>,
    weights: &[Logits; 2],
    outputs: &mut [[[f32; 4]; WORDS]; 2],
) {
    let lane = warp::lane_id();
    let first_value = values.place(lane % 16, lane / 16);
    unrolled!(sixteen < KEY_SIXTEENS, {
        let weights = [left_side(&weights[0], sixteen), left_side(&weights[1], sixteen)];
        unrolled!(pair < WORDS / 2, {
            let at = (first_value ^ (2 * pair)) + 16 * sixteen * WORDS;
            let [a, b, c, d] = load_transposed_8x8x4(values.shared, at);
            let mut half = 0;
            while half < 2 {
                let of_half = &mut outputs[half];
                of_half[2 * pair] = mma_m16n8k16_bf16(weights[half], [a, b], of_half[2 * pair]);
                of_half[2 * pair + 1] = mma_m16n8k16_bf16(weights[half], [c, d], of_half[2 * pair + 1]);
                half += 1;
            }
        });
    });
}
