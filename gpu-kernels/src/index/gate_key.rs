use cuda_std::bf16;
use cuda_std::math::{max, min};
use cuda_std::prelude::*;

use super::operator::Mean;
use super::prompts::Summaries;
use crate::abi::Entry;
use crate::abi::gate::BLOCK;
use crate::chain::chain;
use crate::gate::{Gate, Scratch, TurnBack};
use crate::model::elements::word_of_quad;
use crate::ragged::request_of;

/// The gate key of each chunk (SeerAttention-R, arXiv 2506.08889): summaries of a ragged batch of prompts, one layer.
///
/// Keys are turned back at their positions; of each channel the greatest, the least and the mean are projected by the row's weights, normed
/// if there are norms, and turned to the chunk's first token.
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `keys` | `[tokens, kv_heads, head_dim / 2]` u32 | bf16 keys, finite, of all requests, end to end; two a number |
/// | `entries`, `first_token`, `first_chunk`, `directories`, `requests`, `first_row`, `request_rows`, `kv_heads`, `chunk_tokens`, `segment_partitions` | | as for [`chunk_mean`](super::chunk_mean()) |
/// | `head_words` | 8 or 16 | head dim / 8 |
/// | `frequencies` | `[head_dim / 2]` | by which keys were turned, in radians a position |
/// | `shrink` | | 1 / the magnitude of that |
/// | `weights` | `[request_rows, 3 * head_words, rank]` words | bf16: of the eight inputs of a word to one output; inputs are the greatest, the least, the mean |
/// | `rank` | a multiple of 16 up to 256 | outputs |
/// | `norm` | `[layers, rank]`, if `norms`, else anything | the norm's weights |
/// | `norms`, `eps` | 0 or 1 | |
/// | `gate_frequencies`, `gate_magnitude` | `[rank / 2]` | by which gate keys turn |
/// | `summaries` | `[segments, request_rows, segment_partitions, rank / 8]` words | bf16 gate keys |
///
/// Arithmetic is f32, rounded once; sums run over the tokens in 8 (heads of 128) or 16 interleaved parts, over the inputs in
/// 256 / `rank` ones.
///
/// # Mapping
/// A block has a chunk of a KV head. A thread takes two channels of each half of the head, which turn together, of every 8th or 16th token;
/// then it has an output, and every so many-th word of its inputs. Blocks of one KV head stand together, so that multiprocessors find its
/// weights in their L1.
///
/// # Launch
/// `chunks * kv_heads` blocks of [`BLOCK`] threads, with [`SHARED_BYTES`](crate::abi::gate::SHARED_BYTES) of shared memory.
///
/// # Safety
/// As for [`chunk_mean`](super::chunk_mean()), with the shapes above; positions are below 2^20, and so are their angles.
#[kernel(collectives(barrier = 5, shuffle = 5))]
pub unsafe fn gate_key(
    keys: Global<u32>,
    entries: Global<U32x4>,
    first_token: Global<u32>,
    first_chunk: Global<u32>,
    directories: Global<u32>,
    requests: u32,
    first_row: u32,
    request_rows: u32,
    kv_heads: u32,
    head_words: u32,
    chunk_tokens: u32,
    segment_partitions: u32,
    frequencies: Global<f32>,
    shrink: f32,
    weights: Global<U32x4>,
    rank: u32,
    norm: Global<f32>,
    norms: u32,
    eps: f32,
    gate_frequencies: Global<f32>,
    gate_magnitude: f32,
    summaries: GlobalMut<U32x4>,
) {
    let chunks = first_chunk.load(requests as usize);
    let block = thread::block_idx_x();
    let (chunk, head) = (block % chunks, block / chunks);
    let request = request_of(first_chunk, requests, chunk);
    let entry = Entry::load(entries, request);
    let partition = entry.new_partition + (chunk - first_chunk.load(request as usize));
    let width = rank / 8;
    let table =
        Summaries { directories, first_row, request_rows, segment_partitions, head_words: width, summaries };
    let gate = Gate {
        weights: weights.rows((3 * head_words * rank) as usize).row((first_row + head) as usize),
        input_words: 3 * head_words,
        rank,
        norm,
        layer: first_row / kv_heads,
        norms: norms != 0,
        eps,
        frequencies: gate_frequencies,
        magnitude: gate_magnitude,
    };
    let back = TurnBack { frequencies, shrink };
    let (first, head_pairs) = (partition * chunk_tokens, 4 * head_words);
    let token = first_token.load(request as usize) + first;
    let keys = keys.rows((kv_heads * head_pairs) as usize);
    pool(back, head_words, chunk_tokens, first, |next, pair| {
        keys.row((token + next) as usize).load((head * head_pairs + pair) as usize)
    });
    gate.apply(first, table.of::<Mean>(&entry, head, partition));
}

/// The gate key of each partition that leaves the steady zone in a decode step, one layer.
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `entries`, `steady`, `directories`, `page_tokens`, `partition_tokens` | | as for [`chunk_mean_step`](super::chunk_mean_step()) |
/// | `pool` | `[pages, 2, page_tokens, head_dim / 2]` u32 | GPU pages: keys, then values |
/// | all others | | as for [`gate_key`] |
///
/// The same bits as [`gate_key`] gives for the same keys.
///
/// # Mapping
/// A block has a KV head of an entry. In most steps nothing leaves, and it ends.
///
/// # Launch
/// `batch * kv_heads` blocks of [`BLOCK`] threads, with [`SHARED_BYTES`](crate::abi::gate::SHARED_BYTES) of shared memory.
///
/// # Safety
/// As for [`chunk_mean_step`](super::chunk_mean_step()) and [`gate_key`].
#[kernel(collectives(barrier = 5, shuffle = 5))]
pub unsafe fn gate_key_step(
    entries: Global<U32x4>,
    steady: Global<u32>,
    pool: Global<u32>,
    directories: Global<u32>,
    first_row: u32,
    request_rows: u32,
    kv_heads: u32,
    head_words: u32,
    page_tokens: u32,
    partition_tokens: u32,
    segment_partitions: u32,
    frequencies: Global<f32>,
    shrink: f32,
    weights: Global<U32x4>,
    rank: u32,
    norm: Global<f32>,
    norms: u32,
    eps: f32,
    gate_frequencies: Global<f32>,
    gate_magnitude: f32,
    summaries: GlobalMut<U32x4>,
) {
    chain();
    let block = thread::block_idx_x();
    let (entry, head) = (Entry::load(entries, block / kv_heads), block % kv_heads);
    if entry.tokens == 0 {
        return;
    }
    let width = rank / 8;
    let table =
        Summaries { directories, first_row, request_rows, segment_partitions, head_words: width, summaries };
    let gate = Gate {
        weights: weights.rows((3 * head_words * rank) as usize).row((first_row + head) as usize),
        input_words: 3 * head_words,
        rank,
        norm,
        layer: first_row / kv_heads,
        norms: norms != 0,
        eps,
        frequencies: gate_frequencies,
        magnitude: gate_magnitude,
    };
    let back = TurnBack { frequencies, shrink };
    let (row, head_pairs) = (first_row + head, 4 * head_words);
    let pages = pool.rows((2 * page_tokens * head_pairs) as usize);
    let mut at = 0;
    while at < entry.new_partitions {
        let partition = entry.new_partition + at;
        let first = partition * partition_tokens;
        self::pool(back, head_words, partition_tokens, first, |next, pair| {
            let token = first + next;
            let page = steady.load(entry.steady_place(row, token / page_tokens) as usize);
            pages.row(page as usize).load((token % page_tokens * head_pairs + pair) as usize)
        });
        gate.apply(first, table.of::<Mean>(&entry, head, partition));
        at += 1;
    }
}

/// Writes the greatest, the least and the mean of the keys of `tokens` tokens, turned back from positions `first` and on, to the block's
/// inputs. `load` gives pair `pair` of token `next`. Who reads the inputs waits first.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
unsafe fn pool(back: TurnBack, head_words: u32, tokens: u32, first: u32, load: impl Fn(u32, u32) -> u32) {
    let (thread, head_dim) = (thread::thread_idx_x(), 8 * head_words);
    // Threads of a token: each has pair `lane` of the lower half and of the upper one.
    let lanes = head_dim / 4;
    let (lane, group, groups) = (thread % lanes, thread / lanes, BLOCK / lanes);
    let frequency = [0, 1].map(|at| 2 * lane + at);
    let frequency =
        [back.frequencies.load(frequency[0] as usize), back.frequencies.load(frequency[1] as usize)];
    let mut greatest = [f32::NEG_INFINITY; 4];
    let mut least = [f32::INFINITY; 4];
    let mut sums = [0.0; 4];
    let mut next = group;
    while next < tokens {
        let (low, high) = (bf16::unpack(load(next, lane)), bf16::unpack(load(next, lane + lanes)));
        let (a, c) = back.pair(frequency[0], first + next, low.0, high.0);
        let (b, d) = back.pair(frequency[1], first + next, low.1, high.1);
        let elements = [a, b, c, d];
        let mut at = 0;
        while at < 4 {
            greatest[at] = max(greatest[at], elements[at]);
            least[at] = min(least[at], elements[at]);
            sums[at] += elements[at];
            at += 1;
        }
        next += groups;
    }
    let pooled = Scratch::pooled();
    let place = |kind: u32, channel: u32| ((group * 3 + kind) * head_dim + channel) as usize;
    let mut at = 0;
    while at < 4 {
        let channel = 2 * lane + at % 2 + at / 2 * (head_dim / 2);
        pooled.store(place(0, channel), greatest[at as usize]);
        pooled.store(place(1, channel), least[at as usize]);
        pooled.store(place(2, channel), sums[at as usize]);
        at += 1;
    }
    thread::sync_threads();
    let quads = head_dim / 4;
    if thread < 3 * quads {
        let (kind, channel) = (thread / quads, thread % quads * 4);
        let merge = |a: f32, b: f32| match kind {
            0 => max(a, b),
            1 => min(a, b),
            _ => a + b,
        };
        let load = |group: u32, at: u32| pooled.load(((group * 3 + kind) * head_dim + channel + at) as usize);
        let mut four = [load(0, 0), load(0, 1), load(0, 2), load(0, 3)];
        let mut group = 1;
        while group < groups {
            let next = [load(group, 0), load(group, 1), load(group, 2), load(group, 3)];
            four = [
                merge(four[0], next[0]),
                merge(four[1], next[1]),
                merge(four[2], next[2]),
                merge(four[3], next[3]),
            ];
            group += 1;
        }
        if kind == 2 {
            let share = 1.0 / tokens as f32;
            four = four.map(|sum| sum * share);
        }
        Scratch::inputs().store(thread as usize, word_of_quad(four));
    }
}
