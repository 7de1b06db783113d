use cuda_std::math::fma;
use cuda_std::prelude::*;
use cuda_std::shared;
use cuda_std::warp::{FULL_MASK, warp_shuffle_xor};

use crate::abi::low_rank::RANK_STEP;
use crate::abi::low_rank::project_keys::{BLOCK, STEP_WORDS, TILE, sums_start};
use crate::abi::{Entry, PageCopy, SEGMENT_KEYS, WARP};
use crate::model::elements::{eight_of, word_of_eight};
use crate::model::turn::Turn;
use crate::unroll::unrolled;

/// Coefficients of the tokens whose pages leave the steady zone: one layer of a decode step. Their keys are turned back, and multiplied with
/// their request's basis. It also lists the pages, for [`rebuild_keys_128`](crate::retrieve::rebuild_keys_128()) to replace their keys by those
/// that every later step reads.
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `entries` | `[batch]` [`Entry`], in words | `leaving_key`, `leaving`, `basis`, `directory`; the steady lists' numbers |
/// | `steady` | of all requests | physical pages, at [`steady_place`](Entry::steady_place) |
/// | `pool` | `[pages, 2, page_tokens, head_words]` words | GPU pages: keys are read |
/// | `kv_heads`, `layer`, `layers` | | |
/// | `head_words` | 8 or 16 | head dim / 8 |
/// | `page_tokens` | at least 1 | |
/// | `frequencies` | `[head_dim / 2]` f32, in words | in radians a position |
/// | `factor` | | 1 / the factor of sines and cosines that keys were turned with |
/// | `bases` | `[bases, layers, kv_heads, head_dim, rank_words]` words | bf16, by [`Entry::basis`] |
/// | `rank_words` | a multiple of 4 | rank / 8 |
/// | `directories` | see [`Entry::directory`] | segment numbers |
/// | `coefficients` | `[segments, layers, 512 * page_tokens, rank_words]` words | written: bf16 |
/// | `copies`, `keys` | `[batch * kv_heads, capacity]` [`PageCopy`], `[batch * kv_heads, capacity]` | written: pages that leave (without a host page), and their keys |
/// | `counts` | `[batch * kv_heads]` | written: how many |
/// | `capacity` | | at least any entry's `leaving` |
///
/// Keys turned back are rounded to bf16, as [`unrotate`](super::unrotate()) has a prompt's; sums are f32 in one order, rounded once.
///
/// # Mapping
/// A block has 32 coefficients of all the tokens of an entry, four tokens at a time, whose keys it turns back into shared memory. Of each word
/// of the basis a thread has 8 coefficients of one channel in 64; lanes of a word are summed by shuffles, and warps in order.
///
/// # Launch
/// [`grid`](crate::abi::low_rank::project_keys::grid) blocks of [`BLOCK`] threads,
/// [`shared_bytes`](crate::abi::low_rank::project_keys::shared_bytes) of shared memory.
///
/// # Safety
/// The views have the shapes above; entries' leaving pages are steady, their keys' segments are in the directories.
#[kernel(collectives(barrier = 2, shuffle = 96))]
pub unsafe fn project_keys(
    entries: Global<U32x4>,
    steady: Global<u32>,
    pool: Global<U32x4>,
    kv_heads: u32,
    layer: u32,
    layers: u32,
    head_words: u32,
    page_tokens: u32,
    frequencies: Global<U32x4>,
    factor: f32,
    bases: Global<U32x4>,
    rank_words: u32,
    directories: Global<u32>,
    coefficients: GlobalMut<U32x4>,
    copies: GlobalMut<PageCopy>,
    keys: GlobalMut<u32>,
    counts: GlobalMut<u32>,
    capacity: u32,
) {
    let steps = rank_words / STEP_WORDS;
    let (index, step) = (thread::block_idx_x() / steps, thread::block_idx_x() % steps);
    let entry = Entry::load(entries, index);
    let pages = if entry.tokens > 0 { entry.leaving } else { 0 };
    let thread = thread::thread_idx_x();
    let page_of =
        |head: u32, key: u32| steady.load(entry.steady_place(layer * kv_heads + head, key) as usize);
    let mut head = if step == 0 { thread } else { kv_heads };
    while head < kv_heads {
        let list = index * kv_heads + head;
        counts.store(list as usize, pages);
        let mut page = 0;
        while page < pages {
            let (at, key) = ((list * capacity + page) as usize, entry.leaving_key + page);
            copies.store(at, PageCopy { host_page: 0, device_page: page_of(head, key) });
            keys.store(at, key);
            page += 1;
        }
        head += BLOCK;
    }
    if pages == 0 {
        return;
    }

    let (width, half) = (kv_heads * head_words * 8, head_words / 2);
    let plain = shared::dynamic::<f32>(0, (TILE * width) as usize);
    let warps = BLOCK / WARP;
    let sums_of_warps =
        shared::dynamic::<f32>(sums_start(width) as usize, (warps * TILE * RANK_STEP) as usize);
    let basis = (entry.basis as usize * layers as usize + layer as usize) * width as usize;
    let basis = bases.slice(basis * rank_words as usize, (width * rank_words) as usize);
    let (word, group) = (thread % STEP_WORDS, thread / STEP_WORDS);
    let tokens = pages * page_tokens;
    let mut first = 0;
    // All threads of the block go the same way.
    while first < tokens {
        // Tokens beyond the last are the last again, and not stored.
        let pairs = kv_heads * half;
        let mut at = thread;
        while at < TILE * pairs {
            let (row, head, word) = (at / pairs, at % pairs / half, at % pairs % half);
            let token = (first + row).min(tokens - 1);
            let (key, token) = (entry.leaving_key + token / page_tokens, token % page_tokens);
            let of_page = page_of(head, key) as usize * 2 * page_tokens as usize;
            let of_token = pool.rows(head_words as usize).row(of_page + token as usize);
            let turn = Turn::new(key * page_tokens + token, frequencies, word as usize, factor);
            let (low, high) = (of_token.load(word as usize), of_token.load((word + half) as usize));
            let (low, high) = turn.undo(eight_of(low), eight_of(high));
            let (low, high) = (eight_of(low), eight_of(high));
            let to = (row * width + 8 * (head * head_words + word)) as usize;
            let mut element = 0;
            while element < 8 {
                plain.store(to + element, low[element]);
                plain.store(to + element + 8 * half as usize, high[element]);
                element += 1;
            }
            at += BLOCK;
        }
        thread::sync_threads();

        let mut sums = [[0.0_f32; 8]; TILE as usize];
        let mut channel = group;
        while channel < width {
            let of_channel = eight_of(basis.load((channel * rank_words + step * STEP_WORDS + word) as usize));
            unrolled!(row < (TILE as usize), {
                let key = plain.load(row * width as usize + channel as usize);
                let mut element = 0;
                while element < 8 {
                    sums[row][element] = fma(key, of_channel[element], sums[row][element]);
                    element += 1;
                }
            });
            channel += BLOCK / STEP_WORDS;
        }
        unrolled!(row < (TILE as usize), {
            let mut element = 0;
            while element < 8 {
                let mut sum = sums[row][element];
                sum += warp_shuffle_xor(FULL_MASK, sum, 4, WARP);
                sum += warp_shuffle_xor(FULL_MASK, sum, 8, WARP);
                sum += warp_shuffle_xor(FULL_MASK, sum, 16, WARP);
                if warp::lane_id() < STEP_WORDS {
                    let at = (thread / WARP * TILE + row as u32) * RANK_STEP + 8 * word;
                    sums_of_warps.store(at as usize + element, sum);
                }
                element += 1;
            }
        });
        thread::sync_threads();

        let row = thread / STEP_WORDS;
        if row < TILE && first + row < tokens {
            let mut all = [0.0; 8];
            let mut element = 0;
            while element < 8 {
                let mut warp = 0;
                while warp < warps {
                    let at = (warp * TILE + row) * RANK_STEP + 8 * word;
                    all[element] += sums_of_warps.load(at as usize + element);
                    warp += 1;
                }
                element += 1;
            }
            let (key, token) = (entry.leaving_key + (first + row) / page_tokens, (first + row) % page_tokens);
            let segment = directories.load((entry.directory + key / SEGMENT_KEYS) as usize);
            let of_segment = segment as usize * layers as usize + layer as usize;
            let of_segment = of_segment * (SEGMENT_KEYS * page_tokens) as usize;
            let at = of_segment + (key % SEGMENT_KEYS * page_tokens + token) as usize;
            let of_token = coefficients.rows(rank_words as usize).row(at);
            of_token.store((step * STEP_WORDS + word) as usize, word_of_eight(all));
        }
        first += TILE;
    }
}
