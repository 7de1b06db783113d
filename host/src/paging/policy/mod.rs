//! Who leaves when a row's slots are full.

mod belady;
mod bucketed;
mod random;
mod saturating;
mod stamped;
mod states;

pub use belady::{Belady, Future};
pub use bucketed::BucketedLru;
pub use random::Random;
pub use saturating::SaturatingLru;
pub use stamped::{Fifo, Lru, PreviousStep};
pub use states::SlotStates;

use super::SlotId;

/// The clock of a request: how many steps it has taken, modulo 2^32. All its rows read the same clock, and a
/// paused request's clock stands still, so its pages do not age.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct StepClock(pub u32);

impl StepClock {
    /// A new step begins.
    pub fn tick(&mut self) {
        self.0 = self.0.wrapping_add(1);
    }

    /// Steps since `earlier`.
    pub fn since(self, earlier: Self) -> u32 {
        self.0.wrapping_sub(earlier.0)
    }
}

/// Who leaves when a row's slots are full.
///
/// A policy sees the slots of one row. Its unit of time is the step of the request, so what is used in one step
/// is of one age, and where a policy knows no difference the lowest slot leaves: two runs give the same victims.
pub trait EvictionPolicy: std::fmt::Debug + Send {
    /// The row has `slots` slots from now on. New ones are empty; slots at the end may have gone.
    fn resize(&mut self, slots: usize);

    /// A step begins. Rows that sat out steps of their request see the clock move by more than one.
    fn begin_step(&mut self, states: &mut SlotStates, now: StepClock);

    /// The page `key` came into `slot`.
    fn admit(&mut self, states: &mut SlotStates, slot: SlotId, key: u32);

    /// The page in `slot` was selected again.
    fn touch(&mut self, states: &mut SlotStates, slot: SlotId);

    /// Appends `need` of the [evictable](SlotStates::evictable) slots to `victims`, ascending. The caller
    /// guarantees that there are as many.
    fn victims(&mut self, states: &SlotStates, need: usize, victims: &mut Vec<SlotId>);

    /// Whether the page in `slot` counts as gone although nobody has taken its slot: selecting it is a miss, and
    /// it is fetched into the same slot again. Only policies that model smaller caches than their slots say so.
    fn forgets(&self, slot: SlotId) -> bool {
        let _ = slot;
        false
    }

    /// Bytes of the policy's state beyond the [`SlotStates`].
    fn bytes(&self) -> usize;
}
