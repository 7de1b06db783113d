use super::SlotId;

/// Who leaves when a row's slots are full.
///
/// A policy sees slots of one row. Its clock ticks once per step of that row, so slots touched in the same
/// step are of one age.
pub trait EvictionPolicy: std::fmt::Debug + Send {
    /// The policy of a row of `slots` slots.
    fn new(slots: usize) -> Self;

    /// A new step begins.
    fn tick(&mut self);

    /// A slot's page was selected, or just came in.
    fn touch(&mut self, slot: SlotId);

    /// Appends `need` of the slots for which `evictable` holds to `victims`, ascending. The caller
    /// guarantees that there are as many.
    fn victims(&mut self, need: usize, evictable: impl Fn(SlotId) -> bool, victims: &mut Vec<SlotId>);

    /// Bytes of the policy's state.
    fn bytes(&self) -> usize;
}

/// Least recently used, to the step: the slot that was touched longest ago leaves, of equals the lowest.
#[derive(Clone, Debug)]
pub struct Lru {
    now: u32,
    touched: Vec<u32>,
    candidates: Vec<(u32, SlotId)>,
}

impl EvictionPolicy for Lru {
    fn new(slots: usize) -> Self {
        Self { now: 0, touched: vec![0; slots], candidates: Vec::new() }
    }

    fn tick(&mut self) {
        self.now += 1;
    }

    fn touch(&mut self, slot: SlotId) {
        self.touched[slot.index()] = self.now;
    }

    fn victims(&mut self, need: usize, evictable: impl Fn(SlotId) -> bool, victims: &mut Vec<SlotId>) {
        if need == 0 {
            return;
        }
        self.candidates.clear();
        let slots = (0..self.touched.len() as u32).map(SlotId).filter(|slot| evictable(*slot));
        self.candidates.extend(slots.map(|slot| (self.touched[slot.index()], slot)));
        // (step, slot) pairs are distinct, so the set of the smallest is unique.
        if need < self.candidates.len() {
            self.candidates.select_nth_unstable(need - 1);
        }
        let first = victims.len();
        victims.extend(self.candidates[..need].iter().map(|(_, slot)| *slot));
        victims[first..].sort_unstable();
    }

    fn bytes(&self) -> usize {
        size_of_val(self.touched.as_slice()) + size_of_val(&self.now)
    }
}
