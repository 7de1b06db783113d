use crate::memory::{HostPage, SLAB_PAGES, SlabId};

/// Where the pages of one row are in host memory, and how many of them are complete there.
///
/// One entry per slab. A page may be selected only when it lies below [`valid_pages`](Self::valid_pages):
/// before that its only copy is on the GPU.
#[derive(Debug)]
pub struct HostTable {
    slabs: Vec<SlabId>,
    valid_pages: usize,
}

impl HostTable {
    /// The table of a row whose pages lie in `slabs`, in key order.
    pub fn new(slabs: Vec<SlabId>) -> Self {
        Self { slabs, valid_pages: 0 }
    }

    /// The host page of `key`, or `None` beyond the last slab.
    pub fn lookup(&self, key: u32) -> Option<HostPage> {
        let (slab, index) = (key as usize / SLAB_PAGES, key as usize % SLAB_PAGES);
        self.slabs.get(slab).map(|slab| HostPage { slab: *slab, index })
    }

    /// The host page of `key` if it is complete there, or `None`.
    pub fn published(&self, key: u32) -> Option<HostPage> {
        self.lookup(key).filter(|_| (key as usize) < self.valid_pages)
    }

    /// Records that page `key`, the next one, is complete on the host.
    ///
    /// # Panics
    /// If pages are published out of order: a hole would be read as valid.
    pub fn publish(&mut self, key: u32) {
        assert_eq!(key as usize, self.valid_pages, "pages are published in order");
        self.valid_pages += 1;
    }

    /// Pages that are complete on the host: keys below this number.
    pub fn valid_pages(&self) -> usize {
        self.valid_pages
    }

    /// The slabs, in key order.
    pub fn slabs(&self) -> &[SlabId] {
        &self.slabs
    }

    /// Bytes of the table.
    pub fn bytes(&self) -> usize {
        size_of_val(self.slabs.as_slice()) + size_of_val(&self.valid_pages)
    }
}
