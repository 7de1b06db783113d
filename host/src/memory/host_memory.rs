use std::fmt;

use rayon::prelude::*;

use super::{Allocator, Word};
use crate::Result;

/// Bytes that are made ready before progress is told.
const CHUNK_BYTES: usize = 1 << 30;

/// Bytes that one thread touches at a time: a huge page.
const TOUCH_BYTES: usize = 2 << 20;

/// How far host memory has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostProgress {
    /// Bytes that are ready.
    pub ready_bytes: u64,
    /// Bytes that will be.
    pub total_bytes: u64,
}

/// What the [`HostArena`](super::HostArena) cuts into slabs: plain memory for the CPU backend, pinned memory for a
/// GPU. Words are counted from 0 over all extensions.
///
/// It is read and written by copying, since a GPU may touch pinned memory at any time.
pub trait HostMemory: fmt::Debug + Send + Sync {
    /// Appends `words` words, in bounded chunks; `progress` hears of each.
    ///
    /// # Errors
    /// [`AllocationFailed`](crate::Error::AllocationFailed), or what the memory's own maker refuses; nothing is then appended.
    fn extend(&mut self, words: usize, progress: &mut dyn FnMut(HostProgress)) -> Result<()>;

    /// Copies words out, from `first` on. They lie within one extension.
    ///
    /// # Panics
    /// Out of range.
    fn read(&self, first: usize, to: &mut [Word]);

    /// Copies words in, to `first` and on. They lie within one extension.
    ///
    /// # Panics
    /// Out of range.
    fn write(&mut self, first: usize, from: &[Word]);
}

/// Ordinary zeroed memory.
#[derive(Debug, Default)]
pub struct PlainMemory {
    allocator: Allocator,
    first_touch: bool,
    words: usize,
    /// First word and words of each extension.
    extensions: Vec<(usize, Box<[Word]>)>,
}

impl PlainMemory {
    /// Memory that becomes real page by page, when it is first written.
    pub fn lazy(allocator: Allocator) -> Self {
        Self { allocator, ..Self::default() }
    }

    /// Memory that is made real at once by all threads, so that no step waits for the system's page faults.
    pub fn touched(allocator: Allocator) -> Self {
        Self { allocator, first_touch: true, ..Self::default() }
    }

    /// Whether what is appended from now on is made real at once.
    pub fn set_first_touch(&mut self, first_touch: bool) {
        self.first_touch = first_touch;
    }

    fn locate(&self, first: usize) -> (usize, usize) {
        let index = self.extensions.partition_point(|(start, _)| *start <= first) - 1;
        (index, first - self.extensions[index].0)
    }
}

impl HostMemory for PlainMemory {
    fn extend(&mut self, words: usize, progress: &mut dyn FnMut(HostProgress)) -> Result<()> {
        let mut storage: Box<[Word]> = self.allocator.zeroed(words, "host KV pages")?;
        let total_bytes = size_of_val(&*storage) as u64;
        let mut ready_bytes = 0;
        for chunk in storage.chunks_mut(CHUNK_BYTES / size_of::<Word>()) {
            if self.first_touch {
                chunk.par_chunks_mut(TOUCH_BYTES / size_of::<Word>()).for_each(|part| part.fill(0));
            }
            ready_bytes += size_of_val(chunk) as u64;
            progress(HostProgress { ready_bytes, total_bytes });
        }
        self.extensions.push((self.words, storage));
        self.words += words;
        Ok(())
    }

    fn read(&self, first: usize, to: &mut [Word]) {
        let (index, offset) = self.locate(first);
        to.copy_from_slice(&self.extensions[index].1[offset..offset + to.len()]);
    }

    fn write(&mut self, first: usize, from: &[Word]) {
        let (index, offset) = self.locate(first);
        self.extensions[index].1[offset..offset + from.len()].copy_from_slice(from);
    }
}
