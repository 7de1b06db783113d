//! A method's own Index and Select on the GPU, inside the captured step.
//!
//! A method brings them as [`Summarize::on_gpu`](crate::pipeline::Summarize::on_gpu) and [`Pick::on_gpu`](crate::pipeline::Pick::on_gpu). A backend
//! asks once whether there is an operator for its [`OperatorSizes`], loads it once (kernels, weights, tables of its own), and from then on has it
//! enqueue launches: of the partitions of a prompt's layer, of those that leave the steady zone in a decode step, and of a layer's Select.
//! The launches of decode steps are captured into a graph and replayed, those of prompts run on a stream beside the model's. So an operator
//!
//! - launches on the stream that it is given, and neither allocates nor waits while it does;
//! - takes nothing that changes from step to step from the host: tokens, partitions and limits are in the [`Entry`]s, in device memory. What it is
//!   given, buffers and numbers, is the same at every replay;
//! - passes over entries of 0 tokens, which fill a batch up;
//! - lets no launch go before its own end (`launch_dependents`) in a kernel that writes what the launch directly behind it reads, but for `score`'s queries: see
//!   [`Score::launch`];
//! - writes nothing of its own while it launches: a prompt's launches run beside those of a step. Scratch comes with the stage.
//!
//! A kernel of the method's own comes from its own PTX, by [`Module::from_ptx`](super::driver::Module::from_ptx), and is launched by
//! [`launch_with`](super::driver::launch_with). What is in the tree can be had as well: [`SelectStage`] is the ready-made launches of `score` and `select`, of
//! which an operator changes what it does otherwise. `examples/custom-method` is a whole one.

use std::fmt;

use spinkv_kernels::abi::Entry;

use super::driver::{DeviceBuffer, Result as DriverResult, Stream, check_operand, check_range};
use super::kernels::{
    IndexOperator, IndexPrompts, IndexStep, Kernels, Score, SelectPartitions, SummaryTable,
};
use crate::memory::Word;
use crate::{KvShape, Result};

/// For how much a backend is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct OperatorSizes {
    /// Layers, heads, elements of a head.
    pub shape: KvShape,
    /// The most requests of a step.
    pub requests: usize,
    /// Tokens of the longest request.
    pub max_tokens: usize,
    /// Tokens of a page.
    pub page_tokens: usize,
    /// Tokens of a partition.
    pub partition_tokens: usize,
    /// Elements of a summary, 8 a word; 0 without an Index.
    pub summary_width: usize,
    /// The most partitions that a row chooses from, rounded up to a multiple of 4: what lists of scores have room for.
    pub stride: usize,
    /// The most partitions that a row selects.
    pub capacity: usize,
}

/// Loads an operator for the context of a stream, once. Uploads are enqueued on that stream or waited for.
pub type Load<'a, T> = Box<dyn FnOnce(&Stream) -> Result<Box<T>> + 'a>;

/// Loads an Index.
pub type LoadIndex<'a> = Load<'a, dyn GpuIndex>;

/// Loads a Select.
pub type LoadSelect<'a> = Load<'a, dyn GpuSelect>;

/// A method's own Index on the GPU.
pub trait GpuIndex: fmt::Debug + Send + Sync {
    /// Async: writes the summaries of the partitions that a prompt's layer has outside the steady zone, if there are any.
    ///
    /// # Errors
    /// A launch that is refused.
    ///
    /// # Safety
    /// When the launches run, `stage` is what it says: keys and tables exist for all partitions; until they have run nothing writes the keys or
    /// uses the summaries.
    unsafe fn prompt(&self, kernels: &Kernels, stream: &Stream, stage: &PromptIndex<'_>) -> DriverResult<()>;

    /// Async: writes the summaries of the partitions that leave the steady zone in a decode step: in most steps none.
    ///
    /// # Errors
    /// As for [`prompt`](Self::prompt).
    ///
    /// # Safety
    /// When the launches run, the partitions that the entries name have all their keys in steady pages, and places for their summaries.
    unsafe fn step(&self, kernels: &Kernels, stream: &Stream, stage: &StepIndex<'_>) -> DriverResult<()>;

    /// Bytes that it holds on the GPU.
    fn bytes(&self) -> u64 {
        0
    }
}

/// A method's own Select on the GPU.
pub trait GpuSelect: fmt::Debug + Send + Sync {
    /// Words of scratch, of 16 bytes, that a row of a step needs; a row is a KV head of an entry.
    fn scratch_words(&self) -> usize {
        0
    }

    /// Async: writes `stage.select.ids`, ascending, and `stage.select.selected`, the counts, of each row: within the entry's partitions, and at
    /// most its limit. Of an entry of 0 tokens the count is 0.
    ///
    /// # Errors
    /// A launch that is refused.
    ///
    /// # Safety
    /// When the launches run, `stage` is what it says; until they have run nothing else uses what they read and write.
    unsafe fn select(&self, kernels: &Kernels, stream: &Stream, stage: &SelectStage<'_>) -> DriverResult<()>;

    /// Bytes that it holds on the GPU.
    fn bytes(&self) -> u64 {
        0
    }
}

/// Where the summaries of a layer go: of partition `p` of KV head `h` of a request to `summaries[((segment * request_rows + first_row + h) *
/// segment_partitions + p % segment_partitions) * summary_words ..]`, with `segment = directories[entry.directory + p / segment_partitions]`.
#[derive(Clone, Copy, Debug)]
pub struct SummaryRows<'a> {
    /// `[requests]`: `new_partition` and `new_partitions` are what is to be summarised.
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
    /// Words of a summary.
    pub summary_words: u32,
    /// `[segments, request_rows, segment_partitions, summary_words]`, bf16.
    pub summaries: &'a DeviceBuffer<Word>,
}

impl<'a> SummaryRows<'a> {
    /// Refuses entries that are none, and sizes that no model has: what every launch over these rows can know. Returns the requests.
    ///
    /// # Errors
    /// [`Operand`](super::driver::DriverError::Operand) for no request, a size of 0 or rows beyond the request's,
    /// [`OutOfRange`](super::driver::DriverError::OutOfRange) for summaries without room for a segment.
    pub fn check(&self) -> DriverResult<u32> {
        let requests = self.entries.len();
        for (what, size) in [
            ("index requests", requests as u64),
            ("index kv_heads", self.kv_heads.into()),
            ("index head_words", self.head_words.into()),
            ("index partition_tokens", self.partition_tokens.into()),
            ("index segment_partitions", self.segment_partitions.into()),
        ] {
            check_operand(what, size, 1..=u32::MAX.into())?;
        }
        // The layer's rows are rows of the request.
        let last = u64::from(self.first_row) + u64::from(self.kv_heads);
        check_operand("index first_row + kv_heads", last, 1..=self.request_rows.into())?;
        // One segment at least: more are the directories' to name.
        let rows = u128::from(self.request_rows) * u128::from(self.segment_partitions);
        let words = usize::try_from(rows * u128::from(self.summary_words)).unwrap_or(usize::MAX);
        check_range("index summaries of a segment", 0, words, self.summaries.len())?;
        Ok(requests as u32)
    }

    /// The same for an operator in the tree, which makes summaries of its own width.
    pub fn table(&self, operator: IndexOperator) -> SummaryTable<'a> {
        let Self { entries, directories, first_row, request_rows, kv_heads, head_words, .. } = *self;
        let Self { partition_tokens, segment_partitions, summaries, .. } = *self;
        SummaryTable {
            operator,
            entries,
            directories,
            first_row,
            request_rows,
            kv_heads,
            head_words,
            partition_tokens,
            segment_partitions,
            summaries,
        }
    }
}

impl<'a> From<SummaryTable<'a>> for SummaryRows<'a> {
    fn from(table: SummaryTable<'a>) -> Self {
        let SummaryTable { operator, entries, directories, first_row, request_rows, kv_heads, .. } = table;
        let SummaryTable { head_words, partition_tokens, segment_partitions, summaries, .. } = table;
        let summary_words = operator.parts().saturating_mul(head_words);
        Self {
            entries,
            directories,
            first_row,
            request_rows,
            kv_heads,
            head_words,
            partition_tokens,
            segment_partitions,
            summary_words,
            summaries,
        }
    }
}

/// What Index of a prompt's layer works from. The batch is ragged; the backend's are of one prompt.
#[derive(Clone, Copy, Debug)]
pub struct PromptIndex<'a> {
    /// Where summaries go.
    pub rows: SummaryRows<'a>,
    /// `[tokens, kv_heads, head_words]` bf16 keys of all requests, end to end.
    pub keys: &'a DeviceBuffer<Word>,
    /// `[requests]`: where a request's token 0 lies in the keys.
    pub first_token: &'a DeviceBuffer<u32>,
    /// `[requests + 1]`, ascending, from 0: `new_partitions` of the requests before.
    pub first_partition: &'a DeviceBuffer<u32>,
    /// The last of `first_partition`: partitions of the batch. Prompts are not captured, so that it is the host's to know.
    pub partitions: u32,
}

/// What Index of a decode step's layer works from.
#[derive(Clone, Copy, Debug)]
pub struct StepIndex<'a> {
    /// Where summaries go.
    pub rows: SummaryRows<'a>,
    /// Steady lists of all requests: physical pages, at [`Entry::steady_place`](spinkv_kernels::abi::Entry).
    pub steady: &'a DeviceBuffer<u32>,
    /// `[pages, 2, page_tokens, head_words]`: GPU pages, keys and then values.
    pub pool: &'a DeviceBuffer<Word>,
    /// Tokens of a page.
    pub page_tokens: u32,
}

/// What Select of a layer works from: the launches in the tree, as they would run for summaries as wide as a query and a softmax whose
/// greatest head counts, and scratch. An operator launches them with its own parts in the place of some, or reads their fields and launches
/// something else.
#[derive(Clone, Copy, Debug)]
pub struct SelectStage<'a> {
    /// The queries are the last ones of the entries; `head_words` are a summary's.
    pub score: Score<'a>,
    /// The ids that it writes are what Retrieve reads.
    pub select: SelectPartitions<'a>,
    /// `[batch * kv_heads]` times [`GpuSelect::scratch_words`].
    pub scratch: &'a DeviceBuffer<Word>,
    /// Which request of the step's batch is the first here: 0, or the first of the second half.
    pub first_request: usize,
}

/// The Index of a [`LayerStep`](super::LayerStep).
#[derive(Clone, Copy, Debug)]
pub enum LayerIndex<'a> {
    /// One in the tree.
    InTree(IndexStep<'a>),
    /// A method's own.
    Own(&'a dyn GpuIndex, StepIndex<'a>),
}

impl<'a> From<IndexStep<'a>> for LayerIndex<'a> {
    fn from(step: IndexStep<'a>) -> Self {
        Self::InTree(step)
    }
}

impl<'a> LayerIndex<'a> {
    /// What it works from.
    pub(super) fn stage(&self) -> StepIndex<'a> {
        match *self {
            Self::InTree(IndexStep { table, steady, pool, page_tokens }) => {
                StepIndex { rows: table.into(), steady, pool, page_tokens }
            }
            Self::Own(_, stage) => stage,
        }
    }

    /// Async: the summaries are there when `stream` has come this far.
    ///
    /// # Errors
    /// A launch that is refused.
    ///
    /// # Safety
    /// As for [`IndexStep::launch`] and [`GpuIndex::step`].
    pub unsafe fn launch(&self, kernels: &Kernels, stream: &Stream) -> DriverResult<()> {
        // SAFETY: the caller's part.
        unsafe {
            match self {
                Self::InTree(step) => step.launch(kernels, stream),
                Self::Own(operator, stage) => operator.step(kernels, stream, stage),
            }
        }
    }
}

/// The Select of a [`LayerStep`](super::LayerStep).
#[derive(Clone, Copy, Debug)]
pub enum LayerSelect<'a> {
    /// The launches in the tree.
    InTree(Score<'a>, SelectPartitions<'a>),
    /// A method's own.
    Own(&'a dyn GpuSelect, SelectStage<'a>),
}

impl<'a> From<(Score<'a>, SelectPartitions<'a>)> for LayerSelect<'a> {
    fn from((score, select): (Score<'a>, SelectPartitions<'a>)) -> Self {
        Self::InTree(score, select)
    }
}

impl<'a> LayerSelect<'a> {
    /// What it works from: the launches in the tree, whoever launches them.
    pub fn launches(&self) -> (&Score<'a>, &SelectPartitions<'a>) {
        match self {
            Self::InTree(score, select) | Self::Own(_, SelectStage { score, select, .. }) => (score, select),
        }
    }

    /// Async: the ids are there when `stream` has come this far. `behind` is called after each launch in the tree, and after a method's own.
    ///
    /// # Errors
    /// A launch that is refused, and `behind`'s.
    ///
    /// # Safety
    /// As for the launches, and [`GpuSelect::select`]; `behind` touches nothing of theirs.
    pub unsafe fn launch(
        &self,
        kernels: &Kernels,
        stream: &Stream,
        behind: impl Fn(&Stream) -> DriverResult<()>,
    ) -> DriverResult<()> {
        // SAFETY: the caller's part.
        unsafe {
            match self {
                Self::InTree(score, select) => {
                    score.launch(kernels, stream)?;
                    behind(stream)?;
                    select.launch(kernels, stream)?;
                }
                Self::Own(operator, stage) => operator.select(kernels, stream, stage)?,
            }
        }
        behind(stream)
    }
}

/// A prompt's Index.
#[derive(Clone, Copy, Debug)]
pub(super) enum PromptLaunch<'a> {
    InTree(IndexOperator, PromptIndex<'a>),
    Own(&'a dyn GpuIndex, PromptIndex<'a>),
}

impl PromptLaunch<'_> {
    /// # Safety
    /// As for [`IndexPrompts::launch`] and [`GpuIndex::prompt`].
    pub unsafe fn launch(&self, kernels: &Kernels, stream: &Stream) -> DriverResult<()> {
        // SAFETY: the caller's part.
        unsafe {
            match *self {
                Self::InTree(
                    operator,
                    PromptIndex { rows, keys, first_token, first_partition, partitions },
                ) => {
                    let (table, first_chunk, chunks) = (rows.table(operator), first_partition, partitions);
                    IndexPrompts { table, keys, first_token, first_chunk, chunks }.launch(kernels, stream)
                }
                Self::Own(operator, stage) => operator.prompt(kernels, stream, &stage),
            }
        }
    }
}
