//! Attention of prompts: dense, causal, of a ragged batch.

mod rows;
mod tile;
#[cfg(any(not(target_arch = "nvptx64"), sm_90a))]
mod wgmma;
mod work;

use core::f32::consts::LOG2_E;

use cuda_std::copy::{commit_group, wait_group};
use cuda_std::prelude::*;
use cuda_std::shared;
use cuda_std::warp::{FULL_MASK, warp_vote_any};

use crate::abi::prefill::{KEY_TILE, QUERY_TILE, STAGES, WARP_ROWS, shared_bytes};
use crate::abi::{WARP, WORD_BYTES};
use crate::unroll::unrolled;
use rows::Rows;
use tile::{Source, Tile};
#[cfg(any(not(target_arch = "nvptx64"), sm_90a))]
pub use wgmma::{prefill_wgmma_64, prefill_wgmma_128};
use work::{Batch, Work};

/// Causal attention of a ragged batch of prompts, or of chunks of prompts with the past before them; heads of 128.
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `queries` | `[query tokens, kv_heads * group, head_words]` words | bf16, of all requests, end to end |
/// | `keys`, `values` | `[key tokens, kv_heads, head_words]` words | bf16, of all requests, end to end: a request's past, then its chunk |
/// | `first_query` | `[requests + 1]`, ascending, from 0 | query tokens of the requests before |
/// | `first_key` | `[requests + 1]`, ascending, from 0 | key tokens of the requests before; a request has at least as many as queries, which are its last tokens |
/// | `first_tile` | `[requests + 1]`, ascending, from 0 | query tiles of the requests before: of each, [`query_tiles`](crate::abi::prefill::query_tiles) |
/// | `requests` | at least 1 | |
/// | `kv_heads`, `group` | at least 1; 1 to 16 | KV heads, and query heads of each |
/// | `scale` | above 0 | factor of the logits: 1 / sqrt(head dim) |
/// | `outputs` | as `queries` | bf16 |
/// | `lse` | `[query tokens, kv_heads * group]` | the natural logarithm of the sum of e^logit |
///
/// Query `i` of `n`, in a request of `m` keys, sees keys `0 ..= m - n + i`. Products are exact, sums in f32; the weights of V are
/// rounded to bf16.
///
/// # Mapping
/// A block has a query tile of one request and one query head: `work.rs` says which. A warp has 32 of its rows, so that a fragment of
/// keys or values that comes out of shared memory is in four products. Its outputs and the logits of a tile of keys fill its registers;
/// queries stay in shared memory. Keys and values of a tile take turns in a ring of [`STAGES`] places that the block's threads fill with
/// asynchronous copies of whole rows. The softmax is that of FlashAttention-2; what is subtracted from the logits lags behind their
/// greatest as far as precision allows, so that outputs are hardly ever rescaled. Only tiles that reach beyond a warp's first query are
/// masked, and a warp passes over the softmax and the values of keys that none of its queries sees.
///
/// # What bounds it
/// On an H200: the tensor cores' `mma.sync`, 59 % busy. 255 registers, 80 KiB of shared memory (heads of 128): two blocks a
/// multiprocessor. 375 TFLOP/s over a prompt of 8K, 393 over 32K.
///
/// # Launch
/// `first_tile[requests] * kv_heads * group` blocks of [`BLOCK`](crate::abi::prefill::BLOCK) threads,
/// [`shared_bytes`] of shared memory. Blocks beyond have nothing to do.
///
/// # Safety
/// The views have the shapes above; a view of words has at most 2^32 - 1 of them; queries, keys and values are numbers.
#[kernel(collectives(barrier = 2, mma = 336, shuffle = 80, vote = 1))]
pub unsafe fn prefill_128(
    queries: Global<U32x4>,
    keys: Global<U32x4>,
    values: Global<U32x4>,
    first_query: Global<u32>,
    first_key: Global<u32>,
    first_tile: Global<u32>,
    requests: u32,
    kv_heads: u32,
    group: u32,
    scale: f32,
    outputs: GlobalMut<U32x4>,
    lse: GlobalMut<f32>,
) {
    let batch = Batch { first_query, first_key, first_tile, requests };
    prefill::<16>([queries, keys, values], batch, [kv_heads, group], scale, outputs, lse);
}

/// [`prefill_128`] for heads of 64.
///
/// # Safety
/// As there.
#[kernel(collectives(barrier = 2, mma = 168, shuffle = 48, vote = 1))]
pub unsafe fn prefill_64(
    queries: Global<U32x4>,
    keys: Global<U32x4>,
    values: Global<U32x4>,
    first_query: Global<u32>,
    first_key: Global<u32>,
    first_tile: Global<u32>,
    requests: u32,
    kv_heads: u32,
    group: u32,
    scale: f32,
    outputs: GlobalMut<U32x4>,
    lse: GlobalMut<f32>,
) {
    let batch = Batch { first_query, first_key, first_tile, requests };
    prefill::<8>([queries, keys, values], batch, [kv_heads, group], scale, outputs, lse);
}

#[inline(always)]
unsafe fn prefill<const WORDS: usize>(
    [queries, keys, values]: [Global<U32x4>; 3],
    batch: Batch,
    [kv_heads, group]: [u32; 2],
    scale: f32,
    outputs: GlobalMut<U32x4>,
    lse: GlobalMut<f32>,
) {
    let Some(work) = Work::of_block(batch, kv_heads, group) else { return };
    let heads = kv_heads * group;
    let queries = Source::new::<WORDS>(queries, work.first_query, work.queries, work.head, heads);
    let [keys, values] = [keys, values]
        .map(|tensor| Source::new::<WORDS>(tensor, work.first_key, work.keys(), work.kv_head, kv_heads));
    let shared = shared::dynamic(0, shared_bytes(WORDS as u32) as usize / WORD_BYTES);
    let tile_at = |row: u32| Tile::<WORDS> { shared, first: row * WORDS as u32 };
    let query_tile = tile_at(0);
    let stage_at = |stage: u32| tile_at(QUERY_TILE + stage * KEY_TILE);

    // Keys of tile 0, its values, keys of tile 1, …: what is asked for goes to `into`, what is read next lies in `stage`.
    let tiles = work.keys().div_ceil(KEY_TILE);
    let mut into = 0;
    let mut ask = |piece: u32| {
        if piece < 2 * tiles {
            let source = if piece.is_multiple_of(2) { &keys } else { &values };
            source.copy::<WORDS, KEY_TILE>(piece / 2 * KEY_TILE, stage_at(into));
        }
        commit_group();
        into = if into + 1 == STAGES { 0 } else { into + 1 };
    };
    queries.copy::<WORDS, QUERY_TILE>(0, query_tile);
    let mut piece = 0;
    while piece < STAGES - 1 {
        ask(piece);
        piece += 1;
    }
    let mut stage = 0;
    let mut next = |piece: u32| {
        wait_group::<{ STAGES - 2 }>();
        // All threads' copies are here then, and nobody reads the stage that is filled next any more.
        thread::sync_threads();
        ask(piece + STAGES - 1);
        let tile = stage_at(stage);
        stage = if stage + 1 == STAGES { 0 } else { stage + 1 };
        tile
    };

    let first_row = thread::thread_idx_x() / WARP * WARP_ROWS;
    let scale = scale * LOG2_E;
    let mut rows = [Rows::NEW; 2];
    let mut products = [[[0.0_f32; 4]; WORDS]; 2];
    let mut tile = 0;
    while tile < tiles {
        let first_key = tile * KEY_TILE;
        let in_sight = first_key < work.seen_by(first_row + WARP_ROWS - 1);
        let key_tile = next(2 * tile);
        let mut logits = tile::logits::<WORDS>(query_tile, first_row, key_tile);
        let value_tile = next(2 * tile + 1);
        if in_sight {
            if first_key + KEY_TILE > work.seen_by(first_row) {
                let seen = work.seen_by(first_row + warp::lane_id() / 4) as i32 - first_key as i32;
                Rows::mask(&mut logits[0], seen);
                Rows::mask(&mut logits[1], seen + 16);
            }
            let greatest = [Rows::greatest(&logits[0]), Rows::greatest(&logits[1])];
            let outgrown = rows[0].outgrown(greatest[0], scale) || rows[1].outgrown(greatest[1], scale);
            if warp_vote_any(FULL_MASK, outgrown) {
                unrolled!(half < 2, {
                    let factors = rows[half].raise(greatest[half], scale);
                    unrolled!(eight < WORDS, {
                        let [a, b, c, d] = products[half][eight];
                        products[half][eight] =
                            [a * factors[0], b * factors[0], c * factors[1], d * factors[1]];
                    });
                });
            }
            rows[0].weigh(&mut logits[0], scale);
            rows[1].weigh(&mut logits[1], scale);
            tile::add_values::<WORDS>(value_tile, &logits, &mut products);
        }
        tile += 1;
    }

    unrolled!(half < 2, {
        let row = first_row + 16 * half as u32;
        if row < work.queries {
            let first = (work.first_query + row) * heads + work.head;
            let left = work.queries - row;
            let last = (left.min(16) - 1) * heads;
            let outputs = outputs.slice(first as usize * WORDS, last as usize * WORDS + WORDS);
            let lse = lse.slice(first as usize, last as usize + 1);
            rows[half].finish(&products[half], left, outputs, lse, heads);
        }
    });
}
