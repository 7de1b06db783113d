//! Where the numbers of an `Entry` (`spinkv_kernels::abi::Entry`) lie, in u32: the program asserts that they do. Depending on that crate here would
//! compile all of SpinKV's kernels into this module.

/// Numbers of an entry.
pub const NUMBERS: usize = 20;
/// Tokens after the step; 0 for one that only fills the batch.
pub const TOKENS: usize = 0;
/// Its directory in the directories.
pub const DIRECTORY: usize = 2;
/// Row 0 in the steady lists.
pub const FIRST_STEADY: usize = 6;
/// Pages of the sinks, at the start of a steady list.
pub const SINK_PAGES: usize = 7;
/// Places of the tail's pages, a ring by key.
pub const RING_PAGES: usize = 8;
/// The first partition to summarise.
pub const NEW_PARTITION: usize = 16;
/// How many.
pub const NEW_PARTITIONS: usize = 17;
