use multiversion::multiversion;
use rayon::prelude::*;

use super::linalg::{Matrix, MatrixMut, Old, matmul};
use super::math::{exp, exp_sum, max};
use crate::KvShape;
use crate::backend::PromptChunk;

/// Queries of a tile, before they are multiplied by the group.
const TILE_QUERIES: usize = 64;
/// Keys of a tile: 256 to 1024 were tried, at 32 to 128 queries; this was the fastest.
const TILE_KEYS: usize = 512;

/// Bytes that each thread of [`attend_prompt`] works in.
pub fn attend_prompt_scratch(shape: &KvShape) -> usize {
    let tile = TILE_QUERIES * shape.group() * (2 * shape.head_dim + TILE_KEYS);
    let collected = TILE_QUERIES * shape.query_heads * shape.head_dim;
    (tile + collected) * size_of::<f32>()
}

/// Dense causal attention of a run of a prompt's queries, by tiles with an online softmax.
///
/// `queries` and `out` are `[chunk.tokens, query_heads, head_dim]`, `keys` and `values` `[chunk.context,
/// kv_heads, head_dim]`. The query at position `p` sees tokens `0..=p`. Work is spread over rayon's threads by
/// (tile, KV head).
pub fn attend_prompt(
    shape: &KvShape,
    chunk: &PromptChunk,
    queries: &[f32],
    keys: &[f32],
    values: &[f32],
    out: &mut [f32],
) {
    let width = shape.query_heads * shape.head_dim;
    let tile_width = TILE_QUERIES * width;
    let group_width = shape.group() * shape.head_dim;
    queries.par_chunks(tile_width).zip(out.par_chunks_mut(tile_width)).enumerate().for_each(
        |(tile, (queries, out))| {
            let first = chunk.first + tile * TILE_QUERIES;
            let heads: Vec<_> = (0..shape.kv_heads)
                .into_par_iter()
                .map(|kv_head| attend_tile(shape, first, kv_head, queries, keys, values))
                .collect();
            for (kv_head, head_out) in heads.iter().enumerate() {
                for (out, head_out) in out.chunks_exact_mut(width).zip(head_out.chunks_exact(group_width)) {
                    out[kv_head * group_width..][..group_width].copy_from_slice(head_out);
                }
            }
        },
    );
}

/// One tile of queries, the first at position `first`, against one KV head: `[queries, group, head_dim]`.
fn attend_tile(
    shape: &KvShape,
    first: usize,
    kv_head: usize,
    queries: &[f32],
    keys: &[f32],
    values: &[f32],
) -> Vec<f32> {
    let KvShape { query_heads, kv_heads, head_dim, .. } = *shape;
    let (group, stride) = (shape.group(), kv_heads * head_dim);
    let count = queries.len() / (query_heads * head_dim);
    let rows = count * group;
    let scale = 1.0 / (head_dim as f32).sqrt();

    let mut scaled = Vec::with_capacity(rows * head_dim);
    for query in queries.chunks_exact(query_heads * head_dim) {
        let heads = &query[kv_head * group * head_dim..][..group * head_dim];
        scaled.extend(heads.iter().map(|element| element * scale));
    }

    let mut out = vec![0.0; rows * head_dim];
    let mut scores = vec![0.0; rows * TILE_KEYS];
    let mut softmax = vec![OnlineSoftmax::default(); rows];
    let visible = first + count;
    for start in (0..visible).step_by(TILE_KEYS) {
        let tile = TILE_KEYS.min(visible - start);
        let keys = Matrix::new(&keys[start * stride + kv_head * head_dim..], tile, head_dim, stride);
        let values = Matrix::new(&values[start * stride + kv_head * head_dim..], tile, head_dim, stride);
        matmul(
            MatrixMut::new(&mut scores, rows, tile, TILE_KEYS),
            Old::Replace,
            Matrix::new(&scaled, rows, head_dim, head_dim),
            keys.transposed(),
            false,
        );
        weigh(&mut scores, tile, group, first as isize - start as isize, &mut softmax, &mut out);
        matmul(
            MatrixMut::new(&mut out, rows, head_dim, head_dim),
            Old::Add,
            Matrix::new(&scores, rows, tile, TILE_KEYS),
            values,
            false,
        );
    }
    for (out, softmax) in out.chunks_exact_mut(head_dim).zip(&softmax) {
        out.iter_mut().for_each(|element| *element /= softmax.sum);
    }
    out
}

#[derive(Clone)]
struct OnlineSoftmax {
    highest: f32,
    sum: f32,
}

impl Default for OnlineSoftmax {
    fn default() -> Self {
        Self { highest: f32::NEG_INFINITY, sum: 0.0 }
    }
}

/// Turns a tile of scores, `[rows, tile]` at stride [`TILE_KEYS`], into weights relative to each row's highest
/// score so far, and scales what `out` holds to the same. The row of query `i` sees `offset + i + 1` keys of
/// the tile; the first tile shows each row at least one, so no row's highest stays infinite.
#[multiversion(targets("x86_64+avx2+fma"))]
fn weigh(
    scores: &mut [f32],
    tile: usize,
    group: usize,
    offset: isize,
    softmax: &mut [OnlineSoftmax],
    out: &mut [f32],
) {
    let head_dim = out.len() / softmax.len();
    let rows = scores.chunks_exact_mut(TILE_KEYS).zip(softmax).zip(out.chunks_exact_mut(head_dim));
    for (index, ((scores, softmax), out)) in rows.enumerate() {
        let visible = (offset + (index / group) as isize + 1).clamp(0, tile as isize) as usize;
        scores[visible..tile].fill(0.0);
        let scores = &mut scores[..visible];
        let highest = softmax.highest.max(max(scores));
        let factor = exp(softmax.highest - highest);
        if factor != 1.0 {
            out.iter_mut().for_each(|element| *element *= factor);
        }
        softmax.sum = softmax.sum * factor + exp_sum(scores, highest);
        softmax.highest = highest;
    }
}
