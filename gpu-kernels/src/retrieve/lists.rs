use cuda_std::atomic::{Order, Scope};
use cuda_std::prelude::*;
use cuda_std::shared;

use crate::abi::{PageCopy, WARP};
use crate::block::Exchange;
use crate::ragged::part_of;

/// Lists of copies with their counts, as `gather` takes them: all copies to make, put end to end.
#[derive(Clone, Copy)]
pub struct Lists {
    copies: Global<PageCopy>,
    lists: u32,
    capacity: u32,
    /// Where each list starts among all copies: `[lists + 1]`.
    starts: Shared<u32>,
}

impl Lists {
    /// Sums up the counts. All threads of the block, `threads` of them, reach it.
    ///
    /// From byte `at` of shared memory on it takes [`list_bytes`](crate::abi::gather::list_bytes).
    #[inline(always)]
    pub unsafe fn new(
        copies: Global<PageCopy>,
        counts: Global<u32>,
        lists: u32,
        capacity: u32,
        threads: u32,
        at: usize,
    ) -> Self {
        let warps = threads / WARP;
        let exchange = Exchange::new(shared::dynamic(at, Exchange::words(warps)), warps);
        let starts = shared::dynamic(at + 4 * Exchange::words(warps), lists as usize + 1);
        // A thread has a run of lists of its own.
        let run = lists.div_ceil(threads);
        let first = (thread::thread_idx_x() * run).min(lists);
        let end = (first + run).min(lists);
        let count = |list: u32| counts.load(list as usize).min(capacity);
        let mut sum = 0;
        let mut list = first;
        while list < end {
            sum += count(list);
            list += 1;
        }
        let (mut before, all) = exchange.scan(0, sum);
        let mut list = first;
        while list < end {
            starts.store(list as usize, before);
            before += count(list);
            list += 1;
        }
        if thread::thread_idx_x() == 0 {
            starts.store(lists as usize, all);
        }
        thread::sync_threads();
        Self { copies, lists, capacity, starts }
    }

    /// Copies of all lists.
    #[inline(always)]
    pub unsafe fn all(&self) -> u32 {
        self.starts.load(self.lists as usize)
    }

    /// The list that copy `copy` of all is in.
    #[inline(always)]
    pub unsafe fn list_of(&self, copy: u32) -> u32 {
        part_of(self.lists, copy, |list| self.starts.load(list as usize))
    }

    /// Copies of the lists before list `list`, which may be one beyond the last.
    #[inline(always)]
    pub unsafe fn start(&self, list: u32) -> u32 {
        self.starts.load(list as usize)
    }

    /// Counts the words from `first` to `end` of all pages, put end to end, as arrived in their lists: who then finds them counted, and
    /// acquires, finds them on the device.
    ///
    /// # Safety
    /// A fence for the device stands between their stores and this.
    #[inline(always)]
    pub unsafe fn count(&self, arrived: GlobalMut<u32>, first: u32, end: u32, page_words: u32) {
        let mut list = self.list_of(first / page_words);
        let mut at = first;
        while at < end {
            let of_list = end.min(self.starts.load(list as usize + 1) * page_words) - at;
            if of_list > 0 {
                arrived.atomic_add(list as usize, of_list, Order::Relaxed, Scope::Device);
            }
            at += of_list;
            list += 1;
        }
    }

    /// Copy `copy` of all.
    #[inline(always)]
    pub unsafe fn copy(&self, copy: u32) -> PageCopy {
        let list = self.list_of(copy);
        let of_list = self.copies.slice((list * self.capacity) as usize, self.capacity as usize);
        of_list.load((copy - self.starts.load(list as usize)) as usize)
    }
}
