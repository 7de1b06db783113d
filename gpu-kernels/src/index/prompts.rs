use cuda_std::prelude::*;

use super::operator::{self, Operator};
use crate::abi::Entry;
use crate::ragged::request_of;

/// Where summaries go, of all kernels of Index: the part of their parameters that says so.
#[derive(Clone, Copy)]
pub(super) struct Summaries {
    pub directories: Global<u32>,
    pub first_row: u32,
    pub request_rows: u32,
    pub segment_partitions: u32,
    pub head_words: u32,
    pub summaries: GlobalMut<U32x4>,
}

impl Summaries {
    /// The summary of a partition of KV head `head`.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    pub unsafe fn of<O: Operator>(self, entry: &Entry, head: u32, partition: u32) -> GlobalMut<U32x4> {
        let (segment, index) = (partition / self.segment_partitions, partition % self.segment_partitions);
        let block = self.directories.load((entry.directory + segment) as usize);
        let row = block as usize * self.request_rows as usize + (self.first_row + head) as usize;
        let width = (O::PARTS * self.head_words) as usize;
        self.summaries.rows(width).row(row * self.segment_partitions as usize + index as usize)
    }
}

/// One word (8 channels) of a summary a thread: the body of the kernels for prompts.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "the kernels' parameters, in their names")]
pub(super) unsafe fn summarise_prompts<O: Operator>(
    keys: Global<U32x4>,
    entries: Global<U32x4>,
    first_token: Global<u32>,
    first_chunk: Global<u32>,
    requests: u32,
    kv_heads: u32,
    head_words: u32,
    chunk_tokens: u32,
    summaries: Summaries,
) {
    let thread = thread::index_1d();
    let (summary, word) = (thread / head_words, thread % head_words);
    let (chunk, head) = (summary / kv_heads, summary % kv_heads);
    if chunk >= first_chunk.load(requests as usize) {
        return;
    }
    let request = request_of(first_chunk, requests, chunk);
    let entry = Entry::load(entries, request);
    let partition = entry.new_partition + (chunk - first_chunk.load(request as usize));
    // Found before the walk, so that its latency hides behind the keys'.
    let summary = summaries.of::<O>(&entry, head, partition);

    let token = first_token.load(request as usize) + partition * chunk_tokens;
    let keys = keys.rows((kv_heads * head_words) as usize);
    let column = (head * head_words + word) as usize;
    let kept = operator::walk::<O>(chunk_tokens, |next| {
        keys.row((token + next) as usize).load_with(column, LoadCache::ReadOnlyOnce)
    });
    operator::store(kept, chunk_tokens, summary, head_words, word);
}
