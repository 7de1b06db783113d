use cuda_std::prelude::*;

use crate::abi::WARP;
use crate::abi::low_rank::unrotate::BLOCK;
use crate::model::elements::eight_of;
use crate::model::turn::Turn;

/// Turns keys back to what they were before their rotary embedding: the inverse of [`rotate`](crate::model::rotate()) but for rounding.
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `keys` | `[tokens, kv_heads, head_words]` words | bf16, rotated |
/// | `tokens`, `kv_heads` | | |
/// | `head_words` | 8 or 16 | head dim / 8 |
/// | `first_position` | | token 0's position, which the others follow |
/// | `frequencies` | `[head_dim / 2]` f32, in words | in radians a position |
/// | `factor` | | 1 / the factor of sines and cosines that they were turned with |
/// | `plain` | `[tokens, kv_heads, head_words]` words | written |
///
/// Arithmetic is f32, rounded once.
///
/// # Mapping
/// A warp has a token: a lane has word `w` of a head and word `w + head_words / 2`, which turn together, and the same `w` of every group of
/// heads, so that it works out its sines once.
///
/// # Launch
/// [`grid`](crate::abi::low_rank::unrotate::grid) blocks of [`BLOCK`] threads; no shared memory.
///
/// # Safety
/// The views have the shapes above; nothing writes `keys` until the launch has ended.
#[kernel]
pub unsafe fn unrotate(
    keys: Global<U32x4>,
    tokens: u32,
    kv_heads: u32,
    head_words: u32,
    first_position: u32,
    frequencies: Global<U32x4>,
    factor: f32,
    plain: GlobalMut<U32x4>,
) {
    let token = thread::block_idx_x() * (BLOCK / WARP) + thread::thread_idx_x() / WARP;
    if token >= tokens {
        return;
    }
    let half = head_words / 2;
    let (of_group, word) = (warp::lane_id() / half, warp::lane_id() % half);
    let width = (kv_heads * head_words) as usize;
    let (keys, plain) = (keys.rows(width).row(token as usize), plain.rows(width).row(token as usize));
    let turn = Turn::new(first_position + token, frequencies, word as usize, factor);
    let mut head = of_group;
    while head < kv_heads {
        let low = (head * head_words + word) as usize;
        let high = low + half as usize;
        let a = keys.load_with(low, LoadCache::ReadOnlyOnce);
        let b = keys.load_with(high, LoadCache::ReadOnlyOnce);
        let (a, b) = turn.undo(eight_of(a), eight_of(b));
        plain.store(low, a);
        plain.store(high, b);
        head += WARP / half;
    }
}
