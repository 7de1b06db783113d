use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinkv::backend::cpu::low_rank::LowRankFactors;

use super::{normal, numbers_of, words_of};
use crate::{POISON, pick};

/// All launches that find a basis.
#[derive(Debug)]
pub struct BasisCase {
    /// Tokens.
    pub tokens: usize,
    /// KV heads times head dimension.
    pub width: usize,
    /// Vectors: a multiple of 32.
    pub rank: usize,
    /// Where it goes among three bases.
    pub place: usize,
    /// `[tokens, width / 8]`.
    pub keys: Vec<u128>,
}

/// A basis in memory, in both layouts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Basis {
    /// `[rank, width / 8]`.
    pub rows: Vec<u128>,
    /// `[3, width, rank / 8]`.
    pub bases: Vec<u128>,
}

impl BasisCase {
    /// The case of a seed: directions of falling weight over noise, fewer of them than the rank, as many, or more; channels that are larger than
    /// others; now and then fewer tokens than the rank.
    pub fn random(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let (tokens, width) = (pick(&mut rng, &[20, 100, 150]), pick(&mut rng, &[64, 72]));
        Self::sized(&mut rng, tokens, width, 32)
    }

    /// A case for a GPU: a layer of 8 KV heads of 128.
    pub fn large(seed: u64) -> Self {
        Self::sized(&mut ChaCha8Rng::seed_from_u64(seed), 3000, 1024, 160)
    }

    fn sized(rng: &mut impl Rng, tokens: usize, width: usize, rank: usize) -> Self {
        let noise = pick(rng, &[0.01, 0.1, 0.5]);
        let fall = pick(rng, &[0.9, 0.97, 0.99_f32]).powf(32.0 / rank as f32);
        let mut keys: Vec<f32> = (0..tokens * width).map(|_| noise * normal(rng)).collect();
        for direction in 0..2 * rank {
            let weight = 20.0 * fall.powi(direction as i32);
            let direction: Vec<f32> =
                (0..width).map(|_| weight * normal(rng) / (width as f32).sqrt()).collect();
            for key in keys.chunks_exact_mut(width) {
                let coefficient = normal(rng);
                key.iter_mut().zip(&direction).for_each(|(element, of)| *element += coefficient * of);
            }
        }
        let (outlier, offset) = (rng.random_range(0..width), pick(rng, &[0.0, 10.0, 100.0]));
        keys.chunks_exact_mut(width).for_each(|key| key[outlier] += offset);
        Self { tokens, width, rank, place: rng.random_range(0..3), keys: words_of(&keys) }
    }

    /// Memory before the launches.
    pub fn basis(&self) -> Basis {
        let words = self.rank * self.width / 8;
        Basis { rows: vec![POISON; words], bases: vec![POISON; 3 * words] }
    }

    /// Whether the keys lose no more in this basis than in the CPU's but for bf16's rounding of it, and both layouts have the same numbers.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(&self, basis: &Basis) -> Result<(), String> {
        let Self { width, rank, .. } = *self;
        let rows = numbers_of(&basis.rows);
        let words = rank * width / 8;
        let own = self.place * words..(self.place + 1) * words;
        let columns = numbers_of(&basis.bases[own.clone()]);
        let transposed = (0..width * rank).all(|at| columns[at] == rows[at % rank * width + at / rank]);
        let elsewhere =
            basis.bases.iter().enumerate().any(|(at, word)| !own.contains(&at) && *word != POISON);
        if !transposed || elsewhere {
            return Err(format!("transposed: {transposed}, written elsewhere: {elsewhere}"));
        }
        let keys = numbers_of(&self.keys);
        let (found, norm) = self.lost(&keys, &rows);
        let cpu = LowRankFactors::new(&keys, 1, width, rank).map_err(|error| error.to_string())?;
        let (least, _) = self.lost(&keys, cpu.basis());
        // The rounding of a basis' elements is 2^-9 of each at most, once in the coefficients and once in what they are multiplied by.
        if found.is_nan() || found > 1.02 * least + 4e-3 * norm {
            return Err(format!("{found} of {norm} is lost where the CPU loses {least}"));
        }
        Ok(())
    }

    /// The norm of what keys lose in a basis, `[rank, width]`, and theirs.
    fn lost(&self, keys: &[f32], rows: &[f32]) -> (f64, f64) {
        let (mut lost, mut norm) = (0.0, 0.0);
        for key in keys.chunks_exact(self.width).step_by(1 + self.tokens / 200) {
            let mut rest: Vec<f64> = key.iter().map(|element| f64::from(*element)).collect();
            norm += rest.iter().map(|element| element * element).sum::<f64>();
            for row in rows.chunks_exact(self.width) {
                let coefficient: f64 = key.iter().zip(row).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                rest.iter_mut()
                    .zip(row)
                    .for_each(|(rest, element)| *rest -= coefficient * f64::from(*element));
            }
            lost += rest.iter().map(|element| element * element).sum::<f64>();
        }
        (lost.sqrt(), norm.sqrt())
    }
}
