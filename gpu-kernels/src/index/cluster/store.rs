use cuda_std::prelude::*;

use super::members::of_pages;
use crate::abi::cluster::NO_TOKEN;
use crate::abi::{SLAB_PAGES, host_page};
use crate::offload::warp_copy::{copy_words, publish};

/// Stores keys and values in the order of clusters as pages of the host, one layer of one request.
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `keys`, `values`, `first`, `kv_heads`, `head_words` | | as for [`cluster_update`](super::cluster_update()); values as keys; `tokens` are the members' |
/// | `page_tokens`, `first_place`, `row_pages`, `members`, `member_pages` | | what [`cluster_pages`](super::cluster_pages()) and [`cluster_list`](super::cluster_list()) left |
/// | `host_slabs` | of all requests | slabs: of page keys `16 * i ..` of row `r` at `first_slab + r * slab_stride + i` |
/// | `first_slab`, `slab_stride` | | |
/// | `first_row` | layer * `kv_heads` | row of KV head 0 |
/// | `host_valid` | as `host_slabs` | [valid bits](crate::abi::valid_place) |
/// | `host_pages` | `[slabs, 16, 2, page_tokens, head_words]` words, mapped host memory | the host tier's pages |
///
/// A page's key is its number among the pages of the row's clusters. What a cluster's last page has beyond its tokens is zero.
///
/// # Mapping
/// As [`store_prompt`](crate::offload::store_prompt()): a warp has a page of a KV head at a time.
///
/// # Order
/// As for [`append`](crate::offload::append()).
///
/// # Launch
/// 1 to [`MAX_BLOCKS`](crate::abi::cluster::store::MAX_BLOCKS) blocks of [`BLOCK`](crate::abi::cluster::store::BLOCK) threads; no
/// shared memory.
///
/// # Safety
/// The views have the shapes above; the pages have slabs of their own in `host_slabs`; nothing else uses those pages or bits, or writes
/// `keys` or `values`, until the launch has ended; `member_pages * kv_heads` is at most
/// [`MAX_PAGES`](crate::abi::cluster::store::MAX_PAGES), a page has at most [`MAX_PAGE_WORDS`](crate::abi::MAX_PAGE_WORDS) words.
#[kernel(collectives(barrier = 1))]
pub unsafe fn cluster_store(
    keys: Global<U32x4>,
    values: Global<U32x4>,
    first: u32,
    kv_heads: u32,
    head_words: u32,
    page_tokens: u32,
    first_place: u32,
    row_pages: Global<u32>,
    members: Global<u32>,
    member_pages: u32,
    host_slabs: Global<u32>,
    first_slab: u32,
    slab_stride: u32,
    first_row: u32,
    host_valid: GlobalMut<u32>,
    host_pages: GlobalMut<U32x4>,
) {
    let half = page_tokens * head_words;
    let width = (kv_heads * head_words) as usize;
    let (keys, values) = (keys.rows(width), values.rows(width));
    let host_pages = host_pages.rows(2 * half as usize);
    let sizes = [first_place, kv_heads, member_pages, page_tokens];
    of_pages(members, row_pages, sizes, |page, head, before, members| {
        let key = before + page;
        let slab = first_slab + (first_row + head) * slab_stride + key / SLAB_PAGES;
        let to = host_pages.row(host_page(host_slabs.load(slab as usize), key) as usize);
        let load = |at: u32| {
            let (tensor, word) = if at < half { (keys, at) } else { (values, at - half) };
            let token = members.load((word / head_words) as usize);
            let column = (head * head_words + word % head_words) as usize;
            if token == NO_TOKEN {
                U32x4::default()
            } else {
                tensor.row((first + token) as usize).load_with(column, LoadCache::ReadOnlyOnce)
            }
        };
        copy_words(2 * half, load, |at, loaded| to.store(at as usize, loaded));
        publish(host_valid, slab, key);
    });
}
