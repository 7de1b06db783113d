use cuda_std::atomic::{Fence, Order, Scope, fence};
use cuda_std::prelude::*;
use cuda_std::warp::FULL_MASK;

use crate::abi::{SLAB_PAGES, WARP};

/// A warp moves `words` words from `load` to `store`, word by word of the lanes side by side: four loads of a lane in flight, stores
/// of 512 bytes on end. Stores to the host are posted, so nothing waits for them.
///
/// # Safety
/// `words` is at most [`MAX_PAGE_WORDS`](crate::abi::MAX_PAGE_WORDS); `load` and `store` as they are called.
#[inline(always)]
pub(crate) unsafe fn copy_words(words: u32, load: impl Fn(u32) -> U32x4, store: impl Fn(u32, U32x4)) {
    let mut position = warp::lane_id();
    while position < words {
        let mut loaded = [U32x4::default(); 4];
        let mut row = 0;
        while row < 4 {
            let at = position + row * WARP;
            if at < words {
                loaded[row as usize] = load(at);
            }
            row += 1;
        }
        let mut row = 0;
        while row < 4 {
            let at = position + row * WARP;
            if at < words {
                store(at, loaded[row as usize]);
            }
            row += 1;
        }
        position += 4 * WARP;
    }
}

/// Puts what the warp has stored before what its lanes store next, for whoever sees the latter: the host included.
///
/// # Safety
/// All lanes of the warp come here.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub(super) unsafe fn order_stores() {
    // The barrier puts the other lanes' stores before this lane's fence, and fences are cumulative.
    warp::sync_warp(FULL_MASK);
    fence(Fence::AcqRel, Scope::System);
}

/// Says that the warp has stored all of page `key` on the host: sets its valid bit, after its bytes.
///
/// # Safety
/// All lanes of the warp come here; `host_valid` has the word at `slab_place`.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub(crate) unsafe fn publish(host_valid: GlobalMut<u32>, slab_place: u32, key: u32) {
    order_stores();
    if warp::lane_id() == 0 {
        set_valid(host_valid, slab_place, key % SLAB_PAGES);
    }
}

/// Sets the valid bit of page `page` of the slab at place `slab_place`. Other warps may set others of the same word.
///
/// # Safety
/// `host_valid` has the word, and [`order_stores`] came after the page's bytes.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub(super) unsafe fn set_valid(host_valid: GlobalMut<u32>, slab_place: u32, page: u32) {
    host_valid.atomic_or(slab_place as usize, 1 << page, Order::Relaxed, Scope::System);
}
