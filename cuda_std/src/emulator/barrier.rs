//! Barriers of a block.

use super::fault::FaultKind;
use super::machine::{Machine, Site, suspend, with};
use super::order::LANES;
use super::warp::same_place;

/// What a barrier counts on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Plain,
    Count,
    And,
    Or,
}

/// A block's barrier: who waits at it, and what the last one gave.
#[derive(Default)]
pub(crate) struct Barrier {
    pub arrived: u32,
    /// The first thread that waits, and where.
    pub first: Option<(usize, Kind, Site)>,
    count: u32,
    /// Threads of the barrier that was passed last, and how many of them came with their predicate set.
    passed: (u32, u32),
}

/// Waits until all threads of the block are here; gives how many they are and how many came with `predicate`.
pub(crate) fn barrier(kind: Kind, predicate: bool, site: Site) -> (u32, u32) {
    if with(|machine| machine.arrive_at_barrier(kind, predicate, site)) {
        suspend();
    }
    with(|machine| machine.block().barrier.passed)
}

impl Machine {
    /// Whether the running thread must wait for others.
    fn arrive_at_barrier(&mut self, kind: Kind, predicate: bool, site: Site) -> bool {
        self.step();
        if self.inert {
            return true;
        }
        let (slot, thread) = (self.me.slot, self.me.thread);
        let barrier = &mut self.block().barrier;
        match barrier.first {
            Some((first, other, there)) if other != kind || !same_place(there, site) => {
                let other = self.other(slot, first, there);
                self.raise(site, FaultKind::BarrierMismatch { other });
                return true;
            }
            Some(_) => {}
            None => barrier.first = Some((thread, kind, site)),
        }
        barrier.arrived += 1;
        barrier.count += u32::from(predicate);
        if self.block().barrier.arrived < self.block().live {
            return true;
        }
        self.pass_barrier(slot, Some(thread));
        self.refresh();
        false
    }

    /// All threads of the block that have not returned are here; `running` goes on by itself.
    fn pass_barrier(&mut self, slot: usize, running: Option<usize>) {
        let block = &mut self.blocks[slot];
        let barrier = &mut block.barrier;
        *barrier = Barrier { passed: (barrier.arrived, barrier.count), ..Default::default() };
        block.order.barrier();
        self.report.barriers += 1;
        self.poll(true);
        for warp in 0..self.warps() {
            let state = &mut self.blocks[slot].warps[warp];
            let mut lanes = state.exists & !state.returned;
            if let Some(thread) = running
                && thread / LANES == warp
            {
                lanes &= !(1 << (thread % LANES));
            }
            if lanes != 0 {
                state.runnable |= lanes;
                self.list(slot, warp);
            }
        }
    }

    /// A thread has returned; the others may have been waiting for it alone.
    pub fn pass_barrier_without_returned(&mut self, slot: usize) {
        let block = &self.blocks[slot];
        if block.live > 0 && block.barrier.arrived == block.live {
            self.pass_barrier(slot, None);
        }
    }
}
