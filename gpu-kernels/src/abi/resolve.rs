//! The launch of `resolve`: one block a row of the batch.

/// Threads of a block.
pub const BLOCK: u32 = 256;

/// The most pages that a row's lists hold: positions are counted in 16 bits.
pub const MAX_LIST: u32 = u16::MAX as u32;

/// A row's fault: none.
pub const NO_FAULT: u32 = 0;

/// A row's fault: the selection has more pages than its list holds.
pub const LIST_TOO_LONG: u32 = 1;

/// A row's fault: the selection and the pinned pages that are not in it need more slots than there are.
pub const TOO_FEW_SLOTS: u32 = 2;

/// A row's fault: a page that must be fetched or kept is not complete on the host.
pub const NOT_ON_HOST: u32 = 3;

/// Shared memory of a block, in bytes: for rows of at most `slots` slots (see [`Entry::slots`](super::Entry::slots)), directories
/// of at most `segments` segments and lists of at most `list` pages.
pub const fn shared_bytes(slots: u32, segments: u32, list: u32) -> u32 {
    4 * (64 + 2 * (BLOCK / super::WARP) + slots / 4 + slots.div_ceil(32) + segments + 4 * list)
}
