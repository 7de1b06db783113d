use spinkv_kernels::abi::{Entry, SPREAD_WORDS, index_prompts, mark};

use super::super::driver::{
    Argument, DeviceBuffer, LaunchShape, Result, Stream, check_choice, check_length, check_operand,
    check_range, launch_with,
};
use super::Kernels;
use crate::memory::Word;

/// A launch of `chunk_spread`: how far the keys of each chunk spread about their mean, of a ragged batch of prompts, one layer.
#[derive(Clone, Copy, Debug)]
pub struct ChunkSpread<'a> {
    /// `[requests]`. `new_partition` is read.
    pub entries: &'a DeviceBuffer<Entry>,
    /// `[tokens, kv_heads, head_words]` bf16 keys.
    pub keys: &'a DeviceBuffer<Word>,
    /// `[requests]`: where a request's token 0 lies in the keys.
    pub first_token: &'a DeviceBuffer<u32>,
    /// `[requests + 1]`, ascending, from 0: chunks of the requests before.
    pub first_chunk: &'a DeviceBuffer<u32>,
    /// The last of `first_chunk`: chunks of the batch.
    pub chunks: u32,
    /// KV heads.
    pub kv_heads: u32,
    /// Words of a key, a power of two: head dim / 8.
    pub head_words: u32,
    /// Tokens of a chunk.
    pub chunk_tokens: u32,
    /// Room for a row's numbers.
    pub stride: u32,
    /// `[requests, kv_heads, stride]`: minus the least cosine between a key and the mean.
    pub spreads: &'a DeviceBuffer<f32>,
}

impl ChunkSpread<'_> {
    /// Async: the spreads are there when `stream` has come this far.
    ///
    /// # Errors
    /// [`Length`](super::super::driver::DriverError::Length) if entries, `first_token` and `first_chunk` disagree about the requests,
    /// [`Operand`](super::super::driver::DriverError::Operand) for no request, a size of 0 or a batch beyond [`MAX_WORDS`](index_prompts::MAX_WORDS),
    /// [`Choice`](super::super::driver::DriverError::Choice) for keys of a width that is none of [`SPREAD_WORDS`],
    /// [`OutOfRange`](super::super::driver::DriverError::OutOfRange) for too little room for the spreads, or a failed launch. A batch without a chunk launches nothing.
    ///
    /// # Safety
    /// When the launch runs, `first_chunk` ascends from 0 to `chunks`, at most `stride` of a request; the chunks have their tokens in
    /// `keys`; and until it has run nothing writes the keys or uses the spreads.
    pub unsafe fn launch(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        let Self { kv_heads, head_words, chunk_tokens, stride, .. } = *self;
        let (requests, most) = (self.entries.len(), u64::from(u32::MAX));
        check_operand("spread requests", requests as u64, 1..=most)?;
        check_length("spread first_token", requests, self.first_token.len())?;
        check_length("spread first_chunk", requests + 1, self.first_chunk.len())?;
        check_operand("spread kv_heads", kv_heads.into(), 1..=most)?;
        check_choice("spread head_words", head_words, &SPREAD_WORDS)?;
        check_operand("spread chunk_tokens", chunk_tokens.into(), 1..=most)?;
        let words = u128::from(self.chunks) * u128::from(kv_heads) * u128::from(head_words);
        let words = u64::try_from(words).unwrap_or(u64::MAX);
        check_operand("spread chunks * kv_heads * head_words", words, 0..=index_prompts::MAX_WORDS.into())?;
        let room = requests as u128 * u128::from(kv_heads) * u128::from(stride);
        check_range("spread spreads", 0, usize::try_from(room).unwrap_or(usize::MAX), self.spreads.len())?;
        if self.chunks == 0 {
            return Ok(());
        }
        let arguments: [Argument; 10] = [
            self.keys.into(),
            self.entries.into(),
            self.first_token.into(),
            self.first_chunk.into(),
            (requests as u32).into(),
            kv_heads.into(),
            head_words.into(),
            chunk_tokens.into(),
            stride.into(),
            self.spreads.into(),
        ];
        let shape = LaunchShape::linear(index_prompts::grid(words as u32), index_prompts::BLOCK);
        // SAFETY: order and types are the kernel's; the caller answers for the request tables.
        unsafe { launch_with(&kernels.chunk_spread, &shape, stream, arguments) }
    }
}

/// A launch of `mark`: lists of partitions as bits of each row, one layer.
#[derive(Clone, Copy, Debug)]
pub struct MarkPartitions<'a> {
    /// `[batch]`: where a request's marks are.
    pub entries: &'a DeviceBuffer<Entry>,
    /// `[batch * kv_heads, capacity]`: ascending, counted from the first partition that may be selected.
    pub ids: &'a DeviceBuffer<u32>,
    /// `[batch * kv_heads]`: how many.
    pub counts: &'a DeviceBuffer<u32>,
    /// Ids that a row has room for.
    pub capacity: u32,
    /// Row of KV head 0: layer * `kv_heads`.
    pub first_row: u32,
    /// KV heads.
    pub kv_heads: u32,
    /// Words of a row.
    pub words: u32,
    /// `[rows of all requests, words]`.
    pub marks: &'a DeviceBuffer<u32>,
}

impl MarkPartitions<'_> {
    /// Async: the marks are there when `stream` has come this far. An empty batch launches nothing.
    ///
    /// # Errors
    /// [`Operand`](super::super::driver::DriverError::Operand) for a size of 0 or rows beyond 31 bits, [`Length`](super::super::driver::DriverError::Length) for lists of another
    /// number of rows, [`OutOfRange`](super::super::driver::DriverError::OutOfRange) for marks without room for a request, or a failed launch.
    ///
    /// # Safety
    /// When the launch runs, ids are below `32 * words` and the entries' marks are in the table, no two of them one place; until it has
    /// run nothing writes the lists or uses those marks.
    pub unsafe fn launch(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        let Self { capacity, first_row, kv_heads, words, .. } = *self;
        let most = u64::from(u32::MAX);
        check_operand("mark kv_heads", kv_heads.into(), 1..=most)?;
        check_operand("mark words", words.into(), 1..=most)?;
        let rows = self.entries.len() as u64 * u64::from(kv_heads);
        check_operand("mark batch * kv_heads", rows, 0..=i32::MAX as u64)?;
        check_length("mark counts", rows as usize, self.counts.len())?;
        check_length("mark ids", rows as usize * capacity as usize, self.ids.len())?;
        let marked_rows = u64::from(first_row) + u64::from(kv_heads);
        let room = usize::try_from(u128::from(marked_rows) * u128::from(words)).unwrap_or(usize::MAX);
        check_range("mark marks", 0, room, self.marks.len())?;
        if rows == 0 {
            return Ok(());
        }
        let arguments: [Argument; 8] = [
            self.entries.into(),
            self.ids.into(),
            self.counts.into(),
            capacity.into(),
            first_row.into(),
            kv_heads.into(),
            words.into(),
            self.marks.into(),
        ];
        let shape = LaunchShape::linear(rows as u32, mark::BLOCK);
        // SAFETY: order and types are the kernel's; the caller answers for the entries and the lists.
        unsafe { launch_with(&kernels.mark, &shape, stream, arguments) }
    }
}
