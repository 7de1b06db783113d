use super::{Allocator, PageLayout, Stamped, Word};
use crate::Result;

/// The id of a page of the GPU pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PhysicalPage(pub u32);

/// How many pages of a pool are where. Together they are all pages that the pool may hold, and no page is in two
/// places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageCensus {
    /// Pages that can be taken.
    pub free: usize,
    /// Pages that requests hold.
    pub used: usize,
    /// Pages given back that a transfer still touches.
    pub in_flight: usize,
}

/// The GPU's pages. A page is free, belongs to exactly one row, or was given back and waits for a transfer.
///
/// Without a limit the pool grows as requests are admitted; with one it never does.
#[derive(Debug)]
pub struct PagePool {
    layout: PageLayout,
    allocator: Allocator,
    limit: usize,
    /// Chunks of pages; grown, never moved, so that an id stays where it is.
    chunks: Vec<Chunk>,
    free: Vec<PhysicalPage>,
    pages: Vec<State>,
    in_flight: usize,
}

#[derive(Debug)]
struct Chunk {
    first: usize,
    words: Box<[Word]>,
}

#[derive(Clone, Copy, Debug, Default)]
struct State {
    taken: bool,
    /// Transfers that touch it.
    holds: u32,
    /// Times that it was freed.
    generation: u32,
}

impl PagePool {
    /// A pool of at most `limit` pages, or of as many as requests ask for and 32-bit ids can name.
    pub fn new(layout: PageLayout, limit: Option<usize>, allocator: Allocator) -> Self {
        // The highest id means "no page" in tables.
        let limit = limit.unwrap_or(usize::MAX).min(u32::MAX as usize);
        Self {
            layout,
            allocator,
            limit,
            chunks: Vec::new(),
            free: Vec::new(),
            pages: Vec::new(),
            in_flight: 0,
        }
    }

    /// Pages that [`take`](Self::take) can give out now.
    pub fn free_pages(&self) -> usize {
        self.limit - (self.pages.len() - self.free.len())
    }

    /// The most pages that the pool may hold.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Pages held by requests.
    pub fn used_pages(&self) -> usize {
        self.pages.len() - self.free.len() - self.in_flight
    }

    /// Where the pages are.
    pub fn census(&self) -> PageCensus {
        PageCensus { free: self.free_pages(), used: self.used_pages(), in_flight: self.in_flight }
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
        self.reserve(count)?;
        let mut pages = self.free.split_off(self.free.len() - count);
        pages.reverse();
        pages.iter().for_each(|page| self.pages[page.0 as usize].taken = true);
        Ok(pages)
    }

    /// Makes sure that the next `count` pages can be taken without asking the system.
    ///
    /// # Errors
    /// [`crate::Error::AllocationFailed`]; the pool is then as it was.
    pub fn reserve(&mut self, count: usize) -> Result<()> {
        if count <= self.free.len() {
            return Ok(());
        }
        let count = count - self.free.len();
        let what = "GPU pages";
        let words = count.saturating_mul(self.layout.page_words());
        let mut words = self.allocator.zeroed(words, what)?;
        if cfg!(debug_assertions) {
            words.fill(Word::MAX);
        }
        let first = self.pages.len();
        self.chunks.push(Chunk { first, words });
        // Taken from the end, so the lowest id goes last.
        self.free.splice(0..0, (first..first + count).rev().map(|id| PhysicalPage(id as u32)));
        self.pages.resize(first + count, State::default());
        Ok(())
    }

    /// Gives pages back. One that a transfer touches becomes free when it is let go of.
    ///
    /// # Panics
    /// If one was given back already.
    pub fn give_back(&mut self, pages: impl IntoIterator<Item = PhysicalPage>) {
        for page in pages {
            let state = &mut self.pages[page.0 as usize];
            assert!(state.taken, "{page:?} given back twice");
            state.taken = false;
            if state.holds == 0 { self.make_free(page) } else { self.in_flight += 1 }
        }
    }

    /// A transfer begins to touch a page: it is not used again before as many [`let_go`](Self::let_go)s.
    ///
    /// # Panics
    /// If nobody has taken it.
    pub fn hold(&mut self, page: PhysicalPage) -> Stamped<PhysicalPage> {
        let state = &mut self.pages[page.0 as usize];
        assert!(state.taken, "{page:?} is held by a transfer and by no row");
        state.holds += 1;
        Stamped { id: page, generation: state.generation }
    }

    /// A transfer is done with a page.
    ///
    /// # Panics
    /// If the page was used again meanwhile, which a hold prevents.
    pub fn let_go(&mut self, page: Stamped<PhysicalPage>) {
        let state = &mut self.pages[page.id.0 as usize];
        assert_eq!(state.generation, page.generation, "{:?} was used again under a transfer", page.id);
        state.holds -= 1;
        if state.holds == 0 && !state.taken {
            self.in_flight -= 1;
            self.make_free(page.id);
        }
    }

    /// Whether a transfer touches the page.
    pub fn is_held(&self, page: PhysicalPage) -> bool {
        self.pages[page.0 as usize].holds > 0
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

    /// In debug builds the bytes become NaNs, so that a stale read shows.
    fn make_free(&mut self, page: PhysicalPage) {
        let state = &mut self.pages[page.0 as usize];
        state.generation = state.generation.wrapping_add(1);
        if cfg!(debug_assertions) {
            self.page_mut(page).fill(Word::MAX);
        }
        self.free.push(page);
    }

    fn locate(&self, page: PhysicalPage) -> (usize, std::ops::Range<usize>) {
        let index = page.0 as usize;
        let chunk = self.chunks.partition_point(|chunk| chunk.first <= index) - 1;
        let words = self.layout.page_words();
        let offset = (index - self.chunks[chunk].first) * words;
        (chunk, offset..offset + words)
    }
}
