use cuda_std::prelude::*;
use cuda_std::shared;

use super::order::{Keys, Scratch, Span, Walk, clear_bins, descend, key_of, list};
use crate::abi::select::{KEYS_A_QUAD, MASKED_KEY};

/// The `k` greatest scores of each row, exactly: ids ascending, of equal scores the lower ids.
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `scores` | `[rows, stride]` f32, as words of 16 bytes | any numbers; they compare as `f32::total_cmp` does, save that the outermost two NaN patterns of each sign count as one |
/// | `counts` | `[rows]`, at most `stride` | scores of a row; what follows them is not looked at |
/// | `k` | `[rows]`: ids wanted; more than `capacity` counts as `capacity` | |
/// | `stride` | a multiple of 4 | |
/// | `resident` | a multiple of 4 | scores that the launch's shared memory has room for |
/// | `keys` | `[rows, stride]` u32 if `resident` is below `stride`, else anything | scratch of rows that are longer than `resident` |
/// | `capacity` | | ids that `ids` has room for in a row |
/// | `ids` | `[rows, capacity]` | the first `min(k, capacity, count)` of a row |
/// | `selected` | `[rows]` | how many they are |
///
/// # Mapping
/// A block has a row. It reads the scores once, turns them into keys, counts the keys by the highest 11 bits of their distance from the least, finds the bin in
/// which the `k`-th lies, and goes on within that bin by the bits that follow, 11 at a time, if it does not take all of it; then it lists what lies above the
/// least key taken, and as many ties as are left.
///
/// # Launch
/// `rows` blocks of [`block`](crate::abi::select::block) threads, with [`shared_bytes`](crate::abi::select::shared_bytes) of shared memory.
///
/// # Safety
/// The views have the shapes above.
#[kernel(collectives(barrier = 7, reduce = 6, shuffle = 36))]
pub unsafe fn top_k(
    scores: Global<U32x4>,
    counts: Global<u32>,
    k: Global<u32>,
    stride: u32,
    resident: u32,
    keys: GlobalMut<U32x4>,
    capacity: u32,
    ids: GlobalMut<u32>,
    selected: GlobalMut<u32>,
) {
    let row = thread::block_idx_x() as usize;
    let (count, k) = (counts.load(row), k.load(row).min(capacity));
    let row_quads = (stride / KEYS_A_QUAD) as usize;
    let scores = scores.rows(row_quads).row(row);
    let quads = count.div_ceil(KEYS_A_QUAD);
    let resident_here = count <= resident;
    let keys = Keys {
        shared: shared::dynamic(Scratch::BYTES, (resident / KEYS_A_QUAD) as usize),
        global: if resident_here { keys } else { keys.rows(row_quads).row(row) },
        resident: resident_here,
        quads,
    };
    clear_bins();

    let load = |quad: u32| {
        if quad < quads { scores.load_with(quad as usize, LoadCache::ReadOnlyOnce) } else { U32x4::default() }
    };
    let mut span = Span::NONE;
    let mut take = |quad: u32, word: U32x4| {
        if quad < quads {
            let scores = word.to_array();
            let mut four = [MASKED_KEY; KEYS_A_QUAD as usize];
            let mut at = 0;
            while at < four.len() {
                if quad * KEYS_A_QUAD + (at as u32) < count {
                    four[at] = key_of(f32::from_bits(scores[at]));
                }
                span = span.with(four[at]);
                at += 1;
            }
            keys.store(quad, four);
        }
    };
    // Four words of a thread are in flight: a block alone on its processor lives by them. Spelled out, since LLVM would not
    // unroll a loop of this size and keep the words in local memory.
    let (mut quad, block) = (thread::thread_idx_x(), thread::block_dim_x());
    while quad < quads {
        let words = [load(quad), load(quad + block), load(quad + 2 * block), load(quad + 3 * block)];
        take(quad, words[0]);
        take(quad + block, words[1]);
        take(quad + 2 * block, words[2]);
        take(quad + 3 * block, words[3]);
        quad += 4 * block;
    }

    let threshold = descend::<true>(&keys, span.of_block(), k, |_| 1);
    let ids = ids.rows(capacity as usize).row(row);
    let (listed, _) = list(&keys, threshold, Walk::NONE, 0, ids);
    if thread::thread_idx_x() == 0 {
        selected.store(row, listed);
    }
}
