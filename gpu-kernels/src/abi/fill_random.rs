//! The launch of `fill_random`.

/// Threads of a block.
pub const BLOCK: u32 = 256;

/// The most blocks: threads are counted in 32 bits.
pub const MAX_BLOCKS: u32 = u32::MAX / BLOCK;

/// Four times the mean of a uniform 16-bit number.
pub const CENTRE: i32 = 4 * (u16::MAX as i32) / 2;

/// What the sum of four uniform 16-bit numbers is to be multiplied by, once it is centred, so that it has a standard deviation of
/// `deviation`. Each has a variance of `(2^32 - 1) / 12`.
pub const fn scale(deviation: f64) -> f32 {
    /// The square root of a third of `2^32 - 1`, spelled out since `core` has no roots.
    const SUM_DEVIATION: f64 = 37_837.227_237_206_48;
    (deviation / SUM_DEVIATION) as f32
}
