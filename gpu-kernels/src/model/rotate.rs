use cuda_std::math::{fma, rsqrt_approx};
use cuda_std::prelude::*;
use cuda_std::warp::{FULL_MASK, WARP_SIZE, warp_shuffle_xor};

use super::elements::{eight_at, eight_of};
use super::turn::Turn;
use crate::abi::model::rotate::{BLOCK, group_heads, groups};
use crate::abi::{ENTRY_WORDS, WARP};

/// Parts the product of a token with the query, key and value projections into the three, after the norm of each query's and key's head (if
/// there is one) and its rotary position embedding: half-split, element `i` of a head turns with element `i + head_dim / 2` by
/// `position * frequencies[i]`.
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `projected` | `[tokens, query_heads + 2 * kv_heads, head_words]` words of bf16 | a token's queries, its keys, its values |
/// | `tokens`, `query_heads`, `kv_heads` | | |
/// | `head_words` | 8 or 16 | head dim / 8 |
/// | `entries` | `[tokens]` [`Entry`](crate::abi::Entry) in words if `decodes`, else anything | a token's position is its entry's last; of an entry without tokens nothing is read or written |
/// | `decodes` | 0 or 1 | |
/// | `first_position` | | else: token 0's position, which the others follow |
/// | `frequencies` | `[head_dim / 2]` f32, in words | in radians a position |
/// | `factor` | | of sines and cosines |
/// | `query_norm`, `key_norm` | `[head_dim]` f32, in words, if `norms`, else anything | weights |
/// | `norms` | 0 or 1 | |
/// | `eps` | | of the norms |
/// | `warps_of_token` | at least 1 | |
/// | `queries` | `[tokens, query_heads, head_words]` | written |
/// | `first_token` | | where keys and values of token 0 go |
/// | `keys`, `values` | `[first_token + tokens, kv_heads, head_words]` | written |
///
/// Arithmetic is f32, rounded once; the angle is the position times the frequency, rounded to f32 as PyTorch does. Values are copied.
///
/// # Mapping
/// `warps_of_token` warps have a token and take its heads in [`groups`]: a lane has word `w` of a head and word `w + head_words / 2`, which
/// turn together, and the same `w` of every group, so that it works out its sines once.
///
/// # What bounds it
/// On an H100: of few tokens the chain from load to norm to store, 2.6 us; of 8,192 memory, 0.93 of a copy's bandwidth with 72 registers.
///
/// # Launch
/// [`grid`](crate::abi::model::rotate::grid) blocks of [`BLOCK`] threads for `tokens * warps_of_token` warps; no shared memory.
///
/// # Safety
/// The views have the shapes above.
#[kernel(collectives(shuffle = 3))]
pub unsafe fn rotate(
    projected: Global<U32x4>,
    tokens: u32,
    query_heads: u32,
    kv_heads: u32,
    head_words: u32,
    entries: Global<U32x4>,
    decodes: u32,
    first_position: u32,
    frequencies: Global<U32x4>,
    factor: f32,
    query_norm: Global<U32x4>,
    key_norm: Global<U32x4>,
    norms: u32,
    eps: f32,
    warps_of_token: u32,
    queries: GlobalMut<U32x4>,
    first_token: u32,
    keys: GlobalMut<U32x4>,
    values: GlobalMut<U32x4>,
) {
    let warp = thread::block_idx_x() * (BLOCK / WARP) + thread::thread_idx_x() / WARP;
    let (token, first_group) = (warp / warps_of_token, warp % warps_of_token);
    if token >= tokens {
        return;
    }
    let position = if decodes != 0 {
        let held = entries.load(token as usize * ENTRY_WORDS).x;
        if held == 0 {
            return;
        }
        held - 1
    } else {
        first_position + token
    };

    let half = head_words / 2;
    let word = warp::lane_id() % half;
    let (low, high) = (word as usize, (word + half) as usize);
    let heads = query_heads + 2 * kv_heads;
    let width = |heads: u32| (heads * head_words) as usize;
    let projected = projected.rows(width(heads)).row(token as usize);
    let (row, kv_row) = (token as usize, first_token as usize + token as usize);
    let queries = queries.rows(width(query_heads)).row(row);
    let (keys, values) = (keys.rows(width(kv_heads)).row(kv_row), values.rows(width(kv_heads)).row(kv_row));
    let turn = Turn::new(position, frequencies, low, factor);

    let mut group = first_group;
    while group < groups(heads, head_words) {
        let head = group * group_heads(head_words) + warp::lane_id() / half;
        let place = (head * head_words) as usize;
        let (mut a, mut b) = (U32x4::default(), U32x4::default());
        if head < heads {
            a = projected.load_with(place + low, LoadCache::ReadOnlyOnce);
            b = projected.load_with(place + high, LoadCache::ReadOnlyOnce);
        }
        let (is_query, turns) = (head < query_heads, head < query_heads + kv_heads);
        let (mut x, mut y) = (eight_of(a), eight_of(b));
        if norms != 0 {
            // All lanes take part in the sum, also those that have a value's head or none.
            let mut sum = 0.0;
            let mut at = 0;
            while at < x.len() {
                sum = fma(y[at], y[at], fma(x[at], x[at], sum));
                at += 1;
            }
            if half == 8 {
                sum += warp_shuffle_xor(FULL_MASK, sum, 4, WARP_SIZE);
            }
            sum += warp_shuffle_xor(FULL_MASK, sum, 2, WARP_SIZE);
            sum += warp_shuffle_xor(FULL_MASK, sum, 1, WARP_SIZE);
            let scale = rsqrt_approx(sum / (head_words * 8) as f32 + eps);
            if turns {
                let weights = if is_query { query_norm } else { key_norm };
                x = scaled(x, scale, weights, low);
                y = scaled(y, scale, weights, high);
            }
        }
        if turns {
            let (a, b) = turn.apply(x, y);
            let (heads, place) = if is_query { (queries, place) } else { (keys, place - width(query_heads)) };
            heads.store(place + low, a);
            heads.store(place + high, b);
        } else if head < heads {
            let place = place - width(query_heads + kv_heads);
            values.store(place + low, a);
            values.store(place + high, b);
        }
        group += warps_of_token;
    }
}

#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
unsafe fn scaled(x: [f32; 8], scale: f32, weights: Global<U32x4>, at: usize) -> [f32; 8] {
    let weights = eight_at(weights, at);
    let mut scaled = [0.0; 8];
    let mut at = 0;
    while at < scaled.len() {
        scaled[at] = x[at] * scale * weights[at];
        at += 1;
    }
    scaled
}
