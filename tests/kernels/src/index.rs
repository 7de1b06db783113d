//! Cases of Index: `chunk_mean`, `chunk_bounds`, for prompts and for a decode step.

use cuda_std::emulator::{Buffer, Fault, Launch};
use half::bf16;
use half::slice::HalfFloatSliceExt;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinkv::backend::cpu::{key_bounds, mean_key};
use spinkv_kernels::abi::{Entry, WORD_ELEMENTS, index_prompts, index_step, summary_parts};
use spinkv_kernels::index;

use super::emulated::{to_words, words};
use super::{POISON, WILD, entry_words, pick, wild_entry};

/// What becomes of the keys of a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operator {
    /// `chunk_mean`.
    Mean,
    /// `chunk_bounds`.
    Bounds,
}

impl Operator {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Mean, Self::Bounds];

    /// Words of a summary for each word of a key.
    pub fn parts(self) -> usize {
        let parts = match self {
            Self::Mean => summary_parts::MEAN,
            Self::Bounds => summary_parts::BOUNDS,
        };
        parts as usize
    }

    /// The CPU reference.
    fn summarise(self, keys: &[f32], summary: &mut [f32]) {
        match self {
            Self::Mean => mean_key(keys, summary),
            Self::Bounds => key_bounds(keys, summary),
        }
    }
}

/// Where summaries go.
#[derive(Clone, Debug)]
pub struct SummaryTable {
    /// What they are.
    pub operator: Operator,
    /// One a request: `tokens` (0 to fill the batch), `directory`, `new_partition`, `new_partitions`; the rest is wild.
    pub entries: Vec<Entry>,
    /// Segments of all requests; wild where nothing is summarised.
    pub directories: Vec<u32>,
    /// Segments.
    pub segments: usize,
    /// Row of KV head 0.
    pub first_row: usize,
    /// Rows of a request.
    pub request_rows: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Words of a key.
    pub head_words: usize,
    /// Tokens of a partition.
    pub chunk_tokens: usize,
    /// Partitions of a segment.
    pub segment_partitions: usize,
}

impl SummaryTable {
    /// Summaries before the launch: poison.
    pub fn summaries(&self) -> Vec<u128> {
        let rows = self.segments * self.request_rows * self.segment_partitions;
        vec![POISON; rows * self.operator.parts() * self.head_words]
    }

    /// The sizes that all kernels take.
    fn sizes(&self) -> [u32; 6] {
        let Self { first_row, request_rows, kv_heads, head_words, chunk_tokens, segment_partitions, .. } =
            *self;
        [first_row, request_rows, kv_heads, head_words, chunk_tokens, segment_partitions]
            .map(|size| size as u32)
    }

    /// Partitions to summarise: request, partition, head.
    fn summarised(&self) -> impl Iterator<Item = (usize, usize, usize)> {
        self.entries.iter().enumerate().flat_map(move |(request, entry)| {
            (0..chunks_of(entry)).flat_map(move |chunk| {
                let partition = (entry.new_partition + chunk) as usize;
                (0..self.kv_heads).map(move |head| (request, partition, head))
            })
        })
    }
}

/// A launch on a ragged batch of prompts of random keys.
#[derive(Debug)]
pub struct PromptIndexCase {
    /// Where summaries go.
    pub table: SummaryTable,
    /// `[tokens, kv_heads, head_words]`: bf16 keys; NaN where nothing may be read.
    pub keys: Vec<u128>,
    /// `[requests]`.
    pub first_token: Vec<u32>,
    /// `[requests + 1]`.
    pub first_chunk: Vec<u32>,
}

impl PromptIndexCase {
    /// The case of a seed: any head width from 8 to 640, requests without a chunk included, and the keys' special numbers.
    pub fn random(operator: Operator, seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let kv_heads = rng.random_range(1..=4);
        let head_words = pick(&mut rng, &[1, 2, 3, 4, 8, 10, 12, 16, 16, 16, 31, 32, 80]);
        let chunk_tokens = pick(&mut rng, &[1, 2, 3, 4, 5, 6, 7, 8, 8, 9, 15, 16, 31, 32, 64]);
        let most_chunks = if kv_heads * head_words > 32 { 2 } else { 5 };
        let segment_partitions = pick(&mut rng, &[1, 2, 3, 64]);
        let requests = rng.random_range(1..=4);
        let sizes = [kv_heads, head_words, chunk_tokens, segment_partitions];
        Self::sized(&mut rng, operator, sizes, requests, most_chunks)
    }

    /// A batch of prompts of up to 8K tokens, 8 heads of 128.
    pub fn large(operator: Operator, seed: u64) -> Self {
        Self::sized(&mut ChaCha8Rng::seed_from_u64(seed), operator, [8, 16, 8, 512], 5, 1024)
    }

    fn sized(
        rng: &mut impl Rng,
        operator: Operator,
        [kv_heads, head_words, chunk_tokens, segment_partitions]: [usize; 4],
        requests: usize,
        most_chunks: usize,
    ) -> Self {
        let (layer, layers) = (rng.random_range(0..3), 3);
        let mut case = Self {
            table: SummaryTable {
                operator,
                entries: Vec::new(),
                directories: vec![WILD; rng.random_range(0..3)],
                segments: 0,
                first_row: layer * kv_heads,
                request_rows: layers * kv_heads,
                kv_heads,
                head_words,
                chunk_tokens,
                segment_partitions,
            },
            keys: Vec::new(),
            first_token: Vec::new(),
            first_chunk: vec![0],
        };
        let mut segments = Vec::new();
        for _ in 0..requests {
            let chunks = rng.random_range(0..=most_chunks);
            // Partitions of the sinks come before, those of the window after.
            let steady = rng.random_range(0..3);
            case.append(0, rng.random_range(0..3), rng);
            case.first_token.push((case.keys.len() / (kv_heads * head_words)) as u32);
            case.first_chunk.push(case.first_chunk.last().unwrap() + chunks as u32);
            case.append(0, steady * chunk_tokens, rng);
            case.append(chunks * chunk_tokens, rng.random_range(0..2 * chunk_tokens), rng);

            let directory = case.table.directories.len();
            let entry = Entry {
                tokens: WILD,
                directory: directory as u32,
                new_partition: steady as u32,
                new_partitions: chunks as u32,
                ..wild_entry()
            };
            // One without a chunk may be there only to fill the batch.
            let entry = if chunks == 0 && rng.random_bool(0.5) { wild_entry() } else { entry };
            case.table.entries.push(entry);
            let used = steady / segment_partitions..(steady + chunks).div_ceil(segment_partitions);
            let end = used.end;
            for segment in 0..if chunks > 0 { end } else { 0 } {
                segments.extend(used.contains(&segment).then_some(case.table.directories.len()));
                case.table.directories.push(WILD);
            }
        }
        case.table.directories.push(WILD);
        case.table.segments = segments.len() + 1;
        let mut ids: Vec<u32> = (0..case.table.segments as u32).collect();
        ids.shuffle(rng);
        segments.iter().zip(ids).for_each(|(place, id)| case.table.directories[*place] = id);
        case
    }

    /// `tokens` random keys of each head, then `never_read` that nothing may read.
    fn append(&mut self, tokens: usize, never_read: usize, rng: &mut impl Rng) {
        let width = self.table.kv_heads * self.table.head_words;
        for _ in 0..tokens * width {
            let scale = (rng.random_range(-3.0..3.0_f32)).exp2();
            let elements = std::array::from_fn(|_| match rng.random_range(0..600) {
                0 => bf16::NAN,
                1 => bf16::from_bits(0xff81),
                2 => bf16::INFINITY,
                3 => bf16::NEG_INFINITY,
                4..20 => bf16::from_f32(0.0),
                20..40 => bf16::from_f32(-0.0),
                40 => bf16::MAX,
                // What is added between two of these that cancel loses bits, so the order of a sum shows.
                41..60 => bf16::from_f32(4_194_304.0),
                60..80 => bf16::from_f32(-4_194_304.0),
                _ => bf16::from_f32(scale * rng.random_range(-1.0..1.0_f32)),
            });
            self.keys.push(bytemuck::cast::<[bf16; WORD_ELEMENTS], u128>(elements));
        }
        self.keys.extend(std::iter::repeat_n(nan(), never_read * width));
    }

    /// Requests of the batch.
    pub fn requests(&self) -> usize {
        self.first_token.len()
    }

    /// Chunks of the batch.
    pub fn chunks(&self) -> usize {
        *self.first_chunk.last().unwrap() as usize
    }

    /// The words of one key.
    fn key(&self, request: usize, token: usize, head: usize) -> &[u128] {
        let SummaryTable { kv_heads, head_words, .. } = self.table;
        let row = (self.first_token[request] as usize + token) * kv_heads + head;
        &self.keys[row * head_words..][..head_words]
    }

    /// The summaries after the launch, by the CPU reference: f32, rounded to bf16.
    fn expected(&self) -> Vec<u128> {
        let SummaryTable { operator, head_words, chunk_tokens, segment_partitions, .. } = self.table;
        let mut summaries = self.table.summaries();
        let width = operator.parts() * head_words;
        let mut summary = vec![0.0; width * WORD_ELEMENTS];
        for (request, partition, head) in self.table.summarised() {
            let keys: Vec<u128> = (0..chunk_tokens)
                .flat_map(|token| self.key(request, partition * chunk_tokens + token, head))
                .copied()
                .collect();
            operator.summarise(&bytemuck::cast_slice::<_, bf16>(&keys).to_f32_vec(), &mut summary);
            let directory = self.table.entries[request].directory as usize;
            let segment = self.table.directories[directory + partition / segment_partitions] as usize;
            let row = segment * self.table.request_rows + self.table.first_row + head;
            let at = (row * segment_partitions + partition % segment_partitions) * width;
            let rounded = bytemuck::cast_slice_mut::<_, u16>(&mut summaries[at..at + width]);
            for (rounded, element) in rounded.iter_mut().zip(&summary) {
                // Kernels have one NaN.
                *rounded = if element.is_nan() { 0x7fff } else { bf16::from_f32(*element).to_bits() };
            }
        }
        summaries
    }

    /// Whether summaries are, bit for bit, what the CPU reference makes of the keys, and nothing else was written.
    ///
    /// # Errors
    /// The first word that differs.
    pub fn check(&self, summaries: &[u128]) -> Result<(), String> {
        let expected = self.expected();
        assert_eq!(summaries.len(), expected.len());
        let Some(at) = (0..expected.len()).find(|at| summaries[*at] != expected[*at]) else {
            return Ok(());
        };
        let SummaryTable { operator, head_words, segment_partitions, request_rows, .. } = self.table;
        let width = operator.parts() * head_words;
        let (summary, word) = (at / width, at % width);
        let (row, index) = (summary / segment_partitions, summary % segment_partitions);
        Err(format!(
            "segment {}, row {}, partition {index} of it, word {word}: {:#034x} where {:#034x} was expected",
            row / request_rows,
            row % request_rows,
            summaries[at],
            expected[at]
        ))
    }

    /// The summaries after the kernel ran in the order of `schedule`.
    ///
    /// # Errors
    /// What the emulator found wrong.
    pub fn emulate(&self, schedule: u64) -> Result<Vec<u128>, Fault> {
        let table = &self.table;
        let (keys, summaries) = (words(&self.keys), words(&table.summaries()));
        let entries = words(&entry_words(&table.entries));
        let directories = Buffer::from_slice(&table.directories);
        let first_token = Buffer::from_slice(&self.first_token);
        let first_chunk = Buffer::from_slice(&self.first_chunk);
        let requests = self.requests() as u32;
        let [first_row, request_rows, kv_heads, head_words, chunk_tokens, segment_partitions] = table.sizes();
        let kernel = match table.operator {
            Operator::Mean => index::chunk_mean,
            Operator::Bounds => index::chunk_bounds,
        };
        // At least a block, also for a batch without a chunk: its threads must find that there is nothing to do.
        let blocks = index_prompts::grid(self.chunks() as u32 * kv_heads * head_words).max(1);
        Launch::new(blocks, index_prompts::BLOCK).seed(schedule).run(|| {
            // SAFETY: the emulator checks every access.
            unsafe {
                kernel(
                    keys.view(),
                    entries.view(),
                    first_token.view(),
                    first_chunk.view(),
                    directories.view(),
                    requests,
                    first_row,
                    request_rows,
                    kv_heads,
                    head_words,
                    chunk_tokens,
                    segment_partitions,
                    summaries.view_mut(),
                );
            }
        })?;
        Ok(to_words(&summaries))
    }
}

/// A launch of a decode step in which the partitions of a [`PromptIndexCase`] leave the steady zone: the same keys, in pages.
#[derive(Debug)]
pub struct StepIndexCase {
    /// The keys, and what must come out.
    pub prompts: PromptIndexCase,
    /// One a request: as those of the prompts, and the steady list.
    pub entries: Vec<Entry>,
    /// Steady lists; wild but for the pages that are read.
    pub steady: Vec<u32>,
    /// `[pages, 2, page_tokens, head_words]`; NaN where nothing may be read.
    pub pool: Vec<u128>,
    /// Tokens of a page.
    pub page_tokens: usize,
}

impl StepIndexCase {
    /// The case of a seed: most entries have nothing to do; partitions of several pages and pages of several partitions included, and
    /// some that share a page, or none of whose borders is a page's.
    pub fn random(operator: Operator, seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let page_tokens = pick(&mut rng, &[1, 2, 3, 8, 16, 64]);
        Self::of(PromptIndexCase::random(operator, seed), page_tokens, &mut rng)
    }

    fn of(prompts: PromptIndexCase, page_tokens: usize, rng: &mut impl Rng) -> Self {
        let SummaryTable { kv_heads, head_words, chunk_tokens, first_row, request_rows, .. } = prompts.table;
        let page_words = 2 * page_tokens * head_words;
        let mut entries = Vec::new();
        let mut steady = vec![WILD; rng.random_range(0..3)];
        // Places of the steady lists that are read, and the page that belongs there.
        let mut used: Vec<(usize, Vec<u128>)> = Vec::new();
        for (request, &entry) in prompts.table.entries.iter().enumerate() {
            if chunks_of(&entry) == 0 {
                entries.push(entry);
                continue;
            }
            let first = entry.new_partition as usize * chunk_tokens;
            let end = first + entry.new_partitions as usize * chunk_tokens;
            let pages = first / page_tokens..end.div_ceil(page_tokens);
            let sink_pages = rng.random_range(0..=pages.start);
            let ring_pages = pages.len() + rng.random_range(0..3);
            let list = sink_pages + ring_pages;
            let first_steady = steady.len();
            steady.resize(first_steady + request_rows * list, WILD);
            entries.push(Entry {
                tokens: end as u32 + 1,
                first_steady: first_steady as u32,
                sink_pages: sink_pages as u32,
                ring_pages: ring_pages as u32,
                ..entry
            });
            for head in 0..kv_heads {
                for page in pages.clone() {
                    let mut content = vec![nan(); page_words];
                    for token in (page * page_tokens).max(first)..((page + 1) * page_tokens).min(end) {
                        content[token % page_tokens * head_words..][..head_words]
                            .copy_from_slice(prompts.key(request, token, head));
                    }
                    let place = sink_pages + (page - sink_pages) % ring_pages;
                    used.push((first_steady + (first_row + head) * list + place, content));
                }
            }
        }
        used.shuffle(rng);
        let mut pool = vec![nan(); rng.random_range(0..2) * page_words];
        for (place, content) in used {
            assert_eq!(steady[place], WILD, "each page has its place");
            steady[place] = (pool.len() / page_words) as u32;
            pool.extend(content);
        }
        Self { prompts, entries, steady, pool, page_tokens }
    }

    /// The summaries after the kernel ran in the order of `schedule`.
    ///
    /// # Errors
    /// What the emulator found wrong.
    pub fn emulate(&self, schedule: u64) -> Result<Vec<u128>, Fault> {
        let table = &self.prompts.table;
        let (pool, summaries) = (words(&self.pool), words(&table.summaries()));
        let entries = words(&entry_words(&self.entries));
        let directories = Buffer::from_slice(&table.directories);
        let steady = Buffer::from_slice(&self.steady);
        let [first_row, request_rows, kv_heads, head_words, chunk_tokens, segment_partitions] = table.sizes();
        let page_tokens = self.page_tokens as u32;
        let kernel = match table.operator {
            Operator::Mean => index::chunk_mean_step,
            Operator::Bounds => index::chunk_bounds_step,
        };
        Launch::new(self.entries.len() as u32, index_step::BLOCK).seed(schedule).run(|| {
            // SAFETY: the emulator checks every access.
            unsafe {
                kernel(
                    entries.view(),
                    steady.view(),
                    pool.view(),
                    directories.view(),
                    first_row,
                    request_rows,
                    kv_heads,
                    head_words,
                    page_tokens,
                    chunk_tokens,
                    segment_partitions,
                    summaries.view_mut(),
                );
            }
        })?;
        Ok(to_words(&summaries))
    }
}

/// A word that makes everything that it comes into NaN.
fn nan() -> u128 {
    bytemuck::cast([bf16::NAN; WORD_ELEMENTS])
}

/// Partitions that an entry's kernels summarise.
fn chunks_of(entry: &Entry) -> u32 {
    if entry.tokens == 0 { 0 } else { entry.new_partitions }
}
