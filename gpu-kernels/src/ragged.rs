//! Ragged batches: items of all requests, end to end.

use cuda_std::Global;

use crate::abi::Entry;

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

/// How many partitions a row has: as its entry says, or, of clusters, which differ from row to row, its own number, as `cluster_pages` counts them: before
/// its last run and after it. A run that has not left the steady zone yet counts only from the step on in which it does.
#[derive(Clone, Copy)]
pub struct RowPartitions {
    /// `[rows of all requests, 2]`.
    pub row_pages: Global<u32>,
    /// Whether they are counted so; 0 or 1.
    pub counted: u32,
}

impl RowPartitions {
    /// Those of row `row` of the request, a row of `layer`.
    ///
    /// # Safety
    /// `row_pages` has the row, if it is to be read.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    pub unsafe fn of(&self, entry: &Entry, layer: u32, row: u32) -> u32 {
        if entry.tokens == 0 {
            return 0;
        }
        if self.counted == 0 {
            return entry.partitions;
        }
        let last = u32::from(layer >= entry.new_partitions);
        let pages = self.row_pages.load((2 * (entry.first_marks + row) + last) as usize);
        pages.min(entry.partitions)
    }
}
