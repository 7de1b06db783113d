use cuda_std::atomic::{Order, Scope};
use cuda_std::copy::{commit_group, copy_async, wait_group};
use cuda_std::mma::{load_8x8x4, mma_m16n8k16_bf16};
use cuda_std::prelude::*;
use cuda_std::shared;
use cuda_std::warp::{FULL_MASK, WARP_SIZE, warp_shuffle_xor};

use crate::abi::WARP;
use crate::abi::cluster::assign::{BLOCK, CENTROIDS, STAGES, TOKENS, tiles};
use crate::abi::cluster::span_start;
use crate::unroll::unrolled;

/// The centroid of each token with the greatest product, for heads of 128: an iteration's, of the token's own span, or the last pass's, of all.
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `keys`, `first`, `tokens`, `kv_heads` | | as for [`cluster_start`](super::cluster_start()) |
/// | `spans`, `span_centroids` | | as there; of the last pass 1, and all centroids of a row |
/// | `centroids` | `[kv_heads, spans * span_centroids, head_words]` words | bf16 |
/// | `biases` | `[kv_heads, spans * span_centroids / 2]` pairs of f32 | |
/// | `assigned` | `[kv_heads, tokens / 4, rounded up, 4]` | |
/// | `counted` | whether clusters are counted: if 0, the next is not used | |
/// | `sizes` | `[kv_heads, spans * span_centroids]` | tokens are added |
///
/// Of equal products the lower centroid's counts. Products are exact, sums in f32, from the bias on; what is no number is no greatest.
///
/// # Mapping
/// A block has 128 tokens of a span, a warp 32, whose keys stay in its registers. Centroids pass by through a ring in shared memory, 64 at a time; a
/// lane keeps the best of those that it has products of, of four tokens, and four lanes choose among theirs at the end.
///
/// # Launch
/// [`grid`](crate::abi::cluster::assign::grid) blocks of [`BLOCK`] threads, [`shared_bytes`](crate::abi::cluster::assign::shared_bytes) of
/// shared memory.
///
/// # Safety
/// The views have the shapes above; nothing writes `keys` until the launch has ended.
#[kernel(collectives(barrier = 3, mma = 176, shuffle = 16))]
pub unsafe fn cluster_assign_128(
    keys: Global<U32x4>,
    first: u32,
    tokens: u32,
    kv_heads: u32,
    spans: u32,
    span_centroids: u32,
    centroids: Global<U32x4>,
    biases: Global<u64>,
    assigned: GlobalMut<u32>,
    counted: u32,
    sizes: GlobalMut<u32>,
) {
    let tile = Tile { keys, first, tokens, kv_heads, spans, span_centroids };
    assign::<16>(tile, centroids, biases, assigned, counted, sizes);
}

/// [`cluster_assign_128`] for heads of 64.
///
/// # Safety
/// As there.
#[kernel(collectives(barrier = 3, mma = 88, shuffle = 16))]
pub unsafe fn cluster_assign_64(
    keys: Global<U32x4>,
    first: u32,
    tokens: u32,
    kv_heads: u32,
    spans: u32,
    span_centroids: u32,
    centroids: Global<U32x4>,
    biases: Global<u64>,
    assigned: GlobalMut<u32>,
    counted: u32,
    sizes: GlobalMut<u32>,
) {
    let tile = Tile { keys, first, tokens, kv_heads, spans, span_centroids };
    assign::<8>(tile, centroids, biases, assigned, counted, sizes);
}

/// What blocks are cut out of.
struct Tile {
    keys: Global<U32x4>,
    first: u32,
    tokens: u32,
    kv_heads: u32,
    spans: u32,
    span_centroids: u32,
}

/// Where word `word` of row `row` lies: eight rows' words `word` are read from all banks.
#[inline(always)]
fn place<const WORDS: usize>(row: u32, word: u32) -> usize {
    row as usize * WORDS + (word ^ (row % 8)) as usize
}

#[inline(always)]
unsafe fn assign<const WORDS: usize>(
    tile: Tile,
    centroids: Global<U32x4>,
    biases: Global<u64>,
    assigned: GlobalMut<u32>,
    counted: u32,
    sizes: GlobalMut<u32>,
) {
    let Tile { keys, first, tokens, kv_heads, spans, span_centroids } = tile;
    let (head, of_row) = (thread::block_idx_x() % kv_heads, thread::block_idx_x() / kv_heads);
    let span_tiles = tiles(tokens, spans);
    let span = of_row / span_tiles;
    let end = span_start(tokens, spans, span + 1);
    let first_token = span_start(tokens, spans, span) + of_row % span_tiles * TOKENS;
    // Spans may differ by a token, and so by a tile.
    if first_token >= end {
        return;
    }
    let first_centroid = (head * spans + span) * span_centroids;
    let centroids = centroids.slice(first_centroid as usize * WORDS, span_centroids as usize * WORDS);
    let biases = biases.slice(first_centroid as usize / 2, span_centroids as usize / 2);

    let of_stage = CENTROIDS * WORDS as u32;
    let ring = shared::dynamic::<U32x4>(0, (STAGES * of_stage) as usize);
    let bias_ring =
        shared::dynamic::<u64>((STAGES * of_stage) as usize * 16, (STAGES * CENTROIDS / 2) as usize);
    let (thread, rows_at_once) = (thread::thread_idx_x(), BLOCK / WORDS as u32);
    let (own_row, own_word) = (thread / WORDS as u32, thread % WORDS as u32);
    let to = place::<WORDS>(own_row, own_word);
    let turns = span_centroids.div_ceil(CENTROIDS);
    let ask = |turn: u32, stage: u32| {
        if turn < turns {
            // Beyond the last pair of centroids comes that pair again, of which none is ever greater than itself.
            let source = |row: u32| (turn * CENTROIDS + row).min(span_centroids - 2 + row % 2);
            let mut row = 0;
            while row < CENTROIDS {
                let from = source(own_row + row) as usize * WORDS + own_word as usize;
                copy_async(ring, (stage * of_stage) as usize + to + row as usize * WORDS, centroids, from);
                row += rows_at_once;
            }
            if thread < CENTROIDS / 2 {
                let from = (turn * CENTROIDS / 2 + thread).min(span_centroids / 2 - 1);
                copy_async(bias_ring, (stage * CENTROIDS / 2 + thread) as usize, biases, from as usize);
            }
        }
        commit_group();
    };
    // Tokens lie in the last two stages until they are in registers.
    let token_place = ((STAGES - 2) * of_stage) as usize;
    let width = kv_heads as usize * WORDS;
    let mut row = 0;
    while row < TOKENS {
        let token = (first_token + own_row + row).min(end - 1);
        let from = (first + token) as usize * width + head as usize * WORDS + own_word as usize;
        copy_async(ring, token_place + to + row as usize * WORDS, keys, from);
        row += rows_at_once;
    }
    ask(0, 0);
    ask(1, 1);

    let (warp, lane) = (thread / WARP, warp::lane_id());
    let own_tokens = place::<WORDS>(32 * warp + lane % 16, lane / 16);
    let mut left: Left<WORDS> = [[[0; 4]; 2]; WORDS];
    wait_group::<1>();
    thread::sync_threads();
    unrolled!(step < WORDS / 2, {
        left[step][0] = load_8x8x4(ring, token_place + (own_tokens ^ (2 * step)));
        left[step][1] = load_8x8x4(ring, token_place + (own_tokens ^ (2 * step)) + 16 * WORDS);
    });
    thread::sync_threads();
    ask(2, 2);

    let own_centroids = place::<WORDS>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
    let (group, pair) = (lane / 4, lane % 4);
    let mut best = [[(f32::NEG_INFINITY, 0_u32); 2]; 2];
    let (mut stage, mut into) = (0, STAGES - 1);
    let mut turn = 0;
    // There is a centroid.
    loop {
        wait_group::<{ STAGES - 2 }>();
        // All threads' copies are here then, and nobody reads the stage that is filled next any more.
        thread::sync_threads();
        ask(turn + STAGES - 1, into);
        let row = stage * CENTROIDS;
        let id = turn * CENTROIDS + 2 * pair;
        take_32::<WORDS>(ring, bias_ring, row, own_centroids, &left, id, &mut best);
        take_32::<WORDS>(ring, bias_ring, row + 32, own_centroids, &left, id + 32, &mut best);
        stage = if stage + 1 == STAGES { 0 } else { stage + 1 };
        into = if into + 1 == STAGES { 0 } else { into + 1 };
        turn += 1;
        if turn == turns {
            break;
        }
    }

    let assigned = assigned.rows(tokens.next_multiple_of(4) as usize).row(head as usize);
    let mut four = 0;
    while four < 4 {
        let (rows, half) = (four / 2, four % 2);
        let id = best_of_four(best[rows][half]).min(span_centroids - 1);
        let token = first_token + 32 * warp + (16 * rows + 8 * half) as u32 + group;
        if pair == 0 && token < end {
            assigned.store(token as usize, span * span_centroids + id);
            if counted != 0 {
                sizes.atomic_add((first_centroid + id) as usize, 1, Order::Relaxed, Scope::Device);
            }
        }
        four += 1;
    }
}

/// A warp's 32 tokens as left sides of products, of 16 elements and 16 tokens each; the second half is not used.
type Left<const WORDS: usize> = [[[u32; 4]; 2]; WORDS];

/// A lane's greatest products and their centroids: of tokens `group`, `group + 8`, and those 16 further on.
type Best = [[(f32, u32); 2]; 2];

/// Products with the 32 centroids from row `row` of the ring on, of which the lane's first is `id`.
///
/// # Safety
/// All lanes of the warp are here; the ring has the centroids.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
unsafe fn take_32<const WORDS: usize>(
    ring: Shared<U32x4>,
    biases: Shared<u64>,
    row: u32,
    own_centroids: usize,
    left: &Left<WORDS>,
    id: u32,
    best: &mut Best,
) {
    let mut sums = [[[0.0_f32; 4]; 4]; 2];
    let mut eight = 0;
    while eight < 4 {
        let biases = biases.load((row / 2 + 4 * eight as u32 + warp::lane_id() % 4) as usize);
        let (low, high) = (f32::from_bits(biases as u32), f32::from_bits((biases >> 32) as u32));
        sums[0][eight] = [low, high, low, high];
        sums[1][eight] = [low, high, low, high];
        eight += 1;
    }
    let first = row as usize * WORDS;
    unrolled!(step < WORDS / 2, {
        let mut sixteen = 0;
        while sixteen < 2 {
            let at = first + (own_centroids ^ (2 * step)) + 16 * sixteen * WORDS;
            let [a, b, c, d] = load_8x8x4(ring, at);
            let mut rows = 0;
            while rows < 2 {
                let of = &mut sums[rows];
                of[2 * sixteen] = mma_m16n8k16_bf16(left[step][rows], [a, b], of[2 * sixteen]);
                of[2 * sixteen + 1] = mma_m16n8k16_bf16(left[step][rows], [c, d], of[2 * sixteen + 1]);
                rows += 1;
            }
            sixteen += 1;
        }
    });
    unrolled!(eight < 4, {
        let id = id + 8 * eight as u32;
        let mut rows = 0;
        while rows < 2 {
            let [a, b, c, d] = sums[rows][eight];
            take(&mut best[rows][0], a, id);
            take(&mut best[rows][0], b, id + 1);
            take(&mut best[rows][1], c, id);
            take(&mut best[rows][1], d, id + 1);
            rows += 1;
        }
    });
}

/// Takes a centroid whose product is greater than those of the lower ones.
#[inline(always)]
fn take(best: &mut (f32, u32), product: f32, id: u32) {
    if product > best.0 {
        *best = (product, id);
    }
}

/// Of four lanes side by side the centroid with the greatest product, and of those the lowest.
///
/// # Safety
/// All lanes of the warp are here.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
unsafe fn best_of_four((mut best, mut id): (f32, u32)) -> u32 {
    let mut distance = 1;
    while distance < 4 {
        let other = warp_shuffle_xor(FULL_MASK, best, distance, WARP_SIZE);
        let other_id = warp_shuffle_xor(FULL_MASK, id, distance, WARP_SIZE);
        if other > best || (other == best && other_id < id) {
            (best, id) = (other, other_id);
        }
        distance *= 2;
    }
    id
}
