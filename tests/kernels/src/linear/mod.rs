//! Cases of `linear_8` to `linear_64` and of `gemm`.

mod emulate;

use half::bf16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinkv_kernels::abi::linear::{self, epilogue};
use spinkv_kernels::abi::{WORD_BYTES, WORD_ELEMENTS};

use super::{POISON, pick};

/// Words behind the products that nobody may write.
const BEYOND: usize = 1;

/// What weights and tokens hold.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Values {
    /// About normal.
    Random,
    /// Small whole numbers: all sums are exact, in any order.
    Whole,
}

/// A launch.
#[derive(Debug)]
pub struct LinearCase {
    /// Rows of `x`.
    pub tokens: usize,
    /// Rows of the weights.
    pub n: usize,
    /// Words of a row.
    pub k_words: usize,
    /// One of [`epilogue`].
    pub epilogue: u32,
    /// Blocks of `linear_8` to `linear_64`.
    pub blocks: u32,
    /// `[n, k_words]`.
    pub weights: Vec<u128>,
    /// `[tokens, k_words]`.
    pub x: Vec<u128>,
    /// `[tokens, n]`: what the products are added to.
    before: Vec<f32>,
    values: Values,
}

/// Products in memory, some of both forms not used.
#[derive(Clone, Debug, PartialEq)]
pub struct Products {
    /// `[tokens, columns]` bf16.
    pub bf16: Vec<u128>,
    /// `[tokens, columns]`.
    pub f32: Vec<f32>,
}

impl LinearCase {
    /// The case of a seed for few tokens: 1 to 64 of them, ragged rows and columns, all epilogues, 1 to 9 blocks.
    pub fn random(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let tokens = pick(&mut rng, &[1, 1, 2, 7, 8, 9, 15, 16, 17, 30, 33, 64]);
        let n = pick(&mut rng, &[8, 16, 120, 128, 136, 144, 256, 264, 400]);
        let k_words = pick(&mut rng, &[1, 7, 8, 9, 16, 31, 64, 75]);
        Self::sized(&mut rng, [tokens, n, k_words])
    }

    /// The case of a seed for many tokens.
    pub fn many_tokens(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let tokens = pick(&mut rng, &[1, 17, 63, 64, 65, 100, 128, 130, 257]);
        let n = pick(&mut rng, &[8, 16, 120, 128, 136, 144, 256, 264]);
        let k_words = pick(&mut rng, &[1, 4, 7, 8, 9, 16, 31, 50]);
        Self::sized(&mut rng, [tokens, n, k_words])
    }

    /// Three tiles in seven shares: tiles of one block, of two and of more, whose parts are added in the order of k.
    pub fn shared(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let tokens = pick(&mut rng, &[3, 16]);
        Self { values: Values::Random, blocks: 7, ..Self::sized(&mut rng, [tokens, 264, 37]) }
    }

    /// A case for a GPU that adds random products to what is there, again with each launch.
    pub fn adding(seed: u64, tokens: usize) -> Self {
        let rng = &mut ChaCha8Rng::seed_from_u64(seed);
        Self { epilogue: epilogue::ADD_F32, ..Self::sized(rng, [tokens, 5120, 320]) }
    }

    /// A case for a GPU: rows and columns of a model's layer, of which some are checked.
    pub fn large(seed: u64, tokens: usize) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let (n, k_words) =
            pick(&mut rng, &[(7168, 640), (5120, 640), (4096, 2176), (6144, 512), (12_296, 129)]);
        Self::sized(&mut rng, [tokens, n, k_words])
    }

    fn sized(rng: &mut impl Rng, [tokens, n, k_words]: [usize; 3]) -> Self {
        use epilogue::{ADD_F32, GATED_BF16, STORE_BF16, STORE_F32};
        let values = pick(rng, &[Values::Random, Values::Random, Values::Whole]);
        let ungated = [STORE_BF16, STORE_F32, ADD_F32];
        let all = [STORE_BF16, STORE_F32, ADD_F32, GATED_BF16];
        let epilogue = pick(rng, if n.is_multiple_of(16) { &all } else { &ungated });
        let units = linear::tiles(n as u32) * linear::chunks(k_words as u32);
        let number = |rng: &mut _| number(rng, values);
        let mut tensor = |rows: usize| -> Vec<u128> {
            let word = |_| {
                let elements: [bf16; WORD_ELEMENTS] = std::array::from_fn(|_| bf16::from_f32(number(rng)));
                bytemuck::cast(elements)
            };
            (0..rows * k_words).map(word).collect()
        };
        let (weights, x) = (tensor(n), tensor(tokens));
        let before = (0..tokens * n).map(|_| number(rng)).collect();
        let blocks = rng.random_range(1..=units.min(9));
        Self { tokens, n, k_words, epilogue, blocks, weights, x, before, values }
    }

    /// Columns of the products.
    pub fn columns(&self) -> usize {
        if self.epilogue == epilogue::GATED_BF16 { self.n / 2 } else { self.n }
    }

    /// Whether the products are f32.
    pub fn is_f32(&self) -> bool {
        matches!(self.epilogue, epilogue::STORE_F32 | epilogue::ADD_F32)
    }

    /// Memory before the launch.
    pub fn products(&self) -> Products {
        let beyond = BEYOND * WORD_BYTES / size_of::<f32>();
        let mut f32 = vec![f32::from_bits(POISON as u32); self.tokens * self.n + beyond];
        if self.epilogue == epilogue::ADD_F32 {
            f32[..self.before.len()].copy_from_slice(&self.before);
        }
        Products { bf16: vec![POISON; self.tokens * self.columns() / WORD_ELEMENTS + BEYOND], f32 }
    }

    /// Whether products are right: those of a token are off by at most 5e-3 of their norm if they are bf16, by what the order of sums may
    /// change if they are f32, and not at all where sums are exact. Of wide cases some columns are looked at; nothing else is written.
    ///
    /// # Errors
    /// The first token that is wrong.
    pub fn check(&self, products: &Products) -> Result<(), String> {
        let (columns, before) = (self.columns(), self.products());
        let len = self.tokens * columns;
        let bf16s: &[bf16] = bytemuck::cast_slice(&products.bf16);
        let (untouched, beyond) = if self.is_f32() {
            (products.bf16 == before.bf16, bits(&products.f32[len..]) == bits(&before.f32[len..]))
        } else {
            let words = len / WORD_ELEMENTS;
            (bits(&products.f32) == bits(&before.f32), products.bf16[words..] == before.bf16[words..])
        };
        if !untouched || !beyond {
            return Err("written beyond the products".to_owned());
        }
        let exact = self.values == Values::Whole && self.is_f32();
        // Tensor cores cut sums off where the emulator rounds them.
        let order = 1e-5 + 4e-9 * (self.k_words * WORD_ELEMENTS) as f64;
        let tolerance = if exact {
            0.0
        } else if self.is_f32() {
            order
        } else {
            5e-3
        };
        let step = if len * self.k_words > 8_000_000 { 37 } else { 1 };
        for token in 0..self.tokens {
            let (mut off, mut norm) = (0.0, 0.0);
            for column in (token % step..columns).step_by(step) {
                let at = token * columns + column;
                let found = if self.is_f32() { products.f32[at] } else { bf16s[at].to_f32() };
                let right = self.right(token, column);
                if !found.is_finite() {
                    return Err(format!("token {token}, column {column}: {found} for {right}"));
                }
                off += (f64::from(found) - right).powi(2);
                norm += right.powi(2);
            }
            if off.sqrt() > tolerance * norm.sqrt() {
                return Err(format!("token {token}: off by {} of {}", off.sqrt(), norm.sqrt()));
            }
        }
        Ok(())
    }

    /// A product in f64, with what the epilogue makes of it.
    fn right(&self, token: usize, column: usize) -> f64 {
        let dot = |row: usize| -> f64 {
            let of = |tensor: &[u128], row: usize| -> Vec<bf16> {
                bytemuck::pod_collect_to_vec(&tensor[row * self.k_words..][..self.k_words])
            };
            let product = |(w, x): (&bf16, &bf16)| w.to_f64() * x.to_f64();
            of(&self.weights, row).iter().zip(&of(&self.x, token)).map(product).sum()
        };
        match self.epilogue {
            epilogue::ADD_F32 => f64::from(self.before[token * self.n + column]) + dot(column),
            epilogue::GATED_BF16 => {
                let gate = dot(column);
                gate / (1.0 + (-gate).exp()) * dot(self.n / 2 + column)
            }
            _ => dot(column),
        }
    }
}

fn number(rng: &mut impl Rng, values: Values) -> f32 {
    match values {
        Values::Random => (0..4).map(|_| rng.random_range(-0.8..0.8_f32)).sum(),
        Values::Whole => rng.random_range(-3..=3_i8).into(),
    }
}

fn bits(numbers: &[f32]) -> &[u32] {
    bytemuck::cast_slice(numbers)
}
