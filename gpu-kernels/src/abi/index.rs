/// The launch of the kernels that index prompts: `chunk_mean`, `chunk_bounds`.
pub mod index_prompts {
    /// Threads of a block.
    pub const BLOCK: u32 = 256;

    /// The most words of a launch: chunks x KV heads x words of a key. A word is a thread's, and threads are counted in 32 bits.
    pub const MAX_WORDS: u32 = u32::MAX - BLOCK;

    /// Blocks for `words` words (chunks x KV heads x words of a key).
    pub const fn grid(words: u32) -> u32 {
        words.div_ceil(BLOCK)
    }
}

/// The launch of the kernels that index in a decode step: `chunk_mean_step`, `chunk_bounds_step`. A block an entry.
pub mod index_step {
    /// Threads of a block.
    pub const BLOCK: u32 = 128;
}

/// The launch of `mark`. A block a row.
pub mod mark {
    /// Threads of a block.
    pub const BLOCK: u32 = 128;
}

/// The widths of keys that `chunk_spread` takes, in words: as many lanes of one warp. Its launch is that of [`index_prompts`].
pub const SPREAD_WORDS: [u32; 6] = [1, 2, 4, 8, 16, 32];

/// Key words in a word of what an Index operator writes: a summary has this many times the words of a key.
pub mod summary_parts {
    /// The mean.
    pub const MEAN: u32 = 1;
    /// The least, the greatest.
    pub const BOUNDS: u32 = 2;
}
