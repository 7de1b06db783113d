use std::ops::Range;

use crate::memory::PhysicalPage;

/// The GPU pages of one row's steady zone: those of the sinks by key, then those of the tail, as a ring. The row's
/// share is fixed at admission; pages are exchanged, never added.
#[derive(Debug)]
pub struct SteadyPages {
    /// `[sinks + ring]`, in use or not.
    pages: Box<[PhysicalPage]>,
    sinks: u32,
    /// Keys of the tail that are in use; those of the sinks are if they lie below its end.
    tail: Range<u32>,
}

impl SteadyPages {
    /// Bytes of the list for each page of the zone.
    pub const ENTRY_BYTES: u64 = size_of::<PhysicalPage>() as u64;

    /// Bytes of the list beside its entries.
    pub const RANGE_BYTES: u64 = size_of::<Range<u32>>() as u64;

    /// A zone without tokens that may use `pages`, of which the first `sinks` pages of the row keep theirs.
    pub fn new(pages: Vec<PhysicalPage>, sinks: usize) -> Self {
        let sinks = sinks.min(pages.len()) as u32;
        Self { pages: pages.into(), sinks, tail: 0..0 }
    }

    /// Where page `key` is, if it is steady.
    pub fn lookup(&self, key: u32) -> Option<PhysicalPage> {
        let used = self.tail.contains(&key) || key < self.sinks.min(self.tail.end);
        used.then(|| self.pages[self.place(key)])
    }

    /// The page for `key`, which comes after all others; keys of the tail have no gaps.
    ///
    /// # Panics
    /// If the ring is full, which would mean that the plan was too small, or if a key is left out.
    pub fn push(&mut self, key: u32) -> PhysicalPage {
        if self.tail.is_empty() && key >= self.sinks {
            assert!(key >= self.tail.end, "page {key} is steady again");
            self.tail = key..key;
        }
        assert_eq!(key, self.tail.end, "steady pages come one after the other");
        self.tail.end = key + 1;
        if key < self.sinks {
            self.tail.start = key + 1;
        }
        let ring = self.pages.len() - self.sinks as usize;
        assert!(self.tail.len() <= ring, "the plan counts the steady zone's pages");
        self.pages[self.place(key)]
    }

    /// Takes out the first page of the tail if its key is in `keys`, for the cache to adopt;
    /// [`replace`](Self::replace) then gives its place another page.
    pub fn leave(&mut self, keys: &Range<u32>) -> Option<(u32, PhysicalPage)> {
        let key = self.tail.start;
        if self.tail.is_empty() || !keys.contains(&key) {
            return None;
        }
        self.tail.start += 1;
        Some((key, self.pages[self.place(key)]))
    }

    /// Puts the page that the cache gave in exchange where that of `key` was.
    pub fn replace(&mut self, key: u32, page: PhysicalPage) {
        let place = self.place(key);
        self.pages[place] = page;
    }

    /// The pages of the sinks that are in use, by ascending key.
    pub fn sinks(&self) -> impl Iterator<Item = (u32, PhysicalPage)> {
        (0..self.sinks.min(self.tail.end)).map(|key| (key, self.pages[self.place(key)]))
    }

    /// The pages of the tail that are in use, by ascending key.
    pub fn tail(&self) -> impl Iterator<Item = (u32, PhysicalPage)> {
        self.tail.clone().map(|key| (key, self.pages[self.place(key)]))
    }

    /// Every page of the zone, in use or not.
    pub fn physical_pages(&self) -> &[PhysicalPage] {
        &self.pages
    }

    /// Bytes of the list.
    pub fn bytes(&self) -> usize {
        size_of_val(&*self.pages) + size_of_val(&self.tail)
    }

    fn place(&self, key: u32) -> usize {
        if key < self.sinks {
            return key as usize;
        }
        let ring = self.pages.len() - self.sinks as usize;
        self.sinks as usize + (key - self.sinks) as usize % ring
    }
}
