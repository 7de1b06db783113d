use spinkv::backend::cuda::driver::{Context, DeviceBuffer, PinnedArena, Stream};
use spinkv::memory::Word;

use crate::error::Result;

/// The most bytes of host memory that stand for all of a context's, over and over: far beyond any cache.
const SOURCE_BYTES: usize = 1 << 30;

/// Copies from pinned host memory as fast as the copy engine can.
#[derive(Debug)]
pub(super) struct Streamed {
    stream: Stream,
    source: PinnedArena,
    target: DeviceBuffer<Word>,
    bytes: usize,
}

impl Streamed {
    /// For copies of `bytes` bytes.
    pub fn new(context: &Context, bytes: usize) -> Result<Self> {
        let source = SOURCE_BYTES.min(bytes);
        Ok(Self {
            stream: Stream::new(context)?,
            source: PinnedArena::reserve(context, source, |_| {})?,
            target: DeviceBuffer::uninit(context, source / size_of::<Word>())?,
            bytes,
        })
    }

    /// Async: copies all bytes, in pieces of the source's length.
    pub fn enqueue(&self) -> Result<()> {
        for first in (0..self.bytes).step_by(SOURCE_BYTES) {
            let words = SOURCE_BYTES.min(self.bytes - first) / size_of::<Word>();
            self.target.copy_from_arena(&self.stream, 0, &self.source, 0, words)?;
        }
        Ok(())
    }

    /// Waits for it.
    pub fn wait(&self) -> Result<()> {
        Ok(self.stream.synchronize()?)
    }
}
