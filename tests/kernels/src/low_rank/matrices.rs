use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinkv::backend::cpu::low_rank::{Pivots, inverse_factor};

use super::{normal, numbers_of, whole, words_of};
use crate::pick;

/// What outputs hold before a launch.
const UNTOUCHED: f32 = -1.0e30;

/// A launch of `gram` and `gram_sum`.
#[derive(Debug)]
pub struct GramCase {
    /// Tokens.
    pub tokens: usize,
    /// A multiple of 8.
    pub width: usize,
    /// Of the tokens.
    pub shares: u32,
    /// `[tokens, width / 8]`.
    pub keys: Vec<u128>,
    exact: bool,
}

impl GramCase {
    /// The case of a seed.
    pub fn random(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let tokens = pick(&mut rng, &[0, 1, 7, 64, 65, 129, 200]);
        let width = pick(&mut rng, &[8, 64, 120, 128, 136, 264]);
        let shares = rng.random_range(1..=4);
        Self::sized(&mut rng, tokens, width, shares)
    }

    /// More tokens a share than the tensor cores sum up.
    pub fn long(seed: u64) -> Self {
        Self::sized(&mut ChaCha8Rng::seed_from_u64(seed), 4300, 16, 2)
    }

    /// A case for a GPU.
    pub fn large(seed: u64) -> Self {
        Self::sized(&mut ChaCha8Rng::seed_from_u64(seed), 5000, 1024, 7)
    }

    fn sized(rng: &mut impl Rng, tokens: usize, width: usize, shares: u32) -> Self {
        let exact = rng.random_bool(0.5);
        let keys: Vec<f32> =
            (0..tokens * width).map(|_| if exact { whole(rng) } else { normal(rng) }).collect();
        Self { tokens, width, shares, keys: words_of(&keys), exact }
    }

    /// The matrix before the launches.
    pub fn gram(&self) -> Vec<f32> {
        vec![UNTOUCHED; self.width * self.width]
    }

    /// Whether `gram` is the keys' matrix: bit for bit where sums are exact, and symmetric.
    ///
    /// # Errors
    /// The first element that is wrong.
    pub fn check(&self, gram: &[f32]) -> Result<(), String> {
        let (keys, width) = (numbers_of(&self.keys), self.width);
        let right = spinkv::backend::cpu::low_rank::gram(&keys, width);
        for (at, (found, expected)) in gram.iter().zip(&right).enumerate() {
            let (row, column) = (at / width, at % width);
            let norms = (right[row * width + row] * right[column * width + column]).sqrt();
            let off = (f64::from(*found) - expected).abs();
            let tolerance = if self.exact { 0.0 } else { 2e-5 * norms };
            if off.is_nan() || off > tolerance || *found != gram[column * width + row] {
                return Err(format!("row {row}, column {column}: {found} for {expected}"));
            }
        }
        Ok(())
    }
}

/// A launch of `row_dots` or `row_sums`.
#[derive(Debug)]
pub struct ProductCase {
    /// Of `a`.
    pub rows: usize,
    /// Of the product.
    pub columns: usize,
    /// What is summed over.
    pub inner: usize,
    /// Whether `b` is `[inner, columns]`.
    pub sums: bool,
    /// `[rows, inner]`.
    pub a: Vec<f32>,
    /// `[columns, inner]` or `[inner, columns]`.
    pub b: Vec<f32>,
    exact: bool,
}

impl ProductCase {
    /// The case of a seed.
    pub fn random(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let rows = pick(&mut rng, &[1, 31, 32, 33, 64, 70]);
        let columns = pick(&mut rng, &[4, 28, 32, 36, 64, 100]);
        let inner = pick(&mut rng, &[4, 28, 32, 36, 100, 160, 200]);
        Self::sized(&mut rng, rows, columns, inner)
    }

    /// A case for a GPU: an iteration's.
    pub fn large(seed: u64) -> Self {
        Self::sized(&mut ChaCha8Rng::seed_from_u64(seed), 160, 1024, 1024)
    }

    fn sized(rng: &mut impl Rng, rows: usize, columns: usize, inner: usize) -> Self {
        let (exact, sums) = (rng.random_bool(0.5), rng.random_bool(0.5));
        let mut matrix = |len: usize| -> Vec<f32> {
            (0..len).map(|_| if exact { whole(rng) } else { normal(rng) }).collect()
        };
        let (a, b) = (matrix(rows * inner), matrix(inner * columns));
        Self { rows, columns, inner, sums, a, b, exact }
    }

    /// The product before the launch, with a word behind it.
    pub fn out(&self) -> Vec<f32> {
        vec![UNTOUCHED; self.rows * self.columns + 4]
    }

    /// Whether `out` is the product.
    ///
    /// # Errors
    /// The first element that is wrong.
    pub fn check(&self, out: &[f32]) -> Result<(), String> {
        let Self { rows, columns, inner, .. } = *self;
        if out[rows * columns..] != [UNTOUCHED; 4] {
            return Err("written beyond the product".to_owned());
        }
        for row in 0..rows {
            for column in 0..columns {
                let b =
                    |at: usize| self.b[if self.sums { at * columns + column } else { column * inner + at }];
                let (mut right, mut scale) = (0.0, 0.0);
                for at in 0..inner {
                    let product = f64::from(self.a[row * inner + at]) * f64::from(b(at));
                    (right, scale) = (right + product, scale + product * product);
                }
                let found = f64::from(out[row * columns + column]);
                let tolerance = if self.exact { 0.0 } else { 1e-5 * scale.sqrt() };
                if found.is_nan() || (found - right).abs() > tolerance {
                    return Err(format!("row {row}, column {column}: {found} for {right}"));
                }
            }
        }
        Ok(())
    }
}

/// A launch of `inverse_factor`.
#[derive(Debug)]
pub struct FactorCase {
    /// Vectors.
    pub rank: usize,
    /// What becomes of those that nearly depend on others.
    pub small: Pivots,
    /// `[rank, rank]`.
    pub products: Vec<f32>,
}

impl FactorCase {
    /// The case of a seed: vectors of very different lengths, some of them zero, or sums of those before them.
    pub fn random(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let rank = pick(&mut rng, &[1, 2, 5, 31, 32, 33, 40]);
        Self::sized(&mut rng, rank)
    }

    /// A case for a GPU.
    pub fn large(seed: u64, rank: usize) -> Self {
        Self::sized(&mut ChaCha8Rng::seed_from_u64(seed), rank)
    }

    fn sized(rng: &mut impl Rng, rank: usize) -> Self {
        let small = pick(rng, &[Pivots::Raised, Pivots::Dropped]);
        let width = 4 * rank;
        let mut vectors: Vec<Vec<f64>> = Vec::new();
        for vector in 0..rank {
            let length = 10.0_f64.powi(rng.random_range(-3..=3));
            let odd = rng.random_range(0..8);
            vectors.push(match odd {
                0 => vec![0.0; width],
                // Where pivots are raised, what comes behind such a one depends on rounding.
                1 if vector > 1 && (small == Pivots::Dropped || vector + 1 == rank) => {
                    let (a, b) = (rng.random_range(0..vector), rng.random_range(0..vector));
                    let norm = |of: &[f64]| of.iter().map(|x| x * x).sum::<f64>().sqrt().max(1e-30);
                    let (m, n) = (norm(&vectors[a]), norm(&vectors[b]));
                    vectors[a].iter().zip(&vectors[b]).map(|(x, y)| length * (x / m + y / n)).collect()
                }
                _ => (0..width).map(|_| length * f64::from(normal(rng))).collect(),
            });
        }
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>() as f32;
        let products = vectors.iter().flat_map(|a| vectors.iter().map(|b| dot(a, b))).collect();
        Self { rank, small, products }
    }

    /// The factor before the launch.
    pub fn factor(&self) -> Vec<f32> {
        vec![UNTOUCHED; self.rank * self.rank]
    }

    /// Whether `factor` is the CPU's.
    ///
    /// # Errors
    /// The first element that is wrong.
    pub fn check(&self, factor: &[f32]) -> Result<(), String> {
        let n = self.rank;
        let products: Vec<f64> = self.products.iter().map(|product| f64::from(*product)).collect();
        let right = inverse_factor(&products, n, self.small);
        for (at, (found, expected)) in factor.iter().zip(&right).enumerate() {
            let (row, column) = (at / n, at % n);
            // Relative to what the element does to a vector of length 1.
            let length = products[column * n + column].sqrt();
            let most = (0..=row)
                .map(|k| (right[row * n + k] * products[k * n + k].sqrt()).abs())
                .fold(0.0, f64::max);
            let off = (f64::from(*found) - expected).abs() * length;
            if off.is_nan() || off > 2e-4 * most || (*expected == 0.0 && *found != 0.0) {
                return Err(format!("row {row}, column {column}: {found} for {expected}"));
            }
        }
        Ok(())
    }
}
