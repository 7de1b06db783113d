use cuda_std::copy::{commit_group, wait_group};
use cuda_std::prelude::*;
use cuda_std::warp::{FULL_MASK, WARP_SIZE, warp_shuffle_idx};
use cuda_std::wgmma::{self, Matrix};
use cuda_std::{bulk, shared};

use super::output::Output;
use super::tile;
use crate::abi::WARP;
use crate::abi::gemm::wgmma::{BLOCK, ROWS, STAGES};
use crate::abi::gemm::{CHUNK_WORDS, TOKENS};
use crate::unroll::unrolled;

/// [`gemm`](super::gemm()) on the tensor cores of a warpgroup.
///
/// # Mapping
/// A block has 128 tokens and 256 rows of weights, a warpgroup 64 of the tokens. Products read lines of 128 bytes of both from the ring
/// in shared memory; those of a stage run while the next ones are started, and while two more stages are on their way.
///
/// # What bounds it
/// On an H100: 168 registers of 256 threads and 192 KiB, one block a multiprocessor; tensor cores, 613 to 654 TFLOP/s of 8,192 tokens where cuBLASLt has
/// 726 to 784.
///
/// # Launch
/// As there, with this variant's [`BLOCK`] and [`ROWS`]. sm_90a.
///
/// # Safety
/// As there.
#[kernel(sm_90a, collectives(barrier = 1, shuffle = 65, wgmma = 13))]
pub unsafe fn gemm_wgmma(
    weights: Global<U32x4>,
    x: Global<U32x4>,
    tokens: u32,
    n: u32,
    k_words: u32,
    epilogue: u32,
    bf16: GlobalMut<u32>,
    f32: GlobalMut<u64>,
) {
    let output = Output { bf16, f32, tokens, n, epilogue };
    let (first_token, first_row) = tile::of_block::<ROWS>(tokens, n);
    let of_stage = (TOKENS + ROWS) * CHUNK_WORDS;
    let ring = shared::dynamic::<U32x4>(0, (STAGES * of_stage) as usize);
    let chunks = k_words.div_ceil(CHUNK_WORDS);
    let ask = |chunk: u32, stage: u32| {
        if chunk < chunks {
            let to = stage * of_stage;
            let token = |row: u32| (first_token + row).min(tokens - 1);
            tile::copy::<BLOCK, TOKENS>(ring, to, x, k_words, chunk, token);
            let row = |row: u32| output.source((first_row + row).min(n - 1));
            tile::copy::<BLOCK, ROWS>(ring, to + TOKENS * CHUNK_WORDS, weights, k_words, chunk, row);
        }
        commit_group();
    };
    let mut chunk = 0;
    while chunk < STAGES - 2 {
        ask(chunk, chunk);
        chunk += 1;
    }

    let warp_token = thread::thread_idx_x() / WARP * 16;
    // A shuffle, so that it is known to be the same in all lanes of a warp.
    let first_of_group = warp_shuffle_idx(FULL_MASK, warp_token / 64 * 64, 0, WARP_SIZE);
    // Rows of weights 0 to 127 and 128 to 255.
    let mut sums = [[0.0_f32; 64]; 2];
    let (mut stage, mut into) = (0, STAGES - 2);
    let mut chunk = 0;
    wgmma::fence(&mut sums);
    // There is a chunk.
    loop {
        wait_group::<{ STAGES - 3 }>();
        bulk::fence();
        // All threads' copies are here then, and the products before the last are over, which read the stage that is filled next.
        thread::sync_threads();
        ask(chunk + STAGES - 2, into);
        let matrix = |row: u32, rows: u32| {
            let first = stage * of_stage + row * CHUNK_WORDS;
            Matrix::new(ring.slice(first as usize, (rows * CHUNK_WORDS) as usize), 0)
        };
        // Sums are added to by the products under way, and by nothing else.
        wgmma::fence([0.0_f32; 0]);
        let left = matrix(first_of_group, 64);
        let right = [matrix(TOKENS, 128), matrix(TOKENS + 128, 128)];
        unrolled!(step < (CHUNK_WORDS / 2) as usize, {
            wgmma::multiply_add(&mut sums[0], left.columns(step), right[0].columns(step));
            wgmma::multiply_add(&mut sums[1], left.columns(step), right[1].columns(step));
        });
        wgmma::commit_group();
        wgmma::wait_group::<1>([0.0_f32; 0]);
        stage = if stage + 1 == STAGES { 0 } else { stage + 1 };
        into = if into + 1 == STAGES { 0 } else { into + 1 };
        chunk += 1;
        if chunk == chunks {
            break;
        }
    }
    wgmma::wait_group::<0>(&mut sums);

    let (group, pair) = (warp::lane_id() / 4, warp::lane_id() % 4);
    let token = first_token + warp_token + group;
    unrolled!(half < 2, {
        unrolled!(eight < 16, {
            let place = first_row + 128 * half as u32 + 8 * eight as u32 + 2 * pair;
            let of = |sum: usize| sums[half][4 * eight + sum];
            output.take::<1>([token, token + 8], place, [[of(0), of(1)], [of(2), of(3)]]);
        });
    });
}
