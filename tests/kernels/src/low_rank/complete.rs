use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

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

    /// Whether `found` are the rows that there were and, one after the other, axes of which the rows have least, less what they have of it, at length
    /// 1; orthonormal as far as f32 allows. Of axes that are as good but for rounding it may be another than the CPU's.
    ///
    /// # Errors
    /// The first row that is wrong.
    pub fn check(&self, found: &[f32]) -> Result<(), String> {
        let width = self.width;
        let mut known: Vec<f64> = self.vectors.iter().map(|element| f64::from(*element)).collect();
        let is_empty =
            |row: usize| self.vectors[row * width..][..width].iter().all(|element| *element == 0.0);
        for row in 0..self.rank {
            let here = row * width..(row + 1) * width;
            if !is_empty(row) {
                if self.vectors[here.clone()] != found[here] {
                    return Err(format!("row {row} was not empty, and is another"));
                }
                continue;
            }
            let mut left = vec![1.0; width];
            for of in known.chunks_exact(width) {
                left.iter_mut().zip(of).for_each(|(left, element)| *left -= element * element);
            }
            let best = (0..width).fold(0, |best, axis| if left[axis] > left[best] { axis } else { best });
            let found = &found[here.clone()];
            let longest = (0..width).fold(0, |a, b| if found[b].abs() > found[a].abs() { b } else { a });
            let off = |axis: usize| {
                let mut right = vec![0.0; width];
                right[axis] = 1.0;
                for of in known.chunks_exact(width) {
                    right.iter_mut().zip(of).for_each(|(right, element)| *right -= of[axis] * element);
                }
                let length = right.iter().map(|element| element * element).sum::<f64>().sqrt();
                let off = |(right, found): (&f64, &f32)| (f64::from(*found) - right / length).abs();
                // A NaN is off.
                right
                    .iter()
                    .zip(found)
                    .map(off)
                    .fold(0.0, |most: f64, off| if off > most || off.is_nan() { off } else { most })
            };
            let good = |axis: usize| left[axis] >= left[best] - 1e-4 && off(axis) <= 1e-4;
            if !good(best) && !good(longest) {
                return Err(format!(
                    "row {row}: of axis {best} it is off by {:e}, of {longest}, of which the rows leave {} of {}, by {:e}",
                    off(best),
                    left[longest],
                    left[best],
                    off(longest)
                ));
            }
            known[here].iter_mut().zip(found).for_each(|(known, found)| *known = f64::from(*found));
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
