use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinkv::backend::cpu::low_rank::complete;

use super::normal;
use crate::pick;

/// How far dot products of f32 rows may be from 0 and 1.
const ORTHONORMAL: f64 = 3e-6;

/// A launch of `complete_basis`.
#[derive(Debug)]
pub struct CompleteCase {
    /// Rows.
    pub rank: usize,
    /// Elements of a row.
    pub width: usize,
    /// `[rank, width]`: orthonormal rows, and empty ones.
    pub vectors: Vec<f32>,
}

impl CompleteCase {
    /// The case of a seed: none, some or all rows are empty, the others dense or axes; there may be as many rows as elements, and more elements than threads.
    pub fn random(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let rank = pick(&mut rng, &[1, 5, 32, 33, 40]);
        let width = rank + pick(&mut rng, if rank > 5 { &[0, 1, 30] } else { &[0, 1, 30, 2500] });
        let empty = pick(&mut rng, &[0.0, 0.1, 0.5, 1.0]);
        Self::sized(&mut rng, rank, width, empty)
    }

    /// A case for a GPU: a layer of 8 KV heads of 128, of which a short prompt has used little.
    pub fn large(seed: u64) -> Self {
        Self::sized(&mut ChaCha8Rng::seed_from_u64(seed), 160, 1024, 0.9)
    }

    fn sized(rng: &mut impl Rng, rank: usize, width: usize, empty: f64) -> Self {
        let mut rows: Vec<Vec<f64>> = Vec::new();
        let mut axes: Vec<usize> = (0..width).collect();
        axes.shuffle(rng);
        let of_axes = rng.random_bool(0.25);
        for axis in &axes[..rank] {
            let mut row: Vec<f64> = if of_axes {
                (0..width).map(|at| f64::from(u8::from(at == *axis))).collect()
            } else {
                (0..width).map(|_| f64::from(normal(rng))).collect()
            };
            for other in rows.iter().chain(&rows) {
                let dot: f64 = row.iter().zip(other).map(|(a, b)| a * b).sum();
                row.iter_mut().zip(other).for_each(|(element, of)| *element -= dot * of);
            }
            let length = row.iter().map(|element| element * element).sum::<f64>().sqrt();
            row.iter_mut().for_each(|element| *element /= length);
            rows.push(if rng.random_bool(empty) { vec![0.0; width] } else { row });
        }
        Self { rank, width, vectors: rows.concat().into_iter().map(|element| element as f32).collect() }
    }

    /// More axes than a block has threads, of which the first that nothing is taken of is another than its thread's first.
    pub fn wide() -> Self {
        let (rank, width, used) = (2, 2085, 1500);
        let mut vectors = vec![0.0; rank * width];
        vectors[..used].fill(1.0 / (used as f32).sqrt());
        Self { rank, width, vectors }
    }

    /// Rows of which one is no number, and one is empty.
    pub fn not_finite() -> Self {
        let (rank, width) = (3, 5);
        let mut vectors = vec![0.0; rank * width];
        vectors[..width].fill(f32::NAN);
        vectors[width] = 1.0;
        Self { rank, width, vectors }
    }

    /// Whether `found` are the rows that there were and those that the CPU adds, orthonormal as far as f32 allows.
    ///
    /// # Errors
    /// The first element that is wrong.
    pub fn check(&self, found: &[f32]) -> Result<(), String> {
        let mut right: Vec<f64> = self.vectors.iter().map(|element| f64::from(*element)).collect();
        complete(&mut right, self.width);
        let rows = self.vectors.chunks_exact(self.width).zip(found.chunks_exact(self.width));
        for (row, (before, found)) in rows.enumerate() {
            let filled = before.iter().all(|element| *element == 0.0);
            if !filled && before != found {
                return Err(format!("row {row} was not empty, and is another"));
            }
            for (at, found) in found.iter().enumerate() {
                let off = (f64::from(*found) - right[row * self.width + at]).abs();
                if off.is_nan() || off > 1e-4 {
                    return Err(format!(
                        "row {row}, element {at}: {found} for {}",
                        right[row * self.width + at]
                    ));
                }
            }
        }
        let rows: Vec<&[f32]> = found.chunks_exact(self.width).collect();
        let before = self.vectors.chunks_exact(self.width);
        for (row, _) in before.enumerate().filter(|(_, row)| row.iter().all(|element| *element == 0.0)) {
            for (other, of) in rows.iter().enumerate() {
                let dot: f64 = rows[row].iter().zip(*of).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                let off = (dot - f64::from(u8::from(row == other))).abs();
                if off > ORTHONORMAL {
                    return Err(format!("rows {row} and {other}: off by {off:e} of what is orthonormal"));
                }
            }
        }
        Ok(())
    }
}
