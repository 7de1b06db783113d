use super::bits::Bits;
use super::{EvictionPolicy, SlotId, SlotMap, SlotStates, StepClock};
use crate::memory::PhysicalPage;
use crate::partition::SelectedPage;
use crate::{Error, Result};

/// A page to fetch: the host page of `key` goes to `page`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageCopy {
    /// The page key, which names the source.
    pub key: u32,
    /// The destination on the GPU.
    pub page: PhysicalPage,
}

/// What a step's selection needs, in buffers that steps and rows reuse.
#[derive(Clone, Debug, Default)]
pub struct Resolution {
    /// Where each selected page is on the GPU, in the order of the selection.
    pub pages: Vec<PhysicalPage>,
    /// The misses, in the order of the selection.
    pub copies: Vec<PageCopy>,
    /// Pages that left, by key, in slot order.
    pub evicted: Vec<u32>,
    scratch: Scratch,
}

/// The lists of a resolution that is under way.
#[derive(Clone, Debug, Default)]
struct Scratch {
    /// The selection's slots as they were.
    found: Vec<Option<SlotId>>,
    /// Position and slot of the hits.
    hit: Vec<(u32, SlotId)>,
    /// Position and key of the misses.
    missing: Vec<(u32, u32)>,
    /// The slots that the misses get.
    targets: Vec<SlotId>,
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
        self.scratch.found.clear();
        self.scratch.hit.clear();
        self.scratch.missing.clear();
        self.scratch.targets.clear();
    }
}

impl Scratch {
    /// Parts the selection into hits and misses. Both lists are written at each position and only one grows, since
    /// what hits cannot be predicted, and a branch would cost more.
    fn part(&mut self, selection: &[SelectedPage]) {
        self.hit.resize(selection.len(), (0, SlotId(0)));
        self.missing.resize(selection.len(), (0, 0));
        let (mut hits, mut misses) = (0, 0);
        for (position, (page, found)) in (0..).zip(selection.iter().zip(&self.found)) {
            self.hit[hits] = (position, found.unwrap_or(SlotId(0)));
            self.missing[misses] = (position, page.key);
            hits += usize::from(found.is_some());
            misses += usize::from(found.is_none());
        }
        self.hit.truncate(hits);
        self.missing.truncate(misses);
    }

    /// Ascending selections, the usual ones, cost one comparison a miss.
    fn assert_distinct_misses(&self) {
        if self.missing.is_sorted_by(|a, b| a.1 < b.1) {
            return;
        }
        let mut keys: Vec<_> = self.missing.iter().map(|(_, key)| *key).collect();
        keys.sort_unstable();
        if let Some(pair) = keys.windows(2).find(|pair| pair[0] == pair[1]) {
            panic!("page {} is selected twice", pair[0]);
        }
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

/// What a row gave up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shrunk {
    /// The physical pages of the slots that went, in slot order. Nothing refers to them any more.
    pub pages: Vec<PhysicalPage>,
    /// Pages that left with them, by key, in slot order.
    pub evicted: Vec<u32>,
}

/// The cache of one row: which slot holds which page key and which physical page.
///
/// Every slot owns a physical page, so resolving a selection never allocates. Slots come and go between steps
/// ([`grow`](Self::grow), [`shrink`](Self::shrink)); a slot keeps its number for as long as it exists. The way
/// from page keys to slots is a [`SlotMap`] of the caller's, always the same one. Rows share nothing.
#[derive(Debug)]
pub struct RowCache<P> {
    /// Slot to page key; `NO_KEY` where empty.
    owner: Vec<u32>,
    /// Slot to physical page; `NO_PAGE` where there is no slot at the moment.
    physical: Vec<PhysicalPage>,
    /// Slots that exist and are empty.
    empty: Bits,
    states: SlotStates,
    /// Pins of each slot.
    pins: Vec<u8>,
    capacity: usize,
    len: usize,
    policy: P,
}

const NO_KEY: u32 = u32::MAX;
const NO_PAGE: PhysicalPage = PhysicalPage(u32::MAX);

impl<P: EvictionPolicy> RowCache<P> {
    /// A cache whose slots hold `pages`.
    pub fn new(pages: Vec<PhysicalPage>, policy: P) -> Self {
        let mut cache = Self {
            owner: Vec::new(),
            physical: Vec::new(),
            empty: Bits::default(),
            states: SlotStates::default(),
            pins: Vec::new(),
            capacity: 0,
            len: 0,
            policy,
        };
        cache.grow(pages);
        cache
    }

    /// Slots of the cache.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Slots that hold a page.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no slot holds a page.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Slots that are pinned.
    pub fn pinned(&self) -> usize {
        self.states.pinned()
    }

    /// Where the page `key` is, if it is here.
    pub fn lookup(&self, map: &impl SlotMap, key: u32) -> Option<PhysicalPage> {
        map.get(key).map(|slot| self.physical[slot.index()])
    }

    /// The pages that are here, by key, in slot order.
    pub fn resident(&self) -> impl Iterator<Item = (u32, PhysicalPage)> {
        let pages = self.owner.iter().zip(&self.physical);
        pages.filter(|(key, _)| **key != NO_KEY).map(|(key, page)| (*key, *page))
    }

    /// The page key that `slot` holds, if any.
    pub fn owner(&self, slot: SlotId) -> Option<u32> {
        self.owner.get(slot.index()).copied().filter(|key| *key != NO_KEY)
    }

    /// The physical page of `slot`, whether it holds a page key or not; `None` if there is no such slot at the moment.
    pub fn physical(&self, slot: SlotId) -> Option<PhysicalPage> {
        self.physical.get(slot.index()).copied().filter(|page| *page != NO_PAGE)
    }

    /// All physical pages of the slots, in slot order.
    pub fn physical_pages(&self) -> impl Iterator<Item = PhysicalPage> {
        self.physical.iter().copied().filter(|page| *page != NO_PAGE)
    }

    /// The slots' states.
    pub fn states(&self) -> &SlotStates {
        &self.states
    }

    /// The policy.
    pub fn policy(&self) -> &P {
        &self.policy
    }

    /// Starts a step of the request, before anything is adopted or resolved in it.
    pub fn begin_step(&mut self, now: StepClock) {
        self.states.untouch_all();
        self.policy.begin_step(&mut self.states, now);
    }

    /// Makes every selected page resident, on paper: hits are touched, misses get an empty slot (the lowest
    /// first) or the slot of a victim (in slot order), and `out` says what to copy where. No page of this
    /// selection is a victim and no pinned one, and no more pages leave than must.
    ///
    /// Each key of `selection` occurs once (see [`Deduplicator`](super::Deduplicator)); the caller must carry out
    /// the copies before anyone reads the pages.
    ///
    /// # Errors
    /// [`Error::SelectionExceedsCapacity`] if the selection and the pinned pages that are not in it need more slots
    /// than there are; nothing is then changed.
    ///
    /// # Panics
    /// If a key repeats, which would give one page two slots.
    pub fn resolve(
        &mut self,
        map: &mut impl SlotMap,
        selection: &[SelectedPage],
        out: &mut Resolution,
    ) -> Result<()> {
        out.clear();
        self.states.untouch_all();
        let Resolution { pages, copies, evicted, scratch } = out;
        // Passes of their own: loads that nothing waits for overlap, and they are most of a step's time.
        map.find(selection, &mut scratch.found);
        scratch.part(selection);
        pages.resize(selection.len(), NO_PAGE);
        for (position, slot) in &scratch.hit {
            pages[*position as usize] = self.physical[slot.index()];
        }
        for (position, slot) in &scratch.hit {
            debug_assert_eq!(
                self.owner[slot.index()],
                selection[*position as usize].key,
                "map and slots disagree"
            );
            assert!(self.states.touch(*slot), "page {} is selected twice", self.owner[slot.index()]);
        }
        scratch.assert_distinct_misses();

        let (selected, capacity) = (selection.len(), self.capacity);
        let pinned = match self.states.pinned() {
            0 => 0,
            all => all - scratch.hit.iter().filter(|(_, slot)| self.states.is_pinned(*slot)).count(),
        };
        if selected + pinned > capacity {
            self.states.untouch_all();
            out.clear();
            return Err(Error::SelectionExceedsCapacity { selected, capacity, pinned });
        }

        for (_, slot) in &scratch.hit {
            if self.policy.forgets(*slot) {
                let (key, page) = (self.owner[slot.index()], self.physical[slot.index()]);
                copies.push(PageCopy { key, page });
            }
            self.policy.touch(&mut self.states, *slot);
        }
        self.make_room(map, scratch.missing.len(), &mut scratch.targets, evicted);
        for ((position, key), slot) in scratch.missing.iter().zip(&scratch.targets) {
            self.install(map, *key, *slot);
            self.states.touch(*slot);
            let page = self.physical[slot.index()];
            pages[*position as usize] = page;
            copies.push(PageCopy { key: *key, page });
        }
        Ok(())
    }

    /// Takes over the page `key`, whose bytes are already in `page`, from the steady zone: it gets an empty
    /// slot or a victim's, and that slot's own physical page is handed out in exchange. No byte moves. If no slot
    /// can be had (there is none, or all are pinned or used by a selection of this step), `page` itself is handed
    /// back: the host has a copy.
    ///
    /// # Panics
    /// If `key` is already here, which would mean that a page was steady and selected at once.
    pub fn adopt(&mut self, map: &mut impl SlotMap, key: u32, page: PhysicalPage) -> Adoption {
        assert!(map.get(key).is_none(), "page {key} was steady and cached at once");
        if self.len == self.capacity && self.states.evictable().next().is_none() {
            return Adoption { spare: page, evicted: None };
        }
        let (mut targets, mut evicted) = (Vec::with_capacity(1), Vec::new());
        self.make_room(map, 1, &mut targets, &mut evicted);
        let slot = targets[0];
        self.install(map, key, slot);
        let spare = std::mem::replace(&mut self.physical[slot.index()], page);
        Adoption { spare, evicted: evicted.pop() }
    }

    /// Adds an empty slot for each of `pages`. Not within a step.
    pub fn grow(&mut self, pages: Vec<PhysicalPage>) {
        self.capacity += pages.len();
        let mut pages = pages.into_iter();
        for slot in 0..self.physical.len() {
            if self.physical[slot] == NO_PAGE
                && let Some(page) = pages.next()
            {
                self.physical[slot] = page;
                self.empty.insert(slot);
            }
        }
        let before = self.physical.len();
        self.physical.extend(pages);
        self.resize();
        (before..self.physical.len()).for_each(|slot| {
            self.empty.insert(slot);
        });
    }

    /// Takes away `count` slots, empty ones first and then those of victims, and gives up their physical pages. A
    /// pinned slot stays, so fewer may go than were asked for. Not within a step.
    pub fn shrink(&mut self, map: &mut impl SlotMap, count: usize) -> Shrunk {
        self.states.untouch_all();
        let count = count.min(self.capacity - self.states.pinned());
        let (mut slots, mut evicted) = (Vec::with_capacity(count), Vec::new());
        self.make_room(map, count, &mut slots, &mut evicted);
        slots.sort_unstable();
        let give_up = |slot: &SlotId| std::mem::replace(&mut self.physical[slot.index()], NO_PAGE);
        let pages = slots.iter().map(give_up).collect();
        self.capacity -= count;
        // What is left of the slots in the middle is filled by the next growth.
        let last = self.physical.iter().rposition(|page| *page != NO_PAGE);
        self.physical.truncate(last.map_or(0, |last| last + 1));
        self.resize();
        Shrunk { pages, evicted }
    }

    /// Takes away all slots but the pinned ones: what a request that ends or is preempted gives back at once.
    pub fn release_all(&mut self, map: &mut impl SlotMap) -> Shrunk {
        self.shrink(map, self.capacity)
    }

    /// Empties the slot of `key` if it has one: its bytes turned out not to be there.
    ///
    /// # Panics
    /// If the slot is pinned.
    pub fn withdraw(&mut self, map: &mut impl SlotMap, key: u32) -> bool {
        let Some(slot) = map.get(key) else { return false };
        assert!(!self.states.is_pinned(slot), "page {key} is pinned and cannot be withdrawn");
        self.vacate(map, slot);
        self.empty.insert(slot.index());
        true
    }

    /// Keeps the page in `slot` where it is until as many [`unpin`](Self::unpin)s: a transfer reads or writes it,
    /// or the host has no copy yet.
    ///
    /// # Panics
    /// If the slot is empty, or is pinned 255 times already.
    pub fn pin(&mut self, slot: SlotId) {
        assert!(self.states.is_held(slot), "slot {} is empty and cannot be pinned", slot.0);
        let pins = &mut self.pins[slot.index()];
        *pins = pins.checked_add(1).expect("a slot has at most 255 pins");
        if *pins == 1 {
            self.states.set_pinned(slot, true);
        }
    }

    /// Takes one pin off `slot`.
    ///
    /// # Panics
    /// If there is none.
    pub fn unpin(&mut self, slot: SlotId) {
        let pins = &mut self.pins[slot.index()];
        *pins = pins.checked_sub(1).expect("a slot is unpinned as often as it was pinned");
        if *pins == 0 {
            self.states.set_pinned(slot, false);
        }
    }

    /// Bytes of the tables, without the [`SlotMap`].
    pub fn bytes(&self) -> usize {
        size_of_val(self.owner.as_slice())
            + size_of_val(self.physical.as_slice())
            + size_of_val(self.pins.as_slice())
            + self.empty.bytes()
            + self.states.table_bytes()
            + self.policy.bytes()
    }

    /// Appends `need` slots without a page to `targets`, which is empty, evicting as few pages as that takes.
    fn make_room(
        &mut self,
        map: &mut impl SlotMap,
        need: usize,
        targets: &mut Vec<SlotId>,
        evicted: &mut Vec<u32>,
    ) {
        let empty = need.min(self.capacity - self.len);
        targets.extend(self.empty.iter().take(empty).map(|slot| SlotId(slot as u32)));
        targets.iter().for_each(|slot| self.empty.remove(slot.index()));
        self.policy.victims(&self.states, need - empty, targets);
        assert_eq!(targets.len(), need, "a policy names as many victims as are needed");
        let victims = &targets[empty..];
        evicted.extend(victims.iter().map(|slot| self.owner[slot.index()]));
        victims.iter().for_each(|slot| self.vacate(map, *slot));
    }

    fn vacate(&mut self, map: &mut impl SlotMap, slot: SlotId) {
        let key = std::mem::replace(&mut self.owner[slot.index()], NO_KEY);
        map.clear(key);
        self.states.vacate(slot);
        self.len -= 1;
    }

    fn install(&mut self, map: &mut impl SlotMap, key: u32, slot: SlotId) {
        map.set(key, slot);
        self.owner[slot.index()] = key;
        self.states.fill(slot);
        self.len += 1;
        self.policy.admit(&mut self.states, slot, key);
    }

    /// Makes all slot arrays as long as that of the physical pages.
    fn resize(&mut self) {
        let slots = self.physical.len();
        self.owner.resize(slots, NO_KEY);
        self.pins.resize(slots, 0);
        self.empty.grow(slots);
        self.states.resize(slots);
        self.policy.resize(slots);
    }
}
