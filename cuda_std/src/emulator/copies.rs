//! Asynchronous copies.
//!
//! A copy's bytes land when its thread waits for it; until then its destination is marked, and any access to it is a fault, so
//! when exactly they land cannot be seen. Whether the source is read at the start or at the end of that time is random.

use rand::Rng;

use super::fault::FaultKind;
use super::machine::{GlobalView, Machine, SharedView, Site};
use super::order::Tag;

/// The copies that a thread has not waited for.
#[derive(Default)]
pub(crate) struct Copies {
    pending: Vec<Pending>,
    /// Number of the group that `commit_group` will close.
    group: u64,
}

struct Pending {
    group: u64,
    byte: usize,
    size: usize,
    tag: Tag,
    source: Source,
    site: Site,
}

enum Source {
    Zero,
    /// Read at the start; from this element.
    Read([u8; 16], GlobalView, usize),
    /// To be read at the end.
    Later(*const u8, GlobalView, usize),
}

impl Copies {
    pub fn clear(&mut self) {
        self.pending.clear();
        self.group = 0;
    }
}

impl Machine {
    pub fn start_copy(
        &mut self,
        (to, to_index): (SharedView, usize),
        (from, from_index): (GlobalView, usize),
        size: usize,
        valid: bool,
        site: Site,
    ) -> Option<()> {
        let source = if valid {
            let address = self.global(from, from_index, Tag::COPY_SOURCE.pending(), false, site)?;
            if self.rng.random() {
                let mut bytes = [0; 16];
                // SAFETY: an element of `size` bytes, whose bounds `global` has checked.
                unsafe { std::ptr::copy_nonoverlapping(address, bytes.as_mut_ptr(), size) };
                Source::Read(bytes, from, from.start + from_index)
            } else {
                Source::Later(address, from, from.start + from_index)
            }
        } else {
            Source::Zero
        };
        let tag = Tag::COPY_DESTINATION.pending();
        self.shared(to, to_index, size, tag, site)?;
        let tag = self.tag(Tag::COPY_DESTINATION, site);
        let byte = to.base + (to.start + to_index) * size;
        let thread = self.me.thread;
        let copies = &mut self.block().copies[thread];
        let group = copies.group;
        copies.pending.push(Pending { group, byte, size, tag, source, site });
        self.report.copies += 1;
        Some(())
    }

    pub fn commit_copies(&mut self) {
        let thread = self.me.thread;
        self.block().copies[thread].group += 1;
    }

    /// Lands the copies of all groups but the newest `newest`; with `None`, all copies.
    pub fn wait_for_copies(&mut self, newest: Option<u32>) -> Option<()> {
        if self.inert {
            return None;
        }
        let (me, thread) = (self.me, self.me.thread);
        let copies = &mut self.block().copies[thread];
        let landing = match newest {
            None => copies.pending.len(),
            Some(newest) => {
                let first_kept = copies.group.saturating_sub(u64::from(newest));
                copies.pending.partition_point(|copy| copy.group < first_kept)
            }
        };
        let landed: Vec<Pending> = copies.pending.drain(..landing).collect();
        for copy in landed {
            let shared = &mut self.block().shared;
            // SAFETY: bounds were checked when the copy began.
            let to = unsafe { shared.data().add(copy.byte) };
            shared.arrive(me, copy.byte, copy.size, copy.tag);
            let (address, view, index) = match &copy.source {
                Source::Zero => {
                    // SAFETY: `size` bytes at `to`, as above.
                    unsafe { to.write_bytes(0, copy.size) };
                    continue;
                }
                Source::Read(bytes, view, index) => (bytes.as_ptr(), *view, *index),
                Source::Later(address, view, index) => (*address, *view, *index),
            };
            // SAFETY: let go of before anything else asks for it.
            let Some(memory) = (unsafe { view.header.memory(view.generation) }) else {
                self.raise(copy.site, FaultKind::FreedBuffer);
                return None;
            };
            memory.copy_read(me, index, false);
            // SAFETY: `size` bytes on either side; the source is a copy's own bytes or a buffer that still exists.
            unsafe { std::ptr::copy_nonoverlapping(address, to, copy.size) };
        }
        Some(())
    }

    /// A thread returns: it must have waited.
    pub fn check_copies_of_returned(&mut self) {
        let thread = self.me.thread;
        let copies = &self.block().copies[thread];
        if let Some(first) = copies.pending.first() {
            let (site, copies) = (first.site, copies.pending.len());
            self.raise(site, FaultKind::CopyNotAwaited { copies });
        }
    }
}
