use super::{PageLayout, Word, allocate};
use crate::{Error, Result};

/// Pages of one slab. A slab belongs to one row, so a row's misses stay within few address ranges, and the
/// host table needs one entry for this many pages; a short request wastes at most this many pages a row.
pub const SLAB_PAGES: usize = 16;

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
/// A request takes its slabs when it is admitted. They are zeroed lazily by the system, so pages that are not
/// written yet cost address space only.
#[derive(Debug)]
pub struct HostArena {
    layout: PageLayout,
    limit_bytes: Option<u64>,
    slabs: Vec<Option<Box<[Word]>>>,
    vacant: Vec<SlabId>,
}

impl HostArena {
    /// An arena of at most `limit_bytes`.
    pub fn new(layout: PageLayout, limit_bytes: Option<u64>) -> Self {
        Self { layout, limit_bytes, slabs: Vec::new(), vacant: Vec::new() }
    }

    /// Bytes of one slab.
    pub fn slab_bytes(&self) -> u64 {
        slab_bytes(&self.layout)
    }

    /// Takes `count` slabs.
    ///
    /// # Errors
    /// [`Error::OutOfHostMemory`] if they don't fit the limit, [`Error::AllocationFailed`] if the system has no
    /// memory; nothing is then taken.
    pub fn take(&mut self, count: usize) -> Result<Vec<SlabId>> {
        check_limit(&self.layout, count, self.used_slabs(), self.limit_bytes)?;
        let mut taken = Vec::with_capacity(count);
        for _ in 0..count {
            match allocate(SLAB_PAGES * self.layout.page_words(), "a host KV slab") {
                Ok(words) => taken.push(self.insert(words)),
                Err(error) => {
                    taken.into_iter().for_each(|slab| self.give_back(slab));
                    return Err(error);
                }
            }
        }
        Ok(taken)
    }

    /// Gives a slab back to the system.
    ///
    /// # Panics
    /// If nobody holds it.
    pub fn give_back(&mut self, slab: SlabId) {
        let words = self.slabs[slab.0 as usize].take();
        assert!(words.is_some(), "{slab:?} given back twice");
        self.vacant.push(slab);
    }

    /// Slabs that requests hold.
    pub fn used_slabs(&self) -> usize {
        self.slabs.len() - self.vacant.len()
    }

    /// The bytes of a page.
    ///
    /// # Panics
    /// If nobody holds its slab.
    pub fn page(&self, page: HostPage) -> &[Word] {
        let words = self.layout.page_words();
        let slab = self.slabs[page.slab.0 as usize].as_ref().expect("a page of a slab that is held");
        &slab[page.index * words..(page.index + 1) * words]
    }

    /// The bytes of a page, to write.
    ///
    /// # Panics
    /// If nobody holds its slab.
    pub fn page_mut(&mut self, page: HostPage) -> &mut [Word] {
        let words = self.layout.page_words();
        let slab = self.slabs[page.slab.0 as usize].as_mut().expect("a page of a slab that is held");
        &mut slab[page.index * words..(page.index + 1) * words]
    }

    fn insert(&mut self, words: Box<[Word]>) -> SlabId {
        let id = self.vacant.pop().unwrap_or_else(|| {
            self.slabs.push(None);
            SlabId(self.slabs.len() as u32 - 1)
        });
        self.slabs[id.0 as usize] = Some(words);
        id
    }
}

/// Bytes of one slab.
pub(super) fn slab_bytes(layout: &PageLayout) -> u64 {
    (SLAB_PAGES * layout.page_bytes()) as u64
}

/// Whether `count` slabs fit beside `used` ones under a limit.
pub(super) fn check_limit(layout: &PageLayout, count: usize, used: usize, limit: Option<u64>) -> Result<()> {
    let Some(limit) = limit else { return Ok(()) };
    let bytes = slab_bytes(layout);
    let (needed, free) = (count as u64 * bytes, limit.saturating_sub(used as u64 * bytes));
    if needed > free {
        return Err(Error::OutOfHostMemory { what: format!("{count} KV slabs"), needed, free, limit });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::KvDtype;

    const SLAB_BYTES: u64 = SLAB_PAGES as u64 * 4096;

    #[test]
    fn slabs_beyond_the_limit_are_refused_and_nothing_is_taken() {
        let layout = PageLayout::new(8, 128, KvDtype::Bf16).unwrap();
        let mut arena = HostArena::new(layout, Some(3 * SLAB_BYTES));
        arena.take(2).unwrap();
        let (needed, free, limit) = (2 * SLAB_BYTES, SLAB_BYTES, 3 * SLAB_BYTES);
        let what = "2 KV slabs".to_owned();
        assert_eq!(arena.take(2).unwrap_err(), Error::OutOfHostMemory { what, needed, free, limit });
        arena.take(1).unwrap();
        assert_eq!(arena.used_slabs(), 3);
    }

    #[test]
    fn slabs_that_come_back_are_zero_again() {
        let layout = PageLayout::new(8, 128, KvDtype::Bf16).unwrap();
        let mut arena = HostArena::new(layout, None);
        let first = arena.take(1).unwrap()[0];
        arena.page_mut(HostPage { slab: first, index: SLAB_PAGES - 1 }).fill(1);
        arena.give_back(first);
        let second = arena.take(1).unwrap()[0];
        assert_eq!(first, second);
        assert!(arena.page(HostPage { slab: second, index: SLAB_PAGES - 1 }).iter().all(|word| *word == 0));
    }
}
