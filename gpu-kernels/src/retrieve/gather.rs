use cuda_std::prelude::*;

use crate::abi::gather::PIECE_WORDS;
use crate::abi::{PageCopy, WARP};

/// Copies pages from mapped host memory to the GPU's page pool, by a list and a count that both lie on the device.
///
/// | parameter | shape | memory |
/// |---|---|---|
/// | `copies` | `[capacity]` [`PageCopy`] | device |
/// | `count` | `[1]`: copies of the list to make; more than `capacity` counts as `capacity` | device |
/// | `capacity` | at most [`max_copies`](crate::abi::gather::max_copies) | |
/// | `host_pages` | `[host pages, page_words]` words | mapped host |
/// | `device_pages` | `[device pages, page_words]` words | device |
/// | `page_words` | words of a page, at least 1 | |
///
/// The list should ascend in `host_page`: the result does not depend on it, but address translation towards the host does (random
/// reads of small pages over more than a few hundred MiB at a time lose most of their bandwidth), and the kernel sweeps the list
/// in order, all warps side by side.
///
/// # Mapping
/// The pages of the list, put end to end, are cut into pieces of 128 words (2 KiB). Warp `w` of `n` takes pieces `w`, `w + n`, …; a lane
/// has four words of its piece in flight. Reads of the host are slow and far (about 2 µs), so what counts is bytes in flight, not
/// threads: any page size fills every lane, and the grid may be as small as the bus needs.
///
/// # Launch
/// 1 to [`MAX_BLOCKS`](crate::abi::gather::MAX_BLOCKS) blocks of [`BLOCK`](crate::abi::gather::BLOCK) threads; no shared memory.
///
/// # Safety
/// The views have the shapes above, every page named lies within its view, no device page is named twice, and nothing writes the
/// named host pages until the launch has ended.
#[kernel]
pub unsafe fn gather(
    copies: Global<PageCopy>,
    count: Global<u32>,
    capacity: u32,
    host_pages: Global<U32x4>,
    device_pages: GlobalMut<U32x4>,
    page_words: u32,
) {
    let words = count.load(0).min(capacity) * page_words;
    let warps_a_block = thread::block_dim_x() / WARP;
    let warp = thread::block_idx_x() * warps_a_block + thread::thread_idx_x() / WARP;
    let stride = thread::grid_dim_x() * warps_a_block * PIECE_WORDS;

    let host_pages = host_pages.rows(page_words as usize);
    let device_pages = device_pages.rows(page_words as usize);
    // The word of the list that a flat position stands for: its copy, and its place in the page.
    let place =
        |position: u32| (copies.load((position / page_words) as usize), (position % page_words) as usize);

    let mut position = warp * PIECE_WORDS + warp::lane_id();
    // A last piece may be cut short, and with it lanes; whole pieces load all four words before they store one.
    while position < words {
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
                device_pages.row(copy.device_page as usize).store(word, loaded[row as usize]);
            }
            row += 1;
        }
        // Saturates instead of wrapping: a list may end near 2^32 words.
        position = position.saturating_add(stride);
    }
}
