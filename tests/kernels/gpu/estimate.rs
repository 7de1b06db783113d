//! What a step over clusters has beside the others' kernels: estimates against f64, biases and runs exactly.

use spinkv::backend::cuda::driver::DeviceBuffer;
use spinkv::backend::cuda::kernels::{ClusterNumbers, Estimate, GatherRun, PageBiases};
use spinkv_kernel_tests::estimate::{EstimateCase, GatherRunCase};

use super::{Machine, Outcome, Test, test};

pub fn tests() -> Vec<Test> {
    vec![
        test("estimate::random_shapes", |machine| {
            machine.on_seeds(|seed| estimate(machine, &EstimateCase::random(seed)))
        }),
        test("estimate::long_contexts", |machine| estimate(machine, &EstimateCase::large(machine.seed))),
        test("gather_run::random_shapes", |machine| {
            machine.on_seeds(|seed| gather_run(machine, &GatherRunCase::random(seed)))
        }),
    ]
}

fn estimate(machine: &Machine, case: &EstimateCase) -> Outcome {
    let Machine { stream, kernels, .. } = machine;
    let entries = DeviceBuffer::from_slice(stream, &case.entries)?;
    let ids = DeviceBuffer::from_slice(stream, &case.ids)?;
    let counts = DeviceBuffer::from_slice(stream, &case.counts)?;
    let (outputs, lse) =
        (DeviceBuffer::from_slice(stream, &case.outputs)?, DeviceBuffer::from_slice(stream, &case.lse)?);
    let biases = DeviceBuffer::from_slice(stream, &case.biases())?;
    let clusters = ClusterNumbers {
        directories: &DeviceBuffer::from_slice(stream, &case.directories)?,
        first_row: case.first_row as u32,
        request_rows: case.request_rows as u32,
        segment_partitions: case.segment_partitions as u32,
        partition_tokens: &DeviceBuffer::from_slice(stream, &case.partition_tokens)?,
        value_means: &DeviceBuffer::from_slice(stream, &case.value_means)?,
    };
    let launch = Estimate {
        entries: &entries,
        kv_heads: case.kv_heads as u32,
        group: case.group as u32,
        head_words: case.head_words as u32,
        ids: &ids,
        counts: &counts,
        capacity: case.capacity as u32,
        logits: &DeviceBuffer::from_slice(stream, &case.logits)?,
        stride: case.stride as u32,
        clusters,
        outputs: &outputs,
        lse: &lse,
    };
    // SAFETY: the case's tables name places that exist; nothing else uses the buffers.
    unsafe { launch.launch(kernels, stream)? };
    case.check(&outputs.to_vec(stream)?, &lse.to_vec(stream)?)?;
    let launch = PageBiases {
        entries: &entries,
        kv_heads: case.kv_heads as u32,
        ids: &ids,
        id_counts: &counts,
        capacity: case.capacity as u32,
        clusters,
        page_tokens: case.page_tokens as u32,
        biases: &biases,
    };
    // SAFETY: as above.
    unsafe { launch.launch(kernels, stream)? };
    Ok(case.check_biases(&biases.to_vec(stream)?)?)
}

fn gather_run(machine: &Machine, case: &GatherRunCase) -> Outcome {
    let Machine { stream, kernels, .. } = machine;
    let tensor = || DeviceBuffer::from_slice(stream, &case.tensor());
    let (keys, values) = (tensor()?, tensor()?);
    let launch = GatherRun {
        steady: &DeviceBuffer::from_slice(stream, &case.steady)?,
        first_steady: case.first_steady as u32,
        sink_pages: case.sink_pages as u32,
        ring_pages: case.ring_pages as u32,
        first_row: case.first_row as u32,
        kv_heads: case.kv_heads as u32,
        head_words: case.head_words as u32,
        page_tokens: case.page_tokens as u32,
        pool: &DeviceBuffer::from_slice(stream, &case.pool)?,
        first: case.first as u32,
        tokens: case.tokens as u32,
        keys: &keys,
        values: &values,
    };
    // SAFETY: as above.
    unsafe { launch.launch(kernels, stream)? };
    let found = [keys.to_vec(stream)?, values.to_vec(stream)?];
    if found == case.expected() { Ok(()) } else { Err("other words than the pages have".into()) }
}
