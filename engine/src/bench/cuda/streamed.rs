use spinkv::backend::cuda::driver::{Context, DeviceBuffer, PinnedArena, Stream};
use spinkv::memory::Word;

use crate::error::Result;

/// Bytes of host memory that stand for all of a context's, over and over: as much as needed to be far from any cache.
const SOURCE_BYTES: usize = 1 << 30;

/// Copies from pinned host memory as fast as the copy engine can.
#[derive(Debug)]
pub(super) struct Streamed {
    stream: Stream,
    source: PinnedArena,
    target: DeviceBuffer<Word>,
}

impl Streamed {
    pub fn new(context: &Context) -> Result<Self> {
        Ok(Self {
            stream: Stream::new(context)?,
            source: PinnedArena::reserve(context, SOURCE_BYTES, |_| {})?,
            target: DeviceBuffer::uninit(context, SOURCE_BYTES / size_of::<Word>())?,
        })
    }

    /// Async: copies `bytes` bytes, in pieces of the source's length.
    pub fn enqueue(&self, bytes: usize) -> Result<()> {
        for first in (0..bytes).step_by(SOURCE_BYTES) {
            let words = SOURCE_BYTES.min(bytes - first) / size_of::<Word>();
            self.target.copy_from_arena(&self.stream, 0, &self.source, 0, words)?;
        }
        Ok(())
    }

    /// Waits for it.
    pub fn wait(&self) -> Result<()> {
        Ok(self.stream.synchronize()?)
    }
}
