use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytemuck::Zeroable;

use crate::{Error, Result};

/// Where the storage of tables, summaries and pages comes from: the system, until it refuses.
///
/// Copies share one count of what may still be granted, so that a test can make any allocation of a whole
/// backend fail, also in the middle of an operation.
#[derive(Clone, Debug)]
pub struct Allocator {
    grants: Arc<AtomicU64>,
}

impl Default for Allocator {
    fn default() -> Self {
        Self { grants: Arc::new(AtomicU64::new(u64::MAX)) }
    }
}

impl Allocator {
    /// Zeroed storage for `len` elements; `what` names it in the error. Pages of it that are never written cost
    /// no physical memory.
    ///
    /// # Errors
    /// [`Error::AllocationFailed`].
    pub fn zeroed<T: Zeroable>(&self, len: usize, what: &str) -> Result<Box<[T]>> {
        let refused = || Error::AllocationFailed {
            what: what.to_owned(),
            bytes: (len as u64).saturating_mul(size_of::<T>() as u64),
        };
        let grant = |left: u64| if left == u64::MAX { Some(left) } else { left.checked_sub(1) };
        self.grants.fetch_update(Ordering::Relaxed, Ordering::Relaxed, grant).map_err(|_| refused())?;
        bytemuck::allocation::try_zeroed_slice_box(len).map_err(|()| refused())
    }

    /// Grants `allocations` more and refuses all after them, as a system without memory would; `u64::MAX` takes
    /// that back. For tests.
    pub fn refuse_after(&self, allocations: u64) {
        self.grants.store(allocations, Ordering::Relaxed);
    }
}
