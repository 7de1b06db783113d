//! The partitions of a prompt that every step reads: found and marked on the GPU, layer by layer.

use super::super::driver::{DeviceBuffer, Result as DriverResult, Stream};
use super::super::kernels::{ChunkSpread, MarkPartitions, TopK};
use super::super::operators::PromptIndex;
use super::stages::Stages;
use super::{CudaBackend, Sizes};

/// What the search hands on, of one prompt and layer at a time. Nothing of methods without such partitions.
#[derive(Debug)]
pub(super) struct Outliers {
    /// `[kv_heads, stride]`: how far a partition's keys spread about their mean.
    spreads: DeviceBuffer<f32>,
    /// `[kv_heads]`: partitions of the prompt.
    partitions: DeviceBuffer<u32>,
    /// `[kv_heads]`: how many are wanted.
    wanted: DeviceBuffer<u32>,
    /// `[kv_heads, most]` and `[kv_heads]`: those that were found.
    ids: DeviceBuffer<u32>,
    found: DeviceBuffer<u32>,
}

impl Outliers {
    pub fn new(sizes: &Sizes, stream: &Stream) -> DriverResult<Self> {
        let rows = if sizes.always > 0 { sizes.kv_heads } else { 0 };
        Ok(Self {
            spreads: DeviceBuffer::zeroed(stream, rows * sizes.stride)?,
            partitions: DeviceBuffer::zeroed(stream, rows)?,
            wanted: DeviceBuffer::zeroed(stream, rows)?,
            ids: DeviceBuffer::zeroed(stream, rows * sizes.always)?,
            found: DeviceBuffer::zeroed(stream, rows)?,
        })
    }

    /// Bytes on the GPU, small tables not counted.
    pub fn bytes(&self) -> u64 {
        self.spreads.bytes() + self.ids.bytes()
    }

    /// The next prompt has `partitions` partitions, of each row of which `wanted` are read by every step.
    pub fn begin(&self, stream: &Stream, partitions: u32, wanted: u32) -> DriverResult<()> {
        let rows = self.wanted.len();
        self.partitions.write(stream, 0, &vec![partitions; rows])?;
        self.wanted.write(stream, 0, &vec![wanted; rows])
    }

    /// Async: marks them in the layer of `stages`, by the keys that `index` summarises.
    ///
    /// # Safety
    /// When the launches run, what `index` asks for holds, and [`begin`](Self::begin) has told of its prompt.
    pub unsafe fn launch(
        &self,
        backend: &CudaBackend,
        stages: &Stages<'_>,
        index: &PromptIndex<'_>,
        stream: &Stream,
    ) -> DriverResult<()> {
        let sizes = &backend.sizes;
        if sizes.always == 0 || index.partitions == 0 {
            return Ok(());
        }
        let spread = ChunkSpread {
            entries: index.rows.entries,
            keys: index.keys,
            first_token: index.first_token,
            first_chunk: index.first_partition,
            chunks: index.partitions,
            kv_heads: sizes.kv_heads as u32,
            head_words: sizes.head_words as u32,
            chunk_tokens: sizes.partition_tokens as u32,
            stride: sizes.stride as u32,
            spreads: &self.spreads,
        };
        let greatest = TopK {
            scores: &self.spreads,
            counts: &self.partitions,
            k: &self.wanted,
            stride: sizes.stride as u32,
            resident: backend.kernels.resident(sizes.stride as u32),
            // Select uses them after this.
            keys: &stages.lists.keys,
            capacity: sizes.always as u32,
            ids: &self.ids,
            selected: &self.found,
        };
        let mark = MarkPartitions {
            entries: index.rows.entries,
            ids: &self.ids,
            counts: &self.found,
            capacity: sizes.always as u32,
            first_row: index.rows.first_row,
            kv_heads: sizes.kv_heads as u32,
            words: sizes.mark_words as u32,
            marks: &backend.tables.marks,
        };
        // SAFETY: the caller's part; a prompt's first partition is the first that can be selected, and no prompt has more than `stride`.
        unsafe {
            spread.launch(&backend.kernels, stream)?;
            greatest.launch(&backend.kernels, stream)?;
            mark.launch(&backend.kernels, stream)
        }
    }
}
