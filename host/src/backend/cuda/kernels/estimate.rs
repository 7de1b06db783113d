use spinkv_kernels::abi::attend::{MAX_GROUP, blocks_of_group};
use spinkv_kernels::abi::{Entry, estimate, page_biases};

use super::super::driver::{
    Argument, DeviceBuffer, LaunchShape, Result, Stream, check_choice, check_operand, check_range,
    launch_with,
};
use super::Kernels;
use crate::memory::Word;

/// Numbers of the partitions of all requests' clusters, as a step reads them, one layer.
#[derive(Clone, Copy, Debug)]
pub struct ClusterNumbers<'a> {
    /// Segments of the requests, as the entries say.
    pub directories: &'a DeviceBuffer<u32>,
    /// Row of KV head 0: layer * `kv_heads`.
    pub first_row: u32,
    /// Rows of a request: layers x KV heads.
    pub request_rows: u32,
    /// Partitions of a segment.
    pub segment_partitions: u32,
    /// `[segments, request_rows, segment_partitions]`: tokens of partitions.
    pub partition_tokens: &'a DeviceBuffer<u32>,
    /// `[segments, request_rows, segment_partitions, head_words]`: their mean values, bf16.
    pub value_means: &'a DeviceBuffer<Word>,
}

impl ClusterNumbers<'_> {
    fn check(&self, kv_heads: u32) -> Result<()> {
        let rows = u64::from(self.first_row) + u64::from(kv_heads);
        check_operand("clusters first_row + kv_heads", rows, 1..=self.request_rows.into())?;
        check_operand("clusters segment_partitions", self.segment_partitions.into(), 1..=u32::MAX.into())
    }
}

/// A launch of `page_biases`: what [`Attend`](super::Attend) adds to the logits of pages that are not full.
#[derive(Clone, Copy, Debug)]
pub struct PageBiases<'a> {
    /// `[batch]`.
    pub entries: &'a DeviceBuffer<Entry>,
    /// KV heads.
    pub kv_heads: u32,
    /// `[batch * kv_heads, capacity]`: selected partitions.
    pub ids: &'a DeviceBuffer<u32>,
    /// `[batch * kv_heads]`.
    pub id_counts: &'a DeviceBuffer<u32>,
    /// Ids that a row has room for.
    pub capacity: u32,
    /// Where their numbers lie.
    pub clusters: ClusterNumbers<'a>,
    /// Tokens of a page.
    pub page_tokens: u32,
    /// `[batch * kv_heads, capacity, page_tokens]`.
    pub biases: &'a DeviceBuffer<f32>,
}

impl PageBiases<'_> {
    /// Async: the biases are there when `stream` has come this far. An empty batch launches nothing.
    ///
    /// # Errors
    /// [`Operand`](super::super::driver::DriverError::Operand) for a size of 0 or beyond 32 bits,
    /// [`OutOfRange`](super::super::driver::DriverError::OutOfRange) for a buffer that is too short, or a failed launch.
    ///
    /// # Safety
    /// When the launch runs, the directories name the segments of the ids; until it has run nothing writes what it reads, and nothing uses what it writes.
    pub unsafe fn launch(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        let Self { kv_heads, capacity, page_tokens, clusters, .. } = *self;
        let most = u64::from(u32::MAX);
        for (what, size) in [
            ("page_biases kv_heads", kv_heads),
            ("page_biases capacity", capacity),
            ("page_biases page_tokens", page_tokens),
        ] {
            check_operand(what, size.into(), 1..=most)?;
        }
        clusters.check(kv_heads)?;
        let rows = self.entries.len() as u64 * u64::from(kv_heads);
        check_operand("page_biases batch * kv_heads", rows, 0..=i32::MAX as u64)?;
        let tokens = u64::from(capacity) * u64::from(page_tokens);
        check_operand("page_biases capacity * page_tokens", tokens, 1..=most)?;
        check_range("page_biases ids", 0, (rows * u64::from(capacity)) as usize, self.ids.len())?;
        check_range("page_biases id_counts", 0, rows as usize, self.id_counts.len())?;
        check_range("page_biases biases", 0, rows.saturating_mul(tokens) as usize, self.biases.len())?;
        if rows == 0 {
            return Ok(());
        }
        let arguments: [Argument; 12] = [
            self.entries.into(),
            kv_heads.into(),
            self.ids.into(),
            self.id_counts.into(),
            capacity.into(),
            clusters.directories.into(),
            clusters.first_row.into(),
            clusters.request_rows.into(),
            clusters.segment_partitions.into(),
            clusters.partition_tokens.into(),
            page_tokens.into(),
            self.biases.into(),
        ];
        let shape = LaunchShape::linear(rows as u32, page_biases::BLOCK);
        // SAFETY: order and types are the kernel's; the caller answers for entries and ids.
        unsafe { launch_with(&kernels.page_biases, &shape, stream, arguments) }
    }
}

/// A launch of `estimate`: attention over what stands for partitions that are not read, put together with what [`Attend`](super::Attend) found.
#[derive(Clone, Copy, Debug)]
pub struct Estimate<'a> {
    /// `[batch]`.
    pub entries: &'a DeviceBuffer<Entry>,
    /// KV heads.
    pub kv_heads: u32,
    /// Query heads of a KV head.
    pub group: u32,
    /// Words of a head: 8 or 16.
    pub head_words: u32,
    /// `[batch * kv_heads, capacity]`: partitions that are estimated.
    pub ids: &'a DeviceBuffer<u32>,
    /// `[batch * kv_heads]`: how many.
    pub counts: &'a DeviceBuffer<u32>,
    /// Ids that a row has room for.
    pub capacity: u32,
    /// `[batch * kv_heads, group, stride]`, as [`Score`](super::Score) wrote them.
    pub logits: &'a DeviceBuffer<f32>,
    /// Room for a row's logits.
    pub stride: u32,
    /// Where the partitions' numbers lie.
    pub clusters: ClusterNumbers<'a>,
    /// `[batch, kv_heads * group, head_words]` bf16: of what is read, then of both.
    pub outputs: &'a DeviceBuffer<Word>,
    /// `[batch, kv_heads * group]`: logarithms of the sums of e^logit, likewise.
    pub lse: &'a DeviceBuffer<f32>,
}

impl Estimate<'_> {
    /// Async: the outputs are there when `stream` has come this far. An empty batch launches nothing.
    ///
    /// # Errors
    /// [`Choice`](super::super::driver::DriverError::Choice) for heads of neither 64 nor 128,
    /// [`Operand`](super::super::driver::DriverError::Operand) for a size of 0 or beyond 32 bits and a group beyond [`MAX_GROUP`],
    /// [`OutOfRange`](super::super::driver::DriverError::OutOfRange) for a buffer that is too short, or a failed launch.
    ///
    /// # Safety
    /// When the launch runs, the directories name the segments of the ids, the logits are those of the same step, and `lse` is finite for entries with
    /// tokens; until it has run nothing writes what it reads, and nothing else uses what it writes.
    pub unsafe fn launch(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        let Self { kv_heads, group, head_words, capacity, stride, clusters, .. } = *self;
        let most = u64::from(u32::MAX);
        check_choice("estimate head_words", head_words, &[8, 16])?;
        check_operand("estimate kv_heads", kv_heads.into(), 1..=most)?;
        check_operand("estimate group", group.into(), 1..=MAX_GROUP.into())?;
        check_operand("estimate capacity", capacity.into(), 1..=most)?;
        check_operand("estimate stride", stride.into(), 1..=most)?;
        clusters.check(kv_heads)?;
        let rows = self.entries.len() as u64 * u64::from(kv_heads);
        let units = rows * u64::from(blocks_of_group(group));
        check_operand("estimate units", units, 0..=i32::MAX as u64)?;
        let heads = rows * u64::from(group);
        check_operand("estimate heads * stride", heads * u64::from(stride), 0..=most)?;
        check_range("estimate ids", 0, (rows * u64::from(capacity)) as usize, self.ids.len())?;
        check_range("estimate counts", 0, rows as usize, self.counts.len())?;
        check_range("estimate logits", 0, (heads * u64::from(stride)) as usize, self.logits.len())?;
        check_range("estimate outputs", 0, (heads * u64::from(head_words)) as usize, self.outputs.len())?;
        check_range("estimate lse", 0, heads as usize, self.lse.len())?;
        // Places of partitions are handed on in 32 bits.
        check_operand("estimate partitions", clusters.partition_tokens.len() as u64, 1..=most)?;
        if rows == 0 {
            return Ok(());
        }
        let arguments: [Argument; 17] = [
            self.entries.into(),
            kv_heads.into(),
            group.into(),
            head_words.into(),
            self.ids.into(),
            self.counts.into(),
            capacity.into(),
            self.logits.into(),
            stride.into(),
            clusters.directories.into(),
            clusters.first_row.into(),
            clusters.request_rows.into(),
            clusters.segment_partitions.into(),
            clusters.partition_tokens.into(),
            clusters.value_means.into(),
            self.outputs.into(),
            self.lse.into(),
        ];
        let shape =
            LaunchShape::linear(units as u32, estimate::BLOCK).with_shared_bytes(estimate::SHARED_BYTES);
        // SAFETY: order and types are the kernel's; the caller answers for entries, ids and logits.
        unsafe { launch_with(&kernels.estimate, &shape, stream, arguments) }
    }
}
