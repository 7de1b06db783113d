use core::f32::consts::LOG2_E;

use cuda_std::atomic::{Order, Scope};
use cuda_std::copy::{commit_group, wait_group};
use cuda_std::math::{exp2_approx, max};
use cuda_std::prelude::*;
use cuda_std::warp::{FULL_MASK, WARP_SIZE, warp_shuffle_xor, warp_vote_any};
use cuda_std::{bf16, mma, shared};

use super::combine::{OfSplits, OfWarps, Parts, Statistic};
use super::context::Context;
use super::tile;
use crate::abi::attend::{HEADS, STAGES, TILE, WARPS, blocks_of_group, ring_bytes, shared_bytes};
use crate::abi::{Entry, WARP};
use crate::block::is_last;
use crate::softmax::{ceil, shift_of};

/// Attention of a decode step over the pages of its selection and of the steady zone, in place; heads of 128.
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `entries` | `[batch]` [`Entry`] | the requests of the step. The tail begins at page `leaving_key + leaving`, also where nothing leaves |
/// | `kv_heads`, `group` | at least 1; 1 to 16 | KV heads, and query heads of each |
/// | `layer` | | whose steady pages |
/// | `pages` | `[batch * kv_heads, list_capacity]` | physical pages of the selections, as [`resolve`](crate::retrieve::resolve) lists them: full ones; with `awaits` and without `biased` the misses are last |
/// | `page_counts` | `[batch * kv_heads]` | how many; more than `list_capacity` counts as `list_capacity` |
/// | `steady` | see [`Entry::first_steady`] | physical pages of the steady zone |
/// | `biases` | `[batch * kv_heads, list_capacity * page_tokens]` if `biased` is 1, else not read | added to the logits of selected tokens |
/// | `pool` | `[physical pages, 2, page_tokens, head_words]` words | K, then V, bf16 |
/// | `page_tokens` | 8, 16, 32 or 64 | tokens of a page |
/// | `queries` | `[batch, kv_heads * group, head_words]` words | bf16 |
/// | `scale` | | factor of the logits: 1 / sqrt(head dim) |
/// | `copy_counts`, `arrived` | `[batch * kv_heads]` if `awaits` is 1, else not read | pages of the selections that [`gather`](crate::retrieve::gather) is fetching; words of them that are there |
/// | `splits` | at least 1 | blocks that share a row's tokens |
/// | `partials` | `[units, splits,` [`partial_words`](crate::abi::attend::partial_words)`]` words if `splits` is above 1 | scratch |
/// | `arrivals` | `[units]`, 0 before and after, if `splits` is above 1 | scratch |
/// | `outputs` | `[batch, kv_heads * group, head_words]` words | bf16; zeroes where a row has no token |
/// | `lse` | `[batch, kv_heads * group]` | the natural logarithm of the sum of e^logit; negative infinity where a row has no token |
///
/// `units` is `batch * kv_heads *` [`blocks_of_group`]. Nothing is written for an entry that only fills the batch. Products are exact,
/// sums in f32; the weights of V are rounded to bf16 and divided by their own sum.
///
/// With `awaits` it may run beside the [`gather`](crate::retrieve::gather) before it, whose blocks all run by then. Of a selection's pages the last are
/// those that come: a warp waits for its row's misses when it has got that far, and with `biased`, where pages are in another order, before its first
/// tile. It ends after `gather` all the same, so the launch after it may reuse what either read.
///
/// # Mapping
/// A block has up to 8 query heads of a row and, of `splits`, its share of the row's tokens, which lie in a list of pages: sinks,
/// selection, tail. A warp takes tiles of 16 tokens: `tile.rs` says which lane has what. Its ring in shared memory holds [`STAGES`]
/// tiles, of which one is multiplied and the others are on their way. The softmax is that of FlashAttention-2, and outputs are only
/// rescaled when a tile has a logit above all before it, which soon becomes rare. At the end warps, then splits, are put together;
/// the block that comes last does the latter.
///
/// # What bounds it
/// On an H200: memory. 170 registers, 96 KiB of shared memory (heads of 128): two blocks a multiprocessor, of which one is enough. 16
/// requests of 2,048 tokens a head: DRAM 72 % busy over the launch, which is ramp at both ends; dense at 32K it reads as fast as a
/// reduction does. Rows that were not copied end to end cost a third of that, since the L2 hands out lines of 128 bytes.
///
/// # Launch
/// `units * splits` blocks of [`BLOCK`](crate::abi::attend::BLOCK) threads, [`shared_bytes`] of shared memory.
///
/// # Safety
/// The views have the shapes above and hold the pages named; K, V and queries are numbers where a token lies.
#[kernel(collectives(barrier = 7, mma = 18, shuffle = 22, vote = 1))]
pub unsafe fn attend_128(
    entries: Global<U32x4>,
    kv_heads: u32,
    group: u32,
    layer: u32,
    pages: Global<u32>,
    page_counts: Global<u32>,
    list_capacity: u32,
    steady: Global<u32>,
    biases: Global<f32>,
    biased: u32,
    pool: Global<U32x4>,
    page_tokens: u32,
    queries: Global<U32x4>,
    scale: f32,
    copy_counts: Global<u32>,
    arrived: Global<u32>,
    awaits: u32,
    splits: u32,
    partials: GlobalMut<U32x4>,
    arrivals: GlobalMut<u32>,
    outputs: GlobalMut<U32x4>,
    lse: GlobalMut<f32>,
) {
    attend::<16>(Operands {
        entries,
        kv_heads,
        group,
        layer,
        pages,
        page_counts,
        list_capacity,
        steady,
        biases,
        biased,
        pool,
        page_tokens,
        queries,
        scale,
        copy_counts,
        arrived,
        awaits,
        splits,
        partials,
        arrivals,
        outputs,
        lse,
    });
    #[cfg(any(not(target_arch = "nvptx64"), sm_90))]
    thread::wait_dependencies();
}

/// [`attend_128`] for heads of 64.
///
/// # Safety
/// As there.
#[kernel(collectives(barrier = 7, mma = 10, shuffle = 22, vote = 1))]
pub unsafe fn attend_64(
    entries: Global<U32x4>,
    kv_heads: u32,
    group: u32,
    layer: u32,
    pages: Global<u32>,
    page_counts: Global<u32>,
    list_capacity: u32,
    steady: Global<u32>,
    biases: Global<f32>,
    biased: u32,
    pool: Global<U32x4>,
    page_tokens: u32,
    queries: Global<U32x4>,
    scale: f32,
    copy_counts: Global<u32>,
    arrived: Global<u32>,
    awaits: u32,
    splits: u32,
    partials: GlobalMut<U32x4>,
    arrivals: GlobalMut<u32>,
    outputs: GlobalMut<U32x4>,
    lse: GlobalMut<f32>,
) {
    attend::<8>(Operands {
        entries,
        kv_heads,
        group,
        layer,
        pages,
        page_counts,
        list_capacity,
        steady,
        biases,
        biased,
        pool,
        page_tokens,
        queries,
        scale,
        copy_counts,
        arrived,
        awaits,
        splits,
        partials,
        arrivals,
        outputs,
        lse,
    });
    #[cfg(any(not(target_arch = "nvptx64"), sm_90))]
    thread::wait_dependencies();
}

/// Between two looks at what has arrived: counts of all rows lie in a few lines, where `gather`'s own come after whoever looks.
const POLL_NANOSECONDS: u32 = 1000;

/// A launch's parameters.
struct Operands {
    entries: Global<U32x4>,
    kv_heads: u32,
    group: u32,
    layer: u32,
    pages: Global<u32>,
    page_counts: Global<u32>,
    list_capacity: u32,
    steady: Global<u32>,
    biases: Global<f32>,
    biased: u32,
    pool: Global<U32x4>,
    page_tokens: u32,
    queries: Global<U32x4>,
    scale: f32,
    copy_counts: Global<u32>,
    arrived: Global<u32>,
    awaits: u32,
    splits: u32,
    partials: GlobalMut<U32x4>,
    arrivals: GlobalMut<u32>,
    outputs: GlobalMut<U32x4>,
    lse: GlobalMut<f32>,
}

#[inline(always)]
unsafe fn attend<const WORDS: u32>(operands: Operands) {
    let Operands {
        entries,
        kv_heads,
        group,
        layer,
        pages,
        page_counts,
        list_capacity,
        steady,
        biases,
        biased,
        ..
    } = operands;
    let Operands { pool, page_tokens, queries, scale, copy_counts, arrived, awaits, .. } = operands;
    let Operands { splits, partials, arrivals, outputs, lse, .. } = operands;
    let (unit, split) = (thread::block_idx_x() / splits, thread::block_idx_x() % splits);
    let (row, eight) = (unit / blocks_of_group(group), unit % blocks_of_group(group));
    let entry = Entry::load(entries, row / kv_heads);
    if entry.tokens == 0 {
        return;
    }
    let selected = page_counts.load(row as usize).min(list_capacity);
    let context = Context::new(
        entry,
        layer * kv_heads + row % kv_heads,
        steady,
        pages.slice((row * list_capacity) as usize, list_capacity as usize),
        selected,
        page_tokens,
    );
    let page_words = 2 * page_tokens * WORDS;
    let (warp, lane) = (thread::thread_idx_x() / WARP, warp::lane_id());
    let (lane_group, pair) = (lane / 4, lane % 4);
    let of_stage = 2 * tile::lane_words(WORDS) * WARP;
    let stage_at = |stage: u32| {
        let first = (warp * STAGES + stage) * of_stage;
        shared::dynamic::<U32x4>(16 * first as usize, of_stage as usize)
    };

    // This block's tiles; a warp takes every fourth.
    let tiles = context.tokens.div_ceil(TILE);
    let share = tiles.div_ceil(splits);
    let end = tiles.min((split + 1) * share);
    let mut at = split * share + warp;
    let mut asked = at;
    let mut lookup = tile::Lookup::<WARPS>::new(&context, asked);
    // Selected pages that are on their way: the last ones, where the list's order counts for nothing else.
    let coming = if awaits != 0 { copy_counts.load(row as usize).min(selected) } else { 0 };
    let first_coming = if biased != 0 { 0 } else { context.first_of_last(coming) };
    let mut all_here = coming == 0;
    let mut ask = |stage: u32| {
        if asked < end {
            if !all_here && (asked + 1) * TILE > first_coming {
                if lane == 0 {
                    let words = coming * page_words;
                    while arrived.atomic_load(row as usize, Order::Acquire, Scope::Device) < words {
                        thread::nanosleep(POLL_NANOSECONDS);
                    }
                }
                warp::sync_warp(FULL_MASK);
                all_here = true;
            }
            let pages = lookup.next(&context, asked);
            tile::copy::<WORDS>(&context, pool, page_words, asked, pages, stage_at(stage));
        }
        commit_group();
        asked += WARPS;
    };
    let mut stage = 0;
    while stage < STAGES - 1 {
        ask(stage);
        stage += 1;
    }

    let heads = (group - eight * HEADS).min(HEADS);
    let first_head = row * group + eight * HEADS;
    // This lane's words of the query that stands in its column.
    let mut query = [U32x4::default(); 4];
    let mut step = 0;
    while step < WORDS / 4 {
        if lane_group < heads {
            let word = (first_head + lane_group) * WORDS + pair + 4 * step;
            query[step as usize] = queries.load(word as usize);
        }
        step += 1;
    }
    let bias_row = (row * list_capacity) as usize * page_tokens as usize;
    let scale = scale * LOG2_E;

    // Of heads 2 t and 2 t + 1: the greatest logit so far, rounded up and the same in all lanes of the head, and a lane's share of the
    // sums. Logits are in units of log2, so with whole numbers subtracted weights differ by powers of two from one share of the tokens
    // to another, and are rounded to bf16 alike: the result hardly depends on the splits.
    let mut statistics = [Statistic::NONE; 2];
    let mut products = [[0.0_f32; 4]; 8];
    while at < end {
        wait_group::<{ STAGES - 2 }>();
        // All lanes' copies are here then, and nobody reads the stage that is filled next any more.
        warp::sync_warp(FULL_MASK);
        ask(stage);
        stage = if stage + 1 == STAGES { 0 } else { stage + 1 };
        let words = stage_at(stage);
        let mut logits = tile::logits::<WORDS>(words, &query);
        let mut part = 0;
        while part < 4 {
            let token = at * TILE + lane_group + part / 2 * (TILE / 2);
            let logit = &mut logits[part as usize];
            *logit *= scale;
            if biased != 0
                && let Some(selected) = context.selected(token)
            {
                *logit += biases.load(bias_row + selected as usize) * LOG2_E;
            }
            if token >= context.tokens {
                *logit = f32::NEG_INFINITY;
            }
            part += 1;
        }
        let own = [max(logits[0], logits[2]), max(logits[1], logits[3])];
        if warp_vote_any(FULL_MASK, own[0] > statistics[0].greatest || own[1] > statistics[1].greatest) {
            let mut head = 0;
            while head < 2 {
                let statistic = &mut statistics[head];
                let mut greatest = max(own[head], statistic.greatest);
                let mut distance = 4;
                while distance < WARP {
                    greatest = max(greatest, warp_shuffle_xor(FULL_MASK, greatest, distance, WARP_SIZE));
                    distance *= 2;
                }
                greatest = ceil(greatest);
                // Before the first logit there is nothing to rescale.
                let factor = exp2_approx(statistic.greatest - shift_of(greatest));
                statistic.sum *= factor;
                statistic.weights *= factor;
                let mut product = 0;
                while product < 8 {
                    products[product][head] *= factor;
                    products[product][head + 2] *= factor;
                    product += 1;
                }
                statistic.greatest = greatest;
                head += 1;
            }
        }
        let mut exponentials = [0.0; 4];
        let mut part = 0;
        while part < 4 {
            let statistic = &mut statistics[part % 2];
            exponentials[part] = exp2_approx(logits[part] - shift_of(statistic.greatest));
            statistic.sum += exponentials[part];
            part += 1;
        }
        let mut transposed = [0; 2];
        let mut half = 0;
        while half < 2 {
            let weights = bf16::pack(exponentials[2 * half], exponentials[2 * half + 1]);
            let (low, high) = bf16::unpack(weights);
            statistics[0].weights += low;
            statistics[1].weights += high;
            transposed[half] = mma::transpose_8x8(weights);
            half += 1;
        }
        tile::add_values::<WORDS>(words, transposed, &mut products);
        at += WARPS;
    }

    // All copies of all warps were waited for, and what they brought is no longer needed.
    thread::sync_threads();
    let of_warps = OfWarps::<WORDS>::at(ring_bytes(WORDS));
    of_warps.store(statistics, &products);
    thread::sync_threads();
    let outputs = outputs.slice((first_head * WORDS) as usize, (heads * WORDS) as usize);
    let lse = lse.slice(first_head as usize, heads as usize);
    if splits == 1 {
        of_warps.finish::<{ WARPS as usize }>(heads, outputs, lse);
        return;
    }
    let of_splits = OfSplits::<WORDS>::of_unit(partials, unit, splits);
    of_splits.store(split, &of_warps, heads);
    let flag = shared::dynamic((shared_bytes(WORDS) - 16) as usize, 1);
    if is_last(arrivals, unit, splits, flag) {
        of_splits.finish::<8>(heads, outputs, lse);
    }
}
