//! The tiers: a pool of GPU pages, an arena of host pages, the transfers between them, and the plans, the shares and
//! the accounts that say how much of each a request gets.

mod admission;
mod allocator;
mod arena;
mod elastic;
mod footprint;
mod host_layout;
mod host_memory;
mod layout;
mod plan;
mod pool;
mod prefix;
mod stamp;
mod summary;
mod transfer;

use crate::{Error, Result};

pub use admission::Admission;
pub use allocator::Allocator;
pub use arena::{HostArena, HostPage, SLAB_PAGES, SlabId};
pub use elastic::{Share, share_out};
pub use footprint::{
    FlatLayout, GpuBytes, HostBytes, MemoryUsage, SUMMARY_ELEMENT_BYTES, footprint, slot_array_bytes,
};
pub use host_layout::{HostFormat, HostLayout};
pub use host_memory::{HostMemory, HostProgress, PlainMemory};
pub use layout::{KvDtype, MAX_PAGE_TOKENS, PageLayout, Word};
pub use plan::{RequestPlan, RowPlan};
pub use pool::{PageCensus, PagePool, PhysicalPage};
pub use prefix::{PrefixCache, PrefixUsage, SharedPrefix};
pub use stamp::Stamped;
pub use summary::SummaryPool;
pub use transfer::{Direction, RowId, Transfer, Transfers};

/// How much of each tier may be used. `None` means as much as the machine gives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryLimits {
    /// Pages of the GPU pool, over all rows of all requests.
    pub gpu_pages: Option<usize>,
    /// Bytes of everything that requests need on the GPU: pages, tables, summaries and the K and V of a prompt's
    /// layers.
    pub gpu_bytes: Option<u64>,
    /// Bytes of the host arena.
    pub host_bytes: Option<u64>,
}

impl MemoryLimits {
    /// Whether `bytes` of host memory may be reserved.
    ///
    /// # Errors
    /// [`Error::OutOfHostMemory`].
    pub fn check_reserve(&self, bytes: u64) -> Result<()> {
        match self.host_bytes {
            Some(limit) if bytes > limit => {
                let what = "the reserve".to_owned();
                Err(Error::OutOfHostMemory { what, needed: bytes, free: limit, limit })
            }
            _ => Ok(()),
        }
    }
}
