//! `prefill_128` and `prefill_wgmma_128`.

use std::error::Error;

use half::bf16;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use spinkv::backend::cuda::driver::{DeviceBuffer, Result as DriverResult, Stream};
use spinkv::backend::cuda::kernels::{Kernels, Prefill, PrefillVariant};
use spinkv::memory::Word;
use spinkv_kernels::abi::prefill::query_tiles;
use spinkv_kernels::abi::{WORD_BYTES, WORD_ELEMENTS};

use crate::attend::{check_head, random_word, scale};
use crate::measure::{Bench, Shape};

/// Qwen3-14B: 8 KV heads of 128, 5 query heads each.
const KV_HEADS: usize = 8;
const HEADS: usize = 5 * KV_HEADS;
const HEAD_WORDS: usize = 16;
/// Words of a run that fills a tensor by being repeated: the host knows every element without holding them all. No multiple of a row, so
/// that no token is another's copy.
const RUN: usize = 1_000_003;

pub fn run(bench: &mut Bench) -> Result<(), Box<dyn Error>> {
    bench.group("prefill: causal, 40 query heads and 8 KV heads of 128; bytes: each tensor once");
    for chunks in [&[[0, 8192]][..], &[[0, 32_768]], &[[14_336, 2048]; 4]] {
        let batch = Batch::new(bench, chunks)?;
        batch.row(bench, PrefillVariant::Mma)?;
        if Prefill::variant(&bench.kernels) == PrefillVariant::Wgmma {
            batch.row(bench, PrefillVariant::Wgmma)?;
        }
    }
    Ok(())
}

/// A tensor of repeated random words.
struct Tensor {
    run: Vec<[bf16; WORD_ELEMENTS]>,
    words: DeviceBuffer<Word>,
}

impl Tensor {
    fn random(stream: &Stream, seed: u64, rows: usize) -> Result<Self, Box<dyn Error>> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let run: Vec<_> = (0..RUN).map(|_| random_word(&mut rng)).collect();
        let words = DeviceBuffer::<Word>::zeroed(stream, rows * HEAD_WORDS)?;
        for at in (0..words.len()).step_by(RUN) {
            let part = &run[..RUN.min(words.len() - at)];
            words.write(stream, at, bytemuck::cast_slice(part))?;
        }
        Ok(Self { run, words })
    }

    /// A head of a token.
    fn row(&self, row: usize) -> Vec<bf16> {
        (row * HEAD_WORDS..(row + 1) * HEAD_WORDS).flat_map(|word| self.run[word % RUN]).collect()
    }
}

/// Requests, each with a past and new tokens.
struct Batch<'a> {
    chunks: &'a [[usize; 2]],
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    first_query: DeviceBuffer<u32>,
    first_key: DeviceBuffer<u32>,
    first_tile: DeviceBuffer<u32>,
    outputs: DeviceBuffer<Word>,
    lse: DeviceBuffer<f32>,
    /// Of the batch: query tokens, key tokens, query tiles.
    totals: [u32; 3],
}

impl<'a> Batch<'a> {
    fn new(bench: &Bench, chunks: &'a [[usize; 2]]) -> Result<Self, Box<dyn Error>> {
        let stream = &bench.stream;
        let mut sums = [vec![0], vec![0], vec![0]];
        let mut totals = [0; 3];
        for [past, tokens] in chunks {
            let of_chunk = [*tokens as u32, (past + tokens) as u32, query_tiles(*tokens as u32)];
            for ((sums, total), own) in sums.iter_mut().zip(&mut totals).zip(of_chunk) {
                *total += own;
                sums.push(*total);
            }
        }
        let [query_tokens, key_tokens, _] = totals.map(|total| total as usize);
        Ok(Self {
            chunks,
            queries: Tensor::random(stream, 5, query_tokens * HEADS)?,
            keys: Tensor::random(stream, 6, key_tokens * KV_HEADS)?,
            values: Tensor::random(stream, 7, key_tokens * KV_HEADS)?,
            first_query: DeviceBuffer::from_slice(stream, &sums[0])?,
            first_key: DeviceBuffer::from_slice(stream, &sums[1])?,
            first_tile: DeviceBuffer::from_slice(stream, &sums[2])?,
            outputs: DeviceBuffer::zeroed(stream, query_tokens * HEADS * HEAD_WORDS)?,
            lse: DeviceBuffer::zeroed(stream, query_tokens * HEADS)?,
            totals,
        })
    }

    fn launch(&self, variant: PrefillVariant, kernels: &Kernels, stream: &Stream) -> DriverResult<()> {
        let [query_tokens, key_tokens, tiles] = self.totals;
        let launch = Prefill {
            queries: &self.queries.words,
            keys: &self.keys.words,
            values: &self.values.words,
            first_query: &self.first_query,
            first_key: &self.first_key,
            first_tile: &self.first_tile,
            query_tokens,
            key_tokens,
            tiles,
            kv_heads: KV_HEADS as u32,
            group: (HEADS / KV_HEADS) as u32,
            head_words: HEAD_WORDS as u32,
            scale: scale(),
            outputs: &self.outputs,
            lse: &self.lse,
        };
        // SAFETY: the prefix sums are the chunks'; launches on one stream follow each other.
        unsafe { launch.launch_as(variant, kernels, stream) }
    }

    fn row(&self, bench: &mut Bench, variant: PrefillVariant) -> Result<(), Box<dyn Error>> {
        let (kernels, stream) = (bench.kernels.clone(), bench.stream.clone());
        self.launch(variant, &kernels, &stream)?;
        self.check(&stream)?;
        let (first, longest) = (self.chunks[0], self.chunks.iter().map(|[past, tokens]| past + tokens).max());
        let shape = match first {
            [0, tokens] => format!("{} x {tokens} tokens", self.chunks.len()),
            [past, tokens] => format!("{} x {tokens} tokens after {past}", self.chunks.len()),
        };
        let [query_tokens, key_tokens, _] = self.totals.map(|total| total as usize);
        let rows = 2 * query_tokens * HEADS + 2 * key_tokens * KV_HEADS;
        let bytes = rows * HEAD_WORDS * WORD_BYTES + self.lse.len() * size_of::<f32>();
        // Two products of a query and a key it sees, each a multiplication and an addition an element.
        let pairs: usize =
            self.chunks.iter().map(|[past, tokens]| tokens * past + tokens * (tokens + 1) / 2).sum();
        let flops = 4 * (HEAD_WORDS * WORD_ELEMENTS * HEADS * pairs) as u64;
        let shape = Shape::new(shape).context(longest.unwrap_or(0) as u32).flops(flops);
        let name = match variant {
            PrefillVariant::Mma => "prefill",
            PrefillVariant::Wgmma => "prefill_wgmma",
        };
        bench.row(name, shape, bytes as u64, None, |_| self.launch(variant, &kernels, &stream))?;
        Ok(())
    }

    /// Refuses to time a wrong result: of some tokens a head against f64.
    fn check(&self, stream: &Stream) -> Result<(), Box<dyn Error>> {
        let outputs = self.outputs.to_vec(stream)?;
        let outputs: &[[bf16; WORD_ELEMENTS]] = bytemuck::cast_slice(&outputs);
        let (mut first_query, mut first_key) = (0, 0);
        for [past, tokens] in self.chunks {
            for token in (0..*tokens).step_by(tokens / 7).chain([tokens - 1]) {
                let head = token % HEADS;
                let row = (first_query + token) * HEADS + head;
                let keys = (0..=past + token).map(|key| {
                    let of_key = (first_key + key) * KV_HEADS + head / (HEADS / KV_HEADS);
                    (self.keys.row(of_key), self.values.row(of_key))
                });
                let found = outputs[row * HEAD_WORDS..][..HEAD_WORDS].as_flattened();
                check_head(&self.queries.row(row), keys, found)
                    .map_err(|wrong| format!("prefill, token {token}, head {head}: {wrong}"))?;
            }
            (first_query, first_key) = (first_query + tokens, first_key + past + tokens);
        }
        Ok(())
    }
}
