use cuda_std::prelude::*;
use cuda_std::warp::{FULL_MASK, WARP_SIZE, warp_shuffle_idx};
use cuda_std::{Rows, bf16};

use crate::abi::{WARP, WORD_ELEMENTS};

/// The mean key of each chunk: summaries of a ragged batch of prompts, one layer.
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `keys` | `[tokens, kv_heads, head_words]` words | bf16 keys of all requests, end to end |
/// | `first_token` | `[requests]` | where a request's chunked keys begin in `keys` |
/// | `first_chunk` | `[requests + 1]`, ascending, from 0 | chunks of the requests before |
/// | `requests` | at least 1 | |
/// | `kv_heads`, `head_words` | at least 1 | `head_words` is head dim / 8 |
/// | `chunk_tokens` | at least 1 | tokens of a chunk; a request's last tokens that fill none are left out |
/// | `summaries` | a request after another, each `[kv_heads, chunks, head_words]` words | bf16 means |
///
/// Sums are in f32: of every n-th token (n = 32 / `head_words`, at least 1) in order, then of these n sums in order; the mean is rounded to bf16 to nearest even.
///
/// # Mapping
/// A warp makes one summary: chunk `i / kv_heads` of KV head `i % kv_heads`, so neighbours read neighbouring keys. A lane holds one word (8
/// elements) of the head; with heads of fewer than 32 words a warp reads several tokens at once, with more it makes several passes.
///
/// # Launch
/// [`grid`](crate::abi::chunk_mean::grid) blocks of [`BLOCK`](crate::abi::chunk_mean::BLOCK) threads; no shared memory.
///
/// # Safety
/// The views have the shapes above, and `kv_heads * first_chunk[requests]` is at most
/// [`MAX_SUMMARIES`](crate::abi::chunk_mean::MAX_SUMMARIES), that times `head_words` at most
/// [`MAX_WORDS`](crate::abi::chunk_mean::MAX_WORDS).
#[kernel(collectives(shuffle = 8))]
pub unsafe fn chunk_mean(
    keys: Global<U32x4>,
    first_token: Global<u32>,
    first_chunk: Global<u32>,
    requests: u32,
    kv_heads: u32,
    head_words: u32,
    chunk_tokens: u32,
    summaries: GlobalMut<U32x4>,
) {
    let warp = thread::index_1d() / WARP;
    let (chunk, head) = (warp / kv_heads, warp % kv_heads);
    if chunk >= first_chunk.load(requests as usize) {
        return;
    }
    let request = request_of(first_chunk, requests, chunk);
    let before = first_chunk.load(request as usize);
    let chunks = first_chunk.load(request as usize + 1) - before;
    let chunk = chunk - before;

    let token = first_token.load(request as usize) + chunk * chunk_tokens;
    let keys = keys.rows(head_words as usize);
    let summary = summaries
        .slice(
            (before * kv_heads) as usize * head_words as usize,
            (chunks * kv_heads) as usize * head_words as usize,
        )
        .rows(head_words as usize)
        .row((head * chunks + chunk) as usize);
    let scale = 1.0 / chunk_tokens as f32;

    // Lanes side by side on a token, tokens side by side in the warp; lanes beyond the last whole token only shuffle.
    let lanes = head_words.min(WARP);
    let side_by_side = WARP / lanes;
    let (side, lane) = (warp::lane_id() / lanes, warp::lane_id() % lanes);
    let mut first_word = 0;
    while first_word < head_words {
        let word = first_word + lane;
        let tokens = if word < head_words && side < side_by_side { chunk_tokens } else { 0 };
        let sums = sum_of_tokens(keys, token, side, side_by_side, tokens, kv_heads, head, word);
        let mut totals = sums;
        let mut other = 1;
        while other < side_by_side {
            // Indexed by a counter: LLVM unrolls this, where an iterator would put the arrays into local memory.
            let mut element = 0;
            while element < WORD_ELEMENTS {
                totals[element] +=
                    warp_shuffle_idx(FULL_MASK, sums[element], other * lanes + lane, WARP_SIZE);
                element += 1;
            }
            other += 1;
        }
        if side == 0 && word < head_words {
            let [a, b, c, d, e, f, g, h] = totals.map(|total| total * scale);
            let mean =
                U32x4 { x: bf16::pack(a, b), y: bf16::pack(c, d), z: bf16::pack(e, f), w: bf16::pack(g, h) };
            summary.store(word as usize, mean);
        }
        first_word += lanes;
    }
}

/// The request that holds chunk `chunk` of the batch: the last whose first chunk is not above it.
#[inline(always)]
unsafe fn request_of(first_chunk: Global<u32>, requests: u32, chunk: u32) -> u32 {
    let (mut low, mut high) = (0, requests);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if first_chunk.load(middle as usize) <= chunk {
            low = middle;
        } else {
            high = middle;
        }
    }
    low
}

/// The sums of a word's elements over tokens `first`, `first + step`, … of the `tokens` from `token`.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "one loop of the kernel, in its names")]
unsafe fn sum_of_tokens(
    keys: Rows<U32x4>,
    token: u32,
    first: u32,
    step: u32,
    tokens: u32,
    kv_heads: u32,
    head: u32,
    word: u32,
) -> [f32; WORD_ELEMENTS] {
    let mut sums = [0.0; WORD_ELEMENTS];
    let mut next = first;
    while next < tokens {
        let row = (token + next) as usize * kv_heads as usize + head as usize;
        let pairs = keys.row(row).load(word as usize).to_array();
        let mut pair = 0;
        while pair < 4 {
            let (low, high) = bf16::unpack(pairs[pair]);
            sums[2 * pair] += low;
            sums[2 * pair + 1] += high;
            pair += 1;
        }
        next += step;
    }
    sums
}
