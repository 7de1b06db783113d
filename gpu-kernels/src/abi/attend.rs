//! The launches of `attend_64` and `attend_128`.

use super::WARP;

/// Threads of a block.
pub const BLOCK: u32 = 128;

/// Warps of a block.
pub const WARPS: u32 = BLOCK / WARP;

/// Query heads of a block: a group of more takes two blocks.
pub const HEADS: u32 = 8;

/// The most query heads that share a KV head.
pub const MAX_GROUP: u32 = 16;

/// Tokens that a warp takes at a time.
pub const TILE: u32 = 16;

/// Tokens of which a tile always has whole runs: a page is one or more of them.
pub const RUN: u32 = 8;

/// Tokens of a page.
pub const PAGE_TOKENS: [u32; 4] = [8, 16, 32, 64];

/// Tiles of a warp's ring; one less is in flight.
pub const STAGES: u32 = 3;

/// The most splits of a row.
pub const MAX_SPLITS: u32 = 256;

/// Blocks that a row's query heads take: each reads the row's pages.
pub const fn blocks_of_group(group: u32) -> u32 {
    group.div_ceil(HEADS)
}

/// Bytes of the rings of a block, each of [`STAGES`] tiles of K and V.
pub const fn ring_bytes(head_words: u32) -> u32 {
    WARPS * STAGES * TILE * 2 * head_words * 16
}

/// Shared memory of a block: the rings, the warps' statistics, and a flag.
pub const fn shared_bytes(head_words: u32) -> u32 {
    ring_bytes(head_words) + WARPS * HEADS * 16 + 16
}

/// Words of a block's partial result: outputs in f32, and a word of statistics a head.
pub const fn partial_words(head_words: u32) -> u32 {
    HEADS * (2 * head_words + 1)
}
