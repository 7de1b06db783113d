//! What the threads of a block work out together.

use cuda_std::atomic::{Order, Scope};
use cuda_std::{GlobalMut, Shared, thread, warp};

use crate::abi::WARP;

/// Hands a value a warp to all threads of the block.
///
/// Every function takes one barrier, which all threads reach, and a `round`: two rounds have values of their own, so that a slow thread
/// still finds those of its round. From call to call it goes up by one, or another barrier lies between. Of `rank`, sums are below 2^16.
#[derive(Clone, Copy)]
pub struct Exchange {
    values: Shared<u32>,
    warps: u32,
}

impl Exchange {
    /// 32-bit words that `warps` warps need.
    pub const fn words(warps: u32) -> usize {
        2 * warps as usize
    }

    /// An exchange of `warps` warps, the whole block, in `values`, [`words`](Self::words) long.
    #[inline(always)]
    pub fn new(values: Shared<u32>, warps: u32) -> Self {
        Self { values, warps }
    }

    /// How many threads below this one say `low` (in the low 16 bits) and `high` (in the high ones), and how many of the block do.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    pub unsafe fn rank(&self, round: u32, low: bool, high: bool) -> (u32, u32) {
        let low = warp::warp_vote_ballot(warp::FULL_MASK, low);
        let high = warp::warp_vote_ballot(warp::FULL_MASK, high);
        let below = (1 << warp::lane_id()) - 1;
        let (before, all) = self.sum_of_warps(round, low.count_ones() | high.count_ones() << 16);
        (before + ((low & below).count_ones() | (high & below).count_ones() << 16), all)
    }

    /// The sum of `value` over the threads below this one, and over the block.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    pub unsafe fn scan(&self, round: u32, value: u32) -> (u32, u32) {
        let inclusive = warp::warp_inclusive_scan_add(value);
        let (before, all) = self.sum_of_warps(round, inclusive);
        (before + inclusive - value, all)
    }

    /// The sum over the warps below this one, and over the block, where the last lane has the `sum` of its warp.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    unsafe fn sum_of_warps(&self, round: u32, sum: u32) -> (u32, u32) {
        let (sums, own) = (self.exchange(round, sum), thread::thread_idx_x() / WARP);
        let (mut before, mut all) = (0, 0);
        let mut other = 0;
        while other < self.warps {
            let sum = sums.load(other as usize);
            before += if other < own { sum } else { 0 };
            all += sum;
            other += 1;
        }
        (before, all)
    }

    /// The least `value` of the block.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    pub unsafe fn least(&self, round: u32, value: u32) -> u32 {
        let values = self.exchange(round, warp::warp_reduce_min(warp::FULL_MASK, value));
        let mut least = u32::MAX;
        let mut other = 0;
        while other < self.warps {
            least = least.min(values.load(other as usize));
            other += 1;
        }
        least
    }

    /// The values of all warps' last lanes.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    unsafe fn exchange(&self, round: u32, value: u32) -> Shared<u32> {
        let values = self.values.slice((round % 2 * self.warps) as usize, self.warps as usize);
        if warp::lane_id() == WARP - 1 {
            values.store((thread::thread_idx_x() / WARP) as usize, value);
        }
        thread::sync_threads();
        values
    }
}

/// Whether this block is the last of the `splits` of a unit to come here; the others' parts are then there.
///
/// # Safety
/// All threads of the block are here; `flag` is used by nothing else; arrivals are 0 before the launch.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn is_last(arrivals: GlobalMut<u32>, unit: u32, splits: u32, flag: Shared<u32>) -> bool {
    thread::sync_threads();
    if thread::thread_idx_x() == 0 {
        let before = arrivals.atomic_add(unit as usize, 1, Order::AcqRel, Scope::Device);
        let last = before + 1 == splits;
        flag.store(0, u32::from(last));
        if last {
            // For the next launch.
            arrivals.store(unit as usize, 0);
        }
    }
    thread::sync_threads();
    flag.load(0) != 0
}
