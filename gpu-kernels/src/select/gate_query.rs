use cuda_std::prelude::*;

use crate::abi::{Entry, WORD_ELEMENTS};
use crate::chain::chain;
use crate::gate::{Gate, Scratch, TurnBack};
use crate::model::elements::{eight_of, word_of_quad};
use crate::unroll::unrolled;

/// The gate query of each row of a decode step, one layer (SeerAttention-R, arXiv 2506.08889): the group's queries are turned back at the
/// newest token's position, projected as one vector, normed if there are norms, and turned again. [`score`](super::score()) with a group of 1 takes it
/// from there.
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `entries` | `[batch]` [`Entry`] in words | a query's position is its entry's last; of an entry without tokens nothing is read or written |
/// | `queries` | `[batch, kv_heads * group, head_words]` words | bf16 |
/// | `first_row` | layer * `kv_heads` | row of KV head 0 |
/// | `kv_heads` | at least 1 | |
/// | `group` | 1 to 16 | query heads of a KV head |
/// | `head_words` | 8 or 16 | head dim / 8 |
/// | `frequencies`, `shrink`, `rank`, `norm`, `norms`, `eps`, `gate_frequencies`, `gate_magnitude` | | as for [`gate_key`](crate::index::gate_key()) |
/// | `weights` | `[request_rows, group * head_words, rank]` words | bf16: of the eight inputs of a word to one output |
/// | `gate_queries` | `[batch * kv_heads, rank / 8]` words | bf16 |
///
/// Arithmetic is f32, rounded once.
///
/// # Mapping
/// A block has a KV head of an entry: a thread turns a word of each half of a query head, then it has an output, and every so many-th word of its
/// inputs.
///
/// # Launch
/// `batch * kv_heads` blocks of [`BLOCK`](crate::abi::gate::BLOCK) threads, with [`SHARED_BYTES`](crate::abi::gate::SHARED_BYTES) of shared memory.
///
/// # Safety
/// The views have the shapes above; positions are below 2^20, and so are their angles.
#[kernel(collectives(barrier = 4, shuffle = 5))]
pub unsafe fn gate_query(
    entries: Global<U32x4>,
    queries: Global<U32x4>,
    first_row: u32,
    kv_heads: u32,
    group: u32,
    head_words: u32,
    frequencies: Global<f32>,
    shrink: f32,
    weights: Global<U32x4>,
    rank: u32,
    norm: Global<f32>,
    norms: u32,
    eps: f32,
    gate_frequencies: Global<f32>,
    gate_magnitude: f32,
    gate_queries: GlobalMut<U32x4>,
) {
    chain();
    let row = thread::block_idx_x();
    let (entry, head) = (Entry::load(entries, row / kv_heads), row % kv_heads);
    if entry.tokens == 0 {
        return;
    }
    let (position, back) = (entry.tokens - 1, TurnBack { frequencies, shrink });
    let inputs = Scratch::inputs();
    let (words, half) = (group * head_words, head_words / 2);
    let queries = queries.rows(words as usize).row(row as usize);
    let at = thread::thread_idx_x();
    // Of the widest group half the threads.
    if at < words / 2 {
        let (low, word) = (at / half * head_words + at % half, at % half);
        let (mut x, mut y) =
            (eight_of(queries.load(low as usize)), eight_of(queries.load((low + half) as usize)));
        unrolled!(at < WORD_ELEMENTS, {
            let frequency = back.frequencies.load(word as usize * WORD_ELEMENTS + at);
            (x[at], y[at]) = back.pair(frequency, position, x[at], y[at]);
        });
        let [a, b, c, d, e, f, g, h] = x;
        inputs.store(2 * low as usize, word_of_quad([a, b, c, d]));
        inputs.store(2 * low as usize + 1, word_of_quad([e, f, g, h]));
        let [a, b, c, d, e, f, g, h] = y;
        inputs.store(2 * (low + half) as usize, word_of_quad([a, b, c, d]));
        inputs.store(2 * (low + half) as usize + 1, word_of_quad([e, f, g, h]));
    }
    let gate = Gate {
        weights: weights.rows((words * rank) as usize).row((first_row + head) as usize),
        input_words: words,
        rank,
        norm,
        layer: first_row / kv_heads,
        norms: norms != 0,
        eps,
        frequencies: gate_frequencies,
        magnitude: gate_magnitude,
    };
    gate.apply(position, gate_queries.rows((rank / 8) as usize).row(row as usize));
}
