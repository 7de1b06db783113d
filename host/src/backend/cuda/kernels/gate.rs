use spinkv_kernels::abi::{Entry, gate};

use super::super::driver::{
    Argument, DeviceBuffer, LaunchShape, Result, Stream, check_choice, check_length, check_multiple,
    check_operand, check_range, launch_with,
};
use super::super::operators::{PromptIndex, StepIndex, SummaryRows};
use super::Kernels;
use super::offload::check_page;
use crate::memory::Word;

/// One projection of learned gates, of all layers and KV heads, and how heads are turned before and behind it.
#[derive(Clone, Copy, Debug)]
pub struct GateWeights<'a> {
    /// `[layers * kv_heads, input words, rank]`, bf16: of the eight inputs of a word to one output.
    pub weights: &'a DeviceBuffer<Word>,
    /// Outputs: a multiple of 16 up to 256.
    pub rank: u32,
    /// `[layers, rank]`: the weights of a norm behind the projection.
    pub norm: Option<&'a DeviceBuffer<f32>>,
    /// Of the norm.
    pub eps: f32,
    /// `[head_dim / 2]`: by which the model turns heads.
    pub frequencies: &'a DeviceBuffer<f32>,
    /// Of that.
    pub magnitude: f32,
    /// `[rank / 2]`: by which what comes out turns.
    pub gate_frequencies: &'a DeviceBuffer<f32>,
    /// Of that.
    pub gate_magnitude: f32,
}

impl GateWeights<'_> {
    /// Refuses weights that are not those of `request_rows` rows with `input_words` words of inputs.
    fn check(&self, head_words: u32, input_words: u32, request_rows: u32, kv_heads: u32) -> Result<()> {
        let rank = self.rank;
        check_operand("gate rank", rank.into(), 1..=gate::MAX_RANK.into())?;
        check_multiple("gate rank", rank.into(), gate::RANK_STEP.into())?;
        check_choice("gate head_words", head_words, &gate::HEAD_WORDS)?;
        let rows = u64::from(request_rows) * u64::from(input_words) * u64::from(rank);
        check_operand("gate weights of all rows", rows, 1..=i32::MAX as u64)?;
        check_length("gate weights", rows as usize, self.weights.len())?;
        check_length("gate frequencies", 4 * head_words as usize, self.frequencies.len())?;
        check_length("gate gate_frequencies", rank as usize / 2, self.gate_frequencies.len())?;
        if let Some(norm) = self.norm {
            check_length("gate norm", (request_rows / kv_heads * rank) as usize, norm.len())?;
        }
        Ok(())
    }

    /// The parameters that all kernels of gates have, in their order.
    fn arguments(&self) -> [Argument; 9] {
        [
            self.frequencies.into(),
            (1.0 / self.magnitude).into(),
            self.weights.into(),
            self.rank.into(),
            // Without norms it is not read.
            self.norm.unwrap_or(self.frequencies).into(),
            u32::from(self.norm.is_some()).into(),
            self.eps.into(),
            self.gate_frequencies.into(),
            self.gate_magnitude.into(),
        ]
    }

    /// Refuses summaries of another width than the rank's.
    fn check_rows(&self, rows: &SummaryRows<'_>) -> Result<u32> {
        let requests = rows.check()?;
        self.check(rows.head_words, 3 * rows.head_words, rows.request_rows, rows.kv_heads)?;
        check_length("gate summary words", self.rank as usize / 8, rows.summary_words as usize)?;
        Ok(requests)
    }
}

const SHAPE: LaunchShape = LaunchShape {
    grid: [1; 3],
    block: [gate::BLOCK, 1, 1],
    shared_bytes: gate::SHARED_BYTES,
    overlaps: false,
};

/// Of `first` and `second` numbers all, one behind the other.
fn joined<const A: usize, const B: usize, const N: usize>(
    first: [Argument; A],
    second: [Argument; B],
) -> [Argument; N] {
    let mut all = [Argument::from(0u32); N];
    all[..A].copy_from_slice(&first);
    all[A..].copy_from_slice(&second);
    all
}

/// A launch of `gate_key`: the gate keys of the partitions of a ragged batch of prompts, one layer.
#[derive(Clone, Copy, Debug)]
pub struct GateKeys<'a> {
    /// The projection of keys: of the greatest, the least and the mean.
    pub gate: GateWeights<'a>,
    /// Where keys are, and where summaries go.
    pub stage: PromptIndex<'a>,
}

impl GateKeys<'_> {
    /// Async: the gate keys are there when `stream` has come this far. A batch without a partition launches nothing.
    ///
    /// # Errors
    /// What [`SummaryRows::check`] refuses; [`Operand`](super::super::driver::DriverError::Operand),
    /// [`Multiple`](super::super::driver::DriverError::Multiple) or [`Choice`](super::super::driver::DriverError::Choice) for a rank, a head or a batch that the kernel
    /// does not take, [`Length`](super::super::driver::DriverError::Length) for weights, norms, frequencies or summaries of other sizes, or a
    /// failed launch.
    ///
    /// # Safety
    /// As for [`IndexPrompts::launch`](super::IndexPrompts::launch).
    pub unsafe fn launch(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        let Self { gate, stage: PromptIndex { rows, keys, first_token, first_partition, partitions } } =
            *self;
        let requests = gate.check_rows(&rows)?;
        check_length("gate first_token", requests as usize, first_token.len())?;
        check_length("gate first_partition", requests as usize + 1, first_partition.len())?;
        let blocks = u64::from(partitions) * u64::from(rows.kv_heads);
        check_operand("gate partitions * kv_heads", blocks, 0..=i32::MAX as u64)?;
        if partitions == 0 {
            return Ok(());
        }
        let arguments: [Argument; 12] = [
            keys.into(),
            rows.entries.into(),
            first_token.into(),
            first_partition.into(),
            rows.directories.into(),
            requests.into(),
            rows.first_row.into(),
            rows.request_rows.into(),
            rows.kv_heads.into(),
            rows.head_words.into(),
            rows.partition_tokens.into(),
            rows.segment_partitions.into(),
        ];
        let arguments: [Argument; 21] = joined(arguments, gate.arguments());
        let arguments: [Argument; 22] = joined(arguments, [rows.summaries.into()]);
        let shape = LaunchShape { grid: [blocks as u32, 1, 1], ..SHAPE };
        // SAFETY: order and types are the kernel's; the caller answers for the request tables.
        unsafe { launch_with(&kernels.gate_key, &shape, stream, arguments) }
    }
}

/// A launch of `gate_key_step`: the gate keys of the partitions that leave the steady zone in a decode step, one layer.
#[derive(Clone, Copy, Debug)]
pub struct GateKeysStep<'a> {
    /// The projection of keys.
    pub gate: GateWeights<'a>,
    /// Where keys are, and where summaries go.
    pub stage: StepIndex<'a>,
}

impl GateKeysStep<'_> {
    /// Async: the gate keys are there when `stream` has come this far.
    ///
    /// # Errors
    /// As for [`GateKeys::launch`]; [`OutOfRange`](super::super::driver::DriverError::OutOfRange) for a pool without room for a page.
    ///
    /// # Safety
    /// As for [`IndexStep::launch`](super::IndexStep::launch).
    pub unsafe fn launch(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        let Self { gate, stage: StepIndex { rows, steady, pool, page_tokens } } = *self;
        let requests = gate.check_rows(&rows)?;
        check_operand("gate page_tokens", page_tokens.into(), 1..=u32::MAX.into())?;
        check_page(["gate page words"; 2], page_tokens, rows.head_words, pool)?;
        let blocks = u64::from(requests) * u64::from(rows.kv_heads);
        check_operand("gate batch * kv_heads", blocks, 1..=i32::MAX as u64)?;
        let arguments: [Argument; 11] = [
            rows.entries.into(),
            steady.into(),
            pool.into(),
            rows.directories.into(),
            rows.first_row.into(),
            rows.request_rows.into(),
            rows.kv_heads.into(),
            rows.head_words.into(),
            page_tokens.into(),
            rows.partition_tokens.into(),
            rows.segment_partitions.into(),
        ];
        let arguments: [Argument; 20] = joined(arguments, gate.arguments());
        let arguments: [Argument; 21] = joined(arguments, [rows.summaries.into()]);
        let shape = LaunchShape { grid: [blocks as u32, 1, 1], ..SHAPE }.overlapping();
        // SAFETY: order and types are the kernel's; the caller answers for the entries and the tables.
        unsafe { launch_with(&kernels.gate_key_step, &shape, stream, arguments) }
    }
}

/// A launch of `gate_query`: the gate queries of a decode step, one layer.
#[derive(Clone, Copy, Debug)]
pub struct GateQueries<'a> {
    /// The projection of queries: of a group's, one behind the other.
    pub gate: GateWeights<'a>,
    /// `[batch]`.
    pub entries: &'a DeviceBuffer<Entry>,
    /// `[batch, kv_heads * group, head_words]` bf16.
    pub queries: &'a DeviceBuffer<Word>,
    /// Whose weights.
    pub layer: u32,
    /// Rows of a request: layers x KV heads.
    pub request_rows: u32,
    /// KV heads.
    pub kv_heads: u32,
    /// Query heads of a KV head.
    pub group: u32,
    /// Words of a query: head dim / 8.
    pub head_words: u32,
    /// `[batch * kv_heads, rank / 8]` bf16, or more.
    pub gate_queries: &'a DeviceBuffer<Word>,
}

impl GateQueries<'_> {
    /// Async: the gate queries are there when `stream` has come this far. An empty batch launches nothing.
    ///
    /// # Errors
    /// [`Operand`](super::super::driver::DriverError::Operand), [`Multiple`](super::super::driver::DriverError::Multiple) or
    /// [`Choice`](super::super::driver::DriverError::Choice) for a size that the kernel does not take, [`Length`](super::super::driver::DriverError::Length) for weights, norms or
    /// frequencies of other sizes, [`OutOfRange`](super::super::driver::DriverError::OutOfRange) for a buffer that is too short, or a
    /// failed launch.
    ///
    /// # Safety
    /// Until the launch has run nothing writes what it reads, and nothing uses what it writes.
    pub unsafe fn launch(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        let Self { gate, entries, queries, layer, request_rows, kv_heads, group, head_words, .. } = *self;
        check_operand("gate kv_heads", kv_heads.into(), 1..=u32::MAX.into())?;
        check_operand("gate group", group.into(), 1..=gate::MAX_GROUP.into())?;
        let rows_of_layers = (u64::from(layer) + 1) * u64::from(kv_heads);
        check_operand("gate (layer + 1) * kv_heads", rows_of_layers, 1..=request_rows.into())?;
        // Before the product, which a wrong width could carry beyond 32 bits.
        check_choice("gate head_words", head_words, &gate::HEAD_WORDS)?;
        gate.check(head_words, group * head_words, request_rows, kv_heads)?;
        let rows = entries.len() as u64 * u64::from(kv_heads);
        check_operand("gate batch * kv_heads", rows, 0..=i32::MAX as u64)?;
        check_range("gate queries", 0, rows as usize * (group * head_words) as usize, queries.len())?;
        check_range("gate gate_queries", 0, rows as usize * gate.rank as usize / 8, self.gate_queries.len())?;
        if rows == 0 {
            return Ok(());
        }
        let arguments: [Argument; 6] = [
            entries.into(),
            queries.into(),
            (layer * kv_heads).into(),
            kv_heads.into(),
            group.into(),
            head_words.into(),
        ];
        let arguments: [Argument; 15] = joined(arguments, gate.arguments());
        let arguments: [Argument; 16] = joined(arguments, [self.gate_queries.into()]);
        let shape = LaunchShape { grid: [rows as u32, 1, 1], ..SHAPE }.overlapping();
        // SAFETY: order and types are the kernel's; all sizes were checked, and the caller answers for who else uses the buffers.
        unsafe { launch_with(&kernels.gate_query, &shape, stream, arguments) }
    }
}
