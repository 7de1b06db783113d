//! Keys in low rank: what lies on the GPU for them, and their launches.

use std::ops::Range;

use half::bf16;
use spinkv_kernels::abi::{PageCopy, SEGMENT_KEYS, WORD_ELEMENTS};

use super::super::driver::{DeviceBuffer, Result as DriverResult, Stream};
use super::super::kernels::{
    BasisScratch, Kernels, Linear, LinearOutput, LowRankBasis, ProjectKeys, RebuildKeys, Unrotate,
};
use super::super::step::LowRankStages;
use super::stages::Stages;
use super::{CudaBackend, Request, Sizes};
use crate::KvConfig;
use crate::memory::Word;

/// Coefficients and bases of all requests' keys, and what prompts need to find them.
#[derive(Debug)]
pub(super) struct KeyFactors {
    rank: u32,
    /// `[head_dim / 2]`.
    frequencies: DeviceBuffer<f32>,
    magnitude: f32,
    /// `[segments, layers, 512 * page_tokens, rank / 8]`.
    coefficients: DeviceBuffer<Word>,
    /// `[requests, layers, kv_heads, head_dim, rank / 8]`.
    bases: DeviceBuffer<Word>,
    /// A prompt's keys, turned back: `[max_tokens, kv_heads, head_words]`.
    plain: DeviceBuffer<Word>,
    scratch: BasisScratch,
    /// `[rank, kv_heads, head_words]`: of the layer under way.
    rows: DeviceBuffer<Word>,
    partials: DeviceBuffer<Word>,
    arrivals: DeviceBuffer<u32>,
}

impl KeyFactors {
    /// Those of a configuration whose keys are kept so.
    pub fn new(
        config: &KvConfig,
        sizes: &Sizes,
        kernels: &Kernels,
        stream: &Stream,
    ) -> DriverResult<Option<Self>> {
        let Some(low_rank) = config.low_rank() else { return Ok(None) };
        let (context, rank, width) = (stream.context(), low_rank.rank as u32, sizes.key_words());
        let rank_words = sizes.rank / WORD_ELEMENTS;
        let segments = sizes.requests * sizes.segments;
        let elements = width * WORD_ELEMENTS;
        Ok(Some(Self {
            rank,
            frequencies: DeviceBuffer::from_slice(stream, low_rank.rotary.frequencies())?,
            magnitude: low_rank.rotary.magnitude(),
            coefficients: DeviceBuffer::uninit(context, segments * sizes.coefficient_words())?,
            bases: DeviceBuffer::uninit(context, sizes.requests * sizes.basis_words())?,
            plain: DeviceBuffer::uninit(context, sizes.max_tokens * width)?,
            scratch: BasisScratch::new(kernels, stream, rank, elements as u32)?,
            rows: DeviceBuffer::uninit(context, elements * rank_words)?,
            partials: DeviceBuffer::uninit(context, Linear::partials(kernels))?,
            arrivals: DeviceBuffer::zeroed(stream, Linear::arrivals(rank))?,
        }))
    }

    /// Bytes on the GPU.
    pub fn bytes(&self) -> u64 {
        let words = [&self.coefficients, &self.bases, &self.plain, &self.rows, &self.partials];
        words.map(DeviceBuffer::bytes).iter().sum::<u64>() + self.scratch.bytes()
    }

    /// A request begins without a prompt: its bases are of axes, as the CPU's.
    pub fn without_prompt(&self, sizes: &Sizes, place: usize, stream: &Stream) -> DriverResult<()> {
        let (width, rank) = (sizes.key_words() * WORD_ELEMENTS, sizes.rank);
        let axis = |at: usize| if at / rank == at % rank { bf16::ONE } else { bf16::ZERO };
        let basis: Vec<bf16> = (0..width * rank).map(axis).collect();
        let words: Vec<Word> = bytemuck::pod_collect_to_vec(&basis);
        let first = place * sizes.basis_words();
        (0..sizes.layers).try_for_each(|layer| self.bases.write(stream, first + layer * words.len(), &words))
    }

    /// Async: the basis of a layer of a prompt of `tokens` tokens, and the coefficients of the tokens that it leaves to be selected.
    ///
    /// # Safety
    /// Until the launches have run nothing writes the keys, `[tokens, kv_heads, head_words]`; prompts follow each other on one stream.
    pub unsafe fn launch_prompt(
        &self,
        backend: &CudaBackend,
        request: &Request,
        layer: usize,
        tokens: usize,
        keys: &DeviceBuffer<Word>,
        stream: &Stream,
    ) -> DriverResult<()> {
        let (sizes, kernels) = (&backend.sizes, &backend.kernels);
        let (width, rank_words) = (sizes.key_words(), sizes.rank / WORD_ELEMENTS);
        let left = backend.config.left_pages(tokens);
        if request.resident {
            return Ok(());
        }
        // SAFETY: the caller's part; the request has its place among the bases and segments for all that it leaves to be selected.
        unsafe {
            Unrotate {
                keys,
                tokens: tokens as u32,
                kv_heads: sizes.kv_heads as u32,
                head_words: sizes.head_words as u32,
                first_position: 0,
                frequencies: &self.frequencies,
                magnitude: self.magnitude,
                plain: &self.plain,
            }
            .launch(kernels, stream)?;
            LowRankBasis {
                keys: &self.plain,
                tokens: tokens as u32,
                scratch: &self.scratch,
                rows: &self.rows,
                place: (request.place * sizes.layers + layer) as u32,
                bases: &self.bases,
            }
            .launch(kernels, stream)?;
        }
        let in_segment = SEGMENT_KEYS as usize;
        let mut first = left.start as usize;
        while first < left.end as usize {
            let segment = first / in_segment;
            let end = (left.end as usize).min((segment + 1) * in_segment);
            let tokens = (end - first) * sizes.page_tokens;
            let of_segment = request.segments[segment] as usize * sizes.layers + layer;
            let at = (of_segment * in_segment + first % in_segment) * sizes.page_tokens * rank_words;
            let of_tokens = first * sizes.page_tokens * width;
            let launch = Linear {
                weights: &self.rows,
                x: &self.plain.part(of_tokens..of_tokens + tokens * width)?,
                tokens: tokens as u32,
                n: self.rank,
                k_words: width as u32,
                output: LinearOutput::Bf16(&self.coefficients.part(at..at + tokens * rank_words)?),
                partials: &self.partials,
                arrivals: &self.arrivals,
                overlaps: false,
            };
            // SAFETY: as above; the scratch is that of one stream.
            unsafe { launch.launch(kernels, stream)? };
            first = end;
        }
        Ok(())
    }
}

/// What the launches of a step over such keys hand on; part of its [`Lists`](super::device::Lists).
#[derive(Debug)]
pub(super) struct LowRankLists {
    /// Keys of the misses: `[rows, list_capacity]`.
    pub missed: DeviceBuffer<u32>,
    /// Pages that leave the steady zone: `[rows, leaving_pages]`.
    copies: DeviceBuffer<PageCopy>,
    /// Their keys.
    keys: DeviceBuffer<u32>,
    /// `[rows]`: how many.
    counts: DeviceBuffer<u32>,
}

impl LowRankLists {
    /// Of steps of up to `sizes.requests` requests, where keys are kept so.
    pub fn new(sizes: &Sizes, stream: &Stream) -> DriverResult<Option<Self>> {
        let rows = sizes.requests * sizes.kv_heads;
        if sizes.rank == 0 {
            return Ok(None);
        }
        let leaving = rows * sizes.leaving_pages;
        Ok(Some(Self {
            missed: DeviceBuffer::zeroed(stream, rows * sizes.list_capacity)?,
            copies: DeviceBuffer::from_slice(stream, &vec![PageCopy::default(); leaving])?,
            keys: DeviceBuffer::zeroed(stream, leaving)?,
            counts: DeviceBuffer::zeroed(stream, rows)?,
        }))
    }

    /// Those of a batch of `batch` entries; the same memory.
    pub fn part(&self, sizes: &Sizes, batch: Range<usize>) -> DriverResult<Self> {
        let of_rows = |width: usize| batch.start * sizes.kv_heads * width..batch.end * sizes.kv_heads * width;
        Ok(Self {
            missed: self.missed.part(of_rows(sizes.list_capacity))?,
            copies: self.copies.part(of_rows(sizes.leaving_pages))?,
            keys: self.keys.part(of_rows(sizes.leaving_pages))?,
            counts: self.counts.part(of_rows(1))?,
        })
    }

    /// Bytes.
    pub fn bytes(&self) -> u64 {
        self.missed.bytes() + self.copies.bytes() + self.keys.bytes() + self.counts.bytes()
    }
}

impl<'a> Stages<'a> {
    /// The launches for keys in low rank, where they are kept so.
    pub fn low_rank(&self) -> Option<LowRankStages<'a>> {
        let (backend, lists) = (self.backend, self.lists);
        let (factors, own) = (backend.key_factors.as_ref()?, lists.low_rank.as_ref()?);
        let (sizes, tables) = (&backend.sizes, &backend.tables);
        let project = ProjectKeys {
            entries: &lists.entries,
            steady: &tables.steady,
            pool: &tables.pool,
            kv_heads: sizes.kv_heads as u32,
            head_words: sizes.head_words as u32,
            layer: self.layer as u32,
            layers: sizes.layers as u32,
            page_tokens: sizes.page_tokens as u32,
            frequencies: &factors.frequencies,
            magnitude: factors.magnitude,
            bases: &factors.bases,
            rank: factors.rank,
            directories: &tables.directories,
            coefficients: &factors.coefficients,
            copies: &own.copies,
            copy_keys: &own.keys,
            counts: &own.counts,
        };
        let replace = RebuildKeys {
            copies: &own.copies,
            copy_keys: &own.keys,
            counts: &own.counts,
            entries: &lists.entries,
            kv_heads: sizes.kv_heads as u32,
            head_words: sizes.head_words as u32,
            layer: self.layer as u32,
            layers: sizes.layers as u32,
            directories: &tables.directories,
            coefficients: &factors.coefficients,
            rank: factors.rank,
            bases: &factors.bases,
            frequencies: &factors.frequencies,
            magnitude: factors.magnitude,
            page_tokens: sizes.page_tokens as u32,
            pool: &tables.pool,
            blocks: RebuildKeys::blocks(&backend.kernels),
        };
        let counts = &lists.counts[self.layer].copies;
        let rebuild = RebuildKeys { copies: &lists.copies, copy_keys: &own.missed, counts, ..replace };
        Some(LowRankStages { project, replace, rebuild })
    }
}
