use cuda_std::copy::{commit_group, copy_async_or_zero, wait_group};
use cuda_std::mma::mma_m16n8k16_bf16;
use cuda_std::prelude::*;
use cuda_std::shared;

use super::output::Output;
use super::parts::Parts;
use super::shares::Shares;
use crate::abi::WARP;
use crate::abi::linear::{BLOCK, CHUNK_WORDS, TILE, chunks, stage_words, tiles};
use crate::block::is_last;
use crate::unroll::unrolled;

/// Products of up to 8 tokens and weights: `x` times the transpose of `weights`, where reading the weights takes all the time.
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `weights` | `[n, k_words]` words | bf16, as a checkpoint has them |
/// | `x` | `[tokens, k_words]` words | bf16 |
/// | `tokens` | 1 to 8 | |
/// | `n` | at least 8, a multiple of 8; of 16 if gated | rows of weights |
/// | `k_words` | at least 1 | |
/// | `epilogue` | one of [`epilogue`](crate::abi::linear::epilogue) | what becomes of products |
/// | `partials` | [`partial_words`](crate::abi::linear::partial_words) words if there is more than one block | scratch |
/// | `arrivals` | `[`[`tiles`]`]`, 0 before and after, if there is more than one block | scratch |
/// | `bf16` | `[tokens, n]` bf16, or `[tokens, n / 2]` if gated; not touched for f32 | products |
/// | `f32` | `[tokens, n]`; not touched for bf16 | products |
///
/// Products are exact, sums in f32, in an order that the shape and the number of blocks alone decide.
///
/// # Mapping
/// A unit of work is a line of 128 bytes of each of [`TILE`] rows of weights, and as much of the tokens. All units, tile by tile, are one run
/// that is cut into a share a block, equal but for one unit, so that all multiprocessors read as much. In a ring in shared memory units are on their
/// way; a warp multiplies 16 rows of each by all tokens, rows in the rows of a product and tokens in its columns. Of a tile that lies
/// in several shares each block stores its part; the one that comes last adds them up, in the order of the shares.
///
/// With `g = lane / 4` and `t = lane % 4`, a lane has rows `2 g` and `2 g + 1` of its warp's, and of 32 elements words `t` of rows and of
/// token `g`: which elements a product pairs up is free. In shared memory the halves of a line change places every two rows of weights,
/// and every token, so that the eight lanes that read at once read from all banks.
///
/// # Overlap
/// From sm_90 on the launch may overlap with the one before it: the ring is filled with weights while that one ends.
///
/// # Launch
/// 1 to `tiles * chunks` blocks of [`BLOCK`] threads, [`shared_bytes`](crate::abi::linear::shared_bytes) of shared memory.
///
/// # Safety
/// The views have the shapes above, of words at most 2^32 - 1; `weights` is not what the launch before writes.
#[kernel(collectives(barrier = 3, mma = 4, shuffle = 2))]
pub unsafe fn linear_8(
    weights: Global<U32x4>,
    x: Global<U32x4>,
    tokens: u32,
    n: u32,
    k_words: u32,
    epilogue: u32,
    partials: GlobalMut<U32x4>,
    arrivals: GlobalMut<u32>,
    bf16: GlobalMut<u32>,
    f32: GlobalMut<u64>,
) {
    let output = Output { bf16, f32, tokens, n, epilogue };
    linear::<1, 4, 4>(weights, x, k_words, partials, arrivals, output);
}

/// [`linear_8`] for up to 16 tokens.
///
/// # Safety
/// As there.
#[kernel(collectives(barrier = 3, mma = 8, shuffle = 4))]
pub unsafe fn linear_16(
    weights: Global<U32x4>,
    x: Global<U32x4>,
    tokens: u32,
    n: u32,
    k_words: u32,
    epilogue: u32,
    partials: GlobalMut<U32x4>,
    arrivals: GlobalMut<u32>,
    bf16: GlobalMut<u32>,
    f32: GlobalMut<u64>,
) {
    let output = Output { bf16, f32, tokens, n, epilogue };
    linear::<2, 4, 4>(weights, x, k_words, partials, arrivals, output);
}

/// [`linear_8`] for up to 32 tokens.
///
/// # Safety
/// As there.
#[kernel(collectives(barrier = 3, mma = 16, shuffle = 8))]
pub unsafe fn linear_32(
    weights: Global<U32x4>,
    x: Global<U32x4>,
    tokens: u32,
    n: u32,
    k_words: u32,
    epilogue: u32,
    partials: GlobalMut<U32x4>,
    arrivals: GlobalMut<u32>,
    bf16: GlobalMut<u32>,
    f32: GlobalMut<u64>,
) {
    let output = Output { bf16, f32, tokens, n, epilogue };
    linear::<4, 3, 4>(weights, x, k_words, partials, arrivals, output);
}

/// [`linear_8`] for up to 64 tokens.
///
/// # Safety
/// As there.
#[kernel(collectives(barrier = 3, mma = 32, shuffle = 16))]
pub unsafe fn linear_64(
    weights: Global<U32x4>,
    x: Global<U32x4>,
    tokens: u32,
    n: u32,
    k_words: u32,
    epilogue: u32,
    partials: GlobalMut<U32x4>,
    arrivals: GlobalMut<u32>,
    bf16: GlobalMut<u32>,
    f32: GlobalMut<u64>,
) {
    let output = Output { bf16, f32, tokens, n, epilogue };
    linear::<8, 2, 2>(weights, x, k_words, partials, arrivals, output);
}

/// Where one is in the run of all units.
#[derive(Clone, Copy)]
struct Walk {
    unit: u32,
    tile: u32,
    chunk: u32,
}

impl Walk {
    #[inline(always)]
    fn next(&mut self, chunks: u32) {
        self.unit += 1;
        self.chunk += 1;
        if self.chunk == chunks {
            (self.tile, self.chunk) = (self.tile + 1, 0);
        }
    }
}

/// The most words of the tokens that a thread brings to the first stages.
const MOST_FIRST_WORDS: usize = 6;

/// `EIGHTS` of tokens, a ring of `PENDING + 2` stages, and how many parts of a tile are read at once.
#[inline(always)]
unsafe fn linear<const EIGHTS: usize, const PENDING: u32, const AT_ONCE: usize>(
    weights: Global<U32x4>,
    x: Global<U32x4>,
    k_words: u32,
    partials: GlobalMut<U32x4>,
    arrivals: GlobalMut<u32>,
    output: Output,
) {
    #[cfg(any(not(target_arch = "nvptx64"), sm_90))]
    thread::launch_dependents();
    let stages = PENDING + 2;
    let of_stage = stage_words(8 * EIGHTS as u32);
    let ring = shared::dynamic::<U32x4>(0, (stages * of_stage) as usize);
    let flag = shared::dynamic::<u32>((16 * stages * of_stage) as usize, 1);
    let (block, chunks) = (thread::block_idx_x(), chunks(k_words));
    let shares = Shares::new(tiles(output.n) * chunks, thread::grid_dim_x());
    let (first, end) = (shares.first(block), shares.first(block + 1));
    let start = Walk { unit: first, tile: first / chunks, chunk: first % chunks };

    // A thread copies a word of every 32nd row. Whole lines, since they are all that the L2 is fast at.
    let (own, word) = (thread::thread_idx_x() / CHUNK_WORDS, thread::thread_idx_x() % CHUNK_WORDS);
    let ask_weights = |walk: &Walk, stage: u32| {
        let from = walk.chunk * CHUNK_WORDS + word;
        let to = stage * of_stage + own * CHUNK_WORDS + (word ^ (own / 2 % 2 * 4));
        let mut row = 0;
        while row < TILE {
            let place = walk.tile * TILE + own + row;
            let valid = place < output.n && from < k_words;
            let at = (output.source(place) * k_words + from) as usize;
            copy_async_or_zero(ring, (to + row * CHUNK_WORDS) as usize, weights, at, valid);
            row += BLOCK / CHUNK_WORDS;
        }
    };
    // A stage's words of the tokens, of which a thread has some.
    let token_words = 8 * EIGHTS as u32 * CHUNK_WORDS;
    const {
        let words = (PENDING + 1) * 8 * EIGHTS as u32 * CHUNK_WORDS;
        assert!(
            words <= MOST_FIRST_WORDS as u32 * BLOCK,
            "a thread has room for its words of the first stages"
        );
        assert!(
            PENDING + 2 == crate::abi::linear::stages(8 * EIGHTS as u32),
            "the host counts as many stages"
        );
    }
    let token_place = |stage: u32, at: u32| {
        let (token, word) = (at / CHUNK_WORDS, at % CHUNK_WORDS);
        (stage * of_stage + (TILE + token) * CHUNK_WORDS + (word ^ (token % 2 * 4))) as usize
    };
    let token_source = |chunk: u32, at: u32| {
        let (token, from) = (at / CHUNK_WORDS, chunk * CHUNK_WORDS + at % CHUNK_WORDS);
        ((token * k_words + from) as usize, token < output.tokens && from < k_words)
    };

    let mut ahead = start;
    let mut stage = 0;
    while stage < stages - 1 {
        if ahead.unit < end {
            ask_weights(&ahead, stage);
        }
        commit_group();
        ahead.next(chunks);
        stage += 1;
    }
    #[cfg(any(not(target_arch = "nvptx64"), sm_90))]
    thread::wait_dependencies();
    // Not by asynchronous copies: those would be waited for with all the weights that were asked for before them. All loads are on
    // their way before the first store.
    let mut words = [U32x4::default(); MOST_FIRST_WORDS];
    unrolled!(turn < MOST_FIRST_WORDS, {
        let at = turn as u32 * BLOCK + thread::thread_idx_x();
        let stage = at / token_words;
        if (turn as u32 * BLOCK) < (stages - 1) * token_words {
            let (from, valid) = token_source((start.chunk + stage) % chunks, at % token_words);
            // Word 0 is always there.
            let word = x.load(if valid { from } else { 0 });
            words[turn] = if valid { word } else { U32x4::default() };
        }
    });
    unrolled!(turn < MOST_FIRST_WORDS, {
        let at = turn as u32 * BLOCK + thread::thread_idx_x();
        let stage = at / token_words;
        if stage < stages - 1 && start.unit + stage < end {
            ring.store(token_place(stage, at % token_words), words[turn]);
        }
    });

    let (warp, lane) = (thread::thread_idx_x() / WARP, warp::lane_id());
    let (group, pair) = (lane / 4, lane % 4);
    let first_row = 16 * warp + 2 * group;
    let mut sums = [[0.0_f32; 4]; EIGHTS];
    let mut walk = start;
    let mut from_start = start.chunk == 0;
    let (mut stage, mut into) = (0, stages - 1);
    while walk.unit < end {
        wait_group::<PENDING>();
        // All threads' copies are here then, and nobody reads the stage that is filled next any more.
        thread::sync_threads();
        if ahead.unit < end {
            ask_weights(&ahead, into);
            let mut at = thread::thread_idx_x();
            while at < token_words {
                let (from, valid) = token_source(ahead.chunk, at);
                copy_async_or_zero(ring, token_place(into, at), x, from, valid);
                at += BLOCK;
            }
        }
        commit_group();
        ahead.next(chunks);

        let rows = stage * of_stage + first_row * CHUNK_WORDS;
        let columns = stage * of_stage + (TILE + group) * CHUNK_WORDS;
        unrolled!(step < (CHUNK_WORDS / 4) as usize, {
            let word = (4 * step as u32 + pair) ^ (group % 2 * 4);
            let low = ring.load((rows + word) as usize);
            let high = ring.load((rows + CHUNK_WORDS + word) as usize);
            unrolled!(eight < EIGHTS, {
                let token = ring.load((columns + 8 * eight as u32 * CHUNK_WORDS + word) as usize);
                let sum = &mut sums[eight];
                *sum = mma_m16n8k16_bf16([low.x, high.x, low.y, high.y], [token.x, token.y], *sum);
                *sum = mma_m16n8k16_bf16([low.z, high.z, low.w, high.w], [token.z, token.w], *sum);
            });
        });
        stage = if stage + 1 == stages { 0 } else { stage + 1 };
        into = if into + 1 == stages { 0 } else { into + 1 };

        let ends_tile = walk.chunk + 1 == chunks;
        if ends_tile || walk.unit + 1 == end {
            let mut whole = from_start && ends_tile;
            if !whole {
                let parts = Parts(partials);
                parts.store(2 * block + u32::from(from_start), &sums);
                let begin = walk.unit - walk.chunk;
                let (from, to) = (shares.owner(begin), shares.owner(begin + chunks - 1));
                whole = is_last(arrivals, walk.tile, to - from + 1, flag);
                if whole {
                    parts.add::<EIGHTS, AT_ONCE>(from, to, &mut sums);
                }
            }
            if whole {
                let place = walk.tile * TILE + first_row;
                unrolled!(eight < EIGHTS, {
                    let token = 8 * eight as u32 + 2 * pair;
                    let [a, b, c, d] = sums[eight];
                    output.take::<4>([token, token + 1], place, [[a, c], [b, d]]);
                });
            }
            sums = [[0.0; 4]; EIGHTS];
            from_start = true;
        }
        walk.next(chunks);
    }
}
