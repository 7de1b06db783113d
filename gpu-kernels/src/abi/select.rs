//! The launches of `select` and `top_k`.

/// The fewest threads of a block: each has four bins of a digit.
pub const LEAST_BLOCK: u32 = 512;

/// The most threads of a block.
pub const MAX_BLOCK: u32 = 1024;

/// Threads of a block for rows of up to `stride` scores. A multiprocessor has registers for [`MAX_BLOCK`] threads: two rows of small blocks, where `two_fit` by their
/// shared memory and are wanted, since there are more rows than multiprocessors; or one large one, which long rows go faster by.
pub const fn block(stride: u32, two_fit: bool) -> u32 {
    if two_fit || stride <= 4 * LEAST_BLOCK { LEAST_BLOCK } else { MAX_BLOCK }
}

/// Scores or keys of a word.
pub const KEYS_A_QUAD: u32 = 4;

/// The key of what is never taken.
pub const MASKED_KEY: u32 = 0;

/// The key of what is taken before all else.
pub const FORCED_KEY: u32 = u32::MAX;

/// Shared memory of a block besides the keys.
pub const SCRATCH_BYTES: u32 = 8960;

/// The most keys in shared memory.
pub const MAX_RESIDENT: u32 = 49_152;

/// Of the heads' scores the greatest counts.
pub const MERGE_MAX: u32 = 0;
/// Their sum counts.
pub const MERGE_SUM: u32 = 1;
/// Their mean counts.
pub const MERGE_MEAN: u32 = 2;

/// What a score of 1 weighs for top-p: weights are whole numbers, so that their sums don't depend on an order.
pub const WEIGHT_OF_ONE: f32 = (1 << 26) as f32;

/// Shared memory of a block with room for `resident` keys.
pub const fn shared_bytes(resident: u32) -> u32 {
    SCRATCH_BYTES + 4 * resident
}
