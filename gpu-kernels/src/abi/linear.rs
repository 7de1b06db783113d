//! The launches of `linear_8`, `linear_16`, `linear_32` and `linear_64`, named after the tokens that they have room for.

use super::WARP;

/// Threads of a block.
pub const BLOCK: u32 = 256;

/// Rows of weights of a tile: 16 a warp.
pub const TILE: u32 = 16 * (BLOCK / WARP);

/// Words of a chunk of a row: a line of 128 bytes. A tile of so many words is a unit of work.
pub const CHUNK_WORDS: u32 = 8;

/// Chunks of each row that a block takes at a time.
pub const STEP_CHUNKS: u32 = 2;

/// Words of each row that a block takes at a time.
pub const STEP_WORDS: u32 = STEP_CHUNKS * CHUNK_WORDS;

/// Tokens that the kernels have room for.
pub const TOKEN_TILES: [u32; 4] = [8, 16, 32, 64];

/// The most tokens.
pub const MAX_TOKENS: u32 = 64;

/// What becomes of a product, as the kernels are told.
pub mod epilogue {
    /// Stored as bf16.
    pub const STORE_BF16: u32 = 0;
    /// Stored as f32.
    pub const STORE_F32: u32 = 1;
    /// Added to the f32 that is there.
    pub const ADD_F32: u32 = 2;
    /// The first half of the weights gives gates, the second what they let through: `silu(gate) * up`, stored as bf16.
    pub const GATED_BF16: u32 = 3;
}

/// The least of [`TOKEN_TILES`] with room for `tokens` tokens, at most [`MAX_TOKENS`].
pub const fn token_tile(tokens: u32) -> u32 {
    let mut tile = 0;
    while TOKEN_TILES[tile] < tokens {
        tile += 1;
    }
    TOKEN_TILES[tile]
}

/// Stages of a block's ring; one less is in flight. For up to 16 tokens two blocks fit on a multiprocessor of Hopper: one of a launch, and
/// one of the next, which overlaps with it.
pub const fn stages(token_tile: u32) -> u32 {
    let stages = RING_BYTES / (stage_words(token_tile) * 16);
    if stages > 3 { stages } else { 3 }
}

/// What a ring should have.
const RING_BYTES: u32 = 108 << 10;

/// Words of a stage: weights, and as much of the tokens.
pub const fn stage_words(token_tile: u32) -> u32 {
    (TILE + token_tile) * STEP_WORDS
}

/// Shared memory of a block, in bytes: the ring, and a flag.
pub const fn shared_bytes(token_tile: u32) -> u32 {
    stages(token_tile) * stage_words(token_tile) * 16 + 16
}

/// Tiles of `n` rows of weights.
pub const fn tiles(n: u32) -> u32 {
    n.div_ceil(TILE)
}

/// Units of a tile whose rows have `k_words` words.
pub const fn chunks(k_words: u32) -> u32 {
    k_words.div_ceil(CHUNK_WORDS)
}

/// Words of scratch for the partial sums of `blocks` blocks: each ends in one tile that another began, and begins one that another ends.
pub const fn partial_words(token_tile: u32, blocks: u32) -> u64 {
    2 * blocks as u64 * (token_tile * TILE / 4) as u64
}
