//! What host and kernels agree on: layouts, block sizes and limits. The only files that know strides.

mod entry;

pub use entry::{ENTRY_WORDS, Entry};

/// Threads of a warp.
pub const WARP: u32 = 32;

/// Bytes of a word, the widest access of a thread. Pages, keys and summaries are whole words.
pub const WORD_BYTES: usize = 16;

/// bf16 elements of a word.
pub const WORD_ELEMENTS: usize = 8;

/// Page keys of one segment of the tables, as a directory names it.
pub const SEGMENT_KEYS: u32 = 512;

/// The segment entry of a page that has no slot. Segments are `[segments, rows of a request, 512]` u16; summaries lie in blocks of the
/// same numbers, `[segments, rows of a request, partitions of a segment, summary words]`.
pub const ABSENT_SLOT: u16 = u16::MAX;

/// The most slots of a row.
pub const MAX_SLOTS: u32 = u16::MAX as u32 - 1;

/// Pages of one slab of host memory: host page `slab * SLAB_PAGES + key % SLAB_PAGES`.
pub const SLAB_PAGES: u32 = 16;

/// A slot's byte: when its page was last used, the clock modulo 64.
pub const SLOT_STAMP: u8 = 0x3f;

/// A slot's byte: the page stays. With [`SLOT_HELD`] unset: there is no such slot.
pub const SLOT_PINNED: u8 = 0x40;

/// A slot's byte: it holds a page.
pub const SLOT_HELD: u8 = 0x80;

/// The owner of a slot that holds no page.
pub const NO_KEY: u32 = u32::MAX;

/// One page to copy from the host tier to the GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(8))]
pub struct PageCopy {
    /// The page, counted from the base of the host pages.
    pub host_page: u32,
    /// The physical page on the GPU.
    pub device_page: u32,
}

// SAFETY: two u32 without padding, any bits.
unsafe impl bytemuck::Zeroable for PageCopy {}
// SAFETY: as above.
unsafe impl bytemuck::Pod for PageCopy {}

#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
// SAFETY: 8 bytes aligned to 8, no padding.
unsafe impl cuda_std::Value for PageCopy {}

/// The launch of [`gather`](crate::ptx()).
pub mod gather {
    /// Threads of a block.
    pub const BLOCK: u32 = 512;

    /// Words that a warp has in flight: four a lane, 2 KiB.
    pub const PIECE_WORDS: u32 = 4 * super::WARP;

    /// The most blocks: the words that they all have in flight, which the kernel advances by, are counted in 32 bits.
    pub const MAX_BLOCKS: u32 = u32::MAX / (BLOCK / super::WARP * PIECE_WORDS);

    /// The longest list for pages of `page_words` words: words are counted in 32 bits.
    pub const fn max_copies(page_words: u32) -> u32 {
        (u32::MAX - PIECE_WORDS) / page_words
    }
}

/// The launch of `chunk_mean`.
pub mod chunk_mean {
    /// Threads of a block.
    pub const BLOCK: u32 = 256;

    /// The most summaries of a launch: the threads are counted in 32 bits.
    pub const MAX_SUMMARIES: u32 = (u32::MAX - BLOCK) / super::WARP;

    /// The most words of all summaries of a launch: counted in 32 bits, a warp's width at a time.
    pub const MAX_WORDS: u32 = u32::MAX - super::WARP;

    /// Blocks for `summaries` summaries (chunks x KV heads): a warp makes one.
    pub const fn grid(summaries: u32) -> u32 {
        summaries.div_ceil(BLOCK / super::WARP)
    }
}
