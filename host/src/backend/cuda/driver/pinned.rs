use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use bytemuck::Pod;
use cust::sys::{CU_MEMHOSTALLOC_DEVICEMAP, CU_MEMHOSTALLOC_PORTABLE};

use super::error::code_name;
use super::raw::{self, Code, call};
use super::{Context, DriverError, Event, Result, Stream};

/// Host memory that the system keeps in place, so that copies to and from the GPU run at full speed beside the host. It is
/// cached like any other memory.
///
/// Dropping it waits for all work of the context.
#[derive(Debug)]
pub struct PinnedBuffer<T: Pod> {
    pointer: NonNull<T>,
    len: usize,
    context: Context,
}

// SAFETY: it owns its memory as a Vec does, and a context may be used from any thread.
unsafe impl<T: Pod + Send> Send for PinnedBuffer<T> {}
// SAFETY: as above.
unsafe impl<T: Pod + Sync> Sync for PinnedBuffer<T> {}

impl<T: Pod> PinnedBuffer<T> {
    /// `len` elements of zero bytes.
    ///
    /// # Errors
    /// [`DriverError::PinnedMemoryRefused`], or a refused call.
    pub fn zeroed(context: &Context, len: usize) -> Result<Self> {
        // Pinned memory comes in pages, of at least 4096 bytes.
        const { assert!(align_of::<T>() <= 4096) };
        context.make_current()?;
        let bytes = len.checked_mul(size_of::<T>());
        if bytes == Some(0) {
            return Ok(Self { pointer: NonNull::dangling(), len, context: context.clone() });
        }
        let mut pointer = std::ptr::null_mut();
        let flags = CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP;
        let code = match bytes {
            // SAFETY: it writes one pointer, which drop gives back.
            Some(bytes) => unsafe { raw::cuMemHostAlloc(&raw mut pointer, bytes, flags) },
            None => Code::OUT_OF_MEMORY,
        };
        let wanted = bytes.map_or(u64::MAX, |bytes| bytes as u64);
        let (Code::SUCCESS, Some(pointer)) = (code, NonNull::new(pointer.cast::<T>())) else {
            let name = code_name(code);
            return Err(DriverError::PinnedMemoryRefused { wanted, pinned: 0, code: code.0, name });
        };
        assert!(pointer.is_aligned(), "pinned memory at {pointer:?}");
        // SAFETY: the driver gave this many bytes, for our use alone.
        unsafe { pointer.write_bytes(0, len) };
        Ok(Self { pointer, len, context: context.clone() })
    }

    /// A copy of `elements`.
    ///
    /// # Errors
    /// As for [`zeroed`](Self::zeroed).
    pub fn from_slice(context: &Context, elements: &[T]) -> Result<Self> {
        let mut buffer = Self::zeroed(context, elements.len())?;
        buffer.copy_from_slice(elements);
        Ok(buffer)
    }

    pub(super) fn check_context(&self, stream: &Stream) -> Result<()> {
        self.context.check_same(stream.context(), "the pinned memory")
    }
}

impl<T: Pod> Deref for PinnedBuffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: len elements, initialised from the start. The GPU does not write them while self is in reach: a
        // transfer takes self until it is done.
        unsafe { std::slice::from_raw_parts(self.pointer.as_ptr(), self.len) }
    }
}

impl<T: Pod> DerefMut for PinnedBuffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in deref; the GPU does not read them either.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.as_ptr(), self.len) }
    }
}

impl<T: Pod> Drop for PinnedBuffer<T> {
    fn drop(&mut self) {
        if self.len * size_of::<T>() > 0 {
            self.context.free_after_all_work(|| {
                // SAFETY: allocated by zeroed, freed once, and nothing is under way that could use it.
                let _ = unsafe { call!(cuMemFreeHost(self.pointer.as_ptr().cast())) };
            });
        }
    }
}

/// What a transfer under way holds until it is done.
///
/// Dropped early, it waits, since what it holds does.
#[derive(Debug)]
#[must_use = "dropping it waits for all work; wait() gives the memory back"]
pub struct Pending<B> {
    held: B,
    done: Event,
}

impl<B> Pending<B> {
    /// For a transfer that was just given to `stream`.
    pub(super) fn new(held: B, done: Event, stream: &Stream) -> Result<Self> {
        done.record(stream)?;
        Ok(Self { held, done })
    }

    /// Whether the transfer is done.
    ///
    /// # Errors
    /// A refused call; the code of work that failed.
    pub fn is_done(&self) -> Result<bool> {
        self.done.is_reached()
    }

    /// The point in the stream at which the transfer is done, for other streams to wait for.
    pub fn done(&self) -> &Event {
        &self.done
    }

    /// Waits for the transfer and gives back what it held.
    ///
    /// # Errors
    /// A refused call; the code of work that failed.
    pub fn wait(self) -> Result<B> {
        self.done.synchronize()?;
        Ok(self.held)
    }
}
