//! The launch of `score`.

/// Threads of a block.
pub const BLOCK: u32 = 128;

/// Partitions of a block: each row is cut into tiles, which have statistics of their own. Half as many cost long contexts a fifth more,
/// twice as many short ones half more.
pub const TILE: u32 = 512;

/// The most query heads that share a KV head.
pub const MAX_GROUP: u32 = 16;

/// The most words of a summary: shared memory has that many of each query.
pub const MAX_SUMMARY_WORDS: u32 = 64;

/// Words of a summary that a warp takes at a time.
pub const CHUNK_WORDS: u32 = 16;

/// Chunks of a warp's ring; one less is in flight. Fewer leave room for more blocks: of 2, 3, 4 and 6 an H200 took 148, 148, 153 and
/// 193 us for 16 requests of 128K tokens.
pub const STAGES: u32 = 3;

/// Shared memory of a block before its queries: 16 rows of each chunk, and a maximum and a sum a head and warp.
pub const SCRATCH_BYTES: u32 =
    BLOCK / crate::abi::WARP * (STAGES * 16 * 16 * CHUNK_WORDS + 2 * 4 * MAX_GROUP);

/// Shared memory of a block for summaries of `summary_words` words.
pub const fn shared_bytes(summary_words: u32) -> u32 {
    SCRATCH_BYTES + 16 * MAX_GROUP * summary_words.next_multiple_of(CHUNK_WORDS)
}

/// Tiles of rows of up to `stride` partitions.
pub const fn tiles(stride: u32) -> u32 {
    stride.div_ceil(TILE)
}
