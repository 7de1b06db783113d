use cuda_std::prelude::*;

use crate::abi::cluster::gather_run::BLOCK;

/// Keys and values of a run of tokens out of the steady zone's pages, in the order of the sequence: what generated tokens are clustered from. One layer
/// of one request.
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `steady` | of all requests | physical pages: page `key` of KV head `h`'s row at `first_steady + (first_row + h) * (sink_pages + ring_pages) + place`, where `place` is `key` of a sink's page, else `sink_pages + (key - sink_pages) % ring_pages` |
/// | `first_steady`, `sink_pages`, `ring_pages` | | as [`Entry`](crate::abi::Entry) has them |
/// | `first_row` | layer * `kv_heads` | row of KV head 0 |
/// | `kv_heads`, `head_words`, `page_tokens` | at least 1 | |
/// | `pool` | `[pages, 2, page_tokens, head_words]` words | keys, then values |
/// | `first`, `tokens` | | the run |
/// | `keys`, `values` | `[tokens, kv_heads, head_words]` words | |
///
/// # Mapping
/// A thread has a word of a key or of a value at a time.
///
/// # Launch
/// Any number of blocks of [`BLOCK`] threads; no shared memory.
///
/// # Safety
/// The views have the shapes above, the pages of the run are in the steady lists; `2 * tokens * kv_heads * head_words` is at most
/// [`MAX_WORDS`](crate::abi::cluster::gather_run::MAX_WORDS).
#[kernel]
pub unsafe fn gather_run(
    steady: Global<u32>,
    first_steady: u32,
    sink_pages: u32,
    ring_pages: u32,
    first_row: u32,
    kv_heads: u32,
    head_words: u32,
    page_tokens: u32,
    pool: Global<U32x4>,
    first: u32,
    tokens: u32,
    keys: GlobalMut<U32x4>,
    values: GlobalMut<U32x4>,
) {
    let of_tensor = tokens * kv_heads * head_words;
    let half = page_tokens * head_words;
    let pool = pool.rows(2 * half as usize);
    let mut at = thread::index_1d();
    while at < 2 * of_tensor {
        let (is_value, at_tensor) = (at >= of_tensor, at % of_tensor);
        let (word, head) = (at_tensor % head_words, at_tensor / head_words % kv_heads);
        let token = first + at_tensor / (head_words * kv_heads);
        let key = token / page_tokens;
        let place = if key < sink_pages { key } else { sink_pages + (key - sink_pages) % ring_pages };
        let list = first_steady + (first_row + head) * (sink_pages + ring_pages);
        let page = pool.row(steady.load((list + place) as usize) as usize);
        let in_page = token % page_tokens * head_words + word;
        let loaded = page.load((in_page + if is_value { half } else { 0 }) as usize);
        if is_value {
            values.store(at_tensor as usize, loaded);
        } else {
            keys.store(at_tensor as usize, loaded);
        }
        at += thread::grid_dim_x() * BLOCK;
    }
}
