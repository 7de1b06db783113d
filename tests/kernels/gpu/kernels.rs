//! Every kernel against its CPU reference on random ragged shapes; outputs hold poison before.

use spinkv::backend::cuda::driver::{DeviceBuffer, PinnedArena};
use spinkv::backend::cuda::kernels::{ChunkMean, Gather};
use spinkv_kernel_tests::chunk_mean::ChunkMeanCase;
use spinkv_kernel_tests::gather::GatherCase;

use super::{Machine, Outcome, Test, test};

pub fn tests() -> Vec<Test> {
    vec![
        test("gather::random_shapes", |machine| {
            machine.on_seeds(|seed| gather(machine, &GatherCase::random(seed)))
        }),
        test("gather::thousands_of_pages", |machine| gather(machine, &GatherCase::large(machine.seed))),
        test("chunk_mean::random_shapes", |machine| {
            machine.on_seeds(|seed| chunk_mean(machine, &ChunkMeanCase::random(seed)))
        }),
        test("chunk_mean::long_prompts", |machine| chunk_mean(machine, &ChunkMeanCase::large(machine.seed))),
        test("no_kernel_uses_local_memory", |machine| {
            for function in machine.kernels.functions() {
                let attributes = function.attributes();
                if attributes.local_bytes != 0 {
                    return Err(format!("{}: {attributes:?}", function.name()).into());
                }
            }
            Ok(())
        }),
    ]
}

fn gather(machine: &Machine, case: &GatherCase) -> Outcome {
    let Machine { context, stream, kernels, .. } = machine;
    let bytes: &[u8] = bytemuck::cast_slice(&case.host_pages);
    let mut arena = PinnedArena::reserve(context, bytes.len(), |_| {})?;
    arena.write(0, bytes)?;
    let pool = DeviceBuffer::from_slice(stream, &case.pool())?;
    let launch = Gather {
        copies: &DeviceBuffer::from_slice(stream, &case.copies)?,
        count: &DeviceBuffer::from_slice(stream, &[case.count])?,
        host_pages: &arena,
        device_pages: &pool,
        page_words: case.page_words as u32,
        blocks: case.grid,
    };
    // SAFETY: the case names pages that exist, each pool page once; nothing else uses them.
    unsafe { launch.launch(kernels, stream)? };
    Ok(case.check(&pool.to_vec(stream)?)?)
}

fn chunk_mean(machine: &Machine, case: &ChunkMeanCase) -> Outcome {
    let Machine { stream, kernels, .. } = machine;
    let summaries = DeviceBuffer::from_slice(stream, &case.summaries())?;
    // A batch may be so short that it has no key at all.
    let keys = if case.keys.is_empty() { &[0][..] } else { &case.keys };
    let launch = ChunkMean {
        keys: &DeviceBuffer::from_slice(stream, keys)?,
        first_token: &DeviceBuffer::from_slice(stream, &case.first_token)?,
        first_chunk: &DeviceBuffer::from_slice(stream, &case.first_chunk)?,
        chunks: case.chunks() as u32,
        kv_heads: case.kv_heads as u32,
        head_words: case.head_words as u32,
        chunk_tokens: case.chunk_tokens as u32,
        summaries: &summaries,
    };
    // SAFETY: the case's tables ascend and its requests have their keys; nothing else uses the buffers.
    unsafe { launch.launch(kernels, stream)? };
    Ok(case.check(&summaries.to_vec(stream)?)?)
}
