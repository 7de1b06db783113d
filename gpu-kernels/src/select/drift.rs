use cuda_std::prelude::*;

use crate::abi::Entry;
use crate::abi::drift::{BLOCK, DriftRow};

/// Selects partitions that depend on nothing but the row and the request's length, and change from step to step as those of text do: for
/// measurements with random weights, whose own selections have nothing to do with the step before. One layer.
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `entries` | `[batch]` [`Entry`] in words | one without tokens is passed over |
/// | `first_row` | layer * `kv_heads` | row of KV head 0 |
/// | `kv_heads` | at least 1 | |
/// | `pace` | | [`DriftRow::pace`] |
/// | `capacity` | | ids that a row has room for |
/// | `ids` | `[batch * kv_heads, capacity]` | ascending: all partitions where the limit is no less, else those of [`DriftRow::partition`] |
/// | `selected` | `[batch * kv_heads]` | how many |
///
/// # Mapping
/// A block has a row, a thread every so many-th place of its selection.
///
/// # Launch
/// `batch * kv_heads` blocks of [`BLOCK`] threads; no shared memory.
///
/// # Safety
/// The views have the shapes above.
#[kernel]
pub unsafe fn drift(
    entries: Global<U32x4>,
    first_row: u32,
    kv_heads: u32,
    pace: u32,
    capacity: u32,
    ids: GlobalMut<u32>,
    selected: GlobalMut<u32>,
) {
    let block = thread::block_idx_x();
    let entry = Entry::load(entries, block / kv_heads);
    if entry.tokens == 0 {
        return;
    }
    let (partitions, row) = (entry.partitions, first_row + block % kv_heads);
    let count = entry.limit.min(partitions).min(capacity);
    let drawn = DriftRow { row, tokens: entry.tokens, partitions, count, pace };
    let ids = ids.rows(capacity as usize).row(block as usize);
    let mut at = thread::thread_idx_x();
    while at < count {
        let partition = if count < partitions { drawn.partition(at) } else { at };
        ids.store(at as usize, entry.first_partition + partition);
        at += BLOCK;
    }
    if thread::thread_idx_x() == 0 {
        selected.store(block as usize, count);
    }
}
