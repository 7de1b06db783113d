//! How far chunks spread about their means, against the CPU reference, and marks, exactly.

use spinkv::backend::cuda::driver::DeviceBuffer;
use spinkv::backend::cuda::kernels::{ChunkSpread, MarkPartitions};
use spinkv_kernel_tests::outliers::{MarkCase, SpreadCase};

use super::{Machine, Outcome, Test, test};

pub fn tests() -> Vec<Test> {
    vec![
        test("chunk_spread::random_shapes", |machine| {
            machine.on_seeds(|seed| spread(machine, &SpreadCase::random(seed)))
        }),
        test("chunk_spread::long_prompts", |machine| spread(machine, &SpreadCase::large(machine.seed))),
        test("mark::random_shapes", |machine| {
            machine.on_seeds(|seed| mark(machine, &MarkCase::random(seed)))
        }),
    ]
}

fn spread(machine: &Machine, case: &SpreadCase) -> Outcome {
    let Machine { stream, kernels, .. } = machine;
    let spreads = DeviceBuffer::from_slice(stream, &case.spreads())?;
    // A batch may be so short that it has no key at all.
    let keys = if case.keys.is_empty() { &[0][..] } else { &case.keys };
    let launch = ChunkSpread {
        entries: &DeviceBuffer::from_slice(stream, &case.entries)?,
        keys: &DeviceBuffer::from_slice(stream, keys)?,
        first_token: &DeviceBuffer::from_slice(stream, &case.first_token)?,
        first_chunk: &DeviceBuffer::from_slice(stream, &case.first_chunk)?,
        chunks: case.chunks() as u32,
        kv_heads: case.kv_heads as u32,
        head_words: case.head_words as u32,
        chunk_tokens: case.chunk_tokens as u32,
        stride: case.stride as u32,
        spreads: &spreads,
    };
    // SAFETY: the case's tables name keys that exist; nothing else uses the buffers.
    unsafe { launch.launch(kernels, stream)? };
    Ok(case.check(&spreads.to_vec(stream)?)?)
}

fn mark(machine: &Machine, case: &MarkCase) -> Outcome {
    let Machine { stream, kernels, .. } = machine;
    let marks = DeviceBuffer::from_slice(stream, &case.marks())?;
    let launch = MarkPartitions {
        entries: &DeviceBuffer::from_slice(stream, &case.entries)?,
        ids: &DeviceBuffer::from_slice(stream, &case.ids)?,
        counts: &DeviceBuffer::from_slice(stream, &case.counts)?,
        capacity: case.capacity as u32,
        first_row: case.first_row as u32,
        kv_heads: case.kv_heads as u32,
        words: case.words as u32,
        marks: &marks,
    };
    // SAFETY: the case's ids and places are those of the table; nothing else uses the buffers.
    unsafe { launch.launch(kernels, stream)? };
    Ok(case.check(&marks.to_vec(stream)?)?)
}
