//! What a request has, and its part in a step.

use spinkv_kernels::abi::{Entry, SEGMENT_KEYS};

use super::Sizes;
use crate::KvConfig;
use crate::memory::{GpuBytes, HostBytes, KvDtype, MemoryUsage, RequestPlan, SlabId, Word};
use crate::paging::StepClock;
use crate::pipeline::{Budget, Select};

/// What the host knows of an admitted request. Its tables are on the GPU, in a place of their own.
#[derive(Debug)]
pub(super) struct Request {
    /// As planned, with the buffering that it has now.
    pub plan: RequestPlan,
    /// Which part of the tables it has.
    pub place: usize,
    pub clock: StepClock,
    /// Of clusters: the tokens before this one are in them, or are sinks.
    pub clustered: usize,
    /// Layers, from the first on, whose clusters of the next run are made and not yet to be selected.
    pub layers_ahead: usize,
    /// Pages of clusters that were counted so far.
    pub counted_pages: u64,
    /// Whether all its pages stay steady, since a step selects all of them at any length: it has no cache.
    pub resident: bool,
    /// Whether its cache was taken away, or all its pages if it has none.
    pub parked: bool,
    /// Of one that is parked as a whole, `[rows, page_words]`: what the host's pages have not, if its newest pages have room left.
    pub newest: Vec<Word>,
    /// Partitions of each row that every step reads beside the budget: of those that its prompt indexed.
    pub always: usize,
    pub segments: Vec<u32>,
    /// `[rows, slabs of a row]`.
    pub slabs: Vec<SlabId>,
    /// Tokens whose slabs it shares from the beginning.
    pub prefix: usize,
    /// Physical pages of all its rows, in the steady zone and in caches: they change places, but nobody else gets them.
    pub pages: Vec<u32>,
    /// `[rows]`: pages that the caches hold.
    pub held: Vec<u32>,
}

/// Whether every step of a request, however long it is by then, selects all that it can, so that its pages need no cache. Partitions
/// that every step reads beside the budget don't count: how many there are is known when the prompt comes.
pub(super) fn is_resident(config: &KvConfig, plan: &RequestPlan) -> bool {
    let selectable = config.retrievable_partitions(plan.max_tokens).len();
    if selectable > 0 && (plan.by_reach.steady > 0 || plan.by_reach.selected == 0) {
        return plan.by_reach.steady == 0;
    }
    match config.method().select() {
        Select::Everything => true,
        // A number of tokens allows the same at any length, and fewer can be selected before. A fraction of the context is rounded down
        // anew at each.
        Select::TopK { budget: Budget::Tokens(tokens), .. } => {
            config.budget_partitions(Budget::Tokens(tokens), plan.max_tokens) >= selectable
        }
        Select::TopK { .. } | Select::Nothing | Select::Custom { .. } => selectable == 0,
    }
}

impl Sizes {
    /// Pages of a row's steady zone in a request of this plan.
    pub fn steady_pages(&self, config: &KvConfig, plan: &RequestPlan, resident: bool) -> usize {
        if resident { config.layout().pages(plan.max_tokens) } else { self.sink_pages + self.ring_pages }
    }

    /// The end of the pages that a row of `tokens` tokens can select, and of the partitions.
    fn retrievable_end(&self, config: &KvConfig, tokens: usize) -> (u32, u32) {
        let (pages, partitions) = (config.left_pages(tokens), config.retrievable_partitions(tokens));
        (
            if pages.is_empty() { self.sink_pages as u32 } else { pages.end },
            if partitions.is_empty() { self.first_partition() as u32 } else { partitions.end },
        )
    }

    /// The tables of a request that holds `tokens` tokens, of which nothing leaves and nothing can be selected.
    fn held(&self, config: &KvConfig, request: &Request, tokens: usize) -> Entry {
        let rows = self.rows();
        let mut entry = Entry {
            tokens: tokens as u32,
            clock: request.clock.0 % 64,
            directory: (request.place * self.segments) as u32,
            first_slot: (request.place * rows * self.slot_stride) as u32,
            slot_stride: self.slot_stride as u32,
            slots: self.slot_stride as u32,
            first_steady: (request.place * rows * self.steady_stride) as u32,
            sink_pages: self.sink_pages as u32,
            ring_pages: self.ring_pages as u32,
            first_slab: (request.place * rows * self.slab_stride) as u32,
            slab_stride: self.slab_stride as u32,
            first_partition: self.first_partition() as u32,
            first_marks: (request.place * rows) as u32,
            basis: request.place as u32,
            ..Entry::default()
        };
        if request.resident {
            // All pages are sinks, and the ring is never used.
            entry.sink_pages = config.layout().pages(request.plan.max_tokens) as u32;
            entry.ring_pages = 1;
            entry.leaving_key = entry.sink_pages;
            return entry;
        }
        let (page, partition) = self.retrievable_end(config, tokens);
        Entry { leaving_key: page, new_partition: partition, ..entry }
    }

    /// A decode step that brings a request to `tokens` tokens.
    pub fn decode_entry(&self, config: &KvConfig, request: &Request, tokens: usize) -> Entry {
        let entry = self.held(config, request, tokens);
        if request.resident {
            return entry;
        }
        let ((page, partition), (page_before, partition_before)) =
            (self.retrievable_end(config, tokens), self.retrievable_end(config, tokens - 1));
        if self.clusters.is_some() {
            // No page goes over to the cache.
            let entry = Entry { new_partitions: request.layers_ahead as u32, ..entry };
            return self.selecting(config, request, entry, partition);
        }
        Entry {
            leaving_key: page_before,
            leaving: page - page_before,
            new_partition: partition_before,
            new_partitions: if self.summaries.is_some() { partition - partition_before } else { 0 },
            ..self.selecting(config, request, entry, partition)
        }
    }

    /// A prompt of `tokens` tokens that is stored: what can be selected goes to the host alone.
    pub fn prompt_entry(&self, config: &KvConfig, request: &Request, tokens: usize) -> Entry {
        let entry = self.held(config, request, tokens);
        if request.resident {
            return entry;
        }
        Entry {
            leaving_key: self.sink_pages as u32,
            leaving: entry.leaving_key - self.sink_pages as u32,
            new_partition: entry.first_partition,
            new_partitions: if self.summaries.is_some() && self.clusters.is_none() {
                entry.new_partition - entry.first_partition
            } else {
                0
            },
            ..entry
        }
    }

    /// The step behind it, in which its last query warms the cache.
    pub fn warm_entry(&self, config: &KvConfig, request: &Request, tokens: usize) -> Entry {
        let entry = self.held(config, request, tokens);
        if request.resident { entry } else { self.selecting(config, request, entry, entry.new_partition) }
    }

    /// What a request takes of the tables, pages and slabs: its place in the tables is as large as that of the longest request, its pages and
    /// slabs are its own.
    pub fn usage(&self, config: &KvConfig, request: &Request) -> MemoryUsage {
        let (rows, page_bytes) = (self.rows() as u64, config.layout().page_bytes() as u64);
        let number = size_of::<u32>() as u64;
        // One that is parked as a whole has none.
        let steady = rows * self.steady_pages(config, &request.plan, request.resident) as u64;
        let steady = steady.min(request.pages.len() as u64);
        let gpu = GpuBytes {
            directories: self.segments as u64 * number,
            segments: request.segments.len() as u64
                * rows
                * u64::from(SEGMENT_KEYS)
                * size_of::<u16>() as u64,
            // Owner and physical page in four bytes each, state in one.
            slot_arrays: rows * self.slot_stride as u64 * 9,
            steady_lists: rows * self.steady_stride as u64 * number,
            // Slab and valid bits.
            host_tables: rows * self.slab_stride as u64 * 2 * number,
            marks: rows * (self.mark_words + self.mask_words) as u64 * number,
            summaries: request.segments.len() as u64
                * rows
                * config.summary_bytes(KvDtype::Bf16.bytes()) as u64,
            steady_pages: steady * page_bytes,
            cache_pages: (request.pages.len() as u64 - steady) * page_bytes,
            in_flight_pages: 0,
            key_coefficients: (request.segments.len() * self.coefficient_words() * size_of::<Word>()) as u64,
            key_bases: (self.basis_words() * size_of::<Word>()) as u64,
        };
        let pages = request.slabs.len() as u64 * config.host_layout().slab_bytes();
        MemoryUsage { gpu, host: HostBytes { pages, ..HostBytes::default() } }
    }

    /// With the partitions up to `end` to choose from.
    fn selecting(&self, config: &KvConfig, request: &Request, entry: Entry, end: u32) -> Entry {
        let Some(summaries) = self.summaries else { return entry };
        let partitions = end - entry.first_partition;
        let best = config.budget_partitions(summaries.budget, entry.tokens as usize);
        let limit = best.saturating_add(request.always).min(u32::MAX as usize);
        Entry { partitions, limit: partitions.min(limit as u32), ..entry }
    }
}
