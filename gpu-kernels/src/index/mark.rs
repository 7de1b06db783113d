use cuda_std::prelude::*;

use crate::abi::Entry;
use crate::abi::mark::BLOCK;

/// Marks partitions of each row: makes a list of them bits, as [`select`](crate::select::select()) reads them. One layer.
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `entries` | `[batch]` [`Entry`] in words | where a request's marks are: `first_marks`. One without tokens has none |
/// | `ids`, `counts` | `[batch * kv_heads, capacity]`, `[batch * kv_heads]` | ascending, counted from the first partition that may be selected; more than `capacity` count as `capacity` |
/// | `capacity` | | ids that `ids` has room for in a row |
/// | `first_row` | layer * `kv_heads` | row of KV head 0 |
/// | `kv_heads` | at least 1 | |
/// | `mark_words` | at least 1 | words of a row's marks: ids are below 32 times that |
/// | `marks` | `[rows of all requests, mark_words]` | bit `i % 32` of word `i / 32` for `i`: all words of a row are written |
///
/// # Mapping
/// A block has a row, a thread a word at a time, whose ids it finds by halving the list: nothing is handed between threads.
///
/// # Launch
/// `batch * kv_heads` blocks of [`BLOCK`] threads; no shared memory.
///
/// # Safety
/// The views have the shapes above.
#[kernel]
pub unsafe fn mark(
    entries: Global<U32x4>,
    ids: Global<u32>,
    counts: Global<u32>,
    capacity: u32,
    first_row: u32,
    kv_heads: u32,
    mark_words: u32,
    marks: GlobalMut<u32>,
) {
    let row = thread::block_idx_x();
    let entry = Entry::load(entries, row / kv_heads);
    if entry.tokens == 0 {
        return;
    }
    let count = counts.load(row as usize).min(capacity);
    let ids = ids.slice((row * capacity) as usize, capacity as usize);
    let of_request = entry.first_marks + first_row + row % kv_heads;
    let marks = marks.rows(mark_words as usize).row(of_request as usize);
    let mut word = thread::thread_idx_x();
    while word < mark_words {
        // The first id that is this word's or a later one's.
        let (mut low, mut high) = (0, count);
        while low < high {
            let middle = low + (high - low) / 2;
            if ids.load(middle as usize) / 32 < word {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        let mut bits = 0;
        while low < count {
            let id = ids.load(low as usize);
            if id / 32 != word {
                break;
            }
            bits |= 1 << (id % 32);
            low += 1;
        }
        marks.store(word as usize, bits);
        word += BLOCK;
    }
}
