use cuda_std::prelude::*;
use cuda_std::shared;
use cuda_std::warp::{warp_max, warp_sum};

use super::order::{Keys, Scratch, Span, Walk, clear_bins, descend, key_of, list, score_of};
use crate::abi::score::{MAX_GROUP, tile};
use crate::abi::select::{
    FORCED_KEY, KEYS_A_QUAD, LEAST_BLOCK, MASKED_KEY, MERGE_MAX, MERGE_MEAN, WEIGHT_OF_ONE,
};
use crate::abi::{Entry, WARP};
use crate::chain::chain;
use crate::ragged::RowPartitions;
use crate::softmax::{exp, ln, shift_of};

const _: () = assert!(MAX_GROUP * WARP <= LEAST_BLOCK, "each head has a warp");

/// Selects partitions by their logits: the query heads of each KV head are merged, and the greatest scores win.
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `entries` | `[batch]` [`Entry`] | partitions, at most `stride`, and `limit`; more than `capacity` counts as `capacity` |
/// | `logits`, `statistics` | as `score` writes them; `logits` as words of 16 bytes | |
/// | `kv_heads`, `group` | 1 to 16 query heads of a KV head | |
/// | `stride` | a multiple of 4 | |
/// | `tiles` | tiles of a row in `statistics`, as `score` was given them, or 0 | each head's logits go through a softmax over the row's partitions first. 0: they are merged as they are, and `statistics` are not read |
/// | `merge` | [`MERGE_MAX`], [`MERGE_SUM`](crate::abi::select::MERGE_SUM), [`MERGE_MEAN`] | how the heads' scores become one |
/// | `least` | negative infinity for none | only partitions with at least this score are selected. With a softmax the greatest is taken of logarithms, and this is one too |
/// | `top_p` | 1 for all | only the fewest partitions whose scores reach this part of the sum of the scores |
/// | `forced`, `masked` | `[rows of all requests, words]`, those of a row at [`first_marks`](Entry::first_marks), bit `i % 32` of word `i / 32` for the partition `first_partition + i` | selected first, as far as the limit goes (whatever their score; `top_p` is of the others); never selected, forced or not |
/// | `forced_words`, `masked_words` | 0 if there are none, which are not read then | words of a row's |
/// | `first_row` | layer * `kv_heads` | row of KV head 0 in the marks |
/// | `row_pages`, `counted` | | as for [`score`](super::score()) |
/// | `estimates`, `share` | | how many more are wanted, the best of those not selected, without regard to `least` and `top_p`: `share` of the row's partitions, at most `estimates` |
/// | `resident` | a multiple of 4 | scores that the launch's shared memory has room for |
/// | `keys` | `[batch * kv_heads, stride]` u32 if `resident` is below `stride`, else anything | scratch of rows that are longer than `resident` |
/// | `capacity` | | ids that `ids` has room for in a row |
/// | `ids`, `selected` | `[batch * kv_heads, capacity]`, `[batch * kv_heads]` | partitions, ascending, and how many; of equal scores the lower ones |
/// | `estimated_ids`, `estimated` | `[batch * kv_heads, estimates]`, `[batch * kv_heads]` | the same of the estimates; not written if `estimates` is 0 |
///
/// A score that is NaN is greater than all others. For `top_p`, scores are made whole numbers, in units of 2^-26, rounded towards zero.
///
/// # Mapping
/// A block has a row. It reads the logits once and turns the merged scores into keys; the rest is as in [`top_k`](super::top_k()).
///
/// # Launch
/// `batch * kv_heads` blocks of [`block`](crate::abi::select::block) threads, with [`shared_bytes`](crate::abi::select::shared_bytes) of shared memory.
///
/// # Safety
/// The views have the shapes above, and with `top_p` below 1 the positive scores of a row add up to at most 32.
#[kernel(collectives(barrier = 18, reduce = 6, shuffle = 94))]
pub unsafe fn select(
    entries: Global<U32x4>,
    logits: Global<U32x4>,
    statistics: Global<f32>,
    kv_heads: u32,
    group: u32,
    stride: u32,
    tiles: u32,
    merge: u32,
    least: f32,
    top_p: f32,
    forced: Global<u32>,
    masked: Global<u32>,
    forced_words: u32,
    masked_words: u32,
    first_row: u32,
    row_pages: Global<u32>,
    counted: u32,
    estimates: u32,
    share: f32,
    resident: u32,
    keys: GlobalMut<U32x4>,
    capacity: u32,
    ids: GlobalMut<u32>,
    selected: GlobalMut<u32>,
    estimated_ids: GlobalMut<u32>,
    estimated: GlobalMut<u32>,
) {
    let row = thread::block_idx_x();
    let entry = Entry::load(entries, row / kv_heads);
    let partitions =
        RowPartitions { row_pages, counted }.of(&entry, first_row / kv_heads, first_row + row % kv_heads);
    let (row_quads, quads) = ((stride / KEYS_A_QUAD) as usize, partitions.div_ceil(KEYS_A_QUAD));
    let resident_here = partitions <= resident;
    let keys = Keys {
        shared: shared::dynamic(Scratch::BYTES, (resident / KEYS_A_QUAD) as usize),
        global: if resident_here { keys } else { keys.rows(row_quads).row(row as usize) },
        resident: resident_here,
        quads,
    };
    // Scores are logarithms where only their order matters: small ones stay apart.
    let softmax = tiles != 0;
    let logarithmic = softmax && merge == MERGE_MAX;
    let by_weight = top_p < 1.0;
    let by_score = least != f32::NEG_INFINITY;

    let logits = logits.slice((row * group) as usize * row_quads, group as usize * row_quads);
    let five = |quad: u32, head: u32| five_heads(logits, row_quads, quad, quads, group, head);
    clear_bins();
    // The launch before writes logits and statistics.
    chain();
    // Asked for before what they are to be offset by is worked out.
    let mut quad = thread::thread_idx_x();
    let mut words = five(quad, 0);
    let head = thread::thread_idx_x() / WARP;
    if softmax && head < group && partitions > 0 {
        let of_head = (row * group + head) as usize * tiles as usize * 2;
        let written = partitions.div_ceil(tile(partitions, tiles));
        let offset = -log_sum(statistics.slice(of_head, 2 * tiles as usize), written);
        if warp::lane_id() == 0 {
            Scratch::offsets().store(head as usize, offset);
        }
    }
    thread::sync_threads();

    let marked_row = entry.first_marks + first_row + row % kv_heads;
    let mut span = Span::NONE;
    while quad < quads {
        let mut four = merged(words, |head| five(quad, head), group, softmax, merge);
        if merge == MERGE_MEAN {
            let share = 1.0 / group as f32;
            four = four.map(|score| score * share);
        }
        let first = quad * KEYS_A_QUAD;
        let always = marks_at(forced, forced_words, marked_row, first);
        let never = marks_at(masked, masked_words, marked_row, first);
        let mut of_quad = [MASKED_KEY; KEYS_A_QUAD as usize];
        let mut at = 0;
        while at < KEYS_A_QUAD {
            let score = if four[at as usize].is_nan() { NAN } else { four[at as usize] };
            let mut key = key_of(score);
            if always >> at & 1 != 0 {
                key = FORCED_KEY;
            }
            if never >> at & 1 != 0 || first + at >= partitions {
                key = MASKED_KEY;
            }
            span = span.with(key);
            of_quad[at as usize] = key;
            at += 1;
        }
        keys.store(quad, of_quad);
        quad += thread::block_dim_x();
        words = five(quad, 0);
    }

    let span = span.of_block();
    let mut target = entry.limit.min(capacity);
    if by_score {
        let least = key_of(least);
        target = target.min(keys.sum(|key| u32::from(key >= least)));
    }
    if by_weight {
        let weight = |key: u32| weight_of(key, logarithmic);
        let total = keys.sum(weight);
        if total > 0 {
            let part = ((total as f32 * top_p) as u32).clamp(1, total);
            let reached = descend::<false>(&keys, span, part, weight);
            target = target.min(keys.sum(|key| u32::from(key > reached.key)) + reached.ties);
        }
    }

    let lists = if estimates > 0 { 2 } else { 1 };
    let (mut of_list, mut but) = (0, Walk::NONE);
    let (mut ids, mut places, mut count) = (ids, capacity, selected);
    while of_list < lists {
        let threshold = descend::<true>(&keys, span, target, |_| 1);
        let ids_of_row = ids.rows(places as usize).row(row as usize);
        let (listed, walk) = list(&keys, threshold, but, entry.first_partition, ids_of_row);
        if thread::thread_idx_x() == 0 {
            count.store(row as usize, listed);
        }
        let more = estimates.min((partitions as f32 * share) as u32);
        (target, but) = (listed.saturating_add(more), walk);
        (ids, places, count) = (estimated_ids, estimates, estimated);
        of_list += 1;
        // The next descent's scan writes what this list's scan reads.
        thread::sync_threads();
    }
}

/// The one NaN that scores have.
const NAN: f32 = f32::from_bits(0x7fff_ffff);

/// The logarithm of the sum of e^logit over a row's tiles, by a warp, in every lane.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
unsafe fn log_sum(statistics: Global<f32>, tiles: u32) -> f32 {
    let (mut own, mut sum) = (f32::NEG_INFINITY, 0.0);
    let mut tile = warp::lane_id();
    while tile < tiles {
        let at = 2 * tile as usize;
        let (of_tile, sum_of_tile) = (statistics.load(at), statistics.load(at + 1));
        let greatest = cuda_std::math::max(own, of_tile);
        let shift = shift_of(greatest);
        sum = sum * exp(own - shift) + sum_of_tile * exp(of_tile - shift);
        own = greatest;
        tile += WARP;
    }
    let greatest = warp_max(own);
    greatest + ln(warp_sum(sum * exp(own - shift_of(greatest))))
}

/// The bits of a row's marks from that of partition `at` on, as far as its word goes; none of marks without words.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
unsafe fn marks_at(marks: Global<u32>, words: u32, row: u32, at: u32) -> u32 {
    if words == 0 { 0 } else { marks.load((row * words + at / 32) as usize) >> (at % 32) }
}

/// Heads whose words are in flight at a time: more would take more registers than 1,024 threads have.
const HEADS: usize = 5;

/// The logits of a quad, of five heads from `head` on; zeroes for quads and heads that are none. Spelled out, since LLVM would not unroll a loop of
/// this size and keep the words in local memory.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
unsafe fn five_heads(
    logits: Global<U32x4>,
    row_quads: usize,
    quad: u32,
    quads: u32,
    group: u32,
    head: u32,
) -> [U32x4; HEADS] {
    let load = |head: u32| {
        if quad < quads && head < group {
            // Not read-only: the launch before may still be writing them.
            logits.load(head as usize * row_quads + quad as usize)
        } else {
            U32x4::default()
        }
    };
    [load(head), load(head + 1), load(head + 2), load(head + 3), load(head + 4)]
}

/// Four partitions' scores, the heads' sum or maximum, by the words of the first five heads and of those from a head on.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
unsafe fn merged(
    first: [U32x4; HEADS],
    five: impl Fn(u32) -> [U32x4; HEADS],
    group: u32,
    softmax: bool,
    merge: u32,
) -> [f32; KEYS_A_QUAD as usize] {
    let merge = |before: [f32; KEYS_A_QUAD as usize], head: u32, word: U32x4| {
        if head >= group {
            return before;
        }
        let offset = if softmax { Scratch::offsets().load(head as usize) } else { 0.0 };
        let logits = word.to_array();
        let mut after = before;
        let mut at = 0;
        while at < after.len() {
            let logit = f32::from_bits(logits[at]);
            let score = if softmax { logit + offset } else { logit };
            after[at] = if merge == MERGE_MAX {
                // Not `max`, which would hide a NaN.
                if head == 0 || score > before[at] || score.is_nan() { score } else { before[at] }
            } else {
                let score = if softmax { exp(score) } else { score };
                if head == 0 { score } else { before[at] + score }
            };
            at += 1;
        }
        after
    };
    let (mut merged, mut words) = ([0.0; KEYS_A_QUAD as usize], first);
    let mut head = 0;
    loop {
        merged = merge(merged, head, words[0]);
        merged = merge(merged, head + 1, words[1]);
        merged = merge(merged, head + 2, words[2]);
        merged = merge(merged, head + 3, words[3]);
        merged = merge(merged, head + 4, words[4]);
        head += HEADS as u32;
        if head >= group {
            return merged;
        }
        words = five(head);
    }
}

/// What a key weighs for top-p. A score that is no positive number weighs nothing, nor does what is forced or masked.
#[inline(always)]
fn weight_of(key: u32, logarithmic: bool) -> u32 {
    if key == MASKED_KEY || key == FORCED_KEY {
        return 0;
    }
    let score = score_of(key);
    let score = if logarithmic { exp(score) } else { score };
    (score * WEIGHT_OF_ONE) as u32
}
