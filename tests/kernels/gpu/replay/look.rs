//! Tables, pages and attention against what the CPU knows of them.

use half::bf16;
use spinkv::memory::Word;
use spinkv::paging::SlotMap;
use spinkv_kernel_tests::attend::{Token, check_head};
use spinkv_kernels::abi::{ABSENT_SLOT, SEGMENT_KEYS, SLAB_PAGES, SLOT_HELD, SLOT_STAMP, WORD_ELEMENTS};

use super::{
    Checked, GROUP, HEAD_WORDS, KEYS, KV_HEADS, LIMIT, PAGE_TOKENS, PAGE_WORDS, ROWS, SCALE, SINK_PAGES,
    SLABS, SLOT_STRIDE, World, slots_of, steady_place,
};

impl World<'_> {
    /// All tables against the CPU's, the bytes of all pages against what was written, and summaries against the keys.
    pub(super) fn look(&mut self) -> Checked {
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
                    self.seen.summaries += 1;
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

    /// The last replay's attention: outputs and logarithms of sums of all heads against f64 over the tokens of sinks, selection and
    /// tail, as the host has them.
    pub(super) fn look_at_attention(&mut self, order: &[Option<usize>]) -> Checked {
        let stream = &self.machine.stream;
        let dim = HEAD_WORDS * WORD_ELEMENTS;
        let (truth, queries): (&[bf16], &[bf16]) =
            (bytemuck::cast_slice(&self.truth), bytemuck::cast_slice(&self.queries));
        for (layer, lists) in self.device.lists.iter().enumerate() {
            let (ids, id_counts) = (lists.ids.to_vec(stream)?, lists.id_counts.to_vec(stream)?);
            let (outputs, lse) = (lists.outputs.to_vec(stream)?, lists.lse.to_vec(stream)?);
            let outputs: &[bf16] = bytemuck::cast_slice(&outputs);
            if lists.arrivals.to_vec(stream)?.iter().any(|count| *count != 0) {
                return Err(format!("layer {layer}: arrivals are not 0 again").into());
            }
            for row in 0..order.len() * KV_HEADS {
                let place = order[row / KV_HEADS];
                let Some(request) = place.and_then(|place| self.requests[place].as_ref()) else { continue };
                let state = &request.rows[layer * KV_HEADS + row % KV_HEADS];
                let selected = ids[row * LIMIT..][..id_counts[row] as usize].iter().map(|id| *id as usize);
                let tail = request.retrievable().end..request.tokens.div_ceil(PAGE_TOKENS);
                let pages = (0..SINK_PAGES).chain(selected).chain(tail);
                let places = pages.flat_map(|key| key * PAGE_TOKENS..(key + 1) * PAGE_TOKENS);
                let tokens: Vec<_> = places
                    .filter(|token| *token < request.tokens)
                    .map(|token| {
                        let page = state.host_page((token / PAGE_TOKENS) as u32) as usize;
                        let key = page * PAGE_WORDS * WORD_ELEMENTS + token % PAGE_TOKENS * dim;
                        let value = key + PAGE_TOKENS * dim;
                        Token { key: &truth[key..][..dim], value: &truth[value..][..dim], bias: 0.0 }
                    })
                    .collect();
                for head in row * GROUP..(row + 1) * GROUP {
                    let (query, output) = (&queries[head * dim..][..dim], &outputs[head * dim..][..dim]);
                    check_head(query, SCALE, &tokens, output, lse[head])
                        .map_err(|wrong| format!("layer {layer}, row {row}, head {head}: {wrong}"))?;
                    self.seen.heads += 1;
                }
            }
        }
        Ok(())
    }
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
