use cuda_std::math::max;
use cuda_std::prelude::*;
use cuda_std::warp::{FULL_MASK, WARP_SIZE, warp_max, warp_shuffle_xor};
use cuda_std::{U32x4, bf16, shared_layout};

use crate::abi::attend::{HEADS, blocks_of_group};
use crate::abi::estimate::{BLOCK, SHARED_BYTES, TILE};
use crate::abi::{Entry, WARP};
use crate::index::cluster::{Channels, Table, channels, f32_words, of_f32_words, of_groups};
use crate::softmax::{exp, ln};
use crate::unroll::unrolled;

shared_layout! {
    /// What the warps hand to each other.
    struct Scratch {
        // [tile, heads]
        weights: [f32; 512],
        // [tile]: where a partition's numbers lie.
        places: [u32; 64],
        // [warps, heads]
        maxima: [f32; 64],
        sums: [f32; 64],
        // [warps, heads, 2 * head_words]: outputs, four channels a word.
        outputs: [U32x4; 2048],
    }
}

const WARPS: u32 = BLOCK / WARP;
const _: () = assert!(512 == TILE * HEADS && 64 == TILE && 64 == WARPS * HEADS && 2048 == WARPS * HEADS * 32);
const _: () = assert!(Scratch::BYTES == SHARED_BYTES as usize, "as the host has it");

/// Attention over what stands for partitions that are not read (RetroInfer, arXiv 2505.02922): one token each, whose key is the mean key, whose value is
/// the mean value, and which counts as often as the partition has tokens. Put together with what [`attend`](super::attend_128()) found. One layer.
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `entries` | `[batch]` [`Entry`] in words | |
/// | `kv_heads`, `group` | at least 1; 1 to 16 | KV heads, and query heads of each |
/// | `head_words` | 8 or 16 | head dim / 8 |
/// | `ids`, `counts` | `[batch * kv_heads, capacity]`, `[batch * kv_heads]` | partitions that are estimated; more than `capacity` count as `capacity` |
/// | `capacity` | | |
/// | `logits`, `stride` | as [`score`](crate::select::score()) wrote them | of partition `first_partition + i` at `i` |
/// | `directories` | as the entries say | the segment of partition `p`: at `directory + p / segment_partitions` |
/// | `first_row`, `request_rows`, `segment_partitions` | | as for [`cluster_means`](crate::index::cluster::cluster_means()) |
/// | `partition_tokens` | `[segments, request_rows, segment_partitions]` | at least 1 |
/// | `value_means` | as `partition_tokens`, of `head_words` words | bf16 |
/// | `outputs` | `[batch, kv_heads * group, head_words]` words | bf16. In: of what is read; out: of both |
/// | `lse` | `[batch, kv_heads * group]` | the natural logarithm of the sum of e^logit, likewise |
///
/// A row that estimates nothing stays as it is. Sums are in f32.
///
/// # Mapping
/// A block has up to 8 query heads of a row. It walks the estimates twice: for the greatest logit, then by tiles of [`TILE`], whose weights the threads make,
/// and whose values they add: a lane has a word of a value, for all heads. Warps' sums are put together at the end.
///
/// # Launch
/// `batch * kv_heads *` [`blocks_of_group`] blocks of [`BLOCK`] threads, with [`SHARED_BYTES`] of shared memory.
///
/// # Safety
/// The views have the shapes above; the directories name the segments of the ids; `lse` is finite.
#[kernel(collectives(barrier = 4, shuffle = 112))]
pub unsafe fn estimate(
    entries: Global<U32x4>,
    kv_heads: u32,
    group: u32,
    head_words: u32,
    ids: Global<u32>,
    counts: Global<u32>,
    capacity: u32,
    logits: Global<f32>,
    stride: u32,
    directories: Global<u32>,
    first_row: u32,
    request_rows: u32,
    segment_partitions: u32,
    partition_tokens: Global<u32>,
    value_means: Global<U32x4>,
    outputs: GlobalMut<U32x4>,
    lse: GlobalMut<f32>,
) {
    let (unit, thread) = (thread::block_idx_x(), thread::thread_idx_x());
    let (row, eight) = (unit / blocks_of_group(group), unit % blocks_of_group(group));
    let entry = Entry::load(entries, row / kv_heads);
    let count = counts.load(row as usize).min(capacity);
    if entry.tokens == 0 || count == 0 {
        return;
    }
    let (warp, lane) = (thread / WARP, warp::lane_id());
    let heads = (group - eight * HEADS).min(HEADS);
    let first_head = row * group + eight * HEADS;
    let ids = ids.rows(capacity as usize).row(row as usize);
    let logits = logits.slice((first_head * stride) as usize, (heads * stride) as usize);
    let table =
        Table { directories, directory: entry.directory, first_row, request_rows, segment_partitions };
    let value_means = value_means.rows(head_words as usize);
    let logit = |head: u32, id: u32| logits.load((head * stride + id - entry.first_partition) as usize);
    let (weights, places) = (Scratch::weights(), Scratch::places());

    // The greatest of each head, in every thread.
    let mut greatest = [f32::NEG_INFINITY; HEADS as usize];
    let mut at = thread;
    while at < count {
        let id = ids.load(at as usize);
        let tokens = ln(partition_tokens.load(table.place(row % kv_heads, id)) as f32);
        unrolled!(head < 8, {
            if (head as u32) < heads {
                greatest[head] = max(greatest[head], logit(head as u32, id) + tokens);
            }
        });
        at += BLOCK;
    }
    unrolled!(head < 8, {
        let of_warp = warp_max(greatest[head]);
        if lane == 0 {
            Scratch::maxima().store((warp * HEADS) as usize + head, of_warp);
        }
    });
    thread::sync_threads();
    let greatest_of = |head: u32| {
        let mut greatest = f32::NEG_INFINITY;
        let mut warp = 0;
        while warp < WARPS {
            greatest = max(greatest, Scratch::maxima().load((warp * HEADS + head) as usize));
            warp += 1;
        }
        greatest
    };
    // Of the two heads whose weights this thread makes.
    let pair = 2 * (thread % 4);
    let of_pair = [greatest_of(pair), greatest_of(pair + 1)];

    let (word, lane_group, groups) = (lane % head_words, lane / head_words, WARP / head_words);
    let mut sums = [0.0_f32; HEADS as usize];
    let mut products = [[0.0_f32; 8]; HEADS as usize];
    let mut first = 0;
    while first < count {
        let tile = (count - first).min(TILE);
        let at = thread / 4;
        if at < tile {
            let id = ids.load((first + at) as usize);
            let place = table.place(row % kv_heads, id);
            let tokens = ln(partition_tokens.load(place) as f32);
            let mut of = 0;
            while of < 2 {
                let head = pair + of;
                if head < heads {
                    let weight = exp(logit(head, id) + tokens - of_pair[of as usize]);
                    weights.store((at * HEADS + head) as usize, weight);
                }
                of += 1;
            }
            if pair == 0 {
                places.store(at as usize, place as u32);
            }
        }
        thread::sync_threads();
        let mut at = warp * groups + lane_group;
        while at < tile {
            let place = places.load(at as usize);
            let value = value_means.row(place as usize).load_with(word as usize, LoadCache::ReadOnly);
            let value = channels(value);
            unrolled!(head < 8, {
                if (head as u32) < heads {
                    let weight = weights.load((at * HEADS) as usize + head);
                    sums[head] += weight;
                    add(&mut products[head], weight, value);
                }
            });
            at += WARPS * groups;
        }
        thread::sync_threads();
        first += TILE;
    }

    // Over the lanes that have the same word; then over warps.
    let out = Scratch::outputs();
    unrolled!(head < 8, {
        let total = of_groups(products[head], head_words);
        sums[head] = sum_of_groups(sums[head], head_words);
        if lane_group == 0 {
            let place = ((warp * HEADS + head as u32) * head_words + word) * 2;
            let [low, high] = f32_words(total);
            out.store(place as usize, low);
            out.store(place as usize + 1, high);
        }
        if lane == 0 {
            Scratch::sums().store((warp * HEADS) as usize + head, sums[head]);
        }
    });
    // What is read of `lse` is so before any thread writes it.
    let (head, word) = (thread / head_words, thread % head_words);
    let read = if head < heads { lse.as_global().load((first_head + head) as usize) } else { 0.0 };
    thread::sync_threads();
    if head >= heads {
        return;
    }
    let mut sum = 0.0;
    let mut total = [0.0_f32; 8];
    let mut warp = 0;
    while warp < WARPS {
        sum += Scratch::sums().load((warp * HEADS + head) as usize);
        let place = ((warp * HEADS + head) * head_words + word) * 2;
        add(&mut total, 1.0, of_f32_words(out.load(place as usize), out.load(place as usize + 1)));
        warp += 1;
    }
    let greatest = greatest_of(head);
    let estimated = greatest + ln(sum);
    let highest = max(read, estimated);
    let both = highest + ln(exp(read - highest) + exp(estimated - highest));
    let (of_read, of_estimates) = (exp(read - both), exp(greatest - both));
    let outputs = outputs.rows(head_words as usize).row((first_head + head) as usize);
    let before = outputs.as_global().load(word as usize);
    let merged = |before: u32, at: usize| {
        let (low, high) = bf16::unpack(before);
        bf16::pack(of_read * low + of_estimates * total[at], of_read * high + of_estimates * total[at + 1])
    };
    outputs.store(
        word as usize,
        U32x4 {
            x: merged(before.x, 0),
            y: merged(before.y, 2),
            z: merged(before.z, 4),
            w: merged(before.w, 6),
        },
    );
    if word == 0 {
        lse.store((first_head + head) as usize, both);
    }
}

/// Adds `weight` times `value`.
#[inline(always)]
fn add(sums: &mut Channels, weight: f32, value: Channels) {
    let mut channel = 0_usize;
    while channel < 8 {
        sums[channel] += weight * value[channel];
        channel += 1;
    }
}

/// The sum over lanes that have the same word of a head of `lanes` words.
///
/// # Safety
/// All lanes of the warp are here.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
unsafe fn sum_of_groups(mut sum: f32, lanes: u32) -> f32 {
    let mut distance = lanes;
    while distance < WARP {
        sum += warp_shuffle_xor(FULL_MASK, sum, distance, WARP_SIZE);
        distance *= 2;
    }
    sum
}
