mod prefix;

use std::collections::HashMap;

use rayon::prelude::*;

use super::key_factors::KeyFactors;
use super::row::{NewTokens, Row, Shared, Tiers};
use super::{attend_prompt, attend_with_estimates};
use crate::backend::{Backend, PromptChunk, Step, StepEntry};
use crate::memory::{
    Admission, Allocator, GpuBytes, HostArena, HostBytes, HostPage, HostProgress, MemoryLimits, MemoryUsage,
    PageCensus, PagePool, PlainMemory, PrefixCache, PrefixUsage, RequestPlan, RowId, SummaryPool, Transfers,
    Word,
};
use crate::paging::{Directory, SegmentPool, StepClock};
use crate::pipeline::{Counters, Place, Reach, RequestId};
use crate::{Error, KvConfig, KvShape, Result};

/// The reference backend. See the [module](super).
#[derive(Debug)]
pub struct CpuBackend {
    config: KvConfig,
    allocator: Allocator,
    tiers: Tiers,
    summaries: SummaryPool,
    admission: Admission,
    requests: HashMap<RequestId, Request>,
}

/// What a request holds.
#[derive(Debug)]
struct Request {
    /// As planned, with the buffering that it has now.
    plan: RequestPlan,
    clock: StepClock,
    directory: Directory,
    /// One block for each segment of the directory: of each row [so many elements](KvConfig::summary_elements).
    summaries: Vec<Box<[f32]>>,
    /// Of keys that are kept in low rank.
    key_factors: Option<KeyFactors>,
    /// `[layers, kv_heads]`.
    rows: Vec<Row>,
    /// Tokens whose slabs it shares from the beginning.
    prefix: usize,
}

impl Request {
    fn shared(&self, id: RequestId, row: usize) -> Shared<'_> {
        let id = RowId { request: id, row: row as u32 };
        Shared { id, directory: &self.directory, clock: self.clock }
    }

    /// The rows that select, which are those whose caches have buffering; `reaches` are those of all rows.
    fn selecting_mut(
        &mut self,
        id: RequestId,
        reaches: &[Reach],
    ) -> impl Iterator<Item = (Shared<'_>, &mut Row)> {
        let selects = |(row, reach): (_, &Reach)| (*reach == Reach::Selected).then_some(row);
        self.rows_mut(id).zip(reaches).filter_map(selects)
    }

    /// Each row, with what it shares with the others.
    fn rows_mut(&mut self, id: RequestId) -> impl Iterator<Item = (Shared<'_>, &mut Row)> {
        let (directory, clock) = (&self.directory, self.clock);
        self.rows.iter_mut().enumerate().map(move |(row, state)| {
            let id = RowId { request: id, row: row as u32 };
            (Shared { id, directory, clock }, state)
        })
    }
}

impl CpuBackend {
    /// A backend without requests.
    pub fn new(config: KvConfig, limits: MemoryLimits) -> Self {
        let (layout, shape) = (*config.layout(), *config.shape());
        let allocator = Allocator::default();
        let memory = PlainMemory::lazy(allocator.clone());
        let block = shape.rows() * config.summary_elements();
        Self {
            tiers: Tiers {
                pool: PagePool::new(layout, limits.gpu_pages, allocator.clone()),
                arena: HostArena::new(config.host_layout(), shape.layers, limits.host_bytes, memory),
                segments: SegmentPool::new(shape.rows(), allocator.clone()),
                transfers: Transfers::default(),
                prefixes: None,
                counters: Counters::default(),
            },
            summaries: SummaryPool::new(block, allocator.clone()),
            admission: Admission::new(limits),
            requests: HashMap::new(),
            allocator,
            config,
        }
    }

    /// Makes `bytes` of host memory real before the first request, so that no step waits for it: as many whole slabs of
    /// every layer as fit. `progress` hears of each chunk. Contexts that need more take it as they grow, as ever.
    ///
    /// # Errors
    /// [`OutOfHostMemory`](crate::Error::OutOfHostMemory) beyond the limit,
    /// [`AllocationFailed`](crate::Error::AllocationFailed) if the system refuses.
    pub fn with_reserved_host(mut self, bytes: u64, progress: &mut dyn FnMut(HostProgress)) -> Result<Self> {
        self.admission.limits().check_reserve(bytes)?;
        let arena = &mut self.tiers.arena;
        let slabs = bytes / (arena.slab_bytes() * self.config.shape().layers as u64);
        arena.memory_mut().set_first_touch(true);
        arena.reserve(slabs as usize, progress)?;
        arena.memory_mut().set_first_touch(false);
        Ok(self)
    }

    /// How much of each tier may be used.
    pub fn limits(&self) -> &MemoryLimits {
        self.admission.limits()
    }

    /// Completes transfers only when somebody waits for them or by
    /// [`complete_transfers`](Self::complete_transfers), in an order drawn from `seed`. For tests: results must
    /// not change.
    pub fn with_late_transfers(mut self, seed: u64) -> Self {
        self.tiers.transfers = Transfers::late(seed);
        self
    }

    /// Completes up to `count` of the transfers under way, whichever, and returns how many.
    pub fn complete_transfers(&mut self, count: usize) -> usize {
        let Tiers { transfers, pool, arena, .. } = &mut self.tiers;
        let done = transfers.complete(count, pool, arena);
        for transfer in &done {
            let RowId { request, row } = transfer.row();
            // A request that ended has nothing to publish.
            let Some(state) = self.requests.get_mut(&request) else { continue };
            let (shared, row) = state.rows_mut(request).nth(row as usize).expect("a row of the request");
            row.complete(&self.tiers.segments, &shared, transfer);
        }
        self.share_out();
        done.len()
    }

    /// The transfers under way.
    pub fn transfers(&self) -> &Transfers {
        &self.tiers.transfers
    }

    /// Where the storage of tables, summaries and pages comes from.
    pub fn allocator(&self) -> &Allocator {
        &self.allocator
    }

    /// Where the GPU's pages are.
    pub fn page_census(&self) -> PageCensus {
        self.tiers.pool.census()
    }

    /// The partitions that a row's last step selected, ascending; `None` for an unknown row.
    pub fn selected(&self, request: RequestId, layer: usize, kv_head: usize) -> Option<&[u32]> {
        self.row(request, layer, kv_head).map(|(_, row)| row.selected())
    }

    /// The partitions that a row's last step [estimated](crate::pipeline::Method::estimated), ascending; `None` for an unknown row.
    pub fn estimated(&self, request: RequestId, layer: usize, kv_head: usize) -> Option<&[u32]> {
        self.row(request, layer, kv_head).map(|(_, row)| row.estimated())
    }

    /// The partitions that every step of a row [reads](crate::pipeline::Method::always), ascending; `None` for an unknown row.
    pub fn always(&self, request: RequestId, layer: usize, kv_head: usize) -> Option<Vec<u32>> {
        let (_, row) = self.row(request, layer, kv_head)?;
        let first = self.config.retrievable_partitions(crate::pipeline::MAX_TOKENS).start;
        let marked = |at: &u32| row.always()[*at as usize / 32] >> (at % 32) & 1 != 0;
        Some((0..32 * row.always().len() as u32).filter(marked).map(|at| first + at).collect())
    }

    /// The pages that a row's last step attended to, in token order, each with its valid tokens: what the share of the attention
    /// mass that is read follows from. Good until the next step of the request; none for an unknown row.
    pub fn read_pages(
        &self,
        request: RequestId,
        layer: usize,
        kv_head: usize,
    ) -> impl Iterator<Item = (&[Word], usize)> {
        let listed = self.row(request, layer, kv_head).map_or(&[][..], |(_, row)| row.listed());
        listed.iter().map(|(page, tokens)| (self.tiers.pool.page(*page), *tokens as usize))
    }

    /// Pages of a row that are complete on the host; `None` for an unknown row.
    pub fn published_pages(&self, request: RequestId, layer: usize, kv_head: usize) -> Option<usize> {
        self.row(request, layer, kv_head).map(|(_, row)| row.host().valid_pages())
    }

    /// The bytes of a [host page](KvConfig::host_layout) that is complete; `None` for others and for an unknown row.
    pub fn host_page(&self, request: RequestId, layer: usize, kv_head: usize, key: u32) -> Option<Vec<Word>> {
        let (_, row) = self.row(request, layer, kv_head)?;
        let mut bytes = vec![0; self.config.host_layout().page_words()];
        self.tiers.arena.read(row.host().published(key)?, &mut bytes);
        Some(bytes)
    }

    /// Tokens of each partition of a row of clusters, by id; `None` for an unknown row and for methods without clusters.
    pub fn cluster_tokens(&self, request: RequestId, layer: usize, kv_head: usize) -> Option<Vec<usize>> {
        let (_, row) = self.row(request, layer, kv_head).filter(|_| self.config.clusters())?;
        let elements = self.config.summary_elements();
        let first = (layer * self.config.shape().kv_heads + kv_head) * elements;
        let pieces = self.requests[&request].summaries.iter().map(|block| &block[first..first + elements]);
        let tokens = |piece: &[f32]| piece[elements - self.config.segment_partitions()..].to_vec();
        let all: Vec<usize> = pieces.flat_map(tokens).map(|tokens| tokens as usize).collect();
        Some(all[..row.cluster_pages()].to_vec())
    }

    /// For each page of a row's cache, by page key, whether it holds the same bytes as its host page and, where those are not on the host, the
    /// keys that are rebuilt; what
    /// stands behind "no stale page is ever read". Pages that a transfer touches are left out. `None` for an unknown
    /// row.
    pub fn audit(&self, request: RequestId, layer: usize, kv_head: usize) -> Option<Vec<(u32, bool)>> {
        let (shared, row) = self.row(request, layer, kv_head)?;
        let settled = row.cache().resident().filter(|(_, page)| !self.tiers.pool.is_held(*page));
        let compare = |(key, page)| {
            let host = row.host().published(key);
            let same =
                host.is_some_and(|host| self.fetched(shared.id, key, host) == self.tiers.pool.page(page));
            (key, same)
        };
        Some(settled.map(compare).collect())
    }

    /// The bytes of a page as it comes to the GPU.
    pub(super) fn fetched(&self, row: RowId, key: u32, host: HostPage) -> Vec<Word> {
        let mut bytes = vec![0; self.config.layout().page_words()];
        self.tiers.arena.load(host, &mut bytes);
        if let Some(factors) = &self.requests[&row.request].key_factors {
            let (row, kv_heads) = (row.row as usize, self.config.shape().kv_heads);
            let place = Place { layer: row / kv_heads, kv_head: row % kv_heads };
            factors.rebuild(&self.config, place, key, &mut bytes);
        }
        bytes
    }

    pub(super) fn tiers(&self) -> &Tiers {
        &self.tiers
    }

    /// All rows.
    pub(super) fn rows(&self) -> impl Iterator<Item = (Shared<'_>, &Row)> {
        self.requests.iter().flat_map(|(id, request)| {
            let shared = move |(row, state)| (request.shared(*id, row), state);
            request.rows.iter().enumerate().map(shared)
        })
    }

    fn row(&self, request: RequestId, layer: usize, kv_head: usize) -> Option<(Shared<'_>, &Row)> {
        let shape = self.config.shape();
        let known = layer < shape.layers && kv_head < shape.kv_heads;
        let state = self.requests.get(&request).filter(|_| known)?;
        let row = layer * shape.kv_heads + kv_head;
        Some((state.shared(request, row), &state.rows[row]))
    }

    /// Gives a request the segments, summaries and slabs that its rows need for `tokens` tokens.
    fn extend(&mut self, id: RequestId, tokens: usize) -> Result<()> {
        let (config, shape) = (&self.config, *self.config.shape());
        let request = self.requests.get_mut(&id).expect("an admitted request");
        while request.directory.len() < config.segments(tokens) {
            let block = self.summaries.take()?;
            match self.tiers.segments.take() {
                Ok(segment) => {
                    request.directory.push(segment);
                    request.summaries.push(block);
                }
                Err(error) => {
                    self.summaries.give_back(block);
                    return Err(error);
                }
            }
        }
        if let Some(factors) = &mut request.key_factors {
            factors.extend(config, config.segments(tokens), &self.allocator)?;
        }
        for (layer, rows) in request.rows.chunks_mut(shape.kv_heads).enumerate() {
            for row in rows {
                let missing = config.host_slabs(tokens) - row.host().slabs().len();
                row.host_mut().extend(self.tiers.take_slabs(layer, missing)?);
            }
        }
        Ok(())
    }

    /// Takes back what a request of `tokens` tokens does not need.
    fn truncate(&mut self, id: RequestId, tokens: usize) {
        let request = self.requests.get_mut(&id).expect("an admitted request");
        while request.directory.len() > self.config.segments(tokens) {
            let segment = request.directory.pop().expect("more segments than needed");
            self.tiers.segments.give_back(segment);
            self.summaries.give_back(request.summaries.pop().expect("one block a segment"));
        }
        let segments = self.config.segments(tokens);
        request.key_factors.iter_mut().for_each(|factors| factors.truncate(segments));
        // Those that it shares are no part of a step.
        let slabs = self.config.host_slabs(tokens.max(request.prefix));
        for row in &mut request.rows {
            let keep = slabs.min(row.host().slabs().len());
            row.host_mut().truncate(keep).into_iter().for_each(|slab| self.tiers.arena.release(slab));
        }
    }

    /// Shrinks caches to the buffering that they are due. Every request's mandatory pages stay.
    fn shrink(&mut self) {
        for (id, buffering) in self.admission.buffering(&self.config) {
            let Some(request) = self.requests.get_mut(&id) else { continue };
            if buffering < request.plan.row.buffering_pages {
                request.plan.row.buffering_pages = buffering;
                let slots = request.plan.row.slots();
                for (shared, row) in request.selecting_mut(id, self.config.reaches()) {
                    row.resize(&mut self.tiers, &shared, slots, &mut Vec::new());
                }
            }
        }
    }

    /// Shares out what is free as buffering, as far as pages are there; what transfers still touch comes with
    /// the next call.
    fn share_out(&mut self) {
        self.shrink();
        for (id, buffering) in self.admission.buffering(&self.config) {
            let request = self.requests.get_mut(&id).expect("an admitted request");
            let rows = request.plan.by_reach.selected;
            let free = self.tiers.pool.free_pages() / rows.max(1);
            let more = free.min(buffering - request.plan.row.buffering_pages);
            if more == 0 {
                continue;
            }
            // A cache that cannot grow works on as it is.
            let Ok(mut pages) = self.tiers.pool.take(rows * more) else { return };
            request.plan.row.buffering_pages += more;
            let slots = request.plan.row.slots();
            for (shared, row) in request.selecting_mut(id, self.config.reaches()) {
                row.resize(&mut self.tiers, &shared, slots, &mut pages);
            }
        }
    }

    /// Makes sure that `pages` pages can be taken once all caches have shrunk to what they are due.
    fn reserve_pages(&mut self, pages: usize) -> Result<()> {
        let mut surplus = 0;
        for (id, buffering) in self.admission.buffering(&self.config) {
            if let Some(Request { plan, .. }) = self.requests.get(&id) {
                let more = plan.row.buffering_pages.saturating_sub(buffering);
                surplus += plan.by_reach.selected * more;
            }
        }
        if self.tiers.pool.free_pages() + surplus < pages {
            self.wait_for_ended();
        }
        self.tiers.pool.reserve(pages.saturating_sub(surplus))
    }

    /// Waits for the transfers of requests that have ended; whether there were any.
    fn wait_for_ended(&mut self) -> bool {
        let Tiers { pool, arena, transfers, .. } = &mut self.tiers;
        let ended = |id: &RequestId| !self.requests.contains_key(id);
        !transfers.wait(|transfer| ended(&transfer.row().request), pool, arena).is_empty()
    }
}

/// A row that takes part in a step.
struct Part<'a> {
    row: &'a mut Row,
    shared: Shared<'a>,
    /// The row's summaries, one piece a segment, [of so many elements](KvConfig::summary_elements).
    summaries: Vec<&'a mut [f32]>,
    key_factors: Option<&'a KeyFactors>,
    entry: StepEntry,
    place: Place,
    /// The entry's first token within the step's keys and values.
    first_token: usize,
    /// The entry's last query within the step's queries.
    last_query: usize,
    /// The row's number among the step's rows, `[entries, kv_heads]`.
    index: usize,
}

impl Part<'_> {
    /// The row's new keys or values, out of a tensor `[tokens, kv_heads, head_dim]`.
    fn new_tokens<'a>(&self, shape: &KvShape, tensor: &'a [f32]) -> NewTokens<'a> {
        let (stride, head_dim) = (shape.kv_heads * shape.head_dim, shape.head_dim);
        NewTokens {
            data: &tensor[self.first_token * stride + self.place.kv_head * head_dim..],
            stride,
            head_dim,
        }
    }

    /// The group's part of the entry's last query, out of a tensor `[queries, query_heads, head_dim]`.
    fn last_queries<'a>(&self, shape: &KvShape, tensor: &'a [f32]) -> &'a [f32] {
        let width = shape.group() * shape.head_dim;
        &tensor[(self.last_query * shape.kv_heads + self.place.kv_head) * width..][..width]
    }
}

/// The rows of a step, in the order `[entries, kv_heads]`.
fn parts<'a>(
    requests: &'a mut HashMap<RequestId, Request>,
    config: &KvConfig,
    step: &Step<'_>,
) -> Vec<Part<'a>> {
    let shape = config.shape();
    let mut entries = HashMap::with_capacity(step.entries.len());
    let (mut first_token, mut queries) = (0, 0);
    for (index, entry) in step.entries.iter().enumerate() {
        queries += entry.queries;
        entries.insert(entry.request, (index, *entry, first_token, queries - 1));
        first_token += entry.new;
    }
    let row_elements = config.summary_elements();
    let mut parts = Vec::with_capacity(step.entries.len() * shape.kv_heads);
    for (request, state) in requests.iter_mut() {
        let Some(&(index, entry, first_token, last_query)) = entries.get(request) else { continue };
        let first_row = step.layer * shape.kv_heads;
        let mut summaries: Vec<Vec<&mut [f32]>> = (0..shape.kv_heads).map(|_| Vec::new()).collect();
        for block in state.summaries.iter_mut().filter(|_| row_elements > 0) {
            let rows = block[first_row * row_elements..].chunks_exact_mut(row_elements);
            summaries.iter_mut().zip(rows).for_each(|(pieces, piece)| pieces.push(piece));
        }
        let rows = &mut state.rows[first_row..][..shape.kv_heads];
        for ((kv_head, row), summaries) in rows.iter_mut().enumerate().zip(summaries) {
            let place = Place { layer: step.layer, kv_head };
            let id = RowId { request: *request, row: (first_row + kv_head) as u32 };
            let shared = Shared { id, directory: &state.directory, clock: state.clock };
            let index = index * shape.kv_heads + kv_head;
            let key_factors = state.key_factors.as_ref();
            parts.push(Part {
                row,
                shared,
                summaries,
                key_factors,
                entry,
                place,
                first_token,
                last_query,
                index,
            });
        }
    }
    // A hash map's order must not show.
    parts.sort_unstable_by_key(|part| part.index);
    parts
}

impl Backend for CpuBackend {
    type Tensor = [f32];

    fn config(&self) -> &KvConfig {
        &self.config
    }

    fn elements(tensor: &[f32]) -> usize {
        tensor.len()
    }

    fn admit(&mut self, request: RequestId, mut plan: RequestPlan) -> Result<()> {
        let directory = Directory::new(self.config.segments(plan.max_tokens), &self.allocator)?;
        let key_factors = KeyFactors::new(&self.config, &self.allocator)?;
        let due = self.admission.admit(&self.config, request, &plan)?;
        plan.row.buffering_pages = due[&request];
        if let Err(error) = self.reserve_pages(plan.gpu_pages()) {
            self.admission.remove(request);
            return Err(error);
        }
        // Nothing can fail from here on.
        self.shrink();
        let mut pages = self.tiers.pool.take(plan.gpu_pages()).expect("pages that were reserved");
        let row = |reach: &Reach| {
            Row::new(&self.config, &plan, pages.split_off(pages.len() - plan.row_pages(*reach)))
        };
        let rows = self.config.reaches().iter().map(row).collect();
        let (clock, summaries) = (StepClock::default(), Vec::new());
        let state = Request { plan, clock, directory, summaries, key_factors, rows, prefix: 0 };
        self.requests.insert(request, state);
        self.share_out();
        Ok(())
    }

    fn plan(&self, request: RequestId) -> Option<&RequestPlan> {
        self.requests.get(&request).map(|state| &state.plan)
    }

    fn park(&mut self, request: RequestId) -> Result<()> {
        let state = self.requests.get_mut(&request).ok_or(Error::UnknownRequest(request))?;
        state.plan.row.buffering_pages = 0;
        for (shared, row) in state.rows_mut(request) {
            row.resize(&mut self.tiers, &shared, 0, &mut Vec::new());
        }
        self.admission.park(&self.config, request, false);
        self.share_out();
        Ok(())
    }

    fn resume(&mut self, request: RequestId) -> Result<()> {
        let mut plan = *self.plan(request).ok_or(Error::UnknownRequest(request))?;
        let due = self.admission.resume(&self.config, request, &plan)?;
        plan.row.buffering_pages = due[&request];
        let pages = plan.cache_pages();
        if let Err(error) = self.reserve_pages(pages) {
            self.admission.park(&self.config, request, false);
            return Err(error);
        }
        // Nothing can fail from here on.
        self.shrink();
        let mut pages = self.tiers.pool.take(pages).expect("pages that were reserved");
        let state = self.requests.get_mut(&request).expect("looked up above");
        state.plan = plan;
        for ((shared, row), reach) in state.rows_mut(request).zip(self.config.reaches()) {
            row.resize(&mut self.tiers, &shared, plan.slots(*reach), &mut pages);
        }
        self.share_out();
        Ok(())
    }

    fn release(&mut self, request: RequestId) {
        let Some(mut state) = self.requests.remove(&request) else { return };
        self.admission.remove(request);
        for row in &state.rows {
            row.host().slabs().iter().for_each(|slab| self.tiers.arena.release(*slab));
            self.tiers.pool.give_back(row.pages());
        }
        while let Some(segment) = state.directory.pop() {
            self.tiers.segments.give_back(segment);
        }
        state.summaries.into_iter().for_each(|block| self.summaries.give_back(block));
        self.share_out();
    }

    fn prepare(&mut self, step: &Step<'_>) -> Result<()> {
        for (index, entry) in step.entries.iter().enumerate() {
            let mut outcome = self.extend(entry.request, entry.after());
            if outcome.is_err() && self.wait_for_ended() {
                outcome = self.extend(entry.request, entry.after());
            }
            if let Err(error) = outcome {
                for entry in &step.entries[..=index] {
                    self.truncate(entry.request, entry.before);
                }
                return Err(error);
            }
        }
        if step.layer == 0 {
            for entry in step.entries {
                self.requests.get_mut(&entry.request).expect("an admitted request").clock.tick();
                if entry.before > 0 {
                    self.admission.prompt_done(entry.request);
                }
            }
        }
        Ok(())
    }

    fn index(&mut self, step: &Step<'_>, keys: &[f32], values: &[f32]) -> Result<()> {
        let Self { config, tiers: Tiers { pool, .. }, requests, .. } = self;
        // Most decode steps index nothing: not worth waking threads for.
        let grows = |entry: &StepEntry| !config.leaving_tokens(entry.before, entry.after()).is_empty();
        if config.summary_width() > 0 && step.entries.iter().any(grows) {
            let shape = config.shape();
            parts(requests, config, step).into_par_iter().for_each(|mut part| {
                let new = [keys, values].map(|tensor| part.new_tokens(shape, tensor));
                part.row.index(config, pool, part.place, &part.entry, new, &mut part.summaries);
            });
        }
        let (shape, mut keys) = (config.shape(), keys);
        for entry in step.entries.iter().filter(|_| config.low_rank().is_some()) {
            let state = requests.get_mut(&entry.request).expect("an admitted request");
            let new =
                keys.split_off(..entry.new * shape.kv_heads * shape.head_dim).expect("keys of all tokens");
            let rows = &state.rows[step.layer * shape.kv_heads..][..shape.kv_heads];
            let factors = state.key_factors.as_mut().expect("keys are kept so");
            factors.index(config, pool, step.layer, entry, rows, new)?;
        }
        Ok(())
    }

    fn offload(&mut self, step: &Step<'_>, keys: &[f32], values: &[f32]) -> Result<()> {
        let Self { config, tiers, requests, .. } = self;
        let shape = config.shape();
        for part in parts(requests, config, step) {
            let (keys, values) = (part.new_tokens(shape, keys), part.new_tokens(shape, values));
            part.row.offload(config, tiers, &part.shared, &part.entry, keys, values);
        }
        Ok(())
    }

    fn select(&mut self, step: &Step<'_>, queries: &[f32]) -> Result<()> {
        let Self { config, requests, .. } = self;
        let shape = config.shape();
        parts(requests, config, step).into_par_iter().try_for_each(|part| {
            let queries = part.last_queries(shape, queries);
            part.row.select(config, part.place, &part.entry, queries, &part.summaries)
        })
    }

    fn retrieve(&mut self, step: &Step<'_>) -> Result<()> {
        let Self { config, tiers, requests, .. } = self;
        parts(requests, config, step).into_iter().try_for_each(|part| {
            part.row.retrieve(config, tiers, &part.shared, &part.entry, &part.summaries)?;
            if let Some(factors) = part.key_factors {
                // Values come by transfers, and do not touch the keys.
                for copy in part.row.fetched() {
                    factors.rebuild(config, part.place, copy.key, tiers.pool.page_mut(copy.page));
                }
            }
            Ok(())
        })
    }

    fn attend(&mut self, step: &Step<'_>, queries: &[f32], out: &mut [f32]) -> Result<()> {
        let Self { config, tiers: Tiers { pool, .. }, requests, .. } = self;
        let shape = config.shape();
        let width = shape.group() * shape.head_dim;
        parts(requests, config, step).into_par_iter().zip(out.par_chunks_mut(width)).for_each(
            |(part, out)| {
                let listed = part.row.listed().iter();
                let pages: Vec<(&[Word], usize)> =
                    listed.map(|(page, tokens)| (pool.page(*page), *tokens as usize)).collect();
                let estimates = part.row.estimates(config, &part.summaries);
                let queries = part.last_queries(shape, queries);
                attend_with_estimates(queries, &pages, &estimates, config.layout(), out);
            },
        );
        Ok(())
    }

    fn attend_prompt(
        &mut self,
        chunk: &PromptChunk,
        queries: &[f32],
        keys: &[f32],
        values: &[f32],
        out: &mut [f32],
    ) -> Result<()> {
        attend_prompt(self.config.shape(), chunk, queries, keys, values, out);
        Ok(())
    }

    fn prefix_block(&self) -> Option<usize> {
        self.tiers.prefixes.as_ref().map(PrefixCache::block_tokens)
    }

    fn share_prefix(&mut self, request: RequestId, prompt: &[u32], unit: usize) -> Result<usize> {
        self.share_blocks(request, prompt, unit)
    }

    fn fill_prefix(
        &mut self,
        request: RequestId,
        layer: usize,
        prefix: usize,
        keys: &mut [f32],
        values: &mut [f32],
    ) -> Result<()> {
        self.load_prefix(request, layer, prefix, keys, values)
    }

    fn keep_prefix(&mut self, request: RequestId, prompt: &[u32]) {
        self.keep_blocks(request, prompt);
    }

    fn prefixes(&self) -> Option<PrefixUsage> {
        self.tiers.prefixes.as_ref().map(PrefixCache::usage)
    }

    fn counters(&self) -> Counters {
        self.tiers.counters
    }

    fn usage(&self) -> MemoryUsage {
        let Tiers { pool, arena, segments, .. } = &self.tiers;
        let page_bytes = self.config.layout().page_bytes();
        let mut gpu = GpuBytes {
            segments: (segments.used() * segments.segment_bytes()) as u64,
            in_flight_pages: (pool.census().in_flight * page_bytes) as u64,
            ..GpuBytes::default()
        };
        let mut host =
            HostBytes { pages: arena.used_slabs() as u64 * arena.slab_bytes(), ..HostBytes::default() };
        for request in self.requests.values() {
            gpu.directories += request.directory.bytes() as u64;
            gpu.summaries += request.summaries.iter().map(|block| size_of_val(&**block) as u64).sum::<u64>();
            let [coefficients, bases] = request.key_factors.as_ref().map_or([0; 2], KeyFactors::bytes);
            gpu.key_coefficients += coefficients;
            gpu.key_bases += bases;
        }
        for (_, row) in self.rows() {
            gpu.slot_arrays += row.cache().bytes() as u64;
            gpu.steady_lists += row.steady().bytes() as u64;
            gpu.marks += size_of_val(row.always()) as u64;
            gpu.steady_pages += (row.steady().physical_pages().len() * page_bytes) as u64;
            gpu.cache_pages += (row.cache().capacity() * page_bytes) as u64;
            host.page_tables += row.host().bytes() as u64;
        }
        MemoryUsage { gpu, host }
    }
}
