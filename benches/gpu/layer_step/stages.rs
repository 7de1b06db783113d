//! The step's launches.

use spinkv::backend::cuda::LayerStep;
use spinkv::backend::cuda::kernels::{
    Append, Attend, Awaited, Gather, IndexOperator, IndexStep, OffloadPages, PartitionPages, Resolve, Score,
    SelectPartitions, SummaryTable,
};
use spinkv::backend::cuda::operators::{LayerIndex, LayerSelect};
use spinkv::pipeline::GroupMerge;
use spinkv_kernels::abi::SEGMENT_KEYS;

use super::layer::{Layer, SHAPE};
use super::{GATHER_BLOCKS, GROUP, HEAD_WORDS, KEYS, KV_HEADS, PAGE_TOKENS, PAGE_WORDS, SELECTED, SLOTS};
use crate::attend::scale;

impl Layer {
    /// The step on a set's buffers.
    pub fn step(&self, set: usize) -> LayerStep<'_> {
        let tables = self.tables.of(set);
        let set = &self.sets[set];
        LayerStep {
            index: Some(LayerIndex::InTree(IndexStep {
                table: SummaryTable {
                    operator: IndexOperator::Mean,
                    entries: &self.entries,
                    directories: tables.directories,
                    first_row: 0,
                    request_rows: KV_HEADS as u32,
                    kv_heads: KV_HEADS as u32,
                    head_words: HEAD_WORDS as u32,
                    partition_tokens: PAGE_TOKENS as u32,
                    segment_partitions: SEGMENT_KEYS,
                    summaries: &set.summaries,
                },
                steady: tables.steady,
                pool: &set.pool,
                page_tokens: PAGE_TOKENS as u32,
            })),
            append: Append {
                pages: OffloadPages {
                    entries: &self.entries,
                    steady: tables.steady,
                    pool: &set.pool,
                    host_slabs: tables.host_slabs,
                    host_valid: tables.host_valid,
                    host_pages: &self.arena,
                    first_row: 0,
                    kv_heads: KV_HEADS as u32,
                    head_words: HEAD_WORDS as u32,
                    page_tokens: PAGE_TOKENS as u32,
                    on_host: true,
                    host_words: PAGE_WORDS as u32,
                    code: None,
                },
                keys: &self.keys,
                values: &self.values,
            },
            select: Some(LayerSelect::InTree(
                Score {
                    entries: &self.entries,
                    directories: tables.directories,
                    summaries: &set.summaries,
                    queries: &self.queries,
                    kv_heads: KV_HEADS as u32,
                    group: GROUP as u32,
                    head_words: HEAD_WORDS as u32,
                    bounds: false,
                    segment_partitions: SEGMENT_KEYS,
                    request_rows: KV_HEADS as u32,
                    layer: 0,
                    scale: scale(),
                    stride: KEYS as u32,
                    row_pages: None,
                    always: None,
                    logits: &set.logits,
                    statistics: &set.statistics,
                },
                SelectPartitions {
                    entries: &self.entries,
                    logits: &set.logits,
                    statistics: Some(&set.statistics),
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
                    // All scores are resident.
                    keys: &self.keys,
                    capacity: SELECTED as u32,
                    ids: &set.ids,
                    selected: &set.id_counts,
                },
            )),
            resolve: Resolve {
                entries: &self.entries,
                kv_heads: KV_HEADS as u32,
                layer: 0,
                ids: &set.ids,
                id_counts: &set.id_counts,
                partitions: PartitionPages::Pages(1),
                tables,
                slot_capacity: SLOTS as u32,
                segment_capacity: SHAPE.segments() as u32,
                pages: &set.pages,
                misses_last: true,
                page_counts: &set.page_counts,
                copies: &set.copies,
                copy_keys: None,
                copy_counts: &set.copy_counts,
                arrived: &set.arrived,
                faults: &set.faults,
            },
            gather: Gather {
                copies: &set.copies,
                counts: &set.copy_counts,
                host_pages: &self.arena,
                device_pages: &set.pool,
                page_words: PAGE_WORDS as u32,
                device_words: PAGE_WORDS as u32,
                code: None,
                blocks: GATHER_BLOCKS,
                arrived: Some(&set.arrived),
            },
            attend: Attend {
                entries: &self.entries,
                kv_heads: KV_HEADS as u32,
                group: GROUP as u32,
                layer: 0,
                head_words: HEAD_WORDS as u32,
                pages: &set.pages,
                page_counts: &set.page_counts,
                steady: tables.steady,
                biases: None,
                pool: &set.pool,
                page_tokens: PAGE_TOKENS as u32,
                queries: &self.queries,
                scale: scale(),
                awaited: Some(Awaited { copy_counts: &set.copy_counts, arrived: &set.arrived }),
                splits: self.splits,
                partials: &self.partials,
                arrivals: &self.arrivals,
                outputs: &self.outputs,
                lse: &self.lse,
            },
            clusters: None,
            low_rank: None,
        }
    }
}
