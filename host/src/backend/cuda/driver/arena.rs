use std::iter;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use cust::sys::{CU_MEMHOSTREGISTER_DEVICEMAP, CU_MEMHOSTREGISTER_PORTABLE};
use memmap2::{Advice, MmapMut, MmapOptions, UncheckedAdvice};
use rayon::prelude::*;

use super::error::{check_range, code_name};
use super::raw::{self, Code, call};
use super::{Context, DriverError, Result, Stream};

/// Bytes that are pinned in one call: so few that progress shows and a refusal comes early, so many that calls and pieces of
/// copies are rare.
const CHUNK_BYTES: usize = 256 << 20;

/// Bytes that one thread touches at a time, and where chunks end unless the address range does: a huge page.
const TOUCH_BYTES: usize = 2 << 20;

/// A large range of host memory that the GPU reads and writes at the host's own addresses: kernels load from it across the
/// bus, copy engines move it, and one base address and an offset reach all of it from both sides.
///
/// The range of addresses is reserved once, for as much as the arena may ever hold, and costs nothing; memory is pinned
/// from its start on as the arena [grows](Self::grow). So growing moves nothing, and a kernel that was given the base
/// address reaches what came later too.
///
/// The GPU may touch it at any time, so it gives out no references: the host [`read`](Self::read)s and
/// [`write`](Self::write)s by copying, or goes through [`as_ptr`](Self::as_ptr). What happens first is up to events; a
/// race gives some bytes or other.
///
/// Dropping it waits for all work of the context.
#[derive(Debug)]
pub struct PinnedArena {
    base: NonNull<u8>,
    len: usize,
    capacity: usize,
    /// Where each pinned chunk ends, ascending: the first begins at 0, each other where the one before ends. At least
    /// `len` bytes are pinned.
    ends: Vec<usize>,
    /// `None` if it can hold nothing.
    map: Option<MmapMut>,
    context: Context,
}

// SAFETY: it owns its memory, which is read through shared references by atomics alone.
unsafe impl Send for PinnedArena {}
// SAFETY: as above.
unsafe impl Sync for PinnedArena {}

/// How far [`PinnedArena::grow`] has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PinProgress {
    /// Bytes that are pinned.
    pub pinned_bytes: u64,
    /// Bytes that will be.
    pub total_bytes: u64,
}

impl PinnedArena {
    /// Reserves addresses for `capacity` bytes. No memory is taken yet.
    ///
    /// # Errors
    /// [`DriverError::AddressSpaceRefused`].
    pub fn with_capacity(context: &Context, capacity: usize) -> Result<Self> {
        context.make_current()?;
        let (base, ends) = (NonNull::dangling(), Vec::new());
        let mut arena = Self { base, len: 0, capacity, ends, map: None, context: context.clone() };
        if capacity == 0 {
            return Ok(arena);
        }
        let refused = |error: std::io::Error| DriverError::AddressSpaceRefused {
            wanted: capacity as u64,
            reason: error.to_string(),
        };
        let mut map = MmapOptions::new().len(capacity).no_reserve_swap().map_anon().map_err(refused)?;
        // Large pages make pinning and the GPU's translations faster. Without them it works as well.
        let _ = map.advise(Advice::HugePage);
        arena.base = NonNull::new(map.as_mut_ptr()).expect("a mapping is not at 0");
        arena.map = Some(map);
        Ok(arena)
    }

    /// An arena of `bytes` bytes that will not grow: [`with_capacity`](Self::with_capacity) and [`grow`](Self::grow).
    ///
    /// # Errors
    /// Theirs.
    pub fn reserve(context: &Context, bytes: usize, progress: impl FnMut(PinProgress)) -> Result<Self> {
        let mut arena = Self::with_capacity(context, bytes)?;
        arena.grow(bytes, progress)?;
        Ok(arena)
    }

    /// Appends `bytes` zeros, calling `progress` after each chunk of at most 256 MiB. All threads touch a chunk before it is
    /// pinned, since the driver alone would take its page faults one by one.
    ///
    /// Pinning makes every page real: the machine has that much less memory until the arena is dropped.
    ///
    /// # Errors
    /// [`DriverError::OutOfRange`] beyond the capacity, [`DriverError::PinnedMemoryRefused`] if the system lacks the memory,
    /// [`DriverError::NoSharedAddresses`], or a refused call. The arena is then as long as before, and what was pinned is
    /// given back.
    pub fn grow(&mut self, bytes: usize, mut progress: impl FnMut(PinProgress)) -> Result<()> {
        self.context.make_current()?;
        check_range("arena growth", self.len, bytes, self.capacity)?;
        let (len, before) = (self.len + bytes, self.ends.len());
        // The system pins whole pages, and each of them once: so whole ones are pinned, and the next growth may find its
        // first bytes pinned already.
        let end = len.next_multiple_of(TOUCH_BYTES).min(self.capacity);
        let first = self.len;
        while self.pinned() < len {
            let start = self.pinned();
            if let Err(error) = self.pin(start..end.min(start + CHUNK_BYTES), bytes) {
                self.unpin(before);
                return Err(error);
            }
            let pinned_bytes = self.pinned().min(len) - first;
            progress(PinProgress { pinned_bytes: pinned_bytes as u64, total_bytes: bytes as u64 });
        }
        self.len = len;
        Ok(())
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The most bytes that it can have.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Where it begins, on the host and on the GPU alike.
    ///
    /// To go through it is unsafe: the range is within the arena, and no reference to bytes lives while the GPU writes them.
    pub fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Where it begins on the GPU; the same number as [`as_ptr`](Self::as_ptr).
    pub fn device_address(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    /// The context that it belongs to.
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// Copies bytes out, from `offset` on. Bytes that the GPU is writing come out old or new.
    ///
    /// # Errors
    /// [`DriverError::OutOfRange`].
    pub fn read(&self, offset: usize, bytes: &mut [u8]) -> Result<()> {
        check_range("arena read", offset, bytes.len(), self.len)?;
        // SAFETY: the range is within the arena. The host writes it through &mut self or by the caller's own unsafe
        // code alone; the GPU may write it meanwhile, which atomic loads allow for.
        unsafe { load_bytes(self.pointer_at(offset), bytes) };
        Ok(())
    }

    /// Copies bytes in, to `offset` and on. A GPU that is reading there sees old or new bytes.
    ///
    /// # Errors
    /// [`DriverError::OutOfRange`].
    pub fn write(&mut self, offset: usize, bytes: &[u8]) -> Result<()> {
        check_range("arena write", offset, bytes.len(), self.len)?;
        // SAFETY: as in read, with &mut self.
        unsafe { store_bytes(self.pointer_at(offset), bytes) };
        Ok(())
    }

    /// The address of a byte, at most the end of the range.
    pub(super) fn pointer_at(&self, offset: usize) -> *mut u8 {
        debug_assert!(offset <= self.capacity);
        self.base.as_ptr().wrapping_add(offset)
    }

    /// The ranges to copy one by one: a copy that runs from one pinned chunk into the next may be refused.
    pub(super) fn pieces(
        &self,
        stream: &Stream,
        offset: usize,
        bytes: usize,
    ) -> Result<impl Iterator<Item = Range<usize>>> {
        self.context.check_same(stream.context(), "the arena")?;
        check_range("arena copy", offset, bytes, self.len)?;
        Ok(pieces(offset..offset + bytes, &self.ends))
    }

    /// Bytes that are pinned, from the start on.
    fn pinned(&self) -> usize {
        self.ends.last().copied().unwrap_or(0)
    }

    /// Makes the next chunk real and pins it, as a part of growing by `wanted` bytes.
    fn pin(&mut self, chunk: Range<usize>, wanted: usize) -> Result<()> {
        let pointer = self.pointer_at(chunk.start).cast();
        // SAFETY: mapped, zeros, and beyond what anyone else reads or writes: `len` grows after this.
        let new = unsafe { std::slice::from_raw_parts_mut(self.pointer_at(chunk.start), chunk.len()) };
        new.par_chunks_mut(TOUCH_BYTES).for_each(|part| part.fill(0));
        let flags = CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP;
        // SAFETY: the chunk is mapped, not yet registered, and stays mapped until drop has unregistered it.
        let code = unsafe { raw::cuMemHostRegister_v2(pointer, chunk.len(), flags) };
        if code != Code::SUCCESS {
            self.forget_bytes(chunk);
            let (wanted, pinned) = (wanted as u64, self.pinned().saturating_sub(self.len) as u64);
            let name = code_name(code);
            return Err(DriverError::PinnedMemoryRefused { wanted, pinned, code: code.0, name });
        }
        self.ends.push(chunk.end);
        let mut address = 0;
        // SAFETY: the chunk is registered; it writes one address.
        unsafe { call!(cuMemHostGetDevicePointer_v2(&raw mut address, pointer, 0)) }?;
        if address != pointer as u64 {
            return Err(DriverError::NoSharedAddresses { name: self.context.device().name.clone() });
        }
        Ok(())
    }

    /// Unpins all chunks but the first `keep`, of which nobody can have heard. One that the driver does not let go of
    /// stays pinned, for the next growth.
    fn unpin(&mut self, keep: usize) {
        while self.ends.len() > keep {
            let start = self.ends.len().checked_sub(2).map_or(0, |last| self.ends[last]);
            // SAFETY: the chunk was registered by pin, and beyond `len` nothing uses it.
            if unsafe { call!(cuMemHostUnregister(self.pointer_at(start).cast())) }.is_err() {
                return;
            }
            let end = self.ends.pop().expect("a chunk");
            self.forget_bytes(start..end);
        }
    }

    /// Gives memory beyond `len` that is not pinned back to the system. It is zeros if it is touched again.
    fn forget_bytes(&self, bytes: Range<usize>) {
        let map = self.map.as_ref().expect("an arena with capacity is mapped");
        // SAFETY: nobody holds a reference to these bytes, which are private and anonymous. A refusal changes nothing.
        let _ = unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, bytes.start, bytes.len()) };
    }
}

impl Drop for PinnedArena {
    fn drop(&mut self) {
        let mut unpinned = self.ends.is_empty();
        self.context.free_after_all_work(|| {
            // SAFETY: each chunk was registered by pin, and nothing is under way that could use it.
            let unpin = |start| unsafe { call!(cuMemHostUnregister(self.pointer_at(start).cast())) };
            let starts = iter::once(0).chain(self.ends.iter().copied()).take(self.ends.len());
            let results: Vec<_> = starts.map(unpin).collect();
            unpinned = results.iter().all(Result::is_ok);
        });
        if !unpinned {
            // The GPU may still know these addresses, so nothing else may ever be mapped there.
            std::mem::forget(self.map.take());
        }
    }
}

/// Cuts a range at `ends`, which ascend and of which the last is not below the range's.
fn pieces(range: Range<usize>, ends: &[usize]) -> impl Iterator<Item = Range<usize>> {
    let first = ends.partition_point(|end| *end <= range.start);
    let mut start = range.start;
    let cut = ends[first..].iter().map(move |end| {
        let piece = start..range.end.min(*end);
        start = piece.end;
        piece
    });
    cut.take_while(|piece| !piece.is_empty())
}

/// How many of `len` bytes at `pointer` come before the first whole word.
fn unaligned_head(pointer: *const u8, len: usize) -> usize {
    ((pointer as usize).wrapping_neg() % size_of::<u64>()).min(len)
}

/// Reads bytes that the GPU may be writing.
///
/// # Safety
/// `from` is valid for this many bytes, and no host thread writes them meanwhile.
unsafe fn load_bytes(from: *mut u8, to: &mut [u8]) {
    let head = unaligned_head(from, to.len());
    let (head, rest) = to.split_at_mut(head);
    let (words, tail) = rest.as_chunks_mut::<8>();
    // SAFETY: the caller vouches for the range; words start at a multiple of 8.
    unsafe {
        let load = |at: usize| AtomicU8::from_ptr(from.add(at)).load(Ordering::Relaxed);
        head.iter_mut().enumerate().for_each(|(i, byte)| *byte = load(i));
        let first = from.add(head.len()).cast::<u64>();
        for (i, word) in words.iter_mut().enumerate() {
            *word = AtomicU64::from_ptr(first.add(i)).load(Ordering::Relaxed).to_ne_bytes();
        }
        let done = head.len() + size_of_val(words);
        tail.iter_mut().enumerate().for_each(|(i, byte)| *byte = load(done + i));
    }
}

/// Writes bytes that the GPU may be reading.
///
/// # Safety
/// `to` is valid for this many bytes, and no host thread touches them meanwhile.
unsafe fn store_bytes(to: *mut u8, from: &[u8]) {
    let head = unaligned_head(to, from.len());
    let (head, rest) = from.split_at(head);
    let (words, tail) = rest.as_chunks::<8>();
    // SAFETY: the caller vouches for the range; words start at a multiple of 8.
    unsafe {
        let store = |at: usize, byte: u8| AtomicU8::from_ptr(to.add(at)).store(byte, Ordering::Relaxed);
        head.iter().enumerate().for_each(|(i, byte)| store(i, *byte));
        let first = to.add(head.len()).cast::<u64>();
        for (i, word) in words.iter().enumerate() {
            AtomicU64::from_ptr(first.add(i)).store(u64::from_ne_bytes(*word), Ordering::Relaxed);
        }
        let done = head.len() + size_of_val(words);
        tail.iter().enumerate().for_each(|(i, byte)| store(done + i, *byte));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_cut_where_chunks_meet() {
        let cut =
            |range| pieces(range, &[8, 16, 18, 24]).map(|piece| (piece.start, piece.end)).collect::<Vec<_>>();
        assert_eq!(cut(0..24), [(0, 8), (8, 16), (16, 18), (18, 24)]);
        assert_eq!(cut(3..17), [(3, 8), (8, 16), (16, 17)]);
        assert_eq!(cut(9..12), [(9, 12)]);
        assert_eq!(cut(8..16), [(8, 16)]);
        assert_eq!(cut(8..8), []);
        assert_eq!(cut(24..24), []);
    }

    #[test]
    fn bytes_are_copied_at_every_alignment_and_length() {
        let source: Vec<u8> = (1..=40).collect();
        for at in 0..9 {
            for len in 0..32 {
                let mut memory = [0u64; 8];
                let base = memory.as_mut_ptr().cast::<u8>();
                let mut back = vec![0; len];
                // SAFETY: at most 8 + 31 of 64 bytes, touched by this thread alone.
                unsafe {
                    store_bytes(base.add(at), &source[..len]);
                    load_bytes(base.add(at), &mut back);
                }
                assert_eq!(back, source[..len]);
                let all: &[u8] = bytemuck::cast_slice(&memory);
                assert_eq!(&all[at..at + len], &source[..len]);
                assert_eq!(all.iter().filter(|byte| **byte != 0).count(), len, "{len} bytes at {at}");
            }
        }
    }
}
