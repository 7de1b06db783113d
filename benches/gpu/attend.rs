//! `attend_128`.

use std::error::Error;

use half::bf16;
use rand::seq::index;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinkv::backend::cuda::driver::{DeviceBuffer, Result as DriverResult, Stream};
use spinkv::backend::cuda::kernels::{Attend, Kernels};
use spinkv::memory::Word;
use spinkv_kernels::abi::attend::partial_words;
use spinkv_kernels::abi::{Entry, WORD_BYTES, WORD_ELEMENTS};

use crate::measure::{Bench, Shape};

/// Qwen3-14B: 8 KV heads of 128, 5 query heads each.
const KV_HEADS: usize = 8;
const GROUP: usize = 5;
const HEAD_WORDS: usize = 16;
/// Bytes of the page pool: the largest point reads all of it once.
const POOL_BYTES: usize = 2 << 30;
/// Bytes that the sets of a replay read at least, each page once: several times the L2.
const APART: usize = 512 << 20;

pub fn run(bench: &mut Bench) -> Result<(), Box<dyn Error>> {
    bench.group(
        "attend: 8 KV heads of 128 in groups of 5, pages anywhere in 2 GiB; ceiling: device to device, read + written (the kernel hardly \
         writes)",
    );
    let (stream, words) = (bench.stream.clone(), (512 << 20) / WORD_BYTES);
    let (from, to) =
        (DeviceBuffer::<Word>::zeroed(&stream, words)?, DeviceBuffer::<Word>::zeroed(&stream, words)?);
    let bytes = 2 * from.bytes();
    let ceiling = bench.row("copy", "512 MiB", bytes, None, |_| to.copy_from(&stream, 0, &from, 0, words))?;
    drop((from, to));

    let mut rng = ChaCha8Rng::seed_from_u64(3);
    // A run that is repeated: the host knows every page without holding them all.
    let block: Vec<[bf16; WORD_ELEMENTS]> = (0..1 << 20).map(|_| random_word(&mut rng)).collect();
    let pool = DeviceBuffer::<Word>::zeroed(&stream, POOL_BYTES / WORD_BYTES)?;
    for at in (0..pool.len()).step_by(block.len()) {
        pool.write(&stream, at, bytemuck::cast_slice(&block))?;
    }
    for (batch, tokens, page_tokens) in [
        (1, 2048, 8),
        (16, 2048, 8),
        (16, 2048, 16),
        (16, 2048, 64),
        (64, 2048, 8),
        (64, 2048, 16),
        (16, 32_768, 16),
        (16, 32_768, 64),
    ] {
        let rows = batch * KV_HEADS;
        let best = bench.kernels.attend_splits(rows as u32, tokens as u32);
        for splits in [best / 2, best, best * 2] {
            if splits > 0 {
                Step::new(bench, &pool, &block, [batch, tokens, page_tokens, splits as usize])?
                    .row(bench, ceiling)?;
            }
        }
    }
    Ok(())
}

/// Attention of a step's rows, all with as many tokens, several times.
struct Step<'a> {
    pool: &'a DeviceBuffer<Word>,
    block: &'a [[bf16; WORD_ELEMENTS]],
    batch: usize,
    tokens: usize,
    page_tokens: usize,
    splits: usize,
    entries: DeviceBuffer<Entry>,
    /// `[sets]` of `[rows, pages]`.
    lists: Vec<Vec<u32>>,
    pages: Vec<DeviceBuffer<u32>>,
    counts: DeviceBuffer<u32>,
    host_queries: Vec<[bf16; WORD_ELEMENTS]>,
    queries: DeviceBuffer<Word>,
    partials: DeviceBuffer<Word>,
    arrivals: DeviceBuffer<u32>,
    outputs: DeviceBuffer<Word>,
    lse: DeviceBuffer<f32>,
}

impl<'a> Step<'a> {
    fn new(
        bench: &Bench,
        pool: &'a DeviceBuffer<Word>,
        block: &'a [[bf16; WORD_ELEMENTS]],
        [batch, tokens, page_tokens, splits]: [usize; 4],
    ) -> Result<Self, Box<dyn Error>> {
        let (stream, rows) = (&bench.stream, batch * KV_HEADS);
        let mut rng = ChaCha8Rng::seed_from_u64(4);
        let of_row = tokens / page_tokens;
        let in_pool = pool.len() / (2 * page_tokens * HEAD_WORDS);
        let bytes = rows * tokens * 2 * HEAD_WORDS * WORD_BYTES;
        let sets = APART.div_ceil(bytes).min(in_pool / (rows * of_row));
        let all = index::sample(&mut rng, in_pool, sets * rows * of_row);
        let all: Vec<u32> = all.into_iter().map(|page| page as u32).collect();
        let lists: Vec<Vec<u32>> = all.chunks_exact(rows * of_row).map(<[u32]>::to_vec).collect();
        let entry =
            Entry { tokens: tokens as u32, ring_pages: 1, leaving_key: of_row as u32, ..Entry::default() };
        let queries = rows * GROUP * HEAD_WORDS;
        let host_queries: Vec<_> = (0..queries).map(|_| random_word(&mut rng)).collect();
        Ok(Self {
            pool,
            block,
            batch,
            tokens,
            page_tokens,
            splits,
            entries: DeviceBuffer::from_slice(stream, &vec![entry; batch])?,
            pages: lists
                .iter()
                .map(|list| DeviceBuffer::from_slice(stream, list))
                .collect::<Result<_, _>>()?,
            lists,
            counts: DeviceBuffer::from_slice(stream, &vec![of_row as u32; rows])?,
            queries: DeviceBuffer::from_slice(stream, bytemuck::cast_slice(&host_queries))?,
            host_queries,
            partials: DeviceBuffer::zeroed(
                stream,
                rows * splits * partial_words(HEAD_WORDS as u32) as usize,
            )?,
            arrivals: DeviceBuffer::zeroed(stream, rows)?,
            outputs: DeviceBuffer::zeroed(stream, queries)?,
            lse: DeviceBuffer::zeroed(stream, rows * GROUP)?,
        })
    }

    fn launch(&self, kernels: &Kernels, stream: &Stream, set: usize) -> DriverResult<()> {
        let launch = Attend {
            entries: &self.entries,
            kv_heads: KV_HEADS as u32,
            group: GROUP as u32,
            layer: 0,
            head_words: HEAD_WORDS as u32,
            pages: &self.pages[set],
            page_counts: &self.counts,
            steady: &self.counts,
            biases: None,
            pool: self.pool,
            page_tokens: self.page_tokens as u32,
            queries: &self.queries,
            scale: scale(),
            awaited: None,
            splits: self.splits as u32,
            partials: &self.partials,
            arrivals: &self.arrivals,
            outputs: &self.outputs,
            lse: &self.lse,
        };
        // SAFETY: the lists name pages of the pool and nothing is steady; launches on one stream follow each other.
        unsafe { launch.launch(kernels, stream) }
    }

    fn row(&self, bench: &mut Bench, ceiling: f64) -> Result<(), Box<dyn Error>> {
        let (kernels, stream) = (bench.kernels.clone(), bench.stream.clone());
        self.launch(&kernels, &stream, 0)?;
        self.check(&stream)?;
        let shape = Shape::new(format!(
            "batch {}, pages of {}, {} splits",
            self.batch, self.page_tokens, self.splits
        ));
        let bytes = self.batch * KV_HEADS * self.tokens * 2 * HEAD_WORDS * WORD_BYTES;
        let sets = self.lists.len();
        bench.graph_row(
            "attend",
            shape.context(self.tokens as u32),
            bytes as u64,
            Some(ceiling),
            sets,
            |_| Ok(()),
            |stream, set| self.launch(&kernels, stream, set),
        )?;
        Ok(())
    }

    /// Refuses to time a wrong result: of some rows a head against f64.
    fn check(&self, stream: &Stream) -> Result<(), Box<dyn Error>> {
        let outputs = self.outputs.to_vec(stream)?;
        let outputs: &[[bf16; WORD_ELEMENTS]] = bytemuck::cast_slice(&outputs);
        let of_row = self.tokens / self.page_tokens;
        for row in (0..self.batch * KV_HEADS).step_by(97) {
            let head = row * GROUP + row % GROUP;
            let query = self.host_queries[head * HEAD_WORDS..][..HEAD_WORDS].as_flattened();
            let tokens = self.lists[0][row * of_row..][..of_row].iter().flat_map(|page| {
                (0..self.page_tokens).map(move |token| {
                    let key = (*page as usize * 2 * self.page_tokens + token) * HEAD_WORDS;
                    let of = |at: usize| self.block[at % self.block.len()..][..HEAD_WORDS].as_flattened();
                    (of(key), of(key + self.page_tokens * HEAD_WORDS))
                })
            });
            let found = outputs[head * HEAD_WORDS..][..HEAD_WORDS].as_flattened();
            check_head(query, tokens, found).map_err(|wrong| format!("attend, row {row}: {wrong}"))?;
        }
        Ok(())
    }
}

/// Whether a head's output is that of attention in f64 over `tokens`, keys with values.
pub fn check_head<T: AsRef<[bf16]>>(
    query: &[bf16],
    tokens: impl Iterator<Item = (T, T)>,
    found: &[bf16],
) -> Result<(), String> {
    let (mut sum, mut expected) = (0.0, vec![0.0; query.len()]);
    for (key, value) in tokens {
        let product = |(q, k): (&bf16, &bf16)| f64::from(q.to_f32()) * f64::from(k.to_f32());
        let dot: f64 = query.iter().zip(key.as_ref()).map(product).sum();
        let weight = (dot * f64::from(scale())).exp();
        sum += weight;
        for (sum, value) in expected.iter_mut().zip(value.as_ref()) {
            *sum += weight * f64::from(value.to_f32());
        }
    }
    let off: f64 = found.iter().zip(&expected).map(|(f, e)| (f64::from(f.to_f32()) - e / sum).powi(2)).sum();
    let norm: f64 = expected.iter().map(|e| (e / sum).powi(2)).sum();
    let close = off.sqrt() <= 5e-3 * norm.sqrt();
    if close { Ok(()) } else { Err(format!("off by {} of {}", off.sqrt(), norm.sqrt())) }
}

pub fn random_word(rng: &mut impl Rng) -> [bf16; WORD_ELEMENTS] {
    std::array::from_fn(|_| bf16::from_f32(rng.random_range(-1.7..1.7)))
}

/// Factor of the logits.
pub fn scale() -> f32 {
    1.0 / ((HEAD_WORDS * WORD_ELEMENTS) as f32).sqrt()
}
