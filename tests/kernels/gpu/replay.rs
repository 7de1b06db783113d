//! A captured step, replayed thousands of times under requests that come, grow and go: the tables must stay those of the CPU's cache,
//! every page's bytes those that were appended, and the summaries of pages that left the steady zone the means of their keys.

use std::array;
use std::error::Error;
use std::ops::Range;

use half::bf16;
use rand::seq::SliceRandom;
use rand::{Rng, RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinkv::backend::cuda::driver::{DeviceBuffer, Graph, PinnedArena, Stream};
use spinkv::backend::cuda::kernels::{
    Append, Gather, IndexOperator, IndexStep, KvTables, OffloadPages, PartitionPages, Resolve, Score,
    SelectPartitions, SummaryTable,
};
use spinkv::backend::cuda::{LayerStep, capture_step};
use spinkv::memory::{PhysicalPage, Word};
use spinkv::paging::{BucketedLru, FlatMap, Resolution, RowCache, SlotId, SlotMap, StepClock};
use spinkv::partition::SelectedPage;
use spinkv::pipeline::{GroupMerge, SteadyZone, Zones};
use spinkv_kernels::abi::{
    ABSENT_SLOT, Entry, NO_KEY, PageCopy, SEGMENT_KEYS, SLAB_PAGES, SLOT_HELD, SLOT_PINNED, SLOT_STAMP, score,
};

use super::{Machine, Test, test};

const LAYERS: usize = 2;
const KV_HEADS: usize = 2;
const GROUP: usize = 5;
const ROWS: usize = LAYERS * KV_HEADS;
/// Words of a key: a head dim of 64.
const HEAD_WORDS: usize = 8;
/// Tokens of a page, which is a partition.
const PAGE_TOKENS: usize = 8;
const PAGE_WORDS: usize = 2 * PAGE_TOKENS * HEAD_WORDS;
const STEADY: SteadyZone = SteadyZone { sinks: 4, window: 20 };
const SINK_PAGES: usize = 1;
/// The tail's pages when a new one begins, those that leave with that step included.
const RING_PAGES: usize = (STEADY.window + PAGE_TOKENS).div_ceil(PAGE_TOKENS);
/// Pages of the longest row: two segments.
const KEYS: usize = 640;
const SEGMENTS: usize = 2;
const SLABS: usize = KEYS / SLAB_PAGES as usize;
/// Slots between rows; requests begin with fewer.
const SLOT_STRIDE: usize = 64;
/// The most partitions of a selection.
const LIMIT: usize = 16;
/// Requests that fit at a time, and entries of the captured batch.
const PLACES: usize = 6;
const BATCH: usize = 8;
const BATCH_ROWS: usize = BATCH * KV_HEADS;
/// Replays between looks at all tables and pages.
const LOOK: usize = 8;

pub fn tests() -> Vec<Test> {
    vec![
        test("replay::requests_come_grow_and_go", |machine| {
            World::new(machine, machine.seed)?.run(10_000, false)?;
            Ok(())
        }),
        // The same requests and tokens, with and without something slow between the launches of every other step: the same selections,
        // pages and copies.
        test("replay::delays_change_nothing", |machine| {
            let run = |delayed| World::new(machine, machine.seed + 1)?.run(500, delayed);
            if run(false)? != run(true)? {
                return Err("other lists with delays".into());
            }
            Ok(())
        }),
    ]
}

type Checked = Result<(), Box<dyn Error>>;

/// One row of a request, as the CPU has it.
struct Row {
    cache: RowCache<BucketedLru>,
    map: FlatMap,
    /// `[sinks + ring]`: physical pages.
    steady: Vec<u32>,
    slabs: Vec<u32>,
}

struct Request {
    clock: StepClock,
    tokens: usize,
    segments: [u32; SEGMENTS],
    /// The first partition that left the steady zone in a decode step, or will.
    first_decoded: usize,
    rows: Vec<Row>,
}

impl Request {
    fn retrievable(&self) -> Range<usize> {
        pages_of(self.tokens)
    }
}

/// The retrievable pages of a row of `tokens` tokens.
fn pages_of(tokens: usize) -> Range<usize> {
    let zone = Zones::at(tokens, &STEADY, PAGE_TOKENS).retrievable;
    let end = zone.end / PAGE_TOKENS;
    SINK_PAGES..end.max(SINK_PAGES)
}

fn steady_place(key: usize) -> usize {
    if key < SINK_PAGES { key } else { SINK_PAGES + (key - SINK_PAGES) % RING_PAGES }
}

/// What lies on the GPU.
struct Device {
    entries: DeviceBuffer<Entry>,
    directories: DeviceBuffer<u32>,
    segments: DeviceBuffer<u16>,
    owners: DeviceBuffer<u32>,
    physical: DeviceBuffer<u32>,
    states: DeviceBuffer<u32>,
    steady: DeviceBuffer<u32>,
    host_slabs: DeviceBuffer<u32>,
    host_valid: DeviceBuffer<u32>,
    summaries: DeviceBuffer<Word>,
    pool: DeviceBuffer<Word>,
    keys: DeviceBuffer<Word>,
    values: DeviceBuffer<Word>,
    queries: DeviceBuffer<Word>,
    lists: [LayerLists; LAYERS],
    delay: DeviceBuffer<u32>,
}

/// What a layer's stages hand on.
struct LayerLists {
    logits: DeviceBuffer<f32>,
    statistics: DeviceBuffer<f32>,
    ids: DeviceBuffer<u32>,
    id_counts: DeviceBuffer<u32>,
    pages: DeviceBuffer<u32>,
    page_counts: DeviceBuffer<u32>,
    copies: DeviceBuffer<PageCopy>,
    copy_counts: DeviceBuffer<u32>,
    faults: DeviceBuffer<u32>,
}

struct World<'a> {
    machine: &'a Machine,
    rng: ChaCha8Rng,
    device: Device,
    arena: PinnedArena,
    /// What the host pages must hold: `[host pages, PAGE_WORDS]`.
    truth: Vec<u128>,
    requests: Vec<Option<Request>>,
    free_pages: Vec<u32>,
    free_slabs: Vec<u32>,
    free_segments: Vec<u32>,
    keys: Vec<u128>,
    values: Vec<u128>,
    /// Selected pages, those that were fetched, requests that came, and summaries that were looked at.
    seen: [usize; 4],
    /// Of all lists so far.
    digest: u64,
}

impl<'a> World<'a> {
    fn new(machine: &'a Machine, seed: u64) -> Result<Self, Box<dyn Error>> {
        let Machine { context, stream, .. } = machine;
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let all_rows = PLACES * ROWS;
        let pool_pages = all_rows * (SLOT_STRIDE + SINK_PAGES + RING_PAGES);
        let slabs = all_rows * SLABS;
        let zeroed = |len| DeviceBuffer::<u32>::zeroed(stream, len);
        let words = |len| DeviceBuffer::<Word>::zeroed(stream, len);
        let layer = || -> Result<_, Box<dyn Error>> {
            Ok(LayerLists {
                logits: DeviceBuffer::zeroed(stream, BATCH_ROWS * GROUP * KEYS)?,
                statistics: DeviceBuffer::zeroed(
                    stream,
                    BATCH_ROWS * GROUP * score::tiles(KEYS as u32) as usize * 2,
                )?,
                ids: zeroed(BATCH_ROWS * LIMIT)?,
                id_counts: zeroed(BATCH_ROWS)?,
                pages: zeroed(BATCH_ROWS * LIMIT)?,
                page_counts: zeroed(BATCH_ROWS)?,
                copies: DeviceBuffer::from_slice(stream, &[PageCopy::default(); BATCH_ROWS * LIMIT])?,
                copy_counts: zeroed(BATCH_ROWS)?,
                faults: zeroed(BATCH_ROWS)?,
            })
        };
        let segments = PLACES * SEGMENTS + 3;
        let summaries = random_words(&mut rng, segments * ROWS * SEGMENT_KEYS as usize * HEAD_WORDS);
        let device = Device {
            entries: DeviceBuffer::from_slice(stream, &[Entry::default(); BATCH])?,
            directories: zeroed(PLACES * SEGMENTS)?,
            segments: DeviceBuffer::zeroed(stream, segments * ROWS * SEGMENT_KEYS as usize)?,
            owners: zeroed(all_rows * SLOT_STRIDE)?,
            physical: zeroed(all_rows * SLOT_STRIDE)?,
            states: zeroed(all_rows * SLOT_STRIDE / 4)?,
            steady: zeroed(all_rows * (SINK_PAGES + RING_PAGES))?,
            host_slabs: zeroed(slabs)?,
            host_valid: zeroed(slabs)?,
            summaries: DeviceBuffer::from_slice(stream, &summaries)?,
            pool: words(pool_pages * PAGE_WORDS)?,
            keys: words(BATCH_ROWS * HEAD_WORDS)?,
            values: words(BATCH_ROWS * HEAD_WORDS)?,
            queries: words(BATCH_ROWS * GROUP * HEAD_WORDS)?,
            lists: [layer()?, layer()?],
            delay: zeroed(16 << 20)?,
        };
        let mut free = |count: usize| {
            let mut numbers: Vec<u32> = (0..count as u32).collect();
            numbers.shuffle(&mut rng);
            numbers
        };
        let (free_pages, free_slabs, free_segments) = (free(pool_pages), free(slabs), free(segments));
        let words = slabs * SLAB_PAGES as usize * PAGE_WORDS;
        Ok(Self {
            machine,
            rng,
            device,
            arena: PinnedArena::reserve(context, words * size_of::<Word>(), |_| {})?,
            truth: vec![0; words],
            requests: (0..PLACES).map(|_| None).collect(),
            free_pages,
            free_slabs,
            free_segments,
            keys: Vec::new(),
            values: Vec::new(),
            seen: [0; 4],
            digest: 0,
        })
    }

    /// Replays; what all lists were, in a number.
    fn run(mut self, replays: usize, delayed: bool) -> Result<u64, Box<dyn Error>> {
        let graphs = [self.capture(false)?, self.capture(true)?];
        for replay in 0..replays {
            self.come_and_go()?;
            let order = self.begin()?;
            let graph = &graphs[usize::from(delayed && replay % 2 == 1)];
            // SAFETY: the buffers are this world's; entries and tables are those of its requests.
            unsafe { graph.launch(&self.machine.stream)? };
            self.follow(&order).map_err(|wrong| format!("replay {replay}: {wrong}"))?;
            if replay % LOOK == 0 || replay + 1 == replays {
                self.look().map_err(|wrong| format!("after replay {replay}: {wrong}"))?;
            }
        }
        let [selected, fetched, came, summaries] = self.seen;
        if fetched * 20 < selected
            || fetched * 3 > selected * 2
            || came * 100 < replays
            || summaries < replays
        {
            return Err(format!(
                "{selected} pages, {fetched} fetched, {came} requests, {summaries} summaries: not the mix that was meant"
            )
            .into());
        }
        Ok(self.digest)
    }

    /// The step of all layers as a graph; `delayed`: with something slow between the launches.
    fn capture(&self, delayed: bool) -> Result<Graph, Box<dyn Error>> {
        let Machine { stream, kernels, .. } = self.machine;
        let layers: [LayerStep<'_>; LAYERS] = array::from_fn(|layer| self.layer(layer));
        if !delayed {
            // SAFETY: nothing runs yet; see `run`.
            return Ok(unsafe { capture_step(&layers, kernels, stream)? });
        }
        let delay = |stream: &Stream| self.device.delay.fill_bytes(stream, 0..self.device.delay.len(), 1);
        Ok(Graph::capture(stream, |stream| {
            for LayerStep { index, append, select, resolve, gather } in &layers {
                // SAFETY: as above.
                unsafe {
                    index.as_ref().map_or(Ok(()), |index| index.launch(kernels, stream))?;
                    delay(stream)?;
                    append.launch(kernels, stream)?;
                    delay(stream)?;
                    if let Some((score, select)) = select {
                        score.launch(kernels, stream)?;
                        delay(stream)?;
                        select.launch(kernels, stream)?;
                    }
                    delay(stream)?;
                    resolve.launch(kernels, stream)?;
                    delay(stream)?;
                    gather.launch(kernels, stream)?;
                }
                delay(stream)?;
            }
            Ok(())
        })?)
    }

    fn layer(&self, layer: usize) -> LayerStep<'_> {
        let device = &self.device;
        let lists = &device.lists[layer];
        LayerStep {
            index: Some(IndexStep {
                table: SummaryTable {
                    operator: IndexOperator::Mean,
                    entries: &device.entries,
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
            }),
            append: Append {
                pages: OffloadPages {
                    entries: &device.entries,
                    steady: &device.steady,
                    pool: &device.pool,
                    host_slabs: &device.host_slabs,
                    host_valid: &device.host_valid,
                    host_pages: &self.arena,
                    first_row: (layer * KV_HEADS) as u32,
                    kv_heads: KV_HEADS as u32,
                    head_words: HEAD_WORDS as u32,
                    page_tokens: PAGE_TOKENS as u32,
                },
                keys: &device.keys,
                values: &device.values,
            },
            select: Some((
                Score {
                    entries: &device.entries,
                    directories: &device.directories,
                    summaries: &device.summaries,
                    queries: &device.queries,
                    kv_heads: KV_HEADS as u32,
                    group: GROUP as u32,
                    head_words: HEAD_WORDS as u32,
                    bounds: false,
                    segment_partitions: SEGMENT_KEYS,
                    request_rows: ROWS as u32,
                    layer: layer as u32,
                    scale: 0.125,
                    stride: KEYS as u32,
                    logits: &lists.logits,
                    statistics: &lists.statistics,
                },
                SelectPartitions {
                    entries: &device.entries,
                    logits: &lists.logits,
                    statistics: Some(&lists.statistics),
                    kv_heads: KV_HEADS as u32,
                    group: GROUP as u32,
                    stride: KEYS as u32,
                    merge: GroupMerge::Max,
                    least: None,
                    top_p: 1.0,
                    marks: None,
                    estimates: None,
                    resident: KEYS as u32,
                    keys: &device.keys,
                    capacity: LIMIT as u32,
                    ids: &lists.ids,
                    selected: &lists.id_counts,
                },
            )),
            resolve: Resolve {
                entries: &device.entries,
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
                page_counts: &lists.page_counts,
                copies: &lists.copies,
                copy_counts: &lists.copy_counts,
                faults: &lists.faults,
            },
            gather: Gather {
                copies: &lists.copies,
                counts: &lists.copy_counts,
                host_pages: &self.arena,
                device_pages: &device.pool,
                page_words: PAGE_WORDS as u32,
                blocks: 4,
            },
        }
    }

    /// Requests end, come and get more slots.
    fn come_and_go(&mut self) -> Checked {
        for place in 0..PLACES {
            let full = |request: &Request| request.tokens == KEYS * PAGE_TOKENS;
            let ends = self.requests[place].as_ref().is_some_and(full) || self.rng.random_bool(0.003);
            if ends && let Some(request) = self.requests[place].take() {
                self.release(request);
            }
            if self.requests[place].is_none() && self.rng.random_bool(0.2) {
                self.admit(place)?;
            } else if self.requests[place].is_some() && self.rng.random_bool(0.01) {
                self.grow(place)?;
            }
        }
        Ok(())
    }

    fn release(&mut self, mut request: Request) {
        self.free_segments.extend(request.segments);
        for row in &mut request.rows {
            self.free_pages.extend(row.cache.physical_pages().map(|page| page.0));
            self.free_pages.append(&mut row.steady);
            self.free_slabs.append(&mut row.slabs);
        }
        // Who comes next gets others.
        self.free_pages.shuffle(&mut self.rng);
        self.free_slabs.shuffle(&mut self.rng);
        self.free_segments.shuffle(&mut self.rng);
    }

    /// A request comes whose prompt is on the host, as prefill leaves it: with its steady pages on the GPU and an empty cache.
    fn admit(&mut self, place: usize) -> Checked {
        let stream = &self.machine.stream;
        let tokens =
            if self.rng.random_bool(0.2) { 0 } else { self.rng.random_range(0..KEYS * PAGE_TOKENS * 9 / 10) };
        let complete = tokens / PAGE_TOKENS;
        let segments = array::from_fn(|_| self.free_segments.pop().expect("a segment"));
        for segment in segments {
            let entries = ROWS * SEGMENT_KEYS as usize;
            let first = segment as usize * entries;
            self.device.segments.fill_bytes(stream, first..first + entries, ABSENT_SLOT as u8)?;
        }
        self.device.directories.write(stream, place * SEGMENTS, &segments)?;
        let mut rows = Vec::new();
        for row in 0..ROWS {
            let steady = self.free_pages.split_off(self.free_pages.len() - SINK_PAGES - RING_PAGES);
            let slabs = self.free_slabs.split_off(self.free_slabs.len() - SLABS);
            let slots = LIMIT + self.rng.random_range(0..20);
            let slots = self.free_pages.split_off(self.free_pages.len() - slots);
            let at = place * ROWS + row;
            let mut valid = vec![0; SLABS];
            for key in 0..tokens.div_ceil(PAGE_TOKENS) {
                let page = slabs[key / SLAB_PAGES as usize] * SLAB_PAGES + key as u32 % SLAB_PAGES;
                let truth = &mut self.truth[page as usize * PAGE_WORDS..][..PAGE_WORDS];
                let own = self.rng.next_u64();
                truth.iter_mut().enumerate().for_each(|(word, value)| *value = hash(own, word as u64));
                if key < complete {
                    let offset = page as usize * PAGE_WORDS * size_of::<Word>();
                    self.arena.write(offset, bytemuck::cast_slice(truth))?;
                    valid[key / SLAB_PAGES as usize] |= 1 << (key as u32 % SLAB_PAGES);
                }
                if !pages_of(tokens).contains(&key) {
                    let page = steady[steady_place(key)] as usize;
                    self.device.pool.write(stream, page * PAGE_WORDS, truth)?;
                }
            }
            self.device.host_slabs.write(stream, at * SLABS, &slabs)?;
            self.device.host_valid.write(stream, at * SLABS, &valid)?;
            self.device.steady.write(stream, at * steady.len(), &steady)?;
            let pages = slots.into_iter().map(PhysicalPage).collect();
            let row = Row {
                cache: RowCache::new(pages, BucketedLru::default()),
                map: FlatMap::new(KEYS as u32),
                steady,
                slabs,
            };
            self.write_slots(at, &row.cache)?;
            rows.push(row);
        }
        let (clock, first_decoded) = (StepClock(self.rng.random()), pages_of(tokens).end);
        self.requests[place] = Some(Request { clock, tokens, segments, first_decoded, rows });
        self.seen[2] += 1;
        Ok(())
    }

    /// Rows of a request get some slots more.
    fn grow(&mut self, place: usize) -> Checked {
        let Some(mut request) = self.requests[place].take() else { return Ok(()) };
        for (number, row) in request.rows.iter_mut().enumerate() {
            let more = 3.min(SLOT_STRIDE - row.cache.capacity());
            let pages = self.free_pages.split_off(self.free_pages.len() - more);
            row.cache.grow(pages.into_iter().map(PhysicalPage).collect());
            self.write_slots(place * ROWS + number, &row.cache)?;
        }
        self.requests[place] = Some(request);
        Ok(())
    }

    fn write_slots(&self, row: usize, cache: &RowCache<BucketedLru>) -> Checked {
        let stream = &self.machine.stream;
        let (owners, physical, states) = slots_of(cache);
        self.device.owners.write(stream, row * SLOT_STRIDE, &owners)?;
        self.device.physical.write(stream, row * SLOT_STRIDE, &physical)?;
        self.device.states.write(stream, row * SLOT_STRIDE / 4, bytemuck::cast_slice(&states))?;
        Ok(())
    }

    /// A step begins: who takes part, with which token. The places of the entries.
    fn begin(&mut self) -> Result<[Option<usize>; BATCH], Box<dyn Error>> {
        let stream = &self.machine.stream;
        let mut order: [Option<usize>; BATCH] =
            array::from_fn(|entry| Some(entry).filter(|place| *place < PLACES));
        // The places that requests have in a batch change rarely, too: queries go by them.
        if self.rng.random_bool(0.1) {
            order.shuffle(&mut self.rng);
        }
        let mut entries = [Entry::default(); BATCH];
        self.keys = random_words(&mut self.rng, BATCH_ROWS * HEAD_WORDS);
        self.values = random_words(&mut self.rng, BATCH_ROWS * HEAD_WORDS);
        // Mostly as before, so that selections are alike from step to step.
        let queries =
            self.rng.random_bool(0.3).then(|| random_words(&mut self.rng, BATCH_ROWS * GROUP * HEAD_WORDS));
        for (entry, place) in entries.iter_mut().zip(&mut order) {
            let takes_part = self.rng.random_bool(0.9);
            let request = place.filter(|_| takes_part).and_then(|place| self.requests[place].as_mut());
            let (Some(at), Some(request)) = (*place, request) else {
                // Nothing but the tokens is looked at.
                *entry = bytemuck::cast([u32::MAX; size_of::<Entry>() / 4]);
                entry.tokens = 0;
                *place = None;
                continue;
            };
            let before = request.retrievable();
            request.clock.tick();
            request.tokens += 1;
            let after = request.retrievable();
            let leaving = after.end - before.end;
            *entry = Entry {
                tokens: request.tokens as u32,
                clock: request.clock.0 % 64,
                directory: (at * SEGMENTS) as u32,
                first_slot: (at * ROWS * SLOT_STRIDE) as u32,
                slot_stride: SLOT_STRIDE as u32,
                slots: SLOT_STRIDE as u32,
                first_steady: (at * ROWS * (SINK_PAGES + RING_PAGES)) as u32,
                sink_pages: SINK_PAGES as u32,
                ring_pages: RING_PAGES as u32,
                first_slab: (at * ROWS * SLABS) as u32,
                slab_stride: SLABS as u32,
                first_partition: after.start as u32,
                partitions: after.len() as u32,
                limit: LIMIT as u32,
                leaving_key: before.end as u32,
                leaving: leaving as u32,
                new_partition: before.end as u32,
                new_partitions: leaving as u32,
                unused: [0; 2],
            };
        }
        self.device.entries.write(stream, 0, &entries)?;
        self.device.keys.write(stream, 0, &self.keys)?;
        self.device.values.write(stream, 0, &self.values)?;
        if let Some(queries) = queries {
            self.device.queries.write(stream, 0, &queries)?;
        }
        Ok(order)
    }

    /// The CPU takes the same step, with the selection of the GPU, and compares lists.
    fn follow(&mut self, order: &[Option<usize>; BATCH]) -> Checked {
        let stream = &self.machine.stream;
        for layer in 0..LAYERS {
            let lists = &self.device.lists[layer];
            let (ids, id_counts) = (lists.ids.to_vec(stream)?, lists.id_counts.to_vec(stream)?);
            let (pages, page_counts) = (lists.pages.to_vec(stream)?, lists.page_counts.to_vec(stream)?);
            let (copies, copy_counts) = (lists.copies.to_vec(stream)?, lists.copy_counts.to_vec(stream)?);
            let faults = lists.faults.to_vec(stream)?;
            if faults.iter().any(|fault| *fault != 0) {
                return Err(format!("layer {layer}: faults {faults:?}").into());
            }
            for (entry, place) in order.iter().enumerate() {
                for head in 0..KV_HEADS {
                    let row = entry * KV_HEADS + head;
                    let at = |what: &str| format!("layer {layer}, entry {entry}, head {head}: {what}");
                    let Some(request) = place.and_then(|place| self.requests[place].as_mut()) else {
                        if (id_counts[row], page_counts[row], copy_counts[row]) != (0, 0, 0) {
                            return Err(at("a filler has pages").into());
                        }
                        continue;
                    };
                    let candidates = request.retrievable();
                    let ids = &ids[row * LIMIT..][..id_counts[row] as usize];
                    let ascend = ids.is_sorted_by(|a, b| a < b)
                        && ids.iter().all(|id| candidates.contains(&(*id as usize)));
                    if ids.len() != LIMIT.min(candidates.len()) || !ascend {
                        return Err(at(&format!("selected {ids:?} of {candidates:?}")).into());
                    }
                    let (clock, tokens) = (request.clock, request.tokens);
                    let state = &mut request.rows[layer * KV_HEADS + head];
                    let before = pages_of(tokens - 1).end;
                    let (own_pages, own_copies) = state.step(clock, before..candidates.end, ids);
                    let found = &pages[row * LIMIT..][..page_counts[row] as usize];
                    if found != own_pages {
                        return Err(at(&format!("pages {found:?}, and {own_pages:?} were expected")).into());
                    }
                    let found = &copies[row * LIMIT..][..copy_counts[row] as usize];
                    if found != own_copies {
                        return Err(at(&format!("copies {found:?}, and {own_copies:?} were expected")).into());
                    }
                    let copies = own_copies.iter().flat_map(|copy| [copy.host_page, copy.device_page]);
                    for number in ids.iter().chain(&own_pages).copied().chain(copies) {
                        self.digest = (self.digest ^ u64::from(number)).wrapping_mul(0x100_0000_01b3);
                    }
                    self.seen[0] += own_pages.len();
                    self.seen[1] += own_copies.len();
                    // What was appended.
                    let (key, token) = ((tokens - 1) / PAGE_TOKENS, (tokens - 1) % PAGE_TOKENS);
                    let page = state.host_page(key as u32) as usize * PAGE_WORDS;
                    let tensor = row * HEAD_WORDS..(row + 1) * HEAD_WORDS;
                    for (half, new) in [&self.keys, &self.values].into_iter().enumerate() {
                        let at = page + (half * PAGE_TOKENS + token) * HEAD_WORDS;
                        self.truth[at..at + HEAD_WORDS].copy_from_slice(&new[tensor.clone()]);
                    }
                }
            }
        }
        Ok(())
    }

    /// All tables against the CPU's, the bytes of all pages against what was written, and summaries against the keys.
    fn look(&mut self) -> Checked {
        let stream = &self.machine.stream;
        let device = &self.device;
        let (segments, owners) = (device.segments.to_vec(stream)?, device.owners.to_vec(stream)?);
        let (physical, states) = (device.physical.to_vec(stream)?, device.states.to_vec(stream)?);
        let (steady, valid) = (device.steady.to_vec(stream)?, device.host_valid.to_vec(stream)?);
        let (pool, summaries) = (device.pool.to_vec(stream)?, device.summaries.to_vec(stream)?);
        let states: &[u8] = bytemuck::cast_slice(&states);
        let shown = |byte: &u8| if byte & SLOT_HELD == 0 { byte & !SLOT_STAMP } else { *byte };
        let mut host_page = vec![0; PAGE_WORDS];
        for (place, request) in self.requests.iter().enumerate() {
            let Some(request) = request else { continue };
            for (number, row) in request.rows.iter().enumerate() {
                let at = place * ROWS + number;
                let wrong = |what: &str| Err(format!("place {place}, row {number}: {what}").into());
                let slots = at * SLOT_STRIDE..(at + 1) * SLOT_STRIDE;
                let (own_owners, own_physical, own_states) = slots_of(&row.cache);
                if owners[slots.clone()] != own_owners || physical[slots.clone()] != own_physical {
                    return wrong("slots");
                }
                if !states[slots].iter().map(shown).eq(own_states.iter().map(shown)) {
                    return wrong("states");
                }
                if steady[at * row.steady.len()..][..row.steady.len()] != row.steady {
                    return wrong("steady pages");
                }
                for key in 0..KEYS as u32 {
                    let segment = request.segments[(key / SEGMENT_KEYS) as usize] as usize;
                    let entry = segments
                        [(segment * ROWS + number) * SEGMENT_KEYS as usize + (key % SEGMENT_KEYS) as usize];
                    if entry != row.map.get(key).map_or(ABSENT_SLOT, |slot| slot.0 as u16) {
                        return wrong(&format!("the slot of page {key}"));
                    }
                    let complete = (key as usize + 1) * PAGE_TOKENS <= request.tokens;
                    let bit = valid[at * SLABS + (key / SLAB_PAGES) as usize] >> (key % SLAB_PAGES) & 1 != 0;
                    if bit != complete {
                        return wrong(&format!("page {key} is said to be on the host: {bit}"));
                    }
                    let page = row.host_page(key) as usize;
                    let truth = &self.truth[page * PAGE_WORDS..][..PAGE_WORDS];
                    // The host's own pages rarely, since they are many.
                    if complete && (key as usize + request.tokens).is_multiple_of(32) {
                        self.arena.read(
                            page * PAGE_WORDS * size_of::<Word>(),
                            bytemuck::cast_slice_mut(&mut host_page),
                        )?;
                        if host_page != truth {
                            return wrong(&format!("page {key} on the host"));
                        }
                    }
                    if let Some(page) = row.cache.lookup(&row.map, key)
                        && pool[page.0 as usize * PAGE_WORDS..][..PAGE_WORDS] != *truth
                    {
                        return wrong(&format!("page {key} in the cache"));
                    }
                }
                for key in request.first_decoded..request.retrievable().end {
                    let (segment, in_segment) = (key / SEGMENT_KEYS as usize, key % SEGMENT_KEYS as usize);
                    let segment_row = request.segments[segment] as usize * ROWS + number;
                    let at = (segment_row * SEGMENT_KEYS as usize + in_segment) * HEAD_WORDS;
                    let page = row.host_page(key as u32) as usize * PAGE_WORDS;
                    let keys = &self.truth[page..][..PAGE_TOKENS * HEAD_WORDS];
                    if !is_mean(&summaries[at..at + HEAD_WORDS], keys) {
                        return wrong(&format!("the summary of partition {key}"));
                    }
                    self.seen[3] += 1;
                }
                let tokens = (0..SINK_PAGES * PAGE_TOKENS)
                    .chain(request.retrievable().end * PAGE_TOKENS..request.tokens);
                for token in tokens.filter(|token| *token < request.tokens) {
                    let (key, token) = (token / PAGE_TOKENS, token % PAGE_TOKENS);
                    let (own, page) =
                        (row.steady[steady_place(key)] as usize, row.host_page(key as u32) as usize);
                    for (half, name) in ["key", "value"].into_iter().enumerate() {
                        let words = |page: usize| {
                            let first = page * PAGE_WORDS + (half * PAGE_TOKENS + token) * HEAD_WORDS;
                            first..first + HEAD_WORDS
                        };
                        if pool[words(own)] != self.truth[words(page)] {
                            return wrong(&format!("the {name} of token {token} of steady page {key}"));
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

impl Row {
    fn host_page(&self, key: u32) -> u32 {
        self.slabs[(key / SLAB_PAGES) as usize] * SLAB_PAGES + key % SLAB_PAGES
    }

    /// What the step does to the row: the pages of the selection, and what is fetched.
    fn step(&mut self, clock: StepClock, leaving: Range<usize>, ids: &[u32]) -> (Vec<u32>, Vec<PageCopy>) {
        self.cache.begin_step(clock);
        for key in leaving {
            let place = steady_place(key);
            let page = PhysicalPage(self.steady[place]);
            self.steady[place] = self.cache.adopt(&mut self.map, key as u32, page).spare.0;
        }
        let selection: Vec<_> =
            ids.iter().map(|id| SelectedPage { key: *id, tokens: PAGE_TOKENS as u32 }).collect();
        let mut out = Resolution::default();
        self.cache
            .resolve(&mut self.map, &selection, &mut out)
            .expect("a row has more slots than a selection");
        let copies = out.copies.iter();
        let copies =
            copies.map(|copy| PageCopy { host_page: self.host_page(copy.key), device_page: copy.page.0 });
        (out.pages.iter().map(|page| page.0).collect(), copies.collect())
    }
}

/// Owners, physical pages and bytes of a row's slots, up to the stride.
fn slots_of(cache: &RowCache<BucketedLru>) -> (Vec<u32>, Vec<u32>, Vec<u8>) {
    let slots = || (0..SLOT_STRIDE as u32).map(SlotId);
    let state = |slot: SlotId| match cache.physical(slot) {
        Some(_) => cache.states().bytes()[slot.index()],
        None => SLOT_PINNED,
    };
    (
        slots().map(|slot| cache.owner(slot).unwrap_or(NO_KEY)).collect(),
        slots().map(|slot| cache.physical(slot).map_or(u32::MAX, |page| page.0)).collect(),
        slots().map(state).collect(),
    )
}

/// Whether a summary is the mean of a page's keys, in bf16: half a unit in the last place is at most 2^-9 of a number. One key more
/// or less, or another page, is off by far more in some element.
fn is_mean(summary: &[Word], keys: &[Word]) -> bool {
    let [summary, keys]: [&[bf16]; 2] = [bytemuck::cast_slice(summary), bytemuck::cast_slice(keys)];
    summary.iter().enumerate().all(|(element, found)| {
        let of_keys = keys.iter().skip(element).step_by(summary.len());
        let mean = of_keys.map(|key| key.to_f32()).sum::<f32>() / PAGE_TOKENS as f32;
        (found.to_f32() - mean).abs() <= mean.abs() / 256.0 + 1e-6
    })
}

/// Words of bf16 numbers about 0.
fn random_words(rng: &mut impl Rng, count: usize) -> Vec<u128> {
    let mut element = || bf16::from_f32(rng.random_range(-2.0..2.0)).to_bits();
    (0..count).map(|_| bytemuck::cast::<[u16; 8], u128>(array::from_fn(|_| element()))).collect()
}

/// The content of a page that a prompt left.
fn hash(page: u64, word: u64) -> u128 {
    let mix = |value: u64| {
        let value = (value ^ value >> 31).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        value ^ value >> 29
    };
    // Finite bf16 numbers: the index reads them.
    let bits = u128::from(mix(page ^ mix(word))) << 64 | u128::from(mix(word.wrapping_add(page)));
    bits & 0xbfff_bfff_bfff_bfff_bfff_bfff_bfff_bfff
}
