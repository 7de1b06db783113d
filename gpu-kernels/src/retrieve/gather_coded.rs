use cuda_std::atomic::{Fence, Scope, fence};
use cuda_std::prelude::*;
use cuda_std::warp::FULL_MASK;

use super::lists::Lists;
use crate::abi::gather::{BLOCK, PIECE_WORDS};
use crate::abi::page_code::PageCode;
use crate::abi::{PageCopy, WARP};
use crate::chain::chain;
use crate::codes::decode_word;
use crate::unroll::unrolled;

/// What [`gather`](super::gather()) does where host pages are [coded](crate::abi::page_code): half the bytes cross the bus, and become bf16 as they
/// arrive.
///
/// | parameter | shape | memory |
/// |---|---|---|
/// | `copies` | `[lists, capacity]` [`PageCopy`] | device |
/// | `counts` | `[lists]`: copies of each list to make; more than `capacity` counts as `capacity` | device |
/// | `lists` | at least 1 | |
/// | `capacity` | with `lists`, at most [`max_copies`](crate::abi::gather::max_copies) in all | |
/// | `host_pages` | `[host pages, page_words]` words | mapped host |
/// | `device_pages` | `[device pages, device_words]` words | device |
/// | `page_words` | words of a host page, [`coded_words`](crate::abi::page_code::coded_words) | |
/// | `device_words` | words of a GPU page, a multiple of 4 | |
/// | `arrived` | `[lists]`, 0 before: words of each list's GPU pages that are there. Counted if `counted` is 1, else not touched | device |
/// | `code` | a [`PageCode`] | |
///
/// # Mapping
/// As for `gather`, with pieces of 128 words of codes. A lane reads the scales of a page together with its codes, all lanes the same word, and again only
/// where a piece goes on to another page.
///
/// # Launch
/// As for `gather`.
///
/// # Safety
/// As for `gather`.
#[kernel(collectives(barrier = 3, shuffle = 5))]
pub unsafe fn gather_coded(
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
    code: u32,
) {
    chain();
    let lists = Lists::new(copies, counts, lists, capacity, BLOCK, 0);
    let code_words = page_words - 1;
    let words = lists.all() * code_words;
    let warp = thread::index_1d() / WARP;
    let stride = thread::grid_dim_x() * (BLOCK / WARP) * PIECE_WORDS;
    let code = PageCode::of(code);

    let host_pages = host_pages.rows(page_words as usize);
    let device_pages = device_pages.rows(device_words as usize);

    let mut first = warp * PIECE_WORDS;
    while first < words {
        let position = first + warp::lane_id();
        let mut loaded = [U32x4::default(); 4];
        let mut scales = [U32x4::default(); 4];
        let mut of_page = U32x4::default();
        unrolled!(row < 4, {
            let at = position + row as u32 * WARP;
            if at < words {
                let page = at / code_words;
                let host_page = host_pages.row(lists.copy(page).host_page as usize);
                loaded[row] = host_page.load_with((at % code_words) as usize, LoadCache::ReadOnlyOnce);
                if row == 0 || (at - WARP) / code_words != page {
                    of_page = host_page.load_with(code_words as usize, LoadCache::ReadOnlyOnce);
                }
                scales[row] = of_page;
            }
        });
        unrolled!(row < 4, {
            let at = position + row as u32 * WARP;
            if at < words {
                let (word, scales) = (at % code_words, scales[row]);
                let scale = f32::from_bits(if 2 * word < code_words { scales.x } else { scales.y });
                let [even, odd] = decode_word(code, loaded[row], scale);
                let page = device_pages.row(lists.copy(at / code_words).device_page as usize);
                page.store(2 * word as usize, even);
                page.store(2 * word as usize + 1, odd);
            }
        });
        if counted != 0 {
            warp::sync_warp(FULL_MASK);
            if warp::lane_id() == 0 {
                fence(Fence::AcqRel, Scope::Device);
                let end = words.min(first + PIECE_WORDS);
                lists.count(arrived, 2 * first, 2 * end, device_words);
            }
        }
        // Saturates instead of wrapping: a list may end near 2^32 words.
        first = first.saturating_add(stride);
    }
}
