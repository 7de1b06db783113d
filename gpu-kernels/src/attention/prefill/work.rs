//! Which part of a ragged batch a block has.

use cuda_std::prelude::*;

use crate::abi::prefill::QUERY_TILE;
use crate::ragged::request_of;

/// A batch as its prefix sums have it, each `[requests + 1]`.
#[derive(Clone, Copy)]
pub struct Batch {
    /// Query tokens of the requests before.
    pub first_query: Global<u32>,
    /// Key tokens of the requests before.
    pub first_key: Global<u32>,
    /// Query tiles of the requests before.
    pub first_tile: Global<u32>,
    pub requests: u32,
}

/// A query tile, for one query head.
#[derive(Clone, Copy)]
pub struct Work {
    /// The query head, among all.
    pub head: u32,
    pub kv_head: u32,
    /// The tile's first token, among the batch's queries.
    pub first_query: u32,
    /// Its tokens, 1 to [`QUERY_TILE`].
    pub queries: u32,
    /// The request's first token, among the batch's keys.
    pub first_key: u32,
    /// Keys of the request that the tile's first query sees: those up to its own.
    seen: u32,
}

impl Work {
    /// That of this block, if there is as much.
    ///
    /// KV heads follow each other, and of each the tiles, the latest first, and of each tile the heads of the group. So blocks that run
    /// at a time share the keys and values of few KV heads, which the L2 has room for, and a launch ends with its shortest tiles.
    ///
    /// # Safety
    /// The prefix sums ascend from 0.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    pub unsafe fn of_block(batch: Batch, kv_heads: u32, group: u32) -> Option<Self> {
        let tiles = batch.first_tile.load(batch.requests as usize);
        let of_kv_head = tiles * group;
        let block = thread::block_idx_x();
        if block >= of_kv_head * kv_heads {
            return None;
        }
        let (kv_head, block) = (block / of_kv_head, block % of_kv_head);
        let tile = tiles - 1 - block / group;
        let request = request_of(batch.first_tile, batch.requests, tile) as usize;
        let of_request = |first: Global<u32>| (first.load(request), first.load(request + 1));
        let (first_query, end) = of_request(batch.first_query);
        let (first_key, end_of_keys) = of_request(batch.first_key);
        let first = (tile - batch.first_tile.load(request)) * QUERY_TILE;
        let (queries, keys) = (end - first_query, end_of_keys - first_key);
        Some(Self {
            head: kv_head * group + block % group,
            kv_head,
            first_query: first_query + first,
            queries: (queries - first).min(QUERY_TILE),
            first_key,
            // The request's queries are its last tokens.
            seen: keys - queries + first + 1,
        })
    }

    /// Keys of the request that query `row` of the tile sees; of rows beyond the last more than there are.
    #[inline(always)]
    pub fn seen_by(&self, row: u32) -> u32 {
        self.seen + row
    }

    /// Keys that the tile's last query sees, and no query of it more.
    #[inline(always)]
    pub fn keys(&self) -> u32 {
        self.seen_by(self.queries - 1)
    }
}
