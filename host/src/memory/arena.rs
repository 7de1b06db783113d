use super::{PageLayout, Word, allocate};
use crate::{Error, Result};

/// Pages of one slab. A slab belongs to one row, so a row's misses stay within few address ranges, and the
/// host page table needs one entry for this many pages.
pub const SLAB_PAGES: usize = 64;

/// The id of a slab of the host arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SlabId(u32);

/// The place of a page in the host arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostPage {
    /// The slab.
    pub slab: SlabId,
    /// The page within it, below [`SLAB_PAGES`].
    pub index: usize,
}

/// Host memory for the full KV of every request, in slabs of [`SLAB_PAGES`] pages.
///
/// Admission reserves a request's slabs, so that a running request cannot run out; the memory itself is
/// taken slab by slab as the context grows.
#[derive(Debug)]
pub struct HostArena {
    layout: PageLayout,
    limit_bytes: Option<u64>,
    reserved: usize,
    slabs: Vec<Option<Box<[Word]>>>,
    vacant: Vec<SlabId>,
}

impl HostArena {
    /// An arena of at most `limit_bytes`.
    pub fn new(layout: PageLayout, limit_bytes: Option<u64>) -> Self {
        Self { layout, limit_bytes, reserved: 0, slabs: Vec::new(), vacant: Vec::new() }
    }

    /// Bytes of one slab.
    pub fn slab_bytes(&self) -> u64 {
        (SLAB_PAGES * self.layout.page_bytes()) as u64
    }

    /// Sets `slabs` aside for one request.
    ///
    /// # Errors
    /// [`Error::OutOfHostMemory`] if they don't fit the limit; nothing is then set aside.
    pub fn reserve(&mut self, slabs: usize) -> Result<()> {
        if let Some(limit) = self.limit_bytes {
            let used = self.reserved as u64 * self.slab_bytes();
            let needed = slabs as u64 * self.slab_bytes();
            let free = limit.saturating_sub(used);
            if needed > free {
                return Err(Error::OutOfHostMemory {
                    what: format!("{slabs} KV slabs"),
                    needed,
                    free,
                    limit,
                });
            }
        }
        self.reserved += slabs;
        Ok(())
    }

    /// Ends a reservation; its slabs must have been freed.
    pub fn cancel(&mut self, slabs: usize) {
        self.reserved -= slabs;
        debug_assert!(self.allocated() <= self.reserved, "a reservation ended before its slabs");
    }

    /// Takes one slab out of a reservation.
    ///
    /// # Errors
    /// [`Error::AllocationFailed`] if the system has no memory.
    pub fn allocate(&mut self) -> Result<SlabId> {
        debug_assert!(self.allocated() < self.reserved, "a slab was taken that nobody reserved");
        let words = allocate(SLAB_PAGES * self.layout.page_words(), "a host KV slab")?;
        let id = self.vacant.pop().unwrap_or_else(|| {
            self.slabs.push(None);
            SlabId(self.slabs.len() as u32 - 1)
        });
        self.slabs[id.0 as usize] = Some(words);
        Ok(id)
    }

    /// Gives a slab back to the system.
    pub fn free(&mut self, slab: SlabId) {
        let words = self.slabs[slab.0 as usize].take();
        assert!(words.is_some(), "{slab:?} freed twice");
        self.vacant.push(slab);
    }

    /// Slabs that hold memory.
    pub fn allocated(&self) -> usize {
        self.slabs.len() - self.vacant.len()
    }

    /// Slabs set aside for admitted requests, allocated ones included.
    pub fn reserved(&self) -> usize {
        self.reserved
    }

    /// The bytes of a page.
    pub fn page(&self, page: HostPage) -> &[Word] {
        let words = self.layout.page_words();
        &self.slab(page.slab)[page.index * words..(page.index + 1) * words]
    }

    /// The bytes of a page, to write.
    pub fn page_mut(&mut self, page: HostPage) -> &mut [Word] {
        let words = self.layout.page_words();
        let slab = self.slabs[page.slab.0 as usize].as_mut().expect("a page of a freed slab");
        &mut slab[page.index * words..(page.index + 1) * words]
    }

    fn slab(&self, slab: SlabId) -> &[Word] {
        self.slabs[slab.0 as usize].as_ref().expect("a page of a freed slab")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::KvDtype;

    #[test]
    fn a_reservation_beyond_the_limit_changes_nothing() {
        let layout = PageLayout::new(8, 128, KvDtype::Bf16).unwrap();
        let mut arena = HostArena::new(layout, Some(3 * 64 * 4096));
        arena.reserve(2).unwrap();
        let error = arena.reserve(2).unwrap_err();
        assert_eq!(
            error,
            Error::OutOfHostMemory {
                what: "2 KV slabs".into(),
                needed: 2 * 64 * 4096,
                free: 64 * 4096,
                limit: 3 * 64 * 4096
            }
        );
        arena.reserve(1).unwrap();
        assert_eq!(arena.reserved(), 3);
    }

    #[test]
    fn freed_slabs_are_used_again() {
        let layout = PageLayout::new(8, 128, KvDtype::Bf16).unwrap();
        let mut arena = HostArena::new(layout, None);
        arena.reserve(2).unwrap();
        let first = arena.allocate().unwrap();
        arena.page_mut(HostPage { slab: first, index: 63 }).fill(1);
        arena.free(first);
        let second = arena.allocate().unwrap();
        assert_eq!(first, second);
        assert!(arena.page(HostPage { slab: second, index: 63 }).iter().all(|word| *word == 0));
    }
}
