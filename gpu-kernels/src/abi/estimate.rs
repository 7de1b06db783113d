//! The launch of `estimate`.

/// Threads of a block.
pub const BLOCK: u32 = 256;

/// Estimates whose weights are made at a time: a quarter of the threads.
pub const TILE: u32 = BLOCK / 4;

/// Shared memory of a block: weights and places of a tile, maxima and sums of warps, their outputs.
pub const SHARED_BYTES: u32 = TILE * 8 * 4 + TILE * 4 + 2 * 64 * 4 + 2048 * 16;
