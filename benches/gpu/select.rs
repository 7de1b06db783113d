//! `score`, `select` and `top_k`.

use std::error::Error;

use half::bf16;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinkv::backend::cpu;
use spinkv::backend::cuda::driver::{DeviceBuffer, Result as DriverResult, Stream};
use spinkv::backend::cuda::kernels::{Score, SelectPartitions, TopK};
use spinkv::memory::Word;
use spinkv::pipeline::GroupMerge;
use spinkv_kernels::abi::score::max_tiles;
use spinkv_kernels::abi::{Entry, WORD_BYTES, WORD_ELEMENTS};

use crate::measure::{Bench, Shape};

/// Qwen3-14B: 8 KV heads of 128, 5 query heads each.
const KV_HEADS: u32 = 8;
const GROUP: u32 = 5;
const HEAD_WORDS: u32 = 16;
/// Tokens of a chunk, and the chunks that begin in a segment of 512 pages of 8 tokens.
const CHUNK: u32 = 8;
const SEGMENT_PARTITIONS: u32 = 512;
/// Partitions selected: 1.56% of 128K tokens.
const LIMIT: u32 = 256;
/// Input sets to rotate among.
const SETS: usize = 3;
/// Bytes that lie at least between two uses of a set: more than twice the L2.
const APART: usize = 128 << 20;

pub fn run(bench: &mut Bench) -> Result<(), Box<dyn Error>> {
    bench.group(
        "select: chunks of 8, 8 KV heads of 128 in groups of 5, 256 of a row selected; ceiling: device to device, read + written (the \
         kernels hardly write)",
    );
    let (stream, words) = (bench.stream.clone(), (512 << 20) / WORD_BYTES);
    let (from, to) =
        (DeviceBuffer::<Word>::zeroed(&stream, words)?, DeviceBuffer::<Word>::zeroed(&stream, words)?);
    let bytes = 2 * from.bytes();
    let ceiling = bench.row("copy", "512 MiB", bytes, None, |_| to.copy_from(&stream, 0, &from, 0, words))?;
    drop((from, to));

    for (batch, tokens) in [(16, 131_072), (8, 131_072), (1, 131_072), (16, 32_768), (8, 32_768), (1, 32_768)]
    {
        Step::new(bench, batch, tokens)?.rows(bench, ceiling)?;
    }
    for (rows, stride, k) in [(128, 16_384, 256), (128, 2_048, 32), (8, 16_384, 256)] {
        Scores::new(bench, rows, stride)?.row(bench, k)?;
    }
    Ok(())
}

/// What a decode step's Select works on, several times.
struct Step {
    batch: u32,
    partitions: u32,
    entries: DeviceBuffer<Entry>,
    directories: DeviceBuffer<u32>,
    queries: DeviceBuffer<Word>,
    host_queries: Vec<[bf16; WORD_ELEMENTS]>,
    /// Of each set.
    summaries: Vec<DeviceBuffer<Word>>,
    logits: Vec<DeviceBuffer<f32>>,
    statistics: Vec<DeviceBuffer<f32>>,
    block: Vec<[bf16; WORD_ELEMENTS]>,
    segments: Vec<u32>,
    keys: DeviceBuffer<Word>,
    ids: DeviceBuffer<u32>,
    selected: DeviceBuffer<u32>,
}

impl Step {
    fn new(bench: &Bench, batch: u32, tokens: u32) -> Result<Self, Box<dyn Error>> {
        let stream = &bench.stream;
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        let partitions = tokens / CHUNK;
        let of_request = partitions / SEGMENT_PARTITIONS;
        let entries: Vec<Entry> = (0..batch)
            .map(|request| Entry {
                tokens,
                directory: request * of_request,
                partitions,
                limit: LIMIT,
                ..Entry::default()
            })
            .collect();
        let mut segments: Vec<u32> = (0..batch * of_request).collect();
        segments.shuffle(&mut rng);
        let block: Vec<[bf16; WORD_ELEMENTS]> = words(&mut rng, 1 << 20);
        let host_queries = words(&mut rng, (batch * KV_HEADS * GROUP * HEAD_WORDS) as usize);

        let words = (batch * KV_HEADS * partitions * HEAD_WORDS) as usize;
        // Enough sets that two uses of one are far apart.
        let sets = SETS.max(APART.div_ceil(words * WORD_BYTES) + 1);
        let rows = (batch * KV_HEADS) as usize;
        let heads = rows * GROUP as usize;
        let (mut summaries, mut logits, mut statistics) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..sets {
            let set = DeviceBuffer::<Word>::zeroed(stream, words)?;
            for at in (0..words).step_by(block.len()) {
                set.write(stream, at, bytemuck::cast_slice(&block[..block.len().min(words - at)]))?;
            }
            summaries.push(set);
            logits.push(DeviceBuffer::zeroed(stream, heads * partitions as usize)?);
            statistics.push(DeviceBuffer::zeroed(stream, heads * max_tiles(partitions) as usize * 2)?);
        }
        Ok(Self {
            batch,
            partitions,
            entries: DeviceBuffer::from_slice(stream, &entries)?,
            directories: DeviceBuffer::from_slice(stream, &segments)?,
            queries: DeviceBuffer::from_slice(stream, bytemuck::cast_slice(&host_queries))?,
            host_queries,
            summaries,
            logits,
            statistics,
            block,
            segments,
            keys: DeviceBuffer::zeroed(stream, 1)?,
            ids: DeviceBuffer::zeroed(stream, rows * LIMIT as usize)?,
            selected: DeviceBuffer::zeroed(stream, rows)?,
        })
    }

    fn score(&self, bench: &Launcher, round: usize) -> DriverResult<()> {
        let set = round % self.summaries.len();
        let launch = Score {
            entries: &self.entries,
            directories: &self.directories,
            summaries: &self.summaries[set],
            queries: &self.queries,
            kv_heads: KV_HEADS,
            group: GROUP,
            head_words: HEAD_WORDS,
            bounds: false,
            segment_partitions: SEGMENT_PARTITIONS,
            request_rows: KV_HEADS,
            layer: 0,
            scale: scale(),
            stride: self.partitions,
            row_pages: None,
            always: None,
            logits: &self.logits[set],
            statistics: &self.statistics[set],
        };
        // SAFETY: the entries fit the stride and the directories name all segments once; nothing else uses the buffers.
        unsafe { launch.launch(&bench.kernels, &bench.stream) }
    }

    fn select(&self, bench: &Launcher, round: usize) -> DriverResult<()> {
        let set = round % self.summaries.len();
        let launch = SelectPartitions {
            entries: &self.entries,
            logits: &self.logits[set],
            statistics: Some(&self.statistics[set]),
            kv_heads: KV_HEADS,
            group: GROUP,
            stride: self.partitions,
            merge: GroupMerge::Max,
            least: None,
            top_p: 1.0,
            marks: None,
            first_row: 0,
            row_pages: None,
            estimates: None,
            resident: self.partitions,
            keys: &self.keys,
            capacity: LIMIT,
            ids: &self.ids,
            selected: &self.selected,
        };
        // SAFETY: the entries fit the stride; nothing else uses the buffers.
        unsafe { launch.launch(&bench.kernels, &bench.stream) }
    }

    /// Refuses to time a selection that is wrong: of some rows the scores of what was selected against the CPU reference.
    fn check(&self, bench: &Launcher) -> Result<(), Box<dyn Error>> {
        self.score(bench, 0)?;
        self.select(bench, 0)?;
        let ids = self.ids.to_vec(&bench.stream)?;
        let partitions = self.partitions as usize;
        let head_dim = HEAD_WORDS as usize * WORD_ELEMENTS;
        let numbers = |words: &[[bf16; WORD_ELEMENTS]]| -> Vec<f32> {
            words.as_flattened().iter().map(|element| element.to_f32()).collect()
        };
        for row in (0..(self.batch * KV_HEADS) as usize).step_by(13) {
            let (request, head) = (row / KV_HEADS as usize, row % KV_HEADS as usize);
            let of_request = self.segments.len() / self.batch as usize;
            let mut summaries = Vec::with_capacity(partitions * head_dim);
            for segment in &self.segments[request * of_request..][..of_request] {
                let first = (*segment * KV_HEADS + head as u32) * SEGMENT_PARTITIONS * HEAD_WORDS;
                // The summaries repeat the block, which a segment's rows divide.
                let first = first as usize % self.block.len();
                summaries.extend(numbers(&self.block[first..][..(SEGMENT_PARTITIONS * HEAD_WORDS) as usize]));
            }
            let width = (GROUP * HEAD_WORDS) as usize;
            let queries = numbers(&self.host_queries[row * width..][..width]);
            let (mut scores, mut logits) = (vec![0.0; partitions], vec![0.0; partitions]);
            cpu::score(&queries, &summaries, head_dim, GroupMerge::Max, &mut scores, &mut logits);
            let mut expected = Vec::new();
            cpu::top_k(&scores, LIMIT as usize, &mut expected);
            let found = &ids[row * LIMIT as usize..][..LIMIT as usize];
            let border = expected.iter().map(|id| scores[*id as usize]).fold(f32::INFINITY, f32::min);
            // Scores differ in their last bits, so partitions at the border may change places.
            let least = found.iter().map(|id| scores[*id as usize]).fold(f32::INFINITY, f32::min);
            if !found.is_sorted_by(|a, b| a < b) || least < border * 0.999 {
                return Err(format!(
                    "row {row}: a score of {least} was selected where {border} is the least"
                )
                .into());
            }
        }
        Ok(())
    }

    fn rows(&self, bench: &mut Bench, ceiling: f64) -> Result<(), Box<dyn Error>> {
        let launcher = Launcher::of(bench);
        self.check(&launcher)?;
        let tokens = self.partitions * CHUNK;
        let shape = Shape::new(format!("batch {}, {}K tokens", self.batch, tokens / 1024)).context(tokens);
        let (read, logits) = (self.summaries[0].bytes(), self.logits[0].bytes());
        let sets = self.summaries.len();
        let nothing = |_: &Stream| Ok(());
        let score = |_: &Stream, set: usize| self.score(&launcher, set);
        bench.graph_row("score", shape.clone(), read + logits, Some(ceiling), sets, nothing, score)?;
        let select = |_: &Stream, set: usize| self.select(&launcher, set);
        bench.graph_row("select", shape.clone(), logits, Some(ceiling), sets, nothing, select)?;
        let both = |_: &Stream, set: usize| {
            self.score(&launcher, set)?;
            self.select(&launcher, set)
        };
        bench.graph_row("score + select", shape, read + 2 * logits, Some(ceiling), sets, nothing, both)?;
        Ok(())
    }
}

/// Rows of scores, several times.
struct Scores {
    rows: usize,
    stride: usize,
    host: Vec<f32>,
    sets: Vec<DeviceBuffer<f32>>,
    counts: DeviceBuffer<u32>,
    keys: DeviceBuffer<Word>,
}

impl Scores {
    fn new(bench: &Bench, rows: usize, stride: usize) -> Result<Self, Box<dyn Error>> {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let host: Vec<f32> = (0..rows * stride).map(|_| normal(&mut rng)).collect();
        let sets = SETS.max(APART.div_ceil(host.len() * 4) + 1);
        Ok(Self {
            rows,
            stride,
            sets: (0..sets)
                .map(|_| DeviceBuffer::from_slice(&bench.stream, &host))
                .collect::<DriverResult<_>>()?,
            host,
            counts: DeviceBuffer::from_slice(&bench.stream, &vec![stride as u32; rows])?,
            keys: DeviceBuffer::zeroed(&bench.stream, 1)?,
        })
    }

    fn row(&self, bench: &mut Bench, k: u32) -> Result<(), Box<dyn Error>> {
        let launcher = Launcher::of(bench);
        let wanted = DeviceBuffer::from_slice(&bench.stream, &vec![k; self.rows])?;
        let ids = DeviceBuffer::<u32>::zeroed(&bench.stream, self.rows * k as usize)?;
        let selected = DeviceBuffer::<u32>::zeroed(&bench.stream, self.rows)?;
        let launch = |round: usize| {
            let launch = TopK {
                scores: &self.sets[round % self.sets.len()],
                counts: &self.counts,
                k: &wanted,
                stride: self.stride as u32,
                resident: self.stride as u32,
                keys: &self.keys,
                capacity: k,
                ids: &ids,
                selected: &selected,
            };
            // SAFETY: no count is above the stride; nothing else uses the buffers.
            unsafe { launch.launch(&launcher.kernels, &launcher.stream) }
        };
        launch(0)?;
        let found = ids.to_vec(&bench.stream)?;
        for row in 0..self.rows {
            let mut expected = Vec::new();
            cpu::top_k(&self.host[row * self.stride..][..self.stride], k as usize, &mut expected);
            if found[row * k as usize..][..k as usize] != expected {
                return Err(format!("row {row}: another selection than the reference's").into());
            }
        }
        let shape = format!("{} x {}, k {k}", self.rows, self.stride);
        let (bytes, sets) = ((self.host.len() * 4) as u64, self.sets.len());
        bench.graph_row("top_k", shape, bytes, None, sets, |_| Ok(()), |_, set| launch(set))?;
        Ok(())
    }
}

/// What a launch needs of the bench, while the bench counts.
struct Launcher {
    kernels: spinkv::backend::cuda::kernels::Kernels,
    stream: std::sync::Arc<Stream>,
}

impl Launcher {
    fn of(bench: &Bench) -> Self {
        Self { kernels: bench.kernels.clone(), stream: bench.stream.clone() }
    }
}

fn scale() -> f32 {
    1.0 / ((HEAD_WORDS as usize * WORD_ELEMENTS) as f32).sqrt()
}

/// Random bf16.
fn words(rng: &mut impl Rng, count: usize) -> Vec<[bf16; WORD_ELEMENTS]> {
    (0..count).map(|_| std::array::from_fn(|_| bf16::from_f32(rng.random_range(-1.0..1.0)))).collect()
}

/// A number of the normal distribution: Box and Muller's.
fn normal(rng: &mut impl Rng) -> f32 {
    let (radius, angle) =
        (rng.random_range(f32::MIN_POSITIVE..1.0), rng.random_range(0.0..std::f32::consts::TAU));
    (-2.0 * radius.ln()).sqrt() * angle.cos()
}
