use super::{EvictionPolicy, SlotStates, StepClock};
use crate::paging::SlotId;

/// Any page may leave, each as likely as the others. A seed gives the same victims every time.
#[derive(Clone, Debug)]
pub struct Random {
    state: u64,
    candidates: Vec<SlotId>,
}

impl Random {
    /// The policy whose choices follow from `seed`.
    pub fn new(seed: u64) -> Self {
        Self { state: seed, candidates: Vec::new() }
    }

    /// A number below `limit`: splitmix64 (Steele et al., OOPSLA 2014), scaled.
    fn below(&mut self, limit: usize) -> usize {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        ((u128::from(mixed) * limit as u128) >> 64) as usize
    }
}

impl EvictionPolicy for Random {
    fn resize(&mut self, _: usize) {}

    fn begin_step(&mut self, _: &mut SlotStates, _: StepClock) {}

    fn admit(&mut self, _: &mut SlotStates, _: SlotId, _: u32) {}

    fn touch(&mut self, _: &mut SlotStates, _: SlotId) {}

    fn victims(&mut self, states: &SlotStates, need: usize, victims: &mut Vec<SlotId>) {
        if need == 0 {
            return;
        }
        let mut candidates = std::mem::take(&mut self.candidates);
        candidates.clear();
        candidates.extend(states.evictable());
        for drawn in 0..need {
            let other = drawn + self.below(candidates.len() - drawn);
            candidates.swap(drawn, other);
        }
        let first = victims.len();
        victims.extend(&candidates[..need]);
        victims[first..].sort_unstable();
        self.candidates = candidates;
    }

    fn bytes(&self) -> usize {
        size_of_val(&self.state)
    }
}
