use spinkv_kernels::abi::{Entry, index_prompts, index_step, summary_parts};

use super::super::driver::{
    Argument, DeviceBuffer, Function, LaunchShape, Result, Stream, check_length, check_operand, launch_with,
};
use super::super::operators::SummaryRows;
use super::Kernels;
use super::offload::check_page;
use crate::memory::Word;

/// What Index makes of the keys of a partition, channel by channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IndexOperator {
    /// The mean: `chunk_mean`, `chunk_mean_step`.
    Mean,
    /// The least and the greatest: `chunk_bounds`, `chunk_bounds_step`.
    Bounds,
}

impl IndexOperator {
    /// Words of a summary for each word of a key.
    pub fn parts(self) -> u32 {
        match self {
            Self::Mean => summary_parts::MEAN,
            Self::Bounds => summary_parts::BOUNDS,
        }
    }
}

/// The kernels of one operator.
#[derive(Clone, Debug)]
pub(super) struct IndexFunctions {
    pub prompts: Function,
    pub step: Function,
}

/// Where summaries go, and what they are.
#[derive(Clone, Copy, Debug)]
pub struct SummaryTable<'a> {
    /// What the kernel makes of the keys.
    pub operator: IndexOperator,
    /// `[requests]`.
    pub entries: &'a DeviceBuffer<Entry>,
    /// Segments of all requests.
    pub directories: &'a DeviceBuffer<u32>,
    /// Row of KV head 0: layer * `kv_heads`.
    pub first_row: u32,
    /// Rows of a request: layers * `kv_heads`.
    pub request_rows: u32,
    /// KV heads.
    pub kv_heads: u32,
    /// Words of a key: head dim / 8.
    pub head_words: u32,
    /// Tokens of a partition.
    pub partition_tokens: u32,
    /// Partitions of a segment.
    pub segment_partitions: u32,
    /// `[segments, request_rows, segment_partitions, parts, head_words]`, bf16.
    pub summaries: &'a DeviceBuffer<Word>,
}

impl SummaryTable<'_> {
    /// Refuses entries that are none, and sizes that no model has.
    fn check(&self) -> Result<u32> {
        SummaryRows::from(*self).check()
    }
}

/// A launch of `chunk_mean` or `chunk_bounds`: summaries of a ragged batch of prompts, one layer.
#[derive(Clone, Copy, Debug)]
pub struct IndexPrompts<'a> {
    /// Where they go. Of an entry `directory`, `new_partition` and `new_partitions` are read.
    pub table: SummaryTable<'a>,
    /// `[tokens, kv_heads, head_words]` bf16 keys.
    pub keys: &'a DeviceBuffer<Word>,
    /// `[requests]`: where a request's token 0 lies in the keys.
    pub first_token: &'a DeviceBuffer<u32>,
    /// `[requests + 1]`, ascending, from 0: `new_partitions` of the requests before.
    pub first_chunk: &'a DeviceBuffer<u32>,
    /// The last of `first_chunk`: partitions of the batch.
    pub chunks: u32,
}

impl IndexPrompts<'_> {
    /// Async: the summaries are there when `stream` has come this far.
    ///
    /// # Errors
    /// [`Length`](super::super::driver::DriverError::Length) if entries, `first_token` and `first_chunk` disagree about the requests,
    /// [`Operand`](super::super::driver::DriverError::Operand) for no request, a size of 0, rows beyond the request's, or a batch
    /// beyond [`MAX_WORDS`](index_prompts::MAX_WORDS), [`OutOfRange`](super::super::driver::DriverError::OutOfRange) for
    /// summaries without room for a segment, or a failed launch. A batch without a partition launches nothing.
    ///
    /// # Safety
    /// When the launch runs, `first_chunk` ascends from 0 to `chunks` by the entries' `new_partitions`; the new partitions have
    /// their tokens in `keys`, their places in `directories` and their segments in `summaries`, no two of them one place; and until it
    /// has run nothing writes the keys or uses those summaries.
    pub unsafe fn launch(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        let SummaryTable { kv_heads, head_words, .. } = self.table;
        let requests = self.table.check()?;
        check_length("index first_token", requests as usize, self.first_token.len())?;
        check_length("index first_chunk", requests as usize + 1, self.first_chunk.len())?;
        let words = u128::from(self.chunks) * u128::from(kv_heads) * u128::from(head_words);
        let words = u64::try_from(words).unwrap_or(u64::MAX);
        check_operand("index chunks * kv_heads * head_words", words, 0..=index_prompts::MAX_WORDS.into())?;
        if self.chunks == 0 {
            return Ok(());
        }
        let arguments: [Argument; 13] = [
            self.keys.into(),
            self.table.entries.into(),
            self.first_token.into(),
            self.first_chunk.into(),
            self.table.directories.into(),
            requests.into(),
            self.table.first_row.into(),
            self.table.request_rows.into(),
            kv_heads.into(),
            head_words.into(),
            self.table.partition_tokens.into(),
            self.table.segment_partitions.into(),
            self.table.summaries.into(),
        ];
        let shape = LaunchShape::linear(index_prompts::grid(words as u32), index_prompts::BLOCK);
        let function = &kernels.index(self.table.operator).prompts;
        // SAFETY: order and types are the kernel's; the caller answers for the request tables.
        unsafe { launch_with(function, &shape, stream, arguments) }
    }
}

/// A launch of `chunk_mean_step` or `chunk_bounds_step`: summaries of the partitions that leave the steady zone in a
/// decode step, one layer.
#[derive(Clone, Copy, Debug)]
pub struct IndexStep<'a> {
    /// Where they go. Of an entry the steady list's numbers are read too.
    pub table: SummaryTable<'a>,
    /// Steady lists of all requests: physical pages.
    pub steady: &'a DeviceBuffer<u32>,
    /// `[pages, 2, page_tokens, head_words]`: GPU pages.
    pub pool: &'a DeviceBuffer<Word>,
    /// Tokens of a page.
    pub page_tokens: u32,
}

impl IndexStep<'_> {
    /// Async: the summaries are there when `stream` has come this far.
    ///
    /// # Errors
    /// [`Operand`](super::super::driver::DriverError::Operand) for no request, a size of 0 or rows beyond the request's,
    /// [`OutOfRange`](super::super::driver::DriverError::OutOfRange) for summaries without room for a segment or a pool without
    /// room for a page, or a failed launch.
    ///
    /// # Safety
    /// When the launch runs, the partitions that leave have all their tokens in steady pages, their places in `directories` and
    /// their segments in `summaries`, no two of them one place; an entry's `new_partitions * kv_heads * head_words` is below
    /// 2^31; and until it has run nothing writes those pages or uses those summaries.
    pub unsafe fn launch(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        let SummaryTable { kv_heads, head_words, .. } = self.table;
        let requests = self.table.check()?;
        check_operand("index page_tokens", self.page_tokens.into(), 1..=u32::MAX.into())?;
        check_page(["index page words"; 2], self.page_tokens, head_words, self.pool)?;
        let arguments: [Argument; 12] = [
            self.table.entries.into(),
            self.steady.into(),
            self.pool.into(),
            self.table.directories.into(),
            self.table.first_row.into(),
            self.table.request_rows.into(),
            kv_heads.into(),
            head_words.into(),
            self.page_tokens.into(),
            self.table.partition_tokens.into(),
            self.table.segment_partitions.into(),
            self.table.summaries.into(),
        ];
        let shape = LaunchShape::linear(requests, index_step::BLOCK).overlapping();
        let function = &kernels.index(self.table.operator).step;
        // SAFETY: order and types are the kernel's; the caller answers for the request tables.
        unsafe { launch_with(function, &shape, stream, arguments) }
    }
}
