//! A captured step, replayed thousands of times under requests that come, grow and go: the tables must stay those of the CPU's cache,
//! every page's bytes those that were appended, the summaries of pages that left the steady zone the means of their keys, and
//! attention that over sinks, selection and tail.

mod graph;
mod look;
mod requests;

use std::array;
use std::error::Error;
use std::ops::Range;

use half::bf16;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinkv::backend::cuda::driver::{DeviceBuffer, DriverError, PinnedArena};
use spinkv::memory::{PhysicalPage, Word};
use spinkv::paging::{BucketedLru, FlatMap, Resolution, RowCache, SlotId, StepClock};
use spinkv::partition::SelectedPage;
use spinkv::pipeline::{SteadyZone, ZoneUnit, Zones};
use spinkv_kernels::abi::attend::partial_words;
use spinkv_kernels::abi::{Entry, NO_KEY, PageCopy, SEGMENT_KEYS, SLAB_PAGES, SLOT_PINNED, score};

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
/// Factor of the logits: 1 / sqrt(64).
const SCALE: f32 = 0.125;
/// Blocks that share a row's attention, so that their shares are put together, too.
const SPLITS: usize = 2;
/// Bytes of attention's outputs before a step: a NaN.
const POISON: u8 = 0xff;
/// Requests that fit at a time.
const PLACES: usize = 6;
/// Entries of the captured batches: a step is one of them, filled up with entries that no request has.
const BUCKETS: [usize; 2] = [3, 8];
const BATCH: usize = BUCKETS[BUCKETS.len() - 1];
const BATCH_ROWS: usize = BATCH * KV_HEADS;
/// Numbers that `score` hands to `select` beside a row's logits.
const STATISTICS: usize = GROUP * score::max_tiles(KEYS as u32) as usize * 2;
/// Words of a row's shares of attention.
const PARTIALS: usize = SPLITS * partial_words(HEAD_WORDS as u32) as usize;
/// Replays between looks at all tables and pages.
const LOOK: usize = 8;

pub fn tests() -> Vec<Test> {
    vec![
        test("replay::requests_come_grow_and_go", |machine| {
            World::new(machine, machine.seed)?.run(10_000, false)?;
            Ok(())
        }),
        // The same requests and tokens, with and without something slow between the launches of every other step: the same selections,
        // pages, copies and outputs.
        test("replay::delays_change_nothing", |machine| {
            let run = |delayed| World::new(machine, machine.seed + 1)?.run(500, delayed);
            if run(false)? != run(true)? {
                return Err("other lists or outputs with delays".into());
            }
            Ok(())
        }),
    ]
}

type Checked = Result<(), Box<dyn Error>>;

/// Of each entry of the step's batch the place of its request; `None` for one that only fills the batch.
type Order = Vec<Option<usize>>;

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
    let zone = Zones::at(tokens, &STEADY, ZoneUnit::even(PAGE_TOKENS)).retrievable;
    let end = zone.end / PAGE_TOKENS;
    SINK_PAGES..end.max(SINK_PAGES)
}

fn steady_place(key: usize) -> usize {
    if key < SINK_PAGES { key } else { SINK_PAGES + (key - SINK_PAGES) % RING_PAGES }
}

/// What lies on the GPU.
struct Device {
    inputs: Inputs,
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
    lists: [LayerLists; LAYERS],
    delay: DeviceBuffer<u32>,
}

/// What a step is given.
struct Inputs {
    entries: DeviceBuffer<Entry>,
    keys: DeviceBuffer<Word>,
    values: DeviceBuffer<Word>,
    queries: DeviceBuffer<Word>,
}

impl Inputs {
    /// Those of a batch of `bucket` entries.
    fn first(&self, bucket: usize) -> Result<Self, DriverError> {
        let rows = bucket * KV_HEADS;
        Ok(Self {
            entries: self.entries.part(0..bucket)?,
            keys: self.keys.part(0..rows * HEAD_WORDS)?,
            values: self.values.part(0..rows * HEAD_WORDS)?,
            queries: self.queries.part(0..rows * GROUP * HEAD_WORDS)?,
        })
    }
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
    arrived: DeviceBuffer<u32>,
    faults: DeviceBuffer<u32>,
    partials: DeviceBuffer<Word>,
    arrivals: DeviceBuffer<u32>,
    outputs: DeviceBuffer<Word>,
    lse: DeviceBuffer<f32>,
}

impl LayerLists {
    /// Those of a batch of `bucket` entries.
    fn first(&self, bucket: usize) -> Result<Self, DriverError> {
        let rows = bucket * KV_HEADS;
        Ok(Self {
            logits: self.logits.part(0..rows * GROUP * KEYS)?,
            statistics: self.statistics.part(0..rows * STATISTICS)?,
            ids: self.ids.part(0..rows * LIMIT)?,
            id_counts: self.id_counts.part(0..rows)?,
            pages: self.pages.part(0..rows * LIMIT)?,
            page_counts: self.page_counts.part(0..rows)?,
            copies: self.copies.part(0..rows * LIMIT)?,
            copy_counts: self.copy_counts.part(0..rows)?,
            arrived: self.arrived.part(0..rows)?,
            faults: self.faults.part(0..rows)?,
            partials: self.partials.part(0..rows * PARTIALS)?,
            arrivals: self.arrivals.part(0..rows)?,
            outputs: self.outputs.part(0..rows * GROUP * HEAD_WORDS)?,
            lse: self.lse.part(0..rows * GROUP)?,
        })
    }
}

/// What was compared, so that a run that saw too little of something is found out.
#[derive(Debug, Default)]
struct Seen {
    /// Selected pages.
    selected: usize,
    /// Those of them that were fetched.
    fetched: usize,
    /// Requests that came.
    came: usize,
    summaries: usize,
    /// Query heads whose attention was looked at.
    heads: usize,
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
    queries: Vec<u128>,
    seen: Seen,
    /// Of all lists and outputs so far.
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
                statistics: DeviceBuffer::zeroed(stream, BATCH_ROWS * STATISTICS)?,
                ids: zeroed(BATCH_ROWS * LIMIT)?,
                id_counts: zeroed(BATCH_ROWS)?,
                pages: zeroed(BATCH_ROWS * LIMIT)?,
                page_counts: zeroed(BATCH_ROWS)?,
                copies: DeviceBuffer::from_slice(stream, &[PageCopy::default(); BATCH_ROWS * LIMIT])?,
                copy_counts: zeroed(BATCH_ROWS)?,
                arrived: zeroed(BATCH_ROWS)?,
                faults: zeroed(BATCH_ROWS)?,
                partials: words(BATCH_ROWS * PARTIALS)?,
                arrivals: zeroed(BATCH_ROWS)?,
                outputs: words(BATCH_ROWS * GROUP * HEAD_WORDS)?,
                lse: DeviceBuffer::zeroed(stream, BATCH_ROWS * GROUP)?,
            })
        };
        let segments = PLACES * SEGMENTS + 3;
        let summaries = random_words(&mut rng, segments * ROWS * SEGMENT_KEYS as usize * HEAD_WORDS);
        let device = Device {
            inputs: Inputs {
                entries: DeviceBuffer::from_slice(stream, &[Entry::default(); BATCH])?,
                keys: words(BATCH_ROWS * HEAD_WORDS)?,
                values: words(BATCH_ROWS * HEAD_WORDS)?,
                queries: words(BATCH_ROWS * GROUP * HEAD_WORDS)?,
            },
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
            queries: vec![0; BATCH_ROWS * GROUP * HEAD_WORDS],
            seen: Seen::default(),
            digest: 0,
        })
    }

    /// Replays; what all lists and outputs were, in a number.
    fn run(mut self, replays: usize, delayed: bool) -> Result<u64, Box<dyn Error>> {
        let capture = |delayed| -> Result<Vec<_>, Box<dyn Error>> {
            BUCKETS.iter().map(|bucket| self.capture(*bucket, delayed)).collect()
        };
        let graphs = [capture(false)?, capture(true)?];
        for replay in 0..replays {
            self.come_and_go()?;
            let order = self.begin()?;
            let bucket =
                BUCKETS.iter().position(|bucket| *bucket == order.len()).expect("a step is of a bucket");
            let graph = &graphs[usize::from(delayed && replay % 2 == 1)][bucket];
            // SAFETY: the buffers are this world's; entries and tables are those of its requests.
            unsafe { graph.launch(&self.machine.stream)? };
            self.follow(&order).map_err(|wrong| format!("replay {replay}: {wrong}"))?;
            if replay % LOOK == 0 || replay + 1 == replays {
                self.look()
                    .and_then(|()| self.look_at_attention(&order))
                    .map_err(|wrong| format!("after replay {replay}: {wrong}"))?;
            }
        }
        let Seen { selected, fetched, came, summaries, heads } = self.seen;
        if fetched * 20 < selected
            || fetched * 3 > selected * 2
            || came * 100 < replays
            || summaries < replays
            || heads < replays
        {
            return Err(format!("{:?}: not the mix that was meant", self.seen).into());
        }
        Ok(self.digest)
    }

    /// The CPU takes the same step, with the selection of the GPU, and compares lists.
    fn follow(&mut self, order: &[Option<usize>]) -> Checked {
        let stream = &self.machine.stream;
        for layer in 0..LAYERS {
            let lists = &self.device.lists[layer];
            let (ids, id_counts) = (lists.ids.to_vec(stream)?, lists.id_counts.to_vec(stream)?);
            let (pages, page_counts) = (lists.pages.to_vec(stream)?, lists.page_counts.to_vec(stream)?);
            let (copies, copy_counts) = (lists.copies.to_vec(stream)?, lists.copy_counts.to_vec(stream)?);
            let (outputs, lse) = (lists.outputs.to_vec(stream)?, lists.lse.to_vec(stream)?);
            let (outputs, lse): (&[u64], &[u32]) =
                (bytemuck::cast_slice(&outputs), bytemuck::cast_slice(&lse));
            let faults = lists.faults.to_vec(stream)?;
            if faults.iter().any(|fault| *fault != 0) {
                return Err(format!("layer {layer}: faults {faults:?}").into());
            }
            for (entry, place) in order.iter().enumerate() {
                for head in 0..KV_HEADS {
                    let row = entry * KV_HEADS + head;
                    let at = |what: &str| format!("layer {layer}, entry {entry}, head {head}: {what}");
                    let of_row = GROUP * HEAD_WORDS * size_of::<Word>() / size_of::<u64>();
                    let (outputs, lse) = (&outputs[row * of_row..][..of_row], &lse[row * GROUP..][..GROUP]);
                    let Some(request) = place.and_then(|place| self.requests[place].as_mut()) else {
                        if (id_counts[row], page_counts[row], copy_counts[row]) != (0, 0, 0) {
                            return Err(at("a filler has pages").into());
                        }
                        let untouched = |bytes: &[u8]| bytes.iter().all(|byte| *byte == POISON);
                        if !untouched(bytemuck::cast_slice(outputs)) || !untouched(bytemuck::cast_slice(lse))
                        {
                            return Err(at("a filler has outputs").into());
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
                    let (mut own_pages, own_copies) = state.step(clock, before..candidates.end, ids);
                    // Misses are listed last.
                    own_pages.sort_by_key(|page| own_copies.iter().any(|copy| copy.device_page == *page));
                    let found = &pages[row * LIMIT..][..page_counts[row] as usize];
                    if found != own_pages {
                        return Err(at(&format!("pages {found:?}, and {own_pages:?} were expected")).into());
                    }
                    let found = &copies[row * LIMIT..][..copy_counts[row] as usize];
                    if found != own_copies {
                        return Err(at(&format!("copies {found:?}, and {own_copies:?} were expected")).into());
                    }
                    let copies = own_copies.iter().flat_map(|copy| [copy.host_page, copy.device_page]);
                    let numbers =
                        ids.iter().chain(&own_pages).chain(lse).copied().chain(copies).map(u64::from);
                    // Outputs are the same bits whatever the schedule: shares are put together in their order.
                    for number in numbers.chain(outputs.iter().copied()) {
                        self.digest = (self.digest ^ number).wrapping_mul(0x100_0000_01b3);
                    }
                    self.seen.selected += own_pages.len();
                    self.seen.fetched += own_copies.len();
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

/// Words of bf16 numbers about 0.
fn random_words(rng: &mut impl Rng, count: usize) -> Vec<u128> {
    let mut element = || bf16::from_f32(rng.random_range(-2.0..2.0)).to_bits();
    (0..count).map(|_| bytemuck::cast::<[u16; 8], u128>(array::from_fn(|_| element()))).collect()
}
