//! Partitions that are clusters: made of a prompt's tokens with the prompt, of generated ones ahead of the step in which they leave the steady zone,
//! layer by layer, so that no step waits for all layers at once.

use super::super::driver::{DeviceBuffer, Result as DriverResult, Stream};
use super::super::kernels::{
    ClusterNumbers, ClusterPages, ClusterRun, ClusterScratch, ClusterShape, ClusterTables, Estimate,
    GatherRun, PageBiases,
};
use super::super::step::ClusterStages;
use super::stages::Stages;
use super::{CudaBackend, Request, Sizes};
use crate::backend::Step;
use crate::memory::{HostPage, Word};
use crate::pipeline::RequestId;
use crate::{Error, Result};
use spinkv_kernels::abi::SLAB_PAGES;

/// Blocks that write pages to the host: enough for the bus.
const STORE_BLOCKS: u32 = 16;

/// The sizes of clusters.
#[derive(Clone, Copy, Debug)]
pub(super) struct ClusterSizes {
    /// Tokens that leave the steady zone at a time.
    pub run: usize,
    /// The share of a row's partitions that is estimated.
    pub share: f32,
    /// The most that is.
    pub estimates: usize,
}

/// What clusters have on the GPU. Nothing of other methods.
#[derive(Debug)]
pub(super) struct Clusters {
    /// `[requests, rows, 2]`: pages of each row's clusters, before their last run and after it.
    pub row_pages: DeviceBuffer<u32>,
    /// `[segments, rows, segment_partitions]`.
    partition_tokens: DeviceBuffer<u32>,
    /// As above, of `head_words` words.
    value_means: DeviceBuffer<Word>,
    /// `[rows of a batch, list_capacity, page_tokens]`: what attention adds to logits.
    biases: DeviceBuffer<f32>,
    /// Of prompts, which have a stream of their own, and of runs.
    prompt: ClusterScratch,
    ahead: ClusterScratch,
    /// `[run, kv_heads, head_words]`.
    keys: DeviceBuffer<Word>,
    values: DeviceBuffer<Word>,
}

/// The clusters of a row, as the GPU has them.
#[derive(Clone, Debug, PartialEq)]
pub struct RowClusters {
    /// Tokens of each partition.
    pub tokens: Vec<u32>,
    /// `[partitions, head_words]`: mean keys, bf16.
    pub summaries: Vec<Word>,
    /// As the summaries: mean values.
    pub value_means: Vec<Word>,
    /// `[partitions, 2, page_tokens, head_words]`: their pages on the host.
    pub pages: Vec<Word>,
}

impl Clusters {
    pub fn new(sizes: &Sizes, stream: &Stream) -> DriverResult<Option<Self>> {
        let Some(ClusterSizes { run, .. }) = sizes.clusters else { return Ok(None) };
        let (context, rows) = (stream.context(), sizes.rows());
        let partitions = sizes.requests * sizes.segments * rows * sizes.segment_partitions;
        let [kv_heads, head_words, page_tokens] =
            [sizes.kv_heads, sizes.head_words, sizes.page_tokens].map(|size| size as u32);
        let scratch =
            |tokens: usize| ClusterScratch::new(stream, tokens as u32, kv_heads, head_words, page_tokens);
        let of_run = || DeviceBuffer::zeroed(stream, run * sizes.kv_heads * sizes.head_words);
        Ok(Some(Self {
            row_pages: DeviceBuffer::zeroed(stream, 2 * sizes.requests * rows)?,
            partition_tokens: DeviceBuffer::uninit(context, partitions)?,
            value_means: DeviceBuffer::uninit(context, partitions * sizes.head_words)?,
            biases: DeviceBuffer::zeroed(
                stream,
                sizes.requests * sizes.kv_heads * sizes.list_capacity * sizes.page_tokens,
            )?,
            prompt: scratch(sizes.max_tokens)?,
            ahead: scratch(run)?,
            keys: of_run()?,
            values: of_run()?,
        }))
    }

    /// Bytes of tables, and of what else there is.
    pub fn bytes(&self) -> (u64, u64) {
        let tables = self.row_pages.bytes() + self.partition_tokens.bytes() + self.value_means.bytes();
        let rest = self.biases.bytes() + self.keys.bytes() + self.values.bytes();
        (tables, rest + self.prompt.bytes() + self.ahead.bytes())
    }
}

impl CudaBackend {
    fn cluster_tables(
        &self,
        request: &Request,
        layer: usize,
    ) -> Option<(ClusterTables<'_>, ClusterPages<'_>)> {
        let (sizes, tables, clusters) = (&self.sizes, &self.tables, self.clusters.as_ref()?);
        let rows = sizes.rows();
        let number = |number: usize| number as u32;
        let of_request = ClusterTables {
            page_tokens: number(sizes.page_tokens),
            directories: &tables.directories,
            directory: number(request.place * sizes.segments),
            first_row: number(layer * sizes.kv_heads),
            request_rows: number(rows),
            segment_partitions: number(sizes.segment_partitions),
            capacity: number(request.segments.len() * sizes.segment_partitions),
            row_pages: &clusters.row_pages,
            first_place: number(request.place * rows),
            partition_tokens: &clusters.partition_tokens,
            summaries: &tables.summaries,
            value_means: &clusters.value_means,
        };
        let pages = ClusterPages {
            host_slabs: &tables.host_slabs,
            first_slab: number(request.place * rows * sizes.slab_stride),
            slab_stride: number(sizes.slab_stride),
            host_valid: &tables.host_valid,
            host_pages: self.arena.memory(),
            blocks: STORE_BLOCKS,
        };
        Some((of_request, pages))
    }

    /// Async, on the prompts' stream: makes clusters of the tokens of a prompt that leave the steady zone, in the step's layer; or, if `stored`, brings
    /// their pages to the host.
    pub(super) fn cluster_prompt(
        &self,
        step: &Step<'_>,
        keys: &DeviceBuffer<Word>,
        values: &DeviceBuffer<Word>,
        stored: bool,
    ) -> Result<()> {
        let [entry] = step.entries else { unreachable!("a prompt is alone in its step") };
        let request = &self.requests[&entry.request];
        let left = self.config.zones(entry.after()).retrievable;
        let Some((tables, pages)) = self.cluster_tables(request, step.layer) else { return Ok(()) };
        if request.resident || left.is_empty() {
            return Ok(());
        }
        let Sizes { kv_heads, head_words, .. } = self.sizes;
        let shape = ClusterShape::new(left.len() as u32, kv_heads as u32, head_words as u32);
        let scratch = &self.clusters.as_ref().expect("it has tables").prompt;
        let run = ClusterRun { shape, keys, values, first: left.start as u32, scratch, tables, pages };
        let side = self.prompt.side();
        // SAFETY: the request has segments and slabs for as many partitions as any run of these tokens can have; scratch is this stream's alone, where the
        // store comes behind the others.
        Ok(unsafe { if stored { run.store(&self.kernels, side) } else { run.index(&self.kernels, side) } }?)
    }

    /// A request has no clusters in a layer: to measure how they are made. Async, on the prompts' stream.
    pub(super) fn forget_clusters(&self, id: RequestId, layer: usize) -> Result<()> {
        let (Some(clusters), Some(request)) = (&self.clusters, self.requests.get(&id)) else { return Ok(()) };
        let first = 2 * (request.place * self.sizes.rows() + layer * self.sizes.kv_heads);
        let rows = first..first + 2 * self.sizes.kv_heads;
        Ok(clusters.row_pages.fill_bytes(self.prompt.side(), rows, 0)?)
    }

    /// Async, before a decode step: of each request's tokens that are about to leave the steady zone, clusters of so many layers that the last are
    /// made before the step in which they leave.
    pub(super) fn cluster_ahead(&mut self, step: &Step<'_>) -> Result<()> {
        let Some(ClusterSizes { run, .. }) = self.sizes.clusters.filter(|_| step.layer == 0) else {
            return Ok(());
        };
        let (layers, window) = (self.sizes.layers, self.config.method().steady().window);
        for entry in step.entries {
            let request = &self.requests[&entry.request];
            let (first, made) = (request.clustered, request.layers_ahead);
            let Some(stored) = entry.before.checked_sub(first + run).filter(|_| !request.resident) else {
                continue;
            };
            let due = (layers * (stored + 1)).div_ceil(window).min(layers);
            for layer in made..due {
                self.cluster_run(&self.requests[&entry.request], layer, first)?;
            }
            let leaves = self.config.zones(entry.after()).retrievable.end >= first + run;
            debug_assert!(!leaves || due == layers, "all layers are made when their tokens leave");
            let request = self.requests.get_mut(&entry.request).expect("it was just there");
            (request.clustered, request.layers_ahead) =
                if leaves { (first + run, 0) } else { (first, due.max(made)) };
        }
        Ok(())
    }

    /// Async: makes clusters of the run of tokens from `first` on, in one layer.
    fn cluster_run(&self, request: &Request, layer: usize, first: usize) -> Result<()> {
        let Some((tables, pages)) = self.cluster_tables(request, layer) else { return Ok(()) };
        let clusters = self.clusters.as_ref().expect("it has tables");
        let Sizes { kv_heads, head_words, page_tokens, .. } = self.sizes;
        let [kv_heads, head_words, page_tokens] = [kv_heads, head_words, page_tokens].map(|size| size as u32);
        let run = self.sizes.clusters.expect("clusters").run as u32;
        let Clusters { ahead: scratch, keys, values, .. } = clusters;
        let gather = GatherRun {
            steady: &self.tables.steady,
            first_steady: (request.place * self.sizes.rows() * self.sizes.steady_stride) as u32,
            sink_pages: self.sizes.sink_pages as u32,
            ring_pages: self.sizes.ring_pages as u32,
            first_row: tables.first_row,
            kv_heads,
            head_words,
            page_tokens,
            pool: &self.tables.pool,
            first: first as u32,
            tokens: run,
            keys,
            values,
        };
        let shape = ClusterShape::new(run, kv_heads, head_words);
        let run = ClusterRun { shape, keys, values, first: 0, scratch, tables, pages };
        // SAFETY: the run's tokens are in the tail, which has a place for each of its pages; the rest as in cluster_prompt.
        unsafe {
            gather.launch(&self.kernels, &self.stream)?;
            Ok(run.launch(&self.kernels, &self.stream)?)
        }
    }

    /// Pages of all rows' clusters of a request: what was written to the host. Waits for all that is under way.
    pub(super) fn clustered_pages(&self, request: &Request) -> Result<u64> {
        let Some(clusters) = &self.clusters else { return Ok(0) };
        let mut pages = vec![0; 2 * self.sizes.rows()];
        clusters.row_pages.read(&self.stream, request.place * pages.len(), &mut pages)?;
        Ok(pages.iter().skip(1).step_by(2).map(|pages| u64::from(*pages)).sum())
    }

    /// The clusters of a row that its last step chose from. Waits for all that is under way.
    ///
    /// # Errors
    /// [`Error::UnknownRequest`], or a failed copy.
    pub fn row_clusters(&self, id: RequestId, layer: usize, kv_head: usize) -> Result<Option<RowClusters>> {
        let request = self.requests.get(&id).ok_or(Error::UnknownRequest(id))?;
        let Some(clusters) = &self.clusters else { return Ok(None) };
        self.prompt.synchronize()?;
        let (sizes, row) = (&self.sizes, layer * self.sizes.kv_heads + kv_head);
        let mut counts = [0; 2];
        clusters.row_pages.read(&self.stream, 2 * (request.place * sizes.rows() + row), &mut counts)?;
        let count = counts[usize::from(layer >= request.layers_ahead)] as usize;
        let mut found = RowClusters {
            tokens: vec![0; count],
            summaries: vec![0; count * sizes.head_words],
            value_means: vec![0; count * sizes.head_words],
            pages: Vec::new(),
        };
        let of_row = self.config.host_slabs(request.plan.max_tokens);
        let mut page = vec![0 as Word; sizes.page_words];
        for partition in 0..count {
            let (segment, at) = (partition / sizes.segment_partitions, partition % sizes.segment_partitions);
            let row_of_segment = request.segments[segment] as usize * sizes.rows() + row;
            let place = row_of_segment * sizes.segment_partitions + at;
            clusters.partition_tokens.read(&self.stream, place, &mut found.tokens[partition..=partition])?;
            let words = partition * sizes.head_words..(partition + 1) * sizes.head_words;
            let first = place * sizes.head_words;
            self.tables.summaries.read(&self.stream, first, &mut found.summaries[words.clone()])?;
            clusters.value_means.read(&self.stream, first, &mut found.value_means[words])?;
            let slab = request.slabs[row * of_row + partition / SLAB_PAGES as usize];
            self.arena.read(HostPage { slab, index: partition % SLAB_PAGES as usize }, &mut page);
            found.pages.extend(&page);
        }
        Ok(Some(found))
    }

    /// The partitions that a row estimated in the layer that ran last, as [`selected`](Self::selected) has those that it read.
    ///
    /// # Errors
    /// As there.
    pub fn estimated(&self, index: usize, kv_head: usize) -> Result<Vec<u32>> {
        let Some(ClusterSizes { estimates, .. }) = self.sizes.clusters.filter(|sizes| sizes.estimates > 0)
        else {
            return Ok(Vec::new());
        };
        let (row, mut count) = (index * self.sizes.kv_heads + kv_head, [0]);
        self.lists.estimated.read(&self.stream, row, &mut count)?;
        let mut ids = vec![0; count[0] as usize];
        self.lists.estimated_ids.read(&self.stream, row * estimates, &mut ids)?;
        Ok(ids)
    }
}

impl<'a> Stages<'a> {
    /// How many partitions rows have, if that is their own number.
    pub fn row_pages(&self) -> Option<&'a DeviceBuffer<u32>> {
        self.backend.clusters.as_ref().map(|clusters| &clusters.row_pages)
    }

    /// What attention adds to logits, of clusters.
    pub fn biases(&self) -> Option<&'a DeviceBuffer<f32>> {
        self.backend.clusters.as_ref().map(|clusters| &clusters.biases)
    }

    /// What a layer's attention has besides, of clusters.
    pub fn clusters(&self, outputs: &'a DeviceBuffer<Word>) -> Option<ClusterStages<'a>> {
        let (sizes, lists, tables) = (&self.backend.sizes, self.lists, &self.backend.tables);
        let (clusters, of) = (self.backend.clusters.as_ref()?, sizes.clusters?);
        let (kv_heads, page_tokens) = (sizes.kv_heads as u32, sizes.page_tokens as u32);
        let numbers = ClusterNumbers {
            directories: &tables.directories,
            first_row: self.layer as u32 * kv_heads,
            request_rows: sizes.rows() as u32,
            segment_partitions: sizes.segment_partitions as u32,
            partition_tokens: &clusters.partition_tokens,
            value_means: &clusters.value_means,
        };
        let biases = PageBiases {
            entries: &lists.entries,
            kv_heads,
            ids: &lists.ids,
            id_counts: &lists.id_counts,
            capacity: sizes.id_stride as u32,
            clusters: numbers,
            page_tokens,
            biases: &clusters.biases,
        };
        let estimate = (of.estimates > 0).then_some(Estimate {
            entries: &lists.entries,
            kv_heads,
            group: sizes.group as u32,
            head_words: sizes.head_words as u32,
            ids: &lists.estimated_ids,
            counts: &lists.estimated,
            capacity: of.estimates as u32,
            logits: &lists.logits,
            stride: sizes.stride as u32,
            clusters: numbers,
            outputs,
            lse: &lists.lse,
        });
        Some(ClusterStages { biases, estimate })
    }
}
