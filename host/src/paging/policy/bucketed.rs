use super::{EvictionPolicy, SlotStates, StepClock};
use crate::paging::SlotId;

/// Least recently used among `STATES` ages: steps since a page's last use, `0, 1, …, STATES - 1 or more`. Pages
/// of one age form a bucket; the oldest buckets leave, of the last one the lowest slots.
///
/// A slot's timestamp is the request's clock modulo `STATES`, in bits 0 to 5 of its [state](SlotStates), so the
/// policy has no table of its own and touching a page is one store. Before a timestamp would be lapped by the
/// clock, it is moved along with it (the clamp), so ages never wrap. Victims come from two passes over the bytes:
/// a histogram of ages gives the age from which on all leave and how many of that age do; the second pass takes
/// them in slot order. Nothing is ever sorted, so a GPU can do both passes in parallel.
///
/// The paper (Spin, arXiv 2604.26837) fixes 64 states and bulk eviction; clock, clamp and passes are our design.
#[derive(Clone, Debug, Default)]
pub struct BucketedLru<const STATES: usize = 64> {
    now: StepClock,
}

/// Slots whose ages are worked out at a time.
const BLOCK: usize = 64;
/// Slots that are compared at a time.
const WORD: usize = size_of::<u64>();
const LOW_BITS: u64 = 0x0101_0101_0101_0101;
const HIGH_BITS: u64 = 0x80 * LOW_BITS;

impl<const STATES: usize> BucketedLru<STATES> {
    const MASK: u8 = {
        assert!(STATES.is_power_of_two() && STATES >= 2 && STATES <= 64, "2, 4, 8, 16, 32 or 64 states");
        STATES as u8 - 1
    };

    /// Steps since the page in `slot` was used, at most `STATES - 1`.
    pub fn age(&self, states: &SlotStates, slot: SlotId) -> u8 {
        Self::age_of(self.stamp(), states.bytes()[slot.index()])
    }

    fn stamp(&self) -> u8 {
        self.now.0 as u8 & Self::MASK
    }

    fn age_of(stamp: u8, byte: u8) -> u8 {
        stamp.wrapping_sub(byte) & Self::MASK
    }

    fn set(&self, states: &mut SlotStates, slot: SlotId) {
        let byte = &mut states.bytes_mut()[slot.index()];
        *byte = (*byte & !SlotStates::POLICY) | self.stamp();
    }

    /// The age plus one of each slot of a block that may leave, 0 for the others and past the end. Slots of age 0
    /// that the selection uses are not told apart yet.
    fn ages_plus_one(&self, bytes: &[u8]) -> [u8; BLOCK] {
        let stamp = self.stamp();
        let mut ages = [0; BLOCK];
        for (age, byte) in ages.iter_mut().zip(bytes) {
            *age = if SlotStates::may_leave(*byte) { Self::age_of(stamp, *byte) + 1 } else { 0 };
        }
        ages
    }

    /// The age from which on all pages leave, and how many of that very age do, for `need` of them to leave.
    fn threshold(&self, bytes: &[u8], need: usize) -> (u8, usize) {
        // Several histograms, so that equal ages in a row do not wait for each other.
        let mut histograms = [[0u32; 128]; 4];
        for block in bytes.chunks(BLOCK) {
            for ages in self.ages_plus_one(block).as_chunks::<4>().0 {
                for (histogram, age) in histograms.iter_mut().zip(ages) {
                    histogram[usize::from(age & 127)] += 1;
                }
            }
        }
        let count = |age: u8| -> usize {
            histograms.iter().map(|histogram| histogram[usize::from(age) + 1] as usize).sum()
        };
        // Age 0 is not counted: it holds what the selection uses. What is still needed there is there.
        let (mut threshold, mut older) = (Self::MASK, 0);
        while threshold > 0 && older + count(threshold) < need {
            older += count(threshold);
            threshold -= 1;
        }
        (threshold, need - older)
    }

    /// Appends the slots of ages above `threshold`, and the first `of_threshold` of that age, in slot order.
    fn compact(
        &self,
        states: &SlotStates,
        threshold: u8,
        mut of_threshold: usize,
        victims: &mut Vec<SlotId>,
    ) {
        // All bytes are below 128, so a byte keeps its high bit if it is at least as large as what is subtracted.
        let least = (u64::from(threshold) + 1) * LOW_BITS;
        for (block, bytes) in states.bytes().chunks(BLOCK).enumerate() {
            let ages = self.ages_plus_one(bytes);
            for (word, ages) in ages.as_chunks::<WORD>().0.iter().enumerate() {
                let mut old_enough = ((u64::from_le_bytes(*ages) | HIGH_BITS) - least) & HIGH_BITS;
                while old_enough != 0 {
                    let byte = old_enough.trailing_zeros() as usize / 8;
                    old_enough &= old_enough - 1;
                    let slot = SlotId((block * BLOCK + word * WORD + byte) as u32);
                    if ages[byte] == threshold + 1 {
                        // Slots of the step's own age may be in use by the selection.
                        if of_threshold == 0 || threshold == 0 && !states.is_evictable(slot) {
                            continue;
                        }
                        of_threshold -= 1;
                    }
                    victims.push(slot);
                }
            }
        }
    }
}

impl<const STATES: usize> EvictionPolicy for BucketedLru<STATES> {
    fn resize(&mut self, _: usize) {}

    fn begin_step(&mut self, states: &mut SlotStates, now: StepClock) {
        let before = self.stamp();
        let steps = now.since(self.now).min(u32::from(Self::MASK)) as u8;
        self.now = now;
        // One more than now is the timestamp of the largest age.
        let oldest = self.stamp().wrapping_add(1) & Self::MASK;
        for byte in states.bytes_mut() {
            let lapped = Self::age_of(before, *byte) + steps >= Self::MASK;
            let clamped = (*byte & !SlotStates::POLICY) | oldest;
            *byte = if lapped { clamped } else { *byte };
        }
    }

    fn admit(&mut self, states: &mut SlotStates, slot: SlotId, _: u32) {
        self.set(states, slot);
    }

    fn touch(&mut self, states: &mut SlotStates, slot: SlotId) {
        self.set(states, slot);
    }

    fn victims(&mut self, states: &SlotStates, need: usize, victims: &mut Vec<SlotId>) {
        if need == 0 {
            return;
        }
        let (threshold, of_threshold) = self.threshold(states.bytes(), need);
        self.compact(states, threshold, of_threshold, victims);
    }

    fn bytes(&self) -> usize {
        size_of_val(&self.now)
    }
}
