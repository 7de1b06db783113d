use cuda_std::copy::{commit_group, copy_async_or_zero, wait_group};
use cuda_std::mma::mma_m16n8k16_bf16;
use cuda_std::prelude::*;
use cuda_std::shared;

use super::output::Output;
use super::parts::Parts;
use super::shares::Shares;
use crate::abi::WARP;
use crate::abi::linear::{
    BLOCK, CHUNK_WORDS, STEP_CHUNKS, STEP_WORDS, TILE, chunks, stage_words, stages, tiles,
};
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
/// that is cut into a share a block, equal but for one unit, so that all multiprocessors read as much. In a ring in shared memory steps of [`STEP_CHUNKS`]
/// units are on their way; a warp multiplies 16 rows of each by all tokens, rows in the rows of a product and tokens in its columns. Of a tile that lies
/// in several shares each block stores its part; the one that comes last adds them up, in the order of the shares.
///
/// With `g = lane / 4` and `t = lane % 4`, a lane has rows `2 g` and `2 g + 1` of its warp's, and of 32 elements words `t` of rows and of
/// token `g`: which elements a product pairs up is free. In shared memory the halves of a line change places every two rows of weights,
/// and every token, so that the eight lanes that read at once read from all banks.
///
/// # Overlap
/// From sm_90 on the launch may overlap with the one before it: the ring is filled with weights while that one ends.
///
/// # What bounds it
/// On an H100: memory. 68 registers and up to 111 KiB of shared memory: two blocks a multiprocessor, of which the second is that of the launch behind. The
/// four projections of a Qwen3-14B layer, overlapping, are read at 0.96 of a copy's bandwidth by one token, 0.92 by 16; at 32 and 64 (124
/// and 168 registers) `x` comes from the L2 as often as shares of k do, and 0.87 and 0.78 are left.
///
/// # Launch
/// 1 to `tiles * chunks` blocks of [`BLOCK`] threads, [`shared_bytes`](crate::abi::linear::shared_bytes) of shared memory.
///
/// # Safety
/// The views have the shapes above, of words at most 2^32 - 1; `weights` is not what the launch before writes.
#[kernel(collectives(barrier = 3, mma = 8, shuffle = 2))]
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
    linear::<1, { stages(8) - 2 }, 4>(weights, x, k_words, partials, arrivals, output);
}

/// [`linear_8`] for up to 16 tokens.
///
/// # Safety
/// As there.
#[kernel(collectives(barrier = 3, mma = 16, shuffle = 4))]
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
    linear::<2, { stages(16) - 2 }, 4>(weights, x, k_words, partials, arrivals, output);
}

/// [`linear_8`] for up to 32 tokens.
///
/// # Safety
/// As there.
#[kernel(collectives(barrier = 3, mma = 32, shuffle = 8))]
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
    linear::<4, { stages(32) - 2 }, 4>(weights, x, k_words, partials, arrivals, output);
}

/// [`linear_8`] for up to 64 tokens.
///
/// # Safety
/// As there.
#[kernel(collectives(barrier = 3, mma = 64, shuffle = 16))]
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
    linear::<8, { stages(64) - 2 }, 2>(weights, x, k_words, partials, arrivals, output);
}

/// A step along a share: up to [`STEP_CHUNKS`] units of one tile.
#[derive(Clone, Copy, Default)]
struct Step {
    unit: u32,
    tile: u32,
    chunk: u32,
    /// Units; none beyond the share.
    len: u32,
}

impl Step {
    /// The step that begins with `unit`, in a share that ends before `end`.
    #[inline(always)]
    fn new(unit: u32, end: u32, chunks: u32) -> Self {
        let (tile, chunk) = (unit / chunks, unit % chunks);
        Self { unit, tile, chunk, len: 0 }.cut(end, chunks)
    }

    #[inline(always)]
    fn next(self, end: u32, chunks: u32) -> Self {
        let (unit, chunk) = (self.unit + self.len, self.chunk + self.len);
        let (tile, chunk) = if chunk == chunks { (self.tile + 1, 0) } else { (self.tile, chunk) };
        Self { unit, tile, chunk, len: 0 }.cut(end, chunks)
    }

    #[inline(always)]
    fn cut(self, end: u32, chunks: u32) -> Self {
        Self { len: STEP_CHUNKS.min(chunks - self.chunk).min(end - self.unit), ..self }
    }

    /// Where word `word` of the step is in a row of `k_words`, if there is one.
    #[inline(always)]
    fn word(&self, word: u32, k_words: u32) -> (u32, bool) {
        let from = self.chunk * CHUNK_WORDS + word;
        (from, word < self.len * CHUNK_WORDS && from < k_words)
    }
}

/// The most stages that are in flight, and the most words of the tokens that a thread brings to a stage.
const MOST_AHEAD: usize = 5;
const MOST_TURNS: usize = 4;

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
    let places = PENDING + 2;
    let of_stage = stage_words(8 * EIGHTS as u32);
    let ring = shared::dynamic::<U32x4>(0, (places * of_stage) as usize);
    let flag = shared::dynamic::<u32>((16 * places * of_stage) as usize, 1);
    let (block, chunks) = (thread::block_idx_x(), chunks(k_words));
    let shares = Shares::new(tiles(output.n) * chunks, thread::grid_dim_x());
    let (first, end) = (shares.first(block), shares.first(block + 1));
    let start = Step::new(first, end, chunks);
    const {
        assert!(PENDING + 2 == stages(8 * EIGHTS as u32), "the host counts as many stages");
        assert!(PENDING < MOST_AHEAD as u32, "as many stages ahead are filled first");
        assert!(
            8 * EIGHTS as u32 * STEP_WORDS <= MOST_TURNS as u32 * BLOCK,
            "so many turns bring a stage's tokens"
        );
    }

    // A thread copies a word of some rows. Whole lines, since they are all that the L2 is fast at.
    let (own, word) = (thread::thread_idx_x() / STEP_WORDS, thread::thread_idx_x() % STEP_WORDS);
    let ask_weights = |step: &Step, stage: u32| {
        let (from, within) = step.word(word, k_words);
        let to = stage * of_stage + own * STEP_WORDS + (word ^ (own / 2 % 2 * 4));
        let mut row = 0;
        while row < TILE {
            let place = step.tile * TILE + own + row;
            let at = (output.source(place) * k_words + from) as usize;
            let valid = within && place < output.n;
            copy_async_or_zero(ring, (to + row * STEP_WORDS) as usize, weights, at, valid);
            row += BLOCK / STEP_WORDS;
        }
    };
    // A stage's words of the tokens, of which a thread has some.
    let token_words = 8 * EIGHTS as u32 * STEP_WORDS;
    let token_place = |stage: u32, at: u32| {
        let (token, word) = (at / STEP_WORDS, at % STEP_WORDS);
        (stage * of_stage + (TILE + token) * STEP_WORDS + (word ^ (token % 2 * 4))) as usize
    };
    let token_source = |step: &Step, at: u32| {
        let token = at / STEP_WORDS;
        let (from, within) = step.word(at % STEP_WORDS, k_words);
        ((token * k_words + from) as usize, within && token < output.tokens)
    };

    let mut ahead = start;
    let mut steps = [Step::default(); MOST_AHEAD];
    unrolled!(stage < MOST_AHEAD, {
        if stage as u32 <= PENDING {
            if ahead.len > 0 {
                ask_weights(&ahead, stage as u32);
            }
            commit_group();
            steps[stage] = ahead;
            ahead = ahead.next(end, chunks);
        }
    });
    #[cfg(any(not(target_arch = "nvptx64"), sm_90))]
    thread::wait_dependencies();
    // Not by asynchronous copies: those would be waited for with all the weights that were asked for before them. All loads are on
    // their way before the first store.
    let mut words = [[U32x4::default(); MOST_TURNS]; MOST_AHEAD];
    unrolled!(stage < MOST_AHEAD, {
        unrolled!(turn < MOST_TURNS, {
            let first = turn as u32 * BLOCK;
            if stage as u32 <= PENDING && first < token_words {
                let (from, valid) = token_source(&steps[stage], first + thread::thread_idx_x());
                // Word 0 is always there.
                let word = x.load(if valid { from } else { 0 });
                words[stage][turn] = if valid { word } else { U32x4::default() };
            }
        });
    });
    unrolled!(stage < MOST_AHEAD, {
        unrolled!(turn < MOST_TURNS, {
            let at = turn as u32 * BLOCK + thread::thread_idx_x();
            if stage as u32 <= PENDING && at < token_words {
                ring.store(token_place(stage as u32, at), words[stage][turn]);
            }
        });
    });

    let (warp, lane) = (thread::thread_idx_x() / WARP, warp::lane_id());
    let (group, pair) = (lane / 4, lane % 4);
    let first_row = 16 * warp + 2 * group;
    let mut sums = [[0.0_f32; 4]; EIGHTS];
    let mut now = start;
    let mut from_start = start.chunk == 0;
    let (mut stage, mut into) = (0, places - 1);
    while now.len > 0 {
        wait_group::<PENDING>();
        // All threads' copies are here then, and nobody reads the stage that is filled next any more.
        thread::sync_threads();
        if ahead.len > 0 {
            ask_weights(&ahead, into);
            let mut at = thread::thread_idx_x();
            while at < token_words {
                let (from, valid) = token_source(&ahead, at);
                copy_async_or_zero(ring, token_place(into, at), x, from, valid);
                at += BLOCK;
            }
        }
        commit_group();
        ahead = ahead.next(end, chunks);

        let rows = stage * of_stage + first_row * STEP_WORDS;
        let columns = stage * of_stage + (TILE + group) * STEP_WORDS;
        unrolled!(four < (STEP_WORDS / 4) as usize, {
            let word = (4 * four as u32 + pair) ^ (group % 2 * 4);
            let low = ring.load((rows + word) as usize);
            let high = ring.load((rows + STEP_WORDS + word) as usize);
            unrolled!(eight < EIGHTS, {
                let token = ring.load((columns + 8 * eight as u32 * STEP_WORDS + word) as usize);
                let sum = &mut sums[eight];
                *sum = mma_m16n8k16_bf16([low.x, high.x, low.y, high.y], [token.x, token.y], *sum);
                *sum = mma_m16n8k16_bf16([low.z, high.z, low.w, high.w], [token.z, token.w], *sum);
            });
        });
        stage = if stage + 1 == places { 0 } else { stage + 1 };
        into = if into + 1 == places { 0 } else { into + 1 };

        let ends_tile = now.chunk + now.len == chunks;
        if ends_tile || now.unit + now.len == end {
            let mut whole = from_start && ends_tile;
            if !whole {
                let parts = Parts(partials);
                parts.store(2 * block + u32::from(from_start), &sums);
                let begin = now.unit - now.chunk;
                let (from, to) = (shares.owner(begin), shares.owner(begin + chunks - 1));
                whole = is_last(arrivals, now.tile, to - from + 1, flag);
                if whole {
                    parts.add::<EIGHTS, AT_ONCE>(from, to, &mut sums);
                }
            }
            if whole {
                let place = now.tile * TILE + first_row;
                unrolled!(eight < EIGHTS, {
                    let token = 8 * eight as u32 + 2 * pair;
                    let [a, b, c, d] = sums[eight];
                    output.take::<4>([token, token + 1], place, [[a, c], [b, d]]);
                });
            }
            sums = [[0.0; 4]; EIGHTS];
            from_start = true;
        }
        now = now.next(end, chunks);
    }
}
