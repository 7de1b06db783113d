//! Requests that come, grow and go, and what they bring to a step.

use std::array;
use std::error::Error;

use rand::seq::{IndexedRandom, SliceRandom};
use rand::{Rng, RngCore};
use spinkv::memory::{PhysicalPage, Word};
use spinkv::paging::{BucketedLru, FlatMap, RowCache, StepClock};
use spinkv_kernels::abi::{ABSENT_SLOT, Entry, SEGMENT_KEYS, SLAB_PAGES};

use super::{
    BATCH, BATCH_ROWS, BUCKETS, Checked, GROUP, HEAD_WORDS, KEYS, LIMIT, LayerLists, Order, PAGE_TOKENS,
    PAGE_WORDS, PLACES, POISON, RING_PAGES, ROWS, Request, Row, SEGMENTS, SINK_PAGES, SLABS, SLOT_STRIDE,
    World, pages_of, random_words, slots_of, steady_place,
};

impl World<'_> {
    /// Requests end, come and get more slots.
    pub(super) fn come_and_go(&mut self) -> Checked {
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
        self.seen.came += 1;
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
    pub(super) fn begin(&mut self) -> Result<Order, Box<dyn Error>> {
        let stream = &self.machine.stream;
        let mut order: Order = (0..BATCH).map(|entry| Some(entry).filter(|place| *place < PLACES)).collect();
        // The places that requests have in a batch change rarely, too: queries go by them.
        if self.rng.random_bool(0.1) {
            order.shuffle(&mut self.rng);
        }
        order.truncate(*BUCKETS.choose(&mut self.rng).expect("there are buckets"));
        let mut entries = vec![Entry::default(); order.len()];
        self.keys = random_words(&mut self.rng, BATCH_ROWS * HEAD_WORDS);
        self.values = random_words(&mut self.rng, BATCH_ROWS * HEAD_WORDS);
        // Mostly as before, so that selections are alike from step to step.
        if self.rng.random_bool(0.3) {
            self.queries = random_words(&mut self.rng, BATCH_ROWS * GROUP * HEAD_WORDS);
        }
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
                first_marks: 0,
                basis: 0,
            };
        }
        self.device.inputs.entries.write(stream, 0, &entries)?;
        self.device.inputs.keys.write(stream, 0, &self.keys)?;
        self.device.inputs.values.write(stream, 0, &self.values)?;
        self.device.inputs.queries.write(stream, 0, &self.queries)?;
        for LayerLists { outputs, lse, .. } in &self.device.lists {
            outputs.fill_bytes(stream, 0..outputs.len(), POISON)?;
            lse.fill_bytes(stream, 0..lse.len(), POISON)?;
        }
        Ok(order)
    }
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
