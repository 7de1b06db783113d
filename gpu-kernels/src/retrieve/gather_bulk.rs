use cuda_std::atomic::{Fence, Scope, fence};
use cuda_std::bulk;
use cuda_std::prelude::*;
use cuda_std::shared;

use super::lists::Lists;
use crate::abi::gather_bulk::{AHEAD, BARRIERS, BLOCK, LISTS, RINGS, STAGE_WORDS, STAGES, TARGETS};
use crate::abi::{PageCopy, WARP};
use crate::chain::chain;

/// What [`gather`](super::gather()) does, by bulk copies: host to shared memory to device.
///
/// | parameter | shape | memory |
/// |---|---|---|
/// | `copies` | `[lists, capacity]` [`PageCopy`] | device |
/// | `counts` | `[lists]`: copies of each list to make; more than `capacity` counts as `capacity` | device |
/// | `lists` | at least 1 | |
/// | `capacity` | with `lists`, at most [`max_copies`](crate::abi::gather::max_copies) in all | |
/// | `host_pages` | `[host pages, page_words]` words | mapped host |
/// | `device_pages` | `[device pages, device_words]` words | device |
/// | `page_words` | words of a host page, at least 1 | |
/// | `device_words` | words of a GPU page, at least `page_words`: a host page is the end of it | |
/// | `arrived` | `[lists]`, 0 before: words of each list's pages that are there. Counted if `counted` is 1, else not touched | device |
///
/// The copies are carried out by hardware that a thread only starts, so a few threads keep as many bytes in flight as the bus needs, where
/// `gather` needs whole blocks to wait on loads. But each piece costs its thread two copies and two waits whatever its size, so small
/// pages are `gather`'s.
///
/// # Mapping
/// Each block sums up the counts. Pages are cut into pieces of at most [`STAGE_WORDS`]. Ring `r` of `n`, one a warp, takes pieces
/// `r`, `r + n`, … of the pages of all lists, put end to end: piece `i` of a ring comes into stage `i % STAGES`, counted by that
/// stage's barrier, up to [`AHEAD`] of them before the first has arrived; then it goes out, and the stage is refilled once it has
/// been read.
///
/// # Launch
/// 1 to [`MAX_BLOCKS`](crate::abi::gather::MAX_BLOCKS) blocks of [`BLOCK`] threads;
/// [`shared_bytes`](crate::abi::gather_bulk::shared_bytes) of shared memory. sm_90.
///
/// # Safety
/// As for [`gather`](super::gather()).
#[kernel(sm_90, collectives(barrier = 2, shuffle = 5))]
pub unsafe fn gather_bulk(
    copies: Global<PageCopy>,
    counts: Global<u32>,
    lists: u32,
    capacity: u32,
    host_pages: Global<U32x4>,
    device_pages: GlobalMut<U32x4>,
    page_words: u32,
    device_words: u32,
    arrived: GlobalMut<u32>,
    counted: u32,
) {
    chain();
    let lists = Lists::new(copies, counts, lists, capacity, BLOCK, LISTS);
    if warp::lane_id() != 0 {
        return;
    }
    let ring = thread::thread_idx_x() / WARP;
    let part = |len: u32| ((ring * len) as usize, len as usize);
    let (first, len) = part(STAGES);
    let barriers = shared::dynamic::<bulk::Barrier>(BARRIERS, (RINGS * STAGES) as usize).slice(first, len);
    let targets = shared::dynamic::<u32>(TARGETS, (RINGS * STAGES) as usize).slice(first, len);
    let (first, len) = part(STAGES * STAGE_WORDS);
    let stages = shared::dynamic::<U32x4>(0, (RINGS * STAGES * STAGE_WORDS) as usize).slice(first, len);
    let mut stage = 0;
    while stage < STAGES {
        bulk::init(barriers, stage as usize, 1);
        stage += 1;
    }
    bulk::fence();

    let cuts = page_words.div_ceil(STAGE_WORDS);
    let pieces = lists.all() * cuts;
    let stride = thread::grid_dim_x() * RINGS;
    let host_pages = host_pages.rows(page_words as usize);
    let device_pages = device_pages.rows(device_words as usize);
    let device_first = (device_words - page_words) as usize;
    // A piece's words: the first in its page, and how many.
    let words = |piece: u32| {
        let first = piece % cuts * STAGE_WORDS;
        (first as usize, STAGE_WORDS.min(page_words - first) as usize)
    };

    // The next pieces to bring in, to send out and to count, and how many of this ring went before.
    let first_piece = thread::index_1d() / WARP;
    let (mut next_in, mut next_out, mut next_counted) = (first_piece, first_piece, first_piece);
    let (mut ins, mut outs, mut counts) = (0, 0, 0);
    // Counts pieces of this ring from `piece` on, and returns the next. A fence takes as long as starting a few pieces, so one is for
    // several.
    let count = |mut piece: u32, pieces: u32| {
        fence(Fence::AcqRel, Scope::Device);
        let mut left = pieces;
        while left > 0 {
            let (first, len) = words(piece);
            let first = piece / cuts * page_words + first as u32;
            lists.count(arrived, first, first + len as u32, page_words);
            piece = piece.saturating_add(stride);
            left -= 1;
        }
        piece
    };
    while next_out < pieces {
        if next_in < pieces && ins - outs < AHEAD {
            // The piece that was in this stage went out STAGES - AHEAD groups ago or earlier.
            bulk::wait_group_read::<{ STAGES - AHEAD }>();
            let copy = lists.copy(next_in / cuts);
            let (first, len) = words(next_in);
            let at = (ins % STAGES) as usize;
            targets.store(at, copy.device_page);
            bulk::arrive_expect(barriers, at, (len * size_of::<U32x4>()) as u32);
            let page = host_pages.row(copy.host_page as usize);
            let stage = stages.slice(at * STAGE_WORDS as usize, len);
            bulk::copy_in(stage, page.slice(first, len), len, barriers, at);
            ins += 1;
            // Saturates instead of wrapping: a list may end near 2^32 pieces.
            next_in = next_in.saturating_add(stride);
        } else {
            let (first, len) = words(next_out);
            let at = (outs % STAGES) as usize;
            let page = device_pages.row(targets.load(at) as usize);
            bulk::wait(barriers, at, outs / STAGES);
            bulk::copy_out(
                page.slice(device_first + first, len),
                stages.slice(at * STAGE_WORDS as usize, len),
                len,
            );
            bulk::commit_group();
            outs += 1;
            next_out = next_out.saturating_add(stride);
            if counted != 0 && outs - counts == COUNTED_AT_ONCE + STAGES - AHEAD {
                // Refilling their stages would wait for these groups anyway, if only until they are read.
                bulk::wait_group::<{ STAGES - AHEAD }>();
                next_counted = count(next_counted, COUNTED_AT_ONCE);
                counts += COUNTED_AT_ONCE;
            }
        }
    }
    bulk::wait_group::<0>();
    if counted != 0 {
        count(next_counted, outs - counts);
    }
}

/// Pieces of a ring that are counted as arrived behind one fence.
const COUNTED_AT_ONCE: u32 = 4;
