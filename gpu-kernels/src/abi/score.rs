//! The launch of `score`.

/// Threads of a block.
pub const BLOCK: u32 = 128;

/// A row is cut into tiles, a block each, which have statistics of their own. Partitions of a tile are a multiple of this: what the block's warps take at a time.
pub const TILE_UNIT: u32 = BLOCK / crate::abi::WARP * 16;

/// The most partitions of a tile: a warp has their marks.
pub const MAX_TILE: u32 = 512;

/// Blocks that a launch wants to have, about two a multiprocessor, as far as [`TILE_UNIT`] allows. Of 16K and 32K tokens in chunks of 8, one to 32 requests, tiles
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

/// Tiles of each row in a launch for `rows` rows of up to `stride` partitions. Few large ones pay a block's beginning less often, many small ones keep all
/// multiprocessors busy.
pub const fn tiles(rows: u64, stride: u32) -> u32 {
    let mut tile = MAX_TILE;
    while tile > TILE_UNIT && rows * (stride.div_ceil(tile) as u64) < BLOCKS {
        tile /= 2;
    }
    stride.div_ceil(tile)
}

/// The most tiles of a row of up to `stride` partitions.
pub const fn max_tiles(stride: u32) -> u32 {
    stride.div_ceil(TILE_UNIT)
}

/// Partitions of a tile of a row of `partitions`, so that its tiles are as many as may be, and as long as each other.
pub const fn tile(partitions: u32, tiles: u32) -> u32 {
    partitions.div_ceil(tiles).next_multiple_of(TILE_UNIT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_of_a_row_cover_it_and_are_within_bounds() {
        for rows in [1, 3, 8, 32, 128, 152, 4096] {
            for stride in [4, 60, 64, 68, 512, 516, 2056, 4112, 16_392, 131_080] {
                let of_row = tiles(rows, stride);
                assert!((1..=max_tiles(stride)).contains(&of_row), "{rows} {stride}");
                for partitions in [1, 63, 64, 65, 500, 2047, stride / 2, stride - 1, stride] {
                    let (partitions, place) = (partitions.clamp(1, stride), (rows, stride, partitions));
                    let width = tile(partitions, of_row);
                    assert!(width.is_multiple_of(TILE_UNIT) && width <= MAX_TILE, "{place:?}: {width}");
                    assert!(width * of_row >= partitions, "{place:?}: {width}");
                }
            }
        }
    }

    #[test]
    fn a_launch_has_as_many_blocks_as_it_wants_or_the_smallest_tiles() {
        assert_eq!([1, 8, 32, 128].map(|rows| tiles(rows, 2056)), [33, 33, 9, 5]);
        assert_eq!([1, 8, 32, 128].map(|rows| tiles(rows, 4112)), [65, 33, 9, 9]);
        // A short context among long ones has all of a row's blocks.
        let of_row = tiles(8, 16_392);
        assert_eq!((of_row, tile(16_392, of_row), tile(2048, of_row)), (33, 512, 64));
    }
}
