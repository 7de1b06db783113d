use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use cust::sys::{CU_MEMHOSTREGISTER_DEVICEMAP, CU_MEMHOSTREGISTER_PORTABLE};
use memmap2::{Advice, MmapMut};

use super::error::{check_range, code_name};
use super::raw::{self, Code, call};
use super::{Context, DriverError, Result, Stream};

/// Bytes that are pinned in one call: so few that progress shows and a refusal comes early, so many that calls and pieces of
/// copies are rare.
const CHUNK_BYTES: usize = 1 << 30;

/// A large range of host memory that the GPU reads and writes at the host's own addresses: kernels load from it across the
/// bus, copy engines move it, and one base address and an offset reach all of it from both sides.
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
    /// From the start on.
    pinned: usize,
    /// `None` if it is empty.
    map: Option<MmapMut>,
    context: Context,
}

// SAFETY: it owns its memory, which is read through shared references by atomics alone.
unsafe impl Send for PinnedArena {}
// SAFETY: as above.
unsafe impl Sync for PinnedArena {}

/// How far [`PinnedArena::reserve`] has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PinProgress {
    /// Bytes that are pinned.
    pub pinned_bytes: u64,
    /// Bytes that will be.
    pub total_bytes: u64,
}

impl PinnedArena {
    /// Reserves and pins `bytes` of zeros, calling `progress` after each GiB.
    ///
    /// Pinning makes every page real: the machine has that much less memory until the arena is dropped.
    ///
    /// # Errors
    /// [`DriverError::AddressSpaceRefused`] if the system sees at once that it lacks the memory,
    /// [`DriverError::PinnedMemoryRefused`] if it refuses later on, [`DriverError::NoSharedAddresses`], or a refused
    /// call. What was pinned is given back.
    pub fn reserve(context: &Context, bytes: usize, mut progress: impl FnMut(PinProgress)) -> Result<Self> {
        context.make_current()?;
        let mut arena =
            Self { base: NonNull::dangling(), len: bytes, pinned: 0, map: None, context: context.clone() };
        if bytes == 0 {
            return Ok(arena);
        }
        let refused = |error: std::io::Error| DriverError::AddressSpaceRefused {
            wanted: bytes as u64,
            reason: error.to_string(),
        };
        let mut map = MmapMut::map_anon(bytes).map_err(refused)?;
        // Large pages make pinning and the GPU's translations faster. Without them it works as well.
        let _ = map.advise(Advice::HugePage);
        arena.base = NonNull::new(map.as_mut_ptr()).expect("a mapping is not at 0");
        arena.map = Some(map);
        for chunk in pieces(0..bytes, CHUNK_BYTES) {
            arena.pin(chunk)?;
            progress(PinProgress { pinned_bytes: arena.pinned as u64, total_bytes: bytes as u64 });
        }
        Ok(arena)
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
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

    /// The address of a byte, at most the arena's end.
    pub(super) fn pointer_at(&self, offset: usize) -> *mut u8 {
        debug_assert!(offset <= self.len);
        self.base.as_ptr().wrapping_add(offset)
    }

    /// The ranges to copy one by one: a copy that runs from one pinned chunk into the next may be refused.
    pub(super) fn pieces(
        &self,
        stream: &Stream,
        offset: usize,
        bytes: usize,
    ) -> Result<impl Iterator<Item = Range<usize>> + use<>> {
        self.context.check_same(stream.context(), "the arena")?;
        check_range("arena copy", offset, bytes, self.len)?;
        Ok(pieces(offset..offset + bytes, CHUNK_BYTES))
    }

    fn pin(&mut self, chunk: Range<usize>) -> Result<()> {
        let pointer = self.pointer_at(chunk.start).cast();
        let flags = CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP;
        // SAFETY: the chunk is mapped, not yet registered, and stays mapped until drop has unregistered it.
        let code = unsafe { raw::cuMemHostRegister_v2(pointer, chunk.len(), flags) };
        if code != Code::SUCCESS {
            let (wanted, pinned) = (self.len as u64, self.pinned as u64);
            let name = code_name(code);
            return Err(DriverError::PinnedMemoryRefused { wanted, pinned, code: code.0, name });
        }
        self.pinned = chunk.end;
        let mut address = 0;
        // SAFETY: the chunk is registered; it writes one address.
        unsafe { call!(cuMemHostGetDevicePointer_v2(&raw mut address, pointer, 0)) }?;
        if address != pointer as u64 {
            return Err(DriverError::NoSharedAddresses { name: self.context.device().name.clone() });
        }
        Ok(())
    }
}

impl Drop for PinnedArena {
    fn drop(&mut self) {
        let mut unpinned = self.pinned == 0;
        self.context.free_after_all_work(|| {
            // SAFETY: each chunk was registered by pin, and nothing is under way that could use it.
            let unpin = |start| unsafe { call!(cuMemHostUnregister(self.pointer_at(start).cast())) };
            let results: Vec<_> =
                pieces(0..self.pinned, CHUNK_BYTES).map(|chunk| unpin(chunk.start)).collect();
            unpinned = results.iter().all(Result::is_ok);
        });
        if !unpinned {
            // The GPU may still know these addresses, so nothing else may ever be mapped there.
            std::mem::forget(self.map.take());
        }
    }
}

/// Cuts a range at the multiples of `chunk`.
fn pieces(range: Range<usize>, chunk: usize) -> impl Iterator<Item = Range<usize>> {
    let mut start = range.start;
    std::iter::from_fn(move || {
        let end = (start / chunk + 1).saturating_mul(chunk).min(range.end);
        let piece = start..end;
        start = end;
        (!piece.is_empty()).then_some(piece)
    })
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
        let cut = |range| pieces(range, 8).map(|piece| (piece.start, piece.end)).collect::<Vec<_>>();
        assert_eq!(cut(0..24), [(0, 8), (8, 16), (16, 24)]);
        assert_eq!(cut(3..20), [(3, 8), (8, 16), (16, 20)]);
        assert_eq!(cut(9..12), [(9, 12)]);
        assert_eq!(cut(8..8), []);
        assert_eq!(cut(usize::MAX - 3..usize::MAX), [(usize::MAX - 3, usize::MAX)]);
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
