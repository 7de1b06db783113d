//! The launches of `gemm` and `gemm_wgmma`.

/// Tokens of a block.
pub const TOKENS: u32 = 128;

/// Words of each row that a block takes at a time: a line of 128 bytes.
pub const CHUNK_WORDS: u32 = 8;

/// Tiles of tokens that share weights while they are in the L2: blocks of so many tiles take all rows of weights one after another.
pub const PANEL: u32 = 16;

/// `gemm`: products of a warp.
pub mod mma {
    /// Threads of a block.
    pub const BLOCK: u32 = 128;

    /// Rows of weights of a block.
    pub const ROWS: u32 = 128;

    /// Stages of the ring; one less is in flight.
    pub const STAGES: u32 = 3;
}

/// `gemm_wgmma`: products of a warpgroup.
pub mod wgmma {
    /// Threads of a block: two warpgroups.
    pub const BLOCK: u32 = 256;

    /// Rows of weights of a block.
    pub const ROWS: u32 = 256;

    /// Stages of the ring; of two products are under way.
    pub const STAGES: u32 = 4;
}

/// Shared memory of a block, in bytes.
pub const fn shared_bytes(rows: u32, stages: u32) -> u32 {
    stages * (TOKENS + rows) * CHUNK_WORDS * 16
}

/// Blocks for `tokens` tokens and `n` rows of weights, `rows` rows a block.
pub const fn blocks(tokens: u32, n: u32, rows: u32) -> u64 {
    tokens.div_ceil(TOKENS) as u64 * n.div_ceil(rows) as u64
}
