use spinkv_kernels::abi::attend::blocks_of_group;
use spinkv_kernels::abi::low_rank::{MAX_RANK, RANK_STEP};
use spinkv_kernels::abi::page_code::PageCode;
use spinkv_kernels::abi::{MAX_SLOTS, SEGMENT_KEYS, SLAB_PAGES, WORD_ELEMENTS, gather};

use super::super::kernels::{IndexOperator, Kernels, PartitionPages};
use super::super::operators::OperatorSizes;
use super::clusters::ClusterSizes;
use super::own::Own;
use crate::memory::{KvDtype, RequestPlan};
use crate::partition::PartitionKind;
use crate::pipeline::{Budget, GroupMerge, Index, PartitionScore, Reach, Select};
use crate::{Error, KvConfig, Result};

/// For how much a [`CudaBackend`](super::CudaBackend) is made. Its tables, lists and GPU pages are allocated once, so that captured
/// graphs keep their addresses.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CudaLimits {
    /// The most requests at a time, which is the largest batch, too.
    pub requests: usize,
    /// Tokens of the longest request, prompt and generated ones together.
    pub max_tokens: usize,
    /// Buffering pages for each mandatory page, at most.
    pub buffering: f64,
    /// Pages of the GPU pool; `None` for as many as `requests` of the longest want.
    pub gpu_pages: Option<usize>,
    /// Bytes of pinned host memory; `None` for as many as `requests` of the longest need.
    pub host_bytes: Option<u64>,
}

/// What Index makes and Select reads.
#[derive(Clone, Copy, Debug)]
pub(super) struct Summaries {
    /// `None` without an Index, and for the method's own.
    pub operator: Option<IndexOperator>,
    /// Words of a summary; 0 without an Index.
    pub words: usize,
    pub score: PartitionScore,
    pub merge: GroupMerge,
    pub budget: Budget,
}

/// The sizes of everything that lies on the GPU. Strides are those of one request: each has a place of the same size.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub requests: usize,
    pub max_tokens: usize,
    pub layers: usize,
    pub kv_heads: usize,
    pub group: usize,
    pub head_words: usize,
    pub page_tokens: usize,
    /// Words of a page.
    pub page_words: usize,
    /// `None` for methods whose partitions are no clusters.
    pub clusters: Option<ClusterSizes>,
    /// Words of a host page.
    pub host_page_words: usize,
    /// The code of host pages, if they are coded.
    pub code: Option<PageCode>,
    /// Vectors of the bases of keys in low rank; 0 for keys that are on the host.
    pub rank: usize,
    /// The most pages of a row that leave the steady zone in one step.
    pub leaving_pages: usize,
    /// `None` for methods that select nothing or everything.
    pub summaries: Option<Summaries>,
    /// The most partitions of a row that every step reads, beside the budget.
    pub always: usize,
    /// Whether some layers read everything.
    pub everything: bool,
    /// Words of a row's marks; 0 if there are none.
    pub mark_words: usize,
    /// Words of a row's masks, which all partitions of rows are in that read their steady zone alone; 0 if there are none.
    pub mask_words: usize,
    pub partition_pages: PartitionPages,
    pub partition_tokens: usize,
    pub segment_partitions: usize,
    pub sink_pages: usize,
    /// Places of the tail's ring.
    pub ring_pages: usize,
    /// Entries of a row's steady list.
    pub steady_stride: usize,
    /// Slots of a row, a multiple of 4.
    pub slot_stride: usize,
    /// Slabs of a row in the host tables.
    pub slab_stride: usize,
    /// Segments of a directory.
    pub segments: usize,
    /// Room for a row's logits, a multiple of 4.
    pub stride: usize,
    /// Room for a row's selected partitions.
    pub id_stride: usize,
    /// Room for a row's selected pages.
    pub list_capacity: usize,
    /// Pages of the pool.
    pub pool_pages: usize,
    /// Pages of the pool that admission may give out: a ring has a place more than plans count.
    pub planned_pages: usize,
    /// Bytes of the host arena.
    pub host_bytes: u64,
    /// Words of scratch that a method's own Select has for a row; 0 until that is loaded.
    pub scratch_words: usize,
}

impl Sizes {
    /// # Errors
    /// [`Error::EmptyRequest`] for no requests, [`Error::UnsupportedOnGpu`] for what the kernels do not have, and those of
    /// [`RequestPlan::new`].
    pub fn new(config: &KvConfig, limits: &CudaLimits) -> Result<Self> {
        if limits.requests == 0 {
            return Err(Error::EmptyRequest);
        }
        let (shape, layout) = (config.shape(), config.layout());
        let refuse = |what: String| Err(Error::UnsupportedOnGpu { what });
        if layout.dtype() != KvDtype::Bf16 {
            return refuse(format!("pages of {:?}: they are bf16", layout.dtype()));
        }
        if ![64, 128].contains(&shape.head_dim) {
            return refuse(format!("heads of {} elements: they have 64 or 128", shape.head_dim));
        }
        if shape.group() > 16 {
            return refuse(format!("{} query heads of a KV head: at most 16", shape.group()));
        }
        if ![8, 16, 32, 64].contains(&layout.page_tokens()) {
            return refuse(format!("pages of {} tokens: 8, 16, 32 or 64", layout.page_tokens()));
        }
        let rank = config.low_rank().map_or(0, |low_rank| low_rank.rank);
        if rank > MAX_RANK as usize || !rank.is_multiple_of(RANK_STEP as usize) {
            return refuse(format!("keys in a rank of {rank}: a multiple of {RANK_STEP} up to {MAX_RANK}"));
        }
        let rows = limits.requests.saturating_mul(shape.kv_heads);
        if rows > gather::MAX_LISTS as usize {
            return refuse(format!(
                "{} requests of {} KV heads at a time: at most {} rows",
                limits.requests,
                shape.kv_heads,
                gather::MAX_LISTS
            ));
        }
        let (method, width) = (config.method(), config.summary_width());
        let summaries = match (method.index(), method.select()) {
            (Index::Nothing, Select::Nothing | Select::Everything) => None,
            (_, Select::Nothing | Select::Everything) => {
                return refuse(format!("method {}: it makes summaries that nothing reads", method.name()));
            }
            (index, select) => {
                let operator = match index {
                    Index::MeanKey => Some(IndexOperator::Mean),
                    Index::KeyBounds => Some(IndexOperator::Bounds),
                    Index::Nothing | Index::Custom(_) | Index::Clusters => None,
                };
                if !width.is_multiple_of(WORD_ELEMENTS) {
                    return refuse(format!("summaries of {width} elements: a multiple of {WORD_ELEMENTS}"));
                }
                let words = width / WORD_ELEMENTS;
                match select {
                    Select::TopK { score, merge, budget } => {
                        Some(Summaries { operator, words, score, merge, budget })
                    }
                    Select::Custom { budget, .. } => {
                        let (score, merge) = (PartitionScore::DotProduct, GroupMerge::Max);
                        Some(Summaries { operator, words, score, merge, budget })
                    }
                    Select::Nothing | Select::Everything => None,
                }
            }
        };
        let ruled = config.reaches().iter().any(|reach| *reach != Reach::Selected);
        if ruled && matches!(method.select(), Select::Custom { .. }) {
            return refuse(format!(
                "rows that reach otherwise than method {}, whose Select is its own",
                method.name()
            ));
        }
        if ruled && summaries.is_none() {
            return refuse(format!(
                "rows that reach otherwise than method {}, which scores nothing",
                method.name()
            ));
        }
        let everything = |reach: &Reach| *reach == Reach::Everything;
        let mixed = |layer: &[Reach]| layer.iter().any(everything) && !layer.iter().all(everything);
        if config.reaches().chunks(shape.kv_heads).any(mixed) {
            return refuse("layers of which some heads read everything, and others not".to_owned());
        }
        let (page_tokens, partition_tokens) = (layout.page_tokens(), config.partition_tokens());
        let plan = RequestPlan::new(config, limits.max_tokens, limits.buffering)?;
        let pages = layout.pages(limits.max_tokens);
        let unit = method.partition().zone_unit(page_tokens).context;
        let (sink_pages, window) = (config.sink_pages(), method.steady().window);
        let ring_pages = (window + unit).div_ceil(page_tokens).max(1);
        let by_reach = config.rows_by_reach();
        let mandatory = plan.row.mandatory_pages;
        let list_capacity = if by_reach.everything > 0 { plan.selectable_pages } else { mandatory };
        let resident_pages = pages.min(config.max_steady_pages() + list_capacity);
        let partitions = config.retrievable_partitions(limits.max_tokens).len();
        let stride = partitions.next_multiple_of(4).max(4);
        let always = method.always().partitions().min(partitions);
        let id_stride = match summaries {
            Some(_) if by_reach.everything > 0 => partitions,
            Some(_) => config.max_selected(limits.max_tokens),
            None => 0,
        };
        let slots = plan.row.slots().max(list_capacity);
        let slot_stride = slots.next_multiple_of(4).max(4);
        if slot_stride > MAX_SLOTS as usize / 4 * 4 {
            return refuse(format!("{slot_stride} slots of a row: at most {MAX_SLOTS}"));
        }
        let slab_stride = if config.clusters() {
            config.host_slabs(limits.max_tokens).max(1)
        } else {
            pages.div_ceil(SLAB_PAGES as usize)
        };
        let clusters = match method.partition() {
            PartitionKind::Cluster { run } => {
                let share = method.estimated();
                Some(ClusterSizes { run, share, estimates: (partitions as f32 * share) as usize })
            }
            _ => None,
        };
        let extra = (sink_pages + ring_pages).saturating_sub(config.max_steady_pages());
        let extra = limits.requests * plan.rows * extra;
        // More than all can use is not taken.
        let wanted = limits.requests * plan.gpu_pages() + extra;
        let planned_pages = limits.gpu_pages.map_or(wanted, |pages| pages.min(wanted));
        let host_bytes = limits.host_bytes.unwrap_or_else(|| {
            (limits.requests * plan.host_slabs()).max(shape.layers) as u64 * config.host_layout().slab_bytes()
        });
        let sizes = Self {
            requests: limits.requests,
            max_tokens: limits.max_tokens,
            layers: shape.layers,
            kv_heads: shape.kv_heads,
            group: shape.group(),
            head_words: shape.head_dim / WORD_ELEMENTS,
            page_tokens,
            page_words: layout.page_words(),
            clusters,
            host_page_words: config.host_layout().page_words(),
            code: config.host_layout().code(),
            rank,
            leaving_pages: unit / page_tokens,
            summaries,
            always,
            everything: by_reach.everything > 0,
            mark_words: if always > 0 { stride.div_ceil(32) } else { 0 },
            mask_words: if by_reach.steady > 0 { stride.div_ceil(32) } else { 0 },
            partition_pages: if partition_tokens >= page_tokens {
                PartitionPages::Pages((partition_tokens / page_tokens) as u32)
            } else {
                PartitionPages::Shared((page_tokens / partition_tokens) as u32)
            },
            partition_tokens,
            segment_partitions: config.segment_partitions(),
            sink_pages,
            ring_pages,
            steady_stride: (sink_pages + ring_pages).max(resident_pages + 1),
            slot_stride,
            slab_stride,
            segments: slab_stride.div_ceil(SEGMENT_KEYS as usize / SLAB_PAGES as usize),
            stride,
            id_stride: id_stride.max(1),
            list_capacity: list_capacity.max(1),
            pool_pages: planned_pages,
            planned_pages: planned_pages.saturating_sub(extra),
            host_bytes,
            scratch_words: 0,
        };
        Own::check(config, &sizes.operators(config))?;
        Ok(sizes)
    }

    /// What a method's own operators are loaded for.
    pub fn operators(&self, config: &KvConfig) -> OperatorSizes {
        OperatorSizes {
            shape: *config.shape(),
            requests: self.requests,
            max_tokens: self.max_tokens,
            page_tokens: self.page_tokens,
            partition_tokens: self.partition_tokens,
            summary_width: config.summary_width(),
            stride: self.stride,
            capacity: self.id_stride,
        }
    }

    /// The most partitions of a row that are estimated.
    pub fn estimates(&self) -> usize {
        self.clusters.map_or(0, |clusters| clusters.estimates)
    }

    /// Rows of a request.
    pub fn rows(&self) -> usize {
        self.layers * self.kv_heads
    }

    /// Words of the queries of one token.
    pub fn query_words(&self) -> usize {
        self.group * self.kv_heads * self.head_words
    }

    /// Factor of the logits.
    pub fn scale(&self) -> f32 {
        1.0 / ((self.head_words * WORD_ELEMENTS) as f32).sqrt()
    }

    /// Words of the keys of one token.
    pub fn key_words(&self) -> usize {
        self.kv_heads * self.head_words
    }

    /// Words of the coefficients of one segment, of all layers.
    pub fn coefficient_words(&self) -> usize {
        self.layers * SEGMENT_KEYS as usize * self.page_tokens * self.rank / WORD_ELEMENTS
    }

    /// Words of a request's bases, of all layers.
    pub fn basis_words(&self) -> usize {
        self.layers * self.key_words() * self.rank
    }

    /// Words of the summaries of one segment, of all rows.
    pub fn summary_words(&self) -> usize {
        self.rows() * self.segment_partitions * self.summaries.map_or(0, |summaries| summaries.words)
    }

    /// Blocks that share a row's tokens in the attention of a batch, of which all requests, or not all, are resident.
    pub fn splits(&self, kernels: &Kernels, batch: usize, resident: bool) -> u32 {
        let units = batch * self.kv_heads * blocks_of_group(self.group as u32) as usize;
        let steady = if resident { self.steady_stride } else { self.sink_pages + self.ring_pages };
        let pages = if resident { steady } else { steady + self.list_capacity };
        kernels.attend_splits(units as u32, (pages * self.page_tokens) as u32)
    }

    /// Requests whose lists are whole parts of a batch's: those of entries of 80 bytes, and of rows' numbers, begin at multiples of 256 bytes.
    pub fn half_unit(&self) -> usize {
        let (entries, rows) = (16, 64);
        (entries..).step_by(entries).find(|unit| (unit * self.kv_heads).is_multiple_of(rows)).unwrap_or(rows)
    }

    /// The first partition that can be selected.
    pub fn first_partition(&self) -> usize {
        if self.clusters.is_some() { 0 } else { self.sink_pages * self.page_tokens / self.partition_tokens }
    }
}
