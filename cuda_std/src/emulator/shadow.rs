//! What every access is checked against: is the element written, and is the access ordered with the others?
//!
//! Of each element the emulator keeps the last plain write, the last atomic write and two loads. A new access that is ordered after
//! an old one takes its place, since whoever is ordered after the new one is ordered after the old one too. So a race goes unnoticed
//! only where three unordered loads, or two unordered atomics, meet a store that is ordered after some of them.

use std::panic::Location;

use super::buffer::{Memory, Word};
use super::order::{BlockOrder, LANES, Me, Stamp, Tag};

/// What is wrong with an access.
pub(crate) enum Conflict {
    Uninitialised,
    Race(Stamp),
    Pending(Stamp),
    ReadOnly(&'static Location<'static>),
}

/// Checks an access against the marks of an element and leaves its own.
#[inline]
fn mark(
    order: &BlockOrder,
    me: Me,
    tag: Tag,
    write: Option<&mut Word>,
    atomic: Option<&mut Word>,
    reads: Option<&mut [Word; 2]>,
) -> Result<(), Conflict> {
    let unordered = |word: &Word| Stamp::of(*word).filter(|stamp| !order.ordered(*stamp, me));
    let excused = |stamp: Stamp| stamp.tag.both_atomic(tag, order.thread_of(stamp).is_some());

    if let Some(stamp) = write.as_deref().and_then(|word| Stamp::of(*word))
        && stamp.tag.is_pending()
    {
        return Err(Conflict::Pending(stamp));
    }
    if let Some(stamp) = write.as_deref().and_then(unordered) {
        return Err(Conflict::Race(stamp));
    }
    if let Some(stamp) = atomic.as_deref().and_then(unordered)
        && !excused(stamp)
    {
        return Err(Conflict::Race(stamp));
    }
    if !tag.writes() {
        if let Some(reads) = reads {
            record(order, me, tag, reads);
        }
        return Ok(());
    }
    if let Some(reads) = reads {
        for stamp in reads.iter().filter_map(|word| Stamp::of(*word)) {
            if stamp.tag.is_pending() {
                return Err(Conflict::Pending(stamp));
            }
            if !order.ordered(stamp, me) && !excused(stamp) {
                return Err(Conflict::Race(stamp));
            }
        }
        if !tag.is_atomic() {
            *reads = [Stamp::NONE; 2];
        }
    }
    let stamp = me.stamp(tag).words();
    match (atomic, write) {
        (Some(atomic), _) if tag.is_atomic() => *atomic = stamp,
        (atomic, Some(write)) if !tag.is_atomic() => {
            *write = stamp;
            if let Some(atomic) = atomic {
                *atomic = Stamp::NONE;
            }
        }
        _ => {}
    }
    Ok(())
}

/// Remembers a load, beside one of another thread that nothing orders with it: of another warp if there is a choice.
fn record(order: &BlockOrder, me: Me, tag: Tag, [newest, other]: &mut [Word; 2]) {
    let warp_of = |stamp: Stamp| stamp.thread.wrapping_sub(me.number - me.lane() as u32) < LANES as u32;
    let still_matters = |stamp: &Stamp| {
        !order.ordered(*stamp, me) || (tag.is_atomic() && !stamp.tag.is_atomic()) || stamp.tag.is_pending()
    };
    if let Some(stamp) = Stamp::of(*newest).filter(still_matters) {
        let kept = Stamp::of(*other).filter(still_matters);
        if kept.is_none_or(|kept| !warp_of(stamp) || warp_of(kept)) {
            *other = *newest;
        }
    }
    *newest = me.stamp(tag).words();
}

/// A pending mark of this thread's now is one of the past; with `bulk`, one of a bulk copy of the phase that `me` has for a clock.
fn settle(word: &mut Word, me: Me, bulk: bool) {
    if let Some(stamp) = Stamp::of(*word)
        && stamp.thread == me.number
        && stamp.tag.is_pending()
        && stamp.tag.is_bulk() == bulk
        && (!bulk || stamp.clock == me.clock)
    {
        *word = me.stamp(stamp.tag.settled()).words();
    }
}

/// The shadow's word for an element; a shadow comes into being when it is first needed.
fn sized<W: Clone>(shadow: &mut Vec<W>, none: W, len: usize, index: usize, needed: bool) -> Option<&mut W> {
    if needed && shadow.is_empty() {
        *shadow = vec![none; len];
    }
    shadow.get_mut(index)
}

impl Memory {
    /// Checks and marks an access to element `index`, which is within bounds.
    #[inline]
    pub(crate) fn access(
        &mut self,
        order: &BlockOrder,
        me: Me,
        index: usize,
        tag: Tag,
    ) -> Result<(), Conflict> {
        if tag.reads() && !self.is_written(index) {
            return Err(Conflict::Uninitialised);
        }
        if !self.writable {
            return Ok(());
        }
        let (len, atomic) = (self.len, tag.is_atomic());
        if tag.writes() {
            if let Some(at) = self.read_only_at
                && self.read_only[index / 64] >> (index % 64) & 1 != 0
            {
                return Err(Conflict::ReadOnly(at));
            }
            self.set_written(index);
        }
        mark(
            order,
            me,
            tag,
            sized(&mut self.writes, Stamp::NONE, len, index, tag.writes() && !atomic),
            sized(&mut self.atomics, Stamp::NONE, len, index, tag.writes() && atomic),
            sized(&mut self.reads, [Stamp::NONE; 2], len, index, !tag.writes()),
        )
    }

    /// Checks and marks that element `index` is loaded through the read-only path.
    pub(crate) fn load_read_only(
        &mut self,
        index: usize,
        at: &'static Location<'static>,
    ) -> Result<(), Stamp> {
        if !self.writable {
            return Ok(());
        }
        // What has a read-only path has no atomics.
        if let Some(stamp) = self.writes.get(index).and_then(|word| Stamp::of(*word)) {
            return Err(stamp);
        }
        if self.read_only.is_empty() {
            self.read_only = vec![0; self.len.div_ceil(64)];
        }
        self.read_only[index / 64] |= 1 << (index % 64);
        self.read_only_at = Some(at);
        Ok(())
    }

    /// The thread has waited for its copy from element `index`: the source was read by now.
    pub(crate) fn copy_read(&mut self, me: Me, index: usize, bulk: bool) {
        self.reads.get_mut(index).into_iter().flatten().for_each(|word| settle(word, me, bulk));
    }

    /// The thread has waited for its copy to element `index`.
    pub(crate) fn copy_written(&mut self, me: Me, index: usize) {
        self.writes.get_mut(index).into_iter().for_each(|word| settle(word, me, false));
    }
}

/// A resident block's shared memory and its shadow.
pub(crate) struct SharedMemory {
    data: Vec<u128>,
    /// By 128 bytes, where arrays start.
    chunks: Vec<Chunk>,
    entries: Vec<Entry>,
}

/// The marks of 128 bytes: one entry for as many bytes as the smallest access so far has touched.
#[derive(Clone, Copy)]
struct Chunk {
    first: u32,
    /// As a power of two; above 4: none yet.
    granule: u8,
}

#[derive(Clone, Copy, Default)]
struct Entry {
    write: Word,
    atomic: Word,
    reads: [Word; 2],
}

const CHUNK: usize = crate::shared::ALIGNMENT;

impl SharedMemory {
    pub fn new(bytes: usize) -> Self {
        Self {
            data: vec![0; bytes.div_ceil(16)],
            chunks: vec![Chunk { first: 0, granule: u8::MAX }; bytes.div_ceil(CHUNK)],
            entries: Vec::new(),
        }
    }

    pub fn data(&mut self) -> *mut u8 {
        self.data.as_mut_ptr().cast()
    }

    /// The marks of `size` bytes at `byte`, a multiple of `size`.
    #[inline]
    fn entries(&mut self, byte: usize, size: usize) -> &mut [Entry] {
        let chunk = self.chunks[byte / CHUNK];
        let power = size.trailing_zeros() as u8;
        let chunk = if power < chunk.granule { self.split(byte / CHUNK, power) } else { chunk };
        let first = chunk.first as usize + ((byte % CHUNK) >> chunk.granule);
        &mut self.entries[first..first + (size >> chunk.granule)]
    }

    #[cold]
    fn split(&mut self, chunk: usize, granule: u8) -> Chunk {
        let old = self.chunks[chunk];
        let new = Chunk { first: self.entries.len() as u32, granule };
        for at in 0..CHUNK >> granule {
            let entry = match old.granule {
                u8::MAX => Entry::default(),
                coarse => self.entries[old.first as usize + (at >> (coarse - granule))],
            };
            self.entries.push(entry);
        }
        self.chunks[chunk] = new;
        new
    }

    /// Checks and marks an access to `size` bytes at `byte`, within bounds and aligned.
    #[inline]
    pub fn access(
        &mut self,
        order: &BlockOrder,
        me: Me,
        byte: usize,
        size: usize,
        tag: Tag,
    ) -> Result<(), Conflict> {
        for entry in self.entries(byte, size) {
            let stale = |word: &Word| Stamp::of(*word).is_some_and(|stamp| order.thread_of(stamp).is_none());
            if stale(&entry.write) || stale(&entry.atomic) || stale(&entry.reads[0]) {
                // Of a block that was here before.
                *entry = Entry::default();
            }
            if let Some(stamp) = Stamp::of(entry.write) {
                if stamp.tag.is_pending() || (stamp.tag.is_copy() && !order.ordered(stamp, me)) {
                    return Err(Conflict::Pending(stamp));
                }
            } else if tag.reads() && entry.atomic == Stamp::NONE {
                return Err(Conflict::Uninitialised);
            }
            mark(order, me, tag, Some(&mut entry.write), Some(&mut entry.atomic), Some(&mut entry.reads))?;
        }
        Ok(())
    }

    /// A write to `size` bytes at `byte` that bulk copies of `me` may not see, for want of a fence.
    pub fn unfenced(&mut self, order: &BlockOrder, me: Me, byte: usize, size: usize) -> Option<Stamp> {
        let words = self.entries(byte, size).iter().flat_map(|entry| [entry.write, entry.atomic]);
        // Those of other blocks that were here before do not count.
        let mut own = words.filter_map(Stamp::of).filter(|stamp| order.thread_of(*stamp).is_some());
        // What is not even ordered is a fault of its own.
        own.find(|stamp| !stamp.tag.is_pending() && order.ordered(*stamp, me) && !order.is_fenced(*stamp, me))
    }

    /// The thread has waited until its copy out of `size` bytes at `byte` had read them.
    pub fn copy_read(&mut self, me: Me, byte: usize, size: usize) {
        for entry in self.entries(byte, size) {
            entry.reads.iter_mut().for_each(|word| settle(word, me, false));
        }
    }

    /// An asynchronous copy of this thread has arrived.
    pub fn arrive(&mut self, me: Me, byte: usize, size: usize, tag: Tag) {
        for entry in self.entries(byte, size) {
            entry.write = me.stamp(tag).words();
        }
    }
}
