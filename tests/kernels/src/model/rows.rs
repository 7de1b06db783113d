//! Cases of `embed`, `rms_norm` and `swiglu`.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{POISON, POISON_F32, compare, floats, halves, number, of_bits, to_halves, to_words};
use crate::{WILD, pick};

/// A launch of `embed`.
#[derive(Debug)]
pub struct EmbedCase {
    /// `[tokens]`: some are none of the vocabulary's.
    pub ids: Vec<u32>,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Elements of a row.
    pub hidden: usize,
    embedding: Vec<u16>,
}

impl EmbedCase {
    /// The case of a seed.
    pub fn random(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let hidden = pick(&mut rng, &[8, 64, 1016, 1024, 1032, 2056]);
        let vocab = rng.random_range(1..20_usize);
        let ids = (0..rng.random_range(1..5)).map(|_| match rng.random_range(0..6) {
            0 => WILD,
            1 => vocab as u32,
            _ => rng.random_range(0..vocab as u32),
        });
        let ids = ids.collect();
        Self { ids, vocab, hidden, embedding: halves(&mut rng, vocab * hidden) }
    }

    /// `[vocab, hidden]` bf16.
    pub fn embedding(&self) -> Vec<u128> {
        to_words(&self.embedding)
    }

    /// The residual before, with a row that is nobody's.
    pub fn residual(&self) -> Vec<f32> {
        vec![POISON_F32; (self.ids.len() + 1) * self.hidden]
    }

    /// Whether the residual is the tokens' rows.
    ///
    /// # Errors
    /// The first element that is not.
    pub fn check(&self, residual: &[f32]) -> Result<(), String> {
        let (rows, beyond) = residual.split_at(self.ids.len() * self.hidden);
        for (at, found) in rows.iter().enumerate() {
            let (token, element) = (at / self.hidden, at % self.hidden);
            let id = self.ids[token] as usize;
            let expected =
                if id < self.vocab { of_bits(self.embedding[id * self.hidden + element]) } else { 0.0 };
            if f64::from(*found) != expected {
                return Err(format!("token {token}, {element}: {found} where {expected} was expected"));
            }
        }
        if beyond.iter().any(|element| element.to_bits() != POISON_F32.to_bits()) {
            return Err("the row after the last token was written".to_owned());
        }
        Ok(())
    }
}

/// A launch of `rms_norm`.
#[derive(Debug)]
pub struct RmsNormCase {
    /// `[first_token + tokens, hidden]`: NaN before the first.
    pub residual: Vec<f32>,
    /// `[hidden]`.
    pub weight: Vec<f32>,
    /// Where it begins.
    pub first_token: usize,
    /// Rows to norm.
    pub tokens: usize,
    /// Added to the mean square.
    pub eps: f32,
}

impl RmsNormCase {
    /// The case of a seed.
    pub fn random(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let hidden = pick(&mut rng, &[8, 24, 128, 2040, 2048, 2056, 5120, 8192, 8200, 10_248]);
        let (first_token, tokens) = (rng.random_range(0..3), rng.random_range(1..4));
        let eps = pick(&mut rng, &[1e-6, 1e-5, 1.0]);
        let mut residual = vec![f32::NAN; first_token * hidden];
        for _ in 0..tokens {
            // A row of zeroes is divided by the root of eps alone.
            let scale = pick(&mut rng, &[0.0, 1e-3, 1.0, 300.0]);
            residual.extend((0..hidden).map(|_| scale * number(&mut rng)));
        }
        Self { residual, weight: floats(&mut rng, hidden), first_token, tokens, eps }
    }

    /// Elements of a row.
    pub fn hidden(&self) -> usize {
        self.weight.len()
    }

    /// `[tokens, hidden]` bf16 before, with a row that is nobody's.
    pub fn normed(&self) -> Vec<u128> {
        vec![POISON; (self.tokens + 1) * self.hidden() / 8]
    }

    /// Whether the rows are normed.
    ///
    /// # Errors
    /// The first element that is not.
    pub fn check(&self, normed: &[u128]) -> Result<(), String> {
        let hidden = self.hidden();
        let normed = to_halves(normed);
        for token in 0..self.tokens {
            let row: Vec<f64> = self.residual[(self.first_token + token) * hidden..][..hidden]
                .iter()
                .map(|x| f64::from(*x))
                .collect();
            let mean = row.iter().map(|x| x * x).sum::<f64>() / hidden as f64;
            let root = (mean + f64::from(self.eps)).sqrt();
            for element in 0..hidden {
                let expected = row[element] / root * f64::from(self.weight[element]);
                let place = format!("token {token}, {element}");
                compare(&place, normed[token * hidden + element], expected, 2e-6 * expected.abs() + 1e-37)?;
            }
        }
        super::untouched("the row after the last token", &normed[self.tokens * hidden..])
    }
}

/// A launch of `swiglu`.
#[derive(Debug)]
pub struct SwigluCase {
    /// Rows.
    pub tokens: usize,
    /// Elements of a row.
    pub width: usize,
    /// `[tokens, 2, width]` bf16.
    gate_up: Vec<u16>,
}

impl SwigluCase {
    /// The case of a seed.
    pub fn random(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let (tokens, width) = (rng.random_range(1..4), pick(&mut rng, &[8, 128, 2040, 2048, 2056, 4104]));
        let mut gate_up = halves(&mut rng, tokens * 2 * width);
        // Gates far out, where the exponential over- and underflows.
        for gate in [-200.0, -88.5, -87.0, 88.5, 200.0, -3e38, 3e38] {
            let at = rng.random_range(0..tokens) * 2 * width + rng.random_range(0..width);
            gate_up[at] = half::bf16::from_f32(gate).to_bits();
        }
        Self { tokens, width, gate_up }
    }

    /// `[tokens, 2, width]` bf16.
    pub fn gate_up(&self) -> Vec<u128> {
        to_words(&self.gate_up)
    }

    /// `[tokens, width]` bf16 before, with a row that is nobody's.
    pub fn activated(&self) -> Vec<u128> {
        vec![POISON; (self.tokens + 1) * self.width / 8]
    }

    /// Whether the rows are activated.
    ///
    /// # Errors
    /// The first element that is not.
    pub fn check(&self, activated: &[u128]) -> Result<(), String> {
        let activated = to_halves(activated);
        for (at, found) in activated[..self.tokens * self.width].iter().enumerate() {
            let (token, element) = (at / self.width, at % self.width);
            let row = token * 2 * self.width;
            let (gate, up) =
                (of_bits(self.gate_up[row + element]), of_bits(self.gate_up[row + self.width + element]));
            let expected = gate / (1.0 + (-gate).exp()) * up;
            if expected.abs() > 3.39e38 && !half::bf16::from_bits(*found).is_finite() {
                continue;
            }
            // The exponential's argument is rounded; what is smaller than any normal number may be 0.
            compare(&format!("token {token}, {element}"), *found, expected, 2e-5 * expected.abs() + 1e-34)?;
        }
        super::untouched("the row after the last token", &activated[self.tokens * self.width..])
    }
}
