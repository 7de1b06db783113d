use super::{EvictionPolicy, SlotStates, StepClock};
use crate::paging::SlotId;

/// The clock's value at which something happened to each slot.
#[derive(Clone, Debug, Default)]
struct Stamps {
    now: StepClock,
    of: Vec<StepClock>,
    candidates: Vec<(u32, SlotId)>,
}

impl Stamps {
    fn stamp(&mut self, slot: SlotId) {
        self.of[slot.index()] = self.now;
    }

    fn age(&self, slot: SlotId) -> u32 {
        self.now.since(self.of[slot.index()])
    }

    /// Appends the `need` evictable slots with the oldest stamps, of equals the lowest, to `victims`, ascending.
    fn oldest(&mut self, states: &SlotStates, need: usize, victims: &mut Vec<SlotId>) {
        if need == 0 {
            return;
        }
        let mut candidates = std::mem::take(&mut self.candidates);
        candidates.clear();
        candidates.extend(states.evictable().map(|slot| (u32::MAX - self.age(slot), slot)));
        // (age, slot) pairs are distinct, so the set of the first is unique.
        if need < candidates.len() {
            candidates.select_nth_unstable(need - 1);
        }
        let first = victims.len();
        victims.extend(candidates[..need].iter().map(|(_, slot)| *slot));
        victims[first..].sort_unstable();
        self.candidates = candidates;
    }

    fn resize(&mut self, slots: usize) {
        self.of.resize(slots, self.now);
    }

    fn bytes(&self) -> usize {
        size_of_val(self.of.as_slice()) + size_of_val(&self.now)
    }
}

/// Least recently used, to the step: the slot that was used longest ago leaves, of equals the lowest.
///
/// The clock may not move by 2^32 steps between two uses.
#[derive(Clone, Debug, Default)]
pub struct Lru {
    used: Stamps,
}

impl EvictionPolicy for Lru {
    fn resize(&mut self, slots: usize) {
        self.used.resize(slots);
    }

    fn begin_step(&mut self, _: &mut SlotStates, now: StepClock) {
        self.used.now = now;
    }

    fn admit(&mut self, _: &mut SlotStates, slot: SlotId, _: u32) {
        self.used.stamp(slot);
    }

    fn touch(&mut self, _: &mut SlotStates, slot: SlotId) {
        self.used.stamp(slot);
    }

    fn victims(&mut self, states: &SlotStates, need: usize, victims: &mut Vec<SlotId>) {
        self.used.oldest(states, need, victims);
    }

    fn bytes(&self) -> usize {
        self.used.bytes()
    }
}

/// First in, first out, to the step: the page that came in longest ago leaves, of equals the one in the lowest
/// slot.
#[derive(Clone, Debug, Default)]
pub struct Fifo {
    admitted: Stamps,
}

impl EvictionPolicy for Fifo {
    fn resize(&mut self, slots: usize) {
        self.admitted.resize(slots);
    }

    fn begin_step(&mut self, _: &mut SlotStates, now: StepClock) {
        self.admitted.now = now;
    }

    fn admit(&mut self, _: &mut SlotStates, slot: SlotId, _: u32) {
        self.admitted.stamp(slot);
    }

    fn touch(&mut self, _: &mut SlotStates, _: SlotId) {}

    fn victims(&mut self, states: &SlotStates, need: usize, victims: &mut Vec<SlotId>) {
        self.admitted.oldest(states, need, victims);
    }

    fn bytes(&self) -> usize {
        self.admitted.bytes()
    }
}

/// No memory beyond the previous step: a page hits only if that step used it, however many slots there are. The
/// reuse of ShadowKV (arXiv 2410.21465) and the "+Mandatory" point of Spin's ablation.
#[derive(Clone, Debug, Default)]
pub struct PreviousStep {
    used: Stamps,
    previous: StepClock,
}

impl EvictionPolicy for PreviousStep {
    fn resize(&mut self, slots: usize) {
        self.used.resize(slots);
    }

    fn begin_step(&mut self, _: &mut SlotStates, now: StepClock) {
        self.previous = self.used.now;
        self.used.now = now;
    }

    fn admit(&mut self, _: &mut SlotStates, slot: SlotId, _: u32) {
        self.used.stamp(slot);
    }

    fn touch(&mut self, _: &mut SlotStates, slot: SlotId) {
        self.used.stamp(slot);
    }

    fn victims(&mut self, states: &SlotStates, need: usize, victims: &mut Vec<SlotId>) {
        self.used.oldest(states, need, victims);
    }

    fn forgets(&self, slot: SlotId) -> bool {
        self.used.age(slot) > self.used.now.since(self.previous)
    }

    fn bytes(&self) -> usize {
        self.used.bytes() + size_of_val(&self.previous)
    }
}
