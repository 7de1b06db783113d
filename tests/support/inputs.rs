use std::ops::Range;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinkv::KvShape;

use crate::attention_over;

/// What a sequence's keys and queries look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// Elements are about normally distributed.
    Random,
    /// Each query points at the key of one earlier token (or its own), which then takes nearly all of the
    /// softmax.
    Peaked,
    /// Keys are so small that all tokens weigh about the same.
    Uniform,
}

impl Style {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Random, Self::Peaked, Self::Uniform];
}

/// The queries, keys and values of one request's tokens in every layer.
#[derive(Clone, Debug)]
pub struct Sequence {
    /// The attention shape.
    pub shape: KvShape,
    /// Tokens of the sequence.
    pub tokens: usize,
    /// `[layers][tokens, query_heads, head_dim]`.
    pub queries: Vec<Vec<f32>>,
    /// `[layers][tokens, kv_heads, head_dim]`.
    pub keys: Vec<Vec<f32>>,
    /// `[layers][tokens, kv_heads, head_dim]`.
    pub values: Vec<Vec<f32>>,
}

impl Sequence {
    /// A sequence of `tokens` tokens; the same arguments give the same sequence.
    pub fn new(shape: KvShape, style: Style, tokens: usize, seed: u64) -> Self {
        let KvShape { layers, query_heads, kv_heads, head_dim } = shape;
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut sequence = Self { shape, tokens, queries: Vec::new(), keys: Vec::new(), values: Vec::new() };
        for _ in 0..layers {
            let scale = if style == Style::Uniform { 1e-3 } else { 1.0 };
            let keys: Vec<f32> =
                (0..tokens * kv_heads * head_dim).map(|_| scale * normal(&mut rng)).collect();
            let mut queries = Vec::with_capacity(tokens * query_heads * head_dim);
            for token in 0..tokens {
                for head in 0..query_heads {
                    let target = rng.random_range(0..=token);
                    let key = (target * kv_heads + head / (query_heads / kv_heads)) * head_dim;
                    for element in 0..head_dim {
                        let noise = normal(&mut rng);
                        queries.push(if style == Style::Peaked { 15.0 * keys[key + element] } else { noise });
                    }
                }
            }
            sequence.values.push((0..keys.len()).map(|_| normal(&mut rng)).collect());
            sequence.keys.push(keys);
            sequence.queries.push(queries);
        }
        sequence
    }

    /// The queries of `tokens` in `layer`.
    pub fn queries(&self, layer: usize, tokens: Range<usize>) -> &[f32] {
        let width = self.shape.query_heads * self.shape.head_dim;
        &self.queries[layer][tokens.start * width..tokens.end * width]
    }

    /// The keys of `tokens` in `layer`.
    pub fn keys(&self, layer: usize, tokens: Range<usize>) -> &[f32] {
        let width = self.shape.kv_heads * self.shape.head_dim;
        &self.keys[layer][tokens.start * width..tokens.end * width]
    }

    /// The values of `tokens` in `layer`.
    pub fn values(&self, layer: usize, tokens: Range<usize>) -> &[f32] {
        let width = self.shape.kv_heads * self.shape.head_dim;
        &self.values[layer][tokens.start * width..tokens.end * width]
    }

    /// By definition, the attention of `token`'s queries in `layer` over the tokens `seen[kv_head]`, none of them
    /// later.
    pub fn attention(&self, layer: usize, token: usize, seen: &[Vec<usize>]) -> Vec<f64> {
        let all = 0..token + 1;
        let (keys, values) = (self.keys(layer, all.clone()), self.values(layer, all));
        attention_over(&self.shape, self.queries(layer, token..token + 1), keys, values, seen)
    }
}

/// About normal, of variance 1: the sum of four uniform numbers.
fn normal(rng: &mut impl Rng) -> f32 {
    let sum: f32 = (0..4).map(|_| rng.random::<f32>() - 0.5).sum();
    sum * 3f32.sqrt()
}
