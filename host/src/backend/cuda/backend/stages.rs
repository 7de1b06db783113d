//! The stages of a decode step, one by one and as one launch of a layer.

use std::cell::Cell;
use std::ops::Range;

use super::super::driver::{DeviceBuffer, PinnedArena, Result as DriverResult, Stream};
use super::super::kernels::{
    Append, Attend, Awaited, Estimates, Gather, IndexOperator, IndexStep, Marks, OffloadPages, Resolve,
    Score, SelectPartitions,
};
use super::super::operators::{
    GpuIndex, LayerIndex, LayerSelect, PromptIndex, PromptLaunch, SelectStage, StepIndex, SummaryRows,
};
use super::super::step::{Bus, LayerStep, LowRankStages};
use super::device::Lists;
use super::sizes::Summaries;
use super::{CudaBackend, Sizes};
use crate::Result;
use crate::backend::{Step, StepKind};
use crate::memory::Word;
use crate::pipeline::{PartitionScore, Reach, Stage};
use spinkv_kernels::abi::{Entry, PageCopy};

/// Blocks that fetch misses: enough for the bus, whatever the size of a page (benches/results/2026-11-23-h200-step-kernels.md).
const GATHER_BLOCKS: u32 = 16;

/// The same where it counts what has arrived, which more blocks hide (benches/results/2026-11-27-h100-attention-beside-gather.md).
const COUNTING_GATHER_BLOCKS: u32 = 24;

/// A launch for one list of whole pages of `page_words` words, which nobody awaits.
pub(super) fn gather_listed<'a>(
    copies: &'a DeviceBuffer<PageCopy>,
    count: &'a DeviceBuffer<u32>,
    host_pages: &'a PinnedArena,
    device_pages: &'a DeviceBuffer<Word>,
    page_words: usize,
) -> Gather<'a> {
    let page_words = page_words as u32;
    Gather {
        copies,
        counts: count,
        host_pages,
        device_pages,
        page_words,
        device_words: page_words,
        code: None,
        blocks: GATHER_BLOCKS,
        arrived: None,
    }
}

/// The tensors of a layer of a decode step, for a batch.
#[derive(Clone, Copy, Debug)]
pub struct StepTensors<'a> {
    /// `[batch, query_heads, head_dim]` bf16.
    pub queries: &'a DeviceBuffer<Word>,
    /// `[batch, kv_heads, head_dim]` bf16.
    pub keys: &'a DeviceBuffer<Word>,
    /// As the keys.
    pub values: &'a DeviceBuffer<Word>,
    /// As the queries.
    pub out: &'a DeviceBuffer<Word>,
}

impl CudaBackend {
    /// Async: all stages of a layer of the decode step that [`begin_step`](Self::begin_step) began, for a batch of that size. If `resident`, for a batch
    /// of which [all requests are](Self::is_resident). Captured, it serves all steps of such batches.
    ///
    /// # Errors
    /// Tensors that are too small, or a launch that is refused.
    ///
    /// # Safety
    /// When the launches run, a step of that batch has begun, and nothing else writes or reads the tensors.
    pub unsafe fn launch_layer(
        &self,
        layer: usize,
        batch: usize,
        resident: bool,
        tensors: &StepTensors<'_>,
    ) -> Result<()> {
        // SAFETY: the caller's part.
        unsafe { self.launch_layer_with(layer, batch, resident, tensors, |_| Ok(())) }
    }

    /// The same with `behind` enqueued behind some stages, told which: an event to time them by. Retrieve and Attention run beside each
    /// other, so there is nothing between them.
    ///
    /// # Errors
    /// Those of [`launch_layer`](Self::launch_layer), and `behind`'s.
    ///
    /// # Safety
    /// As there; `behind` touches nothing of the step's.
    pub unsafe fn launch_layer_with(
        &self,
        layer: usize,
        batch: usize,
        resident: bool,
        tensors: &StepTensors<'_>,
        behind: impl Fn(Stage) -> DriverResult<()>,
    ) -> Result<()> {
        let lists = self.lists.part(&self.sizes, 0..batch)?;
        let stages = Stages { backend: self, lists: &lists, layer, first_request: 0, in_halves: false };
        let StepTensors { queries, keys, values, out } = *tensors;
        let (kernels, stream) = (&self.kernels, &*self.stream);
        // SAFETY: the caller's part; entries and tables are those of the backend's requests, which agree.
        unsafe {
            if resident {
                stages.append(keys, values).launch(kernels, stream)?;
                behind(Stage::Offload)?;
                stages.attend_steady(queries, out).launch(kernels, stream)?;
            } else {
                let step = stages.step(tensors);
                // Which launches end a stage, by their number.
                let of_low_rank = if step.low_rank.is_some() { 2 } else { 0 };
                let appended = usize::from(step.index.is_some()) + of_low_rank;
                let selected = step.select.map(|select| match select {
                    LayerSelect::InTree(..) => appended + 2,
                    LayerSelect::Own(..) => appended + 1,
                });
                let launched = Cell::new(0);
                step.launch_with(kernels, stream, |_| {
                    let number = launched.replace(launched.get() + 1);
                    if number == appended {
                        behind(Stage::Offload)
                    } else if Some(number) == selected {
                        behind(Stage::Select)
                    } else {
                        Ok(())
                    }
                })?;
            }
        }
        behind(Stage::Attention)?;
        Ok(())
    }

    /// Async: as [`launch_layer`](Self::launch_layer), on `stream` and for the entries in `half` of the batch alone, while the other half is on another stream:
    /// one computes while the other's pages come. The copies of both go over one `bus`: both at once would wait for both's pages, and then compute at once.
    /// Attention waits for all of its pages, since blocks that wait would keep the other half's work from the GPU.
    ///
    /// # Errors
    /// [`DriverError::Multiple`](super::super::driver::DriverError::Multiple) for a second half that begins elsewhere than [`half_of`](Self::half_of) says, and those of
    /// [`launch_layer`](Self::launch_layer).
    ///
    /// # Safety
    /// As there, and the halves of a batch do not overlap.
    pub unsafe fn launch_half(
        &self,
        layer: usize,
        half: Range<usize>,
        stream: &Stream,
        tensors: &StepTensors<'_>,
        bus: &Bus<'_>,
    ) -> Result<()> {
        let (first_request, lists) = (half.start, self.lists.part(&self.sizes, half)?);
        let stages = Stages { backend: self, lists: &lists, layer, first_request, in_halves: true };
        // SAFETY: the caller's part; the lists are this half's alone, and rows of different requests share no table.
        Ok(unsafe { stages.step(tensors).launch_over(Some(bus), &self.kernels, stream, |_| Ok(())) }?)
    }

    /// How many requests of a batch its first half has; `None` for a batch that is not parted: a small one, or of methods whose stages share more than tables.
    pub fn half_of(&self, batch: usize) -> Option<usize> {
        if self.sizes.clusters.is_some() || self.sizes.rank > 0 {
            return None;
        }
        let unit = self.sizes.half_unit();
        let half = (batch / 2).next_multiple_of(unit);
        (half < batch).then_some(half)
    }

    pub(super) fn is_prompt(&self, step: &Step<'_>) -> bool {
        step.entries.iter().any(|entry| entry.kind == StepKind::Prompt)
    }

    /// Launches some stages of a decode step.
    fn launch(&self, step: &Step<'_>, launch: impl FnOnce(&Stages<'_>) -> DriverResult<()>) -> Result<()> {
        let lists = self.lists.part(&self.sizes, 0..step.entries.len())?;
        let layer = step.layer;
        Ok(launch(&Stages { backend: self, lists: &lists, layer, first_request: 0, in_halves: false })?)
    }

    /// Whether a step's requests keep all their pages steady, so that there is nothing to index, to select or to retrieve.
    fn is_resident_step(&self, step: &Step<'_>) -> bool {
        self.is_resident(step.entries.iter().map(|entry| entry.request))
    }

    pub(super) fn index_step(&self, step: &Step<'_>) -> Result<()> {
        if self.is_resident_step(step) {
            return Ok(());
        }
        self.launch(step, |stages| {
            // SAFETY: the step's entries are on the GPU, and its tables agree with them.
            unsafe {
                if let Some(index) = stages.index() {
                    index.launch(&self.kernels, &self.stream)?;
                }
                if let Some(LowRankStages { project, replace, .. }) = stages.low_rank() {
                    project.launch(&self.kernels, &self.stream)?;
                    replace.launch(&self.kernels, &self.stream)?;
                }
                Ok(())
            }
        })
    }

    pub(super) fn append(
        &self,
        step: &Step<'_>,
        keys: &DeviceBuffer<Word>,
        values: &DeviceBuffer<Word>,
    ) -> Result<()> {
        // SAFETY: as in index_step.
        self.launch(step, |stages| unsafe { stages.append(keys, values).launch(&self.kernels, &self.stream) })
    }

    pub(super) fn select_step(&self, step: &Step<'_>, queries: &DeviceBuffer<Word>) -> Result<()> {
        if self.is_resident_step(step) {
            return Ok(());
        }
        self.launch(step, |stages| {
            let Some(select) = stages.select(queries) else { return Ok(()) };
            // SAFETY: as in index_step.
            unsafe { select.launch(&self.kernels, &self.stream, |_| Ok(())) }
        })
    }

    pub(super) fn retrieve_step(&self, step: &Step<'_>) -> Result<()> {
        if self.is_resident_step(step) {
            return Ok(());
        }
        // SAFETY: as in index_step; the ids are those that Select wrote.
        self.launch(step, |stages| unsafe {
            stages.resolve().launch(&self.kernels, &self.stream)?;
            if let Some(LowRankStages { rebuild, .. }) = stages.low_rank() {
                rebuild.launch(&self.kernels, &self.stream)?;
            }
            stages.gather().launch(&self.kernels, &self.stream)
        })
    }

    pub(super) fn attend_step(
        &self,
        step: &Step<'_>,
        queries: &DeviceBuffer<Word>,
        out: &DeviceBuffer<Word>,
    ) -> Result<()> {
        let resident = self.is_resident_step(step);
        // SAFETY: as in index_step; the lists are those that Select and Retrieve wrote.
        self.launch(step, |stages| unsafe {
            let clusters = stages.clusters(out).filter(|_| !resident);
            if let Some(clusters) = &clusters {
                clusters.biases.launch(&self.kernels, &self.stream)?;
            }
            stages.attend(queries, out).launch(&self.kernels, &self.stream)?;
            match clusters.and_then(|clusters| clusters.estimate) {
                Some(estimate) => estimate.launch(&self.kernels, &self.stream),
                None => Ok(()),
            }
        })
    }
}

/// The launches of a layer's stages.
pub(super) struct Stages<'a> {
    pub backend: &'a CudaBackend,
    pub lists: &'a Lists,
    pub layer: usize,
    /// Which of the batch's requests is the lists' first.
    pub first_request: usize,
    /// Whether another half of the batch runs beside these.
    pub in_halves: bool,
}

impl<'a> Stages<'a> {
    /// All of a decode step.
    fn step(&self, tensors: &StepTensors<'a>) -> LayerStep<'a> {
        let StepTensors { queries, keys, values, out } = *tensors;
        LayerStep {
            index: self.index(),
            append: self.append(keys, values),
            select: self.select(queries),
            resolve: self.resolve(),
            gather: self.gather(),
            attend: self.attend(queries, out),
            clusters: self.clusters(out),
            low_rank: self.low_rank(),
        }
    }

    fn sizes(&self) -> &'a Sizes {
        &self.backend.sizes
    }

    /// Where summaries go; `None` without an Index.
    pub fn summary_rows(&self, entries: &'a DeviceBuffer<Entry>) -> Option<SummaryRows<'a>> {
        let (sizes, tables) = (self.sizes(), &self.backend.tables);
        let Summaries { words, .. } = sizes.summaries.filter(|summaries| summaries.words > 0)?;
        Some(SummaryRows {
            entries,
            directories: &tables.directories,
            first_row: (self.layer * sizes.kv_heads) as u32,
            request_rows: sizes.rows() as u32,
            kv_heads: sizes.kv_heads as u32,
            head_words: sizes.head_words as u32,
            partition_tokens: sizes.partition_tokens as u32,
            segment_partitions: sizes.segment_partitions as u32,
            summary_words: words as u32,
            summaries: &tables.summaries,
        })
    }

    /// The Index in the tree, or the method's own.
    fn operator(&self) -> std::result::Result<IndexOperator, &'a dyn GpuIndex> {
        let operator = self.sizes().summaries.and_then(|summaries| summaries.operator);
        operator.ok_or_else(|| self.backend.own.index.as_deref().expect("an Index in the tree or its own"))
    }

    pub fn index_prompt(&self, index: PromptIndex<'a>) -> PromptLaunch<'a> {
        match self.operator() {
            Ok(operator) => PromptLaunch::InTree(operator, index),
            Err(own) => PromptLaunch::Own(own, index),
        }
    }

    pub fn offload_pages(&self, entries: &'a DeviceBuffer<Entry>) -> OffloadPages<'a> {
        let (sizes, tables) = (self.sizes(), &self.backend.tables);
        OffloadPages {
            entries,
            steady: &tables.steady,
            pool: &tables.pool,
            host_slabs: &tables.host_slabs,
            host_valid: &tables.host_valid,
            host_pages: self.backend.arena.memory(),
            first_row: (self.layer * sizes.kv_heads) as u32,
            kv_heads: sizes.kv_heads as u32,
            head_words: sizes.head_words as u32,
            page_tokens: sizes.page_tokens as u32,
            on_host: sizes.clusters.is_none(),
            host_words: sizes.host_page_words as u32,
            code: sizes.code,
        }
    }

    /// The Index of a step; not of clusters, which are made ahead of it.
    fn index(&self) -> Option<LayerIndex<'a>> {
        if self.sizes().clusters.is_some() {
            return None;
        }
        let (rows, tables) = (self.summary_rows(&self.lists.entries)?, &self.backend.tables);
        let (steady, pool, page_tokens) = (&tables.steady, &tables.pool, self.sizes().page_tokens as u32);
        Some(match self.operator() {
            Ok(operator) => {
                LayerIndex::InTree(IndexStep { table: rows.table(operator), steady, pool, page_tokens })
            }
            Err(own) => LayerIndex::Own(own, StepIndex { rows, steady, pool, page_tokens }),
        })
    }

    fn append(&self, keys: &'a DeviceBuffer<Word>, values: &'a DeviceBuffer<Word>) -> Append<'a> {
        Append { pages: self.offload_pages(&self.lists.entries), keys, values }
    }

    pub fn select(&self, queries: &'a DeviceBuffer<Word>) -> Option<LayerSelect<'a>> {
        let (sizes, tables, lists) = (self.sizes(), &self.backend.tables, self.lists);
        let Summaries { score, merge, words, .. } = sizes.summaries?;
        let bounds = score == PartitionScore::Bound;
        let (kv_heads, group) = (sizes.kv_heads as u32, sizes.group as u32);
        let stride = sizes.stride as u32;
        let score = Score {
            entries: &lists.entries,
            directories: &tables.directories,
            summaries: &tables.summaries,
            queries,
            kv_heads,
            group,
            head_words: if bounds { sizes.head_words } else { words } as u32,
            bounds,
            segment_partitions: sizes.segment_partitions as u32,
            request_rows: sizes.rows() as u32,
            layer: self.layer as u32,
            // Bounds are merged as they are: only their order counts, which rounding a factor in could change.
            scale: if bounds { 1.0 } else { sizes.scale() },
            stride,
            row_pages: self.row_pages(),
            always: (sizes.mark_words > 0).then_some((&tables.marks, sizes.mark_words as u32)),
            logits: &lists.logits,
            statistics: &lists.statistics,
        };
        let first = self.layer * sizes.kv_heads;
        let everything = self.backend.config.reaches()[first] == Reach::Everything;
        let select = SelectPartitions {
            entries: if everything { &lists.everything } else { &lists.entries },
            logits: &lists.logits,
            statistics: (!bounds).then_some(&lists.statistics),
            kv_heads,
            group,
            stride,
            merge,
            least: None,
            top_p: 1.0,
            marks: (sizes.mark_words + sizes.mask_words > 0).then_some(Marks {
                forced: (sizes.mark_words > 0).then_some(&tables.marks),
                masked: (sizes.mask_words > 0).then_some(&tables.masks),
                words: sizes.mark_words.max(sizes.mask_words) as u32,
            }),
            first_row: self.layer as u32 * kv_heads,
            row_pages: self.row_pages(),
            estimates: sizes.clusters.filter(|clusters| clusters.estimates > 0).map(|clusters| Estimates {
                count: clusters.estimates as u32,
                share: clusters.share,
                ids: &lists.estimated_ids,
                estimated: &lists.estimated,
            }),
            resident: self.backend.kernels.resident(stride),
            keys: &lists.keys,
            capacity: sizes.id_stride as u32,
            ids: &lists.ids,
            selected: &lists.id_counts,
        };
        Some(match self.backend.own.select.as_deref() {
            Some(own) => {
                let first_request = self.first_request;
                LayerSelect::Own(own, SelectStage { score, select, scratch: &lists.scratch, first_request })
            }
            None => LayerSelect::InTree(score, select),
        })
    }

    pub fn resolve(&self) -> Resolve<'a> {
        let (sizes, lists) = (self.sizes(), self.lists);
        let counts = &lists.counts[self.layer];
        Resolve {
            entries: &lists.entries,
            kv_heads: sizes.kv_heads as u32,
            layer: self.layer as u32,
            ids: &lists.ids,
            id_counts: &lists.id_counts,
            partitions: sizes.partition_pages,
            tables: self.backend.tables.views(),
            slot_capacity: sizes.slot_stride as u32,
            segment_capacity: sizes.segments as u32,
            pages: &lists.pages,
            // Biases are of pages in the selection's order, and nobody waits for keys that are made here.
            misses_last: sizes.clusters.is_none() && sizes.rank == 0,
            page_counts: &counts.pages,
            copies: &lists.copies,
            copy_keys: lists.low_rank.as_ref().map(|lists| &lists.missed),
            copy_counts: &counts.copies,
            arrived: &lists.arrived,
            faults: &counts.faults,
        }
    }

    pub fn gather(&self) -> Gather<'a> {
        let lists = self.lists;
        Gather {
            copies: &lists.copies,
            counts: &lists.counts[self.layer].copies,
            host_pages: self.backend.arena.memory(),
            device_pages: &self.backend.tables.pool,
            page_words: self.sizes().host_page_words as u32,
            device_words: self.sizes().page_words as u32,
            code: self.sizes().code,
            blocks: if self.counts_arrivals() { COUNTING_GATHER_BLOCKS } else { GATHER_BLOCKS },
            arrived: self.counts_arrivals().then_some(&lists.arrived),
        }
    }

    /// Whether attention may begin while pages come: not while their keys are made elsewhere, nor beside another half.
    fn counts_arrivals(&self) -> bool {
        self.backend.attends_beside && self.sizes().rank == 0 && !self.in_halves
    }

    fn attend(&self, queries: &'a DeviceBuffer<Word>, outputs: &'a DeviceBuffer<Word>) -> Attend<'a> {
        let counts = &self.lists.counts[self.layer];
        Attend {
            page_counts: &counts.pages,
            awaited: self
                .counts_arrivals()
                .then_some(Awaited { copy_counts: &counts.copies, arrived: &self.lists.arrived }),
            biases: self.biases(),
            splits: self.sizes().splits(&self.backend.kernels, self.lists.entries.len(), false),
            ..self.attend_steady(queries, outputs)
        }
    }

    /// Attention over the steady zone alone.
    fn attend_steady(&self, queries: &'a DeviceBuffer<Word>, outputs: &'a DeviceBuffer<Word>) -> Attend<'a> {
        let (sizes, tables, lists) = (self.sizes(), &self.backend.tables, self.lists);
        Attend {
            entries: &lists.entries,
            kv_heads: sizes.kv_heads as u32,
            group: sizes.group as u32,
            layer: self.layer as u32,
            head_words: sizes.head_words as u32,
            pages: &lists.pages,
            page_counts: &lists.no_pages,
            steady: &tables.steady,
            biases: None,
            pool: &tables.pool,
            page_tokens: sizes.page_tokens as u32,
            queries,
            scale: sizes.scale(),
            awaited: None,
            splits: sizes.splits(&self.backend.kernels, lists.entries.len(), true),
            partials: &lists.partials,
            arrivals: &lists.arrivals,
            outputs,
            lse: &lists.lse,
        }
    }
}
