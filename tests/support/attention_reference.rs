//! Attention by its definition, in `f64` and plain loops. Nothing here calls the crate under test; of
//! [`KvShape`] only the numbers are read.

use spinkv::KvShape;

/// Attention of one token's queries, `[query_heads, head_dim]`, over the tokens `seen[kv_head]` of `keys` and
/// `values`, `[tokens, kv_heads, head_dim]`. A token listed twice counts twice.
pub fn attention_over(
    shape: &KvShape,
    queries: &[f32],
    keys: &[f32],
    values: &[f32],
    seen: &[Vec<usize>],
) -> Vec<f64> {
    let KvShape { query_heads, kv_heads, head_dim, .. } = *shape;
    let mut out = Vec::with_capacity(query_heads * head_dim);
    for head in 0..query_heads {
        let kv_head = head / (query_heads / kv_heads);
        let at = |token: usize, element: usize| (token * kv_heads + kv_head) * head_dim + element;
        let mut logits = Vec::new();
        for &token in &seen[kv_head] {
            let mut sum = 0.0;
            for element in 0..head_dim {
                sum += f64::from(queries[head * head_dim + element]) * f64::from(keys[at(token, element)]);
            }
            logits.push(sum / (head_dim as f64).sqrt());
        }
        let highest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = logits.iter().map(|logit| (logit - highest).exp()).collect();
        let total: f64 = weights.iter().sum();
        for element in 0..head_dim {
            let mut sum = 0.0;
            for (&token, weight) in seen[kv_head].iter().zip(&weights) {
                sum += weight * f64::from(values[at(token, element)]);
            }
            out.push(sum / total);
        }
    }
    out
}

/// Causal attention of the tokens `first..`, as many as `queries` holds: `[tokens, query_heads, head_dim]`. The
/// token at position `p` sees `0..=p` of `keys` and `values`.
pub fn dense_reference(
    shape: &KvShape,
    first: usize,
    queries: &[f32],
    keys: &[f32],
    values: &[f32],
) -> Vec<f64> {
    let mut out = Vec::with_capacity(queries.len());
    for (index, query) in queries.chunks(shape.query_heads * shape.head_dim).enumerate() {
        let seen = vec![(0..=first + index).collect(); shape.kv_heads];
        out.extend(attention_over(shape, query, keys, values, &seen));
    }
    out
}

/// Holds if `found` has the length of `expected` and each element lies within `tolerance` of it; else says where
/// it is furthest off. A NaN is never close.
pub fn close(found: &[f32], expected: &[f64], tolerance: f64) -> Result<(), String> {
    if found.len() != expected.len() {
        return Err(format!("{} elements where {} were expected", found.len(), expected.len()));
    }
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        let off = (f64::from(*found) - expected).abs();
        if off.is_nan() || off > tolerance {
            return Err(format!("element {index} is {found}, expected {expected}: off by {off:e}"));
        }
    }
    Ok(())
}
