//! Stacks of threads.
//!
//! To map one costs more than to run a small kernel, so stacks of earlier launches are kept.

use std::panic::resume_unwind;
use std::sync::Mutex;

use corosensei::stack::{DefaultStack, Stack, StackPointer};

use super::fault::LaunchError;

static KEPT: Mutex<Vec<ThreadStack>> = Mutex::new(Vec::new());
/// How many are kept.
const LIMIT: usize = 4096;
/// Their bytes altogether: as many of the default size.
const BYTE_LIMIT: usize = LIMIT * 128 * 1024;

/// What `offset` may take away.
const PAGE: usize = 4096;

/// Fits what the emulator itself puts onto a thread's stack, a panic included.
const SMALLEST: usize = 16 * 1024;
/// Far more than a kernel can want; the bytes of a stack and its offset still fit 32 bits.
const LARGEST: usize = 1 << 30;

/// A stack that begins at some cache line of its last page. If all began at a page's end, their tops would share a few sets of
/// the cache, and every turn of a thread would miss it.
pub(crate) struct ThreadStack {
    stack: DefaultStack,
    /// As asked for.
    bytes: usize,
    /// Bytes left free at its beginning, a multiple of the alignment.
    offset: usize,
}

// SAFETY: a part of a stack that has a guard page; `take` adds a page for what the offset takes away.
unsafe impl Stack for ThreadStack {
    fn base(&self) -> StackPointer {
        let base = self.stack.base().get() - self.offset;
        StackPointer::new(base).unwrap_or(self.stack.base())
    }
    fn limit(&self) -> StackPointer {
        self.stack.limit()
    }
    #[cfg(windows)]
    fn teb_fields(&self) -> corosensei::stack::StackTebFields {
        self.stack.teb_fields()
    }
    #[cfg(windows)]
    fn update_teb_fields(&mut self, stack_limit: usize, guaranteed_stack_bytes: usize) {
        self.stack.update_teb_fields(stack_limit, guaranteed_stack_bytes);
    }
}

/// Refuses a size that no stack can have.
pub(crate) fn check(bytes: usize) -> Result<(), LaunchError> {
    match bytes {
        ..SMALLEST => Err(LaunchError::StackTooSmall { bytes, limit: SMALLEST }),
        SMALLEST..=LARGEST => Ok(()),
        _ => Err(LaunchError::StackTooLarge { bytes, limit: LARGEST }),
    }
}

/// A stack of `bytes` bytes, a number that passed [`check`]. If the system refuses it, unwinds with a [`LaunchError`].
pub(crate) fn take(bytes: usize) -> ThreadStack {
    let kept = KEPT.lock().ok().and_then(|mut kept| {
        let at = kept.iter().rposition(|stack| stack.bytes == bytes)?;
        Some(kept.swap_remove(at))
    });
    kept.unwrap_or_else(|| {
        static MADE: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
        let number = MADE.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let stack = DefaultStack::new(bytes + PAGE).unwrap_or_else(|error| {
            let reason = error.kind();
            resume_unwind(Box::new(LaunchError::StackRefused { bytes, reason }))
        });
        ThreadStack { stack, bytes, offset: number * 7 % 64 * 64 }
    })
}

/// Keeps stacks for later launches.
pub(crate) fn keep(stacks: impl Iterator<Item = ThreadStack>) {
    if let Ok(mut kept) = KEPT.lock() {
        let mut bytes: usize = kept.iter().map(|stack| stack.bytes).sum();
        let fits = |stack: &ThreadStack| {
            bytes += stack.bytes;
            bytes <= BYTE_LIMIT
        };
        let room = LIMIT.saturating_sub(kept.len());
        kept.extend(stacks.take(room).take_while(fits));
    }
}
