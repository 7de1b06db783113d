//! Barriers in shared memory (`mbarrier`): arrivals and bytes, phase by phase.

use super::bulk::CopyIn;
use super::fault::FaultKind;
use super::machine::{Machine, SharedView, Site, checked, yield_turn};
use super::order::{Phase, Released, Stamp, Tag};

/// Arrivals of a phase and bytes under way are below 2^20.
const LIMIT: i64 = (1 << 20) - 1;

/// A barrier in shared memory.
pub(crate) struct Barrier {
    /// Arrivals of each phase.
    arrivals: u32,
    /// Arrivals that the phase still waits for.
    missing: u32,
    /// Bytes that it expects, less those that came.
    bytes: i64,
    /// Phases that have ended: the number of the one under way.
    pub ended: u32,
    initialised: Stamp,
    /// What the arrivals of this phase have left, and those of the phases before.
    arriving: Released,
    left: Released,
    /// Copies under way.
    pub flying: Vec<CopyIn>,
    /// Copies that have arrived and that nobody has waited for, with their phases.
    landed: Vec<(u32, CopyIn)>,
}

impl Barrier {
    /// Its copies that nobody has waited for.
    pub fn not_awaited(&self) -> impl Iterator<Item = &CopyIn> {
        self.flying.iter().chain(self.landed.iter().map(|(_, copy)| copy))
    }
}

/// Whether a phase has ended. Others get a chance first, and bytes to arrive.
pub(crate) fn try_wait(barriers: SharedView, index: usize, phase: u32, site: Site) -> bool {
    yield_turn();
    checked(|machine| machine.try_wait(barriers, index, phase, site)).unwrap_or(true)
}

impl Machine {
    pub fn init_barrier(
        &mut self,
        barriers: SharedView,
        index: usize,
        arrivals: u32,
        site: Site,
    ) -> Option<()> {
        self.shared(barriers, index, 8, Tag::STORE, site)?;
        let byte = barriers.base + (barriers.start + index) * 8;
        if arrivals == 0 || i64::from(arrivals) > LIMIT {
            self.raise(
                site,
                FaultKind::BarrierLimit { what: "arrivals", value: arrivals.into(), limit: LIMIT },
            );
            return None;
        }
        if self.block().bulk.barriers.contains_key(&byte) {
            self.raise(site, FaultKind::BarrierInitialised { byte });
            return None;
        }
        let barrier = Barrier {
            arrivals,
            missing: arrivals,
            bytes: 0,
            ended: 0,
            initialised: self.me.stamp(Tag::STORE),
            arriving: None,
            left: None,
            flying: Vec::new(),
            landed: Vec::new(),
        };
        self.block().bulk.barriers.insert(byte, barrier);
        Some(())
    }

    pub fn arrive_expect(
        &mut self,
        barriers: SharedView,
        index: usize,
        bytes: u32,
        site: Site,
    ) -> Option<()> {
        let byte = self.use_barrier(barriers, index, Tag::RMW, site)?;
        let (me, block) = (self.me, &mut self.blocks[self.me.slot]);
        let barrier = block.bulk.barriers.get_mut(&byte).expect("found above");
        if barrier.missing == 0 {
            let arrivals = barrier.arrivals;
            self.raise(site, FaultKind::BarrierOverrun { arrivals });
            return None;
        }
        barrier.missing -= 1;
        barrier.bytes += i64::from(bytes);
        block.order.arrive(me, &mut barrier.arriving);
        let value = barrier.bytes;
        if value > LIMIT {
            self.raise(site, FaultKind::BarrierLimit { what: "bytes", value, limit: LIMIT });
            return None;
        }
        self.refresh();
        self.poll(true);
        self.end_phase(byte, site)
    }

    /// The bytes of a copy have come.
    pub fn arrived(&mut self, byte: usize, copy: CopyIn) -> Option<()> {
        let barrier = self.block().bulk.barriers.get_mut(&byte).expect("the copy's barrier");
        barrier.bytes -= copy.bytes() as i64;
        let site = copy.site;
        barrier.landed.push((barrier.ended, copy));
        self.end_phase(byte, site)
    }

    /// Ends the phase under way if nothing is missing.
    fn end_phase(&mut self, byte: usize, site: Site) -> Option<()> {
        let block = &mut self.blocks[self.me.slot];
        let barrier = block.bulk.barriers.get_mut(&byte).expect("the caller found it");
        if barrier.missing > 0 || barrier.bytes > 0 {
            return Some(());
        }
        if barrier.bytes < 0 || !barrier.flying.is_empty() {
            let of_phase = barrier.landed.iter().filter(|(phase, _)| *phase == barrier.ended);
            let copies = of_phase.map(|(_, copy)| copy).chain(&barrier.flying);
            let copied: usize = copies.map(CopyIn::bytes).sum();
            let under_way: usize = barrier.flying.iter().map(CopyIn::bytes).sum();
            let expected = barrier.bytes + (copied - under_way) as i64;
            self.raise(site, FaultKind::BulkBytes { expected, copied: copied as i64 });
            return None;
        }
        let phase = Phase::new(byte, barrier.ended);
        block.order.end_phase(phase, barrier.arriving.take(), &mut barrier.left);
        barrier.missing = barrier.arrivals;
        barrier.ended += 1;
        Some(())
    }

    fn try_wait(&mut self, barriers: SharedView, index: usize, phase: u32, site: Site) -> Option<bool> {
        let byte = self.use_barrier(barriers, index, Tag::ATOMIC_LOAD, site)?;
        let ended = self.block().bulk.barriers[&byte].ended;
        // Only of these two does the parity say which is meant.
        if phase != ended && phase.wrapping_add(1) != ended {
            self.raise(site, FaultKind::BarrierPhase { phase, ended });
            return None;
        }
        let landed = self.land_some(byte)?;
        let (me, block) = (self.me, &mut self.blocks[self.me.slot]);
        let barrier = block.bulk.barriers.get_mut(&byte).expect("found above");
        let ended = barrier.ended;
        let over = phase.wrapping_add(1) == ended;
        if over {
            block.order.wait(me, &barrier.left);
            let (now, later) =
                std::mem::take(&mut barrier.landed).into_iter().partition(|(phase, _)| *phase < ended);
            barrier.landed = later;
            let now: Vec<(u32, CopyIn)> = now;
            now.iter().for_each(|(_, copy)| self.settle_copy_in(copy));
        }
        self.poll(landed || over);
        Some(over)
    }

    /// Checks and marks the use of a barrier, and says where it is.
    pub fn use_barrier(&mut self, barriers: SharedView, index: usize, tag: Tag, site: Site) -> Option<usize> {
        let byte = barriers.base + (barriers.start + index) * 8;
        let known = index >= barriers.len || self.block().bulk.barriers.contains_key(&byte);
        if !known && !self.inert {
            self.raise(site, FaultKind::BarrierUninitialised { byte });
        }
        self.shared(barriers, index, 8, tag.block_scope(true), site)?;
        Some(byte)
    }

    /// Whether bulk copies of the running thread see that the barrier is one.
    pub fn is_barrier_fenced(&self, byte: usize) -> bool {
        let block = &self.blocks[self.me.slot];
        block.order.is_fenced(block.bulk.barriers[&byte].initialised, self.me)
    }
}
