//! The step as a graph.

use std::array;
use std::error::Error;

use spinkv::backend::cuda::driver::{Graph, Stream};
use spinkv::backend::cuda::kernels::{
    Append, Attend, Awaited, Gather, IndexOperator, IndexStep, KvTables, OffloadPages, PartitionPages,
    Resolve, Score, SelectPartitions, SummaryTable,
};
use spinkv::backend::cuda::operators::{LayerIndex, LayerSelect};
use spinkv::backend::cuda::{LayerStep, capture_step};
use spinkv::pipeline::GroupMerge;
use spinkv_kernels::abi::SEGMENT_KEYS;

use super::{
    GROUP, HEAD_WORDS, Inputs, KEYS, KV_HEADS, LAYERS, LIMIT, LayerLists, Machine, PAGE_TOKENS, PAGE_WORDS,
    ROWS, SCALE, SEGMENTS, SLOT_STRIDE, SPLITS, World,
};

impl World<'_> {
    /// The step of all layers as a graph for a batch of `bucket` entries; `delayed`: with something slow between the launches.
    pub(super) fn capture(&self, bucket: usize, delayed: bool) -> Result<Graph, Box<dyn Error>> {
        let Machine { stream, kernels, .. } = self.machine;
        let [first, second] = &self.device.lists;
        let lists = [first.first(bucket)?, second.first(bucket)?];
        let inputs = self.device.inputs.first(bucket)?;
        let layers: [LayerStep<'_>; LAYERS] =
            array::from_fn(|layer| self.layer(layer, &inputs, &lists[layer]));
        if !delayed {
            // SAFETY: nothing runs yet; see `run`.
            return Ok(unsafe { capture_step(&layers, kernels, stream)? });
        }
        let delay = |stream: &Stream| self.device.delay.fill_bytes(stream, 0..self.device.delay.len(), 1);
        Ok(Graph::capture(stream, |stream| {
            // SAFETY: as above.
            layers.iter().try_for_each(|layer| unsafe { layer.launch_with(kernels, stream, delay) })
        })?)
    }

    fn layer<'a>(&'a self, layer: usize, inputs: &'a Inputs, lists: &'a LayerLists) -> LayerStep<'a> {
        let device = &self.device;
        LayerStep {
            index: Some(LayerIndex::InTree(IndexStep {
                table: SummaryTable {
                    operator: IndexOperator::Mean,
                    entries: &inputs.entries,
                    directories: &device.directories,
                    first_row: (layer * KV_HEADS) as u32,
                    request_rows: ROWS as u32,
                    kv_heads: KV_HEADS as u32,
                    head_words: HEAD_WORDS as u32,
                    partition_tokens: PAGE_TOKENS as u32,
                    segment_partitions: SEGMENT_KEYS,
                    summaries: &device.summaries,
                },
                steady: &device.steady,
                pool: &device.pool,
                page_tokens: PAGE_TOKENS as u32,
            })),
            append: Append {
                pages: OffloadPages {
                    entries: &inputs.entries,
                    steady: &device.steady,
                    pool: &device.pool,
                    host_slabs: &device.host_slabs,
                    host_valid: &device.host_valid,
                    host_pages: &self.arena,
                    first_row: (layer * KV_HEADS) as u32,
                    kv_heads: KV_HEADS as u32,
                    head_words: HEAD_WORDS as u32,
                    page_tokens: PAGE_TOKENS as u32,
                    on_host: true,
                    host_words: PAGE_WORDS as u32,
                    code: None,
                },
                keys: &inputs.keys,
                values: &inputs.values,
            },
            select: Some(LayerSelect::InTree(
                Score {
                    entries: &inputs.entries,
                    directories: &device.directories,
                    summaries: &device.summaries,
                    queries: &inputs.queries,
                    kv_heads: KV_HEADS as u32,
                    group: GROUP as u32,
                    head_words: HEAD_WORDS as u32,
                    bounds: false,
                    segment_partitions: SEGMENT_KEYS,
                    request_rows: ROWS as u32,
                    layer: layer as u32,
                    scale: SCALE,
                    stride: KEYS as u32,
                    row_pages: None,
                    always: None,
                    logits: &lists.logits,
                    statistics: &lists.statistics,
                },
                SelectPartitions {
                    entries: &inputs.entries,
                    logits: &lists.logits,
                    statistics: Some(&lists.statistics),
                    kv_heads: KV_HEADS as u32,
                    group: GROUP as u32,
                    stride: KEYS as u32,
                    merge: GroupMerge::Max,
                    least: None,
                    top_p: 1.0,
                    marks: None,
                    first_row: 0,
                    row_pages: None,
                    estimates: None,
                    resident: KEYS as u32,
                    keys: &inputs.keys,
                    capacity: LIMIT as u32,
                    ids: &lists.ids,
                    selected: &lists.id_counts,
                },
            )),
            resolve: Resolve {
                entries: &inputs.entries,
                kv_heads: KV_HEADS as u32,
                layer: layer as u32,
                ids: &lists.ids,
                id_counts: &lists.id_counts,
                partitions: PartitionPages::Pages(1),
                tables: KvTables {
                    directories: &device.directories,
                    segments: &device.segments,
                    owners: &device.owners,
                    physical: &device.physical,
                    states: &device.states,
                    steady: &device.steady,
                    host_slabs: &device.host_slabs,
                    host_valid: &device.host_valid,
                    request_rows: ROWS as u32,
                },
                slot_capacity: SLOT_STRIDE as u32,
                segment_capacity: SEGMENTS as u32,
                pages: &lists.pages,
                misses_last: true,
                page_counts: &lists.page_counts,
                copies: &lists.copies,
                copy_keys: None,
                copy_counts: &lists.copy_counts,
                arrived: &lists.arrived,
                faults: &lists.faults,
            },
            gather: Gather {
                copies: &lists.copies,
                counts: &lists.copy_counts,
                host_pages: &self.arena,
                device_pages: &device.pool,
                page_words: PAGE_WORDS as u32,
                device_words: PAGE_WORDS as u32,
                code: None,
                blocks: 4,
                arrived: Some(&lists.arrived),
            },
            attend: Attend {
                entries: &inputs.entries,
                kv_heads: KV_HEADS as u32,
                group: GROUP as u32,
                layer: layer as u32,
                head_words: HEAD_WORDS as u32,
                pages: &lists.pages,
                page_counts: &lists.page_counts,
                steady: &device.steady,
                biases: None,
                pool: &device.pool,
                page_tokens: PAGE_TOKENS as u32,
                queries: &inputs.queries,
                scale: SCALE,
                awaited: Some(Awaited { copy_counts: &lists.copy_counts, arrived: &lists.arrived }),
                splits: SPLITS as u32,
                partials: &lists.partials,
                arrivals: &lists.arrivals,
                outputs: &lists.outputs,
                lse: &lists.lse,
            },
            clusters: None,
            low_rank: None,
        }
    }
}
