use rand::Rng;
use rand::seq::{SliceRandom, index};
use rand_chacha::ChaCha8Rng;
use spinkv::memory::PhysicalPage;
use spinkv::paging::{BucketedLru, FlatMap, Resolution, RowCache, SlotId, SlotMap, SlotStates, StepClock};
use spinkv::partition::SelectedPage;
use spinkv_kernels::abi::resolve::{LIST_TOO_LONG, NO_FAULT, NOT_ON_HOST, TOO_FEW_SLOTS};
use spinkv_kernels::abi::{
    ABSENT_SLOT, Entry, NO_KEY, PageCopy, SEGMENT_KEYS, SLAB_PAGES, SLOT_HELD, SLOT_PINNED, SLOT_STAMP,
};

use super::{Lists, ResolveStep, Size, Tables};
use crate::WILD;

/// One row of the reference.
#[derive(Debug)]
struct Row {
    cache: RowCache<BucketedLru>,
    map: FlatMap,
    /// `[sinks + ring]`.
    steady: Vec<u32>,
    slabs: Vec<u32>,
    /// By page key.
    on_host: Vec<bool>,
}

/// One request of the reference.
#[derive(Debug)]
struct Request {
    clock: StepClock,
    sinks: u32,
    ring: u32,
    /// Retrievable pages end here.
    end: u32,
    rows: Vec<Row>,
    /// Where its tables begin; they lie in an order of their own.
    segments: Vec<u32>,
    /// How many of them its directory has, since its context has not come further.
    known: u32,
    directory: u32,
    first_slot: u32,
    slot_stride: u32,
    first_steady: u32,
    first_slab: u32,
}

/// The reference of a batch.
pub(super) struct Batch {
    size: Size,
    page_partitions: u32,
    partition_pages: u32,
    requests: Vec<Request>,
    keys: u32,
    next_page: u32,
}

impl Batch {
    pub(super) fn new(rng: &mut ChaCha8Rng, size: Size, page_partitions: u32, partition_pages: u32) -> Self {
        let segments = rng.random_range(1..=3u32) + size.slots as u32 / SEGMENT_KEYS;
        let keys = segments * SEGMENT_KEYS;
        let mut numbers: Vec<u32> = (0..segments * size.requests as u32 + 2).collect();
        numbers.shuffle(rng);
        let mut batch =
            Self { size, page_partitions, partition_pages, requests: Vec::new(), keys, next_page: 5 };
        let (mut slot, mut steady, mut slab) = (4 * rng.random_range(0..3), rng.random_range(0..5), 3);
        let rows = size.layers * size.kv_heads;
        for number in 0..size.requests as u32 {
            let sinks = rng.random_range(0..=2) * partition_pages;
            let ring = 4 * partition_pages;
            let slot_stride = (size.slots as u32 + rng.random_range(0..40)).next_multiple_of(4);
            let end = sinks + partition_pages * rng.random_range(0..=(keys - sinks) / 2 / partition_pages);
            let request = Request {
                known: rng.random_range(end.div_ceil(SEGMENT_KEYS).max(1)..=segments),
                clock: StepClock(rng.random()),
                sinks,
                ring,
                end,
                rows: (0..rows).map(|_| batch.row(rng, sinks + ring)).collect(),
                segments: numbers.split_off(numbers.len() - segments as usize),
                directory: 2 + number * segments,
                first_slot: slot,
                slot_stride,
                first_steady: steady,
                first_slab: slab,
            };
            slot += slot_stride * rows as u32;
            steady += (sinks + ring) * rows as u32;
            slab += keys / SLAB_PAGES * rows as u32;
            batch.requests.push(request);
        }
        batch
    }

    fn row(&mut self, rng: &mut ChaCha8Rng, steady: u32) -> Row {
        let slots = self.size.slots.saturating_sub(rng.random_range(0..3)).max(1);
        let mut pages: Vec<_> = self.pages(slots);
        pages.shuffle(rng);
        Row {
            cache: RowCache::new(pages, BucketedLru::default()),
            map: FlatMap::new(self.keys),
            steady: self.pages(steady as usize).iter().map(|page| page.0).collect(),
            slabs: (0..self.keys / SLAB_PAGES).map(|_| rng.random_range(0..1 << 20)).collect(),
            on_host: (0..self.keys).map(|_| rng.random_bool(0.9995)).collect(),
        }
    }

    /// Physical pages that nobody has.
    fn pages(&mut self, count: usize) -> Vec<PhysicalPage> {
        self.next_page += count as u32;
        (self.next_page - count as u32..self.next_page).map(PhysicalPage).collect()
    }

    /// Page keys of a row.
    pub(super) fn keys(&self) -> u32 {
        self.keys
    }

    pub(super) fn slot_capacity(&self) -> u32 {
        self.requests.iter().map(|request| request.slot_stride).max().unwrap_or(4)
    }

    /// The tables as the reference has them.
    pub(super) fn tables(&self) -> Tables {
        let rows = self.size.layers * self.size.kv_heads;
        let last = self.requests.last().expect("a request");
        let all = |first: u32, stride: u32| (first + stride * rows as u32) as usize;
        let slots = all(last.first_slot, last.slot_stride);
        let slabs = all(last.first_slab, self.keys / SLAB_PAGES);
        let segments = (self.requests.len() * last.segments.len() + 2) * rows * SEGMENT_KEYS as usize;
        let mut tables = Tables {
            directories: vec![WILD; last.directory as usize + last.segments.len()],
            segments: vec![0x1234; segments],
            owners: vec![NO_KEY; slots],
            physical: vec![WILD; slots],
            states: vec![u32::from_ne_bytes([SLOT_PINNED; 4]); slots / 4],
            steady: vec![WILD; all(last.first_steady, last.sinks + last.ring)],
            host_slabs: vec![WILD; slabs],
            host_valid: vec![0; slabs],
        };
        for request in &self.requests {
            request.write(&mut tables);
        }
        tables
    }

    pub(super) fn step(&mut self, rng: &mut ChaCha8Rng, list_capacity: u32, id_stride: u32) -> ResolveStep {
        let edited = self.edit(rng);
        let tables = edited.then(|| self.tables());
        let layer = rng.random_range(0..self.size.layers);
        // Some requests sit out, and the batch is filled up.
        let mut order: Vec<_> = (0..self.requests.len()).map(Some).collect();
        order.shuffle(rng);
        order.truncate(rng.random_range(1..=order.len()));
        for _ in 0..rng.random_range(0..=1) {
            order.insert(rng.random_range(0..=order.len()), None);
        }

        let (mut entries, mut ids, mut id_counts) = (Vec::new(), Vec::new(), Vec::new());
        let mut lists = Lists {
            pages: Vec::new(),
            page_counts: Vec::new(),
            copies: Vec::new(),
            copy_keys: Vec::new(),
            copy_counts: Vec::new(),
            arrived: Vec::new(),
            faults: Vec::new(),
        };
        for number in order {
            let Some(number) = number else {
                // Everything but the tokens is wild; so are the ids.
                let wild: [u32; 20] = std::array::from_fn(|at| if at == 0 { 0 } else { WILD });
                entries.push(bytemuck::cast(wild));
                let rows = self.size.kv_heads;
                ids.extend(vec![WILD; rows * id_stride as usize]);
                id_counts.extend(vec![WILD; rows]);
                (0..rows).for_each(|_| lists.add(&[], &[], NO_FAULT, list_capacity));
                continue;
            };
            let entry =
                self.requests[number].begin(rng, self.partition_pages, self.page_partitions, self.keys);
            for head in 0..self.size.kv_heads {
                let row = layer * self.size.kv_heads + head;
                let selected = self.select(rng, &entry, number, list_capacity);
                let Request { clock, sinks, ring, rows, .. } = &mut self.requests[number];
                rows[row].resolve(*clock, &entry, [*sinks, *ring], &selected.keys, list_capacity, &mut lists);
                id_counts.push(selected.ids.len() as u32);
                ids.extend(&selected.ids);
                ids.resize(
                    entries.len() * self.size.kv_heads * id_stride as usize + (head + 1) * id_stride as usize,
                    WILD,
                );
            }
            entries.push(entry);
        }
        let expected = self.tables();
        ResolveStep { tables, layer: layer as u32, entries, ids, id_counts, expected, lists }
    }

    /// What the host does between steps; whether it did anything.
    fn edit(&mut self, rng: &mut ChaCha8Rng) -> bool {
        if !rng.random_bool(0.4) {
            return false;
        }
        for number in 0..self.requests.len() {
            for row in 0..self.requests[number].rows.len() {
                let spare = self.pages(3);
                let (most, keys) = (self.size.slots, self.keys);
                let Row { cache, map, .. } = &mut self.requests[number].rows[row];
                match rng.random_range(0..4) {
                    0 => {
                        cache.shrink(map, rng.random_range(0..=cache.capacity() / 2));
                    }
                    1 if cache.capacity() + 3 <= most => cache.grow(spare),
                    2 => {
                        let held = (0..keys).filter_map(|key| map.get(key));
                        let held: Vec<_> = held.filter(|slot| !cache.states().is_pinned(*slot)).collect();
                        held.iter().filter(|_| rng.random_bool(0.3)).for_each(|slot| cache.pin(*slot));
                    }
                    _ => {
                        let slots = (0..cache.states().bytes().len() as u32).map(SlotId);
                        let pinned: Vec<_> = slots.filter(|slot| cache.states().is_pinned(*slot)).collect();
                        pinned.iter().for_each(|slot| cache.unpin(*slot));
                    }
                }
            }
        }
        true
    }

    /// A selection, as partitions and as the page keys that they stand for.
    fn select(&self, rng: &mut ChaCha8Rng, entry: &Entry, request: usize, list_capacity: u32) -> Selection {
        let request = &self.requests[request];
        let first = request.sinks / self.partition_pages;
        let partitions = (request.end - request.sinks) / self.partition_pages;
        debug_assert_eq!(entry.leaving_key + entry.leaving, request.end);
        // Mostly as many as a list holds, rarely one too many.
        let most = (list_capacity + u32::from(rng.random_bool(0.02))).div_ceil(self.partition_pages);
        let pages = if rng.random_bool(0.5) { most } else { rng.random_range(0..=most) }.min(partitions);
        // Half of what the row has or nearby, the rest anywhere.
        let window = if rng.random_bool(0.7) { (2 * pages).clamp(1, partitions.max(1)) } else { partitions };
        let mut ids: Vec<u32> = index::sample(rng, window as usize, pages.min(window) as usize)
            .into_iter()
            .map(|id| first + id as u32)
            .collect();
        ids.sort_unstable();
        if self.page_partitions > 1 {
            let tokens = |page: &u32| {
                let mut tokens: Vec<_> = (0..self.page_partitions).filter(|_| rng.random_bool(0.5)).collect();
                if tokens.is_empty() {
                    tokens.push(0);
                }
                tokens.into_iter().map(|token| page * self.page_partitions + token).collect::<Vec<_>>()
            };
            let keys = ids.clone();
            return Selection { ids: ids.iter().flat_map(tokens).collect(), keys };
        }
        let pages = |id: &u32| id * self.partition_pages..(id + 1) * self.partition_pages;
        Selection { keys: ids.iter().flat_map(pages).collect(), ids }
    }
}

struct Selection {
    ids: Vec<u32>,
    keys: Vec<u32>,
}

impl Request {
    /// The next step begins.
    fn begin(&mut self, rng: &mut ChaCha8Rng, unit: u32, page_partitions: u32, keys: u32) -> Entry {
        self.clock.tick();
        let leaving = if rng.random_bool(0.3) { unit * rng.random_range(1..=2) } else { 0 };
        let leaving = if self.end + leaving > self.known * SEGMENT_KEYS { 0 } else { leaving };
        self.end += leaving;
        Entry {
            tokens: 1 + rng.random_range(0..1000),
            clock: self.clock.0 % 64,
            directory: self.directory,
            first_slot: self.first_slot,
            slot_stride: self.slot_stride,
            slots: self.slot_stride,
            first_steady: self.first_steady,
            sink_pages: self.sinks,
            ring_pages: self.ring,
            first_slab: self.first_slab,
            slab_stride: keys / SLAB_PAGES,
            leaving_key: self.end - leaving,
            leaving,
            first_partition: self.sinks / unit * page_partitions,
            partitions: (self.end - self.sinks) / unit * page_partitions,
            // None of the kernel's business.
            limit: WILD,
            new_partition: WILD,
            new_partitions: WILD,
            first_marks: WILD,
            basis: WILD,
        }
    }

    fn write(&self, tables: &mut Tables) {
        let rows = self.rows.len();
        let directory = self.directory as usize;
        let known = self.known as usize;
        tables.directories[directory..directory + known].copy_from_slice(&self.segments[..known]);
        for (number, row) in self.rows.iter().enumerate() {
            let first = self.first_slot as usize + number * self.slot_stride as usize;
            let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut tables.states);
            for slot in 0..self.slot_stride {
                let at = first + slot as usize;
                let id = SlotId(slot);
                tables.owners[at] = row.cache.owner(id).unwrap_or(NO_KEY);
                let page = row.cache.physical(id);
                tables.physical[at] = page.map_or(WILD, |page| page.0);
                bytes[at] = match page {
                    Some(_) => row.cache.states().bytes()[slot as usize],
                    None => SLOT_PINNED,
                };
            }
            let steady = self.first_steady as usize + number * row.steady.len();
            tables.steady[steady..steady + row.steady.len()].copy_from_slice(&row.steady);
            let slab = self.first_slab as usize + number * row.slabs.len();
            tables.host_slabs[slab..slab + row.slabs.len()].copy_from_slice(&row.slabs);
            for (key, on_host) in row.on_host.iter().enumerate() {
                let bit = u32::from(*on_host) << (key as u32 % SLAB_PAGES);
                tables.host_valid[slab + key / SLAB_PAGES as usize] |= bit;
            }
            for (index, segment) in self.segments.iter().enumerate() {
                for key in 0..SEGMENT_KEYS {
                    let at = (*segment as usize * rows + number) * SEGMENT_KEYS as usize + key as usize;
                    let slot = row.map.get(index as u32 * SEGMENT_KEYS + key);
                    tables.segments[at] = slot.map_or(ABSENT_SLOT, |slot| slot.0 as u16);
                }
            }
        }
    }
}

impl Row {
    /// What the kernel must do, by the CPU's cache.
    fn resolve(
        &mut self,
        clock: StepClock,
        entry: &Entry,
        [sinks, ring]: [u32; 2],
        keys: &[u32],
        list_capacity: u32,
        lists: &mut Lists,
    ) {
        self.cache.begin_step(clock);
        let mut complete = true;
        for key in entry.leaving_key..entry.leaving_key + entry.leaving {
            if !self.on_host[key as usize] {
                complete = false;
                continue;
            }
            let place = if key < sinks { key } else { sinks + (key - sinks) % ring } as usize;
            let page = PhysicalPage(self.steady[place]);
            self.steady[place] = self.cache.adopt(&mut self.map, key, page).spare.0;
        }
        let missing = |key: &&u32| self.map.get(**key).is_none();
        complete &= keys.iter().filter(missing).all(|key| self.on_host[*key as usize]);
        if keys.len() > list_capacity as usize {
            return lists.add(&[], &[], LIST_TOO_LONG, list_capacity);
        }
        let pinned = |slot: &SlotId| self.cache.states().is_pinned(*slot);
        let kept = keys.iter().filter_map(|key| self.map.get(*key)).filter(pinned).count();
        if keys.len() + self.cache.pinned() - kept > self.cache.capacity() {
            return lists.add(&[], &[], TOO_FEW_SLOTS, list_capacity);
        }
        if !complete {
            return lists.add(&[], &[], NOT_ON_HOST, list_capacity);
        }
        let selection: Vec<_> = keys.iter().map(|key| SelectedPage { key: *key, tokens: 8 }).collect();
        let mut out = Resolution::default();
        self.cache.resolve(&mut self.map, &selection, &mut out).expect("it was found to fit");
        let pages: Vec<_> = out.pages.iter().map(|page| page.0).collect();
        let copies = out.copies.iter().map(|copy| {
            let host_page = self.slabs[(copy.key / SLAB_PAGES) as usize] * SLAB_PAGES + copy.key % SLAB_PAGES;
            (copy.key, PageCopy { host_page, device_page: copy.page.0 })
        });
        lists.add(&pages, &copies.collect::<Vec<_>>(), NO_FAULT, list_capacity);
    }
}

const _: () = assert!(
    SLOT_HELD == SlotStates::HELD && SLOT_PINNED == SlotStates::PINNED && SLOT_STAMP == SlotStates::POLICY
);
