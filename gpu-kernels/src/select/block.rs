//! Sums over a block.

use cuda_std::prelude::*;
use cuda_std::warp::{FULL_MASK, WARP_SIZE, warp_inclusive_scan_add, warp_shuffle_idx};

use crate::abi::WARP;

/// The sum of the values of the threads before this one, and of all: wrapping.
///
/// One barrier, between the words that the warps hand to each other in `warps` and their use: callers have another one
/// between two scans.
///
/// # Safety
/// All threads of the block are here, whole warps, and `warps` has 32 words.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn exclusive_scan(value: u32, warps: Shared<u32>) -> (u32, u32) {
    let (warp, lane) = (thread::thread_idx_x() / WARP, warp::lane_id());
    let inclusive = warp_inclusive_scan_add(value);
    if lane == WARP_SIZE - 1 {
        warps.store(warp as usize, inclusive);
    }
    thread::sync_threads();
    // Every warp adds up all warps' sums for itself, which spares a second barrier.
    let sum = if lane < thread::block_dim_x() / WARP { warps.load(lane as usize) } else { 0 };
    let sums = warp_inclusive_scan_add(sum);
    let before = warp_shuffle_idx(FULL_MASK, sums.wrapping_sub(sum), warp, WARP_SIZE);
    let total = warp_shuffle_idx(FULL_MASK, sums, WARP_SIZE - 1, WARP_SIZE);
    (before.wrapping_add(inclusive).wrapping_sub(value), total)
}
