use cuda_std::prelude::*;

use super::operator::{self, Operator};
use super::prompts::Summaries;
use crate::abi::Entry;
use crate::chain::chain;

/// One entry a block, one word (8 channels) of a summary a thread at a time: the body of the kernels for a decode step.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "the kernels' parameters, in their names")]
pub(super) unsafe fn summarise_leaving<O: Operator>(
    entries: Global<U32x4>,
    steady: Global<u32>,
    pool: Global<U32x4>,
    kv_heads: u32,
    head_words: u32,
    page_tokens: u32,
    partition_tokens: u32,
    summaries: Summaries,
) {
    chain();
    let entry = Entry::load(entries, thread::block_idx_x());
    if entry.tokens == 0 {
        return;
    }
    let pages = pool.rows((2 * page_tokens * head_words) as usize);
    let words = entry.new_partitions * kv_heads * head_words;
    let mut at = thread::thread_idx_x();
    while at < words {
        let (summary, word) = (at / head_words, at % head_words);
        let (partition, head) = (entry.new_partition + summary / kv_heads, summary % kv_heads);
        let row = summaries.first_row + head;
        let first = partition * partition_tokens;
        let kept = operator::walk::<O>(partition_tokens, |next| {
            let token = first + next;
            let page = steady.load(entry.steady_place(row, token / page_tokens) as usize);
            pages.row(page as usize).load((token % page_tokens * head_words + word) as usize)
        });
        let summary = summaries.of::<O>(&entry, head, partition);
        operator::store(kept, partition_tokens, summary, head_words, word);
        at += thread::block_dim_x();
    }
}
