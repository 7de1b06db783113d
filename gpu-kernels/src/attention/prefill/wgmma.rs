use core::f32::consts::LOG2_E;

use cuda_std::copy::{commit_group, copy_async, wait_group};
use cuda_std::prelude::*;
use cuda_std::warp::{FULL_MASK, WARP_SIZE, warp_shuffle_idx, warp_vote_any};
use cuda_std::wgmma::{self, Matrix, Sums};
use cuda_std::{bulk, shared};

use super::rows::{Logits, Rows, left_side};
use super::tile::Source;
use super::work::{Batch, Work};
use crate::abi::WARP;
use crate::abi::prefill::QUERY_TILE;
use crate::abi::prefill_wgmma::{BLOCK, KEY_TILE, STAGES};
use crate::unroll::unrolled;

/// Eights and sixteens of keys in a tile.
const KEY_EIGHTS: usize = (KEY_TILE / 8) as usize;
const KEY_SIXTEENS: usize = KEY_EIGHTS / 2;

/// Query rows of a warpgroup.
const GROUP_ROWS: u32 = 64;

/// [`prefill_128`](super::prefill_128) on the tensor cores of a warpgroup.
///
/// # Mapping
/// A block has a query tile of one request and one query head, as there; a warpgroup has 64 of its rows. Queries, keys and values lie in
/// shared memory as the products want them. While the logits of a tile of keys are multiplied, so are the values of the tile before; the
/// softmax of the former runs beside the latter, and beside the other warpgroup's products. One piece of the prompt, the next keys and the
/// values before them, is on its way at a time.
///
/// # What bounds it
/// On an H200: latency. 218 registers, 160 KiB of shared memory (heads of 128): one block a multiprocessor, so that two warpgroups have
/// to fill it; they wait for each other at each tile, and ptxas moves most of the exponentials behind the wait for the values'
/// products. 457 TFLOP/s over a prompt of 8K, 484 over 32K; tensor cores and shared memory are half busy.
///
/// # Launch
/// As there, but blocks of [`BLOCK`] threads with [`shared_bytes`](crate::abi::prefill_wgmma::shared_bytes) of shared memory. sm_90a.
///
/// # Safety
/// As there.
#[kernel(sm_90a, collectives(barrier = 3, shuffle = 45, vote = 2, wgmma = 43))]
pub unsafe fn prefill_wgmma_128(
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
    prefill::<16, 64>([queries, keys, values], batch, [kv_heads, group], scale, outputs, lse);
}

/// [`prefill_wgmma_128`] for heads of 64.
///
/// # Safety
/// As there.
#[kernel(sm_90a, collectives(barrier = 3, shuffle = 29, vote = 2, wgmma = 35))]
pub unsafe fn prefill_wgmma_64(
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
    prefill::<8, 32>([queries, keys, values], batch, [kv_heads, group], scale, outputs, lse);
}

/// `SUMS` is a thread's share of the outputs of 64 rows: `4 * WORDS`.
#[inline(always)]
unsafe fn prefill<const WORDS: usize, const SUMS: usize>(
    [queries, keys, values]: [Global<U32x4>; 3],
    batch: Batch,
    [kv_heads, group]: [u32; 2],
    scale: f32,
    outputs: GlobalMut<U32x4>,
    lse: GlobalMut<f32>,
) where
    [f32; SUMS]: Sums,
{
    let Some(work) = Work::of_block(batch, kv_heads, group) else { return };
    let heads = kv_heads * group;
    let queries = Source::new::<WORDS>(queries, work.first_query, work.queries, work.head, heads);
    let [keys, values] = [keys, values]
        .map(|tensor| Source::new::<WORDS>(tensor, work.first_key, work.keys(), work.kv_head, kv_heads));
    let tile_at =
        |row: u32, rows: u32| shared::dynamic::<U32x4>(16 * WORDS * row as usize, WORDS * rows as usize);
    let query_tile = tile_at(0, QUERY_TILE);
    let key_tile = |tile: u32| tile_at(QUERY_TILE + tile % STAGES * KEY_TILE, KEY_TILE);
    let value_tile = |tile: u32| tile_at(QUERY_TILE + (STAGES + tile % STAGES) * KEY_TILE, KEY_TILE);
    let matrix = |tile: Shared<U32x4>| Matrix::new(tile, 8 * KEY_TILE as usize);

    // A piece is the keys of a tile and the values of the one before.
    let tiles = work.keys().div_ceil(KEY_TILE);
    let ask = |piece: u32| {
        if piece < tiles {
            copy::<WORDS, KEY_TILE>(&keys, piece * KEY_TILE, key_tile(piece));
        }
        if piece > 0 && piece <= tiles {
            copy::<WORDS, KEY_TILE>(&values, (piece - 1) * KEY_TILE, value_tile(piece - 1));
        }
        commit_group();
    };
    copy::<WORDS, QUERY_TILE>(&queries, 0, query_tile);
    ask(0);

    let first_row = thread::thread_idx_x() / WARP * 16;
    // A shuffle, so that it is known to be the same in all lanes of a warp.
    let warpgroup = warp_shuffle_idx(FULL_MASK, first_row / GROUP_ROWS, 0, WARP_SIZE);
    let own_queries =
        Matrix::new(query_tile, 8 * QUERY_TILE as usize).from_row((GROUP_ROWS * warpgroup) as usize);
    let scale = scale * LOG2_E;
    let mut rows = Rows::NEW;
    let mut logits = [0.0_f32; 4 * KEY_EIGHTS];
    let mut weights = [[0_u32; 4]; KEY_SIXTEENS];
    let mut products = [0.0_f32; SUMS];

    // All threads' copies of a piece are here then, and nobody multiplies what the next one is copied over.
    let arrive = || {
        wait_group::<0>();
        bulk::fence();
        thread::sync_threads();
    };
    let softmax = |rows: &mut Rows, logits: &mut Logits<KEY_EIGHTS>, tile: u32| {
        let first_key = tile * KEY_TILE;
        if first_key + KEY_TILE > work.seen_by(first_row) {
            let seen = work.seen_by(first_row + warp::lane_id() / 4) as i32 - first_key as i32;
            Rows::mask(logits, seen);
        }
        let greatest = Rows::greatest(logits);
        let outgrown = warp_vote_any(FULL_MASK, rows.outgrown(greatest, scale));
        let factors = if outgrown { Some(rows.raise(greatest, scale)) } else { None };
        rows.weigh(logits, scale);
        factors
    };

    arrive();
    wgmma::fence(&mut logits);
    multiply_keys::<WORDS>(&mut logits, own_queries, matrix(key_tile(0)));
    wgmma::commit_group();
    ask(1);
    wgmma::wait_group::<0>(&mut logits);
    softmax(&mut rows, fours(&mut logits), 0);
    pack(fours(&mut logits), &mut weights);
    let mut tile = 1;
    while tile < tiles {
        arrive();
        wgmma::fence((&mut logits, (&mut products, &mut weights)));
        multiply_keys::<WORDS>(&mut logits, own_queries, matrix(key_tile(tile)));
        wgmma::commit_group();
        add_values(&mut products, &weights, matrix(value_tile(tile - 1)));
        wgmma::commit_group();
        ask(tile + 1);
        wgmma::wait_group::<1>(&mut logits);
        let factors = softmax(&mut rows, fours(&mut logits), tile);
        wgmma::hold(&mut logits);
        wgmma::wait_group::<0>((&mut products, &mut weights));
        if let Some(factors) = factors {
            let products = fours::<WORDS>(&mut products);
            unrolled!(eight < WORDS, {
                let [a, b, c, d] = products[eight];
                products[eight] = [a * factors[0], b * factors[0], c * factors[1], d * factors[1]];
            });
        }
        pack(fours(&mut logits), &mut weights);
        tile += 1;
    }
    arrive();
    wgmma::fence((&mut products, &mut weights));
    add_values(&mut products, &weights, matrix(value_tile(tiles - 1)));
    wgmma::commit_group();
    wgmma::wait_group::<0>((&mut products, &mut weights));

    if first_row < work.queries {
        let first = (work.first_query + first_row) * heads + work.head;
        let left = work.queries - first_row;
        let last = (left.min(16) - 1) * heads;
        let outputs = outputs.slice(first as usize * WORDS, last as usize * WORDS + WORDS);
        let lse = lse.slice(first as usize, last as usize + 1);
        rows.finish(fours::<WORDS>(&mut products), left, outputs, lse, heads);
    }
}

/// Starts copying `ROWS` rows from row `first` on to a tile that products read. For rows that there are not the last comes, as in
/// [`Source::copy`].
///
/// # Safety
/// All threads of the block are here; the tile is as large.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
unsafe fn copy<const WORDS: usize, const ROWS: u32>(source: &Source, first: u32, tile: Shared<U32x4>) {
    let (own, word) = (thread::thread_idx_x() / WORDS as u32, thread::thread_idx_x() as usize % WORDS);
    let to = word / 8 * 8 * ROWS as usize + Matrix::place(own as usize, word % 8);
    let mut row = 0;
    while row < ROWS {
        let from = (first + own + row).min(source.rows - 1) * source.stride + word as u32;
        copy_async(tile, to + 8 * row as usize, source.words, from as usize);
        row += BLOCK / WORDS as u32;
    }
}

/// Starts the logits of 64 queries and a tile of keys.
///
/// # Safety
/// As for [`wgmma`].
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
unsafe fn multiply_keys<const WORDS: usize>(
    logits: &mut [f32; 4 * KEY_EIGHTS],
    queries: Matrix,
    keys: Matrix,
) {
    wgmma::multiply(logits, queries.columns(0), keys.columns(0));
    unrolled!(step < WORDS / 2, {
        if step > 0 {
            wgmma::multiply_add(logits, queries.columns(step), keys.columns(step));
        }
    });
}

/// Starts adding the values of a tile, weighted, to the outputs of 64 queries.
///
/// # Safety
/// As for [`wgmma`].
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
unsafe fn add_values<S: Sums>(outputs: &mut S, weights: &[[u32; 4]; KEY_SIXTEENS], values: Matrix) {
    unrolled!(step < KEY_SIXTEENS, {
        wgmma::multiply_add(outputs, weights[step], values.rows(step));
    });
}

/// Makes a left side of weights.
#[inline(always)]
fn pack(weights: &Logits<KEY_EIGHTS>, packed: &mut [[u32; 4]; KEY_SIXTEENS]) {
    unrolled!(sixteen < KEY_SIXTEENS, {
        packed[sixteen] = left_side(weights, sixteen);
    });
}

/// A thread's sums, four of each eight columns.
#[inline(always)]
fn fours<const EIGHTS: usize>(sums: &mut [f32]) -> &mut Logits<EIGHTS> {
    sums.as_chunks_mut().0.try_into().expect("the length is a constant")
}
