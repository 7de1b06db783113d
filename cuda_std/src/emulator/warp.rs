//! Collectives of a warp.
//!
//! Lanes gather by mask: several masks may be under way in one warp at a time. The last lane that a mask waits for works out all
//! results and runs on.

use super::fault::{FaultKind, Operation};
use super::machine::{Machine, Site, suspend, with};
use super::mma;
use super::order::LANES;
use crate::warp::ShuffleMode;

/// What a lane brings.
#[derive(Clone, Copy)]
pub(crate) struct Call {
    pub operation: Operation,
    pub mask: u32,
    pub value: u64,
    /// Of a shuffle: how, whence, and the clamp and segment operand of the instruction.
    pub shuffle: (ShuffleMode, u32, u32),
}

/// Lanes that have come to one collective.
struct Gathering {
    operation: Operation,
    mask: u32,
    site: Site,
    arrived: u32,
}

pub(crate) struct Warp {
    /// Lanes that the block has threads for.
    pub exists: u32,
    pub returned: u32,
    pub runnable: u32,
    gatherings: Vec<Gathering>,
    /// Calls of the lanes that wait, then their results.
    calls: [Call; LANES],
    results: [u64; LANES],
}

const NO_CALL: Call =
    Call { operation: Operation::SyncWarp, mask: 0, value: 0, shuffle: (ShuffleMode::Idx, 0, 0) };

impl Warp {
    pub fn new() -> Self {
        Self {
            exists: 0,
            returned: 0,
            runnable: 0,
            gatherings: Vec::new(),
            calls: [NO_CALL; LANES],
            results: [0; LANES],
        }
    }

    pub fn start(&mut self, lanes: usize) {
        self.exists = u32::MAX >> (LANES - lanes);
        self.returned = 0;
        self.runnable = self.exists;
        self.gatherings.clear();
    }
}

/// Whether two calls stand in the same place; the compiler may have copied a location.
pub(crate) fn same_place(a: Site, b: Site) -> bool {
    std::ptr::eq(a, b) || (a.line(), a.column(), a.file()) == (b.line(), b.column(), b.file())
}

/// Waits for the lanes of the call's mask and gives this lane's result; 0 after a fault.
pub(crate) fn collective(call: Call, site: Site) -> u64 {
    match with(|machine| machine.arrive_at_collective(call, site)) {
        Some(result) => result,
        None => {
            suspend();
            with(|machine| {
                let (warp, lane) = (machine.me.warp(), machine.me.lane());
                machine.block().warps[warp].results[lane]
            })
        }
    }
}

impl Machine {
    /// The running lane's result, or `None` if it must wait (or the launch is over).
    fn arrive_at_collective(&mut self, call: Call, site: Site) -> Option<u64> {
        self.step();
        if self.inert {
            return None;
        }
        let (slot, number, lane) = (self.me.slot, self.me.warp(), self.me.lane());
        let (bit, Call { operation, mask, .. }) = (1 << lane, call);
        if mask & bit == 0 {
            self.raise(site, FaultKind::LaneNotInMask { mask, lane: lane as u32 });
            return None;
        }
        let warp = &mut self.block().warps[number];
        if mask & (warp.returned | !warp.exists) != 0 {
            let others = warp.gatherings.iter().find(|others| others.mask == mask);
            let arrived = bit | others.map_or(0, |others| others.arrived);
            self.raise(site, FaultKind::MissingLanes { mask, arrived });
            return None;
        }
        let mut here = None;
        let mut conflict = None;
        for (at, others) in warp.gatherings.iter().enumerate() {
            let same = others.mask == mask && others.operation == operation && same_place(others.site, site);
            if same {
                here = Some(at);
            } else if others.mask & bit != 0 && others.arrived & mask != 0 {
                conflict = Some((others.operation, others.mask, others.site, others.arrived & mask));
            }
        }
        if let Some((other_operation, other_mask, there, lanes)) = conflict {
            let other = self.other(slot, number * LANES + lanes.trailing_zeros() as usize, there);
            self.raise(
                site,
                FaultKind::CollectiveMismatch { operation, mask, other_operation, other_mask, other },
            );
            return None;
        }
        let at = here.unwrap_or_else(|| {
            warp.gatherings.push(Gathering { operation, mask, site, arrived: 0 });
            warp.gatherings.len() - 1
        });
        warp.calls[lane] = call;
        warp.gatherings[at].arrived |= bit;
        if warp.gatherings[at].arrived != mask {
            return None;
        }

        warp.gatherings.swap_remove(at);
        results(operation, mask, &warp.calls, &mut warp.results);
        let result = warp.results[lane];
        let idle = warp.runnable == 0;
        warp.runnable |= mask & !bit;
        if idle && warp.runnable != 0 {
            self.list(slot, number);
        }
        if operation == Operation::SyncWarp {
            self.block().order.sync_warp(number, mask);
            self.refresh();
        }
        *self.counter(operation) += 1;
        Some(result)
    }

    fn counter(&mut self, operation: Operation) -> &mut u64 {
        let report = &mut self.report;
        match operation {
            Operation::SyncWarp => &mut report.warp_syncs,
            Operation::Shuffle => &mut report.shuffles,
            Operation::VoteAll | Operation::VoteAny | Operation::VoteBallot => &mut report.votes,
            Operation::MatchAny | Operation::MatchAll => &mut report.matches,
            Operation::Mma | Operation::Transpose | Operation::LoadMatrices | Operation::LoadTransposed => {
                &mut report.matrix_products
            }
            Operation::ProductFence | Operation::ProductGroup | Operation::ProductWait => {
                &mut report.product_steps
            }
            _ => &mut report.reductions,
        }
    }

    /// A lane has returned: nobody may be waiting for it.
    pub fn check_gatherings_without_returned(&mut self, slot: usize, warp: usize) {
        let state = &self.blocks[slot].warps[warp];
        if let Some(waiting) = state.gatherings.iter().find(|waiting| waiting.mask & state.returned != 0) {
            let (mask, arrived, site) = (waiting.mask, waiting.arrived, waiting.site);
            self.raise_for(slot, warp, arrived, site, FaultKind::MissingLanes { mask, arrived });
        }
    }

    fn raise_for(&mut self, slot: usize, warp: usize, lanes: u32, site: Site, kind: FaultKind) {
        let waiting = self.other(slot, warp * LANES + lanes.trailing_zeros() as usize, site);
        self.raise_at(waiting.block, waiting.thread, site, kind);
    }

    /// No thread can run: says why.
    pub fn explain_deadlock(&mut self) {
        for slot in 0..self.blocks.len() {
            for number in 0..self.warps() {
                let warp = &self.blocks[slot].warps[number];
                let gathered = warp.gatherings.iter().fold(0, |lanes, waiting| lanes | waiting.arrived);
                let Some(waiting) = warp.gatherings.first() else { continue };
                let (mask, arrived, site) = (waiting.mask, waiting.arrived, waiting.site);
                let at_barrier = mask & !arrived & !gathered;
                if let Some((_, _, there)) = self.blocks[slot].barrier.first
                    && at_barrier != 0
                {
                    let lane = number * LANES + arrived.trailing_zeros() as usize;
                    let (waiting, other) = (self.blocks[slot].barrier.arrived, self.other(slot, lane, site));
                    let kind = FaultKind::BarrierDivergence { waiting, other };
                    self.raise_for(slot, number, at_barrier, there, kind);
                } else {
                    self.raise_for(slot, number, arrived, site, FaultKind::MissingLanes { mask, arrived });
                }
                return;
            }
        }
        self.explain_missing_products();
    }
}

/// Works out all lanes' results.
fn results(operation: Operation, mask: u32, calls: &[Call; LANES], results: &mut [u64; LANES]) {
    let lanes = || (0..LANES).filter(|lane| mask >> lane & 1 != 0);
    let values = || lanes().map(|lane| calls[lane].value);
    let words = || values().map(|value| value as u32);
    let ballot = || lanes().fold(0, |set, lane| set | (calls[lane].value as u32) << lane);
    let equal =
        |value: u64| lanes().fold(0_u32, |set, lane| set | u32::from(calls[lane].value == value) << lane);
    let common = match operation {
        Operation::Shuffle => {
            for lane in lanes() {
                let source = shuffle_source(lane as u32, calls[lane].shuffle);
                let source = if mask >> source & 1 != 0 { source as usize } else { lane };
                results[lane] = calls[source].value;
            }
            return;
        }
        Operation::MatchAny => {
            for lane in lanes() {
                results[lane] = equal(calls[lane].value).into();
            }
            return;
        }
        Operation::Mma => {
            let values = calls.map(|call| call.value);
            // SAFETY: all lanes are here, and each waits in `mma_m16n8k16_bf16` with the address of its own fragments.
            unsafe { mma::multiply(&values) };
            return;
        }
        Operation::Transpose => {
            *results = std::array::from_fn(|lane| mma::transposed(lane, |of| calls[of].value as u32).into());
            return;
        }
        Operation::LoadMatrices | Operation::LoadTransposed => {
            let values = calls.map(|call| call.value);
            // SAFETY: all lanes are here, and each waits in the load with the address of its own row.
            unsafe { mma::distribute(&values, operation == Operation::LoadTransposed) };
            return;
        }
        Operation::SyncWarp | Operation::ProductFence | Operation::ProductGroup | Operation::ProductWait => {
            return;
        }
        Operation::MatchAll => {
            let all = values().next().is_some_and(|first| equal(first) == mask);
            u64::from(if all { mask } else { 0 })
        }
        Operation::VoteAll => u64::from(ballot() == mask),
        Operation::VoteAny => u64::from(ballot() != 0),
        Operation::VoteBallot => ballot().into(),
        Operation::ReduceAdd => words().fold(0, u32::wrapping_add).into(),
        Operation::ReduceMin => words().fold(u32::MAX, u32::min).into(),
        Operation::ReduceMax => words().fold(0, u32::max).into(),
        Operation::ReduceAnd => words().fold(u32::MAX, |a, b| a & b).into(),
        Operation::ReduceOr => words().fold(0, |a, b| a | b).into(),
        Operation::ReduceXor => words().fold(0, |a, b| a ^ b).into(),
    };
    lanes().for_each(|lane| results[lane] = common);
}

/// The lane that a shuffle reads, by the pseudocode of `shfl.sync` in the PTX ISA: `b` is the lane, delta or lane mask and
/// `c` holds the clamp in bits 0..5 and the segment mask in bits 8..13.
fn shuffle_source(lane: u32, (mode, b, c): (ShuffleMode, u32, u32)) -> u32 {
    let (segment, clamp, b) = (c >> 8 & 31, c & 31, b & 31);
    let greatest = (lane & segment) | (clamp & !segment);
    let least = lane & segment;
    let (source, inside) = match mode {
        ShuffleMode::Up => (lane.wrapping_sub(b), lane as i32 - b as i32 >= greatest as i32),
        ShuffleMode::Down => (lane + b, lane + b <= greatest),
        ShuffleMode::Xor => (lane ^ b, lane ^ b <= greatest),
        ShuffleMode::Idx => {
            let source = least | (b & !segment);
            (source, source <= greatest)
        }
    };
    if inside { source } else { lane }
}
