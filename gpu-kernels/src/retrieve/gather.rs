use cuda_std::atomic::{Fence, Scope, fence};
use cuda_std::prelude::*;
use cuda_std::warp::FULL_MASK;

use super::lists::Lists;
use crate::abi::gather::{BLOCK, PIECE_WORDS};
use crate::abi::{PageCopy, WARP};
use crate::chain::chain;

/// Copies pages from mapped host memory to the GPU's page pool, by lists and counts that lie on the device: one list a row, as
/// [`resolve`](super::resolve()) leaves them, or one for all.
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
/// | `device_words` | words of a GPU page, at least `page_words`: a host page is the end of it, and what is before that is not touched | |
/// | `arrived` | `[lists]`, 0 before: words of each list's pages that are there. Counted if `counted` is 1, else not touched | device |
///
/// A launch that was made to overlap begins once all blocks of this one run, behind the end of all before it; by `arrived` it learns which rows are complete.
///
/// The lists should ascend in `host_page`: the result does not depend on it, but address translation towards the host does (random
/// reads of small pages over more than a few hundred MiB at a time lose most of their bandwidth), and the kernel sweeps the lists
/// in order, all warps side by side.
///
/// # Mapping
/// Each block sums up the counts. The pages of all lists, put end to end, are cut into pieces of 128 words (2 KiB). Warp `w` of `n`
/// takes pieces `w`, `w + n`, …; a lane has four words of its piece in flight. Reads of the host are slow and far (about 2 µs), so
/// what counts is bytes in flight, not threads: any page size fills every lane, and the grid may be as small as the bus needs.
///
/// # Launch
/// 1 to [`MAX_BLOCKS`](crate::abi::gather::MAX_BLOCKS) blocks of [`BLOCK`] threads;
/// [`shared_bytes`](crate::abi::gather::shared_bytes) of shared memory.
///
/// # Safety
/// The views have the shapes above, every page named lies within its view, no device page is named twice, and nothing writes the
/// named host pages until the launch has ended.
#[kernel(collectives(barrier = 3, shuffle = 5))]
pub unsafe fn gather(
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
    let lists = Lists::new(copies, counts, lists, capacity, BLOCK, 0);
    let words = lists.all() * page_words;
    let warp = thread::index_1d() / WARP;
    let stride = thread::grid_dim_x() * WARPS * PIECE_WORDS;

    let host_pages = host_pages.rows(page_words as usize);
    let device_pages = device_pages.rows(device_words as usize);
    let device_first = (device_words - page_words) as usize;
    // What a flat position of the lists stands for: its copy, and its word of the page.
    let place = |position: u32| (lists.copy(position / page_words), (position % page_words) as usize);

    let mut first = warp * PIECE_WORDS;
    // A last piece may be cut short, and with it lanes; whole pieces load all four words before they store one.
    while first < words {
        let position = first + warp::lane_id();
        let mut loaded = [U32x4::default(); 4];
        let mut row = 0;
        while row < 4 {
            let at = position + row * WARP;
            if at < words {
                let (copy, word) = place(at);
                loaded[row as usize] =
                    host_pages.row(copy.host_page as usize).load_with(word, LoadCache::ReadOnlyOnce);
            }
            row += 1;
        }
        let mut row = 0;
        while row < 4 {
            let at = position + row * WARP;
            if at < words {
                let (copy, word) = place(at);
                device_pages.row(copy.device_page as usize).store(device_first + word, loaded[row as usize]);
            }
            row += 1;
        }
        if counted != 0 {
            warp::sync_warp(FULL_MASK);
            if warp::lane_id() == 0 {
                fence(Fence::AcqRel, Scope::Device);
                lists.count(arrived, first, words.min(first + PIECE_WORDS), page_words);
            }
        }
        // Saturates instead of wrapping: a list may end near 2^32 words.
        first = first.saturating_add(stride);
    }
}

/// Warps of a block.
const WARPS: u32 = BLOCK / WARP;
