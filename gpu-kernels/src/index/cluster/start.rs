use cuda_std::prelude::*;
use cuda_std::shared;

use super::centroid::{Centroids, channels, of_f32_words};
use crate::abi::cluster::start::{BLOCK, CENTROIDS, MEAN_WORDS};
use crate::abi::cluster::{span_start, start_token, sums};

/// The mean of the keys of a run, and the centroids that k-means starts with: of each span centred keys at even distances.
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `keys`, `first`, `tokens` | | as for [`cluster_sums`](super::cluster_sums()) |
/// | `kv_heads` | at least 1 | |
/// | `head_words` | 8 or 16 | words of a key |
/// | `spans` | at most `tokens`; [`spans`](crate::abi::cluster::spans) | |
/// | `span_centroids` | a multiple of 8, at most the tokens of a span | |
/// | `sums` | `[parts, kv_heads, 2 * head_words]` words of f32 | what `cluster_sums` left |
/// | `means` | `[kv_heads, 2 * head_words]` words of f32 | |
/// | `centroids` | `[kv_heads, spans * span_centroids, head_words]` words | bf16; not normalised |
/// | `biases` | `[kv_heads, spans * span_centroids]` | less the product of mean and centroid |
///
/// Of the parts' sums, `BLOCK / (2 * head_words)` are added at a time: every so many-th in order, and then those.
///
/// # Mapping
/// A block has 64 centroids of a row; each adds up the mean, which is little, and the row's first one writes it. A lane has a word of a
/// centroid.
///
/// # Launch
/// [`grid`](crate::abi::cluster::start::grid) blocks of [`BLOCK`] threads, [`SHARED_BYTES`](crate::abi::cluster::start::SHARED_BYTES) of
/// shared memory.
///
/// # Safety
/// The views have the shapes above; nothing writes `keys` until the launch has ended.
#[kernel(collectives(barrier = 2, shuffle = 1))]
pub unsafe fn cluster_start(
    keys: Global<U32x4>,
    first: u32,
    tokens: u32,
    kv_heads: u32,
    head_words: u32,
    spans: u32,
    span_centroids: u32,
    sums: Global<U32x4>,
    means: GlobalMut<U32x4>,
    centroids: GlobalMut<U32x4>,
    biases: GlobalMut<f32>,
) {
    let row_centroids = spans * span_centroids;
    let blocks = row_centroids.div_ceil(CENTROIDS);
    let (head, block) = (thread::block_idx_x() / blocks, thread::block_idx_x() % blocks);
    let thread = thread::thread_idx_x();
    let partial = shared::dynamic::<U32x4>(0, BLOCK as usize);
    let mean = shared::dynamic::<U32x4>(BLOCK as usize * 16, MEAN_WORDS as usize);

    let mean_words = 2 * head_words;
    let (group, groups) = (thread / mean_words, BLOCK / mean_words);
    let own = (head * mean_words + thread % mean_words) as usize;
    let row = sums.rows((kv_heads * mean_words) as usize);
    let mut sum = [0.0_f32; 4];
    let mut part = group;
    while part < sums::parts(tokens) {
        add(&mut sum, row.row(part as usize).load(own));
        part += groups;
    }
    partial.store(thread as usize, word(sum));
    thread::sync_threads();
    if thread < mean_words {
        let mut sum = [0.0_f32; 4];
        let mut group = 0;
        while group < groups {
            add(&mut sum, partial.load((group * mean_words + thread) as usize));
            group += 1;
        }
        let scale = 1.0 / tokens as f32;
        let word = word(sum.map(|sum| sum * scale));
        mean.store(thread as usize, word);
        if block == 0 {
            means.store(own, word);
        }
    }
    thread::sync_threads();

    let lane = thread % head_words;
    let mean = of_f32_words(mean.load(2 * lane as usize), mean.load(2 * lane as usize + 1));
    let keys = keys.rows((kv_heads * head_words) as usize);
    let centroids = Centroids { words: centroids, biases, lanes: head_words };
    let end = block * CENTROIDS + CENTROIDS;
    let mut centroid = block * CENTROIDS + thread / head_words;
    while centroid < end {
        // All lanes take part in a centroid's product; those of a row beyond its last have that one again.
        let valid = centroid < row_centroids;
        let own = centroid.min(row_centroids - 1);
        let (span, index) = (own / span_centroids, own % span_centroids);
        let start = span_start(tokens, spans, span);
        let token = start + start_token(span_start(tokens, spans, span + 1) - start, span_centroids, index);
        let mut key = channels(keys.row((first + token) as usize).load((head * head_words + lane) as usize));
        let mut at = 0;
        while at < 8 {
            key[at] -= mean[at];
            at += 1;
        }
        centroids.store(head * row_centroids + own, key, mean, valid);
        centroid += BLOCK / head_words;
    }
}

#[inline(always)]
fn add(sum: &mut [f32; 4], word: U32x4) {
    let four = word.to_array();
    let mut at = 0;
    while at < 4 {
        sum[at] += f32::from_bits(four[at]);
        at += 1;
    }
}

#[inline(always)]
fn word(four: [f32; 4]) -> U32x4 {
    let [x, y, z, w] = four.map(f32::to_bits);
    U32x4 { x, y, z, w }
}
