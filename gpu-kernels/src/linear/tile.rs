//! The tiles of tokens and weights that a block multiplies.
//!
//! Of a tile a stage has a line of 128 bytes of each row. Word `w` of row `r` lies where word `w ^ (r % 8)` would, so that neither the
//! words of a row nor those of eight rows share banks: as products of a warpgroup want it, and as well for those of a warp.

use cuda_std::copy::copy_async_or_zero;
use cuda_std::prelude::*;
use cuda_std::wgmma::Matrix;

use crate::abi::gemm::{CHUNK_WORDS, PANEL, TOKENS};

/// The first token and the first row of weights of this block, of `ROWS` each.
///
/// Panels of [`PANEL`] tiles of tokens follow each other, in each rows of weights, for each of those the tiles of tokens: blocks that run at
/// a time share few tokens and few weights, which the L2 has room for.
#[inline(always)]
pub fn of_block<const ROWS: u32>(tokens: u32, n: u32) -> (u32, u32) {
    let (token_tiles, row_tiles) = (tokens.div_ceil(TOKENS), n.div_ceil(ROWS));
    let of_panel = PANEL * row_tiles;
    let (panel, block) = (thread::block_idx_x() / of_panel, thread::block_idx_x() % of_panel);
    let width = (token_tiles - panel * PANEL).min(PANEL);
    ((panel * PANEL + block % width) * TOKENS, block / width * ROWS)
}

/// Starts copying chunk `chunk` of `ROWS` rows to the ring, from word `to` on. Row `row` of the tile is row `source(row)` of `words`; what
/// lies beyond `k_words` words of a row is zero.
///
/// # Safety
/// All `THREADS` threads of the block are here; the ring is as large, and `words` has the rows.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn copy<const THREADS: u32, const ROWS: u32>(
    ring: Shared<U32x4>,
    to: u32,
    words: Global<U32x4>,
    k_words: u32,
    chunk: u32,
    source: impl Fn(u32) -> u32,
) {
    let (own, word) = (thread::thread_idx_x() / CHUNK_WORDS, thread::thread_idx_x() % CHUNK_WORDS);
    let from = chunk * CHUNK_WORDS + word;
    let to = to as usize + Matrix::place(own as usize, word as usize);
    let mut row = 0;
    while row < ROWS {
        let at = source(own + row) * k_words + from;
        copy_async_or_zero(ring, to + (row * CHUNK_WORDS) as usize, words, at as usize, from < k_words);
        row += THREADS / CHUNK_WORDS;
    }
}
