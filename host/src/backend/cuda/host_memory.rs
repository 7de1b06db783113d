use super::driver::{DriverError, PinnedArena};
use crate::memory::{HostMemory, HostProgress, Word};
use crate::{Error, Result};

/// What the memory manager calls it in errors.
const WHAT: &str = "pinned host KV pages";

/// The host tier of a GPU. All extensions lie in one range of addresses, so kernels reach every page from one base: page
/// `key` of a row is page `slab * 16 + key % 16` of the arena, whichever extension its slab came with.
///
/// Its capacity is a limit of its own, beside that of the [`HostArena`](crate::memory::HostArena). Growing waits for the
/// system's page faults and for the driver: reserve before the first step what steps should not wait for.
impl HostMemory for PinnedArena {
    fn extend(&mut self, words: usize, progress: &mut dyn FnMut(HostProgress)) -> Result<()> {
        let (needed, free) = (words.saturating_mul(size_of::<Word>()), self.capacity() - self.len());
        if needed > free {
            let (what, limit) = (WHAT.to_owned(), self.capacity() as u64);
            return Err(Error::OutOfHostMemory { what, needed: needed as u64, free: free as u64, limit });
        }
        let told = self.grow(needed, |pinned| {
            progress(HostProgress { ready_bytes: pinned.pinned_bytes, total_bytes: pinned.total_bytes });
        });
        told.map_err(|error| match error {
            DriverError::PinnedMemoryRefused { wanted, .. } => {
                Error::AllocationFailed { what: WHAT.to_owned(), bytes: wanted }
            }
            other => other.into(),
        })
    }

    fn read(&self, first: usize, to: &mut [Word]) {
        let copied = Self::read(self, first * size_of::<Word>(), bytemuck::cast_slice_mut(to));
        copied.expect("words of the arena");
    }

    fn write(&mut self, first: usize, from: &[Word]) {
        let copied = Self::write(self, first * size_of::<Word>(), bytemuck::cast_slice(from));
        copied.expect("words of the arena");
    }
}
