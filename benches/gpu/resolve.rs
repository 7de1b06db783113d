//! `resolve` alone, and with `gather`, at the size of one layer of a decode step.

use std::error::Error;

use rand::seq::{SliceRandom, index};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinkv::backend::cuda::driver::{self, DeviceBuffer, PinnedArena, Stream};
use spinkv::backend::cuda::kernels::{Gather, PartitionPages, Resolve};
use spinkv::memory::Word;
use spinkv_benches::report::Counts;
use spinkv_kernels::abi::{Entry, PageCopy, SEGMENT_KEYS, WORD_BYTES};

use crate::gather::random_arena;
use crate::measure::{Bench, Shape};
use crate::tables::{Held, TableShape, Tables};

const KV_HEADS: usize = 8;
/// Pages that a row selects.
const SELECTED: usize = 256;
/// Its slots: the selection and five times as much.
const SLOTS: usize = 6 * SELECTED;
/// Bytes of a page: 8 tokens of K and V, 128 wide, bf16.
const PAGE_BYTES: usize = 4096;
/// Copies of the state, each used once a replay, all of them together several times the L2.
const SETS: usize = 24;

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

/// One layer's rows of a batch, in the middle of generation.
struct Batch {
    requests: usize,
    context_tokens: u32,
    misses: usize,
    tables: Tables,
    entries: DeviceBuffer<Entry>,
    ids: DeviceBuffer<u32>,
    id_counts: DeviceBuffer<u32>,
    pages: DeviceBuffer<u32>,
    counts: [DeviceBuffer<u32>; 4],
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
        let shape = TableShape { requests, kv_heads: KV_HEADS, keys, slots: SLOTS };
        let mut rng = ChaCha8Rng::seed_from_u64(misses as u64);
        let mut held = Vec::with_capacity(rows);
        let mut ids = Vec::with_capacity(rows * SELECTED);
        for _ in 0..rows {
            let resident = index::sample(&mut rng, keys, SLOTS).into_vec();
            // Mostly young, as in a cache of six times a step's pages.
            let mut hold = |key: &usize| Held { key: *key, age: rng.random_range(1..32) };
            held.push(resident.iter().map(&mut hold).collect());
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
        let context_tokens = 8 * keys as u32;
        let partitions = keys as u32;
        let entry =
            |request| Entry { tokens: context_tokens, partitions, ring_pages: 1, ..shape.entry(request) };
        let entries: Vec<_> = (0..requests).map(entry).collect();
        let stream = &bench.stream;
        let zeroed = |len| DeviceBuffer::zeroed(stream, len);
        let tables = Tables::new(bench, shape, SETS, &physical, &vec![0; rows])?;
        tables.hold(stream, &held)?;
        Ok(Self {
            requests,
            context_tokens,
            misses,
            tables,
            entries: DeviceBuffer::from_slice(stream, &entries)?,
            ids: DeviceBuffer::from_slice(stream, &ids)?,
            id_counts: DeviceBuffer::from_slice(stream, &vec![SELECTED as u32; rows])?,
            pages: zeroed(rows * SELECTED)?,
            counts: [zeroed(rows)?, zeroed(rows)?, zeroed(rows)?, zeroed(rows)?],
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
            tables: self.tables.of(set),
            slot_capacity: SLOTS as u32,
            segment_capacity: (self.tables.directories.len() / self.requests) as u32,
            pages: &self.pages,
            misses_last: true,
            page_counts: &self.counts[0],
            copies: &self.copies,
            copy_keys: None,
            copy_counts: &self.counts[1],
            arrived: &self.counts[3],
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
            device_words: (PAGE_BYTES / WORD_BYTES) as u32,
            code: None,
            blocks,
            arrived: None,
        }
    }

    fn rows(&self, bench: &mut Bench, arena: &PinnedArena, ceiling: f64) -> Result<(), Box<dyn Error>> {
        let (rows, kernels, stream) = (self.requests * KV_HEADS, bench.kernels.clone(), bench.stream.clone());
        let reset = |stream: &Stream| self.tables.reset(stream);
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
        let (pages, physical) = (self.pages.to_vec(stream)?, self.tables.physical.before.to_vec(stream)?);
        let (ids, owners) = (self.ids.to_vec(stream)?, self.tables.owners.before.to_vec(stream)?);
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
