mod adopt;
mod row;
mod slots;
mod victims;

use cuda_std::prelude::*;

use crate::abi::resolve::{BLOCK, LIST_TOO_LONG, NO_FAULT, NOT_ON_HOST, TOO_FEW_SLOTS};
use crate::abi::{Entry, PageCopy, WARP};
use crate::chain::chain;
use row::Row;
use slots::Scratch;

/// Makes every selected page resident, on paper: which pages are on the GPU already, whose slots the missing ones get, and what to
/// copy where. One layer of a decode step; what [`RowCache::resolve`] does on the CPU, exactly.
///
/// Pages that leave the steady zone in this step come into the cache first (`RowCache::adopt`): their slot takes the steady
/// page and gives its own physical page in exchange. Then timestamps that the clock is about to lap are moved along with it, hits are
/// touched, and misses take the lowest empty slots, then those of the least recently used pages: the oldest of 64 ages leave, of
/// the last age the lowest slots.
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `entries` | `[batch]` [`Entry`], in words | the requests of the step |
/// | `kv_heads`, `layer`, `request_rows` | | rows of a layer, the layer, rows of all layers |
/// | `ids` | `[batch * kv_heads, id_stride]`, ascending | selected partitions |
/// | `id_counts` | `[batch * kv_heads]`, at most `id_stride` | how many |
/// | `page_partitions` | at least 1 | partitions (tokens) that share a page: their page counts once |
/// | `partition_pages` | at least 1 | pages of a partition; one of both is 1 |
/// | `directories` | see [`Entry::directory`] | segment numbers |
/// | `segments` | `[segments, request_rows, 512]` | slot of each page key, or [`ABSENT_SLOT`](crate::abi::ABSENT_SLOT) |
/// | `owners`, `physical` | see [`Entry::first_slot`] | page key and physical page of each slot |
/// | `states` | the same, four slots a u32 | their bytes: [`SLOT_STAMP`](crate::abi::SLOT_STAMP) and flags |
/// | `steady` | see [`Entry::first_steady`] | physical pages of the steady zone |
/// | `host_slabs` | see [`Entry::first_slab`] | slabs of the host pages |
/// | `host_valid` | the same | bit `key % 16`: the page is complete on the host |
/// | `slot_capacity` | a multiple of 4 | the most [`slots`](Entry::slots) of an entry |
/// | `segment_capacity` | | the most segments of a directory |
/// | `list_capacity` | at most [`MAX_LIST`](crate::abi::resolve::MAX_LIST) | the most pages of a selection |
/// | `pages` | `[batch * kv_heads, list_capacity]` | physical pages of the selection, in its order; if `misses_last` is 1 those that are here already, then the misses, each in its order |
/// | `misses_last` | 0 or 1 | |
/// | `page_counts` | `[batch * kv_heads]` | how many |
/// | `copies` | `[batch * kv_heads, list_capacity]` | the misses, in the selection's order |
/// | `copy_keys` | `[batch * kv_heads, list_capacity]` | the misses' page keys, for what is rebuilt instead of copied. Written if `keyed` is 1, else not touched |
/// | `keyed` | 0 or 1 | |
/// | `copy_counts` | `[batch * kv_heads]` | how many |
/// | `arrived` | `[batch * kv_heads]` | set to 0, for [`gather`](super::gather()) to count in |
/// | `faults` | `[batch * kv_heads]` | [`NO_FAULT`], or why the row's counts are 0 and nothing was evicted. Pages that leave the steady zone are taken over all the same, if the host has them: the step is tried again with those passed over by [`leaving_key`](Entry::leaving_key) and [`leaving`](Entry::leaving), so that the tail begins where it did |
///
/// # Mapping
/// A block makes one row, so nothing is shared between blocks. Directory and slot bytes are read once into shared memory; the
/// victims come from a histogram and a pass in slot order, with no sort, four slots at a time. Where a miss lies on the host is
/// asked for as soon as it is known to be one, and awaited only when its victim has been found.
///
/// # Launch
/// `batch * kv_heads` blocks of [`BLOCK`] threads, [`shared_bytes`](crate::abi::resolve::shared_bytes) of shared memory.
///
/// # Safety
/// The views have the shapes above; ids are distinct and below the row's partitions, their segments are in the directory; tables
/// agree with each other (a key's slot names the key as its owner); no request is in two entries; and each request's clock is one
/// more than at its last step.
///
/// [`RowCache::resolve`]: ../../spinkv/paging/struct.RowCache.html#method.resolve
#[kernel(collectives(barrier = 8, shuffle = 17, vote = 3, reduce = 1))]
pub unsafe fn resolve(
    entries: Global<U32x4>,
    kv_heads: u32,
    layer: u32,
    request_rows: u32,
    ids: Global<u32>,
    id_counts: Global<u32>,
    id_stride: u32,
    page_partitions: u32,
    partition_pages: u32,
    directories: Global<u32>,
    segments: GlobalMut<u16>,
    owners: GlobalMut<u32>,
    physical: GlobalMut<u32>,
    states: GlobalMut<u32>,
    steady: GlobalMut<u32>,
    host_slabs: Global<u32>,
    host_valid: Global<u32>,
    slot_capacity: u32,
    segment_capacity: u32,
    list_capacity: u32,
    pages: GlobalMut<u32>,
    misses_last: u32,
    page_counts: GlobalMut<u32>,
    copies: GlobalMut<PageCopy>,
    copy_keys: GlobalMut<u32>,
    keyed: u32,
    copy_counts: GlobalMut<u32>,
    arrived: GlobalMut<u32>,
    faults: GlobalMut<u32>,
) {
    let (block, thread) = (thread::block_idx_x(), thread::thread_idx_x());
    let entry = Entry::load(entries, block / kv_heads);
    if entry.tokens == 0 {
        chain();
        if thread == 0 {
            page_counts.store(block as usize, 0);
            copy_counts.store(block as usize, 0);
            arrived.store(block as usize, 0);
            faults.store(block as usize, NO_FAULT);
        }
        return;
    }
    let row = Row::of(
        entry,
        layer * kv_heads + block % kv_heads,
        request_rows,
        directories,
        segments,
        owners,
        physical,
        states,
        steady,
        host_slabs,
        host_valid,
    );
    let ids = ids.slice((block * id_stride) as usize, id_stride as usize);
    let pages = pages.slice((block * list_capacity) as usize, list_capacity as usize);
    let copies = copies.slice((block * list_capacity) as usize, list_capacity as usize);
    let scratch = Scratch::carve(slot_capacity, segment_capacity, list_capacity);
    let end = row.entry.first_partition + row.entry.partitions;
    slots::read(&row, &scratch, end.div_ceil(page_partitions) * partition_pages);
    // The launch before writes the ids, and nothing of what was read so far.
    chain();
    let id_count = id_counts.load(block as usize);
    thread::sync_threads();
    let mut kept = true;
    if entry.leaving > 0 {
        kept = adopt::adopt(&row, &scratch);
    }

    let candidates = id_count * partition_pages;
    // Pages of the selection so far, and those of them that are not here.
    let (mut selected, mut missing) = (0, 0);
    // A miss whose host page is on its way to this thread: its rank among the misses.
    let mut awaited = u32::MAX;
    let (mut slab, mut valid, mut awaited_key) = (0, 0, 0);
    let mut complete = kept;
    let mut round = 0;
    while round * BLOCK < candidates {
        let candidate = round * BLOCK + thread;
        let (mut is_page, mut is_miss, mut key, mut page) = (false, false, 0, 0);
        if candidate < candidates {
            let at = candidate / partition_pages;
            let first = ids.load(at as usize) / page_partitions;
            key = first * partition_pages + candidate % partition_pages;
            // Ids ascend, so partitions of one page are neighbours.
            is_page = page_partitions == 1 || at == 0 || ids.load(at as usize - 1) / page_partitions != first;
        }
        if is_page {
            match row.slot(&scratch, key) {
                Some(slot) => {
                    scratch.touch(slot);
                    page = row.physical.load(slot as usize);
                }
                None => is_miss = true,
            }
        }
        let (before, all) = scratch.warps.rank(round, is_page, is_miss);
        let (position, misses_before) = (selected + (before & 0xffff), missing + (before >> 16));
        if is_page && position < list_capacity {
            if is_miss {
                // The one of the round before has had a round's time.
                complete &= scratch.settle(awaited, awaited_key, slab, valid);
                awaited = misses_before;
                awaited_key = key;
                scratch.miss_keys.store(awaited as usize, key);
                scratch.miss_positions.store(awaited as usize, position);
                (slab, valid) = row.host(key);
            } else {
                let place = if misses_last != 0 { position - misses_before } else { position };
                pages.store(place as usize, page);
            }
        }
        selected += all & 0xffff;
        missing += all >> 16;
        round += 1;
    }

    let mut fault = if selected > list_capacity { LIST_TOO_LONG } else { NO_FAULT };
    if fault == NO_FAULT && missing > 0 {
        let enough = victims::find(&row, &scratch, round, missing);
        complete &= scratch.settle(awaited, awaited_key, slab, valid);
        if !enough {
            fault = TOO_FEW_SLOTS;
        }
    }
    // Also the barrier between the lists in shared memory and their readers.
    if thread::sync_threads_or(!complete) && fault == NO_FAULT {
        fault = NOT_ON_HOST;
    }

    if fault == NO_FAULT {
        let mut miss = thread;
        while miss < missing {
            let key = scratch.miss_keys.load(miss as usize);
            let slot = scratch.targets.load(miss as usize);
            let device_page = row.install(&scratch, key, slot);
            scratch.touch(slot);
            let place = if misses_last != 0 {
                selected - missing + miss
            } else {
                scratch.miss_positions.load(miss as usize)
            };
            pages.store(place as usize, device_page);
            copies.store(
                miss as usize,
                PageCopy { host_page: scratch.sources.load(miss as usize), device_page },
            );
            if keyed != 0 {
                copy_keys.store((block * list_capacity + miss) as usize, key);
            }
            miss += BLOCK;
        }
    }
    thread::sync_threads();
    slots::write(&row, &scratch, fault == NO_FAULT);
    if thread == 0 {
        let (selected, missing) = if fault == NO_FAULT { (selected, missing) } else { (0, 0) };
        page_counts.store(block as usize, selected);
        copy_counts.store(block as usize, missing);
        arrived.store(block as usize, 0);
        faults.store(block as usize, fault);
    }
}

const _: () = assert!(BLOCK.is_multiple_of(WARP), "ranks are counted by whole warps");
