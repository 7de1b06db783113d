//! `chunk_mean` against a copy within the device's memory.

use std::error::Error;

use half::bf16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinkv::backend::cpu::mean_key;
use spinkv::backend::cuda::driver::DeviceBuffer;
use spinkv::backend::cuda::kernels::ChunkMean;
use spinkv::memory::Word;
use spinkv_kernels::abi::{WORD_BYTES, WORD_ELEMENTS};

use crate::measure::Bench;

/// Qwen3-14B: 8 KV heads of 128.
const KV_HEADS: u32 = 8;
const HEAD_WORDS: u32 = 16;
/// Tokens of the batch: 512 MiB of keys, several times the L2.
const TOKENS: u32 = 262_144;
const REQUESTS: u32 = 16;

pub fn run(bench: &mut Bench) -> Result<(), Box<dyn Error>> {
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

    bench.group(
        "chunk_mean: 16 prompts of 16K tokens, 8 heads of 128; ceiling: device to device, read + written",
    );
    let copy = DeviceBuffer::<Word>::zeroed(&stream, words)?;
    let bytes = (words * WORD_BYTES) as u64;
    let ceiling =
        bench.row("copy", "512 MiB", 2 * bytes, None, |_| copy.copy_from(&stream, 0, &keys, 0, words))?;

    for chunk_tokens in [8, 16, 32, 64] {
        let chunks = TOKENS / chunk_tokens;
        let per_request = chunks / REQUESTS;
        let first_token: Vec<u32> =
            (0..REQUESTS).map(|request| request * per_request * chunk_tokens).collect();
        let first_chunk: Vec<u32> = (0..=REQUESTS).map(|request| request * per_request).collect();
        let summaries = DeviceBuffer::<Word>::zeroed(&stream, (chunks * KV_HEADS * HEAD_WORDS) as usize)?;
        let launch = ChunkMean {
            keys: &keys,
            first_token: &DeviceBuffer::from_slice(&stream, &first_token)?,
            first_chunk: &DeviceBuffer::from_slice(&stream, &first_chunk)?,
            chunks,
            kv_heads: KV_HEADS,
            head_words: HEAD_WORDS,
            chunk_tokens,
            summaries: &summaries,
        };
        // SAFETY: the tables ascend and every request has its keys; nothing else uses the buffers.
        unsafe { launch.launch(&kernels, &stream)? };
        check(&block, chunk_tokens as usize, &summaries.to_vec(&stream)?)?;
        bench.row(
            "chunk_mean",
            format!("chunks of {chunk_tokens}"),
            bytes + summaries.bytes(),
            Some(ceiling),
            |_| {
                // SAFETY: the tables ascend and every request has its keys; nothing else uses the buffers.
                unsafe { launch.launch(&kernels, &stream) }
            },
        )?;
    }
    Ok(())
}

/// Refuses to time means that are wrong: a few thousand summaries of all requests against the CPU reference.
fn check(
    block: &[[bf16; WORD_ELEMENTS]],
    chunk_tokens: usize,
    summaries: &[Word],
) -> Result<(), Box<dyn Error>> {
    let (kv_heads, head_words) = (KV_HEADS as usize, HEAD_WORDS as usize);
    let chunks = TOKENS as usize / chunk_tokens / REQUESTS as usize;
    let head_dim = head_words * WORD_ELEMENTS;
    let found: &[bf16] = bytemuck::cast_slice(summaries);
    let mut expected = vec![0.0; head_dim];
    for summary in (0..REQUESTS as usize * kv_heads * chunks).step_by(97) {
        let (request, head, chunk) =
            (summary / chunks / kv_heads, summary / chunks % kv_heads, summary % chunks);
        let first = (request * chunks + chunk) * chunk_tokens;
        // The keys repeat the block.
        let key = |token: usize| (token * kv_heads + head) * head_words % block.len();
        let keys: Vec<f32> = (first..first + chunk_tokens)
            .flat_map(|token| block[key(token)..][..head_words].as_flattened())
            .map(|element| element.to_f32())
            .collect();
        mean_key(&keys, &mut expected);
        for (element, expected) in expected.iter().enumerate() {
            let found = found[summary * head_dim + element].to_f32();
            // Half a unit in the last place of a bf16, and the rounding of f32 sums of numbers below 1.
            if (found - expected).abs() > expected.abs() / 256.0 + chunk_tokens as f32 * f32::EPSILON {
                return Err(format!(
                    "summary {summary}, element {element}: {found} where {expected} was expected"
                )
                .into());
            }
        }
    }
    Ok(())
}
