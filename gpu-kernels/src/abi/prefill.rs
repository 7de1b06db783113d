//! The launches of `prefill_64` and `prefill_128`.

use super::WARP;

/// Threads of a block.
pub const BLOCK: u32 = 128;

/// Warps of a block.
pub const WARPS: u32 = BLOCK / WARP;

/// Query tokens of a block, all of one request.
pub const QUERY_TILE: u32 = 128;

/// Query tokens of a warp.
pub const WARP_ROWS: u32 = QUERY_TILE / WARPS;

/// Tokens of which a block takes keys, and then values, at a time.
pub const KEY_TILE: u32 = 64;

/// Places of a block's ring, each for the keys or the values of a tile; one less is in flight.
pub const STAGES: u32 = 3;

/// The most query heads that share a KV head.
pub const MAX_GROUP: u32 = 16;

/// Query tiles of a request's query tokens.
pub const fn query_tiles(tokens: u32) -> u32 {
    tokens.div_ceil(QUERY_TILE)
}

/// Shared memory of a block: its queries, and the ring.
pub const fn shared_bytes(head_words: u32) -> u32 {
    (QUERY_TILE + STAGES * KEY_TILE) * head_words * 16
}
