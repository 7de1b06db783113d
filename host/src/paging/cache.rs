use super::EvictionPolicy;
use crate::memory::PhysicalPage;
use crate::partition::SelectedPage;
use crate::{Error, Result};

/// A slot of a row's cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotId(pub u32);

impl SlotId {
    /// The slot as an index into slot arrays.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// A page to fetch: the host page of `key` goes to `page`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageCopy {
    /// The page key, which names the source.
    pub key: u32,
    /// The destination on the GPU.
    pub page: PhysicalPage,
}

/// What a step's selection needs, in buffers that steps reuse.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resolution {
    /// Where each selected page is on the GPU, in the order of the selection.
    pub pages: Vec<PhysicalPage>,
    /// The misses, in ascending key order.
    pub copies: Vec<PageCopy>,
    /// Pages that left, by key, in slot order.
    pub evicted: Vec<u32>,
}

impl Resolution {
    /// Selected pages that were there already.
    pub fn hits(&self) -> usize {
        self.pages.len() - self.copies.len()
    }

    fn clear(&mut self) {
        self.pages.clear();
        self.copies.clear();
        self.evicted.clear();
    }
}

/// What became of a page that left the steady zone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Adoption {
    /// The physical page that the row may use again.
    pub spare: PhysicalPage,
    /// The page, by key, that gave its slot.
    pub evicted: Option<u32>,
}

/// The cache of one row: which page keys have a slot, and which physical page each slot holds.
///
/// Every slot owns a physical page from the start, so resolving a selection never allocates. Rows share
/// nothing.
#[derive(Debug)]
pub struct RowCache<P> {
    /// Page key to slot; `NONE` where absent.
    slot_of: Vec<SlotId>,
    /// Slot to page key; `NO_KEY` where empty.
    owner: Vec<u32>,
    physical: Vec<PhysicalPage>,
    /// Empty slots, the lowest last.
    empty: Vec<SlotId>,
    /// The resolution in which a slot was last used; slots of the current one stay.
    used_in: Vec<u32>,
    resolution: u32,
    policy: P,
    missing: Vec<(usize, u32)>,
    targets: Vec<SlotId>,
}

const NONE: SlotId = SlotId(u32::MAX);
const NO_KEY: u32 = u32::MAX;

impl<P: EvictionPolicy> RowCache<P> {
    /// A cache whose slots hold `pages`, for page keys below `keys`.
    pub fn new(pages: Vec<PhysicalPage>, keys: u32) -> Self {
        let slots = pages.len();
        Self {
            slot_of: vec![NONE; keys as usize],
            owner: vec![NO_KEY; slots],
            physical: pages,
            empty: (0..slots as u32).rev().map(SlotId).collect(),
            used_in: vec![0; slots],
            resolution: 0,
            policy: P::new(slots),
            missing: Vec::new(),
            targets: Vec::new(),
        }
    }

    /// Slots of the cache.
    pub fn capacity(&self) -> usize {
        self.owner.len()
    }

    /// Slots that hold a page.
    pub fn len(&self) -> usize {
        self.capacity() - self.empty.len()
    }

    /// Whether no slot holds a page.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where the page `key` is, if it is here.
    pub fn lookup(&self, key: u32) -> Option<PhysicalPage> {
        self.slot(key).map(|slot| self.physical[slot.index()])
    }

    /// The pages that are here, by key, in slot order.
    pub fn resident(&self) -> impl Iterator<Item = (u32, PhysicalPage)> {
        self.owner
            .iter()
            .zip(&self.physical)
            .filter(|(key, _)| **key != NO_KEY)
            .map(|(key, page)| (*key, *page))
    }

    /// All physical pages of the slots.
    pub fn physical_pages(&self) -> &[PhysicalPage] {
        &self.physical
    }

    /// Starts a new step, before anything is adopted or resolved in it: all pages age by one.
    pub fn tick(&mut self) {
        self.policy.tick();
    }

    /// Makes every selected page resident, on paper: hits are touched, misses get an empty slot (the lowest
    /// first) or the slot of a victim (in slot order), and `out` says what to copy where. No page of this
    /// selection is a victim, and no more pages leave than must.
    ///
    /// Keys of `selection` ascend and each occurs once; the caller must carry out the copies before anyone
    /// reads the pages.
    ///
    /// # Errors
    /// [`Error::SelectionExceedsCapacity`] if there are more pages than slots; nothing is then changed.
    ///
    /// # Panics
    /// If keys do not ascend or repeat, which would give one page two slots, or are out of range.
    pub fn resolve(&mut self, selection: &[SelectedPage], out: &mut Resolution) -> Result<()> {
        assert!(selection.is_sorted_by(|a, b| a.key < b.key), "keys must ascend and be unique");
        out.clear();
        if selection.len() > self.capacity() {
            let (selected, capacity) = (selection.len(), self.capacity());
            return Err(Error::SelectionExceedsCapacity { selected, capacity });
        }
        self.resolution += 1;
        self.missing.clear();
        for (position, page) in selection.iter().enumerate() {
            match self.slot(page.key) {
                Some(slot) => {
                    self.policy.touch(slot);
                    self.used_in[slot.index()] = self.resolution;
                    out.pages.push(self.physical[slot.index()]);
                }
                None => {
                    self.missing.push((position, page.key));
                    out.pages.push(PhysicalPage(u32::MAX));
                }
            }
        }

        self.make_room(self.missing.len(), &mut out.evicted);
        for index in 0..self.missing.len() {
            let ((position, key), slot) = (self.missing[index], self.targets[index]);
            self.install(key, slot);
            let page = self.physical[slot.index()];
            out.pages[position] = page;
            out.copies.push(PageCopy { key, page });
        }
        Ok(())
    }

    /// Takes over the page `key`, whose bytes are already in `page`, from the steady zone: it gets an empty
    /// slot or a victim's, and that slot's own physical page is handed out in exchange. No byte moves. A cache
    /// without slots hands `page` itself back: the host has a copy.
    ///
    /// # Panics
    /// If `key` is already here, which would mean that a page was steady and selected at once, or out of range.
    pub fn adopt(&mut self, key: u32, page: PhysicalPage) -> Adoption {
        assert!(self.slot(key).is_none(), "page {key} was steady and cached at once");
        if self.capacity() == 0 {
            return Adoption { spare: page, evicted: None };
        }
        // No selection is being resolved, so no slot is in use.
        self.resolution += 1;
        let mut evicted = Vec::new();
        self.make_room(1, &mut evicted);
        let slot = self.targets[0];
        self.install(key, slot);
        let spare = std::mem::replace(&mut self.physical[slot.index()], page);
        Adoption { spare, evicted: evicted.pop() }
    }

    /// Bytes of the tables.
    pub fn bytes(&self) -> usize {
        size_of_val(self.slot_of.as_slice())
            + size_of_val(self.owner.as_slice())
            + size_of_val(self.physical.as_slice())
            + self.policy.bytes()
    }

    fn slot(&self, key: u32) -> Option<SlotId> {
        self.slot_of.get(key as usize).copied().filter(|slot| *slot != NONE)
    }

    /// Fills `targets` with `need` slots, evicting as few pages as that takes.
    fn make_room(&mut self, need: usize, evicted: &mut Vec<u32>) {
        self.targets.clear();
        let empty = need.min(self.empty.len());
        self.targets.extend(self.empty.drain(self.empty.len() - empty..).rev());
        let (owner, used_in, resolution) = (&self.owner, &self.used_in, self.resolution);
        let evictable = |slot: SlotId| owner[slot.index()] != NO_KEY && used_in[slot.index()] != resolution;
        self.policy.victims(need - empty, evictable, &mut self.targets);
        for slot in &self.targets[empty..] {
            let key = self.owner[slot.index()];
            self.slot_of[key as usize] = NONE;
            evicted.push(key);
        }
    }

    fn install(&mut self, key: u32, slot: SlotId) {
        self.slot_of[key as usize] = slot;
        self.owner[slot.index()] = key;
        self.used_in[slot.index()] = self.resolution;
        self.policy.touch(slot);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::paging::Lru;

    fn cache(slots: u32) -> RowCache<Lru> {
        RowCache::new((100..100 + slots).map(PhysicalPage).collect(), 16)
    }

    fn resolve(cache: &mut RowCache<Lru>, keys: &[u32]) -> Resolution {
        let selection: Vec<_> = keys.iter().map(|key| SelectedPage { key: *key, tokens: 8 }).collect();
        let mut out = Resolution::default();
        cache.tick();
        cache.resolve(&selection, &mut out).unwrap();
        out
    }

    #[test]
    fn the_page_untouched_longest_leaves() {
        let mut cache = cache(3);
        resolve(&mut cache, &[1, 2, 3]);
        resolve(&mut cache, &[2]);
        resolve(&mut cache, &[3]);
        let out = resolve(&mut cache, &[4]);
        assert_eq!(out.evicted, [1]);
        assert_eq!(out.copies, [PageCopy { key: 4, page: PhysicalPage(100) }]);
        let out = resolve(&mut cache, &[2, 5]);
        assert_eq!((out.hits(), out.evicted), (1, vec![3]));
    }

    #[test]
    fn a_selection_never_evicts_its_own_pages() {
        let mut cache = cache(3);
        resolve(&mut cache, &[1, 2, 3]);
        let out = resolve(&mut cache, &[1, 7, 8]);
        assert_eq!(out.evicted, [2, 3]);
        assert_eq!(out.pages, [100, 101, 102].map(PhysicalPage));
        assert!(cache.lookup(1).is_some());
    }

    #[test]
    fn too_large_a_selection_changes_nothing() {
        let mut cache = cache(2);
        resolve(&mut cache, &[1, 2]);
        let selection = [3, 4, 5].map(|key| SelectedPage { key, tokens: 8 });
        let error = cache.resolve(&selection, &mut Resolution::default()).unwrap_err();
        assert_eq!(error, Error::SelectionExceedsCapacity { selected: 3, capacity: 2 });
        assert_eq!(cache.resident().map(|(key, _)| key).collect::<Vec<_>>(), [1, 2]);
    }

    #[test]
    fn pages_adopted_in_one_step_do_not_evict_each_other() {
        let mut cache = cache(8);
        resolve(&mut cache, &[0, 1, 2, 3, 4, 5, 6, 7]);
        cache.tick();
        let evicted: Vec<_> =
            (8..12).map(|key| cache.adopt(key, PhysicalPage(key)).evicted.unwrap()).collect();
        assert_eq!(evicted, [0, 1, 2, 3]);
        assert!((4..12).all(|key| cache.lookup(key).is_some()));
    }

    #[test]
    fn an_adopted_page_keeps_its_place_and_frees_another() {
        let mut cache = cache(1);
        let first = cache.adopt(9, PhysicalPage(7));
        assert_eq!(first, Adoption { spare: PhysicalPage(100), evicted: None });
        assert_eq!(cache.lookup(9), Some(PhysicalPage(7)));
        let second = cache.adopt(10, PhysicalPage(8));
        assert_eq!(second, Adoption { spare: PhysicalPage(7), evicted: Some(9) });
        let none = RowCache::<Lru>::new(Vec::new(), 16).adopt(1, PhysicalPage(3));
        assert_eq!(none, Adoption { spare: PhysicalPage(3), evicted: None });
    }
}
