use cuda_std::prelude::*;
use cuda_std::warp::FULL_MASK;

use super::warp_copy::{copy_words, publish};
use crate::abi::page_code::{NO_CODE, PageCode};
use crate::abi::{Entry, WARP, host_page};
use crate::chain::chain;
use crate::codes::encode_page;

/// Stores the new token of each row of a decode step in its steady page, one layer; a page that is now full goes to the host.
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `entries` | `[batch]` [`Entry`] in words | `tokens`, the new one included; the steady lists' and host tables' numbers |
/// | `keys`, `values` | `[batch, kv_heads, head_words]` words | bf16, of the new tokens |
/// | `steady` | of all requests | physical pages, at [`steady_place`](Entry::steady_place) |
/// | `pool` | `[pages, 2, page_tokens, head_words]` words | GPU pages: keys, then values |
/// | `host_slabs` | of all requests | slabs, at [`slab_place`](Entry::slab_place) |
/// | `host_valid` | as `host_slabs` | [valid bits](crate::abi::valid_place) |
/// | `host_pages` | `[slabs, 16, host_words]` words, mapped host memory | the host tier's pages |
/// | `batch` | | entries |
/// | `first_row` | layer * `kv_heads` | row of KV head 0 |
/// | `kv_heads`, `head_words` | at least 1 | `head_words` is head dim / 8 |
/// | `page_tokens` | at least 1 | tokens of a page |
/// | `on_host` | 0 or 1 | whether full pages go to the host: not those of the sequence where the host has clusters |
/// | `host_words` | 1 to a page's | words of a host page: the end of the GPU page, which is its values or all of it; or its codes and scales |
/// | `code` | [`NO_CODE`] or a [`PageCode`] | of host pages. A page that is full is then on the GPU, too, what its codes say; `head_words` is even |
///
/// A slab is read only for a page that is full, so there need be none before. Entries without tokens are passed over.
///
/// # Mapping
/// A warp has a row: KV head `w % kv_heads` of entry `w / kv_heads`. It stores the token, and if that fills the page it reads the page back
/// after a barrier of the warp, four words of a lane in flight, and writes it to the host, 512 bytes on end at a time.
///
/// # Order
/// A page's valid bit is set after its bytes, with a fence for the system between. The GPU's own readers of the bit
/// (whoever evicts) are later launches of the stream, which see all of this one.
///
/// # Launch
/// [`grid`](crate::abi::append::grid) blocks of [`BLOCK`](crate::abi::append::BLOCK) threads; no shared memory.
///
/// # Safety
/// The views have the shapes above; no page, steady or host, is named by two rows; nothing else uses those pages or bits until the
/// launch has ended; `batch * kv_heads` is at most [`MAX_ROWS`](crate::abi::append::MAX_ROWS), a page has at most
/// [`MAX_PAGE_WORDS`](crate::abi::MAX_PAGE_WORDS) words.
#[kernel(collectives(barrier = 2, reduce = 1))]
pub unsafe fn append(
    entries: Global<U32x4>,
    keys: Global<U32x4>,
    values: Global<U32x4>,
    steady: Global<u32>,
    pool: GlobalMut<U32x4>,
    host_slabs: Global<u32>,
    host_valid: GlobalMut<u32>,
    host_pages: GlobalMut<U32x4>,
    batch: u32,
    first_row: u32,
    kv_heads: u32,
    head_words: u32,
    page_tokens: u32,
    on_host: u32,
    host_words: u32,
    code: u32,
) {
    chain();
    let warp = thread::index_1d() / WARP;
    let (index, head) = (warp / kv_heads, warp % kv_heads);
    if index >= batch {
        return;
    }
    let entry = Entry::load(entries, index);
    if entry.tokens == 0 {
        return;
    }
    let row = first_row + head;
    let (key, token) = ((entry.tokens - 1) / page_tokens, (entry.tokens - 1) % page_tokens);
    let half = page_tokens * head_words;
    let page = steady.load(entry.steady_place(row, key) as usize);
    let page = pool.rows(2 * half as usize).row(page as usize);

    let keys = keys.rows(head_words as usize).row(warp as usize);
    let values = values.rows(head_words as usize).row(warp as usize);
    let at = token * head_words;
    let mut word = warp::lane_id();
    while word < 2 * head_words {
        // Keys and values side by side in the lanes.
        if word < head_words {
            page.store((at + word) as usize, keys.load(word as usize));
        } else {
            let word = word - head_words;
            page.store((half + at + word) as usize, values.load(word as usize));
        }
        word += WARP;
    }
    if token + 1 < page_tokens || on_host == 0 {
        return;
    }

    warp::sync_warp(FULL_MASK);
    let slab = entry.slab_place(row, key);
    let host_page = host_page(host_slabs.load(slab as usize), key);
    let host_page = host_pages.rows(host_words as usize).row(host_page as usize);
    let full = page.as_global();
    if code == NO_CODE {
        let full = full.slice((2 * half - host_words) as usize, host_words as usize);
        copy_words(
            host_words,
            |word| full.load(word as usize),
            |word, loaded| host_page.store(word as usize, loaded),
        );
    } else {
        encode_page(
            PageCode::of(code),
            half,
            |word| [full.load(word as usize), full.load(word as usize + 1)],
            |word, codes| host_page.store(word as usize, codes),
            |word, [even, odd]| {
                page.store(word as usize, even);
                page.store(word as usize + 1, odd);
            },
        );
    }
    publish(host_valid, slab, key);
}
