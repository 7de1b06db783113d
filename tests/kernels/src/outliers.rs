//! Cases of `chunk_spread` and of `mark`.

use cuda_std::emulator::{Buffer, Fault, Launch};
use half::bf16;
use rand::seq::SliceRandom;
use rand::seq::index::sample;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinkv::backend::cpu::least_cosine;
use spinkv_kernels::abi::{Entry, SPREAD_WORDS, WORD_ELEMENTS, index_prompts, mark};
use spinkv_kernels::index;

use super::emulated::words;
use super::{WILD, entry_words, pick, wild_entry};

/// How far a spread may be from the reference's.
const TOLERANCE: f32 = 2e-6;

/// A launch of `chunk_spread` on a ragged batch of prompts of random keys.
#[derive(Debug)]
pub struct SpreadCase {
    /// One a request: `new_partition` and `new_partitions`; the rest is wild.
    pub entries: Vec<Entry>,
    /// `[tokens, kv_heads, head_words]`: bf16 keys; NaN where nothing may be read.
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
    /// Room for a row's numbers.
    pub stride: usize,
}

impl SpreadCase {
    /// The case of a seed: any width of heads, requests without a chunk included, zeroes and NaNs among the keys.
    pub fn random(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let kv_heads = rng.random_range(1..=4);
        let head_words = pick(&mut rng, &SPREAD_WORDS) as usize;
        let chunk_tokens = pick(&mut rng, &[1, 2, 3, 5, 7, 8, 8, 9, 15, 16, 33]);
        let (requests, most) = (rng.random_range(1..=4), if kv_heads * head_words > 32 { 2 } else { 6 });
        Self::sized(&mut rng, [kv_heads, head_words, chunk_tokens], requests, most)
    }

    /// Prompts of up to 8K tokens, 8 heads of 128.
    pub fn large(seed: u64) -> Self {
        Self::sized(&mut ChaCha8Rng::seed_from_u64(seed), [8, 16, 8], 3, 1024)
    }

    fn sized(
        rng: &mut impl Rng,
        [kv_heads, head_words, chunk_tokens]: [usize; 3],
        requests: usize,
        most: usize,
    ) -> Self {
        let stride = most + rng.random_range(0..3);
        let mut case = Self {
            entries: Vec::new(),
            keys: Vec::new(),
            first_token: Vec::new(),
            first_chunk: vec![0],
            kv_heads,
            head_words,
            chunk_tokens,
            stride,
        };
        let nan: u128 = bytemuck::cast([bf16::NAN; WORD_ELEMENTS]);
        for _ in 0..requests {
            let (chunks, steady) = (rng.random_range(0..=most), rng.random_range(0..3));
            let width = kv_heads * head_words;
            case.keys.extend(std::iter::repeat_n(nan, rng.random_range(0..3) * width));
            case.first_token.push((case.keys.len() / width) as u32);
            case.first_chunk.push(case.first_chunk.last().unwrap() + chunks as u32);
            case.keys.extend(std::iter::repeat_n(nan, steady * chunk_tokens * width));
            for _ in 0..chunks {
                case.append_chunk(rng);
            }
            case.keys.extend(std::iter::repeat_n(nan, rng.random_range(0..chunk_tokens) * width));
            case.entries.push(Entry {
                new_partition: steady as u32,
                new_partitions: chunks as u32,
                ..wild_entry()
            });
        }
        case
    }

    /// A chunk whose keys are alike, or scattered, or in part or all of them 0, or in which one is NaN.
    fn append_chunk(&mut self, rng: &mut impl Rng) {
        let elements = self.kv_heads * self.head_words * WORD_ELEMENTS;
        let base: Vec<f32> = (0..elements).map(|_| rng.random_range(-1.0..1.0_f32)).collect();
        let noise = pick(rng, &[0.0, 0.1, 1.0, 10.0]);
        let scale = pick(rng, &[1e-22, 1e-8, 0.3, 1.0, 100.0]);
        let (zeroes, nan) = (pick(rng, &[0.0, 0.0, 0.0, 0.3, 1.0]), rng.random_bool(0.05));
        for token in 0..self.chunk_tokens {
            let factor = if rng.random_bool(zeroes) { 0.0 } else { scale };
            let mut key: Vec<bf16> = base
                .iter()
                .map(|element| bf16::from_f32(factor * (element + noise * rng.random_range(-1.0..1.0_f32))))
                .collect();
            if nan && token == 0 {
                key[0] = bf16::NAN;
            }
            self.keys.extend(bytemuck::pod_collect_to_vec::<_, u128>(&key));
        }
    }

    /// Chunks of the batch.
    pub fn chunks(&self) -> usize {
        *self.first_chunk.last().unwrap() as usize
    }

    /// The spreads before the launch: a number that is none.
    pub fn spreads(&self) -> Vec<f32> {
        vec![77.0; self.entries.len() * self.kv_heads * self.stride]
    }

    /// Whether spreads are those of the CPU reference, and nothing else was written.
    ///
    /// # Errors
    /// The first that differs.
    pub fn check(&self, spreads: &[f32]) -> Result<(), String> {
        let mut expected = self.spreads();
        for (request, entry) in self.entries.iter().enumerate() {
            for (chunk, head) in (0..entry.new_partitions as usize)
                .flat_map(|chunk| (0..self.kv_heads).map(move |head| (chunk, head)))
            {
                let first = self.first_token[request] as usize
                    + (entry.new_partition as usize + chunk) * self.chunk_tokens;
                let keys: Vec<f32> = (first..first + self.chunk_tokens)
                    .flat_map(|token| {
                        let at = (token * self.kv_heads + head) * self.head_words;
                        let key = &self.keys[at..at + self.head_words];
                        bytemuck::cast_slice::<_, bf16>(key).iter().map(|element| element.to_f32())
                    })
                    .collect();
                expected[(request * self.kv_heads + head) * self.stride + chunk] =
                    0.0 - least_cosine(&keys, self.head_words * WORD_ELEMENTS);
            }
        }
        for (at, (found, expected)) in spreads.iter().zip(&expected).enumerate() {
            let right = if expected.is_nan() {
                found.to_bits() == 0x7fff_ffff
            } else {
                (found - expected).abs() <= TOLERANCE
            };
            if !right {
                let (row, chunk) = (at / self.stride, at % self.stride);
                return Err(format!("row {row}, chunk {chunk}: {found} where {expected} was expected"));
            }
        }
        Ok(())
    }

    /// The spreads after the kernel ran in the order of `schedule`.
    ///
    /// # Errors
    /// What the emulator found wrong.
    pub fn emulate(&self, schedule: u64) -> Result<Vec<f32>, Fault> {
        let (keys, entries) = (words(&self.keys), words(&entry_words(&self.entries)));
        let (first_token, first_chunk) =
            (Buffer::from_slice(&self.first_token), Buffer::from_slice(&self.first_chunk));
        let spreads = Buffer::from_slice(&self.spreads());
        let sizes = [self.entries.len(), self.kv_heads, self.head_words, self.chunk_tokens, self.stride];
        let [requests, kv_heads, head_words, chunk_tokens, stride] = sizes.map(|size| size as u32);
        // At least a block, also for a batch without a chunk: its threads must find that there is nothing to do.
        let blocks = index_prompts::grid(self.chunks() as u32 * kv_heads * head_words).max(1);
        Launch::new(blocks, index_prompts::BLOCK).seed(schedule).run(|| {
            // SAFETY: the emulator checks every access.
            unsafe {
                index::chunk_spread(
                    keys.view(),
                    entries.view(),
                    first_token.view(),
                    first_chunk.view(),
                    requests,
                    kv_heads,
                    head_words,
                    chunk_tokens,
                    stride,
                    spreads.view_mut(),
                );
            }
        })?;
        Ok(spreads.to_vec())
    }
}

/// A launch of `mark` on lists of any length.
#[derive(Debug)]
pub struct MarkCase {
    /// `[batch]`: `first_marks`, and `tokens` (0 to fill the batch).
    pub entries: Vec<Entry>,
    /// `[batch * kv_heads, capacity]`: wild beyond a row's ids.
    pub ids: Vec<u32>,
    /// `[batch * kv_heads]`; some beyond the capacity.
    pub counts: Vec<u32>,
    /// Ids that a row has room for.
    pub capacity: usize,
    /// Row of KV head 0.
    pub first_row: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Words of a row.
    pub words: usize,
    /// Rows of the table.
    pub marked_rows: usize,
}

impl MarkCase {
    /// The case of a seed: no ids, all ids and some, rows of few and of many words.
    pub fn random(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let kv_heads = rng.random_range(1..=3);
        let words = pick(&mut rng, &[1, 2, 3, 127, 128, 129, 300]);
        let capacity = pick(&mut rng, &[0, 1, 2, 31, 48, 100]).min(32 * words);
        let (layer, layers, batch) = (rng.random_range(0..2), 2, rng.random_range(1..=3));
        let mut places: Vec<usize> = (0..batch + rng.random_range(0..2)).collect();
        places.shuffle(&mut rng);
        let (mut entries, mut ids, mut counts) = (Vec::new(), Vec::new(), Vec::new());
        for place in &places[..batch] {
            let entry =
                Entry { tokens: WILD, first_marks: (place * layers * kv_heads) as u32, ..wild_entry() };
            entries.push(if rng.random_bool(0.2) { wild_entry() } else { entry });
            for _ in 0..kv_heads {
                let count = if rng.random_bool(0.3) { capacity } else { rng.random_range(0..=capacity) };
                // Scattered, or side by side.
                let mut row: Vec<u32> = if rng.random_bool(0.3) {
                    let first = rng.random_range(0..=32 * words - count);
                    (first as u32..(first + count) as u32).collect()
                } else {
                    sample(&mut rng, 32 * words, count).iter().map(|id| id as u32).collect()
                };
                row.sort_unstable();
                row.resize(capacity, WILD);
                ids.extend(row);
                counts.push(if count == capacity {
                    capacity as u32 + rng.random_range(0..2)
                } else {
                    count as u32
                });
            }
        }
        let marked_rows = places.len() * layers * kv_heads;
        Self { entries, ids, counts, capacity, first_row: layer * kv_heads, kv_heads, words, marked_rows }
    }

    /// The marks before the launch.
    pub fn marks(&self) -> Vec<u32> {
        vec![0xdead_beef; self.marked_rows * self.words]
    }

    /// Whether the marks of each row are its ids, and no other was written.
    ///
    /// # Errors
    /// The first word that differs.
    pub fn check(&self, marks: &[u32]) -> Result<(), String> {
        let mut expected = self.marks();
        for (row, count) in self.counts.iter().enumerate() {
            let entry = &self.entries[row / self.kv_heads];
            if entry.tokens == 0 {
                continue;
            }
            let marked = entry.first_marks as usize + self.first_row + row % self.kv_heads;
            let words = &mut expected[marked * self.words..][..self.words];
            words.fill(0);
            for id in &self.ids[row * self.capacity..][..self.capacity.min(*count as usize)] {
                words[*id as usize / 32] |= 1 << (id % 32);
            }
        }
        match (0..expected.len()).find(|at| marks[*at] != expected[*at]) {
            None => Ok(()),
            Some(at) => Err(format!(
                "row {}, word {}: {:#010x} where {:#010x} was expected",
                at / self.words,
                at % self.words,
                marks[at],
                expected[at]
            )),
        }
    }

    /// The marks after the kernel ran in the order of `schedule`.
    ///
    /// # Errors
    /// What the emulator found wrong.
    pub fn emulate(&self, schedule: u64) -> Result<Vec<u32>, Fault> {
        let entries = words(&entry_words(&self.entries));
        let (ids, counts) = (Buffer::from_slice(&self.ids), Buffer::from_slice(&self.counts));
        let marks = Buffer::from_slice(&self.marks());
        let sizes = [self.capacity, self.first_row, self.kv_heads, self.words].map(|size| size as u32);
        let [capacity, first_row, kv_heads, words] = sizes;
        Launch::new(self.counts.len() as u32, mark::BLOCK).seed(schedule).run(|| {
            // SAFETY: the emulator checks every access.
            unsafe {
                index::mark(
                    entries.view(),
                    ids.view(),
                    counts.view(),
                    capacity,
                    first_row,
                    kv_heads,
                    words,
                    marks.view_mut(),
                );
            }
        })?;
        Ok(marks.to_vec())
    }
}
