use cuda_std::prelude::*;
use cuda_std::shared;

use crate::abi::WARP;
use crate::abi::cluster::pages::BLOCK;
use crate::block::Exchange;

/// Where each cluster's pages begin.
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `sizes` | `[kv_heads, clusters]` | tokens of clusters |
/// | `clusters` | at least 1 | of a row |
/// | `page_tokens` | at least 1 | tokens of a page |
/// | `first_place` | | place of KV head 0's row in `row_pages` |
/// | `row_pages` | `[rows of all requests, 2]` | pages of a row's clusters: before this run, after it. In: after the runs before, at the second place |
/// | `firsts` | `[kv_heads, clusters]` | each cluster's first page, of those of this run |
///
/// Clusters take pages in their order, after those of earlier runs: `tokens / page_tokens`, rounded up; one without tokens has none. Each page is a
/// partition.
///
/// # Mapping
/// A block has a row, a thread a cluster at a time.
///
/// # Launch
/// `kv_heads` blocks of [`BLOCK`] threads, [`SHARED_BYTES`](crate::abi::cluster::pages::SHARED_BYTES) of shared memory.
///
/// # Safety
/// The views have the shapes above; pages of a row are below 2^32.
#[kernel(collectives(barrier = 1, shuffle = 5))]
pub unsafe fn cluster_pages(
    sizes: Global<u32>,
    clusters: u32,
    page_tokens: u32,
    first_place: u32,
    row_pages: GlobalMut<u32>,
    firsts: GlobalMut<u32>,
) {
    let (head, thread) = (thread::block_idx_x(), thread::thread_idx_x());
    let sizes = sizes.rows(clusters as usize).row(head as usize);
    let firsts = firsts.rows(clusters as usize).row(head as usize);
    let exchange = Exchange::new(shared::dynamic::<u32>(0, Exchange::words(BLOCK / WARP)), BLOCK / WARP);
    let (mut page, mut first, mut round) = (0, 0, 0);
    while first < clusters {
        let cluster = first + thread;
        let valid = cluster < clusters;
        let pages = if valid { sizes.load(cluster as usize).div_ceil(page_tokens) } else { 0 };
        let (before, all) = exchange.scan(round, pages);
        if valid {
            firsts.store(cluster as usize, page + before);
        }
        page += all;
        first += BLOCK;
        round += 1;
    }
    if thread == 0 {
        let row = row_pages.rows(2).row((first_place + head) as usize);
        let before = row.load(1);
        row.store(0, before);
        row.store(1, before + page);
    }
}
