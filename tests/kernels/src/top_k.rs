//! Cases of `top_k`, and scores to select by.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinkv::backend::cpu;

use super::{WILD, pick};

/// A launch of `top_k` on ragged rows.
#[derive(Debug)]
pub struct TopKCase {
    /// `[rows, stride]`: infinity beyond a row's count.
    pub scores: Vec<f32>,
    /// `[rows]`.
    pub counts: Vec<u32>,
    /// `[rows]`.
    pub k: Vec<u32>,
    /// Room for a row's scores.
    pub stride: usize,
    /// Scores that shared memory has room for.
    pub resident: usize,
    /// Ids that a row has room for.
    pub capacity: usize,
}

/// Lengths of rows: none, one, and around what a word, a warp, a block and its words hold.
pub(crate) const LENGTHS: [usize; 17] =
    [0, 1, 2, 3, 4, 5, 31, 33, 255, 1000, 1023, 1024, 1025, 2047, 4095, 4097, 6001];

impl TopKCase {
    /// The case of a seed: any kind of scores, rows in shared memory and rows that are too long for it.
    pub fn random(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let rows = rng.random_range(1..=2);
        let lengths: Vec<usize> = (0..rows).map(|_| pick(&mut rng, &LENGTHS)).collect();
        Self::sized(&mut rng, &lengths)
    }

    /// Rows as long contexts have them, some longer than shared memory.
    pub fn large(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        Self::sized(&mut rng, &[16_384, 49_152, 49_153, 131_072, 200_001, 7, 60_000, 16_384])
    }

    fn sized(rng: &mut impl Rng, lengths: &[usize]) -> Self {
        let longest = *lengths.iter().max().unwrap();
        let stride = (longest + rng.random_range(0..9)).max(1).next_multiple_of(4);
        let resident =
            if rng.random_bool(0.3) { (longest / 2 / 4 * 4).min(49_152) } else { stride.min(49_152) };
        let k: Vec<u32> = lengths
            .iter()
            .map(|&length| match rng.random_range(0..6) {
                0 => 0,
                1 => length as u32,
                2 => WILD,
                3 => rng.random_range(0..=length as u32),
                _ => rng.random_range(0..=length as u32 / 20 + 1),
            })
            .collect();
        let capacity = match rng.random_range(0..3) {
            0 => longest / 3 + 1,
            _ => longest + 1,
        };
        let mut all = Vec::new();
        for &length in lengths {
            all.extend(scores(rng, length));
            all.extend(std::iter::repeat_n(f32::INFINITY, stride - length));
        }
        let counts = lengths.iter().map(|length| *length as u32).collect();
        Self { scores: all, counts, k, stride, resident, capacity }
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.counts.len()
    }

    /// Room for keys of rows that shared memory is too small for.
    pub fn keys(&self) -> usize {
        if self.resident < self.stride { self.scores.len() / 4 } else { 1 }
    }

    /// The ids before the launch.
    pub fn ids(&self) -> Vec<u32> {
        vec![WILD; self.rows() * self.capacity]
    }

    /// Whether ids and their numbers are those of the CPU reference.
    ///
    /// # Errors
    /// The first row that differs.
    pub fn check(&self, ids: &[u32], selected: &[u32]) -> Result<(), String> {
        for row in 0..self.rows() {
            let scores = &self.scores[row * self.stride..][..self.counts[row] as usize];
            let mut expected = Vec::new();
            cpu::top_k(scores, (self.k[row] as usize).min(self.capacity), &mut expected);
            let (found, beyond) = ids[row * self.capacity..][..self.capacity]
                .split_at((selected[row] as usize).min(self.capacity));
            compare(&format!("row {row}"), selected[row], found, beyond, &expected)?;
        }
        Ok(())
    }
}

/// Whether a list is the one that was expected, and nothing was written beyond.
pub(crate) fn compare(
    row: &str,
    count: u32,
    found: &[u32],
    beyond: &[u32],
    expected: &[u32],
) -> Result<(), String> {
    if count as usize != expected.len() {
        return Err(format!("{row}: {count} ids where {} were expected", expected.len()));
    }
    if let Some(at) = found.iter().zip(expected).position(|(found, expected)| found != expected) {
        return Err(format!("{row}, place {at}: id {} where {} was expected", found[at], expected[at]));
    }
    if beyond.iter().any(|id| *id != WILD) {
        return Err(format!("{row}: ids written beyond the {count} selected"));
    }
    Ok(())
}

/// Scores of some kind: spread, close together, few different ones, all equal, sorted, special ones.
pub(crate) fn scores(rng: &mut impl Rng, count: usize) -> Vec<f32> {
    // No NaN whose payload is among the outermost two: the kernels take these for one.
    const SPECIAL: [u32; 14] = [
        0,
        0x8000_0000,
        0x7f80_0000,
        0xff80_0000,
        0x7fc0_0000,
        0xffc0_0000,
        0x7f80_0001,
        0xff80_0001,
        1,
        0x8000_0001,
        0x7f7f_ffff,
        0xff7f_ffff,
        0x3f80_0000,
        0xbf80_0000,
    ];
    let kind = rng.random_range(0..8);
    let base = rng.random_range(-4.0..4.0_f32);
    (0..count)
        .map(|at| match kind {
            0 => base,
            1 => base + rng.random_range(0..4) as f32,
            // The same sign, exponent and some more bits.
            2 => f32::from_bits(base.to_bits() & !0xfff | rng.random_range(0..0x1000)),
            3 => f32::from_bits(SPECIAL[rng.random_range(0..SPECIAL.len())]),
            4 => at as f32 - 77.0,
            5 => -(at as f32),
            // The sum of four is near enough to normal.
            _ => (0..4).map(|_| rng.random_range(-1.0..1.0_f32)).sum(),
        })
        .collect()
}
