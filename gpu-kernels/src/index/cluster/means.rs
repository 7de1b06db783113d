use cuda_std::prelude::*;
use cuda_std::warp::{FULL_MASK, warp_vote_ballot};

use super::centroid::{channels, rounded};
use super::members::{of_groups, of_pages};
use super::table::Table;
use crate::abi::WARP;
use crate::abi::cluster::NO_TOKEN;

/// The mean key, the mean value and the number of tokens of each page.
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `keys`, `first`, `kv_heads`, `head_words` | | as for [`cluster_update`](super::cluster_update()); `tokens` are the members' |
/// | `values` | as `keys` | |
/// | `page_tokens`, `first_place`, `row_pages` | at most 64 tokens | as [`cluster_pages`](super::cluster_pages()) left them |
/// | `members`, `member_pages` | | what [`cluster_list`](super::cluster_list()) left |
/// | `directories` | of all requests | segments of partitions |
/// | `directory` | | the request's first segment in `directories` |
/// | `first_row` | layer * `kv_heads` | row of KV head 0 |
/// | `request_rows` | | rows of a request: layers * `kv_heads` |
/// | `segment_partitions` | at least 1 | partitions of a segment |
/// | `summaries` | `[segments, request_rows, segment_partitions, head_words]` words | bf16 mean keys of partitions |
/// | `value_means` | as `summaries` | bf16 mean values |
/// | `partition_tokens` | `[segments, request_rows, segment_partitions]` | tokens of partitions |
///
/// A page's tokens are dealt out to `32 / head_words` sums in f32 in turn, which are added up at the end; means are sums times 1 / tokens, rounded to bf16.
///
/// # Mapping
/// A warp has a page of a KV head at a time, a lane a word of a key and of a value.
///
/// # Launch
/// Any number of blocks of [`BLOCK`](crate::abi::cluster::means::BLOCK) threads; no shared memory.
///
/// # Safety
/// The views have the shapes above; the directory has the segments of the row's partitions; nothing writes `keys` or `values` until the launch has
/// ended.
#[kernel(collectives(shuffle = 16, vote = 2))]
pub unsafe fn cluster_means(
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
    directories: Global<u32>,
    directory: u32,
    first_row: u32,
    request_rows: u32,
    segment_partitions: u32,
    summaries: GlobalMut<U32x4>,
    value_means: GlobalMut<U32x4>,
    partition_tokens: GlobalMut<u32>,
) {
    let lane = warp::lane_id();
    let (word, group, groups) = (lane % head_words, lane / head_words, WARP / head_words);
    let width = (kv_heads * head_words) as usize;
    let (keys, values) = (keys.rows(width), values.rows(width));
    let table = Table { directories, directory, first_row, request_rows, segment_partitions };
    let sizes = [first_place, kv_heads, member_pages, page_tokens];
    of_pages(members, row_pages, sizes, |page, head, before, members| {
        let is_token = |at: u32| at < page_tokens && members.load(at as usize) != NO_TOKEN;
        let count = warp_vote_ballot(FULL_MASK, is_token(lane)).count_ones()
            + warp_vote_ballot(FULL_MASK, is_token(lane + WARP)).count_ones();
        let (mut key, mut value) = ([0.0_f32; 8], [0.0_f32; 8]);
        let mut at = group;
        while at < count {
            let (token, column) = (first + members.load(at as usize), (head * head_words + word) as usize);
            let of_key = channels(keys.row(token as usize).load_with(column, LoadCache::ReadOnlyOnce));
            let of_value = channels(values.row(token as usize).load_with(column, LoadCache::ReadOnlyOnce));
            let mut channel = 0;
            while channel < 8 {
                key[channel] += of_key[channel];
                value[channel] += of_value[channel];
                channel += 1;
            }
            at += groups;
        }
        let (mut key, mut value) = (of_groups(key, head_words), of_groups(value, head_words));
        let scale = 1.0 / count as f32;
        let mut channel = 0;
        while channel < 8 {
            key[channel] *= scale;
            value[channel] *= scale;
            channel += 1;
        }
        let place = table.place(head, before + page);
        if group == 0 {
            summaries.rows(head_words as usize).row(place).store(word as usize, rounded(key));
            value_means.rows(head_words as usize).row(place).store(word as usize, rounded(value));
        }
        if lane == 0 {
            partition_tokens.store(place, count);
        }
    });
}
