//! The members of a cluster, found by a warp that reads all that might be.
//!
//! That is tokens times clusters in all, as the products of [`assign`](super::assign) are, but a comparison where those have a head's products; in
//! return there is no sorting, and members come in token order whatever the schedule.

use cuda_std::prelude::*;
use cuda_std::warp::{FULL_MASK, WARP_SIZE, warp_shuffle_xor, warp_vote_any, warp_vote_ballot};

use super::super::operator::together;
use super::centroid::{Channels, channels};
use crate::abi::WARP;
use crate::unroll::unrolled;

/// Rows that a lane has in flight.
const LOADS: u32 = 8;

/// Members that a warp adds up at a time; `lanes` are the words of a head.
#[inline(always)]
fn batch(lanes: u32) -> u32 {
    LOADS * (WARP / lanes)
}

/// Lists the tokens from `start` to `end` whose cluster is `cluster`, ascending, and returns how many they are. `take` is called with the
/// members passed before and the length of the list of the next ones: whole batches for heads of `lanes` words, but for the last.
///
/// `assigned` is the row's, four tokens a word, with whole words.
///
/// # Safety
/// All lanes of the warp are here; `list` is the warp's, [`LISTED`](crate::abi::cluster::update::LISTED) long.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn walk(
    assigned: Global<U32x4>,
    [start, end]: [u32; 2],
    cluster: u32,
    lanes: u32,
    list: Shared<u32>,
    mut take: impl FnMut(u32, u32),
) -> u32 {
    let lane = warp::lane_id();
    let below = (1 << lane) - 1;
    let (mut word, end_word) = (start / 4, end.div_ceil(4));
    let (mut taken, mut pending) = (0, 0);
    loop {
        let at = word + lane;
        let mut hits = 0;
        if at < end_word {
            let four = assigned.load_with(at as usize, LoadCache::ReadOnly).to_array();
            let mut of = 0;
            while of < 4 {
                hits |= u32::from(four[of] == cluster) << of;
                of += 1;
            }
        }
        if warp_vote_any(FULL_MASK, hits != 0) {
            // The first and the last word may have tokens of others, or none.
            let mut rank = pending;
            let mut of = 0;
            while of < 4 {
                let token = 4 * at + of;
                if token < start || token >= end {
                    hits &= !(1 << of);
                }
                let lanes = warp_vote_ballot(FULL_MASK, hits >> of & 1 != 0);
                rank += (lanes & below).count_ones();
                pending += lanes.count_ones();
                of += 1;
            }
            let mut of = 0;
            while of < 4 {
                if hits >> of & 1 != 0 {
                    list.store(rank as usize, 4 * at + of);
                    rank += 1;
                }
                of += 1;
            }
        }
        word += WARP;
        let last = word >= end_word;
        if last || pending >= batch(lanes) {
            warp::sync_warp(FULL_MASK);
            let count = if last { pending } else { pending / batch(lanes) * batch(lanes) };
            take(taken, count);
            taken += count;
            if last {
                return taken;
            }
            // What is left, fewer than 32, moves to the front.
            let rest = pending - count;
            let kept = if lane < rest { list.load((count + lane) as usize) } else { 0 };
            warp::sync_warp(FULL_MASK);
            if lane < rest {
                list.store(lane as usize, kept);
            }
            pending = rest;
        }
    }
}

/// Adds the heads of `count` listed tokens, each in `lanes` lanes: a lane's word of the row that begins at word `column` of a token's `width`.
/// Members are dealt out to the `WARP / lanes` groups of lanes in turn.
///
/// # Safety
/// All lanes of the warp are here; `rows`, from the run's first token on, has the tokens.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn add(
    sums: &mut Channels,
    list: Shared<u32>,
    count: u32,
    rows: Global<U32x4>,
    [width, column]: [u32; 2],
    lanes: u32,
) {
    let lane = warp::lane_id();
    let column = column + lane % lanes;
    let (groups, group) = (WARP / lanes, lane / lanes);
    let mut first = 0;
    while first < count {
        let mut words = [U32x4::default(); LOADS as usize];
        unrolled!(load < LOADS as usize, {
            // Beyond the last comes the last again, so that loads need no branch.
            let member = (first + load as u32 * groups + group).min(count - 1);
            let token = list.load(member as usize);
            words[load] = rows
                .slice(token as usize * width as usize, width as usize)
                .load_with(column as usize, LoadCache::ReadOnlyOnce);
        });
        together();
        unrolled!(load < LOADS as usize, {
            let valid = first + load as u32 * groups + group < count;
            let key = channels(words[load]);
            let mut at = 0;
            while at < 8 {
                // No sum is -0, so adding 0 changes none.
                sums[at] += if valid { key[at] } else { 0.0 };
                at += 1;
            }
        });
        first += batch(lanes);
    }
}

/// Calls `take` for the pages of all rows of a layer that `row_pages` counts, with a page's number among those that are new, its KV head, the row's
/// pages before them, and the page's tokens in `members`: a warp has a page of a KV head at a time, and the launch's warps share them all.
///
/// # Safety
/// The warp is whole; the views are as [`cluster_pages`](super::cluster_pages()) and [`cluster_list`](super::cluster_list()) left them.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn of_pages(
    members: Global<u32>,
    row_pages: Global<u32>,
    [first_place, kv_heads, member_pages, page_tokens]: [u32; 4],
    mut take: impl FnMut(u32, u32, u32, Global<u32>),
) {
    let mut warp = thread::index_1d() / WARP;
    while warp < member_pages * kv_heads {
        let (page, head) = (warp / kv_heads, warp % kv_heads);
        let row = row_pages.rows(2).row((first_place + head) as usize);
        let (before, after) = (row.load(0), row.load(1));
        if page < after - before {
            let of_row = members.rows((member_pages * page_tokens) as usize).row(head as usize);
            take(page, head, before, of_row.slice((page * page_tokens) as usize, page_tokens as usize));
        }
        warp += thread::grid_dim_x() * (thread::block_dim_x() / WARP);
    }
}

/// The groups' sums, added up in halves of the distance: the same in all groups.
///
/// # Safety
/// All lanes of the warp are here.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn of_groups(mut sums: Channels, lanes: u32) -> Channels {
    let mut distance = WARP / 2;
    while distance >= lanes {
        unrolled!(at < 8, {
            sums[at] += warp_shuffle_xor(FULL_MASK, sums[at], distance, WARP_SIZE);
        });
        distance /= 2;
    }
    sums
}
