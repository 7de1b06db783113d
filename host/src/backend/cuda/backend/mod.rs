//! The stages on a GPU, with tables whose decisions are taken there.
//!
//! The host keeps counts and ids: which pages, segments and slabs a request has. Where its pages are, what is evicted and what is
//! fetched is on the GPU alone. What changes from step to step is in one [`Entry`] a request, so a captured graph serves every step.

mod clusters;
mod device;
mod elastic;
mod low_rank;
mod measure;
mod outliers;
mod own;
mod prefix;
mod prompt;
mod request;
mod sizes;
mod stages;
mod whole;

use std::collections::HashMap;
use std::ops::{Add, Range};
use std::sync::Arc;

use spinkv_kernels::abi::{ABSENT_SLOT, Entry, NO_KEY, SEGMENT_KEYS, SLOT_PINNED};

use super::driver::{Context, DeviceBuffer, PinnedArena, Stream};
use super::kernels::{Kernels, Resolve};
use crate::backend::{Backend, PromptChunk, Step, StepEntry, StepKind};
use crate::memory::{
    Admission, HostArena, HostProgress, MemoryLimits, MemoryUsage, PrefixUsage, RequestPlan, Word,
};
use crate::pipeline::{Counters, Reach, RequestId};
use crate::{Error, KvConfig, Result};
use clusters::Clusters;
use device::{Lists, RowCounts, Tables};
use low_rank::KeyFactors;
use own::Own;
use prefix::Prefixes;
use prompt::Prompt;
use request::{Request, is_resident};
use sizes::Sizes;

pub use clusters::RowClusters;
pub use sizes::CudaLimits;
pub use stages::StepTensors;

/// The stages on a GPU, with tables whose decisions are taken there.
///
/// Every stage is enqueued and not waited for: what one wrote, the next one reads, on [`stream`](Self::stream). A prompt's Index,
/// Offload, Select and Retrieve run on a stream of their own, under the next layer's compute: the keys and values that they were given
/// may be written again by work that is enqueued after the layer behind theirs is complete, so two buffers in turn are enough.
#[derive(Debug)]
pub struct CudaBackend {
    config: KvConfig,
    sizes: Sizes,
    kernels: Kernels,
    own: Own,
    stream: Arc<Stream>,
    tables: Tables,
    clusters: Option<Clusters>,
    /// Of keys in low rank.
    key_factors: Option<KeyFactors>,
    lists: Lists,
    /// Whether prompts are kept; see [`keep_prompts`](CudaBackend::keep_prompts).
    keeps_prompts: bool,
    /// Whether Attention runs beside the copies of Retrieve; see [`attend_beside_copies`](CudaBackend::attend_beside_copies).
    attends_beside: bool,
    /// What `lists.counts` are parts of.
    counts: DeviceBuffer<u32>,
    prompt: Prompt,
    prefixes: Option<Prefixes>,
    arena: HostArena<PinnedArena>,
    admission: Admission,
    requests: HashMap<RequestId, Request>,
    free_places: Vec<usize>,
    free_segments: Vec<u32>,
    free_pages: Vec<u32>,
    /// The step whose entries are on the GPU.
    uploaded: Vec<StepEntry>,
    /// The decode step whose counts were not looked at yet.
    unsettled: Option<Vec<StepEntry>>,
    /// Requests of which a row's selection could not be made resident: layer, KV head and fault.
    faulted: HashMap<RequestId, (usize, usize, u32)>,
    counters: Counters,
}

/// Bytes that a backend has allocated on the GPU, by what for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CudaBytes {
    /// Pages of steady zones and caches.
    pub pages: u64,
    /// Tables.
    pub tables: u64,
    /// Summaries.
    pub summaries: u64,
    /// What keys in low rank are rebuilt from, and found with.
    pub key_factors: u64,
    /// What the stages hand on.
    pub lists: u64,
    /// What a method's own operators hold.
    pub operators: u64,
}

impl CudaBytes {
    /// All kinds together.
    pub fn total(&self) -> u64 {
        let Self { pages, tables, summaries, key_factors, lists, operators } = self;
        pages + tables + summaries + key_factors + lists + operators
    }
}

impl Add for CudaBytes {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            pages: self.pages + other.pages,
            tables: self.tables + other.tables,
            summaries: self.summaries + other.summaries,
            key_factors: self.key_factors + other.key_factors,
            lists: self.lists + other.lists,
            operators: self.operators + other.operators,
        }
    }
}

impl CudaBackend {
    /// Whether a backend of this kind can be made, as far as no GPU is needed to tell.
    ///
    /// # Errors
    /// Those of [`new`](Self::new) but the driver's.
    pub fn check(config: &KvConfig, limits: &CudaLimits) -> Result<()> {
        Sizes::new(config, limits).map(|_| ())
    }

    /// A backend without requests on the device of `context`. Everything on the GPU is allocated now, the host memory when requests
    /// need it.
    ///
    /// # Errors
    /// [`Error::UnsupportedOnGpu`] for a shape, layout or method that the kernels do not have, what a method's own operators refuse, those of [`RequestPlan::new`] for the
    /// longest request, [`Error::EmptyRequest`] for no requests, [`Error::OutOfHostMemory`] for less than a slab of each layer, and
    /// [`Error::Driver`], for instance for selections of more pages than a block has shared memory for, or out of GPU memory.
    pub fn new(context: &Context, config: KvConfig, limits: &CudaLimits) -> Result<Self> {
        let sizes = Sizes::new(&config, limits)?;
        let (kernels, stream) = (Kernels::load(context)?, Arc::new(Stream::new(context)?));
        // No shorter request has longer lists, and one that is resident has none.
        let longest = RequestPlan::new(&config, limits.max_tokens, limits.buffering)?;
        if !is_resident(&config, &longest) {
            let [slots, segments, list] =
                [sizes.slot_stride, sizes.segments, sizes.list_capacity].map(|size| size as u32);
            Resolve::check_capacity(&kernels, slots, segments, list)?;
        }
        let own = Own::load(&config, &sizes.operators(&config), &stream)?;
        let sizes = Sizes { scratch_words: own.scratch_words(), ..sizes };
        let tables = Tables::new(&sizes, &stream)?;
        let clusters = Clusters::new(&sizes, &stream)?;
        let key_factors = KeyFactors::new(&config, &sizes, &kernels, &stream)?;
        let (lists, counts) = Lists::new(&sizes, &kernels, &stream)?;
        let memory = PinnedArena::with_capacity(context, sizes.host_bytes as usize)?;
        let mut arena =
            HostArena::new(config.host_layout(), config.shape().layers, Some(sizes.host_bytes), memory);
        // Kernels are given pages of both tiers, though requests that never fill one have none on the host.
        arena.reserve(1, &mut |_| {})?;
        let limits = MemoryLimits {
            gpu_pages: Some(sizes.planned_pages),
            gpu_bytes: None,
            host_bytes: Some(sizes.host_bytes),
        };
        Ok(Self {
            prompt: Prompt::new(&sizes, &kernels, &stream)?,
            prefixes: None,
            admission: Admission::new(limits),
            requests: HashMap::new(),
            free_places: (0..sizes.requests).rev().collect(),
            free_segments: (0..(sizes.requests * sizes.segments) as u32).rev().collect(),
            free_pages: (0..sizes.pool_pages as u32).rev().collect(),
            uploaded: Vec::new(),
            keeps_prompts: true,
            attends_beside: true,
            unsettled: None,
            faulted: HashMap::new(),
            counters: Counters::default(),
            config,
            sizes,
            kernels,
            own,
            stream,
            tables,
            clusters,
            key_factors,
            lists,
            counts,
            arena,
        })
    }

    /// Pins `bytes` of host memory before the first request, as many whole slabs of every layer as fit. `progress` hears of each chunk.
    ///
    /// # Errors
    /// [`Error::OutOfHostMemory`] beyond the limit, [`Error::AllocationFailed`] if the system refuses.
    pub fn reserve_host(&mut self, bytes: u64, progress: &mut dyn FnMut(HostProgress)) -> Result<()> {
        self.admission.limits().check_reserve(bytes)?;
        let slabs = bytes / (self.arena.slab_bytes() * self.config.shape().layers as u64);
        self.arena.reserve(slabs as usize, progress)
    }

    /// Whether a prompt's Index, Offload, Select and Retrieve are launched. Without them nothing of a prompt is kept, and steps after it are
    /// wrong: to measure what they cost.
    pub fn keep_prompts(&mut self, keep: bool) {
        self.keeps_prompts = keep;
    }

    /// Whether Attention begins while Retrieve's copies run, as it does unless told otherwise: each row with the pages that are here. Else it waits for
    /// all of them: to measure what that is worth. Results are the same. What was captured stays as it is.
    pub fn attend_beside_copies(&mut self, beside: bool) {
        self.attends_beside = beside;
    }

    /// The stream of all stages; who computes their tensors uses it, too.
    pub fn stream(&self) -> &Arc<Stream> {
        &self.stream
    }

    /// The kernels, for who launches some of them.
    pub fn kernels(&self) -> &Kernels {
        &self.kernels
    }

    /// The most requests at a time.
    pub fn capacity(&self) -> usize {
        self.sizes.requests
    }

    /// The entries of the step that has begun, of the first `batch` of its batch: where its tokens stand.
    ///
    /// # Errors
    /// Beyond the [`capacity`](Self::capacity).
    pub fn entries_of(&self, batch: usize) -> Result<DeviceBuffer<Entry>> {
        self.entries_in(0..batch)
    }

    /// The same of the requests in `requests` alone, which begin with the first or as a [half](Self::half_of).
    ///
    /// # Errors
    /// As for [`entries_of`](Self::entries_of).
    pub fn entries_in(&self, requests: Range<usize>) -> Result<DeviceBuffer<Entry>> {
        Ok(self.lists.entries.part(requests)?)
    }

    /// Bytes allocated on the GPU.
    pub fn allocated(&self) -> CudaBytes {
        let (of_partitions, of_clusters) = self.clusters.as_ref().map_or((0, 0), Clusters::bytes);
        CudaBytes {
            pages: self.tables.pool.bytes(),
            tables: self.tables.bytes(),
            summaries: self.tables.summaries.bytes() + of_partitions,
            key_factors: self.key_factors.as_ref().map_or(0, KeyFactors::bytes),
            lists: self.lists.bytes() + self.prompt.bytes() + of_clusters,
            operators: self.own.bytes(),
        }
    }

    /// Whether nothing is held: every page, segment, slab and place is free.
    pub fn is_empty(&self) -> bool {
        let Sizes { requests, segments, pool_pages, .. } = self.sizes;
        self.requests.is_empty()
            && self.free_places.len() == requests
            && self.free_segments.len() == requests * segments
            && self.free_pages.len() == pool_pages
            && self.arena.used_slabs() == 0
    }

    /// The partitions that a row selected in the layer that ran last: KV head `kv_head` of entry `index` of its batch. Waits for it.
    ///
    /// # Errors
    /// Beyond the batch, or a failed launch.
    pub fn selected(&self, index: usize, kv_head: usize) -> Result<Vec<u32>> {
        let (row, mut count) = (index * self.sizes.kv_heads + kv_head, [0]);
        self.lists.id_counts.read(&self.stream, row, &mut count)?;
        let mut ids = vec![0; count[0] as usize];
        self.lists.ids.read(&self.stream, row * self.sizes.id_stride, &mut ids)?;
        Ok(ids)
    }

    /// The partitions that every step of a row [reads](crate::pipeline::Method::always), ascending. Waits for its prompt.
    ///
    /// # Errors
    /// [`Error::UnknownRequest`], or a failed launch.
    pub fn always(&self, id: RequestId, layer: usize, kv_head: usize) -> Result<Vec<u32>> {
        let request = self.requests.get(&id).ok_or(Error::UnknownRequest(id))?;
        let row = request.place * self.sizes.rows() + layer * self.sizes.kv_heads + kv_head;
        let mut marks = vec![0; self.sizes.mark_words];
        self.prompt.synchronize()?;
        self.tables.marks.read(&self.stream, row * marks.len(), &mut marks)?;
        let marked = |at: &u32| marks[*at as usize / 32] >> (at % 32) & 1 != 0;
        let first = self.sizes.first_partition() as u32;
        Ok((0..32 * marks.len() as u32).filter(marked).map(|at| first + at).collect())
    }

    /// Looks at the counts of the last decode step and prompt: [`counters`](Backend::counters) count them from then on. Waits for both. Of batches that take
    /// turns within a step, layer by layer, only the last one is counted right.
    ///
    /// A request of which a row's selection could not be made resident, which the tables rule out, gets [`Error::StepFault`] from its next step.
    ///
    /// # Errors
    /// A failed launch.
    pub fn settle(&mut self) -> Result<()> {
        self.settle_prompt()?;
        self.settle_step()?;
        self.count_clusters()
    }

    /// Counts pages of clusters that were written to the host since the last time.
    fn count_clusters(&mut self) -> Result<()> {
        if self.clusters.is_none() {
            return Ok(());
        }
        for id in self.requests.keys().copied().collect::<Vec<_>>() {
            let pages = self.clustered_pages(&self.requests[&id])?;
            let request = self.requests.get_mut(&id).expect("it was just there");
            self.counters.offloaded_pages += pages - request.counted_pages;
            request.counted_pages = pages;
        }
        Ok(())
    }

    /// [`settle`](Self::settle) of the decode step alone.
    fn settle_step(&mut self) -> Result<()> {
        let Some(entries) = self.unsettled.take() else { return Ok(()) };
        let mut numbers = vec![0; self.counts.len()];
        self.counts.read(&self.stream, 0, &mut numbers)?;
        let Sizes { layers, kv_heads, requests, .. } = self.sizes;
        let counts = RowCounts::new(&numbers, requests * kv_heads);
        for (index, entry) in entries.iter().enumerate() {
            let Some(request) = self.requests.get_mut(&entry.request).filter(|request| !request.resident)
            else {
                continue;
            };
            if let Some((layer, kv_head, fault)) =
                counts.fault(0..layers, index * kv_heads..(index + 1) * kv_heads)
            {
                self.faulted.insert(entry.request, (layer, kv_head, fault));
                continue;
            }
            // Pages of the sequence never come into a cache of clusters.
            let left = |tokens: usize| self.config.left_pages(tokens).len();
            let adopted = if self.clusters.is_some() { 0 } else { left(entry.after()) - left(entry.before) };
            for (row, reach) in self.config.reaches().iter().enumerate() {
                let slots = request.plan.slots(*reach) as u32;
                let (pages, misses, _) = counts.of(row / kv_heads, index * kv_heads + row % kv_heads);
                let came = misses + if slots > 0 { adopted as u32 } else { 0 };
                let held = (request.held[row] + came).min(slots);
                self.counters.evicted_pages += u64::from(request.held[row] + came - held);
                request.held[row] = held;
                self.counters.hits += u64::from(pages - misses);
                self.counters.misses += u64::from(misses);
                self.counters.adopted_pages += if slots > 0 { adopted as u64 } else { 0 };
            }
        }
        Ok(())
    }

    /// Writes the tables of a new request.
    fn write_tables(&self, request: &Request, steady: &[u32], slots: &[u32]) -> Result<()> {
        let (sizes, stream) = (&self.sizes, &self.stream);
        let rows = sizes.rows();
        let (place, segment) = (request.place, rows * SEGMENT_KEYS as usize);
        self.tables.directories.write(stream, place * sizes.segments, &request.segments)?;
        for number in &request.segments {
            let first = *number as usize * segment;
            // Both bytes of ABSENT_SLOT are alike.
            self.tables.segments.fill_bytes(stream, first..first + segment, ABSENT_SLOT as u8)?;
        }
        let at = |stride: usize| place * rows * stride;
        self.write_slabs(request)?;
        let marks = at(sizes.mark_words)..at(sizes.mark_words) + rows * sizes.mark_words;
        self.tables.marks.fill_bytes(stream, marks, 0)?;
        let reaches = self.config.reaches();
        let mask = |reach: &Reach| if *reach == Reach::Steady { u32::MAX } else { 0 };
        if let Some(clusters) = &self.clusters {
            clusters.row_pages.fill_bytes(stream, at(2)..at(2) + 2 * rows, 0)?;
        }
        let masks: Vec<u32> = reaches.iter().flat_map(|reach| vec![mask(reach); sizes.mask_words]).collect();
        self.tables.masks.write(stream, at(sizes.mask_words), &masks)?;
        self.write_steady(request, steady)?;
        let stride = sizes.slot_stride;
        self.tables.owners.write(stream, at(stride), &vec![NO_KEY; rows * stride])?;
        let (mut physical, mut states) = (vec![u32::MAX; rows * stride], vec![SLOT_PINNED; rows * stride]);
        let mut left = slots;
        for (row, reach) in reaches.iter().enumerate() {
            let of_row = if request.resident { 0 } else { request.plan.slots(*reach) };
            let (own, others) = left.split_at(of_row);
            physical[row * stride..][..of_row].copy_from_slice(own);
            states[row * stride..][..of_row].fill(0);
            left = others;
        }
        self.tables.physical.write(stream, at(stride), &physical)?;
        self.tables.states.write(stream, at(stride) / 4, bytemuck::cast_slice(&states))?;
        Ok(())
    }

    /// Writes the pages of a request's steady zone, `[rows, pages]`; beside those of a resident one the ring has a place, which is never used.
    fn write_steady(&self, request: &Request, steady: &[u32]) -> Result<()> {
        let rows = self.sizes.rows();
        let of_row = steady.len() / rows;
        let list = of_row + usize::from(request.resident);
        let mut table = vec![0; rows * list];
        for (list, pages) in table.chunks_exact_mut(list.max(1)).zip(steady.chunks_exact(of_row.max(1))) {
            list[..of_row].copy_from_slice(pages);
        }
        let first = request.place * rows * self.sizes.steady_stride;
        Ok(self.tables.steady.write(&self.stream, first, &table)?)
    }

    /// Launches a prompt's stage, if prompts are kept.
    fn of_prompt(&mut self, launch: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        if self.keeps_prompts { launch(self) } else { Ok(()) }
    }

    /// The entries of a step, as the GPU reads them.
    fn entries(&self, step: &Step<'_>) -> Vec<Entry> {
        let entry = |part: &StepEntry| {
            let request = &self.requests[&part.request];
            self.sizes.decode_entry(&self.config, request, part.after())
        };
        step.entries.iter().map(entry).collect()
    }

    /// Puts the step's entries onto the GPU, filled up to a batch of `batch`, unless they are there.
    fn upload(&mut self, step: &Step<'_>, batch: usize) -> Result<()> {
        if step.layer == 0 {
            for entry in step.entries {
                self.requests.get_mut(&entry.request).expect("an admitted request").clock.tick();
            }
        } else if self.uploaded == step.entries {
            return Ok(());
        }
        let mut entries = self.entries(step);
        entries.resize(batch.max(entries.len()), Entry::default());
        self.lists.part(&self.sizes, 0..entries.len())?.write_entries(&self.stream, &entries)?;
        self.uploaded = step.entries.to_vec();
        Ok(())
    }

    /// A decode step's entries go to the GPU, filled up to a batch of `batch`; whoever launches the stages as a graph of that
    /// batch calls this before, and [`settle`](Self::settle) after it.
    ///
    /// # Errors
    /// [`Error::BatchTooLarge`], [`Error::StepFault`] of an earlier step, or a failed launch.
    pub fn begin_step(&mut self, step: &Step<'_>, batch: usize) -> Result<()> {
        let limit = self.sizes.requests;
        if batch > limit || step.entries.len() > batch {
            return Err(Error::BatchTooLarge { requests: step.entries.len().max(batch), limit });
        }
        // A prompt of others goes on beside the step.
        if self.awaits_prompt(step.entries) {
            self.settle_prompt()?;
        }
        if step.layer == 0 {
            self.settle_step()?;
        }
        self.check_faults(step)?;
        self.cluster_ahead(step)?;
        self.upload(step, batch)?;
        if let (Some(factors), 0) = (&self.key_factors, step.layer) {
            for entry in step.entries.iter().filter(|entry| entry.before == 0) {
                let place = self.requests[&entry.request].place;
                factors.without_prompt(&self.sizes, place, &self.stream)?;
            }
        }
        if step.layer == 0 {
            self.unsettled = Some(step.entries.to_vec());
        }
        if step.layer == 0 && self.clusters.is_none() {
            let page_tokens = self.sizes.page_tokens;
            let full = step.entries.iter().filter(|entry| entry.after().is_multiple_of(page_tokens)).count();
            self.counters.offloaded_pages += (full * self.sizes.rows()) as u64;
        }
        Ok(())
    }

    /// Refuses a step of a request of which an earlier one went wrong.
    fn check_faults(&self, step: &Step<'_>) -> Result<()> {
        let faulted =
            |entry: &StepEntry| self.faulted.get(&entry.request).map(|fault| (entry.request, *fault));
        match step.entries.iter().find_map(faulted) {
            Some((request, (layer, kv_head, fault))) => {
                Err(Error::StepFault { request, layer, kv_head, fault })
            }
            None => Ok(()),
        }
    }

    /// Whether all requests of a step keep all their pages steady: then only Offload and Attention have something to do.
    pub fn is_resident(&self, requests: impl IntoIterator<Item = RequestId>) -> bool {
        requests.into_iter().all(|id| self.requests.get(&id).is_some_and(|request| request.resident))
    }
}

impl Backend for CudaBackend {
    /// bf16, eight elements a word.
    type Tensor = DeviceBuffer<Word>;

    fn config(&self) -> &KvConfig {
        &self.config
    }

    fn elements(tensor: &Self::Tensor) -> usize {
        tensor.len() * spinkv_kernels::abi::WORD_ELEMENTS
    }

    fn admit(&mut self, id: RequestId, plan: RequestPlan) -> Result<()> {
        let limit = self.sizes.requests;
        if self.free_places.is_empty() {
            return Err(Error::BatchTooLarge { requests: self.requests.len() + 1, limit });
        }
        self.check_plan(&plan)?;
        let resident = is_resident(&self.config, &plan);
        let due = self.admission.admit(&self.config, id, &plan)?;
        let outcome = self.make_room(id, plan, resident, &due);
        if outcome.is_err() {
            self.admission.remove(id);
            // Who gave buffering for it gets that back; what is wrong with the request is what is said.
            let _ = self.share_out();
        }
        outcome
    }

    fn plan(&self, request: RequestId) -> Option<&RequestPlan> {
        self.requests.get(&request).map(|request| &request.plan)
    }

    fn prepare(&mut self, step: &Step<'_>) -> Result<()> {
        match step.entries {
            [StepEntry { kind: StepKind::Prompt, .. }] => self.prepare_prompt(step),
            entries if entries.iter().all(|entry| entry.kind == StepKind::Decode) => {
                self.begin_step(step, entries.len())
            }
            _ => Err(Error::UnsupportedOnGpu { what: "a step of prompts beside other requests".to_owned() }),
        }
    }

    fn park(&mut self, request: RequestId) -> Result<()> {
        self.park_request(request)
    }

    fn resume(&mut self, request: RequestId) -> Result<()> {
        self.resume_request(request)
    }

    fn release(&mut self, id: RequestId) {
        // What the GPU still does with its pages must be over before they are another's, and before the host poisons slabs. Who
        // goes on finds out about a device that failed.
        let _ = self.stream.synchronize().and_then(|()| self.prompt.synchronize());
        // Its last step counts, too.
        let _ = self.settle();
        self.faulted.remove(&id);
        self.release_request(id);
        let _ = self.share_out();
    }

    fn index(&mut self, step: &Step<'_>, keys: &Self::Tensor, values: &Self::Tensor) -> Result<()> {
        if self.is_prompt(step) {
            self.of_prompt(|backend| backend.index_prompt(step, keys, values))
        } else {
            self.index_step(step)
        }
    }

    fn offload(&mut self, step: &Step<'_>, keys: &Self::Tensor, values: &Self::Tensor) -> Result<()> {
        if self.is_prompt(step) {
            self.of_prompt(|backend| backend.offload_prompt(step, keys, values))
        } else {
            self.append(step, keys, values)
        }
    }

    fn select(&mut self, step: &Step<'_>, queries: &Self::Tensor) -> Result<()> {
        if self.is_prompt(step) {
            self.of_prompt(|backend| backend.select_prompt(step, queries))
        } else {
            self.select_step(step, queries)
        }
    }

    fn retrieve(&mut self, step: &Step<'_>) -> Result<()> {
        if self.is_prompt(step) {
            self.of_prompt(|backend| backend.retrieve_prompt(step))
        } else {
            self.retrieve_step(step)
        }
    }

    fn attend(&mut self, step: &Step<'_>, queries: &Self::Tensor, out: &mut Self::Tensor) -> Result<()> {
        self.attend_step(step, queries, out)
    }

    fn attend_prompt(
        &mut self,
        chunk: &PromptChunk,
        queries: &Self::Tensor,
        keys: &Self::Tensor,
        values: &Self::Tensor,
        out: &mut Self::Tensor,
    ) -> Result<()> {
        self.attend_chunk(chunk, queries, keys, values, out)
    }

    fn prefix_block(&self) -> Option<usize> {
        self.prefixes.as_ref().map(|prefixes| prefixes.cache.block_tokens())
    }

    fn share_prefix(&mut self, request: RequestId, prompt: &[u32], unit: usize) -> Result<usize> {
        self.share_blocks(request, prompt, unit)
    }

    fn fill_prefix(
        &mut self,
        request: RequestId,
        layer: usize,
        prefix: usize,
        keys: &mut Self::Tensor,
        values: &mut Self::Tensor,
    ) -> Result<()> {
        self.load_prefix(request, layer, prefix, keys, values)
    }

    fn keep_prefix(&mut self, request: RequestId, prompt: &[u32]) {
        self.keep_blocks(request, prompt);
    }

    fn prefixes(&self) -> Option<PrefixUsage> {
        self.prefixes.as_ref().map(|prefixes| prefixes.cache.usage())
    }

    fn counters(&self) -> Counters {
        self.counters
    }

    fn usage(&self) -> MemoryUsage {
        self.requests.values().map(|request| self.sizes.usage(&self.config, request)).sum()
    }
}
