use crate::memory::PhysicalPage;

/// The GPU pages of one row's steady zone: those of the sinks, those of the tail, and spare ones for the
/// tokens to come. The row's share is fixed at admission.
#[derive(Debug)]
pub struct SteadyPages {
    /// Pages in use, by ascending key.
    pages: Vec<(u32, PhysicalPage)>,
    spare: Vec<PhysicalPage>,
}

impl SteadyPages {
    /// A zone without tokens that may use `pages`.
    pub fn new(pages: Vec<PhysicalPage>) -> Self {
        Self { pages: Vec::with_capacity(pages.len()), spare: pages }
    }

    /// Where page `key` is, if it is steady.
    pub fn lookup(&self, key: u32) -> Option<PhysicalPage> {
        self.pages.binary_search_by_key(&key, |(key, _)| *key).ok().map(|index| self.pages[index].1)
    }

    /// Takes a spare page for `key`, which comes after all others.
    ///
    /// # Panics
    /// If no page is spare, which would mean that the plan was too small.
    pub fn push(&mut self, key: u32) -> PhysicalPage {
        debug_assert!(self.pages.last().is_none_or(|(last, _)| *last < key), "steady pages ascend");
        let page = self.spare.pop().expect("the plan counts the steady zone's pages");
        self.pages.push((key, page));
        page
    }

    /// Takes out the lowest page with a key in `keys`, for the cache to adopt.
    pub fn leave(&mut self, keys: std::ops::Range<u32>) -> Option<(u32, PhysicalPage)> {
        let index = self.pages.iter().position(|(key, _)| keys.contains(key))?;
        Some(self.pages.remove(index))
    }

    /// Takes back a page that the row may use again.
    pub fn recycle(&mut self, page: PhysicalPage) {
        self.spare.push(page);
    }

    /// Pages in use, by ascending key.
    pub fn pages(&self) -> &[(u32, PhysicalPage)] {
        &self.pages
    }

    /// Every page of the zone, in use or spare.
    pub fn physical_pages(&self) -> impl Iterator<Item = PhysicalPage> {
        self.pages.iter().map(|(_, page)| *page).chain(self.spare.iter().copied())
    }

    /// Bytes of the lists.
    pub fn bytes(&self) -> usize {
        size_of_val(self.pages.as_slice()) + size_of_val(self.spare.as_slice())
    }
}
