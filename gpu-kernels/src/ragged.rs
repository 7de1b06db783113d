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
    // The last whose first item is not above it.
    let (mut low, mut high) = (0, requests);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if first.load(middle as usize) <= item {
            low = middle;
        } else {
            high = middle;
        }
    }
    low
}
