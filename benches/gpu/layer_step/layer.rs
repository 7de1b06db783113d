//! What a layer's step works on, several times.

use std::error::Error;
use std::ops::Range;
use std::sync::Arc;

use half::bf16;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinkv::backend::cuda::LayerStep;
use spinkv::backend::cuda::driver::{DeviceBuffer, PinnedArena, Result as DriverResult, Stream};
use spinkv::backend::cuda::kernels::{Gather, Kernels};
use spinkv::memory::Word;
use spinkv::pipeline::{ZoneUnit, Zones};
use spinkv_benches::report::Counts;
use spinkv_kernels::abi::attend::partial_words;
use spinkv_kernels::abi::score::max_tiles;
use spinkv_kernels::abi::{Entry, PageCopy, WORD_ELEMENTS};

use super::{
    BATCH, GATHER_BLOCKS, GROUP, HEAD_BYTES, HEAD_WORDS, KEYS, KV_HEADS, PAGE_BYTES, PAGE_TOKENS, PAGE_WORDS,
    RING_PAGES, ROWS, SELECTED, SETS, SINK_PAGES, SLOTS, STEADY,
};
use crate::attend::random_word;
use crate::measure::Bench;
use crate::tables::{Held, TableShape, Tables};

/// Pages after which contents repeat: a prime, so that neighbours of rows differ.
const PERIOD: usize = 4093;
const STEADY_PAGES: usize = SINK_PAGES + RING_PAGES;
pub const SHAPE: TableShape = TableShape { requests: BATCH, kv_heads: KV_HEADS, keys: KEYS, slots: SLOTS };

/// Words as the host has them.
pub type HostWords = Vec<[bf16; WORD_ELEMENTS]>;

/// One layer of a batch, in the middle of generation.
pub struct Layer {
    pub kernels: Kernels,
    pub stream: Arc<Stream>,
    /// All pages of all rows.
    pub arena: PinnedArena,
    /// [`PERIOD`] pages: the host knows every page, and every summary, without holding them all.
    pub block: HostWords,
    pub host_entries: Vec<Entry>,
    pub entries: DeviceBuffer<Entry>,
    pub tables: Tables,
    /// `[ROWS, SLOTS]`.
    pub physical: Vec<u32>,
    pub host_queries: HostWords,
    pub queries: DeviceBuffer<Word>,
    pub host_keys: HostWords,
    pub keys: DeviceBuffer<Word>,
    pub host_values: HostWords,
    pub values: DeviceBuffer<Word>,
    pub splits: u32,
    pub partials: DeviceBuffer<Word>,
    pub arrivals: DeviceBuffer<u32>,
    pub outputs: DeviceBuffer<Word>,
    pub lse: DeviceBuffer<f32>,
    pub sets: Vec<Set>,
}

/// What a step reads and its stages hand on, of each set.
pub struct Set {
    pub pool: DeviceBuffer<Word>,
    pub summaries: DeviceBuffer<Word>,
    pub logits: DeviceBuffer<f32>,
    pub statistics: DeviceBuffer<f32>,
    pub ids: DeviceBuffer<u32>,
    pub id_counts: DeviceBuffer<u32>,
    pub pages: DeviceBuffer<u32>,
    pub page_counts: DeviceBuffer<u32>,
    pub copies: DeviceBuffer<PageCopy>,
    pub copy_counts: DeviceBuffer<u32>,
    pub arrived: DeviceBuffer<u32>,
    pub faults: DeviceBuffer<u32>,
}

impl Set {
    fn new(stream: &Stream) -> DriverResult<Self> {
        let lists = |len| DeviceBuffer::zeroed(stream, len);
        let heads = ROWS * GROUP;
        Ok(Self {
            pool: DeviceBuffer::zeroed(stream, ROWS * (SLOTS + STEADY_PAGES) * PAGE_WORDS)?,
            summaries: DeviceBuffer::zeroed(stream, ROWS * KEYS * HEAD_WORDS)?,
            logits: DeviceBuffer::zeroed(stream, heads * KEYS)?,
            statistics: DeviceBuffer::zeroed(stream, heads * max_tiles(KEYS as u32) as usize * 2)?,
            ids: lists(ROWS * SELECTED)?,
            id_counts: lists(ROWS)?,
            pages: lists(ROWS * SELECTED)?,
            page_counts: lists(ROWS)?,
            copies: DeviceBuffer::from_slice(stream, &vec![PageCopy::default(); ROWS * SELECTED])?,
            copy_counts: lists(ROWS)?,
            arrived: lists(ROWS)?,
            faults: lists(ROWS)?,
        })
    }
}

impl Layer {
    /// The layer with random pages, summaries and queries, its steady zone in place and its caches empty.
    pub fn new(bench: &Bench) -> Result<Self, Box<dyn Error>> {
        let (kernels, stream) = (bench.kernels.clone(), bench.stream.clone());
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let mut words = |count: usize| -> HostWords { (0..count).map(|_| random_word(&mut rng)).collect() };
        let block = words(PERIOD * PAGE_WORDS);
        let (host_queries, host_keys) = (words(ROWS * GROUP * HEAD_WORDS), words(ROWS * HEAD_WORDS));
        let host_values = words(ROWS * HEAD_WORDS);
        let upload = |words: &HostWords| DeviceBuffer::from_slice(&stream, bytemuck::cast_slice(words));

        let bytes: &[u8] = bytemuck::cast_slice(&block);
        let mut arena = PinnedArena::reserve(&bench.context, ROWS * KEYS * PAGE_BYTES, |_| {})?;
        for start in (0..arena.len()).step_by(bytes.len()) {
            arena.write(start, &bytes[..bytes.len().min(arena.len() - start)])?;
        }

        // Of eight requests one has as many tokens as fill its pages, the others have fewer.
        let host_entries: Vec<_> = (0..BATCH).map(|request| entry(request, request % 8)).collect();
        let mut pages: Vec<u32> = (0..(ROWS * (SLOTS + STEADY_PAGES)) as u32).collect();
        pages.shuffle(&mut rng);
        let (physical, steady) = pages.split_at(ROWS * SLOTS);

        let sets = (0..SETS).map(|_| Set::new(&stream)).collect::<DriverResult<Vec<_>>>()?;
        let summaries = &sets[0].summaries;
        for at in (0..summaries.len()).step_by(block.len()) {
            let words = block.len().min(summaries.len() - at);
            summaries.write(&stream, at, bytemuck::cast_slice(&block[..words]))?;
        }
        for set in &sets[1..] {
            set.summaries.copy_from(&stream, 0, summaries, 0, summaries.len())?;
        }
        let attended = SINK_PAGES + SELECTED + RING_PAGES;
        let splits = kernels.attend_splits(ROWS as u32, (attended * PAGE_TOKENS) as u32);
        let layer = Self {
            arena,
            entries: DeviceBuffer::from_slice(&stream, &host_entries)?,
            tables: Tables::new(bench, SHAPE, SETS, physical, steady)?,
            physical: physical.to_vec(),
            queries: upload(&host_queries)?,
            keys: upload(&host_keys)?,
            values: upload(&host_values)?,
            block,
            host_entries,
            host_queries,
            host_keys,
            host_values,
            splits,
            partials: DeviceBuffer::zeroed(
                &stream,
                ROWS * splits as usize * partial_words(HEAD_WORDS as u32) as usize,
            )?,
            arrivals: DeviceBuffer::zeroed(&stream, ROWS)?,
            outputs: DeviceBuffer::zeroed(&stream, ROWS * GROUP * HEAD_WORDS)?,
            lse: DeviceBuffer::zeroed(&stream, ROWS * GROUP)?,
            sets,
            kernels,
            stream,
        };
        let mut copies = Vec::new();
        for row in 0..ROWS {
            let tail = layer.host_entries[row / KV_HEADS].leaving_key as usize..KEYS;
            for key in (0..SINK_PAGES).chain(tail) {
                let place = if key < SINK_PAGES { key } else { SINK_PAGES + (key - SINK_PAGES) % RING_PAGES };
                copies.push(copy(row, key, steady[row * STEADY_PAGES + place]));
            }
        }
        layer.load(&copies)?;
        Ok(layer)
    }

    /// `HEAD_WORDS` words of a row's page from word `at` on, as the host has them.
    pub fn page_words(&self, row: usize, key: usize, at: usize) -> &[bf16] {
        let first = ((row * KEYS + key) * PAGE_WORDS + at) % self.block.len();
        self.block[first..][..HEAD_WORDS].as_flattened()
    }

    /// Rows with a page that leaves the steady zone in the step.
    pub fn leaving_rows(&self) -> usize {
        KV_HEADS * self.host_entries.iter().filter(|entry| entry.leaving > 0).count()
    }

    /// Bytes of the summaries that are scored.
    pub fn summary_bytes(&self) -> usize {
        let partitions: u32 = self.host_entries.iter().map(|entry| entry.partitions).sum();
        KV_HEADS * partitions as usize * HEAD_BYTES
    }

    /// Bytes of their logits.
    pub fn logit_bytes(&self) -> usize {
        self.summary_bytes() / HEAD_BYTES * GROUP * size_of::<f32>()
    }

    /// Bytes of the keys and values that are attended to.
    pub fn attended_bytes(&self) -> usize {
        let of = |entry: &Entry| (SINK_PAGES + SELECTED) * PAGE_TOKENS + tail(entry).len();
        KV_HEADS * self.host_entries.iter().map(of).sum::<usize>() * 2 * HEAD_BYTES
    }

    /// What the step selects: Index and Select alone. `[ROWS, SELECTED]`.
    pub fn selection(&self) -> Result<Vec<u32>, Box<dyn Error>> {
        let LayerStep { index, select, .. } = self.step(0);
        self.reset(&self.stream)?;
        // SAFETY: entries, directories and steady lists agree, and their pages were loaded.
        unsafe {
            if let Some(index) = index {
                index.launch(&self.kernels, &self.stream)?;
            }
            // Select reads summaries before what is directly ahead of it has ended, which in a step is Offload.
            self.stream.synchronize()?;
            if let Some(select) = select {
                select.launch(&self.kernels, &self.stream, |_| Ok(()))?;
            }
        }
        let counts = self.sets[0].id_counts.to_vec(&self.stream)?;
        if counts.iter().any(|count| *count != SELECTED as u32) {
            return Err(format!("select counted {counts:?}").into());
        }
        Ok(self.sets[0].ids.to_vec(&self.stream)?)
    }

    /// Fills the caches so that of each row's selection `misses` pages are not there: with the others, used in the step before, and with
    /// random pages that were used earlier.
    pub fn warm(&self, ids: &[u32], misses: usize) -> Result<(), Box<dyn Error>> {
        let mut rng = ChaCha8Rng::seed_from_u64(misses as u64);
        let (mut rows, mut copies) = (Vec::new(), Vec::new());
        for (row, ids) in ids.chunks_exact(SELECTED).enumerate() {
            // A page that leaves the steady zone comes into the cache within the step, selected or not.
            let cached = SINK_PAGES..self.host_entries[row / KV_HEADS].leaving_key as usize;
            let mut is_selected = vec![false; KEYS];
            ids.iter().for_each(|id| is_selected[*id as usize] = true);
            let (mut hits, mut others): (Vec<_>, Vec<_>) = cached.partition(|key| is_selected[*key]);
            hits.shuffle(&mut rng);
            hits.drain(..misses);
            let (others, _) = others.partial_shuffle(&mut rng, SLOTS - hits.len());
            let mut held: Vec<_> = hits.into_iter().map(|key| Held { key, age: 1 }).collect();
            held.extend(others.iter().map(|key| Held { key: *key, age: rng.random_range(2..32) }));
            held.shuffle(&mut rng);
            let slots = held.iter().zip(&self.physical[row * SLOTS..]);
            copies.extend(slots.map(|(page, physical)| copy(row, page.key, *physical)));
            rows.push(held);
        }
        self.tables.hold(&self.stream, &rows)?;
        self.load(&copies)
    }

    /// Fetches pages into the pools of all sets.
    fn load(&self, copies: &[PageCopy]) -> Result<(), Box<dyn Error>> {
        let (stream, pool) = (&self.stream, &self.sets[0].pool);
        let gather = Gather {
            copies: &DeviceBuffer::from_slice(stream, copies)?,
            counts: &DeviceBuffer::from_slice(stream, &[copies.len() as u32])?,
            host_pages: &self.arena,
            device_pages: pool,
            page_words: PAGE_WORDS as u32,
            device_words: PAGE_WORDS as u32,
            code: None,
            blocks: GATHER_BLOCKS,
            arrived: None,
        };
        // SAFETY: the copies name pages of the arena, and each page of the pool once.
        unsafe { gather.launch(&self.kernels, stream)? };
        for set in &self.sets[1..] {
            set.pool.copy_from(stream, 0, pool, 0, pool.len())?;
        }
        Ok(())
    }

    /// Undoes what steps have changed in the tables. In the pools the same pages are written by each.
    pub fn reset(&self, stream: &Stream) -> DriverResult<()> {
        self.tables.reset(stream)
    }

    /// Of the last step on the first set: pages that needed no copy, and copies.
    pub fn counted(&self, stream: &Stream) -> DriverResult<Counts> {
        let Set { page_counts, copy_counts, .. } = &self.sets[0];
        let sum = |counts: Vec<u32>| counts.into_iter().map(u64::from).sum::<u64>();
        let (pages, misses) = (sum(page_counts.to_vec(stream)?), sum(copy_counts.to_vec(stream)?));
        Ok(Counts { hits: Some(pages - misses), misses })
    }
}

/// A request's part in the step: `free` is how many tokens its newest page still has room for.
fn entry(request: usize, free: usize) -> Entry {
    let tokens = KEYS * PAGE_TOKENS - free;
    let retrievable = |tokens| {
        let zone = Zones::at(tokens, &STEADY, ZoneUnit::even(PAGE_TOKENS)).retrievable;
        zone.start / PAGE_TOKENS..zone.end / PAGE_TOKENS
    };
    let (before, after) = (retrievable(tokens - 1), retrievable(tokens));
    let leaving = (after.end - before.end) as u32;
    Entry {
        tokens: tokens as u32,
        first_steady: (request * KV_HEADS * STEADY_PAGES) as u32,
        sink_pages: SINK_PAGES as u32,
        ring_pages: RING_PAGES as u32,
        first_partition: after.start as u32,
        partitions: after.len() as u32,
        limit: SELECTED as u32,
        leaving_key: before.end as u32,
        leaving,
        new_partition: before.end as u32,
        new_partitions: leaving,
        ..SHAPE.entry(request)
    }
}

/// The tokens of a request's tail after the step.
pub fn tail(entry: &Entry) -> Range<usize> {
    (entry.leaving_key + entry.leaving) as usize * PAGE_TOKENS..entry.tokens as usize
}

fn copy(row: usize, key: usize, device_page: u32) -> PageCopy {
    PageCopy { host_page: (row * KEYS + key) as u32, device_page }
}
