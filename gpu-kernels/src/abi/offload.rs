/// The launch of `append`.
pub mod append {
    use crate::abi::WARP;

    /// Threads of a block.
    pub const BLOCK: u32 = 128;

    /// The most rows of a launch: a row is a warp's, and threads are counted in 32 bits.
    pub const MAX_ROWS: u32 = (u32::MAX - BLOCK) / WARP;

    /// Blocks for `rows` rows (entries x KV heads).
    pub const fn grid(rows: u32) -> u32 {
        rows.div_ceil(BLOCK / WARP)
    }
}

/// The launch of `store_prompt`.
pub mod store_prompt {
    use crate::abi::WARP;

    /// Threads of a block.
    pub const BLOCK: u32 = 256;

    /// The most blocks: threads are counted in 32 bits.
    pub const MAX_BLOCKS: u32 = u32::MAX / BLOCK;

    /// The most pages of a launch, over all KV heads: a warp advances by the launch's warps, in 32 bits.
    pub const MAX_PAGES: u32 = u32::MAX - MAX_BLOCKS * (BLOCK / WARP);
}

/// The launch of `write_back`.
pub mod write_back {
    use crate::abi::WARP;

    /// Threads of a block.
    pub const BLOCK: u32 = 512;

    /// Words that a warp has in flight: four a lane, 2 KiB. Smaller pages share them.
    pub const PIECE_WORDS: u32 = 4 * WARP;

    /// The most blocks: the pages that they all have in flight, which the kernel advances by, are counted in 32 bits.
    pub const MAX_BLOCKS: u32 = u32::MAX / (BLOCK / WARP * PIECE_WORDS);
}

/// The most words of a page: a warp advances through it in 32 bits.
pub const MAX_PAGE_WORDS: u32 = 1 << 31;

/// The place of a page's bit in the valid bits: that of its slab in the host tables, times [`SLAB_PAGES`](super::SLAB_PAGES), plus its
/// page in the slab.
///
/// The valid bits are a table of u32 beside the host tables, place for place: bit `key % SLAB_PAGES` of the word at
/// `first_slab + row * slab_stride + key / SLAB_PAGES` says that page `key` of `row` is complete on the host, so that its
/// GPU page may be evicted. The upper half of a word is 0.
///
/// A kernel sets a bit after the page's bytes, with a fence for the whole system between: a kernel that sees the bit with an
/// acquire sees the bytes, and so does the host after an event behind the launch. Kernels read bits with plain loads, in later
/// launches of the same stream; those see both by the stream's order.
pub const fn valid_place(slab_place: u32, key: u32) -> u32 {
    slab_place * super::SLAB_PAGES + key % super::SLAB_PAGES
}
