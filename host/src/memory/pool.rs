use super::{PageLayout, Word, allocate};
use crate::Result;

/// The id of a page of the GPU pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PhysicalPage(pub u32);

/// The GPU's pages. A page belongs to the pool's free list or to exactly one row.
///
/// Without a limit the pool grows as requests are admitted; with one it never does.
#[derive(Debug)]
pub struct PagePool {
    layout: PageLayout,
    limit: usize,
    /// Chunks of pages; grown, never moved, so that an id stays where it is.
    chunks: Vec<Chunk>,
    free: Vec<PhysicalPage>,
    total: usize,
}

#[derive(Debug)]
struct Chunk {
    first: usize,
    words: Box<[Word]>,
}

impl PagePool {
    /// A pool of at most `limit` pages, or of as many as requests ask for and 32-bit ids can name.
    pub fn new(layout: PageLayout, limit: Option<usize>) -> Self {
        let limit = limit.unwrap_or(usize::MAX).min(u32::MAX as usize);
        Self { layout, limit, chunks: Vec::new(), free: Vec::new(), total: 0 }
    }

    /// Pages that [`take`](Self::take) can give out now.
    pub fn free_pages(&self) -> usize {
        self.limit - self.used_pages()
    }

    /// The most pages that the pool may hold.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Pages held by requests.
    pub fn used_pages(&self) -> usize {
        self.total - self.free.len()
    }

    /// Takes `count` pages. The caller has checked [`free_pages`](Self::free_pages).
    ///
    /// # Errors
    /// [`crate::Error::AllocationFailed`] if the system has no memory; the pool is then as it was.
    ///
    /// # Panics
    /// If fewer than `count` pages are free.
    pub fn take(&mut self, count: usize) -> Result<Vec<PhysicalPage>> {
        assert!(count <= self.free_pages(), "{count} pages asked for, {} free", self.free_pages());
        if count > self.free.len() {
            self.grow(count - self.free.len())?;
        }
        let mut pages = self.free.split_off(self.free.len() - count);
        pages.reverse();
        Ok(pages)
    }

    /// Gives pages back. In debug builds their bytes become NaNs, so that a stale read shows.
    pub fn give_back(&mut self, pages: impl IntoIterator<Item = PhysicalPage>) {
        for page in pages {
            if cfg!(debug_assertions) {
                self.page_mut(page).fill(Word::MAX);
            }
            self.free.push(page);
        }
    }

    /// The bytes of a page.
    pub fn page(&self, page: PhysicalPage) -> &[Word] {
        let (chunk, range) = self.locate(page);
        &self.chunks[chunk].words[range]
    }

    /// The bytes of a page, to write.
    pub fn page_mut(&mut self, page: PhysicalPage) -> &mut [Word] {
        let (chunk, range) = self.locate(page);
        &mut self.chunks[chunk].words[range]
    }

    fn locate(&self, page: PhysicalPage) -> (usize, std::ops::Range<usize>) {
        let index = page.0 as usize;
        let chunk = self.chunks.partition_point(|chunk| chunk.first <= index) - 1;
        let words = self.layout.page_words();
        let offset = (index - self.chunks[chunk].first) * words;
        (chunk, offset..offset + words)
    }

    fn grow(&mut self, count: usize) -> Result<()> {
        let mut words = allocate(count * self.layout.page_words(), "GPU pages")?;
        if cfg!(debug_assertions) {
            words.fill(Word::MAX);
        }
        self.chunks.push(Chunk { first: self.total, words });
        // Taken from the end, so the lowest id goes last.
        self.free.splice(0..0, (self.total..self.total + count).rev().map(|id| PhysicalPage(id as u32)));
        self.total += count;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::KvDtype;

    fn pool(limit: Option<usize>) -> PagePool {
        PagePool::new(PageLayout::new(1, 8, KvDtype::Bf16).unwrap(), limit)
    }

    #[test]
    fn pages_are_conserved_and_distinct() {
        let mut pool = pool(Some(10));
        let first = pool.take(4).unwrap();
        let second = pool.take(6).unwrap();
        let mut all: Vec<_> = first.iter().chain(&second).map(|page| page.0).collect();
        all.sort_unstable();
        assert_eq!(all, (0..10).collect::<Vec<_>>());
        assert_eq!(pool.free_pages(), 0);
        pool.give_back(first);
        assert_eq!((pool.free_pages(), pool.used_pages()), (4, 6));
    }

    #[test]
    fn a_page_keeps_its_bytes_while_the_pool_grows() {
        let mut pool = pool(None);
        let page = pool.take(1).unwrap()[0];
        pool.page_mut(page).fill(7);
        let more = pool.take(100).unwrap();
        for page in more {
            pool.page_mut(page).fill(9);
        }
        assert!(pool.page(page).iter().all(|word| *word == 7));
    }
}
