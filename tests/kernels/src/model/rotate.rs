//! Cases of `rotate`.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinkv_kernels::abi::Entry;
use spinkv_kernels::abi::model::rotate;

use super::{POISON, compare, floats, halves, of_bits, to_halves, to_words};
use crate::{pick, wild_entry};

/// A launch of `rotate`, for a decode step or a chunk of a prompt.
#[derive(Debug)]
pub struct RotateCase {
    /// `[tokens]` of a decode step; some only fill the batch.
    pub entries: Option<Vec<Entry>>,
    /// Else the position of the first token.
    pub first_position: u32,
    /// Tokens.
    pub tokens: usize,
    /// Heads.
    pub query_heads: usize,
    /// Heads.
    pub kv_heads: usize,
    /// Head dim / 8.
    pub head_words: usize,
    /// `[head_dim / 2]`.
    pub frequencies: Vec<f32>,
    /// Of sines and cosines.
    pub factor: f32,
    /// `[head_dim]` each, of queries and keys.
    pub norms: Option<[Vec<f32>; 2]>,
    /// Added to the mean square.
    pub eps: f32,
    /// Warps that share a token.
    pub warps_of_token: u32,
    /// Where keys and values go.
    pub first_token: usize,
    projected: Vec<u16>,
}

/// What `rotate` writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rotated {
    /// `[tokens, query_heads, head_words]`.
    pub queries: Vec<u128>,
    /// `[first_token + tokens, kv_heads, head_words]`.
    pub keys: Vec<u128>,
    /// As the keys.
    pub values: Vec<u128>,
}

impl RotateCase {
    /// The case of a seed.
    pub fn random(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let (tokens, head_words) = (rng.random_range(1..5), pick(&mut rng, &[8, 16]));
        let kv_heads = rng.random_range(1..5);
        let query_heads = kv_heads * rng.random_range(1..6);
        let (heads, head_dim) = (query_heads + 2 * kv_heads, 8 * head_words);
        let position = |rng: &mut ChaCha8Rng| match rng.random_range(0..4) {
            0 => rng.random_range(0..4),
            1 => (1 << 20) - rng.random_range(1..9),
            _ => rng.random_range(0..1 << 20),
        };
        let mut projected = halves(&mut rng, tokens * heads * head_dim);
        let entries = rng.random_bool(0.5).then(|| {
            (0..tokens)
                .map(|token| {
                    if rng.random_bool(0.3) {
                        // What is not a token may not show.
                        projected[token * heads * head_dim..][..heads * head_dim].fill(0x7fc1);
                        return wild_entry();
                    }
                    Entry { tokens: position(&mut rng) + 1, ..wild_entry() }
                })
                .collect()
        });
        let theta = pick(&mut rng, &[1e4, 5e5, 1e6_f64]);
        let frequency = |at: usize| theta.powf(-2.0 * at as f64 / head_dim as f64) as f32;
        let groups = rotate::groups(heads as u32, head_words as u32);
        Self {
            entries,
            first_position: position(&mut rng),
            tokens,
            query_heads,
            kv_heads,
            head_words,
            frequencies: (0..head_dim / 2).map(frequency).collect(),
            factor: pick(&mut rng, &[1.0, 1.25]),
            norms: rng.random_bool(0.6).then(|| [floats(&mut rng, head_dim), floats(&mut rng, head_dim)]),
            eps: pick(&mut rng, &[1e-6, 1e-2]),
            warps_of_token: rng.random_range(1..=groups + 1),
            first_token: rng.random_range(0..3),
            projected,
        }
    }

    /// `[tokens, query_heads + 2 * kv_heads, head_words]` bf16.
    pub fn projected(&self) -> Vec<u128> {
        to_words(&self.projected)
    }

    /// The outputs before, with a row that is nobody's.
    pub fn outputs(&self) -> Rotated {
        let rows = |rows: usize, heads: usize| vec![POISON; rows * heads * self.head_words];
        let kv = rows(self.first_token + self.tokens + 1, self.kv_heads);
        Rotated { queries: rows(self.tokens + 1, self.query_heads), keys: kv.clone(), values: kv }
    }

    /// Whether the outputs are right.
    ///
    /// # Errors
    /// The first element that is not.
    pub fn check(&self, found: &Rotated) -> Result<(), String> {
        let Rotated { queries, keys, values } = found;
        let [queries, keys, values] = [queries, keys, values].map(|words| to_halves(words));
        let head_dim = 8 * self.head_words;
        let (query_width, kv_width) = (self.query_heads * head_dim, self.kv_heads * head_dim);
        let first = self.first_token;
        for (what, rows) in [("keys", &keys), ("values", &values)] {
            super::untouched(&format!("{what} before the first"), &rows[..first * kv_width])?;
            super::untouched(&format!("{what} after the last"), &rows[(first + self.tokens) * kv_width..])?;
        }
        super::untouched("queries after the last", &queries[self.tokens * query_width..])?;
        for token in 0..self.tokens {
            let position = match &self.entries {
                Some(entries) => entries[token].tokens.checked_sub(1),
                None => Some(self.first_position + token as u32),
            };
            let rows = [
                ("query", &queries[token * query_width..][..query_width]),
                ("key", &keys[(first + token) * kv_width..][..kv_width]),
                ("value", &values[(first + token) * kv_width..][..kv_width]),
            ];
            let Some(position) = position else {
                for (what, row) in rows {
                    super::untouched(&format!("{what} of empty entry {token}"), row)?;
                }
                continue;
            };
            let mut projected = self.projected[token * (query_width + 2 * kv_width)..].chunks_exact(head_dim);
            for (kind, (what, row)) in rows.into_iter().enumerate() {
                for (head, found) in row.chunks_exact(head_dim).enumerate() {
                    let given = projected.next().expect("a head of the product for each of the outputs");
                    let place = format!("{what} {head} of token {token}");
                    if kind == 2 {
                        if found != given {
                            return Err(format!("{place} is not as it was"));
                        }
                        continue;
                    }
                    let norm = self.norms.as_ref().map(|norms| norms[kind].as_slice());
                    self.check_head(&place, position, norm, given, found)?;
                }
            }
        }
        Ok(())
    }

    fn check_head(
        &self,
        place: &str,
        position: u32,
        norm: Option<&[f32]>,
        given: &[u16],
        found: &[u16],
    ) -> Result<(), String> {
        let mut head: Vec<f64> = given.iter().map(|x| of_bits(*x)).collect();
        if let Some(weight) = norm {
            let mean = head.iter().map(|x| x * x).sum::<f64>() / head.len() as f64;
            let root = (mean + f64::from(self.eps)).sqrt();
            head.iter_mut().zip(weight).for_each(|(x, weight)| *x = *x / root * f64::from(*weight));
        }
        let (x, y) = head.split_at(head.len() / 2);
        for at in 0..x.len() {
            let angle = position as f32 * self.frequencies[at];
            let (sine, cosine) = f64::from(angle).sin_cos();
            let (sine, cosine) = (sine * f64::from(self.factor), cosine * f64::from(self.factor));
            let slack = 2e-6 * (x[at].abs() + y[at].abs()) + 1e-37;
            let place = format!("{place}, {at} and {}", at + x.len());
            compare(&place, found[at], x[at] * cosine - y[at] * sine, slack)?;
            compare(&place, found[at + x.len()], y[at] * cosine + x[at] * sine, slack)?;
        }
        Ok(())
    }
}
