//! Happens-before: which accesses are ordered, and by what.
//!
//! Every access leaves a [`Stamp`]: who, in which epoch of its block (barriers passed), at which of the thread's own
//! clock. A later access is ordered after it if it is the thread's own; if the block passed a barrier in between; if a chain of
//! `sync_warp`s leads from one lane to the other; or if a chain of releases and acquires does. Shuffles, votes and the like
//! order nothing.
//!
//! What a bulk copy does is nobody's own: it is ordered before those who waited for its barrier's phase, and those after them. Its
//! stamp's clock is the number of that phase, its epoch the one in which someone first waited.

use std::collections::BTreeMap;
use std::rc::Rc;

use super::fault::Access;

/// Threads of a warp.
pub(crate) const LANES: usize = 32;

/// Who accessed an element, when and from where. All zero: nobody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    /// The thread's number in the grid.
    pub thread: u32,
    pub epoch: u32,
    pub clock: u32,
    /// Interned location and flags.
    pub tag: Tag,
}

/// A location's number and what kind of access it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tag(pub u32);

impl Tag {
    pub const LOAD: Self = Self(1 << 16);
    pub const STORE: Self = Self(2 << 16);
    pub const ATOMIC_LOAD: Self = Self(3 << 16 | Self::ATOMIC);
    pub const ATOMIC_STORE: Self = Self(4 << 16 | Self::ATOMIC);
    pub const RMW: Self = Self(5 << 16 | Self::ATOMIC);
    pub const COPY_SOURCE: Self = Self(6 << 16);
    pub const COPY_DESTINATION: Self = Self(7 << 16);
    pub const OPERAND: Self = Self(8 << 16);

    const ATOMIC: u32 = 1 << 20;
    const BLOCK_SCOPE: u32 = 1 << 21;
    const PENDING: u32 = 1 << 22;
    const BULK: u32 = 1 << 23;

    #[inline]
    pub fn at(self, site: u16) -> Self {
        Self(self.0 | u32::from(site))
    }
    pub fn block_scope(self, narrow: bool) -> Self {
        Self(if narrow { self.0 | Self::BLOCK_SCOPE } else { self.0 })
    }
    pub fn pending(self) -> Self {
        Self(self.0 | Self::PENDING)
    }
    /// Of a bulk copy into shared memory, whose stamps have a phase for a clock.
    pub fn bulk(self) -> Self {
        Self(self.0 | Self::BULK)
    }
    /// No longer pending.
    pub fn settled(self) -> Self {
        Self(self.0 & !Self::PENDING)
    }
    pub fn site(self) -> u16 {
        self.0 as u16
    }
    /// The access, without site and flags.
    fn kind(self) -> u32 {
        self.0 >> 16 & 15
    }
    pub fn access(self) -> Access {
        match self.kind() {
            1 => Access::Load,
            2 => Access::Store,
            3 => Access::AtomicLoad,
            4 => Access::AtomicStore,
            5 => Access::Atomic,
            6 => Access::CopySource,
            7 => Access::CopyDestination,
            _ => Access::Operand,
        }
    }
    /// Whether the access needs the element to hold something.
    #[inline]
    pub fn reads(self) -> bool {
        matches!(self.kind(), 1 | 3 | 5 | 6 | 8)
    }
    #[inline]
    pub fn writes(self) -> bool {
        matches!(self.kind(), 2 | 4 | 5 | 7)
    }
    #[inline]
    pub fn is_atomic(self) -> bool {
        self.0 & Self::ATOMIC != 0
    }
    #[inline]
    pub fn is_pending(self) -> bool {
        self.0 & Self::PENDING != 0
    }
    #[inline]
    pub fn is_bulk(self) -> bool {
        self.0 & Self::BULK != 0
    }
    #[inline]
    pub fn is_copy(self) -> bool {
        self.kind() == Self::COPY_DESTINATION.kind()
    }
    /// Two atomics that see each other as such.
    #[inline]
    pub fn both_atomic(self, other: Self, same_block: bool) -> bool {
        self.0 & other.0 & Self::ATOMIC != 0 && (same_block || (self.0 | other.0) & Self::BLOCK_SCOPE == 0)
    }
}

impl Stamp {
    pub const NONE: [u32; 4] = [0; 4];

    /// The stamp of a shadow word, if there is one.
    #[inline]
    pub fn of(words: [u32; 4]) -> Option<Self> {
        let [thread, epoch, clock, tag] = words;
        (tag != 0).then_some(Self { thread, epoch, clock, tag: Tag(tag) })
    }

    #[inline]
    pub fn words(self) -> [u32; 4] {
        [self.thread, self.epoch, self.clock, self.tag.0]
    }
}

/// The thread that accesses something now.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Me {
    pub slot: usize,
    /// Within the block.
    pub thread: usize,
    /// Within the grid.
    pub number: u32,
    pub epoch: u32,
    pub clock: u32,
}

impl Me {
    #[inline]
    pub fn warp(self) -> usize {
        self.thread / LANES
    }
    #[inline]
    pub fn lane(self) -> usize {
        self.thread % LANES
    }
    #[inline]
    pub fn stamp(self, tag: Tag) -> Stamp {
        Stamp { thread: self.number, epoch: self.epoch, clock: self.clock, tag }
    }
}

/// What a thread has learnt of others: everything up to these points is ordered before it.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Knowledge {
    /// By the block's number.
    blocks: BTreeMap<u32, Known>,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Known {
    /// All of the block's epochs before this one.
    epoch: u32,
    /// Clocks of single threads of it, by warp.
    warps: BTreeMap<usize, Clocks>,
    /// The last phase of each of its barriers in shared memory that was waited for.
    phases: BTreeMap<u32, Phase>,
}

/// A phase of a barrier in shared memory, as the clock of a stamp.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Phase(pub u32);

impl Phase {
    /// Bits of a barrier's number: its byte in shared memory over 8.
    const BARRIER_BITS: u32 = 15;

    /// Later phases than the number has bits for count as the last of those.
    pub fn new(barrier_byte: usize, number: u32) -> Self {
        let number = number.min(u32::MAX >> Self::BARRIER_BITS);
        Self((number << Self::BARRIER_BITS) | (barrier_byte as u32 / 8))
    }

    fn barrier(self) -> u32 {
        self.0 & ((1 << Self::BARRIER_BITS) - 1)
    }
}

type Clocks = [u32; LANES];

fn join(into: &mut Clocks, from: &Clocks) {
    for (into, from) in into.iter_mut().zip(from) {
        *into = (*into).max(*from);
    }
}

/// Joins what two threads know.
fn merge(into: &mut Option<Rc<Knowledge>>, other: &Option<Rc<Knowledge>>) {
    let Some(other) = other else { return };
    let Some(into) = into else {
        *into = Some(other.clone());
        return;
    };
    if Rc::ptr_eq(into, other) {
        return;
    }
    let into = Rc::make_mut(into);
    for (&block, theirs) in &other.blocks {
        let ours = into.blocks.entry(block).or_default();
        ours.epoch = ours.epoch.max(theirs.epoch);
        for (&warp, clocks) in &theirs.warps {
            join(ours.warps.entry(warp).or_insert([0; LANES]), clocks);
        }
        for (&barrier, &phase) in &theirs.phases {
            let ours = ours.phases.entry(barrier).or_insert(phase);
            *ours = phase.max(*ours);
        }
    }
}

pub(crate) type Released = Option<Rc<Knowledge>>;

/// What releases have left at one element.
#[derive(Clone, Default)]
pub(crate) struct Left {
    wide: Released,
    /// Releases of block scope: for that block alone.
    narrow: Option<(u32, Released)>,
    /// Who wrote last.
    writer: u32,
}

/// A thread's part in chains of releases and acquires.
#[derive(Clone, Default)]
struct Chains {
    /// Ordered before everything from now on.
    known: Released,
    /// Published by relaxed writes: what a fence covered; one of block scope apart.
    fenced: Released,
    fenced_in_block: Released,
    /// Seen by relaxed reads: known after the next fence.
    seen: Released,
}

/// How an atomic takes part in chains.
#[derive(Clone, Copy)]
pub(crate) struct Chain {
    pub reads: bool,
    pub writes: bool,
    pub acquire: bool,
    pub release: bool,
    pub block_scope: bool,
}

/// What orders the threads of one resident block.
pub(crate) struct BlockOrder {
    /// The block's number.
    block: u32,
    /// The number of its first thread.
    first: u32,
    count: usize,
    /// Barriers passed.
    pub epoch: u32,
    clocks: Vec<u32>,
    /// The epoch in which a thread returned: no barrier has ordered what it did in it.
    returned: Vec<u32>,
    any_returned: bool,
    /// A row a lane: the clocks of its warp's lanes that it knows. Allocated by the first `sync_warp`.
    warps: Vec<Option<Box<[Clocks; LANES]>>>,
    chains: Vec<Chains>,
    any_chain: bool,
    /// Each thread's last proxy fence: the epoch, and the clock from which on nothing is fenced.
    fences: Vec<(u32, u32)>,
}

impl BlockOrder {
    pub fn new(count: usize) -> Self {
        Self {
            block: 0,
            first: 0,
            count,
            epoch: 0,
            clocks: vec![0; count],
            returned: vec![u32::MAX; count],
            any_returned: false,
            warps: vec![None; count.div_ceil(LANES)],
            chains: vec![Chains::default(); count],
            any_chain: false,
            fences: vec![(0, 0); count],
        }
    }

    /// Makes this the order of another block.
    pub fn start(&mut self, block: u32) {
        self.block = block;
        self.first = block * self.count as u32;
        self.epoch = 1;
        self.clocks.fill(1);
        self.returned.fill(u32::MAX);
        self.any_returned = false;
        self.warps.fill(None);
        self.fences.fill((0, 0));
        if self.any_chain {
            self.chains.fill(Chains::default());
            self.any_chain = false;
        }
    }

    pub fn me(&self, slot: usize, thread: usize) -> Me {
        Me { slot, thread, number: self.first + thread as u32, epoch: self.epoch, clock: self.clocks[thread] }
    }

    /// The place in this block of a thread of the grid, if it is one of this block's.
    #[inline]
    pub fn thread_of(&self, stamp: Stamp) -> Option<usize> {
        let thread = stamp.thread.wrapping_sub(self.first) as usize;
        (thread < self.count).then_some(thread)
    }

    /// Whether everything up to `stamp` happens before what `me` does now.
    #[inline]
    pub fn ordered(&self, stamp: Stamp, me: Me) -> bool {
        if stamp.tag.is_bulk() {
            return self.waited_for(stamp, me);
        }
        if stamp.thread == me.number {
            return true;
        }
        if let Some(thread) = self.thread_of(stamp) {
            if stamp.epoch < self.epoch && !(self.any_returned && self.returned[thread] == stamp.epoch) {
                return true;
            }
            if thread / LANES == me.warp()
                && let Some(clocks) = &self.warps[me.warp()]
                && clocks[me.lane()][thread % LANES] >= stamp.clock
            {
                return true;
            }
        }
        self.any_chain && self.learnt(stamp, me)
    }

    /// Whether `me`, or someone ordered before, has waited for a bulk copy.
    fn waited_for(&self, stamp: Stamp, me: Me) -> bool {
        if self.thread_of(stamp).is_some() && stamp.epoch < self.epoch {
            return true;
        }
        let phase = Phase(stamp.clock);
        let known = self.chains[me.thread].known.as_ref();
        known.and_then(|known| known.blocks.get(&(stamp.thread / self.count as u32))).is_some_and(|known| {
            stamp.epoch < known.epoch
                || known.phases.get(&phase.barrier()).is_some_and(|ended| *ended >= phase)
        })
    }

    #[cold]
    fn learnt(&self, stamp: Stamp, me: Me) -> bool {
        let Some(known) = &self.chains[me.thread].known else { return false };
        let (block, thread) = (stamp.thread / self.count as u32, stamp.thread as usize % self.count);
        known.blocks.get(&block).is_some_and(|known| {
            stamp.epoch < known.epoch
                || known
                    .warps
                    .get(&(thread / LANES))
                    .is_some_and(|clocks| clocks[thread % LANES] >= stamp.clock)
        })
    }

    /// All threads that have not returned pass a barrier.
    pub fn barrier(&mut self) {
        self.epoch += 1;
        if self.any_chain {
            let mut all = None;
            for (chains, returned) in self.chains.iter().zip(&self.returned) {
                if *returned == u32::MAX {
                    merge(&mut all, &chains.known);
                }
            }
            self.chains.iter_mut().for_each(|chains| chains.known = all.clone());
        }
    }

    /// The lanes of `mask` of a warp synchronise.
    pub fn sync_warp(&mut self, warp: usize, mask: u32) {
        let lanes = || (0..LANES).filter(|lane| mask >> lane & 1 != 0);
        let clocks = self.warps[warp].get_or_insert_with(|| Box::new([[0; LANES]; LANES]));
        let mut all = [0; LANES];
        for lane in lanes() {
            join(&mut all, &clocks[lane]);
            all[lane] = self.clocks[warp * LANES + lane];
            self.clocks[warp * LANES + lane] += 1;
        }
        for lane in lanes() {
            clocks[lane] = all;
        }
        if self.any_chain {
            let mut all = None;
            for lane in lanes() {
                merge(&mut all, &self.chains[warp * LANES + lane].known);
            }
            for lane in lanes() {
                self.chains[warp * LANES + lane].known = all.clone();
            }
        }
    }

    /// A thread arrives at a barrier in shared memory, where `arriving` is what those before it have left.
    pub fn arrive(&mut self, me: Me, arriving: &mut Released) {
        let snapshot = self.snapshot(me);
        merge(arriving, &snapshot);
    }

    /// A phase ends: what its arrivals have left joins what those of earlier phases had.
    pub fn end_phase(&self, phase: Phase, arriving: Released, ended: &mut Released) {
        merge(ended, &arriving);
        let ended = Rc::make_mut(ended.get_or_insert_default());
        ended.blocks.entry(self.block).or_default().phases.insert(phase.barrier(), phase);
    }

    /// A thread has waited at a barrier in shared memory.
    pub fn wait(&mut self, me: Me, ended: &Released) {
        merge(&mut self.chains[me.thread].known, ended);
        self.any_chain |= ended.is_some();
    }

    /// A proxy fence.
    pub fn fence_proxy(&mut self, me: Me) {
        self.clocks[me.thread] += 1;
        self.fences[me.thread] = (self.epoch, self.clocks[me.thread]);
    }

    /// Whether bulk copies of `me` see what `stamp` wrote to shared memory: its thread had a fence since, or `me` one in a later epoch.
    pub fn is_fenced(&self, stamp: Stamp, me: Me) -> bool {
        let by_writer = self.thread_of(stamp).is_some_and(|writer| stamp.clock < self.fences[writer].1);
        stamp.tag.is_bulk() || by_writer || stamp.epoch < self.fences[me.thread].0
    }

    pub fn returned(&mut self, thread: usize) {
        self.returned[thread] = self.epoch;
        self.any_returned = true;
    }

    /// All that happens before this point of the thread, itself included.
    fn snapshot(&mut self, me: Me) -> Released {
        self.any_chain = true;
        let mut snapshot = self.chains[me.thread].known.as_deref().cloned().unwrap_or_default();
        let own = snapshot.blocks.entry(self.block).or_default();
        own.epoch = own.epoch.max(self.epoch);
        let clocks = own.warps.entry(me.warp()).or_insert([0; LANES]);
        if let Some(known) = &self.warps[me.warp()] {
            join(clocks, &known[me.lane()]);
        }
        clocks[me.lane()] = self.clocks[me.thread];
        self.clocks[me.thread] += 1;
        Some(Rc::new(snapshot))
    }

    /// A fence: what precedes is published by later relaxed writes, and what earlier relaxed reads saw is known.
    pub fn fence(&mut self, me: Me, block_scope: bool) {
        let seen = self.chains[me.thread].seen.take();
        merge(&mut self.chains[me.thread].known, &seen);
        let snapshot = self.snapshot(me);
        let chains = &mut self.chains[me.thread];
        if block_scope {
            chains.fenced_in_block = snapshot;
        } else {
            chains.fenced = snapshot;
        }
    }

    /// Whether an atomic would neither publish nor learn anything where nothing was left.
    pub fn is_idle(&self, me: Me, chain: Chain) -> bool {
        let chains = &self.chains[me.thread];
        !chain.release && chains.fenced.is_none() && chains.fenced_in_block.is_none()
    }

    /// An atomic at an element where `left` was left; changes it to what it leaves.
    pub fn atomic(&mut self, me: Me, chain: Chain, left: &mut Left) {
        if chain.reads {
            let chains = &mut self.chains[me.thread];
            let into = if chain.acquire { &mut chains.known } else { &mut chains.seen };
            merge(into, &left.wide);
            if let Some((block, narrow)) = &left.narrow
                && *block == self.block
            {
                merge(into, narrow);
            }
            self.any_chain |= into.is_some();
        }
        if !chain.writes {
            return;
        }
        // A plain atomic store ends what others have begun; a thread's own releases hold on for its later writes.
        if !chain.reads && left.writer != me.number {
            *left = Left::default();
        }
        left.writer = me.number;
        let (mut wide, mut narrow) =
            (self.chains[me.thread].fenced.clone(), self.chains[me.thread].fenced_in_block.clone());
        if chain.release {
            *if chain.block_scope { &mut narrow } else { &mut wide } = self.snapshot(me);
        }
        merge(&mut left.wide, &wide);
        if narrow.is_some() {
            if left.narrow.as_ref().is_none_or(|(block, _)| *block != self.block) {
                left.narrow = Some((self.block, None));
            }
            if let Some((_, into)) = &mut left.narrow {
                merge(into, &narrow);
            }
        }
    }
}
