use cuda_std::prelude::*;

use super::operator::Bounds;
use super::prompts::{Summaries, summarise_prompts};
use super::step::summarise_leaving;

/// The bounds of the keys of each chunk, channel by channel: summaries of a ragged batch of prompts, one layer.
///
/// Parameters, mapping, launch and safety are those of [`chunk_mean`](super::chunk_mean()), but for
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `summaries` | `[segments, request_rows, segment_partitions, 2, head_words]` words | bf16: the least, then the greatest |
///
/// Exact: a bound is one of the keys' numbers. -0 is less than +0. A channel in which any key is NaN is NaN (0x7fff) in both.
#[kernel]
pub unsafe fn chunk_bounds(
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
    summarise_prompts::<Bounds>(
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

/// The bounds of the keys of each partition that leaves the steady zone in a decode step, one layer.
///
/// Parameters, mapping, launch and safety are those of [`chunk_mean_step`](super::chunk_mean_step()), but for `summaries`, which are as
/// for [`chunk_bounds`]; and so are the bits.
#[kernel]
pub unsafe fn chunk_bounds_step(
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
    summarise_leaving::<Bounds>(
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
