//! Ragged batches: items of all requests, end to end.

use cuda_std::Global;

/// The request that holds item `item` of the batch, by `first`, `[requests + 1]`: the items of the requests before. Requests
/// without items are passed over.
///
/// # Safety
/// `first` ascends from 0 to more than `item`.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn request_of(first: Global<u32>, requests: u32, item: u32) -> u32 {
    part_of(requests, item, |request| first.load(request as usize))
}

/// Which of `parts` parts, end to end, holds `item`: the last that does not start above it.
///
/// # Safety
/// `start` ascends from 0, and may be called for every part.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn part_of(parts: u32, item: u32, start: impl Fn(u32) -> u32) -> u32 {
    let (mut low, mut high) = (0, parts);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if start(middle) <= item {
            low = middle;
        } else {
            high = middle;
        }
    }
    low
}
