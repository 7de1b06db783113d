use spinkv::backend::cuda::driver::{DeviceBuffer, DriverError};
use spinkv::backend::cuda::kernels::{GateKeys, GateKeysStep, GateQueries, GateWeights, Kernels};
use spinkv::backend::cuda::operators::{PromptIndex, StepIndex, SummaryRows};
use spinkv_kernels::abi::Entry;

use super::{ANY, length, operand, short};
use crate::driver;

#[test]
fn gates_are_checked_and_launched() {
    let driver = driver();
    let (context, stream) = driver.open();
    let kernels = Kernels::load(&context).unwrap();
    let numbers = |len| DeviceBuffer::<u32>::zeroed(&stream, len).unwrap();
    let floats = |len| DeviceBuffer::<f32>::zeroed(&stream, len).unwrap();
    let words = |len| DeviceBuffer::zeroed(&stream, len).unwrap();
    let entries = |count| DeviceBuffer::from_slice(&stream, &vec![Entry::default(); count]).unwrap();
    let (entries, no_entries) = (entries(2), entries(0));
    let (first_token, first_partition, directories, steady) =
        (numbers(2), numbers(3), numbers(4), numbers(9));
    // 3 layers of 2 KV heads of 64 elements, gates of 32: 24 words of a key's inputs.
    let (of_keys, keys, pool) = (words(6 * 24 * 32), words(64), words(2 * 16 * 8));
    let (norm, frequencies, gate_frequencies) = (floats(3 * 32), floats(32), floats(16));
    let (summaries, one_short) = (words(6 * 8 * 4), words(6 * 8 * 4 - 1));
    let gate = GateWeights {
        weights: &of_keys,
        rank: 32,
        norm: Some(&norm),
        eps: 1e-6,
        frequencies: &frequencies,
        magnitude: 2.0,
        gate_frequencies: &gate_frequencies,
        gate_magnitude: 1.5,
    };
    let rows = SummaryRows {
        entries: &entries,
        directories: &directories,
        first_row: 4,
        request_rows: 6,
        kv_heads: 2,
        head_words: 8,
        partition_tokens: 16,
        segment_partitions: 8,
        summary_words: 4,
        summaries: &summaries,
    };
    let (first_token_, first_partition_) = (&first_token, &first_partition);
    let right = PromptIndex {
        rows,
        keys: &keys,
        first_token: first_token_,
        first_partition: first_partition_,
        partitions: 33,
    };
    driver.log();
    // SAFETY: the stand-in's kernels touch nothing.
    let launch = |gate: GateWeights<'_>, stage: PromptIndex<'_>| unsafe {
        GateKeys { gate, stage }.launch(&kernels, &stream)
    };
    let with_gate = |gate: GateWeights<'_>| launch(gate, right);
    let with_rows = |rows: SummaryRows<'_>| launch(gate, PromptIndex { rows, ..right });

    for rank in [0, 257] {
        assert_eq!(with_gate(GateWeights { rank, ..gate }), Err(operand("gate rank", rank.into(), 1, 256)));
    }
    let odd = DriverError::Multiple { what: "gate rank", value: 24, of: 16 };
    assert_eq!(with_gate(GateWeights { rank: 24, ..gate }), Err(odd));
    let other_rank = with_gate(GateWeights { rank: 16, ..gate });
    assert_eq!(other_rank, Err(length("gate weights", 6 * 24 * 16, 6 * 24 * 32)));
    assert_eq!(
        with_gate(GateWeights { weights: &keys, ..gate }),
        Err(length("gate weights", 6 * 24 * 32, 64))
    );
    let other = with_gate(GateWeights { frequencies: &gate_frequencies, ..gate });
    assert_eq!(other, Err(length("gate frequencies", 32, 16)));
    let other = with_gate(GateWeights { gate_frequencies: &frequencies, ..gate });
    assert_eq!(other, Err(length("gate gate_frequencies", 16, 32)));
    let other = with_gate(GateWeights { norm: Some(&frequencies), ..gate });
    assert_eq!(other, Err(length("gate norm", 96, 32)));
    let wide = with_rows(SummaryRows { summary_words: 3, ..rows });
    assert_eq!(wide, Err(length("gate summary words", 4, 3)));
    let head = DriverError::Choice { what: "gate head_words", value: 4, allowed: &[8, 16] };
    assert_eq!(with_rows(SummaryRows { head_words: 4, ..rows }), Err(head.clone()));
    let none = with_rows(SummaryRows { entries: &no_entries, ..rows });
    assert_eq!(none, Err(operand("index requests", 0, 1, ANY)));
    let below = with_rows(SummaryRows { first_row: 5, ..rows });
    assert_eq!(below, Err(operand("index first_row + kv_heads", 7, 1, 6)));
    let room = with_rows(SummaryRows { summaries: &one_short, ..rows });
    assert_eq!(room, Err(short("index summaries of a segment", 192, 191)));
    let tokens = launch(gate, PromptIndex { first_token: &first_partition, ..right });
    assert_eq!(tokens, Err(length("gate first_token", 2, 3)));
    let partitions = launch(gate, PromptIndex { first_partition: &first_token, ..right });
    assert_eq!(partitions, Err(length("gate first_partition", 3, 2)));
    let many = launch(gate, PromptIndex { partitions: 1 << 30, ..right });
    assert_eq!(many, Err(operand("gate partitions * kv_heads", 1 << 31, 0, i32::MAX as u64)));
    launch(gate, PromptIndex { partitions: 0, ..right }).unwrap();
    assert_eq!(driver.log(), [""; 0], "nothing was launched");

    let at = |buffer: &DeviceBuffer<u32>| format!("{:#x}", buffer.address());
    let (token, partition, directory, list) =
        (at(&first_token), at(&first_partition), at(&directories), at(&steady));
    let [weights, of_pool, to] =
        [&of_keys, &pool, &summaries].map(|buffer| format!("{:#x}", buffer.address()));
    let [turn, of_norm, gate_turn] =
        [&frequencies, &norm, &gate_frequencies].map(|buffer| format!("{:#x}", buffer.address()));
    let entry = format!("{:#x}", entries.address());
    let rest = |norm: &str, norms: u32| {
        format!("{turn} 0.50 {weights} 32 {norm} {norms} 0.00 {gate_turn} 1.50 {to}")
    };
    for (of, norm, norms) in [(Some(&norm), &of_norm, 1), (None, &turn, 0)] {
        with_gate(GateWeights { norm: of, ..gate }).unwrap();
        let parameters =
            format!("{:#x} {entry} {token} {partition} {directory} 2 4 6 2 8 16 8", keys.address());
        let expected = format!("launch gate_key 66 1 1, 256 1 1, 22656: {parameters} {}", rest(norm, norms));
        assert_eq!(driver.log(), [expected]);
    }

    // The same rows in a decode step.
    let right = StepIndex { rows, steady: &steady, pool: &pool, page_tokens: 16 };
    // SAFETY: the stand-in's kernels touch nothing.
    let launch = |stage: StepIndex<'_>| unsafe { GateKeysStep { gate, stage }.launch(&kernels, &stream) };
    assert_eq!(launch(StepIndex { page_tokens: 0, ..right }), Err(operand("gate page_tokens", 0, 1, ANY)));
    assert_eq!(launch(StepIndex { page_tokens: 17, ..right }), Err(short("gate page words", 272, 256)));
    let wide = launch(StepIndex { rows: SummaryRows { summary_words: 3, ..rows }, ..right });
    assert_eq!(wide, Err(length("gate summary words", 4, 3)));
    assert_eq!(driver.log(), [""; 0], "nothing was launched");
    launch(right).unwrap();
    let parameters = format!("{entry} {list} {of_pool} {directory} 4 6 2 8 16 16 8 {}", rest(&of_norm, 1));
    assert_eq!(
        driver.log(),
        [format!("overlapping launch gate_key_step 4 1 1, 256 1 1, 22656: {parameters}")]
    );

    // Queries: groups of 3.
    let (of_queries, queries, gate_queries) = (words(6 * 24 * 32), words(2 * 6 * 8), words(2 * 2 * 4));
    let right = GateQueries {
        gate: GateWeights { weights: &of_queries, ..gate },
        entries: &entries,
        queries: &queries,
        layer: 2,
        request_rows: 6,
        kv_heads: 2,
        group: 3,
        head_words: 8,
        gate_queries: &gate_queries,
    };
    driver.log();
    // SAFETY: the stand-in's kernels touch nothing.
    let launch = |queries: GateQueries<'_>| unsafe { queries.launch(&kernels, &stream) };
    assert_eq!(launch(GateQueries { kv_heads: 0, ..right }), Err(operand("gate kv_heads", 0, 1, ANY)));
    for group in [0, 17] {
        assert_eq!(launch(GateQueries { group, ..right }), Err(operand("gate group", group.into(), 1, 16)));
    }
    let below = launch(GateQueries { layer: 3, ..right });
    assert_eq!(below, Err(operand("gate (layer + 1) * kv_heads", 8, 1, 6)));
    assert_eq!(launch(GateQueries { head_words: 4, ..right }), Err(head));
    let wide = launch(GateQueries { group: 2, ..right });
    assert_eq!(wide, Err(length("gate weights", 6 * 16 * 32, 6 * 24 * 32)));
    assert_eq!(launch(GateQueries { queries: &keys, ..right }), Err(short("gate queries", 96, 64)));
    let few = words(15);
    driver.log();
    let room = launch(GateQueries { gate_queries: &few, ..right });
    assert_eq!(room, Err(short("gate gate_queries", 16, 15)));
    launch(GateQueries { entries: &no_entries, ..right }).unwrap();
    assert_eq!(driver.log(), [""; 0], "nothing was launched");
    launch(right).unwrap();
    let [weights, queries, to] =
        [&of_queries, &queries, &gate_queries].map(|buffer| format!("{:#x}", buffer.address()));
    let parameters =
        format!("{entry} {queries} 4 2 3 8 {turn} 0.50 {weights} 32 {of_norm} 1 0.00 {gate_turn} 1.50 {to}");
    assert_eq!(driver.log(), [format!("overlapping launch gate_query 4 1 1, 256 1 1, 22656: {parameters}")]);
}
