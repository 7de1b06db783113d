use cuda_std::copy::{commit_group, copy_async_or_zero, wait_group};
use cuda_std::mma::{load_transposed_8x8x4, mma_m16n8k16_bf16};
use cuda_std::prelude::*;
use cuda_std::shared;

use crate::abi::WARP;
use crate::abi::low_rank::gram::{BLOCK, RUN, STAGES, STEP, SUM_BLOCK, TILE, TILE_SUMS, TILE_WORDS, tiles};
use crate::model::elements::quad_of;
use crate::unroll::unrolled;

/// The Gram matrix of keys, `K^T K`, in shares: sums over a share's tokens of the tiles of the lower triangle.
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `keys` | `[tokens, width_words]` words | bf16, of all heads |
/// | `tokens` | | |
/// | `width_words` | at least 1 | KV heads * head dim / 8 |
/// | `shares` | 1 to [`MAX_SHARES`](crate::abi::low_rank::gram::MAX_SHARES) | parts of the tokens, each of as many steps |
/// | `sums` | `[shares, tiles, 128, 128]` f32, in words | written; [`gram_sum`] adds them up |
///
/// Products are exact. Sums of [`RUN`] steps are the tensor cores', which cut off what f32 has no room for; those of runs are added with
/// rounding, so that long prompts lose no more than short ones.
///
/// # Mapping
/// A block has a tile of 128 x 128 elements and a share of the tokens, a warp 64 x 64 of them. [`STEP`] tokens of the two runs of channels
/// pass through a ring in shared memory; word `w` of a token lies where `w ^ (token % 8)` would, and matrices are read from it transposed:
/// neither has conflicts. Tokens and channels beyond the last are zero.
///
/// # Launch
/// [`tiles`] * `shares` blocks of [`BLOCK`] threads,
/// [`SHARED_BYTES`](crate::abi::low_rank::gram::SHARED_BYTES) of shared memory.
///
/// # Safety
/// The views have the shapes above, of fewer than 2^32 words.
#[kernel(collectives(barrier = 1, mma = 160))]
pub unsafe fn gram(keys: Global<U32x4>, tokens: u32, width_words: u32, shares: u32, sums: GlobalMut<u64>) {
    let tiles = tiles(8 * width_words);
    let (share, tile) = (thread::block_idx_x() / tiles, thread::block_idx_x() % tiles);
    let (tile_row, tile_column) = tile_at(tile);
    let steps = tokens.div_ceil(STEP).div_ceil(shares);
    let first = share * steps;
    let end = (first + steps).min(tokens.div_ceil(STEP)).max(first);

    let of_stage = STEP * 2 * TILE_WORDS;
    let ring = shared::dynamic::<U32x4>(0, (STAGES * of_stage) as usize);
    let (own, word) = (thread::thread_idx_x() / TILE_WORDS, thread::thread_idx_x() % TILE_WORDS);
    let ask = |step: u32, stage: u32| {
        if step < end {
            let mut side = 0;
            while side < 2 {
                let from = if side == 0 { tile_row } else { tile_column } * TILE_WORDS + word;
                let to = stage * of_stage + side * STEP * TILE_WORDS;
                let mut row = own;
                while row < STEP {
                    let token = step * STEP + row;
                    let valid = token < tokens && from < width_words;
                    let at = token as usize * width_words as usize + from as usize;
                    copy_async_or_zero(ring, (to + place(row, word)) as usize, keys, at, valid);
                    row += BLOCK / TILE_WORDS;
                }
                side += 1;
            }
        }
        commit_group();
    };
    let mut ahead = 0;
    while ahead < STAGES - 1 {
        ask(first + ahead, ahead);
        ahead += 1;
    }

    let (warp, lane) = (thread::thread_idx_x() / WARP, warp::lane_id());
    let (warp_row, warp_column) = (8 * (warp / 2), 8 * (warp % 2));
    // Lane `8 m + r` names row r of matrix m. Of rows a product's parts are channels, then tokens; of columns the other way round.
    let (matrix, row) = (lane / 8, lane % 8);
    let own_rows = place(matrix / 2 * 8 + row, warp_row + matrix % 2);
    let own_columns = place(matrix % 2 * 8 + row, warp_column + matrix / 2) + STEP * TILE_WORDS;

    let sums = sums.slice((share * tiles + tile) as usize * 2 * TILE_SUMS as usize, 2 * TILE_SUMS as usize);
    // The lane's first pair. In 64 bits, so that the others are at distances that need no registers of their own.
    let own_sums = (((8 * warp_row + lane / 4) * TILE + 8 * warp_column) / 2 + lane % 4) as usize;
    let (mut stage, mut into) = (0, STAGES - 1);
    let mut step = first;
    loop {
        // A run.
        let until = (step + RUN).min(end);
        let mut products = [[[0.0_f32; 4]; 8]; 4];
        let starts = step == first;
        while step < until {
            wait_group::<{ STAGES - 2 }>();
            // All threads' copies are here then, and nobody reads the stage that is filled next any more.
            thread::sync_threads();
            ask(step + STAGES - 1, into);
            let ring = ring.slice((stage * of_stage) as usize, of_stage as usize);
            unrolled!(sixteen < (STEP / 16) as usize, {
                let token = sixteen * 16 * TILE_WORDS as usize;
                let mut rows = [[0; 4]; 4];
                unrolled!(part < 4, {
                    rows[part] = load_transposed_8x8x4(ring, token + (own_rows as usize ^ (2 * part)));
                });
                unrolled!(part < 4, {
                    let [a, b, c, d] =
                        load_transposed_8x8x4(ring, token + (own_columns as usize ^ (2 * part)));
                    let mut row = 0;
                    while row < 4 {
                        let of = &mut products[row];
                        of[2 * part] = mma_m16n8k16_bf16(rows[row], [a, b], of[2 * part]);
                        of[2 * part + 1] = mma_m16n8k16_bf16(rows[row], [c, d], of[2 * part + 1]);
                        row += 1;
                    }
                });
            });
            stage = if stage + 1 == STAGES { 0 } else { stage + 1 };
            into = if into + 1 == STAGES { 0 } else { into + 1 };
            step += 1;
        }
        unrolled!(sixteen < 4, {
            unrolled!(eight < 8, {
                let [a, b, c, d] = products[sixteen][eight];
                let at = own_sums + (16 * sixteen * TILE as usize + 8 * eight) / 2;
                add(sums, at, [a, b], starts);
                add(sums, at + 8 * TILE as usize / 2, [c, d], starts);
            });
        });
        if step >= end {
            break;
        }
    }
}

/// The Gram matrix out of its shares, whole.
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `sums` | `[shares, tiles, 128, 128]` f32, in words | as [`gram()`] left them |
/// | `width` | a multiple of 4 | KV heads * head dim |
/// | `shares` | at least 1 | |
/// | `gram` | `[width, width]` | written: symmetric, bit for bit |
///
/// Shares are added in their order.
///
/// # Launch
/// [`tiles`] * [`TILE_SUMS`] / [`SUM_BLOCK`] blocks of [`SUM_BLOCK`] threads, each of which has a word of a tile; no shared memory.
///
/// # Safety
/// The views have the shapes above.
#[kernel]
pub unsafe fn gram_sum(sums: Global<U32x4>, width: u32, shares: u32, gram: GlobalMut<f32>) {
    let words = tiles(width) * TILE_SUMS;
    let word = thread::block_idx_x() * SUM_BLOCK + thread::thread_idx_x();
    let (tile_row, tile_column) = tile_at(word / TILE_SUMS);
    let row = tile_row * TILE + word % TILE_SUMS / (TILE / 4);
    let column = tile_column * TILE + word % (TILE / 4) * 4;
    // Of the diagonal's tiles the lower triangle is taken for both.
    if row >= width || column > row {
        return;
    }
    let mut all = [0.0; 4];
    let mut share = 0;
    while share < shares {
        let part = quad_of(sums.load_with((share * words + word) as usize, LoadCache::ReadOnlyOnce));
        let mut at = 0;
        while at < 4 {
            all[at] += part[at];
            at += 1;
        }
        share += 1;
    }
    unrolled!(at < 4, {
        let column = column + at as u32;
        if column <= row {
            gram.store((row * width + column) as usize, all[at]);
            gram.store((column * width + row) as usize, all[at]);
        }
    });
}

/// Row and column of tile `tile` of the lower triangle.
#[inline(always)]
fn tile_at(tile: u32) -> (u32, u32) {
    let (mut row, mut column) = (0, tile);
    while column > row {
        row += 1;
        column -= row;
    }
    (row, column)
}

/// Where word `word` of row `row` of a stage lies.
#[inline(always)]
fn place(row: u32, word: u32) -> u32 {
    row * TILE_WORDS + (word ^ (row % 8))
}

/// Stores pair `at` of a tile's sums, or adds to what is there.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
unsafe fn add(sums: GlobalMut<u64>, at: usize, pair: [f32; 2], starts: bool) {
    let [mut low, mut high] = pair;
    if !starts {
        let before = sums.load(at);
        low += f32::from_bits(before as u32);
        high += f32::from_bits((before >> 32) as u32);
    }
    sums.store(at, u64::from(low.to_bits()) | u64::from(high.to_bits()) << 32);
}
