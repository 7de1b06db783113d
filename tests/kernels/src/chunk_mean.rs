//! Cases of `chunk_mean`.

use approx::AbsDiffEq;
use half::bf16;
use half::slice::HalfFloatSliceExt;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinkv::backend::cpu::mean_key;
use spinkv_kernels::abi::WORD_ELEMENTS;

use super::{POISON, pick};

/// A launch of `chunk_mean` on a ragged batch of random keys.
#[derive(Debug)]
pub struct ChunkMeanCase {
    /// `[tokens, kv_heads, head_words]`: bf16 keys; NaN between the requests and in tokens that fill no chunk.
    pub keys: Vec<u128>,
    /// `[requests]`.
    pub first_token: Vec<u32>,
    /// `[requests + 1]`.
    pub first_chunk: Vec<u32>,
    /// KV heads.
    pub kv_heads: usize,
    /// Words of a key.
    pub head_words: usize,
    /// Tokens of a chunk.
    pub chunk_tokens: usize,
}

impl ChunkMeanCase {
    /// The case of a seed: any head width from 8 to 640, requests without a chunk and unfilled chunks included.
    pub fn random(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let kv_heads = rng.random_range(1..=5);
        let head_words = pick(&mut rng, &[1, 2, 3, 4, 8, 10, 12, 16, 16, 16, 20, 31, 32, 33, 80]);
        let chunk_tokens = pick(&mut rng, &[1, 2, 3, 7, 8, 8, 16, 31, 32, 64]);
        let most_chunks = if head_words > 16 { 2 } else { 5 };
        let requests = rng.random_range(1..=6);
        Self::sized(&mut rng, [kv_heads, head_words, chunk_tokens], requests, most_chunks)
    }

    /// A batch of prompts of up to 8K tokens, 8 heads of 128.
    pub fn large(seed: u64) -> Self {
        Self::sized(&mut ChaCha8Rng::seed_from_u64(seed), [8, 16, 8], 5, 1024)
    }

    fn sized(
        rng: &mut impl Rng,
        [kv_heads, head_words, chunk_tokens]: [usize; 3],
        requests: usize,
        most_chunks: usize,
    ) -> Self {
        let mut case = Self {
            keys: Vec::new(),
            first_token: Vec::new(),
            first_chunk: vec![0],
            kv_heads,
            head_words,
            chunk_tokens,
        };
        for _ in 0..requests {
            let chunks = rng.random_range(0..=most_chunks);
            case.append(0, rng.random_range(0..3), rng);
            case.first_token.push((case.keys.len() / (kv_heads * head_words)) as u32);
            case.first_chunk.push(case.first_chunk.last().unwrap() + chunks as u32);
            let unfilled = rng.random_range(0..chunk_tokens);
            case.append(chunks * chunk_tokens, unfilled, rng);
        }
        case
    }

    /// `tokens` random keys of each head, then `never_read` that nothing may read.
    fn append(&mut self, tokens: usize, never_read: usize, rng: &mut impl Rng) {
        let width = self.kv_heads * self.head_words;
        for _ in 0..tokens * width {
            let scale = (rng.random_range(-3.0..3.0_f32)).exp2();
            let elements = std::array::from_fn(|_| bf16::from_f32(scale * rng.random_range(-1.0..1.0_f32)));
            self.keys.push(bytemuck::cast::<[bf16; WORD_ELEMENTS], u128>(elements));
        }
        let nan = bytemuck::cast::<[bf16; WORD_ELEMENTS], u128>([bf16::NAN; WORD_ELEMENTS]);
        self.keys.extend(std::iter::repeat_n(nan, never_read * width));
    }

    /// Requests of the batch.
    pub fn requests(&self) -> usize {
        self.first_token.len()
    }

    /// Chunks of the batch.
    pub fn chunks(&self) -> usize {
        *self.first_chunk.last().unwrap() as usize
    }

    /// The summaries before the launch: poison, and a key of it more than the kernel may write.
    pub fn summaries(&self) -> Vec<u128> {
        vec![POISON; (self.chunks() * self.kv_heads + 1) * self.head_words]
    }

    /// Whether summaries agree with the CPU reference `mean_key`.
    ///
    /// The tolerance is half a unit in the last place of a bf16 (2^-8 of the mean) plus the rounding of two f32 sums (2^-23 of the
    /// greatest summand for each token).
    ///
    /// # Errors
    /// The first element that differs by more, or a write beyond the end.
    pub fn check(&self, summaries: &[u128]) -> Result<(), String> {
        let Self { kv_heads, head_words, chunk_tokens, .. } = *self;
        let head_dim = head_words * WORD_ELEMENTS;
        let (found, beyond) = summaries.split_at(summaries.len() - head_words);
        if beyond.iter().any(|word| *word != POISON) {
            return Err("words beyond the last summary were written".to_owned());
        }
        let found = bytemuck::cast_slice::<_, bf16>(found).to_f32_vec();
        let keys = bytemuck::cast_slice::<_, bf16>(&self.keys).to_f32_vec();
        let mut expected = vec![0.0; head_dim];
        for request in 0..self.requests() {
            let before = self.first_chunk[request] as usize;
            let chunks = self.first_chunk[request + 1] as usize - before;
            for (head, chunk) in (0..kv_heads).flat_map(|head| (0..chunks).map(move |chunk| (head, chunk))) {
                let first = self.first_token[request] as usize + chunk * chunk_tokens;
                let chunk_keys: Vec<f32> = (first..first + chunk_tokens)
                    .flat_map(|token| &keys[(token * kv_heads + head) * head_dim..][..head_dim])
                    .copied()
                    .collect();
                mean_key(&chunk_keys, &mut expected);
                let summary = before * kv_heads + head * chunks + chunk;
                for (element, (found, expected)) in
                    found[summary * head_dim..].iter().zip(&expected).enumerate()
                {
                    let greatest = chunk_keys
                        .iter()
                        .skip(element)
                        .step_by(head_dim)
                        .fold(0.0_f32, |a, b| a.max(b.abs()));
                    let tolerance = expected.abs() / 256.0 + chunk_tokens as f32 * greatest * f32::EPSILON;
                    if !found.abs_diff_eq(expected, tolerance) {
                        return Err(format!(
                            "request {request}, head {head}, chunk {chunk}, element {element}: {found} where {expected} +- \
                             {tolerance} was expected"
                        ));
                    }
                }
            }
        }
        Ok(())
    }
}
