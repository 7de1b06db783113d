//! Random tensors of one request, and dense attention to compare with.

use half::bf16;
use spinkv::KvShape;

/// Queries `[layers][tokens, query_heads, head_dim]`, keys and values `[layers][tokens, kv_heads, head_dim]`; all of them bf16 numbers.
pub struct Sequence {
    pub shape: KvShape,
    pub queries: Vec<Vec<f32>>,
    pub keys: Vec<Vec<f32>>,
    pub values: Vec<Vec<f32>>,
}

impl Sequence {
    pub fn random(shape: KvShape, tokens: usize, seed: u64) -> Self {
        let mut state = seed;
        let mut layers = |heads: usize| -> Vec<Vec<f32>> {
            let mut next = || {
                // SplitMix64; a sum of two is nearer to a normal distribution.
                let mut uniform = || {
                    state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
                    let mixed = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                    let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
                    (mixed >> 40) as f32 / (1 << 23) as f32 - 1.0
                };
                bf16::from_f32(uniform() + uniform()).to_f32()
            };
            (0..shape.layers)
                .map(|_| (0..tokens * heads * shape.head_dim).map(|_| next()).collect())
                .collect()
        };
        Self {
            shape,
            queries: layers(shape.query_heads),
            keys: layers(shape.kv_heads),
            values: layers(shape.kv_heads),
        }
    }

    /// The elements of tokens `tokens` of a layer's tensor.
    pub fn part(&self, tensor: &[Vec<f32>], layer: usize, tokens: std::ops::Range<usize>) -> Vec<f32> {
        let width =
            tensor[layer].len() / (self.keys[layer].len() / (self.shape.kv_heads * self.shape.head_dim));
        tensor[layer][tokens.start * width..tokens.end * width].to_vec()
    }

    /// Dense attention of token `token`, in f64.
    pub fn dense(&self, layer: usize, token: usize) -> Vec<f32> {
        let KvShape { query_heads, kv_heads, head_dim, .. } = self.shape;
        let (queries, keys, values) = (&self.queries[layer], &self.keys[layer], &self.values[layer]);
        let mut out = Vec::new();
        for head in 0..query_heads {
            let query = &queries[(token * query_heads + head) * head_dim..][..head_dim];
            let row = |at: usize| (at * kv_heads + head / self.shape.group()) * head_dim;
            let dot = |at: usize| -> f64 {
                query.iter().zip(&keys[row(at)..]).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
            };
            let logits: Vec<f64> = (0..=token).map(|at| dot(at) / (head_dim as f64).sqrt()).collect();
            let greatest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = logits.iter().map(|logit| (logit - greatest).exp()).collect();
            let sum: f64 = weights.iter().sum();
            out.extend((0..head_dim).map(|channel| {
                let products = weights
                    .iter()
                    .enumerate()
                    .map(|(at, weight)| weight * f64::from(values[row(at) + channel]));
                (products.sum::<f64>() / sum) as f32
            }));
        }
        out
    }
}

/// The greatest difference of two outputs.
pub fn apart(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}
