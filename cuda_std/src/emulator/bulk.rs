//! Bulk copies.
//!
//! Between the start of a copy and the wait for it both sides are marked: an access to the destination, or one that would change the
//! source, is a fault. So when exactly its bytes move cannot be seen, but for the barrier that counts them: those of a copy in arrive at a
//! random one of the polls of its barrier, all at once.

use std::collections::BTreeMap;

use rand::Rng;

use super::fault::{FaultKind, Space};
use super::machine::{GlobalView, Machine, SharedView, Site};
use super::mbarrier::Barrier;
use super::order::{Me, Phase, Tag};

/// What bulk copies move at least, and a multiple of which they are and begin at.
pub(crate) const UNIT: usize = 16;

/// A block's barriers in shared memory, and its bulk copies under way.
pub(crate) struct Bulk {
    /// By their byte.
    pub barriers: BTreeMap<usize, Barrier>,
    /// By thread.
    outs: Vec<CopiesOut>,
}

/// The copies out that a thread has not waited for.
#[derive(Clone, Default)]
struct CopiesOut {
    pending: Vec<CopyOut>,
    /// Number of the group that `commit_group` will close.
    group: u64,
}

#[derive(Clone)]
struct CopyOut {
    group: u64,
    from: usize,
    to: Elements,
    /// Once it is read.
    data: Option<Vec<u8>>,
    site: Site,
}

/// A copy onto a barrier.
#[derive(Clone)]
pub(crate) struct CopyIn {
    /// The thread that started it, with the phase for a clock.
    pub by: Me,
    from: Elements,
    to: usize,
    tag: Tag,
    pub site: Site,
}

/// Whole elements of a buffer.
#[derive(Clone, Copy)]
struct Elements {
    view: GlobalView,
    /// The first, within the buffer.
    first: usize,
    len: usize,
    /// Bytes of one.
    size: usize,
}

impl Elements {
    fn bytes(self) -> usize {
        self.len * self.size
    }
}

impl CopyIn {
    pub fn bytes(&self) -> usize {
        self.from.bytes()
    }
}

impl Bulk {
    pub fn new(threads: usize) -> Self {
        Self { barriers: BTreeMap::new(), outs: vec![CopiesOut::default(); threads] }
    }

    pub fn clear(&mut self) {
        self.barriers.clear();
        self.outs.fill(CopiesOut::default());
    }
}

/// A bulk copy's two sides, in elements of `size` bytes.
#[derive(Clone, Copy)]
pub(crate) struct Sides {
    pub global: GlobalView,
    pub shared: SharedView,
    pub len: usize,
    pub size: usize,
}

impl Machine {
    pub fn start_copy_in(
        &mut self,
        sides: Sides,
        barriers: SharedView,
        index: usize,
        site: Site,
    ) -> Option<()> {
        let byte = self.use_barrier(barriers, index, Tag::ATOMIC_LOAD, site)?;
        if !self.is_barrier_fenced(byte) {
            self.raise(site, FaultKind::ProxyFence { byte });
            return None;
        }
        let number = self.block().bulk.barriers[&byte].ended;
        let by = Me { clock: Phase::new(byte, number).0, ..self.me };
        let (from, to) = self.check_sides(sides, [Tag::COPY_SOURCE, Tag::COPY_DESTINATION], site)?;
        self.mark_global(from, Tag::COPY_SOURCE.pending().bulk(), by, site)?;
        self.mark_shared(to, from.bytes(), Tag::COPY_DESTINATION.pending().bulk(), by, site)?;
        let tag = self.tag(Tag::COPY_DESTINATION.bulk(), site);
        let copy = CopyIn { by, from, to, tag, site };
        let barrier = self.block().bulk.barriers.get_mut(&byte).expect("found above");
        barrier.flying.push(copy);
        self.report.bulk_copies += 1;
        Some(())
    }

    /// Lets some of the bytes that are on their way to a barrier arrive; whether any have.
    pub fn land_some(&mut self, byte: usize) -> Option<bool> {
        let mut any = false;
        let mut at = 0;
        while at < self.block().bulk.barriers[&byte].flying.len() {
            if self.rng.random() {
                at += 1;
                continue;
            }
            any = true;
            let barrier = self.block().bulk.barriers.get_mut(&byte).expect("the caller found it");
            let copy = barrier.flying.remove(at);
            let data = self.read_global(copy.from, copy.site)?;
            let shared = self.block().shared.data();
            // SAFETY: bounds were checked when the copy began.
            unsafe { std::ptr::copy_nonoverlapping(data, shared.add(copy.to), copy.bytes()) };
            self.arrived(byte, copy)?;
        }
        Some(any)
    }

    /// Someone has waited for a copy in: both sides are free.
    pub fn settle_copy_in(&mut self, copy: &CopyIn) {
        // Ordered by the phase from here on; by barriers of the block too, from the epoch of this wait on.
        let by = Me { epoch: self.me.epoch, ..copy.by };
        for byte in (copy.to..copy.to + copy.bytes()).step_by(UNIT) {
            self.block().shared.arrive(by, byte, UNIT, copy.tag);
        }
        // SAFETY: let go of before anything else asks for it.
        if let Some(memory) = unsafe { copy.from.view.header.memory(copy.from.view.generation) } {
            let elements = copy.from.first..copy.from.first + copy.from.len;
            elements.for_each(|index| memory.copy_read(by, index, true));
        }
    }

    pub fn start_copy_out(&mut self, sides: Sides, site: Site) -> Option<()> {
        let (to, from) = self.check_sides(sides, [Tag::COPY_DESTINATION, Tag::COPY_SOURCE], site)?;
        self.mark_shared(from, to.bytes(), Tag::COPY_SOURCE.pending(), self.me, site)?;
        self.mark_global(to, Tag::COPY_DESTINATION.pending(), self.me, site)?;
        let thread = self.me.thread;
        let outs = &mut self.block().bulk.outs[thread];
        let group = outs.group;
        outs.pending.push(CopyOut { group, from, to, data: None, site });
        self.report.bulk_copies += 1;
        Some(())
    }

    /// A proxy fence of the running thread.
    pub fn fence_proxy(&mut self) {
        let me = self.me;
        self.block().order.fence_proxy(me);
        self.refresh();
    }

    pub fn commit_copies_out(&mut self) {
        let thread = self.me.thread;
        self.block().bulk.outs[thread].group += 1;
    }

    /// Waits for all groups but the newest `newest`: until their sources are read, or `written`.
    pub fn wait_for_copies_out(&mut self, newest: u32, written: bool) -> Option<()> {
        if self.inert {
            return None;
        }
        let (me, thread) = (self.me, self.me.thread);
        let outs = &mut self.block().bulk.outs[thread];
        let first_kept = outs.group.saturating_sub(u64::from(newest));
        let waited = outs.pending.partition_point(|copy| copy.group < first_kept);
        for at in 0..waited {
            let copy = &self.block().bulk.outs[thread].pending[at];
            if copy.data.is_some() {
                continue;
            }
            let (from, bytes) = (copy.from, copy.to.bytes());
            let shared = &mut self.block().shared;
            // SAFETY: bounds were checked when the copy began.
            let data = unsafe { std::slice::from_raw_parts(shared.data().add(from), bytes) }.to_vec();
            for byte in (from..from + bytes).step_by(UNIT) {
                shared.copy_read(me, byte, UNIT);
            }
            self.block().bulk.outs[thread].pending[at].data = Some(data);
        }
        if !written {
            return Some(());
        }
        let landed: Vec<CopyOut> = self.block().bulk.outs[thread].pending.drain(..waited).collect();
        for copy in landed {
            self.write_out(&copy)?;
            // SAFETY: let go of before anything else asks for it.
            if let Some(memory) = unsafe { copy.to.view.header.memory(copy.to.view.generation) } {
                let elements = copy.to.first..copy.to.first + copy.to.len;
                elements.for_each(|index| memory.copy_written(me, index));
            }
        }
        Some(())
    }

    /// A thread returns: what it copies out must have been read. What is not yet written the launch's end waits for; it stays marked.
    pub fn check_bulk_of_returned(&mut self, last: bool) {
        let thread = self.me.thread;
        let pending = std::mem::take(&mut self.block().bulk.outs[thread].pending);
        let unread = pending.iter().filter(|copy| copy.data.is_none());
        if let Some(first) = unread.clone().next() {
            self.raise(first.site, FaultKind::CopyNotAwaited { copies: unread.count() });
            return;
        }
        for copy in pending {
            if self.write_out(&copy).is_none() {
                return;
            }
        }
        if last {
            let barriers = self.block().bulk.barriers.values();
            let open: Vec<Site> = barriers.flat_map(Barrier::not_awaited).map(|copy| copy.site).collect();
            if let Some(first) = open.first() {
                self.raise(first, FaultKind::CopyNotAwaited { copies: open.len() });
            }
        }
    }

    fn write_out(&mut self, copy: &CopyOut) -> Option<()> {
        let to = self.read_global(copy.to, copy.site)?;
        let data = copy.data.as_ref().expect("read before it is written");
        // SAFETY: as many bytes; the buffer still exists.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), to, data.len()) };
        Some(())
    }

    /// Where elements lie, if their buffer still exists.
    fn read_global(&mut self, elements: Elements, site: Site) -> Option<*mut u8> {
        // SAFETY: let go of at once.
        match unsafe { elements.view.header.memory(elements.view.generation) } {
            // SAFETY: bounds were checked when the copy began.
            Some(memory) => Some(unsafe { memory.data.add(elements.first * elements.size) }),
            None => {
                self.raise(site, FaultKind::FreedBuffer);
                None
            }
        }
    }

    /// The elements of a copy's global side and the first byte of its shared one, if it stays within both and is aligned.
    fn check_sides(&mut self, sides: Sides, tags: [Tag; 2], site: Site) -> Option<(Elements, usize)> {
        let Sides { global, shared, len, size } = sides;
        let outside = [
            (Space::Global, global.start, global.len, global.buffer_len()),
            (Space::Shared, shared.start, shared.len, shared.array_len),
        ];
        for ((space, start, view_len, buffer_len), tag) in outside.into_iter().zip(tags) {
            if len > view_len {
                let (access, index, len) = (tag.access(), len - 1, view_len);
                self.raise(site, FaultKind::OutOfBounds { space, access, index, start, len, buffer_len });
                return None;
            }
        }
        let elements = Elements { view: global, first: global.start, len, size };
        let (byte, bytes, global_byte) = (shared.base + shared.start * size, len * size, global.start * size);
        if bytes == 0 || [byte, bytes, global_byte].iter().any(|value| !value.is_multiple_of(UNIT)) {
            self.raise(site, FaultKind::BulkAlignment { bytes, global_byte, shared_byte: byte });
            return None;
        }
        Some((elements, byte))
    }

    /// Checks and marks each element of the global side.
    fn mark_global(&mut self, elements: Elements, tag: Tag, by: Me, site: Site) -> Option<()> {
        let tag = self.tag(tag, site);
        self.mark_elements(elements.view, elements.first..elements.first + elements.len, tag, by, site)
    }

    /// Checks and marks each unit of the shared side, which no store without a fence may have touched.
    pub fn mark_shared(&mut self, byte: usize, bytes: usize, tag: Tag, by: Me, site: Site) -> Option<()> {
        let tag = self.tag(tag, site);
        for byte in (byte..byte + bytes).step_by(UNIT) {
            let block = &mut self.blocks[self.me.slot];
            if block.shared.unfenced(&block.order, self.me, byte, UNIT).is_some() {
                self.raise(site, FaultKind::ProxyFence { byte });
                return None;
            }
            if let Err(conflict) = block.shared.access(&block.order, by, byte, UNIT, tag) {
                self.shared_conflict(conflict, byte / UNIT, byte, tag, site);
                return None;
            }
        }
        self.report.shared.add(tag, bytes);
        Some(())
    }
}
