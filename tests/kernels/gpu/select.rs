//! Scores against f64, selections exactly.

use spinkv::backend::cuda::driver::DeviceBuffer;
use spinkv::backend::cuda::kernels::{Estimates, Marks, Score, SelectPartitions, TopK};
use spinkv_kernel_tests::score::ScoreCase;
use spinkv_kernel_tests::select::{SelectCase, Selection};
use spinkv_kernel_tests::top_k::TopKCase;

use super::{Machine, Outcome, Test, test};

pub fn tests() -> Vec<Test> {
    vec![
        test("score::random_shapes", |machine| {
            machine.on_seeds(|seed| score(machine, &ScoreCase::random(seed).tiled_as_launched()))
        }),
        test("score::long_contexts", |machine| {
            score(machine, &ScoreCase::large(machine.seed).tiled_as_launched())
        }),
        test("select::random_shapes", |machine| {
            machine.on_seeds(|seed| select(machine, &SelectCase::random(seed).tiled_as_launched()))
        }),
        test("select::long_contexts", |machine| {
            (0..8).try_for_each(|round| {
                select(machine, &SelectCase::large(machine.seed + round).tiled_as_launched())
            })
        }),
        test("top_k::random_shapes", |machine| {
            machine.on_seeds(|seed| top_k(machine, &TopKCase::random(seed)))
        }),
        test("top_k::long_rows", |machine| {
            (0..8).try_for_each(|round| top_k(machine, &TopKCase::large(machine.seed + round)))
        }),
    ]
}

fn score(machine: &Machine, case: &ScoreCase) -> Outcome {
    let Machine { stream, kernels, .. } = machine;
    // A batch may be so short that it has no summary at all.
    let (no_summary, no_segment) = ([0], [0]);
    let summaries = if case.summaries.is_empty() { &no_summary[..] } else { &case.summaries };
    let directories = if case.directories.is_empty() { &no_segment[..] } else { &case.directories };
    let row_pages = DeviceBuffer::from_slice(stream, &case.row_pages)?;
    let always = DeviceBuffer::from_slice(stream, &case.always)?;
    let logits = DeviceBuffer::from_slice(stream, &case.logits())?;
    let statistics = DeviceBuffer::from_slice(stream, &case.statistics())?;
    let launch = Score {
        entries: &DeviceBuffer::from_slice(stream, &case.entries)?,
        directories: &DeviceBuffer::from_slice(stream, directories)?,
        summaries: &DeviceBuffer::from_slice(stream, summaries)?,
        queries: &DeviceBuffer::from_slice(stream, &case.queries)?,
        kv_heads: case.kv_heads as u32,
        group: case.group as u32,
        head_words: case.head_words as u32,
        bounds: case.bounds,
        segment_partitions: case.segment_partitions as u32,
        request_rows: (case.layers * case.kv_heads) as u32,
        layer: case.layer as u32,
        scale: case.scale,
        stride: case.stride as u32,
        row_pages: (!case.row_pages.is_empty()).then_some(&row_pages),
        always: (case.mark_words > 0).then_some((&always, case.mark_words as u32)),
        logits: &logits,
        statistics: &statistics,
    };
    // SAFETY: the case's entries fit the stride and its directories name segments that exist; nothing else uses the buffers.
    unsafe { launch.launch(kernels, stream)? };
    Ok(case.check(&logits.to_vec(stream)?, &statistics.to_vec(stream)?)?)
}

fn select(machine: &Machine, case: &SelectCase) -> Outcome {
    let Machine { stream, kernels, .. } = machine;
    let before = case.outputs();
    let statistics = DeviceBuffer::from_slice(stream, &case.statistics)?;
    let marks = |words: &[u32]| DeviceBuffer::from_slice(stream, if words.is_empty() { &[0] } else { words });
    let (forced, masked) = (marks(&case.forced)?, marks(&case.masked)?);
    let (ids, selected) =
        (DeviceBuffer::from_slice(stream, &before.ids)?, DeviceBuffer::from_slice(stream, &before.selected)?);
    let estimated_ids = DeviceBuffer::from_slice(stream, &before.estimated_ids)?;
    let estimated = DeviceBuffer::from_slice(stream, &before.estimated)?;
    let row_pages = DeviceBuffer::from_slice(stream, &case.row_pages)?;
    let logarithmic = case.softmax && case.merge_code() == spinkv_kernels::abi::select::MERGE_MAX;
    let launch = SelectPartitions {
        entries: &DeviceBuffer::from_slice(stream, &case.entries)?,
        logits: &DeviceBuffer::from_slice(stream, &case.logits)?,
        statistics: case.softmax.then_some(&statistics),
        kv_heads: case.kv_heads as u32,
        group: case.group as u32,
        stride: case.stride as u32,
        merge: case.merge,
        // The case has the score as the kernel takes it.
        least: Some(if logarithmic { case.least.exp() } else { case.least }),
        top_p: case.top_p,
        marks: (case.mark_words > 0).then_some(Marks {
            forced: (!case.forced.is_empty()).then_some(&forced),
            masked: (!case.masked.is_empty()).then_some(&masked),
            words: case.mark_words as u32,
        }),
        first_row: case.first_row as u32,
        row_pages: (!case.row_pages.is_empty()).then_some(&row_pages),
        estimates: (case.estimates > 0).then_some(Estimates {
            count: case.estimates as u32,
            share: case.share,
            ids: &estimated_ids,
            estimated: &estimated,
        }),
        resident: case.resident as u32,
        keys: &DeviceBuffer::<u128>::zeroed(stream, case.keys())?,
        capacity: case.capacity as u32,
        ids: &ids,
        selected: &selected,
    };
    // SAFETY: the case's entries fit the stride and its scores add up to little; nothing else uses the buffers.
    unsafe { launch.launch(kernels, stream)? };
    let found = Selection {
        ids: ids.to_vec(stream)?,
        selected: selected.to_vec(stream)?,
        estimated_ids: estimated_ids.to_vec(stream)?,
        estimated: estimated.to_vec(stream)?,
    };
    Ok(case.check(&found)?)
}

fn top_k(machine: &Machine, case: &TopKCase) -> Outcome {
    let Machine { stream, kernels, .. } = machine;
    let ids = DeviceBuffer::from_slice(stream, &case.ids())?;
    let selected = DeviceBuffer::<u32>::zeroed(stream, case.rows())?;
    let launch = TopK {
        scores: &DeviceBuffer::from_slice(stream, &case.scores)?,
        counts: &DeviceBuffer::from_slice(stream, &case.counts)?,
        k: &DeviceBuffer::from_slice(stream, &case.k)?,
        stride: case.stride as u32,
        resident: case.resident as u32,
        keys: &DeviceBuffer::<u128>::zeroed(stream, case.keys())?,
        capacity: case.capacity as u32,
        ids: &ids,
        selected: &selected,
    };
    // SAFETY: no count is above the stride; nothing else uses the buffers.
    unsafe { launch.launch(kernels, stream)? };
    Ok(case.check(&ids.to_vec(stream)?, &selected.to_vec(stream)?)?)
}
