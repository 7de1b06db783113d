//! What requests hold: taken when they come, shared out anew when others come and go. Between steps the host edits the tables.

use std::collections::{BTreeMap, HashSet};

use spinkv_kernels::abi::{
    ABSENT_SLOT, NO_KEY, SEGMENT_KEYS, SLAB_PAGES, SLOT_HELD, SLOT_PINNED, SLOT_STAMP,
};

use super::{CudaBackend, Request};
use crate::memory::{HostPage, PrefixCache, RequestPlan, SlabId, Word};
use crate::paging::StepClock;
use crate::pipeline::{Reach, RequestId};
use crate::{Error, Result};

/// The slot tables of a request, on the host.
struct SlotTables {
    owners: Vec<u32>,
    physical: Vec<u32>,
    states: Vec<u8>,
}

impl CudaBackend {
    /// Refuses a request that its place in the tables cannot hold.
    pub(super) fn check_plan(&self, plan: &RequestPlan) -> Result<()> {
        let limit = self.max_tokens();
        if plan.max_tokens > limit {
            return Err(Error::ContextTooLong { max_tokens: plan.max_tokens, limit });
        }
        Ok(())
    }

    /// Checks that a request of this plan could be admitted if there were no other.
    ///
    /// # Errors
    /// As for [`admit`](crate::backend::Backend::admit); no waiting helps.
    pub fn check_alone(&self, plan: &RequestPlan) -> Result<()> {
        self.check_plan(plan)?;
        plan.check_limits(&self.config, self.admission.limits())
    }

    /// The longest request that the tables were made for, in tokens.
    pub fn max_tokens(&self) -> usize {
        self.sizes.max_tokens
    }

    /// Takes what an admitted request needs, once the others have shrunk to the buffering that they are due.
    pub(super) fn make_room(
        &mut self,
        id: RequestId,
        mut plan: RequestPlan,
        resident: bool,
        due: &BTreeMap<RequestId, usize>,
    ) -> Result<()> {
        let sizes = self.sizes;
        let wanted = due.get(&id).copied().unwrap_or(0).min(plan.row.buffering_pages);
        plan.row.buffering_pages = wanted.min(sizes.slot_stride.saturating_sub(plan.row.mandatory_pages));
        let rows = sizes.rows();
        let of_layer = sizes.kv_heads * self.config.host_slabs(plan.max_tokens);
        let mut slabs = Vec::with_capacity(sizes.layers * of_layer);
        for layer in 0..sizes.layers {
            let cache = self.prefixes.as_mut().map(|prefixes| &mut prefixes.cache);
            match PrefixCache::take_slabs(cache, layer, of_layer, &mut self.arena) {
                Ok(taken) => slabs.extend(taken),
                Err(error) => {
                    self.release_slabs(slabs);
                    return Err(error);
                }
            }
        }
        let steady = sizes.steady_pages(&self.config, &plan, resident);
        let slots = if resident { 0 } else { plan.cache_pages() };
        let take = |free: &mut Vec<u32>, count: usize| free.split_off(free.len() - count);
        let needed = rows * steady + slots;
        // Nobody gives pages for a request that they would not be enough for.
        let free = self.free_pages.len() + self.surplus(due);
        if needed > free {
            self.release_slabs(slabs);
            let (total, mandatory) =
                (sizes.planned_pages, slots - if resident { 0 } else { plan.buffering_pages() });
            let max_tokens = plan.max_tokens;
            return Err(Error::OutOfGpuPages { max_tokens, needed, rows, steady, mandatory, free, total });
        }
        if let Err(error) = self.shrink(due) {
            self.release_slabs(slabs);
            return Err(error);
        }
        let segments = if resident { 0 } else { self.config.segments(plan.max_tokens) };
        let steady = take(&mut self.free_pages, rows * steady);
        let slots = take(&mut self.free_pages, slots);
        let request = Request {
            plan,
            place: self.free_places.pop().expect("a place, as was looked for"),
            clock: StepClock::default(),
            clustered: sizes.sink_pages * sizes.page_tokens,
            layers_ahead: 0,
            counted_pages: 0,
            resident,
            parked: false,
            newest: Vec::new(),
            always: 0,
            segments: take(&mut self.free_segments, segments),
            slabs,
            prefix: 0,
            pages: steady.iter().chain(&slots).copied().collect(),
            held: vec![0; rows],
        };
        let written = self.write_tables(&request, &steady, &slots);
        self.requests.insert(id, request);
        if written.is_err() {
            self.release_request(id);
        }
        written
    }

    fn release_slabs(&mut self, slabs: Vec<SlabId>) {
        slabs.into_iter().for_each(|slab| self.arena.release(slab));
    }

    /// Forgets a request and frees what it holds.
    pub(super) fn release_request(&mut self, id: RequestId) {
        self.admission.remove(id);
        let Some(request) = self.requests.remove(&id) else { return };
        self.free_places.push(request.place);
        self.free_segments.extend(request.segments);
        self.free_pages.extend(request.pages);
        self.release_slabs(request.slabs);
    }

    /// Shares out what is free as buffering.
    ///
    /// # Errors
    /// A refused copy.
    pub(super) fn share_out(&mut self) -> Result<()> {
        let due = self.admission.buffering(&self.config);
        self.shrink(&due)?;
        for (id, buffering) in due {
            let Some(request) = self.requests.get(&id).filter(|request| !request.resident) else { continue };
            let RequestPlan { row, .. } = request.plan;
            let room = self.sizes.slot_stride.saturating_sub(row.mandatory_pages).min(buffering);
            let more = room.saturating_sub(row.buffering_pages);
            let more = more.min(self.free_pages.len() / request.plan.by_reach.selected.max(1));
            if more > 0 {
                self.resize(id, row.slots() + more)?;
            }
        }
        Ok(())
    }

    /// Pages that [`shrink`](Self::shrink) would free.
    fn surplus(&self, due: &BTreeMap<RequestId, usize>) -> usize {
        let of = |(id, buffering): (&RequestId, &usize)| {
            let request = self.requests.get(id).filter(|request| !request.resident)?;
            let RequestPlan { row, by_reach, .. } = request.plan;
            Some(by_reach.selected * row.buffering_pages.saturating_sub(*buffering))
        };
        due.iter().filter_map(of).sum()
    }

    /// Shrinks caches to the buffering that they are due. Every request's mandatory pages stay.
    fn shrink(&mut self, due: &BTreeMap<RequestId, usize>) -> Result<()> {
        for (id, buffering) in due {
            let Some(request) = self.requests.get(id).filter(|request| !request.resident) else { continue };
            let RequestPlan { row, .. } = request.plan;
            if *buffering < row.buffering_pages {
                self.resize(*id, row.mandatory_pages + buffering)?;
            }
        }
        Ok(())
    }

    /// Takes a request's cache away, mandatory pages too, or all pages of one that has none.
    pub(super) fn park_request(&mut self, id: RequestId) -> Result<()> {
        let request = self.requests.get(&id).ok_or(Error::UnknownRequest(id))?;
        if request.resident {
            return self.park_whole(id);
        }
        self.set_slots(id, |_| 0)?;
        let request = self.requests.get_mut(&id).expect("looked up above");
        (request.plan.row.buffering_pages, request.parked) = (0, true);
        self.admission.park(&self.config, id, false);
        self.share_out()
    }

    /// Gives a parked request an empty cache, or all its pages if it has none.
    pub(super) fn resume_request(&mut self, id: RequestId) -> Result<()> {
        let Request { mut plan, resident, .. } = *self.requests.get(&id).ok_or(Error::UnknownRequest(id))?;
        let due = self.admission.resume(&self.config, id, &plan)?;
        let room = self.sizes.slot_stride.saturating_sub(plan.row.mandatory_pages);
        plan.row.buffering_pages = due[&id].min(room);
        let needed = self.pages_to_resume(resident, &plan);
        let free = self.free_pages.len() + self.surplus(&due);
        let resumed = if needed > free {
            let RequestPlan { max_tokens, rows, row, .. } = plan;
            let (mandatory, total) = (row.mandatory_pages, self.sizes.planned_pages);
            Err(Error::OutOfGpuPages { max_tokens, needed, rows, steady: 0, mandatory, free, total })
        } else {
            self.shrink(&due).and_then(|()| {
                let reaches = |reach| plan.slots(reach);
                if resident { self.fetch_whole(id) } else { self.set_slots(id, reaches) }
            })
        };
        if resumed.is_err() {
            self.admission.park(&self.config, id, resident);
            return resumed;
        }
        let request = self.requests.get_mut(&id).expect("looked up above");
        (request.plan, request.parked) = (plan, false);
        self.share_out()
    }

    /// Gives each row of a request that selects `slots` slots.
    fn resize(&mut self, id: RequestId, slots: usize) -> Result<()> {
        let mut plan = self.requests[&id].plan;
        plan.row.buffering_pages = slots - plan.row.mandatory_pages;
        self.set_slots(id, |reach| plan.slots(reach))?;
        self.requests.get_mut(&id).expect("looked up above").plan = plan;
        Ok(())
    }

    /// Gives each row of a request as many slots as its reach calls for: new ones are empty; those that go are empty ones, then those of the least
    /// recently used pages, of equals the lowest. Waits for all that is under way.
    fn set_slots(&mut self, id: RequestId, planned: impl Fn(Reach) -> usize) -> Result<()> {
        self.settle()?;
        self.prompt.synchronize()?;
        let sizes = self.sizes;
        let (rows, stride) = (sizes.rows(), sizes.slot_stride);
        let request = &self.requests[&id];
        let mut tables = self.read_slots(request)?;
        let wanted: Vec<usize> = self.config.reaches().iter().map(|reach| planned(*reach)).collect();
        let slots_of = |row: &[u32]| row.iter().filter(|page| **page != u32::MAX).count();
        let before: Vec<usize> = tables.physical.chunks_exact(stride.max(1)).map(slots_of).collect();
        let shrinks = before.iter().zip(&wanted).any(|(before, wanted)| before > wanted);
        let mut segments = if shrinks { self.read_segments(request)? } else { Vec::new() };
        let mut request = self.requests.remove(&id).expect("it was just there");
        let mut free = HashSet::new();
        for row in 0..rows {
            let range = row * stride..(row + 1) * stride;
            let physical = &mut tables.physical[range.clone()];
            let (owners, states) = (&mut tables.owners[range.clone()], &mut tables.states[range]);
            let (before, slots) = (before[row], wanted[row]);
            if slots >= before {
                let holes = (0..stride).filter(|slot| physical[*slot] == u32::MAX);
                for slot in holes.take(slots - before).collect::<Vec<_>>() {
                    let page = self.free_pages.pop().expect("as many as were looked for");
                    request.pages.push(page);
                    (physical[slot], owners[slot], states[slot]) = (page, NO_KEY, 0);
                }
                continue;
            }
            let mut leaving: Vec<usize> = (0..stride).filter(|slot| physical[*slot] != u32::MAX).collect();
            leaving.sort_by_key(|slot| {
                let state = states[*slot];
                let age = (request.clock.0 % 64 + 64 - u32::from(state & SLOT_STAMP)) % 64;
                if state & SLOT_HELD == 0 { (0, *slot) } else { (64 - age as usize, *slot) }
            });
            for slot in leaving.into_iter().take(before - slots) {
                free.insert(physical[slot]);
                if states[slot] & SLOT_HELD != 0 {
                    let (segment, key) = (owners[slot] / SEGMENT_KEYS, owners[slot] % SEGMENT_KEYS);
                    let entry = (segment as usize * rows + row) * SEGMENT_KEYS as usize + key as usize;
                    segments[entry] = ABSENT_SLOT;
                    request.held[row] = request.held[row].saturating_sub(1);
                    self.counters.shrunk_pages += 1;
                }
                (physical[slot], owners[slot], states[slot]) = (u32::MAX, NO_KEY, SLOT_PINNED);
            }
        }
        request.pages.retain(|page| !free.contains(page));
        self.free_pages.extend(free);
        let written =
            self.write_slots(&request, &tables).and_then(|()| self.write_segments(&request, &segments));
        self.requests.insert(id, request);
        written
    }

    fn read_slots(&self, request: &Request) -> Result<SlotTables> {
        let count = self.sizes.rows() * self.sizes.slot_stride;
        let first = request.place * count;
        let mut tables =
            SlotTables { owners: vec![0; count], physical: vec![0; count], states: vec![0; count] };
        self.tables.owners.read(&self.stream, first, &mut tables.owners)?;
        self.tables.physical.read(&self.stream, first, &mut tables.physical)?;
        let mut states = vec![0u32; count / 4];
        self.tables.states.read(&self.stream, first / 4, &mut states)?;
        tables.states.copy_from_slice(bytemuck::cast_slice(&states));
        Ok(tables)
    }

    fn write_slots(&self, request: &Request, tables: &SlotTables) -> Result<()> {
        let first = request.place * self.sizes.rows() * self.sizes.slot_stride;
        self.tables.owners.write(&self.stream, first, &tables.owners)?;
        self.tables.physical.write(&self.stream, first, &tables.physical)?;
        let states: Vec<u32> = bytemuck::pod_collect_to_vec(&tables.states);
        Ok(self.tables.states.write(&self.stream, first / 4, &states)?)
    }

    /// `[rows, pages of the steady zone]`.
    fn read_steady(&self, request: &Request) -> Result<Vec<u32>> {
        let (rows, stride) = (self.sizes.rows(), self.sizes.steady_stride);
        let pages = self.sizes.steady_pages(&self.config, &request.plan, request.resident);
        // As written: a resident request's ring, which is never used, has a place as well.
        let list = pages + usize::from(request.resident);
        let mut steady = vec![0; rows * list];
        self.tables.steady.read(&self.stream, request.place * rows * stride, &mut steady)?;
        let kept = steady.chunks_exact(list).flat_map(|row| &row[..pages]);
        Ok(kept.copied().collect())
    }

    /// `[segments of the request, rows, 512]`.
    fn read_segments(&self, request: &Request) -> Result<Vec<u16>> {
        let count = self.sizes.rows() * SEGMENT_KEYS as usize;
        let mut segments = vec![0; request.segments.len() * count];
        for (number, entries) in request.segments.iter().zip(segments.chunks_exact_mut(count)) {
            self.tables.segments.read(&self.stream, *number as usize * count, entries)?;
        }
        Ok(segments)
    }

    fn write_segments(&self, request: &Request, segments: &[u16]) -> Result<()> {
        let count = self.sizes.rows() * SEGMENT_KEYS as usize;
        for (number, entries) in request.segments.iter().zip(segments.chunks_exact(count)) {
            self.tables.segments.write(&self.stream, *number as usize * count, entries)?;
        }
        Ok(())
    }

    /// Compares each page in a request's caches with its host page, and looks whether slots, segments, steady lists and the pages that the
    /// request holds agree. Waits for all that is under way. Returns the pages that were compared.
    ///
    /// # Errors
    /// [`Error::UnknownRequest`]; [`Error::Inconsistent`], which names the first place; a refused copy.
    pub fn audit(&mut self, id: RequestId) -> Result<usize> {
        self.settle()?;
        self.prompt.synchronize()?;
        let request = self.requests.get(&id).ok_or(Error::UnknownRequest(id))?;
        if request.resident && request.parked {
            // All of it is on the host, and what its list of steady pages names is others'.
            let what = || format!("{} pages of a request that is parked as a whole", request.pages.len());
            let inconsistent = || Error::Inconsistent { request: id, row: 0, what: what() };
            return if request.pages.is_empty() { Ok(0) } else { Err(inconsistent()) };
        }
        let (rows, stride, words) = (self.sizes.rows(), self.sizes.slot_stride, self.sizes.page_words);
        let (tables, segments) = (self.read_slots(request)?, self.read_segments(request)?);
        let steady = self.read_steady(request)?;
        let mut owned: HashSet<u32> = request.pages.iter().copied().collect();
        let (mut on_gpu, mut on_host) = (vec![0 as Word; words], vec![0 as Word; words]);
        let of_row = self.config.host_slabs(request.plan.max_tokens);
        let mut compared = 0;
        for row in 0..rows {
            let wrong = |what: String| Err(Error::Inconsistent { request: id, row, what });
            let (mut slots, mut held) = (0, 0);
            for slot in row * stride..(row + 1) * stride {
                let (key, page, state) = (tables.owners[slot], tables.physical[slot], tables.states[slot]);
                if page == u32::MAX {
                    continue;
                }
                slots += 1;
                if !owned.remove(&page) {
                    return wrong(format!("slot {} has page {page}, which is another's", slot % stride));
                }
                if state & SLOT_HELD == 0 {
                    continue;
                }
                held += 1;
                let entry = ((key / SEGMENT_KEYS) as usize * rows + row) * SEGMENT_KEYS as usize;
                let found = segments[entry + (key % SEGMENT_KEYS) as usize];
                if usize::from(found) != slot % stride {
                    return wrong(format!(
                        "page key {key} is in slot {}, its segment says {found}",
                        slot % stride
                    ));
                }
                let slab = request.slabs[row * of_row + key as usize / SLAB_PAGES as usize];
                self.tables.pool.read(&self.stream, page as usize * words, &mut on_gpu)?;
                // Keys that are not on the host are another's to compare.
                on_host.copy_from_slice(&on_gpu);
                self.arena.load(HostPage { slab, index: (key % SLAB_PAGES) as usize }, &mut on_host);
                if on_gpu != on_host {
                    return wrong(format!("page key {key} has other bytes than on the host"));
                }
                compared += 1;
            }
            let planned = match request {
                Request { resident: false, parked: false, plan, .. } => {
                    plan.slots(self.config.reaches()[row])
                }
                _ => 0,
            };
            if slots != planned {
                return wrong(format!("{slots} slots where {planned} are planned"));
            }
            if held != request.held[row] {
                return wrong(format!("{held} pages in the cache, {} were counted", request.held[row]));
            }
            // Each slot in use was found above where its segment says; more entries would be of slots that are not.
            let of_row = segments.chunks_exact(SEGMENT_KEYS as usize).skip(row).step_by(rows);
            let named = of_row.flatten().filter(|slot| **slot != ABSENT_SLOT).count();
            if named != held as usize {
                return wrong(format!("segments name {named} slots, {held} hold pages"));
            }
            let mut list = steady[row * steady.len() / rows..(row + 1) * steady.len() / rows].iter();
            if let Some(page) = list.find(|page| !owned.remove(*page)) {
                return wrong(format!("the steady zone has page {page}, which is another's"));
            }
        }
        if !owned.is_empty() {
            let what = format!("{} of its pages are nowhere", owned.len());
            return Err(Error::Inconsistent { request: id, row: 0, what });
        }
        Ok(compared)
    }
}
