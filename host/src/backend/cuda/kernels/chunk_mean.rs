use spinkv_kernels::abi::chunk_mean;

use super::super::driver::{
    Argument, DeviceBuffer, LaunchShape, Result, Stream, check_length, check_operand, check_range,
    launch_with,
};
use super::Kernels;
use crate::memory::Word;

/// A launch of `chunk_mean`: the mean key of each chunk of a ragged batch of prompts, one layer.
#[derive(Clone, Copy, Debug)]
pub struct ChunkMean<'a> {
    /// `[tokens, kv_heads, head_words]` bf16 keys.
    pub keys: &'a DeviceBuffer<Word>,
    /// `[requests]`: where a request's chunked keys begin.
    pub first_token: &'a DeviceBuffer<u32>,
    /// `[requests + 1]`, ascending, from 0: chunks of the requests before.
    pub first_chunk: &'a DeviceBuffer<u32>,
    /// The last of `first_chunk`: chunks of the batch.
    pub chunks: u32,
    /// KV heads.
    pub kv_heads: u32,
    /// Words of a key: head dim / 8.
    pub head_words: u32,
    /// Tokens of a chunk.
    pub chunk_tokens: u32,
    /// A request after another, each `[kv_heads, chunks, head_words]` bf16 means.
    pub summaries: &'a DeviceBuffer<Word>,
}

impl ChunkMean<'_> {
    /// Async: the summaries are there when `stream` has come this far.
    ///
    /// # Errors
    /// [`Length`](super::super::driver::DriverError::Length) if `first_token` and `first_chunk` disagree about the requests,
    /// [`Operand`](super::super::driver::DriverError::Operand) for no request, a size of 0, or a batch beyond
    /// [`MAX_SUMMARIES`](chunk_mean::MAX_SUMMARIES) or [`MAX_WORDS`](chunk_mean::MAX_WORDS),
    /// [`OutOfRange`](super::super::driver::DriverError::OutOfRange) for summaries that are too short, or a failed launch. A
    /// batch without a chunk launches nothing.
    ///
    /// # Safety
    /// When the launch runs, `first_chunk` ascends from 0 to `chunks`, and every request has the tokens of its chunks in
    /// `keys`; until it has run nothing writes the keys or uses the summaries.
    pub unsafe fn launch(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        let Self { chunks, kv_heads, head_words, chunk_tokens, .. } = *self;
        check_length("chunk_mean first_chunk", self.first_token.len() + 1, self.first_chunk.len())?;
        for (what, size) in [
            ("chunk_mean requests", self.first_token.len() as u64),
            ("chunk_mean kv_heads", kv_heads.into()),
            ("chunk_mean head_words", head_words.into()),
            ("chunk_mean chunk_tokens", chunk_tokens.into()),
        ] {
            check_operand(what, size, 1..=u32::MAX.into())?;
        }
        let rows = u64::from(chunks) * u64::from(kv_heads);
        check_operand("chunk_mean chunks * kv_heads", rows, 0..=chunk_mean::MAX_SUMMARIES.into())?;
        let words = rows * u64::from(head_words);
        check_operand("chunk_mean chunks * kv_heads * head_words", words, 0..=chunk_mean::MAX_WORDS.into())?;
        check_range("chunk_mean summaries", 0, words as usize, self.summaries.len())?;
        if chunks == 0 {
            return Ok(());
        }
        let arguments: [Argument; 8] = [
            self.keys.into(),
            self.first_token.into(),
            self.first_chunk.into(),
            (self.first_token.len() as u32).into(),
            kv_heads.into(),
            head_words.into(),
            chunk_tokens.into(),
            self.summaries.into(),
        ];
        let shape = LaunchShape::linear(chunk_mean::grid(rows as u32), chunk_mean::BLOCK);
        // SAFETY: order and types are the kernel's; the caller answers for the request tables.
        unsafe { launch_with(&kernels.chunk_mean, &shape, stream, arguments) }
    }
}
