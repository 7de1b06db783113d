//! Cases of `argmax`.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinkv_kernels::abi::model::argmax::PART;

use crate::pick;
use crate::top_k::scores;

/// A launch of `argmax`.
#[derive(Debug)]
pub struct ArgmaxCase {
    /// `[batch, stride]`: beyond the vocabulary the greatest number there is.
    pub logits: Vec<f32>,
    /// Rows.
    pub batch: usize,
    /// Logits of a row.
    pub vocab: usize,
    /// A multiple of 4.
    pub stride: usize,
}

impl ArgmaxCase {
    /// The case of a seed.
    pub fn random(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let part = PART as usize;
        let vocab = pick(&mut rng, &[1, 3, 4, 257, 1024, part - 1, part, part + 1, 2 * part + 5]);
        Self::sized(&mut rng, vocab)
    }

    /// Rows of Qwen3's vocabulary.
    pub fn large(seed: u64) -> Self {
        Self::sized(&mut ChaCha8Rng::seed_from_u64(seed), 151_936)
    }

    fn sized(rng: &mut impl Rng, vocab: usize) -> Self {
        let (batch, stride) = (rng.random_range(1..4), (vocab + rng.random_range(0..9)).next_multiple_of(4));
        let mut logits = Vec::new();
        for _ in 0..batch {
            let mut row = match rng.random_range(0..6) {
                0 => vec![pick(rng, &[f32::NAN, f32::INFINITY, f32::NEG_INFINITY]); vocab],
                1 => vec![f32::MIN; vocab],
                _ => scores(rng, vocab),
            };
            // Zeroes of both signs are equal, the greatest in some rows.
            if rng.random_bool(0.2) {
                row.iter_mut().for_each(|logit| *logit = -logit.abs());
                let (minus, plus) = (rng.random_range(0..vocab), rng.random_range(0..vocab));
                (row[plus], row[minus]) = (0.0, -0.0);
            }
            logits.extend(row);
            logits.extend(std::iter::repeat_n(f32::MAX, stride - vocab));
        }
        Self { logits, batch, vocab, stride }
    }

    /// Whether each id is that of the row's greatest finite logit.
    ///
    /// # Errors
    /// The first row that differs.
    pub fn check(&self, ids: &[u32]) -> Result<(), String> {
        for (row, found) in ids.iter().enumerate() {
            let mut best: Option<(u32, f32)> = None;
            for (id, &logit) in (0..).zip(&self.logits[row * self.stride..][..self.vocab]) {
                if logit.is_finite() && best.is_none_or(|(_, most)| logit > most) {
                    best = Some((id, logit));
                }
            }
            let expected = best.map_or(u32::MAX, |(id, _)| id);
            if *found != expected {
                return Err(format!("row {row}: id {found} where {expected} was expected"));
            }
        }
        Ok(())
    }
}
