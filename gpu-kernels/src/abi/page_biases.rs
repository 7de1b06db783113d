//! The launch of `page_biases`: a block a row.

/// Threads of a block.
pub const BLOCK: u32 = 256;
