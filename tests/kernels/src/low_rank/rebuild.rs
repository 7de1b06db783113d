use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinkv_kernels::abi::{Entry, PageCopy, SEGMENT_KEYS};

use super::{check_head, frequencies, normal, numbers_of, turned, words_of};
use crate::{POISON, WILD, pick, wild_entry};

/// A launch of `rebuild_keys_64` or `rebuild_keys_128`.
#[derive(Debug)]
pub struct RebuildCase {
    /// `[batch]`; some only fill the batch.
    pub entries: Vec<Entry>,
    /// KV heads of a layer.
    pub kv_heads: usize,
    /// Head dim / 8.
    pub head_words: usize,
    /// The layer.
    pub layer: usize,
    /// Layers.
    pub layers: usize,
    /// Rank / 8.
    pub rank_words: usize,
    /// Tokens of a page.
    pub page_tokens: usize,
    /// `[batch * kv_heads, capacity]`; wild from the count on.
    pub copies: Vec<PageCopy>,
    /// As the copies.
    pub copy_keys: Vec<u32>,
    /// `[batch * kv_heads]`.
    pub counts: Vec<u32>,
    /// Segment numbers.
    pub directories: Vec<u32>,
    /// `[segments, layers, 512 * page_tokens, rank_words]`: NaN but for tokens of listed pages.
    pub coefficients: Vec<u128>,
    /// `[bases, layers, kv_heads, head_dim, rank_words]`.
    pub bases: Vec<u128>,
    /// `[head_dim / 2]`.
    pub frequencies: Vec<f32>,
    /// Of sines and cosines.
    pub magnitude: f32,
    /// Pages of the pool.
    pub pages: usize,
    /// Blocks to launch.
    pub blocks: u32,
}

/// Two NaNs of bf16 and again.
const NAN: u128 = 0x7fc1_7fc1_7fc1_7fc1_7fc1_7fc1_7fc1_7fc1;

impl RebuildCase {
    /// The case of a seed.
    pub fn random(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let (page_tokens, rank_words) = loop {
            let of = (pick(&mut rng, &[1, 3, 8, 8, 16, 20]), pick(&mut rng, &[4, 8, 12, 20]));
            if of.0 * of.1 <= 100 {
                break of;
            }
        };
        let (batch, capacity) = (rng.random_range(1..4), rng.random_range(1..8));
        Self::sized(&mut rng, [batch, 2, 2, capacity], page_tokens, rank_words)
    }

    /// A case for a GPU: 16 requests of 8 KV heads, pages of 8 tokens, rank 160.
    pub fn large(seed: u64) -> Self {
        Self::sized(&mut ChaCha8Rng::seed_from_u64(seed), [16, 8, 2, 40], 8, 20)
    }

    fn sized(
        rng: &mut impl Rng,
        [batch, most_heads, layers, capacity]: [usize; 4],
        page_tokens: usize,
        rank_words: usize,
    ) -> Self {
        let (kv_heads, head_words) = (rng.random_range(1..=most_heads), pick(rng, &[8, 16]));
        let (head_dim, rank, layer) = (8 * head_words, 8 * rank_words, rng.random_range(0..layers));
        // Two segments a request, anywhere.
        let mut segments: Vec<u32> = (0..2 * batch as u32 + 1).collect();
        segments.shuffle(rng);
        let mut bases: Vec<u32> = (0..batch as u32 + 1).collect();
        bases.shuffle(rng);
        let directories = segments[..2 * batch].to_vec();
        let entries: Vec<Entry> = (0..batch)
            .map(|request| match rng.random_range(0..4) {
                0 => wild_entry(),
                _ => {
                    let directory = 2 * request as u32;
                    Entry { tokens: 1, directory, basis: bases[request], ..wild_entry() }
                }
            })
            .collect();
        let segment_words = layers * SEGMENT_KEYS as usize * page_tokens * rank_words;
        let mut coefficients = vec![NAN; segments.len() * segment_words];
        let counts: Vec<u32> = (0..batch * kv_heads)
            .map(|row| match rng.random_range(0..5) {
                _ if entries[row / kv_heads].tokens == 0 => 0,
                0 => 0,
                1 => capacity as u32,
                _ => rng.random_range(0..=capacity as u32),
            })
            .collect();
        let made: usize = counts.iter().map(|count| *count as usize).sum();
        let pages = made + rng.random_range(1..4);
        let mut targets: Vec<u32> = (0..pages as u32).collect();
        targets.shuffle(rng);
        let mut copies = vec![PageCopy { host_page: WILD, device_page: WILD }; counts.len() * capacity];
        let mut copy_keys = vec![WILD; copies.len()];
        for (row, count) in counts.iter().enumerate() {
            for at in row * capacity..row * capacity + *count as usize {
                let key = pick(rng, &[0, 511, 512, 1023, 100, 700]) ^ rng.random_range(0..2);
                copies[at].device_page = targets.pop().expect("a page a copy");
                copy_keys[at] = key;
                let directory = entries[row / kv_heads].directory + key / SEGMENT_KEYS;
                let segment = directories[directory as usize] as usize * layers + layer;
                let first = (segment * SEGMENT_KEYS as usize + (key % SEGMENT_KEYS) as usize) * page_tokens;
                let own = &mut coefficients[first * rank_words..(first + page_tokens) * rank_words];
                // Other heads' lists may name it, too.
                if own[0] == NAN {
                    own.copy_from_slice(&words_of(
                        &(0..page_tokens * rank).map(|_| normal(rng)).collect::<Vec<_>>(),
                    ));
                }
            }
        }
        let of_bases = bases.len() * layers * kv_heads * head_dim * rank;
        Self {
            entries,
            kv_heads,
            head_words,
            layer,
            layers,
            rank_words,
            page_tokens,
            copies,
            copy_keys,
            counts,
            directories,
            coefficients,
            bases: words_of(&(0..of_bases).map(|_| 0.3 * normal(rng)).collect::<Vec<_>>()),
            frequencies: frequencies(rng, head_dim),
            magnitude: pick(rng, &[1.0, 1.0, 1.2]),
            pages,
            blocks: rng.random_range(1..=5),
        }
    }

    /// The pool before the launch: poison.
    pub fn pool(&self) -> Vec<u128> {
        vec![POISON; self.pages * 2 * self.page_tokens * self.head_words]
    }

    /// Whether keys of listed pages are there, and all else is as it was.
    ///
    /// # Errors
    /// The first that is wrong.
    pub fn check(&self, pool: &[u128]) -> Result<(), String> {
        let Self { kv_heads, head_words, layer, layers, rank_words, page_tokens, .. } = *self;
        let (head_dim, capacity) = (8 * head_words, self.copies.len() / self.counts.len());
        let mut rest = pool.to_vec();
        for (row, count) in self.counts.iter().enumerate() {
            let (entry, head) = (self.entries[row / kv_heads], row % kv_heads);
            let basis = || {
                let first =
                    ((entry.basis as usize * layers + layer) * kv_heads + head) * head_dim * rank_words;
                numbers_of(&self.bases[first..first + head_dim * rank_words])
            };
            let basis = if *count > 0 { basis() } else { Vec::new() };
            for at in row * capacity..row * capacity + *count as usize {
                let (key, page) = (self.copy_keys[at], self.copies[at].device_page as usize);
                let segment = self.directories[(entry.directory + key / SEGMENT_KEYS) as usize] as usize;
                let first =
                    (segment * layers + layer) * SEGMENT_KEYS as usize + (key % SEGMENT_KEYS) as usize;
                for token in 0..page_tokens {
                    let coefficients = (first * page_tokens + token) * rank_words;
                    let coefficients =
                        numbers_of(&self.coefficients[coefficients..coefficients + rank_words]);
                    let dot = |channel: &[f32]| {
                        channel.iter().zip(&coefficients).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
                    };
                    let plain: Vec<f64> = basis.chunks_exact(8 * rank_words).map(dot).collect();
                    let position = key * page_tokens as u32 + token as u32;
                    let right = turned(&plain, position, false, &self.frequencies, f64::from(self.magnitude));
                    let words = (page * 2 * page_tokens + token) * head_words;
                    let words = words..words + head_words;
                    let what = format!("row {row}, page key {key}, token {token}");
                    check_head(&what, &numbers_of(&pool[words.clone()]), &right)?;
                    rest[words].fill(POISON);
                }
            }
        }
        if rest != self.pool() {
            return Err("written beyond the keys of listed pages".to_owned());
        }
        Ok(())
    }
}
