use cuda_std::copy::{commit_group, wait_group};
use cuda_std::mma::{load_8x8x4, mma_m16n8k16_bf16};
use cuda_std::prelude::*;
use cuda_std::shared;
use cuda_std::wgmma::Matrix;

use super::output::Output;
use super::tile;
use crate::abi::WARP;
use crate::abi::gemm::mma::{BLOCK, ROWS, STAGES};
use crate::abi::gemm::{CHUNK_WORDS, TOKENS};
use crate::unroll::unrolled;

/// Products of any number of tokens and weights: `x` times the transpose of `weights`.
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `weights` | `[n, k_words]` words | bf16, as a checkpoint has them |
/// | `x` | `[tokens, k_words]` words | bf16 |
/// | `tokens` | at least 1 | |
/// | `n` | at least 8, a multiple of 8; of 16 if gated | rows of weights |
/// | `k_words` | at least 1 | |
/// | `epilogue` | one of [`epilogue`](crate::abi::linear::epilogue) | what becomes of products |
/// | `bf16` | `[tokens, n]` bf16, or `[tokens, n / 2]` if gated; not touched for f32 | products |
/// | `f32` | `[tokens, n]`; not touched for bf16 | products |
///
/// Products are exact, sums in f32.
///
/// # Mapping
/// A block has 128 tokens and 128 rows of weights, a warp 64 of each: what comes out of shared memory is in four products. Lines of 128 bytes
/// of tokens and weights pass through a ring in shared memory. Rows beyond the last are the last again, and not stored.
///
/// # What bounds it
/// On an H100: 228 registers and 96 KiB, two blocks a multiprocessor; products of a warp, 400 to 420 TFLOP/s of 8,192 tokens.
///
/// # Launch
/// [`blocks`](crate::abi::gemm::blocks) blocks of [`BLOCK`] threads, [`shared_bytes`](crate::abi::gemm::shared_bytes) of shared memory.
///
/// # Safety
/// The views have the shapes above, of words at most 2^32 - 1.
#[kernel(collectives(barrier = 1, mma = 160, shuffle = 64))]
pub unsafe fn gemm(
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
    while chunk < STAGES - 1 {
        ask(chunk, chunk);
        chunk += 1;
    }

    let (warp, lane) = (thread::thread_idx_x() / WARP, warp::lane_id());
    let (warp_token, warp_row) = (64 * (warp / 2), 64 * (warp % 2));
    let place = |row: u32, word: u32| Matrix::place(row as usize, word as usize);
    let own_tokens = place(warp_token + lane % 16, lane / 16);
    let own_rows = place(TOKENS + warp_row + lane / 16 * 8 + lane % 8, lane / 8 % 2);
    let mut sums = [[[0.0_f32; 4]; 8]; 4];
    let (mut stage, mut into) = (0, STAGES - 1);
    let mut chunk = 0;
    // There is a chunk.
    loop {
        wait_group::<{ STAGES - 2 }>();
        // All threads' copies are here then, and nobody reads the stage that is filled next any more.
        thread::sync_threads();
        ask(chunk + STAGES - 1, into);
        let first = (stage * of_stage) as usize;
        unrolled!(step < (CHUNK_WORDS / 2) as usize, {
            let mut left = [[0; 4]; 4];
            unrolled!(sixteen < 4, {
                let at = first + (own_tokens ^ (2 * step)) + 16 * sixteen * CHUNK_WORDS as usize;
                left[sixteen] = load_8x8x4(ring, at);
            });
            unrolled!(pair < 4, {
                let at = first + (own_rows ^ (2 * step)) + 16 * pair * CHUNK_WORDS as usize;
                let [a, b, c, d] = load_8x8x4(ring, at);
                unrolled!(sixteen < 4, {
                    let of = &mut sums[sixteen];
                    of[2 * pair] = mma_m16n8k16_bf16(left[sixteen], [a, b], of[2 * pair]);
                    of[2 * pair + 1] = mma_m16n8k16_bf16(left[sixteen], [c, d], of[2 * pair + 1]);
                });
            });
        });
        stage = if stage + 1 == STAGES { 0 } else { stage + 1 };
        into = if into + 1 == STAGES { 0 } else { into + 1 };
        chunk += 1;
        if chunk == chunks {
            break;
        }
    }

    let (group, pair) = (lane / 4, lane % 4);
    unrolled!(sixteen < 4, {
        let token = first_token + warp_token + 16 * sixteen as u32 + group;
        unrolled!(eight < 8, {
            let place = first_row + warp_row + 8 * eight as u32 + 2 * pair;
            let [a, b, c, d] = sums[sixteen][eight];
            output.take::<1>([token, token + 8], place, [[a, b], [c, d]]);
        });
    });
}
