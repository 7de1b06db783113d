//! A cache as the documents describe it, by search.

use spinkv::memory::PhysicalPage;
use spinkv::paging::{PageCopy, Shrunk};

/// Steps since a page's last use and since it came in, to how soon it leaves: the largest goes first.
pub type Rank = fn(unused: u64, held: u64) -> u64;

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Held {
    pub key: u32,
    pub used: u64,
    pub admitted: u64,
    pub pins: usize,
}

#[derive(Clone, Debug)]
pub struct Model {
    pub now: u64,
    pub rank: Rank,
    /// Slot to physical page and what it holds; `None` where a slot was taken away.
    pub slots: Vec<Option<(u32, Option<Held>)>>,
    /// The keys that the step's last selection keeps.
    keep: Vec<u32>,
}

/// Pages, copies and evicted keys of a resolution.
pub type Answer = (Vec<PhysicalPage>, Vec<PageCopy>, Vec<u32>);

impl Model {
    pub fn new(pages: &[u32], now: u64, rank: Rank) -> Self {
        Self { now, rank, slots: pages.iter().map(|page| Some((*page, None))).collect(), keep: Vec::new() }
    }

    pub fn step(&mut self, now: u64) {
        self.now = now;
        self.keep.clear();
    }

    pub fn held(&self) -> impl Iterator<Item = (usize, u32, Held)> {
        let slots = self.slots.iter().enumerate();
        slots.filter_map(|(slot, one)| one.and_then(|(page, held)| held.map(|held| (slot, page, held))))
    }

    pub fn slot(&self, key: u32) -> Option<usize> {
        self.held().find(|(_, _, held)| held.key == key).map(|(slot, _, _)| slot)
    }

    pub fn capacity(&self) -> usize {
        self.slots.iter().flatten().count()
    }

    pub fn pages(&self) -> Vec<u32> {
        self.slots.iter().flatten().map(|(page, _)| *page).collect()
    }

    pub fn pinned(&self) -> usize {
        self.held().filter(|(_, _, held)| held.pins > 0).count()
    }

    pub fn empty(&self) -> Vec<usize> {
        let slots = self.slots.iter().enumerate();
        slots.filter(|(_, one)| one.is_some_and(|(_, held)| held.is_none())).map(|(slot, _)| slot).collect()
    }

    pub fn held_mut(&mut self, slot: usize) -> &mut Held {
        self.slots[slot].as_mut().unwrap().1.as_mut().unwrap()
    }

    /// Slots that may be emptied, the first to leave first.
    pub fn leaving(&self) -> Vec<usize> {
        let may = |held: &Held| held.pins == 0 && !self.keep.contains(&held.key);
        let mut slots: Vec<_> = self.held().filter(|(_, _, held)| may(held)).collect();
        slots.sort_by_key(|(slot, _, held)| {
            let rank = (self.rank)(self.now - held.used, self.now - held.admitted);
            (u64::MAX - rank, *slot)
        });
        slots.into_iter().map(|(slot, _, _)| slot).collect()
    }

    /// `need` slots, emptied where they must be, and the keys that left.
    fn room(&mut self, need: usize) -> (Vec<usize>, Vec<u32>) {
        let mut targets = self.empty();
        targets.truncate(need);
        let mut victims = self.leaving();
        victims.truncate(need - targets.len());
        victims.sort();
        let mut evicted = Vec::new();
        for slot in &victims {
            evicted.push(self.held_mut(*slot).key);
            self.slots[*slot].as_mut().unwrap().1 = None;
        }
        targets.extend(victims);
        (targets, evicted)
    }

    fn put(&mut self, slot: usize, key: u32) {
        let held = Held { key, used: self.now, admitted: self.now, pins: 0 };
        self.slots[slot].as_mut().unwrap().1 = Some(held);
    }

    /// `None` if it does not fit.
    pub fn resolve(&mut self, keys: &[u32]) -> Option<Answer> {
        let others = self.held().filter(|(_, _, held)| held.pins > 0 && !keys.contains(&held.key)).count();
        if keys.len() + others > self.capacity() {
            self.keep.clear();
            return None;
        }
        self.keep = keys.to_vec();
        let missing: Vec<_> = keys.iter().copied().filter(|key| self.slot(*key).is_none()).collect();
        let (targets, evicted) = self.room(missing.len());
        for (key, slot) in missing.iter().zip(targets) {
            self.put(slot, *key);
        }
        let mut pages = Vec::new();
        for key in keys {
            let slot = self.slot(*key).unwrap();
            self.held_mut(slot).used = self.now;
            pages.push(PhysicalPage(self.slots[slot].unwrap().0));
        }
        let page = |key| PhysicalPage(self.slots[self.slot(key).unwrap()].unwrap().0);
        let copies = missing.iter().map(|key| PageCopy { key: *key, page: page(*key) }).collect();
        Some((pages, copies, evicted))
    }

    /// The page handed back and the key that left.
    pub fn adopt(&mut self, key: u32, page: u32) -> (u32, Option<u32>) {
        if self.empty().is_empty() && self.leaving().is_empty() {
            return (page, None);
        }
        let (targets, evicted) = self.room(1);
        self.put(targets[0], key);
        let own = &mut self.slots[targets[0]].as_mut().unwrap().0;
        (std::mem::replace(own, page), evicted.first().copied())
    }

    pub fn grow(&mut self, pages: &[u32]) {
        for page in pages {
            match self.slots.iter().position(Option::is_none) {
                Some(gap) => self.slots[gap] = Some((*page, None)),
                None => self.slots.push(Some((*page, None))),
            }
        }
    }

    pub fn shrink(&mut self, count: usize) -> Shrunk {
        self.keep.clear();
        let (mut slots, evicted) = self.room(count.min(self.capacity() - self.pinned()));
        slots.sort();
        let pages = slots.iter().map(|slot| PhysicalPage(self.slots[*slot].take().unwrap().0)).collect();
        while let Some(None) = self.slots.last() {
            self.slots.pop();
        }
        Shrunk { pages, evicted }
    }

    pub fn withdraw(&mut self, slot: usize) {
        // What the selection used is gone; if the key comes back, that is another page.
        let key = self.held_mut(slot).key;
        self.keep.retain(|kept| *kept != key);
        self.slots[slot].as_mut().unwrap().1 = None;
    }
}
