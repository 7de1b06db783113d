//! The launch of `score`.

/// Threads of a block.
pub const BLOCK: u32 = 128;

/// Each row is cut into tiles, a block each, which have statistics of their own. Partitions of a tile are a multiple of this.
pub const LEAST_TILE: u32 = 64;

/// The most partitions of a tile: a warp has their marks.
pub const MAX_TILE: u32 = 512;

/// Blocks that a launch wants to have, about two a multiprocessor, as far as [`LEAST_TILE`] allows. Of 16K and 32K tokens in chunks of 8, one to 32 requests, tiles
/// by this number were the best of four on an H200, or within 5 %.
const BLOCKS: u64 = 256;

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

/// Partitions of a tile in a launch for `rows` rows of up to `stride` partitions. Large tiles pay a block's beginning less often, small ones keep all
/// multiprocessors busy.
pub const fn tile(rows: u64, stride: u32) -> u32 {
    let mut tile = MAX_TILE;
    while tile > LEAST_TILE && rows * (tiles(stride, tile) as u64) < BLOCKS {
        tile /= 2;
    }
    tile
}

/// Tiles of `tile` partitions of rows of up to `stride`.
pub const fn tiles(stride: u32, tile: u32) -> u32 {
    stride.div_ceil(tile)
}

/// The most tiles of such rows.
pub const fn max_tiles(stride: u32) -> u32 {
    tiles(stride, LEAST_TILE)
}
