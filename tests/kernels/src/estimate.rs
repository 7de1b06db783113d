//! Cases of `estimate`, `page_biases` and `gather_run`: what a step over clusters has beside the others' kernels.

use half::bf16;
use half::slice::HalfFloatSliceExt;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinkv_kernels::abi::cluster::gather_run;
use spinkv_kernels::abi::{Entry, WORD_ELEMENTS, attend, estimate, page_biases};
use spinkv_kernels::{attention, index};

use cuda_std::emulator::{Buffer, Fault, Launch};

use super::emulated::{entries, to_words, words};
use super::{POISON, WILD, pick, wild_entry};

/// A launch of `estimate` and one of `page_biases`, on the same ragged batch.
#[derive(Clone, Debug)]
pub struct EstimateCase {
    /// `[batch]`; some only fill the batch.
    pub entries: Vec<Entry>,
    /// KV heads.
    pub kv_heads: usize,
    /// Query heads of a KV head.
    pub group: usize,
    /// Words of a head, 8 or 16.
    pub head_words: usize,
    /// `[batch * kv_heads, capacity]`: ascending, wild beyond `counts`.
    pub ids: Vec<u32>,
    /// `[batch * kv_heads]`.
    pub counts: Vec<u32>,
    /// Ids that a row has room for.
    pub capacity: usize,
    /// `[batch * kv_heads, group, stride]`.
    pub logits: Vec<f32>,
    /// Room for a row's logits.
    pub stride: usize,
    /// Segments of partitions; wild but for the requests'.
    pub directories: Vec<u32>,
    /// Row of KV head 0.
    pub first_row: usize,
    /// Rows of a request.
    pub request_rows: usize,
    /// Partitions of a segment.
    pub segment_partitions: usize,
    /// `[segments, request_rows, segment_partitions]`.
    pub partition_tokens: Vec<u32>,
    /// As above, of `head_words` words: NaN where no partition of the batch lies.
    pub value_means: Vec<u128>,
    /// `[batch, kv_heads * group, head_words]`: of what is read.
    pub outputs: Vec<u128>,
    /// `[batch, kv_heads * group]`.
    pub lse: Vec<f32>,
    /// Tokens of a page.
    pub page_tokens: usize,
}

impl EstimateCase {
    /// The case of a seed.
    pub fn random(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let batch = rng.random_range(1..=3);
        let kv_heads = rng.random_range(1..=3);
        let group = pick(&mut rng, &[1, 2, 4, 5, 7, 8, 9, 16]);
        let head_words = pick(&mut rng, &[8, 16]);
        let partitions = pick(&mut rng, &[1, 7, 63, 64, 65, 200, 700]);
        Self::sized(&mut rng, [batch, kv_heads, group, head_words, partitions])
    }

    /// Requests of some thousands of clusters, 8 heads of 128, groups of 5.
    pub fn large(seed: u64) -> Self {
        Self::sized(&mut ChaCha8Rng::seed_from_u64(seed), [3, 8, 5, 16, 5000])
    }

    fn sized(rng: &mut ChaCha8Rng, [batch, kv_heads, group, head_words, most]: [usize; 5]) -> Self {
        let layers = rng.random_range(1..=2);
        let segment_partitions = pick(rng, &[1, 7, 64, 512]);
        let page_tokens = pick(rng, &[8, 16]);
        let stride = (most + rng.random_range(0..9)).next_multiple_of(4);
        let capacity = rng.random_range(1..=most);
        let segments = most.div_ceil(segment_partitions);
        let mut numbers: Vec<u32> = (0..(batch * segments) as u32 + 1).collect();
        numbers.shuffle(rng);
        let mut directories = vec![WILD; rng.random_range(0..3)];
        let request_rows = layers * kv_heads;
        let first_row = rng.random_range(0..layers) * kv_heads;
        let places = numbers.len() * request_rows * segment_partitions;
        let rows = batch * kv_heads;
        let mut case = Self {
            entries: Vec::new(),
            kv_heads,
            group,
            head_words,
            ids: vec![WILD; rows * capacity],
            counts: Vec::new(),
            capacity,
            logits: vec![f32::NAN; rows * group * stride],
            stride,
            directories: Vec::new(),
            first_row,
            request_rows,
            segment_partitions,
            partition_tokens: vec![WILD; places],
            value_means: vec![bytemuck::cast([bf16::NAN; WORD_ELEMENTS]); places * head_words],
            outputs: (0..rows * group * head_words).map(|_| word(rng)).collect(),
            lse: (0..rows * group).map(|_| rng.random_range(-3.0..9.0)).collect(),
            page_tokens,
        };
        for request in 0..batch {
            let filler = rng.random_bool(0.1);
            case.entries.push(if filler {
                wild_entry()
            } else {
                Entry { tokens: 9, directory: directories.len() as u32, ..Entry::default() }
            });
            directories.extend(numbers.drain(..segments));
            for row in request * kv_heads..(request + 1) * kv_heads {
                let count = if rng.random_bool(0.2) { 0 } else { rng.random_range(0..=capacity) };
                let mut ids: Vec<u32> = (0..most as u32).collect();
                ids.shuffle(rng);
                ids.truncate(count);
                ids.sort_unstable();
                case.ids[row * capacity..][..count].copy_from_slice(&ids);
                case.counts.push(if filler { WILD } else { count as u32 });
            }
        }
        case.directories = directories;
        for row in (0..rows).filter(|row| case.entries[row / kv_heads].tokens > 0) {
            for id in case.ids_of(row) {
                let place = case.place(row, id);
                case.partition_tokens[place] = rng.random_range(1..=page_tokens as u32);
                let mean: Vec<u128> = (0..head_words).map(|_| word(rng)).collect();
                case.value_means[place * head_words..][..head_words].copy_from_slice(&mean);
                for head in 0..group {
                    case.logits[(row * group + head) * stride + id as usize] = rng.random_range(-9.0..9.0);
                }
            }
        }
        case
    }

    /// Rows of the batch.
    pub fn rows(&self) -> usize {
        self.entries.len() * self.kv_heads
    }

    fn ids_of(&self, row: usize) -> Vec<u32> {
        let count = self.counts[row] as usize;
        if self.entries[row / self.kv_heads].tokens == 0 {
            return Vec::new();
        }
        self.ids[row * self.capacity..][..count].to_vec()
    }

    fn place(&self, row: usize, id: u32) -> usize {
        let directory = self.entries[row / self.kv_heads].directory as usize;
        let segment = self.directories[directory + id as usize / self.segment_partitions] as usize;
        (segment * self.request_rows + self.first_row + row % self.kv_heads) * self.segment_partitions
            + id as usize % self.segment_partitions
    }

    /// Biases before the launch.
    pub fn biases(&self) -> Vec<f32> {
        vec![f32::from_bits(POISON as u32); self.rows() * self.capacity * self.page_tokens]
    }

    /// Whether biases are right.
    ///
    /// # Errors
    /// The first that is wrong.
    pub fn check_biases(&self, found: &[f32]) -> Result<(), String> {
        let mut expected = self.biases();
        for row in 0..self.rows() {
            for (page, id) in self.ids_of(row).into_iter().enumerate() {
                let tokens = self.partition_tokens[self.place(row, id)] as usize;
                let first = (row * self.capacity + page) * self.page_tokens;
                expected[first..first + tokens].fill(0.0);
                expected[first + tokens..first + self.page_tokens].fill(f32::NEG_INFINITY);
            }
        }
        let wrong = (0..found.len()).find(|at| found[*at].to_bits() != expected[*at].to_bits());
        wrong
            .map_or(Ok(()), |at| Err(format!("bias {at}: {} where {} was expected", found[at], expected[at])))
    }

    /// Whether outputs and logarithms of sums are right: outputs, which are at most 2, within what two roundings to bf16 can be off.
    ///
    /// # Errors
    /// The first that is wrong.
    pub fn check(&self, outputs: &[u128], lse: &[f32]) -> Result<(), String> {
        let numbers = |words: &[u128]| bytemuck::cast_slice::<_, bf16>(words).to_f32_vec();
        let dim = self.head_words * WORD_ELEMENTS;
        let (before, found) = (numbers(&self.outputs), numbers(outputs));
        for (of_head, found_lse) in lse.iter().enumerate() {
            let row = of_head / self.group;
            let ids = self.ids_of(row);
            let range = of_head * dim..(of_head + 1) * dim;
            if ids.is_empty() {
                if found[range.clone()] != before[range] || found_lse.to_bits() != self.lse[of_head].to_bits()
                {
                    return Err(format!("row {row}: changed, though it estimates nothing"));
                }
                continue;
            }
            let mut sum = f64::from(self.lse[of_head]).exp();
            let mut out: Vec<f64> = before[range.clone()].iter().map(|x| f64::from(*x) * sum).collect();
            for id in ids {
                let place = self.place(row, id);
                let logit = f64::from(self.logits[of_head * self.stride + id as usize]);
                let weight = f64::from(self.partition_tokens[place]) * logit.exp();
                sum += weight;
                let value = numbers(&self.value_means[place * self.head_words..][..self.head_words]);
                out.iter_mut().zip(value).for_each(|(out, value)| *out += weight * f64::from(value));
            }
            for (channel, (found, out)) in found[range].iter().zip(&out).enumerate() {
                let expected = out / sum;
                // A NaN is never close.
                let off = (f64::from(*found) - expected).abs();
                if off.is_nan() || off > 2.0 / 256.0 {
                    return Err(format!(
                        "row {row}, head {of_head}, channel {channel}: {found} where {expected} was expected"
                    ));
                }
            }
            let found = f64::from(*found_lse);
            let off = (found - sum.ln()).abs();
            if off.is_nan() || off > 1e-4 {
                return Err(format!("head {of_head}: lse {found} where {} was expected", sum.ln()));
            }
        }
        Ok(())
    }

    /// Outputs and logarithms of sums after `estimate` ran in the order of `schedule`.
    ///
    /// # Errors
    /// What the emulator found wrong.
    pub fn emulate(&self, schedule: u64) -> Result<(Vec<u128>, Vec<f32>), Fault> {
        let (outputs, lse) = (words(&self.outputs), Buffer::from_slice(&self.lse));
        let (entries, ids) = (entries(&self.entries), Buffer::from_slice(&self.ids));
        let (counts, logits) = (Buffer::from_slice(&self.counts), Buffer::from_slice(&self.logits));
        let directories = Buffer::from_slice(&self.directories);
        let partition_tokens = Buffer::from_slice(&self.partition_tokens);
        let value_means = words(&self.value_means);
        let [kv_heads, group, head_words, capacity, stride, ..] = self.numbers();
        let [.., first_row, request_rows, segment_partitions] = self.numbers();
        let units = self.rows() as u32 * attend::blocks_of_group(group);
        Launch::new(units, estimate::BLOCK).shared(estimate::SHARED_BYTES as usize).seed(schedule).run(
            || {
                // SAFETY: the emulator checks every access.
                unsafe {
                    attention::estimate(
                        entries.view(),
                        kv_heads,
                        group,
                        head_words,
                        ids.view(),
                        counts.view(),
                        capacity,
                        logits.view(),
                        stride,
                        directories.view(),
                        first_row,
                        request_rows,
                        segment_partitions,
                        partition_tokens.view(),
                        value_means.view(),
                        outputs.view_mut(),
                        lse.view_mut(),
                    );
                }
            },
        )?;
        Ok((to_words(&outputs), lse.to_vec()))
    }

    /// Biases after `page_biases` ran in the order of `schedule`.
    ///
    /// # Errors
    /// What the emulator found wrong.
    pub fn emulate_biases(&self, schedule: u64) -> Result<Vec<f32>, Fault> {
        let (entries, ids) = (entries(&self.entries), Buffer::from_slice(&self.ids));
        let (counts, biases) = (Buffer::from_slice(&self.counts), Buffer::from_slice(&self.biases()));
        let directories = Buffer::from_slice(&self.directories);
        let partition_tokens = Buffer::from_slice(&self.partition_tokens);
        let [kv_heads, _, _, capacity, _, first_row, request_rows, segment_partitions] = self.numbers();
        Launch::new(self.rows() as u32, page_biases::BLOCK).seed(schedule).run(|| {
            // SAFETY: as above.
            unsafe {
                attention::page_biases(
                    entries.view(),
                    kv_heads,
                    ids.view(),
                    counts.view(),
                    capacity,
                    directories.view(),
                    first_row,
                    request_rows,
                    segment_partitions,
                    partition_tokens.view(),
                    self.page_tokens as u32,
                    biases.view_mut(),
                );
            }
        })?;
        Ok(biases.to_vec())
    }

    fn numbers(&self) -> [u32; 8] {
        let Self { kv_heads, group, head_words, capacity, stride, .. } = *self;
        let Self { first_row, request_rows, segment_partitions, .. } = *self;
        [kv_heads, group, head_words, capacity, stride, first_row, request_rows, segment_partitions]
            .map(|number| number as u32)
    }
}

/// A launch of `gather_run`.
#[derive(Clone, Debug)]
pub struct GatherRunCase {
    /// Steady lists; wild but for the request's.
    pub steady: Vec<u32>,
    /// Where the request's begin.
    pub first_steady: usize,
    /// Pages of the sinks.
    pub sink_pages: usize,
    /// Places of the ring.
    pub ring_pages: usize,
    /// Row of KV head 0.
    pub first_row: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Words of a key.
    pub head_words: usize,
    /// Tokens of a page.
    pub page_tokens: usize,
    /// `[pages, 2, page_tokens, head_words]`.
    pub pool: Vec<u128>,
    /// The run's first token.
    pub first: usize,
    /// Its tokens.
    pub tokens: usize,
    /// Blocks of the launch.
    pub grid: u32,
}

impl GatherRunCase {
    /// The case of a seed.
    pub fn random(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let (kv_heads, layers) = (rng.random_range(1..=3), rng.random_range(1..=2));
        let (head_words, page_tokens) = (pick(&mut rng, &[1, 8, 16]), pick(&mut rng, &[1, 8, 16]));
        let (sink_pages, pages) = (rng.random_range(0..3), rng.random_range(1..9));
        let ring_pages = pages + rng.random_range(0..3);
        let first_page = rng.random_range(0..20);
        let tokens = pages * page_tokens - rng.random_range(0..page_tokens);
        let first_steady = rng.random_range(0..5);
        let list = sink_pages + ring_pages;
        let mut ids: Vec<u32> = (0..(layers * kv_heads * list) as u32 + 3).collect();
        ids.shuffle(&mut rng);
        let mut steady = vec![WILD; first_steady];
        steady.extend(&ids[..layers * kv_heads * list]);
        let words = ids.len() * 2 * page_tokens * head_words;
        Self {
            steady,
            first_steady,
            sink_pages,
            ring_pages,
            first_row: rng.random_range(0..layers) * kv_heads,
            kv_heads,
            head_words,
            page_tokens,
            pool: (0..words).map(|_| rng.random()).collect(),
            first: first_page * page_tokens,
            tokens,
            grid: rng.random_range(1..5),
        }
    }

    /// Keys or values before the launch.
    pub fn tensor(&self) -> Vec<u128> {
        vec![POISON; self.tokens * self.kv_heads * self.head_words + 1]
    }

    /// Keys and values after it.
    pub fn expected(&self) -> [Vec<u128>; 2] {
        let half = self.page_tokens * self.head_words;
        [0, half].map(|of_half| {
            let mut tensor = self.tensor();
            for (at, place) in tensor[..self.tokens * self.kv_heads * self.head_words].iter_mut().enumerate()
            {
                let (word, head) = (at % self.head_words, at / self.head_words % self.kv_heads);
                let token = self.first + at / self.head_words / self.kv_heads;
                let key = token / self.page_tokens;
                let in_list = if key < self.sink_pages {
                    key
                } else {
                    self.sink_pages + (key - self.sink_pages) % self.ring_pages
                };
                let list = (self.first_row + head) * (self.sink_pages + self.ring_pages);
                let page = self.steady[self.first_steady + list + in_list] as usize;
                let in_page = token % self.page_tokens * self.head_words + word;
                *place = self.pool[page * 2 * half + of_half + in_page];
            }
            tensor
        })
    }

    /// Keys and values after the kernel ran in the order of `schedule`.
    ///
    /// # Errors
    /// What the emulator found wrong.
    pub fn emulate(&self, schedule: u64) -> Result<[Vec<u128>; 2], Fault> {
        let (steady, pool) = (Buffer::from_slice(&self.steady), words(&self.pool));
        let (keys, values) = (words(&self.tensor()), words(&self.tensor()));
        let sizes = [self.first_steady, self.sink_pages, self.ring_pages, self.first_row, self.kv_heads];
        let [first_steady, sink_pages, ring_pages, first_row, kv_heads] = sizes.map(|size| size as u32);
        let sizes = [self.head_words, self.page_tokens, self.first, self.tokens];
        let [head_words, page_tokens, first, tokens] = sizes.map(|size| size as u32);
        Launch::new(self.grid, gather_run::BLOCK).seed(schedule).run(|| {
            // SAFETY: as above.
            unsafe {
                index::cluster::gather_run(
                    steady.view(),
                    first_steady,
                    sink_pages,
                    ring_pages,
                    first_row,
                    kv_heads,
                    head_words,
                    page_tokens,
                    pool.view(),
                    first,
                    tokens,
                    keys.view_mut(),
                    values.view_mut(),
                );
            }
        })?;
        Ok([to_words(&keys), to_words(&values)])
    }
}

fn word(rng: &mut ChaCha8Rng) -> u128 {
    bytemuck::cast::<[bf16; WORD_ELEMENTS], _>(std::array::from_fn(|_| {
        bf16::from_f32(rng.random_range(-2.0..2.0))
    }))
}
