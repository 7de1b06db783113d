//! `resolve` alone, and with `gather`, at the size of one layer of a decode step.

use std::error::Error;

use rand::seq::{SliceRandom, index};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinkv::backend::cuda::driver::{self, DeviceBuffer, PinnedArena, Stream};
use spinkv::backend::cuda::kernels::{Gather, KvTables, PartitionPages, Resolve};
use spinkv::memory::Word;
use spinkv_benches::report::Counts;
use spinkv_kernels::abi::{ABSENT_SLOT, Entry, PageCopy, SEGMENT_KEYS, SLAB_PAGES, SLOT_HELD, WORD_BYTES};

use crate::gather::random_arena;
use crate::measure::{Bench, Shape};

const KV_HEADS: usize = 8;
/// Pages that a row selects.
const SELECTED: usize = 256;
/// Its slots: the selection and five times as much.
const SLOTS: usize = 6 * SELECTED;
/// Bytes of a page: 8 tokens of K and V, 128 wide, bf16.
const PAGE_BYTES: usize = 4096;
/// Copies of the state, each used once a replay, all of them together several times the L2.
const SETS: usize = 24;
/// The clock of all requests.
const CLOCK: u32 = 40;

pub fn run(bench: &mut Bench) -> Result<(), Box<dyn Error>> {
    let least = 1 << 30;
    if bench.arena_bytes < least {
        let asked = bench.arena_bytes >> 20;
        return Err(format!("--arena-mib is {asked}; resolve needs at least {}", least >> 20).into());
    }
    let arena = random_arena(bench)?;
    bench.group("resolve: 256 pages of a row's context, 1,536 slots, state restored between runs; GB/s: of pages gathered");
    let copy_words = 64 << 20 >> 4;
    let pool = DeviceBuffer::<Word>::zeroed(&bench.stream, copy_words)?;
    let stream = bench.stream.clone();
    let copy = |_: usize| pool.copy_from_arena(&stream, 0, &arena, 0, copy_words);
    let ceiling = bench.row("copy engine", "64 MiB in one run", 64 << 20, None, copy)?;
    drop(pool);
    for (requests, misses) in [(1, 26), (16, 0), (16, 3), (16, 26), (16, 256), (64, 26)] {
        Batch::new(bench, &arena, requests, misses)?.rows(bench, &arena, ceiling)?;
    }
    Ok(())
}

/// A table that a step changes: what it is before, and a copy for each set.
struct Restored<T: bytemuck::Pod> {
    before: DeviceBuffer<T>,
    sets: Vec<DeviceBuffer<T>>,
}

impl<T: bytemuck::Pod> Restored<T> {
    fn new(bench: &Bench, elements: &[T]) -> driver::Result<Self> {
        let before = DeviceBuffer::from_slice(&bench.stream, elements)?;
        let copy = |_| DeviceBuffer::uninit(&bench.context, elements.len());
        Ok(Self { before, sets: (0..SETS).map(copy).collect::<driver::Result<_>>()? })
    }

    fn reset(&self, stream: &Stream) -> driver::Result<()> {
        let len = self.before.len();
        self.sets.iter().try_for_each(|set| set.copy_from(stream, 0, &self.before, 0, len))
    }
}

/// One layer's rows of a batch, in the middle of generation.
struct Batch {
    requests: usize,
    context_tokens: u32,
    misses: usize,
    segments: Restored<u16>,
    owners: Restored<u32>,
    physical: Restored<u32>,
    states: Restored<u32>,
    directories: DeviceBuffer<u32>,
    steady: DeviceBuffer<u32>,
    host_slabs: DeviceBuffer<u32>,
    host_valid: DeviceBuffer<u32>,
    entries: DeviceBuffer<Entry>,
    ids: DeviceBuffer<u32>,
    id_counts: DeviceBuffer<u32>,
    pages: DeviceBuffer<u32>,
    counts: [DeviceBuffer<u32>; 3],
    copies: DeviceBuffer<PageCopy>,
    pool: DeviceBuffer<Word>,
}

impl Batch {
    fn new(
        bench: &Bench,
        arena: &PinnedArena,
        requests: usize,
        misses: usize,
    ) -> Result<Self, Box<dyn Error>> {
        let rows = requests * KV_HEADS;
        // Every page of the arena belongs to a row, as far as it goes: up to 128K tokens.
        let keys =
            (arena.len() / PAGE_BYTES / rows).min(16384) / SEGMENT_KEYS as usize * SEGMENT_KEYS as usize;
        let (segments_each, slabs_each) = (keys / SEGMENT_KEYS as usize, keys / SLAB_PAGES as usize);
        let mut rng = ChaCha8Rng::seed_from_u64(misses as u64);
        let mut segments = vec![ABSENT_SLOT; rows * keys];
        let mut owners = Vec::with_capacity(rows * SLOTS);
        let mut states: Vec<u8> = Vec::with_capacity(rows * SLOTS);
        let mut ids = Vec::with_capacity(rows * SELECTED);
        for row in 0..rows {
            let (request, head) = (row / KV_HEADS, row % KV_HEADS);
            let resident = index::sample(&mut rng, keys, SLOTS).into_vec();
            for (slot, key) in resident.iter().enumerate() {
                let segment = request * segments_each + key / SEGMENT_KEYS as usize;
                segments[(segment * KV_HEADS + head) * SEGMENT_KEYS as usize + key % SEGMENT_KEYS as usize] =
                    slot as u16;
                owners.push(*key as u32);
                // Mostly young, as in a cache of six times a step's pages.
                let age: u32 = rng.random_range(1..32);
                states.push(SLOT_HELD | ((CLOCK + 64 - age) % 64) as u8);
            }
            let mut selected = resident[..SELECTED - misses].to_vec();
            let mut is_resident = vec![false; keys];
            resident.iter().for_each(|key| is_resident[*key] = true);
            while selected.len() < SELECTED {
                let key = rng.random_range(0..keys);
                if !std::mem::replace(&mut is_resident[key], true) {
                    selected.push(key);
                }
            }
            selected.sort_unstable();
            ids.extend(selected.iter().map(|key| *key as u32));
        }
        let mut physical: Vec<u32> = (0..(rows * SLOTS) as u32).collect();
        physical.shuffle(&mut rng);
        let slabs: Vec<u32> = (0..(rows * slabs_each) as u32).collect();
        let entry = |request: usize| Entry {
            tokens: 8 * keys as u32,
            clock: CLOCK,
            directory: (request * segments_each) as u32,
            first_slot: (request * KV_HEADS * SLOTS) as u32,
            slot_stride: SLOTS as u32,
            slots: SLOTS as u32,
            ring_pages: 1,
            first_slab: (request * KV_HEADS * slabs_each) as u32,
            slab_stride: slabs_each as u32,
            ..Entry::default()
        };
        let entries: Vec<_> = (0..requests).map(entry).collect();
        let directories: Vec<_> = (0..(requests * segments_each) as u32).collect();
        let stream = &bench.stream;
        let zeroed = |len| DeviceBuffer::zeroed(stream, len);
        Ok(Self {
            requests,
            context_tokens: entries[0].tokens,
            misses,
            segments: Restored::new(bench, &segments)?,
            owners: Restored::new(bench, &owners)?,
            physical: Restored::new(bench, &physical)?,
            states: Restored::new(bench, bytemuck::cast_slice::<u8, u32>(&states))?,
            directories: DeviceBuffer::from_slice(stream, &directories)?,
            steady: zeroed(rows)?,
            host_slabs: DeviceBuffer::from_slice(stream, &slabs)?,
            host_valid: DeviceBuffer::from_slice(stream, &vec![0xffff; slabs.len()])?,
            entries: DeviceBuffer::from_slice(stream, &entries)?,
            ids: DeviceBuffer::from_slice(stream, &ids)?,
            id_counts: DeviceBuffer::from_slice(stream, &vec![SELECTED as u32; rows])?,
            pages: zeroed(rows * SELECTED)?,
            counts: [zeroed(rows)?, zeroed(rows)?, zeroed(rows)?],
            copies: DeviceBuffer::from_slice(stream, &vec![PageCopy::default(); rows * SELECTED])?,
            pool: DeviceBuffer::zeroed(stream, rows * SLOTS * PAGE_BYTES / WORD_BYTES)?,
        })
    }

    fn resolve(&self, set: usize) -> Resolve<'_> {
        Resolve {
            entries: &self.entries,
            kv_heads: KV_HEADS as u32,
            layer: 0,
            ids: &self.ids,
            id_counts: &self.id_counts,
            partitions: PartitionPages::Pages(1),
            tables: KvTables {
                directories: &self.directories,
                segments: &self.segments.sets[set],
                owners: &self.owners.sets[set],
                physical: &self.physical.sets[set],
                states: &self.states.sets[set],
                steady: &self.steady,
                host_slabs: &self.host_slabs,
                host_valid: &self.host_valid,
                request_rows: KV_HEADS as u32,
            },
            slot_capacity: SLOTS as u32,
            segment_capacity: (self.directories.len() / self.requests) as u32,
            pages: &self.pages,
            page_counts: &self.counts[0],
            copies: &self.copies,
            copy_counts: &self.counts[1],
            faults: &self.counts[2],
        }
    }

    fn gather<'a>(&'a self, arena: &'a PinnedArena, blocks: u32) -> Gather<'a> {
        Gather {
            copies: &self.copies,
            counts: &self.counts[1],
            host_pages: arena,
            device_pages: &self.pool,
            page_words: (PAGE_BYTES / WORD_BYTES) as u32,
            blocks,
        }
    }

    fn reset(&self, stream: &Stream) -> driver::Result<()> {
        self.segments.reset(stream)?;
        self.owners.reset(stream)?;
        self.physical.reset(stream)?;
        self.states.reset(stream)
    }

    fn rows(&self, bench: &mut Bench, arena: &PinnedArena, ceiling: f64) -> Result<(), Box<dyn Error>> {
        let (rows, kernels, stream) = (self.requests * KV_HEADS, bench.kernels.clone(), bench.stream.clone());
        let reset = |stream: &Stream| self.reset(stream);
        // SAFETY: the tables agree with each other and are restored before each replay.
        let resolve = |stream: &Stream, set: usize| unsafe { self.resolve(set).launch(&kernels, stream) };

        reset(&stream)?;
        resolve(&stream, 0)?;
        let [pages, copies, faults] = [0, 1, 2].map(|count| self.counts[count].to_vec(&stream));
        let (pages, copies, faults) = (pages?, copies?, faults?);
        let right = pages.iter().all(|count| *count == SELECTED as u32)
            && copies.iter().all(|count| *count == self.misses as u32)
            && faults.iter().all(|fault| *fault == 0);
        if !right {
            return Err(format!("resolve counted {pages:?}, {copies:?} with faults {faults:?}").into());
        }
        self.check_lists(&stream)?;

        let counted = |stream: &Stream| self.counted(stream);
        let shape = |more: &str| {
            let text = format!("{rows} rows, {} misses each{more}", self.misses);
            Shape::new(text).context(self.context_tokens).counted(&counted)
        };
        bench.graph_row("resolve", shape(""), 0, None, SETS, reset, resolve)?;
        for blocks in [8, 16, 32] {
            let both = |stream: &Stream, set: usize| {
                resolve(stream, set)?;
                // SAFETY: resolve names pages of the arena, and each pool page once.
                unsafe { self.gather(arena, blocks).launch(&kernels, stream) }
            };
            let bytes = (rows * self.misses * PAGE_BYTES) as u64;
            let more = format!(", {blocks} blocks");
            bench.graph_row("resolve+gather", shape(&more), bytes, Some(ceiling), SETS, reset, both)?;
        }
        Ok(())
    }

    /// Of one launch, all of which begin with the same tables: pages that needed no copy, and copies.
    fn counted(&self, stream: &Stream) -> driver::Result<Counts> {
        let [pages, copies] = [0, 1].map(|count| self.counts[count].to_vec(stream));
        let [pages, misses] = [pages?, copies?].map(|counts| counts.into_iter().map(u64::from).sum::<u64>());
        Ok(Counts { hits: Some(pages - misses), misses })
    }

    /// Every selected page has a place of its own, and hits that which the tables said.
    fn check_lists(&self, stream: &Stream) -> Result<(), Box<dyn Error>> {
        let (pages, physical) = (self.pages.to_vec(stream)?, self.physical.before.to_vec(stream)?);
        let (ids, owners) = (self.ids.to_vec(stream)?, self.owners.before.to_vec(stream)?);
        for row in 0..self.requests * KV_HEADS {
            let mut places: Vec<_> = pages[row * SELECTED..][..SELECTED].to_vec();
            let slots = row * SLOTS..(row + 1) * SLOTS;
            for (id, page) in ids[row * SELECTED..][..SELECTED].iter().zip(&places) {
                let slot = owners[slots.clone()].iter().position(|owner| owner == id);
                if slot.is_some_and(|slot| physical[slots.start + slot] != *page) {
                    return Err(format!("row {row}: page {id} is not at {page}").into());
                }
            }
            places.sort_unstable();
            places.dedup();
            if places.len() != SELECTED {
                return Err(format!("row {row}: two pages share a place").into());
            }
        }
        Ok(())
    }
}
