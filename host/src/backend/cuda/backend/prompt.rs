//! Prompts: dense attention as they come, and the other stages of a layer on a stream of their own.

use std::collections::HashMap;
use std::collections::hash_map::Entry::{Occupied, Vacant};
use std::ops::Range;

use spinkv_kernels::abi::{Entry, prefill};

use super::super::driver::{DeviceBuffer, Event, Result as DriverResult, Stream};
use super::super::kernels::{Kernels, Prefill, StorePrompt};
use super::super::operators::PromptIndex;
use super::super::step::LowRankStages;
use super::device::{Lists, RowCounts};
use super::outliers::Outliers;
use super::stages::Stages;
use super::{CudaBackend, Sizes};
use crate::Result;
use crate::backend::{PromptChunk, Step, StepEntry};
use crate::memory::Word;

/// Blocks that write pages to the host: enough for the bus.
const STORE_BLOCKS: u32 = 16;

/// Chunks whose tables are kept; prompts of one chunk size have few.
const MAX_CHUNKS: usize = 512;

/// What the prompts' own stream works with.
#[derive(Debug)]
pub(super) struct Prompt {
    pub side: Stream,
    /// What is stored: `[1]`.
    stored: DeviceBuffer<Entry>,
    /// Those of the step in which the last query warms the cache, a batch of one. Prompts have lists of their own, so that decode steps of
    /// others may run between a prompt's layers.
    lists: Lists,
    /// What `lists.counts` are parts of.
    counts: DeviceBuffer<u32>,
    /// The prompt whose counts were not looked at yet, and the layers that it has passed through since.
    unsettled: Option<(StepEntry, Range<usize>)>,
    /// Where the prompt begins in its tensors: 0, `[1]`.
    first_token: DeviceBuffer<u32>,
    /// `[0, pages]` and `[0, partitions]`.
    first_page: DeviceBuffer<u32>,
    first_partition: DeviceBuffer<u32>,
    pages: u32,
    partitions: u32,
    /// The last query of the layers of an even number, and of the others.
    last_query: [DeviceBuffer<Word>; 2],
    /// The stages of the layers of an even number are complete, and of the others.
    done: [Event; 2],
    /// What one stream waits for of the other.
    ready: Event,
    /// Whether the side stream may have work that the main one has not waited for.
    under_way: bool,
    /// The prompt whose entries are on the GPU.
    pub uploaded: Option<StepEntry>,
    chunks: HashMap<(usize, usize), Chunk>,
    outliers: Outliers,
    lse: DeviceBuffer<f32>,
}

/// The tables of a chunk of a prompt's queries, `[0, count]` each.
#[derive(Debug)]
struct Chunk {
    first_query: DeviceBuffer<u32>,
    first_key: DeviceBuffer<u32>,
    first_tile: DeviceBuffer<u32>,
    tiles: u32,
}

impl Chunk {
    fn new(first: usize, tokens: usize, stream: &Stream) -> DriverResult<Self> {
        let tiles = prefill::query_tiles(tokens as u32);
        let table = |count: usize| DeviceBuffer::from_slice(stream, &[0, count as u32]);
        Ok(Self {
            first_query: table(tokens)?,
            first_key: table(first + tokens)?,
            first_tile: table(tiles as usize)?,
            tiles,
        })
    }
}

impl Prompt {
    pub fn new(sizes: &Sizes, kernels: &Kernels, stream: &Stream) -> DriverResult<Self> {
        let context = stream.context();
        let (lists, counts) = Lists::new(&Sizes { requests: 1, ..*sizes }, kernels, stream)?;
        let query = || DeviceBuffer::zeroed(stream, sizes.query_words());
        Ok(Self {
            side: Stream::new(context)?,
            stored: DeviceBuffer::from_slice(stream, &[Entry::default()])?,
            lists,
            counts,
            unsettled: None,
            first_token: DeviceBuffer::zeroed(stream, 1)?,
            first_page: DeviceBuffer::zeroed(stream, 2)?,
            first_partition: DeviceBuffer::zeroed(stream, 2)?,
            pages: 0,
            partitions: 0,
            last_query: [query()?, query()?],
            done: [Event::untimed(context)?, Event::untimed(context)?],
            ready: Event::untimed(context)?,
            under_way: false,
            uploaded: None,
            chunks: HashMap::new(),
            outliers: Outliers::new(sizes, stream)?,
            lse: DeviceBuffer::uninit(context, 0)?,
        })
    }

    /// Bytes on the GPU, small tables not counted.
    pub fn bytes(&self) -> u64 {
        self.lse.bytes()
            + self.lists.bytes()
            + self.outliers.bytes()
            + self.last_query.iter().map(DeviceBuffer::bytes).sum::<u64>()
    }

    /// Lets `stream` wait for all that the prompts' stream has to do.
    pub fn join(&mut self, stream: &Stream) -> DriverResult<()> {
        if self.under_way {
            // All of it, a layer that was refused in its middle included.
            self.ready.record(&self.side)?;
            stream.wait(&self.ready)?;
            self.under_way = false;
        }
        Ok(())
    }

    /// The stream of prompts.
    pub fn side(&self) -> &Stream {
        &self.side
    }

    /// Waits for it.
    pub fn synchronize(&self) -> DriverResult<()> {
        self.side.synchronize()
    }

    /// Lets the prompts' stream wait for all that `stream` has now.
    fn follow(&self, stream: &Stream) -> DriverResult<()> {
        self.ready.record(stream)?;
        self.side.wait(&self.ready)
    }
}

impl CudaBackend {
    /// Waits until a prompt is in the KV memory: its pages on the host, its cache warm.
    ///
    /// # Errors
    /// A failed launch.
    pub fn finish_prompt(&mut self) -> Result<()> {
        self.prompt.join(&self.stream)?;
        Ok(self.stream.synchronize()?)
    }

    /// Whether a prompt's stages were launched for one of these requests and not waited for.
    pub(super) fn awaits_prompt(&self, entries: &[StepEntry]) -> bool {
        let of = |(prompt, _): &(StepEntry, Range<usize>)| {
            entries.iter().any(|entry| entry.request == prompt.request)
        };
        self.prompt.unsettled.as_ref().is_some_and(of)
    }

    /// Looks at the counts of the layers that a prompt has passed through since the last time. Waits for them.
    pub(super) fn settle_prompt(&mut self) -> Result<()> {
        let Some((entry, layers)) = self.prompt.unsettled.take() else { return Ok(()) };
        self.prompt.join(&self.stream)?;
        let mut numbers = vec![0; self.prompt.counts.len()];
        self.prompt.counts.read(&self.stream, 0, &mut numbers)?;
        let kv_heads = self.sizes.kv_heads;
        let counts = RowCounts::new(&numbers, kv_heads);
        let Some(request) = self.requests.get_mut(&entry.request) else { return Ok(()) };
        if let Some((layer, kv_head, fault)) = counts.fault(layers.clone(), 0..kv_heads) {
            self.faulted.insert(entry.request, (layer, kv_head, fault));
            return Ok(());
        }
        for row in layers.start * kv_heads..layers.end * kv_heads {
            let (_, fetched, _) = counts.of(row / kv_heads, row % kv_heads);
            request.held[row] += fetched;
            self.counters.warm_pages += u64::from(fetched);
        }
        Ok(())
    }

    /// The entries of a prompt go to the GPU, unless they are there.
    pub(super) fn prepare_prompt(&mut self, step: &Step<'_>) -> Result<()> {
        let [entry] = step.entries else { unreachable!("a prompt is alone in its step") };
        if step.layer > 0 && self.prompt.uploaded == Some(*entry) {
            return Ok(());
        }
        // Another prompt's, whose numbers this one writes over.
        self.settle_prompt()?;
        self.prompt.join(&self.stream)?;
        self.check_faults(step)?;
        let request = self.requests.get_mut(&entry.request).expect("an admitted request");
        let tokens = entry.after();
        let stored = self.sizes.prompt_entry(&self.config, request, tokens);
        request.clustered = request.clustered.max(self.config.zones(tokens).retrievable.end);
        request.always = self.sizes.always.min(stored.new_partitions as usize);
        self.prompt.outliers.begin(&self.stream, stored.new_partitions, request.always as u32)?;
        // Put back on the GPU in the middle of a prompt, it is the same step.
        if step.layer == 0 {
            request.clock.tick();
        }
        let warm = self.sizes.warm_entry(&self.config, request, tokens);
        let Prompt { stored: to_store, lists, first_page, first_partition, .. } = &self.prompt;
        to_store.write(&self.stream, 0, &[stored])?;
        lists.write_entries(&self.stream, &[warm])?;
        let pages = self.config.layout().pages(tokens) as u32;
        first_page.write(&self.stream, 0, &[0, pages])?;
        first_partition.write(&self.stream, 0, &[0, stored.new_partitions])?;
        (self.prompt.pages, self.prompt.partitions) = (pages, stored.new_partitions);
        self.prompt.uploaded = Some(*entry);
        if step.layer == 0 && self.clusters.is_none() {
            let written = (tokens - request.prefix) / self.sizes.page_tokens;
            self.counters.offloaded_pages += (written * self.sizes.rows()) as u64;
        }
        Ok(())
    }

    pub(super) fn attend_chunk(
        &mut self,
        chunk: &PromptChunk,
        queries: &DeviceBuffer<Word>,
        keys: &DeviceBuffer<Word>,
        values: &DeviceBuffer<Word>,
        outputs: &DeviceBuffer<Word>,
    ) -> Result<()> {
        let PromptChunk { first, tokens, .. } = *chunk;
        if tokens == 0 {
            return Ok(());
        }
        let sizes = self.sizes;
        let heads = sizes.kv_heads * sizes.group;
        let Prompt { chunks, lse, .. } = &mut self.prompt;
        if lse.len() < tokens * heads {
            *lse = DeviceBuffer::uninit(self.stream.context(), tokens * heads)?;
        }
        if chunks.len() > MAX_CHUNKS {
            chunks.clear();
        }
        let Chunk { first_query, first_key, first_tile, tiles } = match chunks.entry((first, tokens)) {
            Occupied(chunk) => chunk.into_mut(),
            Vacant(place) => place.insert(Chunk::new(first, tokens, &self.stream)?),
        };
        let launch = Prefill {
            queries,
            keys,
            values,
            first_query,
            first_key,
            first_tile,
            query_tokens: tokens as u32,
            key_tokens: (first + tokens) as u32,
            tiles: *tiles,
            kv_heads: sizes.kv_heads as u32,
            group: sizes.group as u32,
            head_words: sizes.head_words as u32,
            scale: sizes.scale(),
            outputs,
            lse,
        };
        // SAFETY: the tables are those of the chunk; the tensors' writers are on the same stream.
        Ok(unsafe { launch.launch(&self.kernels, &self.stream) }?)
    }

    pub(super) fn index_prompt(
        &mut self,
        step: &Step<'_>,
        keys: &DeviceBuffer<Word>,
        values: &DeviceBuffer<Word>,
    ) -> Result<()> {
        self.prompt.under_way = true;
        self.prompt.follow(&self.stream)?;
        let prompt = &self.prompt;
        if self.clusters.is_some() {
            return self.cluster_prompt(step, keys, values, false);
        }
        let stages = Stages {
            backend: self,
            lists: &prompt.lists,
            layer: step.layer,
            first_request: 0,
            in_halves: false,
        };
        if let (Some(factors), [entry]) = (&self.key_factors, step.entries) {
            let (request, tokens) = (&self.requests[&entry.request], entry.after());
            // SAFETY: keys are not written before `done`; prompts use the side stream alone.
            unsafe { factors.launch_prompt(self, request, step.layer, tokens, keys, &prompt.side)? };
        }
        let Some(rows) = stages.summary_rows(&prompt.stored) else { return Ok(()) };
        let index = PromptIndex {
            rows,
            keys,
            first_token: &prompt.first_token,
            first_partition: &prompt.first_partition,
            partitions: prompt.partitions,
        };
        // SAFETY: the entry is the prompt's, which has segments for all its partitions; keys are not written before `done`.
        unsafe {
            if index.partitions > 0 {
                stages.index_prompt(index).launch(&self.kernels, &prompt.side)?;
            }
            Ok(prompt.outliers.launch(self, &stages, &index, &prompt.side)?)
        }
    }

    pub(super) fn offload_prompt(
        &mut self,
        step: &Step<'_>,
        keys: &DeviceBuffer<Word>,
        values: &DeviceBuffer<Word>,
    ) -> Result<()> {
        self.cluster_prompt(step, keys, values, true)?;
        let prompt = &self.prompt;
        let stages = Stages {
            backend: self,
            lists: &prompt.lists,
            layer: step.layer,
            first_request: 0,
            in_halves: false,
        };
        let launch = StorePrompt {
            pages: stages.offload_pages(&prompt.stored),
            keys,
            values,
            first_token: &prompt.first_token,
            first_page: &prompt.first_page,
            batch_pages: prompt.pages,
            blocks: STORE_BLOCKS,
        };
        // SAFETY: the entry is the prompt's, which has slabs and steady pages for all its pages; keys and values are not written
        // before `done`.
        unsafe { launch.launch(&self.kernels, &prompt.side) }?;
        // Who now writes the tensors of the layer before finds them read.
        Ok(self.stream.wait(&prompt.done[(step.layer + 1) % 2])?)
    }

    pub(super) fn select_prompt(&mut self, step: &Step<'_>, queries: &DeviceBuffer<Word>) -> Result<()> {
        if self.sizes.summaries.is_none() {
            return Ok(());
        }
        let (words, prompt) = (self.sizes.query_words(), &self.prompt);
        // The queries are written again before the side stream comes to them.
        let last = &prompt.last_query[step.layer % 2];
        last.copy_from(&self.stream, 0, queries, queries.len() - words, words)?;
        prompt.follow(&self.stream)?;
        let stages = Stages {
            backend: self,
            lists: &prompt.lists,
            layer: step.layer,
            first_request: 0,
            in_halves: false,
        };
        let Some(select) = stages.select(last) else { return Ok(()) };
        // SAFETY: the entry is the prompt's; its summaries are written by the launches before.
        Ok(unsafe { select.launch(&self.kernels, &prompt.side, |_| Ok(())) }?)
    }

    pub(super) fn retrieve_prompt(&mut self, step: &Step<'_>) -> Result<()> {
        let (layer, prompt) = (step.layer, &self.prompt);
        if self.sizes.summaries.is_some() {
            let stages =
                Stages { backend: self, lists: &prompt.lists, layer, first_request: 0, in_halves: false };
            // SAFETY: the entry is the prompt's, whose pages are on the host by the launches before.
            unsafe {
                stages.resolve().launch(&self.kernels, &prompt.side)?;
                if let Some(LowRankStages { rebuild, .. }) = stages.low_rank() {
                    rebuild.launch(&self.kernels, &prompt.side)?;
                }
                stages.gather().launch(&self.kernels, &prompt.side)?;
            }
        }
        let first = prompt.unsettled.as_ref().map_or(layer, |(_, layers)| layers.start);
        self.prompt.unsettled = Some((step.entries[0], first..layer + 1));
        Ok(self.prompt.done[layer % 2].record(&self.prompt.side)?)
    }
}
