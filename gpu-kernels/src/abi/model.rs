//! The launches of a model's elementwise kernels. Activations that go into a matrix product are bf16, the residual stream, norm weights
//! and logits are f32, all of them rows of whole words.

/// Elements that a thread takes where f32 and bf16 meet: a word of f32, half a word of bf16.
pub const QUAD: u32 = 4;

/// The most blocks of a launch.
pub const MAX_BLOCKS: u64 = i32::MAX as u64;

/// The most elements of a row: threads step beyond a row's end before they look.
pub const MAX_WIDTH: u32 = 1 << 24;

/// The launch of `embed`.
pub mod embed {
    /// Threads of a block; each has a quad.
    pub const BLOCK: u32 = 256;

    /// Blocks that share a row of `hidden` elements.
    pub const fn parts(hidden: u32) -> u32 {
        (hidden / super::QUAD).div_ceil(BLOCK)
    }
}

/// The launch of `rms_norm`: a block a row.
pub mod rms_norm {
    /// Threads of a block.
    pub const BLOCK: u32 = 512;

    /// Warps of a block.
    pub const WARPS: u32 = BLOCK / crate::abi::WARP;

    /// Quads that a thread keeps in registers; of rows of more than 8,192 elements it reads the rest twice.
    pub const KEPT: u32 = 4;

    /// Shared memory of a block, in bytes: the warps' sums.
    pub const SHARED_BYTES: u32 = 128;
}

/// The launch of `rotate`.
pub mod rotate {
    use crate::abi::WARP;

    /// Threads of a block.
    pub const BLOCK: u32 = 128;

    /// Words of a head that `rotate` takes: 64 or 128 elements.
    pub const HEAD_WORDS: [u32; 2] = [8, 16];

    /// Up to here each warp has one group of heads: all that there is runs at once, and the launch takes as long as one warp.
    const WARPS_AT_ONCE: u64 = 4096;

    /// Groups of a warp of longer launches, which spare it most of its sines.
    const GROUPS_OF_WARP: u32 = 4;

    /// Heads that a warp takes at a time: a lane has two words of a head.
    pub const fn group_heads(head_words: u32) -> u32 {
        WARP / (head_words / 2)
    }

    /// Groups of a token's heads: queries, keys and values.
    pub const fn groups(heads: u32, head_words: u32) -> u32 {
        heads.div_ceil(group_heads(head_words))
    }

    /// Warps that share a token of `groups` groups, of `tokens` tokens in all.
    pub const fn warps_of_token(tokens: u32, groups: u32) -> u32 {
        if tokens as u64 * groups as u64 <= WARPS_AT_ONCE { groups } else { groups.div_ceil(GROUPS_OF_WARP) }
    }

    /// Blocks of a launch of `warps` warps.
    pub const fn grid(warps: u64) -> u64 {
        warps.div_ceil((BLOCK / WARP) as u64)
    }
}

/// The launch of `swiglu`.
pub mod swiglu {
    /// Threads of a block; each has a word.
    pub const BLOCK: u32 = 256;

    /// Blocks that share a row of `words` words.
    pub const fn parts(words: u32) -> u32 {
        words.div_ceil(BLOCK)
    }
}

/// The launch of `argmax`.
pub mod argmax {
    /// Threads of a block.
    pub const BLOCK: u32 = 256;

    /// Words of logits that a thread has in flight; it takes no more.
    pub const WORDS: u32 = 8;

    /// Logits of a block.
    pub const PART: u32 = BLOCK * WORDS * super::QUAD;

    /// Shared memory of a block, in bytes: the warps' greatest.
    pub const SHARED_BYTES: u32 = 128;

    /// The id where a row has no finite logit.
    pub const NONE: u32 = u32::MAX;

    /// Blocks that share a row of `vocab` logits.
    pub const fn parts(vocab: u32) -> u32 {
        vocab.div_ceil(PART)
    }
}

/// The launch of `sample`: a block a row.
pub mod sample {
    /// Threads of a block.
    pub const BLOCK: u32 = 1024;

    /// Warps of a block.
    pub const WARPS: u32 = BLOCK / crate::abi::WARP;

    /// Shared memory of a block, in bytes.
    pub const SHARED_BYTES: u32 = 16_768;

    /// Bits of a draw.
    pub const DRAW_BITS: u32 = 53;

    /// The weight of the likeliest token.
    pub const WEIGHT_OF_ONE: u64 = 1 << 40;

    /// How a row's token is drawn; each field as the engine's `SamplingParams` has it.
    #[derive(Clone, Copy, Debug, Default, PartialEq)]
    #[repr(C, align(16))]
    pub struct SampleParams {
        /// Divisor of the logits; 0 takes the likeliest token and ignores all that follows.
        pub temperature: f32,
        /// Most tokens to draw from; 0 is no limit.
        pub top_k: u32,
        /// Share of the probability to draw from; 1 is all of it.
        pub top_p: f32,
        /// Least probability to draw from, relative to the likeliest token's; 0 is no limit.
        pub min_p: f32,
        /// The draw: a random number of [`DRAW_BITS`] bits.
        pub draw: u64,
        /// Not used; keeps the size a multiple of 16 bytes.
        pub unused: u64,
    }

    // SAFETY: four numbers of 32 bits and two of 64 without padding, any bits.
    unsafe impl bytemuck::Zeroable for SampleParams {}
    // SAFETY: as above.
    unsafe impl bytemuck::Pod for SampleParams {}
}
