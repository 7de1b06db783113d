use crate::memory::{HostPage, SLAB_PAGES, SlabId};

/// Where the pages of one row are in host memory, and which of them are complete there.
///
/// One entry per slab, added as the context grows. A page may leave the GPU only when it is
/// [published](Self::published): before that its only copy is there. And it may be published only when a forward
/// pass has written all of its tokens: a token that was sampled and not yet passed through the model has none.
#[derive(Debug, Default)]
pub struct HostTable {
    slabs: Vec<SlabId>,
    /// For each slab, which of its pages are complete.
    valid: Vec<u16>,
    /// Pages all of whose tokens were written by a forward pass: keys below this number.
    computed: u32,
}

const _: () = assert!(SLAB_PAGES == u16::BITS as usize, "one bit for each page of a slab");

impl HostTable {
    /// Bytes of the table for each slab.
    pub const SLAB_BYTES: u64 = (size_of::<SlabId>() + size_of::<u16>()) as u64;

    /// Bytes of the table without slabs.
    pub const COUNT_BYTES: u64 = size_of::<u32>() as u64;

    /// Adds the next slabs, in key order.
    pub fn extend(&mut self, slabs: impl IntoIterator<Item = SlabId>) {
        self.slabs.extend(slabs);
        self.valid.resize(self.slabs.len(), 0);
    }

    /// Adds the slabs of tokens that another request has computed: all their pages are complete.
    ///
    /// # Panics
    /// If the table has slabs already.
    pub fn share(&mut self, slabs: impl IntoIterator<Item = SlabId>) {
        assert!(self.slabs.is_empty(), "a prefix comes before all that a request computes");
        self.slabs.extend(slabs);
        self.valid.resize(self.slabs.len(), u16::MAX);
        self.computed = (self.slabs.len() * SLAB_PAGES) as u32;
    }

    /// Takes the last slabs back, down to `slabs` of them.
    ///
    /// # Panics
    /// If a page of one is published.
    pub fn truncate(&mut self, slabs: usize) -> Vec<SlabId> {
        assert!(self.valid[slabs..].iter().all(|valid| *valid == 0), "a published page loses its slab");
        self.valid.truncate(slabs);
        self.slabs.split_off(slabs)
    }

    /// The host page of `key`, or `None` beyond the last slab.
    pub fn lookup(&self, key: u32) -> Option<HostPage> {
        let (slab, index) = (key as usize / SLAB_PAGES, key as usize % SLAB_PAGES);
        self.slabs.get(slab).map(|slab| HostPage { slab: *slab, index })
    }

    /// The host page of `key` if it is complete there, or `None`.
    pub fn published(&self, key: u32) -> Option<HostPage> {
        let page = self.lookup(key)?;
        let valid = self.valid[key as usize / SLAB_PAGES] & 1 << page.index;
        (valid != 0).then_some(page)
    }

    /// Records that forward passes have written all tokens of the pages below `pages`.
    pub fn set_computed(&mut self, pages: u32) {
        debug_assert!(pages >= self.computed, "computed tokens do not go away");
        self.computed = pages;
    }

    /// Pages all of whose tokens were written by a forward pass.
    pub fn computed(&self) -> u32 {
        self.computed
    }

    /// Records that page `key` is complete on the host.
    ///
    /// # Panics
    /// If it is already, if it has no slab, or if one of its tokens was never computed.
    pub fn publish(&mut self, key: u32) {
        assert!(key < self.computed, "page {key} is published and {} are computed", self.computed);
        assert!(self.published(key).is_none(), "page {key} is published twice");
        let page = self.lookup(key).expect("a page that is published has a slab");
        self.valid[key as usize / SLAB_PAGES] |= 1 << page.index;
    }

    /// Slabs, from the first on, whose pages are all complete on the host.
    pub fn published_slabs(&self) -> usize {
        self.valid.iter().take_while(|valid| **valid == u16::MAX).count()
    }

    /// Pages that are complete on the host.
    pub fn valid_pages(&self) -> usize {
        self.valid.iter().map(|valid| valid.count_ones() as usize).sum()
    }

    /// The slabs, in key order.
    pub fn slabs(&self) -> &[SlabId] {
        &self.slabs
    }

    /// Bytes of the table.
    pub fn bytes(&self) -> usize {
        size_of_val(self.slabs.as_slice()) + size_of_val(self.valid.as_slice()) + size_of_val(&self.computed)
    }
}
