//! The kernels that index prompts against a copy within the device's memory.

use std::error::Error;

use half::bf16;
use half::slice::HalfFloatSliceExt;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinkv::backend::cpu;
use spinkv::backend::cuda::driver::DeviceBuffer;
use spinkv::backend::cuda::kernels::{IndexOperator, IndexPrompts, SummaryTable};
use spinkv::memory::Word;
use spinkv_kernels::abi::{Entry, WORD_BYTES, WORD_ELEMENTS};

use crate::measure::{Bench, Shape};

/// Qwen3-14B: 8 KV heads of 128.
const KV_HEADS: u32 = 8;
const HEAD_WORDS: u32 = 16;
/// Tokens of the batch: 512 MiB of keys, several times the L2.
const TOKENS: u32 = 262_144;
const REQUESTS: u32 = 16;
const REQUEST_TOKENS: u32 = TOKENS / REQUESTS;
/// Partitions of a segment, where a partition is a page.
const SEGMENT_PARTITIONS: u32 = 512;

pub fn chunk_mean(bench: &mut Bench) -> Result<(), Box<dyn Error>> {
    run(bench, "chunk_mean", IndexOperator::Mean)
}

pub fn chunk_bounds(bench: &mut Bench) -> Result<(), Box<dyn Error>> {
    run(bench, "chunk_bounds", IndexOperator::Bounds)
}

fn run(bench: &mut Bench, name: &'static str, operator: IndexOperator) -> Result<(), Box<dyn Error>> {
    let stream = bench.stream.clone();
    let kernels = bench.kernels.clone();
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let words = (TOKENS * KV_HEADS * HEAD_WORDS) as usize;
    let block: Vec<[bf16; WORD_ELEMENTS]> =
        (0..1 << 20).map(|_| std::array::from_fn(|_| bf16::from_f32(rng.random_range(-1.0..1.0)))).collect();
    let keys = DeviceBuffer::<Word>::zeroed(&stream, words)?;
    for at in (0..words).step_by(block.len()) {
        keys.write(&stream, at, bytemuck::cast_slice(&block[..block.len().min(words - at)]))?;
    }

    bench.group(&format!(
        "{name}: 16 prompts of 16K tokens, 8 heads of 128; ceiling: device to device, read + written"
    ));
    let copy = DeviceBuffer::<Word>::zeroed(&stream, words)?;
    let bytes = (words * WORD_BYTES) as u64;
    let ceiling =
        bench.row("copy", "512 MiB", 2 * bytes, None, |_| copy.copy_from(&stream, 0, &keys, 0, words))?;

    for chunk_tokens in [8, 16, 32, 64] {
        let chunks = REQUEST_TOKENS / chunk_tokens;
        let segments = chunks.div_ceil(SEGMENT_PARTITIONS);
        let entries: Vec<Entry> = (0..REQUESTS)
            .map(|request| Entry {
                tokens: REQUEST_TOKENS,
                directory: request * segments,
                new_partitions: chunks,
                ..Entry::default()
            })
            .collect();
        let directories: Vec<u32> = (0..REQUESTS * segments).rev().collect();
        let first_token: Vec<u32> = (0..REQUESTS).map(|request| request * REQUEST_TOKENS).collect();
        let first_chunk: Vec<u32> = (0..=REQUESTS).map(|request| request * chunks).collect();
        let width = operator.parts() * HEAD_WORDS;
        let summary_words = REQUESTS * segments * KV_HEADS * SEGMENT_PARTITIONS * width;
        let summaries = DeviceBuffer::<Word>::zeroed(&stream, summary_words as usize)?;
        let launch = IndexPrompts {
            table: SummaryTable {
                operator,
                entries: &DeviceBuffer::from_slice(&stream, &entries)?,
                directories: &DeviceBuffer::from_slice(&stream, &directories)?,
                first_row: 0,
                request_rows: KV_HEADS,
                kv_heads: KV_HEADS,
                head_words: HEAD_WORDS,
                partition_tokens: chunk_tokens,
                segment_partitions: SEGMENT_PARTITIONS,
                summaries: &summaries,
            },
            keys: &keys,
            first_token: &DeviceBuffer::from_slice(&stream, &first_token)?,
            first_chunk: &DeviceBuffer::from_slice(&stream, &first_chunk)?,
            chunks: REQUESTS * chunks,
        };
        // SAFETY: the tables name keys and segments that exist, each place once; nothing else uses the buffers.
        unsafe { launch.launch(&kernels, &stream)? };
        check(&block, operator, chunk_tokens, &directories, &summaries.to_vec(&stream)?)?;
        let written = u64::from(REQUESTS * chunks * KV_HEADS * width) * WORD_BYTES as u64;
        let shape = Shape::new(format!("chunks of {chunk_tokens}")).context(REQUEST_TOKENS);
        bench.row(name, shape, bytes + written, Some(ceiling), |_| {
            // SAFETY: as above.
            unsafe { launch.launch(&kernels, &stream) }
        })?;
    }
    Ok(())
}

/// Refuses to time summaries that are wrong: a few thousand of all requests against the CPU reference, bit for bit.
fn check(
    block: &[[bf16; WORD_ELEMENTS]],
    operator: IndexOperator,
    chunk_tokens: u32,
    directories: &[u32],
    summaries: &[Word],
) -> Result<(), Box<dyn Error>> {
    let (kv_heads, head_words) = (KV_HEADS as usize, HEAD_WORDS as usize);
    let (chunk_tokens, segment_partitions) = (chunk_tokens as usize, SEGMENT_PARTITIONS as usize);
    let chunks = REQUEST_TOKENS as usize / chunk_tokens;
    let segments = directories.len() / REQUESTS as usize;
    let width = operator.parts() as usize * head_words * WORD_ELEMENTS;
    let found: &[bf16] = bytemuck::cast_slice(summaries);
    let mut expected = vec![0.0; width];
    for summary in (0..REQUESTS as usize * kv_heads * chunks).step_by(97) {
        let (request, head, chunk) =
            (summary / chunks / kv_heads, summary / chunks % kv_heads, summary % chunks);
        let first = (request * chunks + chunk) * chunk_tokens;
        // The keys repeat the block.
        let key = |token: usize| (token * kv_heads + head) * head_words % block.len();
        let keys: Vec<f32> = (first..first + chunk_tokens)
            .flat_map(|token| block[key(token)..][..head_words].as_flattened().to_f32_vec())
            .collect();
        match operator {
            IndexOperator::Mean => cpu::mean_key(&keys, &mut expected),
            IndexOperator::Bounds => cpu::key_bounds(&keys, &mut expected),
        }
        let segment = directories[request * segments + chunk / segment_partitions] as usize;
        let place = (segment * kv_heads + head) * segment_partitions + chunk % segment_partitions;
        for (element, expected) in expected.iter().enumerate() {
            let (found, expected) = (found[place * width + element], bf16::from_f32(*expected));
            if found.to_bits() != expected.to_bits() {
                return Err(format!(
                    "request {request}, head {head}, chunk {chunk}, element {element}: {found} where {expected} was expected"
                )
                .into());
            }
        }
    }
    Ok(())
}
