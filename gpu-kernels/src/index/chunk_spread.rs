use cuda_std::math::{fma, rsqrt_approx};
use cuda_std::prelude::*;
use cuda_std::warp::{FULL_MASK, WARP_SIZE, warp_shuffle_xor};
use cuda_std::{U32x4, bf16};

use super::operator::{self, Mean};
use crate::abi::{Entry, WORD_ELEMENTS};
use crate::ragged::request_of;

/// How far the keys of each chunk spread about their mean: minus the least cosine between any of them and it. Of a ragged batch of
/// prompts, one layer.
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `keys`, `entries`, `first_token`, `first_chunk`, `requests`, `kv_heads`, `chunk_tokens` | | as for [`chunk_mean`](super::chunk_mean()); of an entry `new_partition` is read |
/// | `head_words` | 1, 2, 4, 8, 16 or 32 | head dim / 8 |
/// | `stride` | at least a request's chunks | room for a row's numbers |
/// | `spreads` | `[requests, kv_heads, stride]` f32 | of the request's chunk `i`, the partition `new_partition + i`, at `i`; between -1 and 1, or NaN (0x7fffffff) |
///
/// The greatest of a row are those of the chunks that their mean stands least for: [`top_k`](crate::select::top_k()) finds them. Sums are
/// in f32, of a product over the channels in an order of the shuffles'. What has squares that add up to less than the least normal
/// number has a cosine of 0 with anything, and a NaN among the keys makes the chunk's spread NaN, which is greater than all others.
///
/// # Mapping
/// `head_words` lanes side by side have a chunk of a KV head, a word (8 channels) of its keys each: they walk the tokens once for the
/// sum, whose direction is the mean's, and once more, out of the caches, for the cosines. Lanes beyond the last chunk take it once more
/// and write nothing, so that all lanes are there to shuffle.
///
/// # Launch
/// [`grid`](crate::abi::index_prompts::grid) blocks of [`BLOCK`](crate::abi::index_prompts::BLOCK) threads; no shared memory.
///
/// # Safety
/// The views have the shapes above; the entries' new partitions have their keys in `keys`;
/// `first_chunk[requests] * kv_heads * head_words` is at most [`MAX_WORDS`](crate::abi::index_prompts::MAX_WORDS).
#[kernel(collectives(shuffle = 3))]
pub unsafe fn chunk_spread(
    keys: Global<U32x4>,
    entries: Global<U32x4>,
    first_token: Global<u32>,
    first_chunk: Global<u32>,
    requests: u32,
    kv_heads: u32,
    head_words: u32,
    chunk_tokens: u32,
    stride: u32,
    spreads: GlobalMut<f32>,
) {
    let thread = thread::index_1d();
    let (summary, word) = (thread / head_words, thread % head_words);
    let chunks = first_chunk.load(requests as usize);
    if chunks == 0 {
        return;
    }
    let (chunk, head) = ((summary / kv_heads).min(chunks - 1), summary % kv_heads);
    let request = request_of(first_chunk, requests, chunk);
    let chunk_of_request = chunk - first_chunk.load(request as usize);
    let partition = Entry::load(entries, request).new_partition + chunk_of_request;

    let token = first_token.load(request as usize) + partition * chunk_tokens;
    let keys = keys.rows((kv_heads * head_words) as usize);
    let column = (head * head_words + word) as usize;
    let load = |next: u32| keys.row((token + next) as usize).load_with(column, LoadCache::ReadOnly);
    let sum = operator::walk::<Mean>(chunk_tokens, load).sums;
    let of_sum = over_lanes(products(sum, sum), head_words);

    let mut spread = f32::NEG_INFINITY;
    let mut next = 0;
    while next < chunk_tokens {
        let key = elements(load(next));
        let of_key = over_lanes(products(key, key), head_words);
        let product = over_lanes(products(key, sum), head_words);
        let mut cosine = product * rsqrt_approx(of_key) * rsqrt_approx(of_sum);
        // A reciprocal of 0 is infinite.
        if of_key < f32::MIN_POSITIVE || of_sum < f32::MIN_POSITIVE {
            cosine = 0.0;
        }
        // From 0, so that both zeroes are one; not `max`, which would hide a NaN.
        let of_token = 0.0 - cosine;
        if of_token > spread || of_token.is_nan() {
            spread = of_token;
        }
        next += 1;
    }
    if word == 0 && summary / kv_heads < chunks {
        let row = (request * kv_heads + head) as usize;
        let spread = if spread.is_nan() { f32::from_bits(0x7fff_ffff) } else { spread };
        spreads.store(row * stride as usize + chunk_of_request as usize, spread);
    }
}

/// The channels of a word.
#[inline(always)]
fn elements(word: U32x4) -> [f32; WORD_ELEMENTS] {
    let pairs = word.to_array();
    let (a, b) = bf16::unpack(pairs[0]);
    let (c, d) = bf16::unpack(pairs[1]);
    let (e, f) = bf16::unpack(pairs[2]);
    let (g, h) = bf16::unpack(pairs[3]);
    [a, b, c, d, e, f, g, h]
}

/// A lane's part of a dot product.
#[inline(always)]
fn products(a: [f32; WORD_ELEMENTS], b: [f32; WORD_ELEMENTS]) -> f32 {
    let mut sum = 0.0;
    let mut at = 0;
    while at < WORD_ELEMENTS {
        sum = fma(a[at], b[at], sum);
        at += 1;
    }
    sum
}

/// The sum over the `lanes` lanes, a power of two, that a lane is among: in all of them, with the same bits.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
unsafe fn over_lanes(value: f32, lanes: u32) -> f32 {
    let mut sum = value;
    let mut distance = lanes / 2;
    while distance > 0 {
        sum += warp_shuffle_xor(FULL_MASK, sum, distance, WARP_SIZE);
        distance /= 2;
    }
    sum
}
