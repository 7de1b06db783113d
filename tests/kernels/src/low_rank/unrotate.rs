use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{check_head, frequencies, normal, numbers_of, turned, words_of};
use crate::{POISON, pick};

/// A launch of `unrotate`.
#[derive(Debug)]
pub struct UnrotateCase {
    /// Tokens.
    pub tokens: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Head dim / 8.
    pub head_words: usize,
    /// Of the first token.
    pub first_position: u32,
    /// `[head_dim / 2]`.
    pub frequencies: Vec<f32>,
    /// That keys were turned with.
    pub magnitude: f32,
    /// `[tokens, kv_heads, head_words]`.
    pub keys: Vec<u128>,
}

impl UnrotateCase {
    /// The case of a seed.
    pub fn random(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let (tokens, kv_heads) = (rng.random_range(1..10), rng.random_range(1..10));
        let head_words = pick(&mut rng, &[8, 16]);
        let elements = tokens * kv_heads * head_words * 8;
        Self {
            tokens,
            kv_heads,
            head_words,
            first_position: pick(&mut rng, &[0, 1, 4095, (1 << 20) - 10]),
            frequencies: frequencies(&mut rng, 8 * head_words),
            magnitude: pick(&mut rng, &[1.0, 1.0, 1.2]),
            keys: words_of(&(0..elements).map(|_| normal(&mut rng)).collect::<Vec<_>>()),
        }
    }

    /// Keys before the launch, with a word behind them.
    pub fn plain(&self) -> Vec<u128> {
        vec![POISON; self.keys.len() + 1]
    }

    /// Whether `plain` are the keys turned back.
    ///
    /// # Errors
    /// The first element that is not.
    pub fn check(&self, plain: &[u128]) -> Result<(), String> {
        if plain[self.keys.len()] != POISON {
            return Err("written beyond the keys".to_owned());
        }
        let (keys, found) = (numbers_of(&self.keys), numbers_of(&plain[..self.keys.len()]));
        let head_dim = 8 * self.head_words;
        for (head, (key, found)) in keys.chunks_exact(head_dim).zip(found.chunks_exact(head_dim)).enumerate()
        {
            let position = self.first_position + (head / self.kv_heads) as u32;
            let key: Vec<f64> = key.iter().map(|element| f64::from(*element)).collect();
            let right = turned(&key, position, true, &self.frequencies, 1.0 / f64::from(self.magnitude));
            check_head(&format!("head {head}"), found, &right)?;
        }
        Ok(())
    }
}
