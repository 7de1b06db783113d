use std::sync::Arc;

use super::{EvictionPolicy, SlotStates, StepClock};
use crate::paging::SlotId;

/// When each page of a row is selected, known in advance.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Future {
    /// The steps that select each key, ascending, in CSR form: key `k` has `steps[first[k]..first[k + 1]]`.
    first: Vec<u32>,
    steps: Vec<u32>,
}

impl Future {
    /// The future of a row whose step `i` selects the keys `selections[i]`, all below `keys`.
    ///
    /// # Panics
    /// If a key is out of range.
    pub fn new<'a>(keys: u32, selections: impl Iterator<Item = &'a [u32]> + Clone) -> Self {
        let mut first = vec![0; keys as usize + 1];
        for key in selections.clone().flatten() {
            first[*key as usize + 1] += 1;
        }
        for key in 0..keys as usize {
            first[key + 1] += first[key];
        }
        let (mut next, mut steps) = (first.clone(), vec![0; first[keys as usize] as usize]);
        for (step, selection) in (0..).zip(selections) {
            for key in selection {
                steps[next[*key as usize] as usize] = step;
                next[*key as usize] += 1;
            }
        }
        Self { first, steps }
    }
}

/// Bélády's choice: the page that is not needed for the longest time leaves, of equals the lowest slot. No policy
/// without knowledge of the future has fewer misses (IBM Systems Journal 5(2), 1966).
///
/// Knows resolved selections alone: in a trace nothing is adopted.
#[derive(Clone, Debug)]
pub struct Belady {
    future: Arc<Future>,
    /// For each key, the first of its steps that may still come, as an index into the future's.
    next: Vec<u32>,
    start: Option<StepClock>,
    now: u32,
    key: Vec<u32>,
    next_use: Vec<u32>,
    candidates: Vec<(u32, SlotId)>,
}

impl Belady {
    /// The policy of a row to which `future` will happen: the first step that begins is its step 0.
    pub fn new(future: Arc<Future>) -> Self {
        let next = future.first.clone();
        Self {
            future,
            next,
            start: None,
            now: 0,
            key: Vec::new(),
            next_use: Vec::new(),
            candidates: Vec::new(),
        }
    }
}

impl EvictionPolicy for Belady {
    fn resize(&mut self, slots: usize) {
        self.key.resize(slots, 0);
        self.next_use.resize(slots, u32::MAX);
    }

    fn begin_step(&mut self, _: &mut SlotStates, now: StepClock) {
        self.now = now.since(*self.start.get_or_insert(now));
    }

    fn admit(&mut self, states: &mut SlotStates, slot: SlotId, key: u32) {
        self.key[slot.index()] = key;
        self.touch(states, slot);
    }

    fn touch(&mut self, _: &mut SlotStates, slot: SlotId) {
        let key = self.key[slot.index()] as usize;
        let end = self.future.first[key + 1];
        let next = &mut self.next[key];
        while *next < end && self.future.steps[*next as usize] <= self.now {
            *next += 1;
        }
        let at_end = *next == end;
        self.next_use[slot.index()] = if at_end { u32::MAX } else { self.future.steps[*next as usize] };
    }

    fn victims(&mut self, states: &SlotStates, need: usize, victims: &mut Vec<SlotId>) {
        if need == 0 {
            return;
        }
        self.candidates.clear();
        let last_first = |slot: SlotId| (u32::MAX - self.next_use[slot.index()], slot);
        self.candidates.extend(states.evictable().map(last_first));
        if need < self.candidates.len() {
            self.candidates.select_nth_unstable(need - 1);
        }
        let first = victims.len();
        victims.extend(self.candidates[..need].iter().map(|(_, slot)| *slot));
        victims[first..].sort_unstable();
    }

    fn bytes(&self) -> usize {
        size_of_val(self.next.as_slice())
            + size_of_val(self.key.as_slice())
            + size_of_val(self.next_use.as_slice())
    }
}
