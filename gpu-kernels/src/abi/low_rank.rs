//! The launches that find a layer's keys in low rank, and rebuild keys from it.
//!
//! Words are of 16 bytes, here as everywhere: 8 elements of bf16 or 4 of f32.

use super::WARP;

/// Ranks are a multiple of this: `rebuild_keys` takes so many at a time.
pub const RANK_STEP: u32 = 32;

/// The greatest rank: what `inverse_factor` works on lies in shared memory.
pub const MAX_RANK: u32 = 224;

/// The launch of `unrotate`: a warp a token.
pub mod unrotate {
    use super::WARP;

    /// Threads of a block.
    pub const BLOCK: u32 = 128;

    /// Blocks for `tokens` tokens.
    pub const fn grid(tokens: u32) -> u32 {
        tokens.div_ceil(BLOCK / WARP)
    }
}

/// The launches of `gram` and `gram_sum`.
pub mod gram {
    /// Threads of a block of `gram`.
    pub const BLOCK: u32 = 128;

    /// Elements of a side of a tile.
    pub const TILE: u32 = 128;

    /// Words of a tile's row of keys.
    pub const TILE_WORDS: u32 = TILE / 8;

    /// Words of sums of a tile.
    pub const TILE_SUMS: u32 = TILE * TILE / 4;

    /// Tokens of a stage.
    pub const STEP: u32 = 64;

    /// Stages of the ring; one less is in flight.
    pub const STAGES: u32 = 3;

    /// Steps whose products are summed by the tensor cores, which cut sums off; the sums of so many are added with rounding.
    pub const RUN: u32 = 32;

    /// The most shares of the tokens: of narrow keys, of which there is little to do.
    pub const MAX_SHARES: u32 = 16;

    /// Threads of a block of `gram_sum`; each has a word of a tile.
    pub const SUM_BLOCK: u32 = 256;

    /// Shared memory of a block of `gram`, in bytes.
    pub const SHARED_BYTES: u32 = STAGES * STEP * 2 * TILE_WORDS * 16;

    /// Tiles of the lower triangle, the diagonal's whole, of keys of `width` elements.
    pub const fn tiles(width: u32) -> u32 {
        let side = width.div_ceil(TILE);
        side * (side + 1) / 2
    }

    /// Words of the shares' sums.
    pub const fn sum_words(width: u32, shares: u32) -> u64 {
        shares as u64 * tiles(width) as u64 * TILE_SUMS as u64
    }
}

/// The launches of `row_dots` and `row_sums`.
pub mod product {
    /// Threads of a block.
    pub const BLOCK: u32 = 256;

    /// Rows and columns of a block's tile.
    pub const TILE: u32 = 32;

    /// Words of a row of a stage: 32 numbers.
    pub const STEP_WORDS: u32 = 8;

    /// Words between rows of a stage: one more, so that rows do not share banks.
    pub const STRIDE: u32 = STEP_WORDS + 1;

    /// Words of a stage: rows of both factors.
    pub const STAGE_WORDS: u32 = 2 * TILE * STRIDE;

    /// Stages of the ring; one less is in flight.
    pub const STAGES: u32 = 3;

    /// Parts of a step that threads take each for themselves, and add up at the end.
    pub const PARTS: u32 = 4;

    /// Shared memory of a block, in bytes; the parts' sums take the ring's place.
    pub const SHARED_BYTES: u32 = STAGES * STAGE_WORDS * 16;

    const _: () = assert!(PARTS * TILE * TILE * 4 <= SHARED_BYTES);

    /// Blocks for `rows` times `columns` numbers.
    pub const fn grid(rows: u32, columns: u32) -> u64 {
        rows.div_ceil(TILE) as u64 * columns.div_ceil(TILE) as u64
    }
}

/// The launch of `inverse_factor`: one block.
pub mod inverse_factor {
    /// Threads of the block.
    pub const BLOCK: u32 = 1024;

    /// The least pivot that stays as it is where small ones are raised.
    pub const LEAST_RAISED: f32 = 1e-5;

    /// The least pivot that is kept where small ones are dropped.
    pub const LEAST_KEPT: f32 = 1e-4;

    /// Shared memory in bytes: the matrix, and a scale of each row.
    pub const fn shared_bytes(rank: u32) -> u32 {
        4 * (rank * rank + rank)
    }
}

/// The launch of `store_basis`.
pub mod store_basis {
    /// Threads of a block; each has a word of both layouts.
    pub const BLOCK: u32 = 256;

    /// Blocks for `words` words of a layout.
    pub const fn grid(words: u32) -> u32 {
        words.div_ceil(BLOCK)
    }
}

/// The launches of `rebuild_keys_64` and `rebuild_keys_128`.
pub mod rebuild_keys {
    use super::{RANK_STEP, WARP};

    /// Threads of a block.
    pub const BLOCK: u32 = 128;

    /// Tokens that a warp takes at a time.
    pub const TILE: u32 = 16;

    /// Words between the basis' channels in shared memory, of `rank_words`: an odd number of halves of a line, so that two of them
    /// do not share banks.
    pub const fn stride(rank_words: u32) -> u32 {
        if rank_words % 8 == 4 { rank_words } else { rank_words + 4 }
    }

    /// Where a block's lists start in its shared memory, in bytes: after a head's basis.
    pub const fn list_start(head_dim: u32, rank_words: u32) -> u32 {
        head_dim * stride(rank_words) * 16
    }

    /// Shared memory of a block, in bytes.
    pub const fn shared_bytes(head_dim: u32, rank_words: u32, lists: u32) -> u32 {
        list_start(head_dim, rank_words) + crate::abi::gather::list_bytes(BLOCK, lists)
    }

    /// Words of a rank step.
    pub const STEP_WORDS: u32 = RANK_STEP / 8;

    /// Head dimensions that there is a kernel for.
    pub const HEAD_WORDS: [u32; 2] = [8, 16];

    const _: () = assert!(BLOCK.is_multiple_of(WARP));
}

/// The launch of `complete_basis`: one block.
pub mod complete_basis {
    use super::WARP;

    /// Threads of the block.
    pub const BLOCK: u32 = 1024;

    /// Where the exchange of the block's warps starts in shared memory, in bytes: after what is left of each axis, the row under way,
    /// which rows are empty, and a sum of each warp.
    pub const fn exchange_start(rank: u32, width: u32) -> u32 {
        4 * (2 * width + rank + BLOCK / WARP)
    }

    /// Shared memory in bytes.
    pub const fn shared_bytes(rank: u32, width: u32) -> u32 {
        exchange_start(rank, width) + 4 * 2 * (BLOCK / WARP)
    }
}

/// The launch of `project_keys`: a block for each entry and rank step.
pub mod project_keys {
    use super::{RANK_STEP, WARP};

    /// Threads of a block.
    pub const BLOCK: u32 = 256;

    /// Tokens that a block takes at a time.
    pub const TILE: u32 = 4;

    /// Words of a rank step.
    pub const STEP_WORDS: u32 = RANK_STEP / 8;

    /// Blocks for a batch of `entries` entries.
    pub const fn grid(entries: u32, rank_words: u32) -> u32 {
        entries * (rank_words / STEP_WORDS)
    }

    /// Where the warps' sums start in shared memory, in bytes: after a tile's keys of `width` elements.
    pub const fn sums_start(width: u32) -> u32 {
        4 * TILE * width
    }

    /// Shared memory of a block, in bytes.
    pub const fn shared_bytes(width: u32) -> u32 {
        sums_start(width) + 4 * (BLOCK / WARP) * TILE * RANK_STEP
    }
}
