//! What host and kernels agree on: layouts, block sizes and limits. The only files that know strides.

pub mod attend;
pub mod cluster;
pub mod drift;
mod entry;
pub mod estimate;
pub mod fill_random;
pub mod gate;
pub mod gemm;
mod index;
pub mod linear;
pub mod low_rank;
pub mod model;
mod offload;
pub mod page_biases;
pub mod page_code;
pub mod prefill;
pub mod prefill_wgmma;
pub mod resolve;
pub mod score;
pub mod select;

pub use entry::{ENTRY_WORDS, Entry};
pub use index::{SPREAD_WORDS, index_prompts, index_step, mark, summary_parts};
pub use offload::{MAX_PAGE_WORDS, append, store_prompt, valid_place, write_back};

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

/// Pages of one slab of host memory; see [`host_page`].
pub const SLAB_PAGES: u32 = 16;

/// The host page of page `key` of a row, within the slab that the row has for it.
pub const fn host_page(slab: u32, key: u32) -> u32 {
    slab * SLAB_PAGES + key % SLAB_PAGES
}

/// A slot's byte: when its page was last used, the clock modulo 64.
pub const SLOT_STAMP: u8 = 0x3f;

/// A slot's byte: the page stays. With [`SLOT_HELD`] unset: there is no such slot.
pub const SLOT_PINNED: u8 = 0x40;

/// A slot's byte: it holds a page.
pub const SLOT_HELD: u8 = 0x80;

/// The owner of a slot that holds no page.
pub const NO_KEY: u32 = u32::MAX;

/// One page to copy between the host tier and the GPU.
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

    /// The most lists.
    pub const MAX_LISTS: u32 = 8192;

    /// Shared memory of a block, in bytes.
    pub const fn shared_bytes(lists: u32) -> u32 {
        list_bytes(BLOCK, lists)
    }

    /// What of it a block of `threads` threads takes to sum up the counts.
    pub const fn list_bytes(threads: u32, lists: u32) -> u32 {
        4 * (2 * (threads / super::WARP) + lists + 1)
    }

    /// The most copies of all lists, for pages of `page_words` words: words are counted in 32 bits.
    pub const fn max_copies(page_words: u32) -> u32 {
        (u32::MAX - PIECE_WORDS) / page_words
    }
}

/// The launch of [`gather_bulk`](crate::ptx()); blocks, lists and copies have the limits of [`gather`].
pub mod gather_bulk {
    /// Threads of a block. Each warp has a ring of stages, which its first thread serves.
    pub const BLOCK: u32 = 64;

    /// Rings of a block.
    pub const RINGS: u32 = BLOCK / super::WARP;

    /// Stages of a ring: what it has room for.
    pub const STAGES: u32 = 8;

    /// Copies of a ring on their way in; the other stages are on their way out.
    pub const AHEAD: u32 = 6;

    /// Words of a stage, 4 KiB: larger pages are cut.
    pub const STAGE_WORDS: u32 = 256;

    /// Where barriers start in a block's shared memory, in bytes: after the stages.
    pub const BARRIERS: usize = (RINGS * STAGES * STAGE_WORDS) as usize * super::WORD_BYTES;

    /// Where the device page of each stage starts.
    pub const TARGETS: usize = BARRIERS + 8 * (RINGS * STAGES) as usize;

    /// Where [`list_bytes`](super::gather::list_bytes) start.
    pub const LISTS: usize = TARGETS + 4 * (RINGS * STAGES) as usize;

    /// Shared memory of a block, in bytes.
    pub const fn shared_bytes(lists: u32) -> u32 {
        LISTS as u32 + super::gather::list_bytes(BLOCK, lists)
    }
}
