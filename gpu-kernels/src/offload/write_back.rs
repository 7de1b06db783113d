use cuda_std::prelude::*;

use super::warp_copy::{copy_words, order_stores, set_valid};
use crate::abi::write_back::PIECE_WORDS;
use crate::abi::{PageCopy, SLAB_PAGES, WARP};

/// Copies pages from the GPU's page pool to mapped host memory, by a list and a count that both lie on the device: the mirror image of
/// [`gather`](crate::retrieve::gather()).
///
/// | parameter | shape | memory |
/// |---|---|---|
/// | `copies` | `[capacity]` [`PageCopy`] | device |
/// | `count` | `[1]`: copies of the list to make; more than `capacity` counts as `capacity` | device |
/// | `capacity` | | |
/// | `device_pages` | `[device pages, page_words]` words | device |
/// | `host_pages` | `[host pages, page_words]` words | mapped host |
/// | `page_words` | words of a page, at least 1 | |
/// | `marked` | whether the pages have valid bits to set: if 0, the next two are not used | |
/// | `places` | `[capacity]`: a copy's [`valid_place`](crate::abi::valid_place) | device |
/// | `host_valid` | valid bits, a u32 for each slab in the host tables | device |
///
/// The list should ascend in `host_page`, as for `gather`.
///
/// # Mapping
/// A warp has a page at a time, or as many as fit into 128 words (2 KiB), and on by the launch's warps. Four words of a lane are in flight.
/// Loads are from the GPU's own memory and near, stores to the host are posted: few warps fill the bus.
///
/// # Order
/// As for [`append`](super::append()): bits after bytes, one fence for the pages of a warp.
///
/// # Launch
/// 1 to [`MAX_BLOCKS`](crate::abi::write_back::MAX_BLOCKS) blocks of [`BLOCK`](crate::abi::write_back::BLOCK) threads; no shared memory.
///
/// # Safety
/// The views have the shapes above, every page and bit named lies within its view, no host page is named twice; nothing writes the
/// named device pages or uses the named host pages until the launch has ended. A page has at most
/// [`MAX_PAGE_WORDS`](crate::abi::MAX_PAGE_WORDS) words.
#[kernel(collectives(barrier = 1))]
pub unsafe fn write_back(
    copies: Global<PageCopy>,
    count: Global<u32>,
    capacity: u32,
    device_pages: Global<U32x4>,
    host_pages: GlobalMut<U32x4>,
    page_words: u32,
    marked: u32,
    places: Global<u32>,
    host_valid: GlobalMut<u32>,
) {
    let pages = count.load(0).min(capacity);
    let together = (PIECE_WORDS / page_words).max(1);
    let warps_a_block = thread::block_dim_x() / WARP;
    let warp = thread::block_idx_x() * warps_a_block + thread::thread_idx_x() / WARP;
    let stride = thread::grid_dim_x() * warps_a_block * together;
    let device_pages = device_pages.rows(page_words as usize);
    let host_pages = host_pages.rows(page_words as usize);

    let mut first = warp * together;
    while first < pages {
        let here = together.min(pages - first);
        copy_words(
            here * page_words,
            |at| {
                let page = copies.load((first + at / page_words) as usize).device_page;
                device_pages.row(page as usize).load_with((at % page_words) as usize, LoadCache::ReadOnlyOnce)
            },
            |at, loaded| {
                let page = copies.load((first + at / page_words) as usize).host_page;
                host_pages.row(page as usize).store((at % page_words) as usize, loaded);
            },
        );
        if marked != 0 {
            order_stores();
            let mut page = warp::lane_id();
            while page < here {
                let place = places.load((first + page) as usize);
                set_valid(host_valid, place / SLAB_PAGES, place % SLAB_PAGES);
                page += WARP;
            }
        }
        // Saturates instead of wrapping: a list may be nearly 2^32 long.
        first = first.saturating_add(stride);
    }
}
