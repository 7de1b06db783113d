//! Index against its CPU reference, for prompts and for decode steps.

use spinkv::backend::cuda::driver::DeviceBuffer;
use spinkv::backend::cuda::kernels::{IndexOperator, IndexPrompts, IndexStep, SummaryTable};
use spinkv::memory::Word;
use spinkv_kernel_tests::index::{Operator, PromptIndexCase, StepIndexCase};

use super::{Machine, Outcome, Test, test};

pub fn tests() -> Vec<Test> {
    Operator::ALL.into_iter().flat_map(of_operator).collect()
}

fn of_operator(operator: Operator) -> [Test; 3] {
    let name = match operator {
        Operator::Mean => "chunk_mean",
        Operator::Bounds => "chunk_bounds",
    };
    [
        test(format!("{name}::random_shapes"), move |machine| {
            machine.on_seeds(|seed| prompts(machine, &PromptIndexCase::random(operator, seed)))
        }),
        test(format!("{name}::long_prompts"), move |machine| {
            prompts(machine, &PromptIndexCase::large(operator, machine.seed))
        }),
        test(format!("{name}_step::random_shapes"), move |machine| {
            machine.on_seeds(|seed| step(machine, &StepIndexCase::random(operator, seed)))
        }),
    ]
}

/// The table of a case, with `summaries`.
macro_rules! table {
    ($case:expr, $entries:expr, $directories:expr, $summaries:expr) => {
        SummaryTable {
            operator: match $case.operator {
                Operator::Mean => IndexOperator::Mean,
                Operator::Bounds => IndexOperator::Bounds,
            },
            entries: $entries,
            directories: $directories,
            first_row: $case.first_row as u32,
            request_rows: $case.request_rows as u32,
            kv_heads: $case.kv_heads as u32,
            head_words: $case.head_words as u32,
            partition_tokens: $case.chunk_tokens as u32,
            segment_partitions: $case.segment_partitions as u32,
            summaries: $summaries,
        }
    };
}

fn prompts(machine: &Machine, case: &PromptIndexCase) -> Outcome {
    let Machine { stream, kernels, .. } = machine;
    let summaries = DeviceBuffer::<Word>::from_slice(stream, &case.table.summaries())?;
    let entries = DeviceBuffer::from_slice(stream, &case.table.entries)?;
    let directories = DeviceBuffer::from_slice(stream, &case.table.directories)?;
    // A batch may be so short that it has no key at all.
    let keys = if case.keys.is_empty() { &[0][..] } else { &case.keys };
    let launch = IndexPrompts {
        table: table!(case.table, &entries, &directories, &summaries),
        keys: &DeviceBuffer::from_slice(stream, keys)?,
        first_token: &DeviceBuffer::from_slice(stream, &case.first_token)?,
        first_chunk: &DeviceBuffer::from_slice(stream, &case.first_chunk)?,
        chunks: case.chunks() as u32,
    };
    // SAFETY: the case's tables name keys and segments that exist, each place once; nothing else uses the buffers.
    unsafe { launch.launch(kernels, stream)? };
    Ok(case.check(&summaries.to_vec(stream)?)?)
}

fn step(machine: &Machine, case: &StepIndexCase) -> Outcome {
    let Machine { stream, kernels, .. } = machine;
    let prompts = &case.prompts;
    let summaries = DeviceBuffer::<Word>::from_slice(stream, &prompts.table.summaries())?;
    let entries = DeviceBuffer::from_slice(stream, &case.entries)?;
    let directories = DeviceBuffer::from_slice(stream, &prompts.table.directories)?;
    // A step in which nothing leaves may have no page and no list; the launch wants room for a page.
    let mut pool = case.pool.clone();
    pool.resize(pool.len().max(2 * case.page_tokens * prompts.table.head_words), 0);
    let steady = if case.steady.is_empty() { &[0][..] } else { &case.steady };
    let launch = IndexStep {
        table: table!(prompts.table, &entries, &directories, &summaries),
        steady: &DeviceBuffer::from_slice(stream, steady)?,
        pool: &DeviceBuffer::from_slice(stream, &pool)?,
        page_tokens: case.page_tokens as u32,
    };
    // SAFETY: as above, and the keys lie in pages that exist.
    unsafe { launch.launch(kernels, stream)? };
    Ok(prompts.check(&summaries.to_vec(stream)?)?)
}
