//! What a row attends to, in order: pages of the sinks, the selection's, the tail's.

use cuda_std::prelude::*;

use crate::abi::Entry;
use crate::abi::attend::RUN;

/// A row's tokens, as runs of eight: each lies in one page, and a page has one or more.
#[derive(Clone, Copy)]
pub struct Context {
    steady: Global<u32>,
    pages: Global<u32>,
    entry: Entry,
    /// The row among the request's.
    row: u32,
    sinks: u32,
    /// Pages before the tail.
    before_tail: u32,
    first_of_tail: u32,
    /// Tokens in all.
    pub tokens: u32,
    /// A page has `1 << log_runs` runs.
    pub log_runs: u32,
}

impl Context {
    /// The context of row `row` of a request, whose selection is the first `selected` of `pages`.
    #[inline(always)]
    pub fn new(
        entry: Entry,
        row: u32,
        steady: Global<u32>,
        pages: Global<u32>,
        selected: u32,
        page_tokens: u32,
    ) -> Self {
        let held = entry.tokens.div_ceil(page_tokens);
        let sinks = held.min(entry.sink_pages);
        let first_of_tail = entry.leaving_key + entry.leaving;
        let in_tail = held.saturating_sub(first_of_tail);
        // Only the newest page may have room left. If it is here it is the last one; else the selection alone is asked for.
        let has_newest = in_tail > 0 || held <= entry.sink_pages;
        let room = if has_newest { held * page_tokens - entry.tokens } else { 0 };
        Self {
            steady,
            pages,
            entry,
            row,
            sinks,
            before_tail: sinks + selected,
            first_of_tail,
            tokens: (sinks + selected + in_tail) * page_tokens - room,
            log_runs: (page_tokens / RUN).trailing_zeros(),
        }
    }

    /// The first token of the selection's last `pages` pages.
    #[inline(always)]
    pub fn first_of_last(&self, pages: u32) -> u32 {
        ((self.before_tail - pages) << self.log_runs) * RUN
    }

    /// The physical page of run `run`; of runs beyond the last, of none.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    pub unsafe fn page(&self, run: u32) -> u32 {
        if run * RUN >= self.tokens {
            return 0;
        }
        let at = run >> self.log_runs;
        if at >= self.sinks && at < self.before_tail {
            return self.pages.load((at - self.sinks) as usize);
        }
        let key = if at < self.sinks { at } else { self.first_of_tail + (at - self.before_tail) };
        self.steady.load(self.entry.steady_place(self.row, key) as usize)
    }

    /// Where the bias of token `token` is among those of the selected pages, if it is in one.
    #[inline(always)]
    pub fn selected(&self, token: u32) -> Option<u32> {
        let log_tokens = self.log_runs + RUN.trailing_zeros();
        let first = self.sinks << log_tokens;
        if token >= first && token < self.before_tail << log_tokens { Some(token - first) } else { None }
    }
}
