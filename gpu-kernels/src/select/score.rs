use cuda_std::copy::{commit_group, copy_async_or_zero, wait_group};
use cuda_std::math::max;
use cuda_std::mma::mma_m16n8k16_bf16;
use cuda_std::prelude::*;
use cuda_std::warp::{FULL_MASK, WARP_SIZE, warp_shuffle_idx, warp_shuffle_xor};
use cuda_std::{Rows, shared, shared_layout};

use crate::abi::score::{BLOCK, CHUNK_WORDS, MAX_GROUP, SCRATCH_BYTES, STAGES, TILE_UNIT, tile};
use crate::abi::{Entry, WARP};
use crate::chain::chain;
use crate::ragged::RowPartitions;
use crate::softmax::{exp, shift_of};

/// Query heads that the tensor cores take at a time.
const HEADS: u32 = 8;
/// Partitions of a warp at a time.
const ROWS: u32 = 16;
/// Words of a summary in a chunk: four a lane, of each of two rows.
const CHUNK: u32 = CHUNK_WORDS;
const WARPS: u32 = BLOCK / WARP;
const _: () = assert!(TILE_UNIT == WARPS * ROWS && TILE_UNIT.is_multiple_of(32), "whole words of marks");

shared_layout! {
    /// What the warps have in flight, and what they share. The queries follow it.
    struct Scratch {
        // [stages, warps, 16 rows, 16 words]
        ring: [U32x4; 3072],
        // [warps, 16 heads]
        maxima: [f32; 64],
        sums: [f32; 64],
    }
}

const _: () =
    assert!(3072 == STAGES * WARPS * ROWS * CHUNK && 64 == WARPS * MAX_GROUP, "as the layout has it");
const _: () = assert!(Scratch::BYTES == SCRATCH_BYTES as usize, "as the host has it");

/// Scores partitions: the logits of the queries of a decode step against the summaries, one layer, and of each tile what a softmax
/// needs.
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `entries` | `[batch]` [`Entry`] | which partitions; at most `stride` of a request |
/// | `directories` | as the entries say | the segment of partition `p`: at `directory + p / segment_partitions` |
/// | `summaries` | `[segments, request_rows, segment_partitions, summary_words]` words | bf16, finite |
/// | `queries` | `[batch, kv_heads * group, head_words]` words | bf16 |
/// | `kv_heads` | at least 1 | |
/// | `group` | 1 to 16 | query heads of a KV head |
/// | `head_words` | at least 1 | head dim / 8 |
/// | `bounds` | 0 or 1 | 1: a summary is the least and the greatest of each element of the partition's keys, `[2, head_words]` (Quest); else `[head_words]` |
/// | `segment_partitions` | at least 1 | partitions that begin in a segment |
/// | `request_rows` | layers x KV heads | |
/// | `layer` | | whose summaries |
/// | `scale` | | factor of the logits: 1 / sqrt(head dim) |
/// | `stride` | a multiple of 4 | room for a row's logits |
/// | `tiles` | at least `stride / ` [`MAX_TILE`](crate::abi::score::MAX_TILE) | tiles of a row, of [`tile`] partitions each |
/// | `row_pages`, `counted` | `[rows of all requests, 2]`, at [`first_marks`](Entry::first_marks); 0 or 1 | 1: rows have partitions of their own number: as many as pages, before their last run in the layers below [`new_partitions`](Entry::new_partitions), else after it. 0: not read |
/// | `always`, `mark_words` | `[rows of all requests, mark_words]`, as `forced` of [`select`](super::select()); 0 words if there are none, which are not read then | partitions that are read in any case: they have logits, but no part in the statistics |
/// | `logits` | `[batch * kv_heads, group, stride]` | of partition `first_partition + i` at `i` |
/// | `statistics` | `[batch * kv_heads, group, tiles, 2]` | of a tile the greatest logit, and the sum of e^(logit - greatest) |
///
/// `summary_words` is `head_words`, twice that with `bounds`. A logit is `scale` times the dot product, with `bounds` times the
/// greatest that
/// a key within the bounds could have; products are exact, sums in f32 in an order of the hardware's. Nothing is written beyond a
/// row's partitions, or for an entry that only fills the batch.
///
/// # Mapping
/// A block has a tile of a row; a warp takes 16 partitions at a time through the tensor cores, against 8 query heads or twice 8,
/// filled up with zeroes. Summaries are read once and nothing is done to them on the way, so the kernel is as fast as memory if enough
/// of it is in flight, also while tensor cores work: each warp has a ring of [`STAGES`] chunks of 4 KiB in shared memory, filled by
/// asynchronous copies (what was loaded into registers instead had to be waited for where the loop carries it over: 0.76 of the
/// bandwidth). Copies are of whole lines of 128 bytes, which is all that the L2 is fast at. Lane `l` multiplies words `l % 4`,
/// `l % 4 + 4`, … of partitions `l / 4` and `l / 4 + 8`. The elements of a word then lie where the tensor cores want elements far
/// apart; the queries' words are laid
/// out in the same way, and a dot product does not mind.
///
/// For bounds, `max(q * least, q * greatest)` is `min(q, 0) * least + max(q, 0) * greatest`: a dot product of twice the length.
///
/// # Launch
/// `batch * kv_heads * tiles` blocks of [`BLOCK`] threads, with
/// [`shared_bytes`](crate::abi::score::shared_bytes) of shared memory.
///
/// # Safety
/// The views have the shapes above, `summary_words` is at most [`MAX_SUMMARY_WORDS`](crate::abi::score::MAX_SUMMARY_WORDS), and the
/// directories name segments that exist.
#[kernel(collectives(barrier = 3, mma = 24, shuffle = 37))]
pub unsafe fn score(
    entries: Global<U32x4>,
    directories: Global<u32>,
    summaries: Global<U32x4>,
    queries: Global<U32x4>,
    kv_heads: u32,
    group: u32,
    head_words: u32,
    bounds: u32,
    segment_partitions: u32,
    request_rows: u32,
    layer: u32,
    scale: f32,
    stride: u32,
    tiles: u32,
    row_pages: Global<u32>,
    counted: u32,
    always: Global<u32>,
    mark_words: u32,
    logits: GlobalMut<f32>,
    statistics: GlobalMut<f32>,
) {
    let (row, of_row) = (thread::block_idx_x() / tiles, thread::block_idx_x() % tiles);
    let entry = Entry::load(entries, row / kv_heads);
    let partitions =
        RowPartitions { row_pages, counted }.of(&entry, layer, layer * kv_heads + row % kv_heads);
    let tile = tile(partitions, tiles);
    let first = of_row * tile;
    if entry.tokens == 0 || first >= partitions {
        chain();
        return;
    }
    let end = (first + tile).min(partitions);
    let summary_words = head_words << bounds;
    let head_row = (row * group) as usize;
    let (warp, lane) = (thread::thread_idx_x() / WARP, warp::lane_id());
    let (lane_row, lane_word) = (lane / 4, lane % 4);
    let logits = logits.slice(head_row * stride as usize, (group * stride) as usize);
    let summaries = summaries.rows(summary_words as usize);
    let request_row = layer * kv_heads + row % kv_heads;

    // Lane `l` has the marks of the tile's partitions from `32 l` on.
    let mut marks = 0;
    if mark_words != 0 && first + 32 * lane < end {
        let of_row = (entry.first_marks + request_row) as usize * mark_words as usize;
        marks = always.load(of_row + (first / 32 + lane) as usize);
    }

    // Which of all summaries is that of the partition that this lane asks for, the `lane % 16`-th of 16: followed from one to the next, since a division is as
    // long as the rest of a copy. Beyond the tile it stays where it was, and nobody asks for what comes of it.
    let lane_first = (first + warp * ROWS + lane % ROWS).min(end - 1) + entry.first_partition;
    let (mut segment, mut within) = (lane_first / segment_partitions, lane_first % segment_partitions);
    let segment_start = |segment: u32| {
        let segment = directories.load((entry.directory + segment) as usize);
        (segment * request_rows + request_row) * segment_partitions
    };
    let mut start = segment_start(segment);

    // A warp's summaries pass through its ring in chunks of 16 rows and 16 words, which are asked for long before they are multiplied,
    // the first of them before the queries.
    let chunks = summary_words.div_ceil(CHUNK);
    let after = |(at, chunk)| if chunk + 1 == chunks { (at + WARPS * ROWS, 0) } else { (at, chunk + 1) };
    let mut ask = |(at, chunk), stage| {
        if at < end {
            copy_chunk(stage_at(stage), summaries, start + within, chunk, summary_words);
        }
        commit_group();
        if chunk + 1 == chunks && at + WARPS * ROWS + lane % ROWS < end {
            within += WARPS * ROWS;
            if within >= segment_partitions {
                segment += within / segment_partitions;
                within %= segment_partitions;
                start = segment_start(segment);
            }
        }
    };
    let (mut at, mut chunk) = (first + warp * ROWS, 0);
    let (mut asked, mut stage) = ((at, chunk), 0);
    while stage < STAGES - 1 {
        ask(asked, stage);
        asked = after(asked);
        stage += 1;
    }
    // The launch before may have made the queries, but no summary, list or mark.
    chain();
    let queries = queries.slice(head_row * head_words as usize, (group * head_words) as usize);
    let staged = stage_queries(queries, group, head_words, summary_words);
    thread::sync_threads();

    // Of the heads whose logits this lane gets: 2 t and 2 t + 1, and the same of the second eight.
    let mut maxima = [f32::NEG_INFINITY; 4];
    let mut sums = [0.0_f32; 4];
    let mut products = [0.0; 8];
    while at < end {
        let last = chunk + 1 == chunks;
        wait_group::<{ STAGES - 2 }>();
        // All lanes' copies are here then, and nobody reads the stage that is filled next any more.
        warp::sync_warp(FULL_MASK);
        // What is asked for now goes where the chunk before this one was.
        ask(asked, stage);
        asked = after(asked);
        stage = if stage + 1 == STAGES { 0 } else { stage + 1 };
        let first_query = place_of_query(chunk * CHUNK + lane_word, lane_row);
        // The same for all lanes, and not to be found out at each product.
        products = if group <= HEADS {
            multiplied::<1>(products, stage_at(stage), staged, first_query)
        } else {
            multiplied::<2>(products, stage_at(stage), staged, first_query)
        };
        // Of this lane's two partitions.
        let mut left_out = [false; 2];
        if last && mark_words != 0 {
            let marks =
                warp_shuffle_idx(FULL_MASK, marks, (at - first) / 32, WARP_SIZE) >> (at % 32 + lane_row);
            left_out = [marks & 1 != 0, marks >> 8 & 1 != 0];
        }
        let mut column = 0;
        while last && column < 4 {
            let head = column as u32 / 2 * HEADS + 2 * lane_word + column as u32 % 2;
            if head < group {
                let place = column / 2 * 4 + column % 2;
                let (low, high) = (products[place] * scale, products[place + 2] * scale);
                let logits = logits.slice((head * stride) as usize, stride as usize);
                let (low, high) = (
                    store_within(logits, at + lane_row, end, low),
                    store_within(logits, at + lane_row + 8, end, high),
                );
                let low = if left_out[0] { f32::NEG_INFINITY } else { low };
                let high = if left_out[1] { f32::NEG_INFINITY } else { high };
                let greatest = max(maxima[column], max(low, high));
                let shift = shift_of(greatest);
                sums[column] =
                    sums[column] * exp(maxima[column] - shift) + exp(low - shift) + exp(high - shift);
                maxima[column] = greatest;
            }
            column += 1;
        }
        if last {
            products = [0.0; 8];
        }
        (at, chunk) = after((at, chunk));
    }

    let mut column = 0;
    while column < 4 {
        let (greatest, sum) = over_rows(maxima[column], sums[column]);
        let head = column as u32 / 2 * HEADS + 2 * lane_word + column as u32 % 2;
        if lane_row == 0 {
            Scratch::maxima().store((warp * MAX_GROUP + head) as usize, greatest);
            Scratch::sums().store((warp * MAX_GROUP + head) as usize, sum);
        }
        column += 1;
    }
    thread::sync_threads();
    let head = thread::thread_idx_x();
    if head < group {
        let (greatest, sum) = over_warps(head);
        let place = ((row * group + head) as usize * tiles as usize + of_row as usize) * 2;
        statistics.store(place, greatest);
        statistics.store(place + 1, sum);
    }
}

/// Where word `word` of a head's query is: a word of all heads after another, turned about so that lanes side by side, with four words
/// of two heads, read from all banks.
#[inline(always)]
fn place_of_query(word: u32, head: u32) -> u32 {
    word * MAX_GROUP + (head ^ (2 * (word % 4)))
}

/// Puts the group's queries into shared memory; zeroes for heads and words that are none.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
unsafe fn stage_queries(
    queries: Global<U32x4>,
    group: u32,
    head_words: u32,
    summary_words: u32,
) -> Shared<U32x4> {
    let words = summary_words.next_multiple_of(CHUNK) * MAX_GROUP;
    let all = shared::dynamic(Scratch::BYTES, words as usize);
    let mut place = thread::thread_idx_x();
    while place < words {
        let (word, head) = (place / MAX_GROUP, place % MAX_GROUP);
        let mut staged = U32x4::default();
        if head < group && word < summary_words {
            let U32x4 { x, y, z, w } = queries.load((head * head_words + word % head_words) as usize);
            // With bounds the first half of a summary meets what is negative of the query, the second what is positive.
            staged = if summary_words == head_words {
                U32x4 { x, y, z, w }
            } else {
                let flip = if word < head_words { 0 } else { u32::MAX };
                U32x4 {
                    x: x & negatives(x ^ flip),
                    y: y & negatives(y ^ flip),
                    z: z & negatives(z ^ flip),
                    w: w & negatives(w ^ flip),
                }
            };
        }
        all.store(place_of_query(word, head) as usize, staged);
        place += BLOCK;
    }
    all
}

/// All bits of those of a word's two bf16 that have their sign set.
#[inline(always)]
fn negatives(pair: u32) -> u32 {
    (pair >> 15 & 0x0001_0001) * 0xffff
}

/// A stage of this warp's ring: `[16 rows, 16 words]`.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
unsafe fn stage_at(stage: u32) -> Shared<U32x4> {
    let first = (stage * WARPS + thread::thread_idx_x() / WARP) * ROWS * CHUNK;
    Scratch::ring().slice(first as usize, (ROWS * CHUNK) as usize)
}

/// Where a word of a row is in a stage: of odd rows the words are turned about, so that the eight lanes that read at once, with four
/// words of two rows, read from all banks.
#[inline(always)]
fn place_in_stage(row: u32, word: u32) -> usize {
    (row * CHUNK + (word ^ (4 * (row % 2)))) as usize
}

/// Starts copying a chunk of 16 summaries, of which lane `l` knows that of row `l % 16`; zeroes beyond a summary's end. Each eight lanes
/// copy 128 bytes of a row.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
unsafe fn copy_chunk(
    stage: Shared<U32x4>,
    summaries: Rows<U32x4>,
    own_summary: u32,
    chunk: u32,
    summary_words: u32,
) {
    let (lane_row, lane_word) = (warp::lane_id() / 8, warp::lane_id() % 8);
    let mut step = 0;
    while step < ROWS / 4 {
        let row = lane_row + 4 * step;
        let summary = summaries.row(warp_shuffle_idx(FULL_MASK, own_summary, row, WARP_SIZE) as usize);
        let mut half = 0;
        while half < CHUNK / 8 {
            let in_chunk = lane_word + 8 * half;
            let word = chunk * CHUNK + in_chunk;
            let place = place_in_stage(row, in_chunk);
            copy_async_or_zero(stage, place, summary, word as usize, word < summary_words);
            half += 1;
        }
        step += 1;
    }
}

/// Adds the dot products of a chunk of 16 summaries with the queries, of which this lane's begin at `first_query`. The first four are
/// of the first eight heads, as [`mma_m16n8k16_bf16`] gives them, the other four of the second eight.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
unsafe fn multiplied<const EIGHTS: u32>(
    products: [f32; 8],
    stage: Shared<U32x4>,
    queries: Shared<U32x4>,
    first_query: u32,
) -> [f32; 8] {
    let [a, b, c, d, e, f, g, h] = products;
    let mut sums = [[a, b, c, d], [e, f, g, h]];
    let (lane_row, lane_word) = (warp::lane_id() / 4, warp::lane_id() % 4);
    let mut step = 0;
    while step < CHUNK / 4 {
        let low = stage.load(place_in_stage(lane_row, lane_word + 4 * step));
        let high = stage.load(place_in_stage(lane_row + 8, lane_word + 4 * step));
        let first_query = first_query + 4 * step * MAX_GROUP;
        let mut eight = 0;
        while eight < EIGHTS {
            let query = queries.load((first_query + eight * HEADS) as usize);
            let sums = &mut sums[eight as usize];
            *sums = mma_m16n8k16_bf16([low.x, high.x, low.y, high.y], [query.x, query.y], *sums);
            *sums = mma_m16n8k16_bf16([low.z, high.z, low.w, high.w], [query.z, query.w], *sums);
            eight += 1;
        }
        step += 1;
    }
    let [[a, b, c, d], [e, f, g, h]] = sums;
    [a, b, c, d, e, f, g, h]
}

/// Writes a logit if it is within the tile; else it counts as negative infinity.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
unsafe fn store_within(logits: GlobalMut<f32>, at: u32, end: u32, logit: f32) -> f32 {
    if at < end {
        logits.store(at as usize, logit);
        logit
    } else {
        f32::NEG_INFINITY
    }
}

/// A column's statistics over the eight lanes that have rows of it.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
unsafe fn over_rows(own: f32, sum: f32) -> (f32, f32) {
    let mut greatest = own;
    let mut distance = 4;
    while distance < WARP {
        greatest = max(greatest, warp_shuffle_xor(FULL_MASK, greatest, distance, WARP_SIZE));
        distance *= 2;
    }
    let mut sum = sum * exp(own - shift_of(greatest));
    let mut distance = 4;
    while distance < WARP {
        sum += warp_shuffle_xor(FULL_MASK, sum, distance, WARP_SIZE);
        distance *= 2;
    }
    (greatest, sum)
}

/// A head's statistics over all warps.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
unsafe fn over_warps(head: u32) -> (f32, f32) {
    let (maxima, sums) = (Scratch::maxima(), Scratch::sums());
    let mut greatest = f32::NEG_INFINITY;
    let mut place = head;
    while place < WARPS * MAX_GROUP {
        greatest = max(greatest, maxima.load(place as usize));
        place += MAX_GROUP;
    }
    let shift = shift_of(greatest);
    let mut sum = 0.0;
    let mut place = head;
    while place < WARPS * MAX_GROUP {
        sum += sums.load(place as usize) * exp(maxima.load(place as usize) - shift);
        place += MAX_GROUP;
    }
    (greatest, sum)
}
