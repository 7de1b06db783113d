use cuda_std::prelude::*;
use cuda_std::shared;

use super::table::Table;
use crate::abi::WARP;
use crate::abi::cluster::pages::BLOCK;
use crate::block::Exchange;

/// Where each cluster's pages and partitions begin.
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `sizes` | `[kv_heads, clusters]` | tokens of clusters |
/// | `clusters` | at least 1 | of a row |
/// | `page_tokens` | at least 1 | tokens of a page |
/// | `partition_pages` | at least 1 | pages of a partition at most |
/// | `directories` | of all requests | segments of partitions |
/// | `directory` | | the request's first segment in `directories` |
/// | `first_row` | layer * `kv_heads` | row of KV head 0 |
/// | `request_rows` | | rows of a request: layers * `kv_heads` |
/// | `segment_partitions` | at least 1 | partitions of a segment |
/// | `capacity` | | partitions that the request has room for in each row |
/// | `totals` | `[kv_heads, 2]` words | partitions and pages of a row, the tokens of its largest cluster, 0: before this run, after it. In: after the runs before, at the second place |
/// | `firsts` | `[kv_heads, clusters]` u64 | each cluster's first page (low) and first partition (high), of the row's |
/// | `partition_tokens` | `[segments, request_rows, segment_partitions]` | tokens of each partition; 0 from the last one to `capacity` |
/// | `first_pages` | as `partition_tokens` | each partition's first page; not written from the last one on |
///
/// Clusters take pages and partitions in their order, after those of earlier runs. A cluster has `tokens / page_tokens` pages, rounded up, and each
/// `partition_pages` of them are a partition; one without tokens has a partition of none.
///
/// # Mapping
/// A block has a row, a thread a cluster at a time.
///
/// # Launch
/// `kv_heads` blocks of [`BLOCK`] threads, [`SHARED_BYTES`](crate::abi::cluster::pages::SHARED_BYTES) of shared memory.
///
/// # Safety
/// The views have the shapes above; `capacity` is enough for all partitions and has its segments in `directories`, no two of one place;
/// pages and partitions of a row are below 2^32.
#[kernel(collectives(barrier = 3, shuffle = 10, reduce = 1))]
pub unsafe fn cluster_pages(
    sizes: Global<u32>,
    clusters: u32,
    page_tokens: u32,
    partition_pages: u32,
    directories: Global<u32>,
    directory: u32,
    first_row: u32,
    request_rows: u32,
    segment_partitions: u32,
    capacity: u32,
    totals: GlobalMut<U32x4>,
    firsts: GlobalMut<u64>,
    partition_tokens: GlobalMut<u32>,
    first_pages: GlobalMut<u32>,
) {
    let (head, thread) = (thread::block_idx_x(), thread::thread_idx_x());
    let table = Table { directories, directory, first_row, request_rows, segment_partitions };
    let sizes = sizes.rows(clusters as usize).row(head as usize);
    let firsts = firsts.rows(clusters as usize).row(head as usize);
    let totals = totals.rows(2).row(head as usize);
    let exchange = Exchange::new(shared::dynamic::<u32>(0, Exchange::words(BLOCK / WARP)), BLOCK / WARP);
    let before = totals.load(1);
    let (mut partition, mut page, mut largest) = (before.x, before.y, 0);
    let most = page_tokens * partition_pages;
    let mut first = 0;
    while first < clusters {
        let cluster = first + thread;
        let valid = cluster < clusters;
        let size = if valid { sizes.load(cluster as usize) } else { 0 };
        let pages = size.div_ceil(page_tokens);
        let partitions = if valid { pages.div_ceil(partition_pages).max(1) } else { 0 };
        let (partitions_before, all_partitions) = exchange.scan(0, partitions);
        let (pages_before, all_pages) = exchange.scan(1, pages);
        let (own, own_page) = (partition + partitions_before, page + pages_before);
        if valid {
            firsts.store(cluster as usize, u64::from(own) << 32 | u64::from(own_page));
        }
        let mut part = 0;
        while part < partitions {
            let place = table.place(head, own + part);
            partition_tokens.store(place, (size - part * most).min(most));
            first_pages.store(place, own_page + part * partition_pages);
            part += 1;
        }
        largest = largest.max(size);
        partition += all_partitions;
        page += all_pages;
        first += BLOCK;
    }
    let largest = u32::MAX - exchange.least(0, u32::MAX - largest);
    // Behind the last barrier, so all have read what was there.
    if thread == 0 {
        totals.store(0, before);
        totals.store(1, U32x4 { x: partition, y: page, z: largest.max(before.z), w: 0 });
    }
    let mut rest = partition + thread;
    while rest < capacity {
        partition_tokens.store(table.place(head, rest), 0);
        rest += BLOCK;
    }
}
