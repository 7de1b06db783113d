use cuda_std::math::fma;
use cuda_std::prelude::*;
use cuda_std::warp::warp_sum;
use cuda_std::{Rows, RowsMut, bf16};

use crate::entry;

/// Of each chunk of a prompt the key with the greatest norm, of equal ones the first: summaries of one layer.
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `keys` | `[tokens, kv_heads, head_words]` words | bf16 keys of all requests, end to end |
/// | `entries` | `[requests, 20]` u32 | see [`entry`] |
/// | `first_token` | `[requests]` | where a request's token 0 lies in `keys` |
/// | `first_chunk` | `[requests + 1]`, ascending, from 0 | chunks of the requests before |
/// | `directories` | of all requests | segments |
/// | `first_row`, `request_rows`, `kv_heads` | | row of KV head 0, rows of a request |
/// | `head_words` | 1 to 32 | head dim / 8 |
/// | `chunk_tokens`, `segment_chunks` | at least 1 | |
/// | `summaries` | `[segments, request_rows, segment_chunks, head_words]` words | written |
///
/// # Mapping
/// A block is a warp and has a chunk of a KV head; a lane has a word of its keys.
///
/// # Launch
/// Chunks x KV heads blocks of [`BLOCK`](crate::BLOCK) threads; no shared memory.
///
/// # Safety
/// The views have the shapes above, and the tables name places that exist, each once.
#[kernel(collectives(shuffle = 5))]
pub unsafe fn farthest_key(
    keys: Global<U32x4>,
    entries: Global<u32>,
    first_token: Global<u32>,
    first_chunk: Global<u32>,
    directories: Global<u32>,
    first_row: u32,
    request_rows: u32,
    kv_heads: u32,
    head_words: u32,
    chunk_tokens: u32,
    segment_chunks: u32,
    summaries: GlobalMut<U32x4>,
) {
    let (chunk, head) = (thread::block_idx_x() / kv_heads, thread::block_idx_x() % kv_heads);
    // Batches are of few requests: looked for one by one.
    let mut request = 0;
    while first_chunk.load(request + 1) <= chunk {
        request += 1;
    }
    let of_request = entries.slice(request * entry::NUMBERS, entry::NUMBERS);
    let partition = of_request.load(entry::NEW_PARTITION) + chunk - first_chunk.load(request);
    let token = first_token.load(request) + partition * chunk_tokens;
    let keys = keys.rows((kv_heads * head_words) as usize);
    let lane = warp::lane_id();
    let (farthest, _) = farthest(chunk_tokens, |next| {
        let column = (head * head_words + lane) as usize;
        if lane < head_words { keys.row((token + next) as usize).load(column) } else { U32x4::default() }
    });
    let table = Summaries {
        directories,
        rows: summaries.rows(head_words as usize),
        first_row,
        request_rows,
        segment_chunks,
    };
    table.store(of_request, head, partition, lane < head_words, lane, farthest);
}

/// The same of the chunks that leave the steady zone in a decode step: in most steps none.
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `steady` | of all requests | physical pages |
/// | `pool` | `[pages, 2, page_tokens, head_words]` words | GPU pages: keys, then values |
/// | `page_tokens` | at least 1 | |
/// | all others | | as for [`farthest_key`], of `[batch]` entries |
///
/// # Launch
/// Batch x KV heads blocks of [`BLOCK`](crate::BLOCK) threads; no shared memory.
///
/// # Safety
/// As for [`farthest_key`]; chunks that leave have all their tokens in steady pages.
#[kernel(collectives(shuffle = 5))]
pub unsafe fn farthest_key_step(
    entries: Global<u32>,
    steady: Global<u32>,
    pool: Global<U32x4>,
    directories: Global<u32>,
    first_row: u32,
    request_rows: u32,
    kv_heads: u32,
    head_words: u32,
    page_tokens: u32,
    chunk_tokens: u32,
    segment_chunks: u32,
    summaries: GlobalMut<U32x4>,
) {
    let (request, head) = (thread::block_idx_x() / kv_heads, thread::block_idx_x() % kv_heads);
    let of_request = entries.slice(request as usize * entry::NUMBERS, entry::NUMBERS);
    if of_request.load(entry::TOKENS) == 0 {
        return;
    }
    let (sinks, ring) = (of_request.load(entry::SINK_PAGES), of_request.load(entry::RING_PAGES));
    let list = of_request.load(entry::FIRST_STEADY) + (first_row + head) * (sinks + ring);
    let pages: Rows<U32x4> = pool.rows((2 * page_tokens * head_words) as usize);
    let table = Summaries {
        directories,
        rows: summaries.rows(head_words as usize),
        first_row,
        request_rows,
        segment_chunks,
    };
    let lane = warp::lane_id();
    let (first, count) = (of_request.load(entry::NEW_PARTITION), of_request.load(entry::NEW_PARTITIONS));
    let mut partition = first;
    while partition < first + count {
        let (farthest, _) = farthest(chunk_tokens, |next| {
            let token = partition * chunk_tokens + next;
            let key = token / page_tokens;
            let place = if key < sinks { key } else { sinks + (key - sinks) % ring };
            let page = pages.row(steady.load((list + place) as usize) as usize);
            let word = (token % page_tokens * head_words + lane) as usize;
            if lane < head_words { page.load(word) } else { U32x4::default() }
        });
        table.store(of_request, head, partition, lane < head_words, lane, farthest);
        partition += 1;
    }
}

/// The lane's word of the key with the greatest norm, and that norm's square. All lanes are here.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
unsafe fn farthest(tokens: u32, load: impl Fn(u32) -> U32x4) -> (U32x4, f32) {
    let mut kept = (U32x4::default(), -1.0);
    let mut next = 0;
    while next < tokens {
        let word = load(next);
        let U32x4 { x, y, z, w } = word;
        let square = warp_sum(squares(x, squares(y, squares(z, squares(w, 0.0)))));
        if square > kept.1 {
            kept = (word, square);
        }
        next += 1;
    }
    kept
}

#[inline(always)]
fn squares(pair: u32, sum: f32) -> f32 {
    let (low, high) = bf16::unpack(pair);
    fma(high, high, fma(low, low, sum))
}

/// Where summaries go.
#[derive(Clone, Copy)]
struct Summaries {
    directories: Global<u32>,
    rows: RowsMut<U32x4>,
    first_row: u32,
    request_rows: u32,
    segment_chunks: u32,
}

impl Summaries {
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    unsafe fn store(self, entry: Global<u32>, head: u32, partition: u32, has: bool, word: u32, value: U32x4) {
        let (segment, index) = (partition / self.segment_chunks, partition % self.segment_chunks);
        let segment = self.directories.load((entry.load(entry::DIRECTORY) + segment) as usize) as usize;
        let row = segment * self.request_rows as usize + (self.first_row + head) as usize;
        if has {
            self.rows.row(row * self.segment_chunks as usize + index as usize).store(word as usize, value);
        }
    }
}
