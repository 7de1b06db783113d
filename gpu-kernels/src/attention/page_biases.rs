use cuda_std::prelude::*;

use crate::abi::Entry;
use crate::abi::page_biases::BLOCK;
use crate::index::cluster::Table;

/// What [`attend`](super::attend_128()) adds to the logits of pages that are not full: 0 for their tokens, negative infinity behind them. One layer.
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `entries` | `[batch]` [`Entry`] in words | |
/// | `kv_heads` | at least 1 | |
/// | `ids`, `id_counts` | `[batch * kv_heads, capacity]`, `[batch * kv_heads]` | selected partitions, each a page; more than `capacity` count as `capacity` |
/// | `capacity` | | |
/// | `directories` | as the entries say | the segment of partition `p`: at `directory + p / segment_partitions` |
/// | `first_row`, `request_rows`, `segment_partitions` | | as for [`cluster_means`](crate::index::cluster::cluster_means()) |
/// | `partition_tokens` | `[segments, request_rows, segment_partitions]` | |
/// | `page_tokens` | | tokens of a page |
/// | `biases` | `[batch * kv_heads, capacity, page_tokens]` | of the row's pages; behind them nothing is written |
///
/// # Mapping
/// A block has a row, a thread a token at a time.
///
/// # Launch
/// `batch * kv_heads` blocks of [`BLOCK`] threads; no shared memory.
///
/// # Safety
/// The views have the shapes above; the directories name the segments of the ids.
#[kernel]
pub unsafe fn page_biases(
    entries: Global<U32x4>,
    kv_heads: u32,
    ids: Global<u32>,
    id_counts: Global<u32>,
    capacity: u32,
    directories: Global<u32>,
    first_row: u32,
    request_rows: u32,
    segment_partitions: u32,
    partition_tokens: Global<u32>,
    page_tokens: u32,
    biases: GlobalMut<f32>,
) {
    let row = thread::block_idx_x();
    let entry = Entry::load(entries, row / kv_heads);
    if entry.tokens == 0 {
        return;
    }
    let table =
        Table { directories, directory: entry.directory, first_row, request_rows, segment_partitions };
    let ids = ids.rows(capacity as usize).row(row as usize);
    let biases = biases.rows((capacity * page_tokens) as usize).row(row as usize);
    let tokens = id_counts.load(row as usize).min(capacity) * page_tokens;
    let mut at = thread::thread_idx_x();
    while at < tokens {
        let place = table.place(row % kv_heads, ids.load((at / page_tokens) as usize));
        let valid = at % page_tokens < partition_tokens.load(place);
        biases.store(at as usize, if valid { 0.0 } else { f32::NEG_INFINITY });
        at += BLOCK;
    }
}
