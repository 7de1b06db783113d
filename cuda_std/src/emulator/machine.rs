//! The state of a launch, and how the functions of the face reach it.

use std::cell::Cell;
use std::collections::HashMap;
use std::ops::Range;
use std::panic::Location;
use std::ptr;

use corosensei::Yielder;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::barrier::Barrier;
use super::buffer::Header;
use super::bulk::Bulk;
use super::copies::Copies;
use super::fault::{Access, Fault, FaultKind, Index, Other, Space};
use super::launch::{Launch, Report, Traffic};
use super::order::{BlockOrder, Chain, LANES, Left, Me, Stamp, Tag};
use super::shadow::{Conflict, SharedMemory};
use super::warp::Warp;
use super::wgmma;
use super::wgmma::{Products, Warpgroup};

pub(crate) type Site = &'static Location<'static>;

/// Warps of the largest block.
pub(crate) const WARPS: usize = 32;

/// One launch.
pub(crate) struct Machine {
    pub launch: Launch,
    /// Distinguishes launches in what buffers remember.
    id: u64,
    pub kernel: &'static str,
    pub rng: ChaCha8Rng,
    /// Accesses until the next preemption.
    preempt_in: u64,
    steps: u64,
    polls: u64,
    pub fault: Option<Box<Fault>>,
    /// After a fault nothing has an effect any more, so that threads can be unwound.
    pub inert: bool,
    /// A thread has the turn, so a panic is the kernel's.
    pub in_kernel: bool,
    pub report: Report,
    /// The running thread.
    pub me: Me,
    /// Resident blocks, by slot.
    pub blocks: Vec<Block>,
    /// Of the threads of a block.
    coordinates: Vec<Index>,
    /// Warps with threads that can run, by slot and warp; and where each stands in the list.
    pub ready: Vec<u32>,
    places: Vec<u32>,
    sites: Sites,
    /// What releases left, by buffer and element.
    left: HashMap<(*const Header, usize), Left>,
}

/// A resident block.
pub(crate) struct Block {
    pub index: Index,
    /// Threads that have not returned; none in an empty slot.
    pub live: u32,
    pub order: BlockOrder,
    pub warps: Vec<Warp>,
    pub barrier: Barrier,
    pub shared: SharedMemory,
    /// What releases left, by byte of shared memory.
    left: HashMap<usize, Left>,
    pub copies: Vec<Copies>,
    pub bulk: Bulk,
    /// By warpgroup.
    pub warpgroups: Vec<Warpgroup>,
    /// By thread.
    pub products: Vec<Products>,
    pub yielders: Vec<*const Yielder<(), ()>>,
}

thread_local! {
    static CURRENT: Cell<*mut Machine> = const { Cell::new(ptr::null_mut()) };
}

/// Makes a machine the one that the face's functions find, or none.
pub(crate) fn set_current(machine: *mut Machine) {
    CURRENT.set(machine);
}

pub(crate) fn is_running() -> bool {
    !CURRENT.get().is_null()
}

pub(crate) fn is_in_kernel() -> bool {
    is_running() && with(|machine| machine.in_kernel)
}

/// The machine of the running kernel.
#[inline]
#[track_caller]
pub(crate) fn with<R>(act: impl FnOnce(&mut Machine) -> R) -> R {
    let machine = CURRENT.get();
    assert!(!machine.is_null(), "called outside of a launch of the emulator");
    // SAFETY: `schedule::run` keeps the machine alive while it is current. `act` runs no kernel code and does not suspend, so
    // no other reference exists meanwhile.
    act(unsafe { &mut *machine })
}

/// Gives the turn to other threads; the scheduler knows from the machine when this one goes on.
pub(crate) fn suspend() {
    // A thread that unwinds keeps its turn: the count of panics belongs to the OS thread, not to the coroutine.
    if std::thread::panicking() {
        return;
    }
    let yielder = with(|machine| machine.blocks[machine.me.slot].yielders[machine.me.thread]);
    // SAFETY: set by this coroutine's body, on whose stack it lies and which is running.
    unsafe { (*yielder).suspend(()) };
}

/// Where an access may be interrupted.
#[inline]
pub(crate) fn interrupt() {
    if with(Machine::is_interrupted) {
        suspend();
    }
}

/// Where other threads always get a chance: polls would see nothing new otherwise.
pub(crate) fn yield_turn() {
    with(|machine| {
        machine.step();
        machine.wake(machine.me.slot, machine.me.thread);
    });
    suspend();
}

/// What `act` gives; if there has been a fault, the thread goes no further.
#[inline]
#[track_caller]
pub(crate) fn checked<R>(act: impl FnOnce(&mut Machine) -> Option<R>) -> Option<R> {
    let result = with(act);
    if result.is_none() {
        suspend();
    }
    result
}

/// A view of a buffer, without its type.
#[derive(Clone, Copy)]
pub(crate) struct GlobalView {
    pub header: &'static Header,
    pub generation: u32,
    pub start: usize,
    pub len: usize,
}

/// A view of a shared array, without its type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SharedView {
    /// The array's first byte in shared memory.
    pub base: usize,
    /// The array's length.
    pub array_len: usize,
    pub start: usize,
    pub len: usize,
}

impl GlobalView {
    /// The length of all of the buffer.
    pub fn buffer_len(self) -> usize {
        // SAFETY: let go of at once.
        unsafe { self.header.memory(self.generation) }.map_or(0, |memory| memory.len)
    }
}

impl Machine {
    pub fn new(launch: &Launch) -> Self {
        static LAUNCHES: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
        let (x, y, z) = launch.block;
        let threads = (x * y * z) as usize;
        let grid = u64::from(launch.grid.0) * u64::from(launch.grid.1) * u64::from(launch.grid.2);
        let slots = (launch.resident_blocks.max(1) as u64).min(grid) as usize;
        let mut machine = Self {
            launch: *launch,
            id: LAUNCHES.fetch_add(1, std::sync::atomic::Ordering::Relaxed),
            kernel: "",
            rng: ChaCha8Rng::seed_from_u64(launch.seed),
            preempt_in: 0,
            steps: 0,
            polls: 0,
            fault: None,
            inert: false,
            in_kernel: false,
            report: Report::default(),
            me: Me::default(),
            blocks: (0..slots).map(|_| Block::new(threads, launch.shared_bytes)).collect(),
            coordinates: (0..threads as u32).map(|thread| Index::in_box(thread, launch.block)).collect(),
            ready: Vec::new(),
            places: vec![u32::MAX; slots * WARPS],
            sites: Sites::new(),
            left: HashMap::new(),
        };
        machine.draw_preemption();
        machine
    }

    /// Threads of a block.
    pub fn threads(&self) -> usize {
        self.coordinates.len()
    }

    pub fn warps(&self) -> usize {
        self.threads().div_ceil(LANES)
    }

    /// The running thread's block.
    #[inline]
    pub fn block(&mut self) -> &mut Block {
        &mut self.blocks[self.me.slot]
    }

    /// The running warp's lanes that have not returned.
    pub fn active_lanes(&mut self) -> u32 {
        let number = self.me.warp();
        let warp = &self.block().warps[number];
        warp.exists & !warp.returned
    }

    pub fn thread_index(&self) -> Index {
        self.coordinates[self.me.thread]
    }

    /// The running thread's epoch or clock has changed.
    pub fn refresh(&mut self) {
        self.me = self.blocks[self.me.slot].order.me(self.me.slot, self.me.thread);
    }

    /// Puts block `number` into an empty slot.
    pub fn start_block(&mut self, slot: usize, number: u32) {
        let (threads, index) = (self.threads(), Index::in_box(number, self.launch.grid));
        self.blocks[slot].start(number, index, threads);
        for thread in (0..threads).step_by(LANES) {
            self.list(slot, thread / LANES);
        }
    }

    /// Lets a thread run again.
    #[inline]
    pub fn wake(&mut self, slot: usize, thread: usize) {
        let warp = &mut self.blocks[slot].warps[thread / LANES];
        let idle = warp.runnable == 0;
        warp.runnable |= 1 << (thread % LANES);
        if idle {
            self.list(slot, thread / LANES);
        }
    }

    /// Enters a warp, which has become runnable, into the list.
    pub fn list(&mut self, slot: usize, warp: usize) {
        let id = slot * WARPS + warp;
        if self.places[id] == u32::MAX {
            self.places[id] = self.ready.len() as u32;
            self.ready.push(id as u32);
        }
    }

    /// Takes a warp off the list.
    pub fn unlist(&mut self, id: u32) {
        let place = std::mem::replace(&mut self.places[id as usize], u32::MAX);
        self.ready.swap_remove(place as usize);
        if let Some(moved) = self.ready.get(place as usize) {
            self.places[*moved as usize] = place;
        }
    }

    fn draw_preemption(&mut self) {
        let likely = self.launch.preemption;
        self.preempt_in = if likely <= 0.0 {
            u64::MAX
        } else if likely >= 1.0 {
            1
        } else {
            let uniform: f64 = 1.0 - self.rng.random::<f64>();
            1 + (uniform.ln() / (1.0 - likely).ln()) as u64
        };
    }

    #[inline]
    fn is_interrupted(&mut self) -> bool {
        self.step();
        self.preempt_in -= 1;
        if self.preempt_in > 0 {
            return false;
        }
        self.draw_preemption();
        self.wake(self.me.slot, self.me.thread);
        true
    }

    /// Counts an access or a turn.
    #[inline]
    pub fn step(&mut self) {
        self.steps += 1;
        if self.steps > self.launch.step_limit {
            self.livelock(self.launch.step_limit, "accesses and turns of threads in all");
        }
    }

    /// Counts an atomic or a sleep, which is a poll unless it changes something.
    pub fn poll(&mut self, progress: bool) {
        self.polls = if progress { 0 } else { self.polls + 1 };
        if self.polls > self.launch.poll_limit {
            self.livelock(self.launch.poll_limit, "polls that changed nothing");
        }
    }

    #[cold]
    fn livelock(&mut self, limit: u64, what: &'static str) {
        let site = self.sites.newest;
        self.raise(site, FaultKind::Livelock { limit, what });
    }

    /// The first fault ends the launch. The caller then suspends its thread, which is unwound.
    #[cold]
    pub fn raise(&mut self, location: Site, kind: FaultKind) {
        let (block, thread) = (self.block().index, self.thread_index());
        self.raise_at(block, thread, location, kind);
    }

    #[cold]
    pub fn raise_at(&mut self, block: Index, thread: Index, location: Site, kind: FaultKind) {
        if self.fault.is_none() {
            self.fault = Some(Box::new(Fault { kernel: self.kernel, block, thread, location, kind }));
        }
        self.inert = true;
    }

    pub fn other(&self, slot: usize, thread: usize, location: Site) -> Other {
        let (block, thread) = (self.blocks[slot].index, self.coordinates[thread]);
        Other { block, thread, access: Access::Slice, location }
    }

    fn other_of(&self, stamp: Stamp) -> Other {
        let (block, thread) = (stamp.thread / self.threads() as u32, stamp.thread as usize % self.threads());
        Other {
            block: Index::in_box(block, self.launch.grid),
            thread: self.coordinates[thread],
            access: stamp.tag.access(),
            location: self.sites.at(stamp.tag.site()),
        }
    }

    pub fn tag(&mut self, tag: Tag, site: Site) -> Tag {
        tag.at(self.sites.number(site))
    }

    /// Checks and marks an access, and says where the element lies; `None` after a fault.
    #[inline]
    pub fn global(
        &mut self,
        view: GlobalView,
        index: usize,
        tag: Tag,
        read_only: bool,
        site: Site,
    ) -> Option<*mut u8> {
        if self.inert {
            return None;
        }
        let tag = self.tag(tag, site);
        // SAFETY: let go of before this function returns, which calls nobody else that asks for it.
        let Some(memory) = (unsafe { view.header.memory(view.generation) }) else {
            self.raise(site, FaultKind::FreedBuffer);
            return None;
        };
        if index >= view.len {
            let (GlobalView { start, len, .. }, buffer_len) = (view, memory.len);
            let (space, access) = (Space::Global, tag.access());
            self.raise(site, FaultKind::OutOfBounds { space, access, index, start, len, buffer_len });
            return None;
        }
        let index = view.start + index;
        memory.enter(self.id);
        let mut result = memory.access(&self.blocks[self.me.slot].order, self.me, index, tag);
        if read_only && result.is_ok() {
            result = memory
                .load_read_only(index, site)
                .map_err(|stamp| Conflict::ReadOnly(self.sites.at(stamp.tag.site())));
        }
        self.report.global.add(tag, memory.size);
        // SAFETY: the view's bounds lie within the buffer's, and the index within the view's.
        let address = unsafe { memory.data.add(index * memory.size) };
        if tag.writes() && !tag.is_atomic() {
            self.polls = 0;
        }
        match result {
            Ok(()) => Some(address),
            Err(conflict) => {
                self.global_conflict(conflict, index, tag, site);
                None
            }
        }
    }

    /// Checks and marks elements of a view one after another, as one access of `by`, which is the running thread or a copy of its.
    pub fn mark_elements(
        &mut self,
        view: GlobalView,
        elements: Range<usize>,
        tag: Tag,
        by: Me,
        site: Site,
    ) -> Option<()> {
        // SAFETY: let go of before this function returns, which calls nobody else that asks for it.
        let Some(memory) = (unsafe { view.header.memory(view.generation) }) else {
            self.raise(site, FaultKind::FreedBuffer);
            return None;
        };
        memory.enter(self.id);
        let order = &self.blocks[self.me.slot].order;
        for index in elements.clone() {
            if let Err(conflict) = memory.access(order, by, index, tag) {
                self.global_conflict(conflict, index, tag, site);
                return None;
            }
        }
        let bytes = elements.len() * memory.size;
        self.report.global.add(tag, bytes);
        Some(())
    }

    #[cold]
    fn global_conflict(&mut self, conflict: Conflict, index: usize, tag: Tag, site: Site) {
        let access = tag.access();
        let kind = match conflict {
            Conflict::Uninitialised => FaultKind::UninitialisedGlobal { access, index },
            Conflict::ReadOnly(other) => FaultKind::ReadOnlyWritten { access, index, other },
            Conflict::Pending(stamp) => {
                FaultKind::PendingCopy { access, index, waited: false, other: self.other_of(stamp) }
            }
            Conflict::Race(stamp) if tag.writes() => {
                FaultKind::GlobalWriteRace { access, index, other: self.other_of(stamp) }
            }
            Conflict::Race(stamp) => FaultKind::GlobalReadRace { access, index, other: self.other_of(stamp) },
        };
        self.raise(site, kind);
    }

    /// The same for shared memory.
    #[inline]
    pub fn shared(
        &mut self,
        view: SharedView,
        index: usize,
        size: usize,
        tag: Tag,
        site: Site,
    ) -> Option<*mut u8> {
        if self.inert {
            return None;
        }
        let tag = self.tag(tag, site);
        if index >= view.len {
            let SharedView { start, len, array_len: buffer_len, .. } = view;
            let (space, access) = (Space::Shared, tag.access());
            self.raise(site, FaultKind::OutOfBounds { space, access, index, start, len, buffer_len });
            return None;
        }
        let index = view.start + index;
        let byte = view.base + index * size;
        let block = &mut self.blocks[self.me.slot];
        let result = block.shared.access(&block.order, self.me, byte, size, tag);
        self.report.shared.add(tag, size);
        // SAFETY: the array lies within the block's shared memory, and the index within the array.
        let address = unsafe { block.shared.data().add(byte) };
        if tag.writes() && !tag.is_atomic() {
            self.polls = 0;
        }
        match result {
            Ok(()) => Some(address),
            Err(conflict) => {
                self.shared_conflict(conflict, index, byte, tag, site);
                None
            }
        }
    }

    #[cold]
    pub fn shared_conflict(&mut self, conflict: Conflict, index: usize, byte: usize, tag: Tag, site: Site) {
        let access = tag.access();
        let kind = match conflict {
            Conflict::Uninitialised => FaultKind::UninitialisedShared { access, index, byte },
            Conflict::ReadOnly(other) => FaultKind::ReadOnlyWritten { access, index, other },
            Conflict::Pending(stamp) => {
                let waited = !stamp.tag.is_pending();
                FaultKind::PendingCopy { access, index, waited, other: self.other_of(stamp) }
            }
            Conflict::Race(stamp) => {
                FaultKind::SharedRace { access, index, byte, other: self.other_of(stamp) }
            }
        };
        self.raise(site, kind);
    }

    /// An atomic's part in chains of releases and acquires, at element `index` of a view.
    pub fn chain_global(&mut self, view: GlobalView, index: usize, chain: Chain) {
        let (me, order) = (self.me, &mut self.blocks[self.me.slot].order);
        let element = (ptr::from_ref(view.header), view.start + index);
        if !order.is_idle(me, chain) || self.left.contains_key(&element) {
            order.atomic(me, chain, self.left.entry(element).or_default());
            self.refresh();
        }
    }

    /// The same at byte `byte` of shared memory.
    pub fn chain_shared(&mut self, byte: usize, chain: Chain) {
        let (me, block) = (self.me, &mut self.blocks[self.me.slot]);
        if !block.order.is_idle(me, chain) || block.left.contains_key(&byte) {
            block.order.atomic(me, chain, block.left.entry(byte).or_default());
            self.refresh();
        }
    }
}

impl Traffic {
    /// Counts an access to `size` bytes.
    pub(super) fn add(&mut self, tag: Tag, size: usize) {
        let (loads, stores) = (u64::from(tag.reads()), u64::from(tag.writes()));
        self.atomics += loads & stores;
        self.loads += loads & !stores;
        self.stores += stores & !loads;
        self.bytes_loaded += loads * size as u64;
        self.bytes_stored += stores * size as u64;
    }
}

impl Block {
    fn new(threads: usize, shared_bytes: usize) -> Self {
        Self {
            index: Index::default(),
            live: 0,
            order: BlockOrder::new(threads),
            warps: (0..threads.div_ceil(LANES)).map(|_| Warp::new()).collect(),
            barrier: Barrier::default(),
            shared: SharedMemory::new(shared_bytes),
            left: HashMap::new(),
            copies: (0..threads).map(|_| Copies::default()).collect(),
            bulk: Bulk::new(threads),
            warpgroups: vec![Warpgroup::default(); threads.div_ceil(wgmma::THREADS)],
            products: vec![Products::default(); threads],
            yielders: vec![ptr::null(); threads],
        }
    }

    fn start(&mut self, number: u32, index: Index, threads: usize) {
        self.index = index;
        self.live = threads as u32;
        self.order.start(number);
        for (warp, state) in self.warps.iter_mut().enumerate() {
            state.start((threads - warp * LANES).min(LANES));
        }
        self.barrier = Barrier::default();
        self.left.clear();
        self.copies.iter_mut().for_each(Copies::clear);
        self.bulk.clear();
        self.warpgroups.fill(Warpgroup::default());
        self.products.fill(Products::default());
    }
}

/// Numbers for locations, so that a stamp is 16 bytes.
struct Sites {
    /// A direct-mapped cache in front of `numbers`.
    cache: Box<[(*const Location<'static>, u16); 256]>,
    numbers: HashMap<*const Location<'static>, u16>,
    all: Vec<Site>,
    newest: Site,
}

impl Sites {
    #[track_caller]
    fn new() -> Self {
        let here = Location::caller();
        Self {
            cache: Box::new([(ptr::null(), 0); 256]),
            numbers: HashMap::new(),
            all: vec![here],
            newest: here,
        }
    }

    #[inline]
    fn number(&mut self, site: Site) -> u16 {
        self.newest = site;
        let pointer = ptr::from_ref(site);
        let (cached, number) = self.cache[(pointer as usize >> 3) % 256];
        if cached == pointer { number } else { self.look_up(site) }
    }

    #[cold]
    fn look_up(&mut self, site: Site) -> u16 {
        let pointer = ptr::from_ref(site);
        let all = &mut self.all;
        let number = *self.numbers.entry(pointer).or_insert_with(|| {
            all.push(site);
            u16::try_from(all.len() - 1).unwrap_or(0)
        });
        self.cache[(pointer as usize >> 3) % 256] = (pointer, number);
        number
    }

    fn at(&self, number: u16) -> Site {
        self.all[number as usize]
    }
}
