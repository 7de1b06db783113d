use cuda_std::prelude::*;

use super::operator::Mean;
use super::prompts::{Summaries, summarise_prompts};
use super::step::summarise_leaving;

/// The mean key of each chunk: summaries of a ragged batch of prompts, one layer.
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `keys` | `[tokens, kv_heads, head_words]` words | bf16 keys of all requests, end to end |
/// | `entries` | `[requests]` [`Entry`](crate::abi::Entry) in words | which partitions to summarise: `new_partition`, `new_partitions`; `directory` |
/// | `first_token` | `[requests]` | where a request's token 0 lies in `keys` |
/// | `first_chunk` | `[requests + 1]`, ascending, from 0 | `new_partitions` of the requests before |
/// | `directories` | of all requests | a request's segments from `entry.directory` on |
/// | `requests` | at least 1 | |
/// | `first_row` | layer * `kv_heads` | row of KV head 0 |
/// | `request_rows` | | rows of a request: layers * `kv_heads` |
/// | `kv_heads`, `head_words` | at least 1 | `head_words` is head dim / 8 |
/// | `chunk_tokens` | at least 1 | tokens of a partition |
/// | `segment_partitions` | at least 1 | partitions of a segment |
/// | `summaries` | `[segments, request_rows, segment_partitions, head_words]` words | bf16 means |
///
/// Sums are in f32 and in token order; the mean is the sum times 1 / `chunk_tokens`, rounded to bf16 to nearest even.
///
/// Partition `p` of a row is at `p % segment_partitions` in segment `directories[entry.directory + p / segment_partitions]`: where a
/// decode step reads it. Nothing else is written; the steady zone's partitions are none of `new_partition ..`.
///
/// # Mapping
/// A thread makes one word (8 channels) of a summary: word `i % head_words` of KV head `i / head_words % kv_heads` of a chunk. So
/// the lanes of a warp read 512 bytes on end of a token's keys, and a thread needs nothing of another. It has 8 tokens in flight.
///
/// # Launch
/// [`grid`](crate::abi::index_prompts::grid) blocks of [`BLOCK`](crate::abi::index_prompts::BLOCK) threads; no shared memory.
///
/// # Safety
/// The views have the shapes above; the entries' new partitions have their keys in `keys` and their segments in `summaries`, no two of them
/// one place; `first_chunk[requests] * kv_heads * head_words` is at most
/// [`MAX_WORDS`](crate::abi::index_prompts::MAX_WORDS); nothing writes `keys` until the launch has ended.
#[kernel]
pub unsafe fn chunk_mean(
    keys: Global<U32x4>,
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
    summaries: GlobalMut<U32x4>,
) {
    let summaries =
        Summaries { directories, first_row, request_rows, segment_partitions, head_words, summaries };
    summarise_prompts::<Mean>(
        keys,
        entries,
        first_token,
        first_chunk,
        requests,
        kv_heads,
        head_words,
        chunk_tokens,
        summaries,
    );
}

/// The mean key of each partition that leaves the steady zone in a decode step, one layer.
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `entries` | `[batch]` [`Entry`](crate::abi::Entry) in words | which partitions leave: `new_partition`, `new_partitions`; `directory`; the steady lists' numbers |
/// | `steady` | of all requests | physical pages, at [`steady_place`](crate::abi::Entry::steady_place) |
/// | `pool` | `[pages, 2, page_tokens, head_words]` words | GPU pages: keys, then values |
/// | `directories`, `first_row`, `request_rows`, `kv_heads`, `head_words`, `segment_partitions`, `summaries` | | as for [`chunk_mean`] |
/// | `page_tokens` | at least 1 | tokens of a page |
/// | `partition_tokens` | at least 1 | tokens of a partition |
///
/// The same bits as [`chunk_mean`] gives for the same keys: both walk the tokens in the same order.
///
/// # Mapping
/// A block has an entry. In most steps nothing leaves, and it ends; else a thread makes one word of a summary at a time.
///
/// # Launch
/// `batch` blocks of [`BLOCK`](crate::abi::index_step::BLOCK) threads; no shared memory.
///
/// # Safety
/// The views have the shapes above; the partitions that leave have all their tokens in steady pages, and their segments in
/// `summaries`, no two of them one place; an entry's `new_partitions * kv_heads * head_words` is below 2^31.
#[kernel]
pub unsafe fn chunk_mean_step(
    entries: Global<U32x4>,
    steady: Global<u32>,
    pool: Global<U32x4>,
    directories: Global<u32>,
    first_row: u32,
    request_rows: u32,
    kv_heads: u32,
    head_words: u32,
    page_tokens: u32,
    partition_tokens: u32,
    segment_partitions: u32,
    summaries: GlobalMut<U32x4>,
) {
    let summaries =
        Summaries { directories, first_row, request_rows, segment_partitions, head_words, summaries };
    summarise_leaving::<Mean>(
        entries,
        steady,
        pool,
        kv_heads,
        head_words,
        page_tokens,
        partition_tokens,
        summaries,
    );
}
