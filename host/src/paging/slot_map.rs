use crate::partition::SelectedPage;

/// A slot of a row's cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotId(pub u32);

impl SlotId {
    /// The slot as an index into slot arrays.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// From page keys of one row to the slots that hold them: what a [`RowCache`](super::RowCache) reads to tell
/// hits from misses. The map belongs to whoever lays out tables in memory; the cache keeps it up to date.
pub trait SlotMap {
    /// The slot of `key`, or `None` if the page is not on the GPU. A key that was never set has no slot, whatever
    /// its value.
    fn get(&self, key: u32) -> Option<SlotId>;

    /// Appends the slot of each page of `selection` to `found`, as [`get`](Self::get) gives it. Most of a step's time
    /// goes into these loads, so a map with levels goes through them once for pages that lie side by side.
    fn find(&self, selection: &[SelectedPage], found: &mut Vec<Option<SlotId>>) {
        found.extend(selection.iter().map(|page| self.get(page.key)));
    }

    /// Records that `slot` holds `key`.
    ///
    /// # Panics
    /// If the map has no room for `key`.
    fn set(&mut self, key: u32, slot: SlotId);

    /// Records that `key` is not on the GPU any more.
    fn clear(&mut self, key: u32);
}

/// The flat map: one entry for each page key that a row can ever have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlatMap {
    slots: Vec<SlotId>,
}

const ABSENT: SlotId = SlotId(u32::MAX);

impl FlatMap {
    /// An empty map for page keys below `keys`.
    pub fn new(keys: u32) -> Self {
        Self { slots: vec![ABSENT; keys as usize] }
    }

    /// Bytes of the entries.
    pub fn bytes(&self) -> usize {
        size_of_val(self.slots.as_slice())
    }
}

impl SlotMap for FlatMap {
    #[inline]
    fn get(&self, key: u32) -> Option<SlotId> {
        self.slots.get(key as usize).copied().filter(|slot| *slot != ABSENT)
    }

    #[inline]
    fn set(&mut self, key: u32, slot: SlotId) {
        self.slots[key as usize] = slot;
    }

    #[inline]
    fn clear(&mut self, key: u32) {
        self.slots[key as usize] = ABSENT;
    }
}
