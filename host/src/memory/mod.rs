//! The tiers: a pool of GPU pages, an arena of host pages, and the plan that says how much of each a
//! request needs.

mod arena;
mod layout;
mod plan;
mod pool;

pub use arena::{HostArena, HostPage, SLAB_PAGES, SlabId};
pub use layout::{KvDtype, MAX_PAGE_TOKENS, PageLayout, Word};
pub use plan::{RequestPlan, RowPlan};
pub use pool::{PagePool, PhysicalPage};

/// How much of each tier may be used. `None` means as much as the machine gives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryLimits {
    /// Pages of the GPU pool, over all rows of all requests.
    pub gpu_pages: Option<usize>,
    /// Bytes of the host arena.
    pub host_bytes: Option<u64>,
}

/// Bytes in use, by tier and by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryUsage {
    /// GPU pages that requests hold, cached or steady.
    pub gpu_pages_bytes: u64,
    /// GPU tables: page key to slot, slots, recency, steady lists.
    pub gpu_tables_bytes: u64,
    /// GPU summaries, what Select reads.
    pub gpu_summaries_bytes: u64,
    /// Host pages that requests hold.
    pub host_pages_bytes: u64,
    /// Host tables: page key to host page.
    pub host_tables_bytes: u64,
}

/// Zeroed storage of `words` words, or a typed error where the system refuses it.
///
/// Goes through the zeroing allocator, so pages that are never written cost no physical memory.
fn allocate(words: usize, what: &str) -> crate::Result<Box<[Word]>> {
    bytemuck::allocation::try_zeroed_slice_box(words).map_err(|()| crate::Error::AllocationFailed {
        what: what.to_owned(),
        bytes: (words * size_of::<Word>()) as u64,
    })
}
