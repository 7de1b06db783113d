use cuda_std::atomic::{Order, Scope};
use cuda_std::prelude::*;

use super::warp_copy::{copy_words, publish};
use crate::abi::page_code::{NO_CODE, PageCode};
use crate::abi::{Entry, SLAB_PAGES, WARP, host_page};
use crate::codes::encode_page;
use crate::ragged::request_of;

/// Stores the keys and values of a ragged batch of prompts as pages, one layer: complete pages on the host, those of the
/// steady zone on the GPU, complete or not.
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `keys`, `values` | `[tokens, kv_heads, head_words]` words | bf16, of all requests, end to end |
/// | `entries` | `[requests]` [`Entry`] in words | `tokens`: those of the prompt; `leaving_key`, `leaving`: its retrievable pages, which the GPU does not get; the steady lists' and host tables' numbers |
/// | `first_token` | `[requests]` | where a request's token 0 lies in `keys` |
/// | `first_page` | `[requests + 1]`, ascending, from 0 | pages of the requests before: of each, `tokens / page_tokens`, rounded up |
/// | `steady` | of all requests | physical pages, at [`steady_place`](Entry::steady_place); only those of steady pages are read |
/// | `pool` | `[pages, 2, page_tokens, head_words]` words | GPU pages: keys, then values |
/// | `host_slabs` | of all requests | slabs, at [`slab_place`](Entry::slab_place); only those of complete pages are read |
/// | `host_valid` | as `host_slabs` | [valid bits](crate::abi::valid_place); those of this launch's pages are read before they are set |
/// | `host_pages` | `[slabs, 16, host_words]` words, mapped host memory | the host tier's pages |
/// | `requests` | at least 1 | |
/// | `first_row` | layer * `kv_heads` | row of KV head 0 |
/// | `kv_heads`, `head_words` | at least 1 | `head_words` is head dim / 8 |
/// | `page_tokens` | at least 1 | tokens of a page |
/// | `on_host` | 0 or 1 | as for [`append`](super::append()) |
/// | `host_words`, `code` | | as for [`append`](super::append()) |
///
/// Of a last page that is not complete only the tokens that there are are written. A page whose valid bit is set is on the host already, another
/// request's as well: there it is not written.
///
/// # Mapping
/// A warp has a page of a KV head at a time: page `w / kv_heads`, head `w % kv_heads`, and on by the launch's warps, so neighbours
/// read neighbouring heads of the same tokens. A page is written in its own order, 512 bytes on end, which is where heads are
/// transposed; four words of a lane are in flight. What bounds it is the bus to the host, for which few blocks are enough.
///
/// # Order
/// As for [`append`](super::append()).
///
/// # Launch
/// 1 to [`MAX_BLOCKS`](crate::abi::store_prompt::MAX_BLOCKS) blocks of [`BLOCK`](crate::abi::store_prompt::BLOCK) threads; no
/// shared memory.
///
/// # Safety
/// The views have the shapes above; no page, steady or host, is named by two pages of the batch; nothing else uses those pages or bits, or
/// writes `keys` or `values`, until the launch has ended; `first_page[requests] * kv_heads` is at most
/// [`MAX_PAGES`](crate::abi::store_prompt::MAX_PAGES), a page has at most [`MAX_PAGE_WORDS`](crate::abi::MAX_PAGE_WORDS) words.
#[kernel(collectives(barrier = 1, reduce = 1))]
pub unsafe fn store_prompt(
    keys: Global<U32x4>,
    values: Global<U32x4>,
    entries: Global<U32x4>,
    first_token: Global<u32>,
    first_page: Global<u32>,
    steady: Global<u32>,
    pool: GlobalMut<U32x4>,
    host_slabs: Global<u32>,
    host_valid: GlobalMut<u32>,
    host_pages: GlobalMut<U32x4>,
    requests: u32,
    first_row: u32,
    kv_heads: u32,
    head_words: u32,
    page_tokens: u32,
    on_host: u32,
    host_words: u32,
    code: u32,
) {
    let pages = first_page.load(requests as usize) * kv_heads;
    let half = page_tokens * head_words;
    let tensor_width = (kv_heads * head_words) as usize;
    let (keys, values) = (keys.rows(tensor_width), values.rows(tensor_width));
    let (pool, host_pages) = (pool.rows(2 * half as usize), host_pages.rows(host_words as usize));

    let mut warp = thread::index_1d() / WARP;
    while warp < pages {
        let (page, head) = (warp / kv_heads, warp % kv_heads);
        let request = request_of(first_page, requests, page);
        let entry = Entry::load(entries, request);
        let (row, key) = (first_row + head, page - first_page.load(request as usize));
        let first = key * page_tokens;
        let tokens = page_tokens.min(entry.tokens - first);
        let first = first_token.load(request as usize) + first;

        // Word `at` of the tokens' keys and then values, wherever the page goes.
        let words = tokens * head_words;
        let load = |at: u32| {
            let (tensor, word) = if at < words { (keys, at) } else { (values, at - words) };
            let column = head * head_words + word % head_words;
            tensor
                .row((first + word / head_words) as usize)
                .load_with(column as usize, LoadCache::ReadOnlyOnce)
        };
        let slab = entry.slab_place(row, key);
        let mut goes = tokens == page_tokens && on_host != 0;
        if goes {
            let valid = host_valid.atomic_load(slab as usize, Order::Relaxed, Scope::System);
            goes = valid >> (key % SLAB_PAGES) & 1 == 0;
        }
        let stays = key.wrapping_sub(entry.leaving_key) >= entry.leaving;
        // Read only if there is one.
        let steady_page = if stays { steady.load(entry.steady_place(row, key) as usize) } else { 0 };
        if stays && !(goes && code != NO_CODE) {
            let place = |at: u32| if at < words { at } else { half + at - words };
            let page = pool.row(steady_page as usize);
            copy_words(2 * words, load, |at, loaded| page.store(place(at) as usize, loaded));
        }
        if goes {
            let page = host_pages.row(host_page(host_slabs.load(slab as usize), key) as usize);
            if code == NO_CODE {
                let skipped = 2 * half - host_words;
                copy_words(host_words, |at| load(skipped + at), |at, loaded| page.store(at as usize, loaded));
            } else {
                encode_page(
                    PageCode::of(code),
                    half,
                    // Both are of one token.
                    |at| {
                        let (tensor, word) = if at < half { (keys, at) } else { (values, at - half) };
                        let words = tensor.row((first + word / head_words) as usize);
                        let column = (head * head_words + word % head_words) as usize;
                        [words.load(column), words.load(column + 1)]
                    },
                    |at, codes| page.store(at as usize, codes),
                    |at, [even, odd]| {
                        if stays {
                            let page = pool.row(steady_page as usize);
                            page.store(at as usize, even);
                            page.store(at as usize + 1, odd);
                        }
                    },
                );
            }
            publish(host_valid, slab, key);
        }
        warp += thread::grid_dim_x() * (thread::block_dim_x() / WARP);
    }
}
