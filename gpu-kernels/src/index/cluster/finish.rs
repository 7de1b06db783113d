use cuda_std::prelude::*;
use cuda_std::shared;

use super::centroid::{channels, mean_of, rounded};
use super::members;
use super::table::Table;
use crate::abi::WARP;
use crate::abi::cluster::NO_TOKEN;
use crate::abi::cluster::update::{CLUSTERS, LISTED};

/// Summaries of partitions, and the tokens of each page: after the last pass, where tokens are assigned to the clusters of all spans.
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `keys`, `first`, `tokens`, `kv_heads`, `head_words`, `means` | | as for [`cluster_update`](super::cluster_update()) |
/// | `values` | as `keys` | |
/// | `clusters` | a multiple of 8 | of a row: spans * centroids of a span |
/// | `assigned` | as for `cluster_update` | clusters of tokens, of all spans |
/// | `centroids` | `[kv_heads, clusters, head_words]` words | those that tokens were assigned to |
/// | `page_tokens`, `partition_pages`, `directories`, `directory`, `first_row`, `request_rows`, `segment_partitions` | | as for [`cluster_pages`](super::cluster_pages()) |
/// | `totals`, `firsts` | | what `cluster_pages` left |
/// | `summaries` | `[segments, request_rows, segment_partitions, head_words]` words | bf16 mean keys of partitions |
/// | `value_means` | as `summaries` | bf16 mean values |
/// | `members` | `[kv_heads, member_pages, page_tokens]` | tokens of each page of this run, ascending in a cluster, then [`NO_TOKEN`] |
/// | `member_pages` | at least the pages of a row; [`max_pages`](crate::abi::cluster::max_pages) | |
///
/// All partitions of a cluster have its mean key and mean value. Sums are those of `cluster_update`, means are sums times 1 / members, rounded to bf16.
/// A cluster without tokens keeps its centroid, to which the mean key is added, and has a mean value of 0.
///
/// # Mapping
/// As `cluster_update`, but for reading the clusters of all of the row's tokens.
///
/// # Launch
/// As `cluster_update`.
///
/// # Safety
/// The views have the shapes above, `totals`, `firsts` and tables are those of `cluster_pages` for the sizes of these clusters; nothing writes `keys`
/// or `values` until the launch has ended.
#[kernel(collectives(barrier = 2, shuffle = 16, vote = 5))]
pub unsafe fn cluster_finish(
    keys: Global<U32x4>,
    values: Global<U32x4>,
    first: u32,
    tokens: u32,
    kv_heads: u32,
    head_words: u32,
    clusters: u32,
    means: Global<U32x4>,
    assigned: Global<U32x4>,
    centroids: Global<U32x4>,
    page_tokens: u32,
    partition_pages: u32,
    directories: Global<u32>,
    directory: u32,
    first_row: u32,
    request_rows: u32,
    segment_partitions: u32,
    totals: Global<U32x4>,
    firsts: Global<u64>,
    summaries: GlobalMut<U32x4>,
    value_means: GlobalMut<U32x4>,
    members: GlobalMut<u32>,
    member_pages: u32,
) {
    let (warp, lane) = (thread::thread_idx_x() / WARP, warp::lane_id());
    let place = thread::block_idx_x() * CLUSTERS + warp;
    let (head, cluster) = (place / clusters, place % clusters);
    let list = shared::dynamic::<u32>((warp * LISTED) as usize * 4, LISTED as usize);
    let width = kv_heads * head_words;
    let keys = keys.slice((first * width) as usize, (tokens * width) as usize);
    let values = values.slice((first * width) as usize, (tokens * width) as usize);
    let assigned = assigned.rows(tokens.div_ceil(4) as usize).row(head as usize);
    let own = firsts.load(place as usize);
    let (partition, page) = ((own >> 32) as u32, own as u32);
    // Pages of earlier runs have no members here.
    let page = page - totals.load(2 * head as usize).y;
    let own_members = members.rows((member_pages * page_tokens) as usize).row(head as usize);

    let (mut key_sums, mut value_sums) = ([0.0_f32; 8], [0.0_f32; 8]);
    let column = [width, head * head_words];
    let size = members::walk(assigned, [0, tokens], cluster, head_words, list, |before, count| {
        members::add(&mut key_sums, list, count, keys, column, head_words);
        members::add(&mut value_sums, list, count, values, column, head_words);
        let mut at = lane;
        while at < count {
            own_members.store((page * page_tokens + before + at) as usize, list.load(at as usize));
            at += WARP;
        }
    });
    let pages = size.div_ceil(page_tokens);
    let mut at = size + lane;
    while at < pages * page_tokens {
        own_members.store((page * page_tokens + at) as usize, NO_TOKEN);
        at += WARP;
    }

    let (mut key, mut value) =
        (members::of_groups(key_sums, head_words), members::of_groups(value_sums, head_words));
    let scale = if size > 0 { 1.0 / size as f32 } else { 0.0 };
    let mut at = 0;
    while at < 8 {
        key[at] *= scale;
        value[at] *= scale;
        at += 1;
    }
    let word = lane % head_words;
    if size == 0 {
        let mean = mean_of(means, head, head_words);
        key = channels(centroids.rows(head_words as usize).row(place as usize).load(word as usize));
        let mut at = 0;
        while at < 8 {
            key[at] += mean[at];
            at += 1;
        }
    }
    let (key, value) = (rounded(key), rounded(value));
    if lane < head_words {
        let table = Table { directories, directory, first_row, request_rows, segment_partitions };
        let partitions = pages.div_ceil(partition_pages).max(1);
        let mut part = 0;
        while part < partitions {
            let place = table.place(head, partition + part);
            summaries.rows(head_words as usize).row(place).store(word as usize, key);
            value_means.rows(head_words as usize).row(place).store(word as usize, value);
            part += 1;
        }
    }
}
