//! Cases of `fill_random`, and its numbers worked out anew.

use cuda_std::emulator::{Fault, Launch};
use half::bf16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinkv_kernels::abi;
use spinkv_kernels::model::fill_random;

use super::emulated::{to_words, words};
use super::{POISON, pick};

/// A launch of `fill_random`.
#[derive(Debug)]
pub struct FillRandomCase {
    /// Words to fill.
    pub words: usize,
    /// The seed.
    pub seed: u64,
    /// The standard deviation.
    pub deviation: f32,
    /// Blocks under the emulator: fewer than words need, and more.
    pub grid: u32,
}

impl FillRandomCase {
    /// The case of a seed.
    pub fn random(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let words = pick(&mut rng, &[0, 1, 31, 255, 256, 257, 700, 1025]);
        Self {
            words,
            seed: rng.random(),
            deviation: pick(&mut rng, &[0.02, 1.0, 3e-5]),
            grid: rng.random_range(1..5),
        }
    }

    /// The words after the kernel ran in the order of `schedule`, and one beyond them.
    ///
    /// # Errors
    /// What the emulator found wrong.
    pub fn emulate(&self, schedule: u64) -> Result<Vec<u128>, Fault> {
        let out = words(&vec![POISON; self.words + 1]);
        let (seed_low, seed_high) = (self.seed as u32, (self.seed >> 32) as u32);
        Launch::new(self.grid, abi::fill_random::BLOCK).seed(schedule).run(|| {
            let scale = abi::fill_random::scale(self.deviation.into());
            // SAFETY: the emulator checks every access.
            unsafe { fill_random(out.view_mut(), self.words as u32, seed_low, seed_high, scale) };
        })?;
        Ok(to_words(&out))
    }

    /// Whether words are exactly those that Philox gives, worked out from its definition, and nothing lies beyond them.
    ///
    /// # Errors
    /// The first number that differs.
    pub fn check(&self, found: &[u128]) -> Result<(), String> {
        for (word, &found) in found[..self.words].iter().enumerate() {
            let numbers: [u16; 8] = bytemuck::cast(found);
            for (at, &found) in numbers.iter().enumerate() {
                let expected = self.number(word as u32, at);
                if found != expected.to_bits() {
                    return Err(format!("word {word}, number {at}: {found:#06x}, not {expected}"));
                }
            }
        }
        match found[self.words..].iter().all(|&word| word == POISON) {
            true => Ok(()),
            false => Err("words beyond the end were written".to_owned()),
        }
    }

    fn number(&self, word: u32, at: usize) -> bf16 {
        let block = philox([word, at as u32 / 2, 0, 0], [self.seed as u32, (self.seed >> 32) as u32]);
        let half = &block[at % 2 * 2..][..2];
        let sum: i64 = half.iter().map(|bits| i64::from(bits & 0xffff) + i64::from(bits >> 16)).sum();
        bf16::from_f32((sum - 131_070) as f32 * abi::fill_random::scale(self.deviation.into()))
    }
}

/// Philox4x32-10, as its authors define it.
pub fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let multiply = |a: u32, b: u32| {
        let product = u64::from(a) * u64::from(b);
        [(product >> 32) as u32, product as u32]
    };
    (0..10u32).fold(counter, |[c0, c1, c2, c3], round| {
        let key0 = key[0].wrapping_add(round.wrapping_mul(0x9e37_79b9));
        let key1 = key[1].wrapping_add(round.wrapping_mul(0xbb67_ae85));
        let [high0, low0] = multiply(0xd251_1f53, c0);
        let [high1, low1] = multiply(0xcd9e_8d57, c2);
        [high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0]
    })
}
