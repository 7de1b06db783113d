use super::{EvictionPolicy, SlotStates, StepClock};
use crate::paging::SlotId;

/// What [`BucketedLru`](super::BucketedLru) means, said without a clock: each slot stores its age, which grows by
/// one a step and stops at `STATES - 1`. The slowest and plainest form, to hold the other against.
#[derive(Clone, Debug, Default)]
pub struct SaturatingLru<const STATES: usize = 64> {
    now: StepClock,
    ages: Vec<u8>,
}

impl<const STATES: usize> SaturatingLru<STATES> {
    /// Steps since the page in `slot` was used, at most `STATES - 1`.
    pub fn age(&self, slot: SlotId) -> u8 {
        self.ages[slot.index()]
    }
}

impl<const STATES: usize> EvictionPolicy for SaturatingLru<STATES> {
    fn resize(&mut self, slots: usize) {
        self.ages.resize(slots, 0);
    }

    fn begin_step(&mut self, _: &mut SlotStates, now: StepClock) {
        let steps = u64::from(now.since(self.now));
        self.now = now;
        for age in &mut self.ages {
            *age = (u64::from(*age) + steps).min(STATES as u64 - 1) as u8;
        }
    }

    fn admit(&mut self, _: &mut SlotStates, slot: SlotId, _: u32) {
        self.ages[slot.index()] = 0;
    }

    fn touch(&mut self, _: &mut SlotStates, slot: SlotId) {
        self.ages[slot.index()] = 0;
    }

    fn victims(&mut self, states: &SlotStates, need: usize, victims: &mut Vec<SlotId>) {
        let mut oldest_first: Vec<_> = states.evictable().collect();
        oldest_first.sort_by_key(|slot| std::cmp::Reverse(self.age(*slot)));
        oldest_first.truncate(need);
        oldest_first.sort();
        victims.extend(oldest_first);
    }

    fn bytes(&self) -> usize {
        size_of_val(self.ages.as_slice()) + size_of_val(&self.now)
    }
}
