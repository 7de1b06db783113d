use std::collections::VecDeque;

use spinkv::backend::cuda::driver::{Context, DeviceBuffer, Pending, PinnedBuffer, Stream};
use spinkv::memory::Word;

use crate::error::Result;

/// Pinned buffers that take turns: while the GPU copies out of some, another is filled.
#[derive(Debug)]
pub(super) struct Staging {
    words: usize,
    free: Vec<PinnedBuffer<Word>>,
    /// In the stream's order.
    under_way: VecDeque<Pending<PinnedBuffer<Word>>>,
}

impl Staging {
    /// `buffers` buffers of `words` words each.
    pub fn new(context: &Context, buffers: usize, words: usize) -> Result<Self> {
        let free = (0..buffers).map(|_| Ok(PinnedBuffer::zeroed(context, words)?)).collect::<Result<_>>()?;
        Ok(Self { words, free, under_way: VecDeque::new() })
    }

    /// Async: writes `len` words from word `at` of `target` on. `fill` gives them piece by piece: it is told which word is the first of
    /// a piece, counted from 0, and fills all that it is handed. `sent` hears how many words were given to the stream.
    pub fn upload(
        &mut self,
        stream: &Stream,
        target: &DeviceBuffer<Word>,
        at: usize,
        len: usize,
        fill: impl Fn(usize, &mut [Word]),
        mut sent: impl FnMut(usize),
    ) -> Result<()> {
        for first in (0..len).step_by(self.words) {
            let mut buffer = match self.free.pop() {
                Some(free) => free,
                None => self.under_way.pop_front().expect("a buffer is free or under way").wait()?,
            };
            let piece = self.words.min(len - first);
            fill(first, &mut buffer[..piece]);
            self.under_way.push_back(target.upload_part(stream, at + first, buffer, piece)?);
            sent(piece);
        }
        Ok(())
    }
}
