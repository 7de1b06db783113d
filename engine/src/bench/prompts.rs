use std::path::Path;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;

/// Tokens between the beginnings of two prompts of a text: no multiple of a page or a partition.
const STRIDE: usize = 1009;

/// Where a bench's prompts come from.
#[derive(Clone, Debug)]
pub struct Prompts {
    /// Of a text, end to end; empty for random tokens.
    text: Vec<u32>,
    vocab_size: usize,
    seed: u64,
}

impl Prompts {
    /// Random tokens.
    pub fn random(vocab_size: usize, seed: u64) -> Self {
        Self { text: Vec::new(), vocab_size, seed }
    }

    /// Pieces of `haystack.txt` beside a checkpoint, over and over; random tokens where there is no such text.
    ///
    /// # Errors
    /// A text that is there and cannot be read.
    pub fn open(dir: &Path, vocab_size: usize, seed: u64) -> Result<Self> {
        let path = dir.join("haystack.txt");
        if !path.is_file() {
            return Ok(Self::random(vocab_size, seed));
        }
        let text = std::fs::read_to_string(&path).map_err(|source| Error::Io { path, source })?;
        Ok(Self { text: Tokenizer::open(dir)?.encode(&text)?, vocab_size, seed })
    }

    /// Whether they are random.
    pub fn are_random(&self) -> bool {
        self.text.is_empty()
    }

    /// Prompt number `number`, of `tokens` tokens.
    pub fn prompt(&self, number: usize, tokens: usize) -> Vec<u32> {
        if self.are_random() {
            let mut rng = ChaCha8Rng::seed_from_u64(self.seed ^ (number as u64) << 32);
            return (0..tokens).map(|_| rng.next_u32() % self.vocab_size as u32).collect();
        }
        let first = number.wrapping_mul(STRIDE).wrapping_add(self.seed as usize) % self.text.len();
        self.text.iter().copied().cycle().skip(first).take(tokens).collect()
    }
}
