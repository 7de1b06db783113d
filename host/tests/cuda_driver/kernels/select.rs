use spinkv::backend::cuda::driver::{DeviceBuffer, DriverError};
use spinkv::backend::cuda::kernels::{Estimates, Kernels, Marks, Score, SelectPartitions, TopK};
use spinkv::pipeline::GroupMerge;
use spinkv_kernels::abi::{Entry, score, select};

use super::{ANY, length, multiple, operand, short};
use crate::driver;

#[test]
fn a_score_is_checked_and_launched() {
    let driver = driver();
    let (context, stream) = driver.open();
    let kernels = Kernels::load(&context).unwrap();
    let entries = |count| DeviceBuffer::from_slice(&stream, &vec![Entry::default(); count]).unwrap();
    let words = |len| DeviceBuffer::zeroed(&stream, len).unwrap();
    let floats = |len| DeviceBuffer::<f32>::zeroed(&stream, len).unwrap();
    let (entries, no_entries, summaries) = (entries(2), entries(0), words(1));
    let directories = DeviceBuffer::zeroed(&stream, 3).unwrap();
    // Of 6 rows 4 heads: 8 words a query, 516 logits in 9 tiles of 64.
    let (queries, logits, statistics) = (words(24 * 8), floats(24 * 516), floats(24 * 18));
    let [queries_of_bounds, few_queries] = [24 * 16, 24 * 8 - 1].map(words);
    let [few_logits, few_statistics] = [24 * 516 - 1, 24 * 18 - 1].map(floats);
    let right = Score {
        entries: &entries,
        directories: &directories,
        summaries: &summaries,
        queries: &queries,
        kv_heads: 3,
        group: 4,
        head_words: 8,
        bounds: false,
        segment_partitions: 512,
        request_rows: 6,
        layer: 1,
        scale: 0.25,
        stride: 516,
        row_pages: None,
        always: None,
        logits: &logits,
        statistics: &statistics,
    };
    driver.log();
    // SAFETY: the stand-in's kernels touch nothing.
    let launch = |score: Score<'_>| unsafe { score.launch(&kernels, &stream) };

    let wide = Score { bounds: true, queries: &queries_of_bounds, ..right };
    let many = Score { request_rows: u32::MAX, layer: 0, ..right };
    let most = i32::MAX as u64;
    for (what, value, min, max, wrong) in [
        ("score kv_heads", 0, 1, ANY, Score { kv_heads: 0, ..right }),
        ("score group", 0, 1, 16, Score { group: 0, ..right }),
        ("score group", 17, 1, 16, Score { group: 17, ..right }),
        ("score head_words", 0, 1, 64, Score { head_words: 0, ..right }),
        ("score head_words", 65, 1, 64, Score { head_words: 65, ..right }),
        ("score head_words", 33, 1, 32, Score { head_words: 33, ..wide }),
        ("score segment_partitions", 0, 1, ANY, Score { segment_partitions: 0, ..right }),
        ("score (layer + 1) * kv_heads", 9, 1, 6, Score { layer: 2, ..right }),
        ("score stride", 0, 1, ANY, Score { stride: 0, ..right }),
        ("score batch * kv_heads * tiles", 1 << 32, 0, most, Score { kv_heads: 1 << 30, ..many }),
        ("score batch * kv_heads * group", 1 << 33, 0, ANY, Score { kv_heads: 1 << 28, group: 16, ..many }),
        ("score group * stride", 1 << 32, 0, ANY, Score { group: 16, stride: 1 << 28, ..right }),
    ] {
        assert_eq!(launch(wrong), Err(operand(what, value, min, max)));
    }
    assert_eq!(launch(Score { stride: 514, ..right }), Err(multiple("score stride", 514)));
    for (what, len, wrong) in [
        ("score queries", 24 * 8, Score { queries: &few_queries, ..right }),
        ("score logits", 24 * 516, Score { logits: &few_logits, ..right }),
        ("score statistics", 24 * 18, Score { statistics: &few_statistics, ..right }),
    ] {
        assert_eq!(launch(wrong), Err(short(what, len, len - 1)));
    }
    launch(Score { entries: &no_entries, ..right }).unwrap();
    assert_eq!(driver.log(), [""; 0], "nothing was launched");

    let table = |len| DeviceBuffer::<u32>::zeroed(&stream, len).unwrap();
    let row_pages = table(12);
    let marks = table(6 * 17);
    let counted = Score { row_pages: Some(&row_pages), always: Some((&marks, 17)), ..right };
    let few_words = launch(Score { always: Some((&marks, 16)), ..right });
    assert_eq!(few_words, Err(operand("score mark words", 16, 17, ANY)));
    let few_marks = launch(Score { always: Some((&marks, 18)), ..right });
    assert_eq!(few_marks, Err(short("score always", 108, 102)));
    driver.log();
    for (head_words, bounds, right) in
        [(8, 0, right), (8, 0, counted), (16, 1, Score { head_words: 16, ..wide })]
    {
        launch(right).unwrap();
        let shared = score::shared_bytes(head_words << bounds);
        let tables = format!("{:#x} {:#x}", entries.address(), directories.address());
        let read = format!("{:#x} {:#x}", summaries.address(), right.queries.address());
        let written = format!("{:#x} {:#x}", logits.address(), statistics.address());
        let row_pages = right.row_pages.map_or(directories.address(), DeviceBuffer::address);
        let counted = u32::from(right.row_pages.is_some());
        let always = right.always.map_or(directories.address(), |(marks, _)| marks.address());
        let words = right.always.map_or(0, |(_, words)| words);
        let numbers = format!(
            "3 4 {head_words} {bounds} 512 6 1 0.25 516 9 {row_pages:#x} {counted} {always:#x} {words}"
        );
        let line = format!(
            "overlapping launch score 54 1 1, 128 1 1, {shared}: {tables} {read} {numbers} {written}"
        );
        assert_eq!(driver.log(), [line]);
    }
}

#[test]
fn a_selection_is_checked_and_launched() {
    let driver = driver();
    let (context, stream) = driver.open();
    let kernels = Kernels::load(&context).unwrap();
    let entries = |count| DeviceBuffer::from_slice(&stream, &vec![Entry::default(); count]).unwrap();
    let table = |len| DeviceBuffer::<u32>::zeroed(&stream, len).unwrap();
    let floats = |len| DeviceBuffer::<f32>::zeroed(&stream, len).unwrap();
    let words = |len| DeviceBuffer::zeroed(&stream, len).unwrap();
    let (entries, no_entries, none) = (entries(2), entries(0), table(0));
    // Of 6 rows 4 heads: 516 logits in 9 tiles of 64, marks in 17 words, of layer 1 of a request, 7 ids, 5 estimates.
    let (logits, statistics, keys) = (floats(24 * 516), floats(24 * 18), words(6 * 129));
    let (forced, masked, few_marks) = (table(6 * 17), table(6 * 17), table(6 * 17 - 1));
    let (ids, selected, estimated_ids, estimated) = (table(6 * 7), table(6), table(6 * 5), table(6));
    let (row_pages, few_rows) = (table(12), table(11));
    let (few_ids, few_estimates, other) = (table(6 * 7 - 1), table(6 * 5 - 1), table(5));
    let (few_logits, few_statistics, few_keys) =
        (floats(24 * 516 - 1), floats(24 * 18 - 1), words(6 * 129 - 1));
    let marks = Marks { forced: Some(&forced), masked: Some(&masked), words: 17 };
    let estimates = Estimates { count: 5, share: 0.5, ids: &estimated_ids, estimated: &estimated };
    let right = SelectPartitions {
        entries: &entries,
        logits: &logits,
        statistics: Some(&statistics),
        kv_heads: 3,
        group: 4,
        stride: 516,
        merge: GroupMerge::Max,
        least: Some(0.5),
        top_p: 0.75,
        marks: Some(marks),
        first_row: 3,
        row_pages: Some(&row_pages),
        estimates: Some(estimates),
        resident: 512,
        keys: &keys,
        capacity: 7,
        ids: &ids,
        selected: &selected,
    };
    driver.log();
    // SAFETY: the stand-in's kernels touch nothing.
    let launch = |select: SelectPartitions<'_>| unsafe { select.launch(&kernels, &stream) };

    let longest = u64::from(u32::MAX / 8);
    let resident = u64::from(select::MAX_RESIDENT);
    let (rows, most_rows) = (2 << 30, (i32::MAX / 16) as u64);
    let with_marks = |marks| SelectPartitions { marks: Some(marks), ..right };
    let with_estimates = |estimates| SelectPartitions { estimates: Some(estimates), ..right };
    let many_words = Marks { words: u32::MAX, ..marks };
    for (what, value, min, max, wrong) in [
        ("select kv_heads", 0, 1, ANY, SelectPartitions { kv_heads: 0, ..right }),
        ("select group", 0, 1, 16, SelectPartitions { group: 0, ..right }),
        ("select group", 17, 1, 16, SelectPartitions { group: 17, ..right }),
        ("select stride", 0, 1, longest, SelectPartitions { stride: 0, ..right }),
        ("select stride", 1 << 29, 1, longest, SelectPartitions { stride: 1 << 29, ..right }),
        ("select resident", 49_156, 0, resident, SelectPartitions { resident: 49_156, ..right }),
        ("select batch * kv_heads", rows, 0, most_rows, SelectPartitions { kv_heads: 1 << 30, ..right }),
        ("select mark words", 16, 17, ANY, with_marks(Marks { words: 16, ..marks })),
        ("select marks", 6 * ANY, 0, ANY, with_marks(many_words)),
    ] {
        assert_eq!(launch(wrong), Err(operand(what, value, min, max)));
    }
    assert_eq!(launch(SelectPartitions { stride: 514, ..right }), Err(multiple("select stride", 514)));
    assert_eq!(launch(SelectPartitions { resident: 510, ..right }), Err(multiple("select resident", 510)));
    for (top_p, value) in [(0.0, "0"), (-0.5, "-0.5"), (1.5, "1.5"), (f32::NAN, "NaN")] {
        let refused = launch(SelectPartitions { top_p, ..right }).unwrap_err();
        assert_eq!(refused, DriverError::Share { what: "select top_p", value: value.to_owned() });
        let message = format!("select top_p is {value}; it must be above 0 and at most 1");
        assert_eq!(refused.to_string(), message);
    }
    for (share, value) in [(0.0, "0"), (1.5, "1.5"), (f32::NAN, "NaN")] {
        let refused = launch(with_estimates(Estimates { share, ..estimates })).unwrap_err();
        assert_eq!(refused, DriverError::Share { what: "select estimates", value: value.to_owned() });
    }
    let no_number = launch(SelectPartitions { least: Some(f32::NAN), ..right }).unwrap_err();
    assert_eq!(no_number, DriverError::NotANumber { what: "select least" });
    assert_eq!(no_number.to_string(), "select least is not a number");
    for (what, expected, found, wrong) in [
        ("select selected", 6, 5, SelectPartitions { selected: &other, ..right }),
        ("select estimated", 6, 5, with_estimates(Estimates { estimated: &other, ..estimates })),
        ("select ids", 42, 41, SelectPartitions { ids: &few_ids, ..right }),
    ] {
        assert_eq!(launch(wrong), Err(length(what, expected, found)));
    }
    for (what, len, wrong) in [
        ("select logits", 24 * 516, SelectPartitions { logits: &few_logits, ..right }),
        ("select statistics", 24 * 18, SelectPartitions { statistics: Some(&few_statistics), ..right }),
        ("select forced", 6 * 17, with_marks(Marks { forced: Some(&few_marks), ..marks })),
        ("select masked", 6 * 17, with_marks(Marks { masked: Some(&few_marks), ..marks })),
        ("select estimated ids", 30, with_estimates(Estimates { ids: &few_estimates, ..estimates })),
        ("select keys", 6 * 129, SelectPartitions { keys: &few_keys, ..right }),
        ("select row_pages", 12, SelectPartitions { row_pages: Some(&few_rows), ..right }),
    ] {
        assert_eq!(launch(wrong), Err(short(what, len, len - 1)));
    }
    let no_row = SelectPartitions { entries: &no_entries, selected: &none, ids: &none, ..right };
    launch(SelectPartitions { estimates: None, ..no_row }).unwrap();
    assert_eq!(driver.log(), [""; 0], "nothing was launched");

    let [ids, selected, forced, masked] = [&ids, &selected, &forced, &masked].map(DeviceBuffer::address);
    let [estimated_ids, estimated] = [&estimated_ids, &estimated].map(DeviceBuffer::address);
    let [logits, statistics] = [&logits, &statistics].map(DeviceBuffer::address);
    let entries = entries.address();
    let line = |statistics: u64, scores: &str, marks: &str, resident: u32, keys: u64, estimates: &str| {
        let shared = select::shared_bytes(resident);
        format!(
            "overlapping launch select 6 1 1, 512 1 1, {shared}: {entries:#x} {logits:#x} {statistics:#x} 3 4 516 {scores} {marks} {resident} {keys:#x} 7 {ids:#x} {selected:#x} {estimates}"
        )
    };
    let row_pages = row_pages.address();
    let marked = format!("{forced:#x} {masked:#x} 17 17 3 {row_pages:#x} 1 5 0.50");
    let estimates = format!("{estimated_ids:#x} {estimated:#x}");
    // Tiles of the softmax, merge, least, top-p: of logarithms the least is one too.
    for (merge, least, scores) in [
        (GroupMerge::Max, Some(0.5), "9 0 -0.69 0.75"),
        (GroupMerge::Max, Some(-3.0), "9 0 -inf 0.75"),
        (GroupMerge::Max, None, "9 0 -inf 0.75"),
        (GroupMerge::Sum, Some(0.5), "9 1 0.50 0.75"),
        (GroupMerge::Mean, Some(0.5), "9 2 0.50 0.75"),
    ] {
        launch(SelectPartitions { merge, least, ..right }).unwrap();
        let expected = line(statistics, scores, &marked, 512, keys.address(), &estimates);
        assert_eq!(driver.log(), [expected]);
    }
    // Of one kind alone.
    for (alone, expected) in [
        (Marks { masked: None, ..marks }, format!("{forced:#x} {ids:#x} 17 0 3 {row_pages:#x} 1 5 0.50")),
        (Marks { forced: None, ..marks }, format!("{ids:#x} {masked:#x} 0 17 3 {row_pages:#x} 1 5 0.50")),
    ] {
        launch(with_marks(alone)).unwrap();
        let expected = line(statistics, "9 0 -0.69 0.75", &expected, 512, keys.address(), &estimates);
        assert_eq!(driver.log(), [expected]);
    }
    // Without what may be left out: what stands in for it is neither read nor written.
    let bare = SelectPartitions { statistics: None, marks: None, row_pages: None, estimates: None, ..right };
    let bare = SelectPartitions { top_p: 1.0, first_row: 0, ..bare };
    launch(SelectPartitions { resident: 516, keys: &few_keys, ..bare }).unwrap();
    let (unmarked, unestimated) =
        (format!("{ids:#x} {ids:#x} 0 0 0 {selected:#x} 0 0 0.00"), format!("{ids:#x} {selected:#x}"));
    let expected = line(logits, "0 0 0.50 1.00", &unmarked, 516, few_keys.address(), &unestimated);
    assert_eq!(driver.log(), [expected]);
}

#[test]
fn a_top_k_is_checked_and_launched() {
    let driver = driver();
    let (context, stream) = driver.open();
    let kernels = Kernels::load(&context).unwrap();
    let table = |len| DeviceBuffer::<u32>::zeroed(&stream, len).unwrap();
    let floats = |len| DeviceBuffer::<f32>::zeroed(&stream, len).unwrap();
    let words = |len| DeviceBuffer::zeroed(&stream, len).unwrap();
    // 3 rows of 516 scores, 7 ids.
    let (scores, counts, k, keys) = (floats(3 * 516), table(3), table(3), words(3 * 129));
    let (ids, selected) = (table(21), table(3));
    let (few_scores, few_keys, few_ids) = (floats(3 * 516 - 1), words(3 * 129 - 1), table(20));
    let (none, other) = (table(0), table(2));
    let right = TopK {
        scores: &scores,
        counts: &counts,
        k: &k,
        stride: 516,
        resident: 512,
        keys: &keys,
        capacity: 7,
        ids: &ids,
        selected: &selected,
    };
    driver.log();
    // SAFETY: the stand-in's kernels touch nothing.
    let launch = |top_k: TopK<'_>| unsafe { top_k.launch(&kernels, &stream) };

    assert_eq!(launch(TopK { k: &other, ..right }), Err(length("top_k k", 3, 2)));
    assert_eq!(launch(TopK { selected: &other, ..right }), Err(length("top_k selected", 3, 2)));
    let longest = u64::from(u32::MAX / 8);
    let resident = u64::from(select::MAX_RESIDENT);
    for (what, value, min, max, wrong) in [
        ("top_k stride", 0, 1, longest, TopK { stride: 0, ..right }),
        ("top_k stride", 1 << 29, 1, longest, TopK { stride: 1 << 29, ..right }),
        ("top_k resident", 49_156, 0, resident, TopK { resident: 49_156, ..right }),
    ] {
        assert_eq!(launch(wrong), Err(operand(what, value, min, max)));
    }
    assert_eq!(launch(TopK { stride: 514, ..right }), Err(multiple("top_k stride", 514)));
    assert_eq!(launch(TopK { resident: 510, ..right }), Err(multiple("top_k resident", 510)));
    for (what, len, wrong) in [
        ("top_k scores", 3 * 516, TopK { scores: &few_scores, ..right }),
        ("top_k ids", 21, TopK { ids: &few_ids, ..right }),
        ("top_k keys", 3 * 129, TopK { keys: &few_keys, ..right }),
    ] {
        assert_eq!(launch(wrong), Err(short(what, len, len - 1)));
    }
    launch(TopK { counts: &none, k: &none, selected: &none, ..right }).unwrap();
    assert_eq!(driver.log(), [""; 0], "nothing was launched");

    for (resident, keys) in [(512, &keys), (516, &few_keys)] {
        launch(TopK { resident, keys, ..right }).unwrap();
        let [counts, k, ids, selected] = [&counts, &k, &ids, &selected].map(DeviceBuffer::address);
        let (scores, keys, shared) = (scores.address(), keys.address(), select::shared_bytes(resident));
        let parameters =
            format!("{scores:#x} {counts:#x} {k:#x} 516 {resident} {keys:#x} 7 {ids:#x} {selected:#x}");
        assert_eq!(driver.log(), [format!("launch top_k 3 1 1, 512 1 1, {shared}: {parameters}")]);
    }
}

/// Small blocks where two rows are to be on a multiprocessor at a time, and fit; of short rows always.
#[test]
fn blocks_are_as_large_as_rows_leave_room_for() {
    let driver = driver();
    let (context, stream) = driver.open();
    let kernels = Kernels::load(&context).unwrap();
    let table = |len| DeviceBuffer::<u32>::zeroed(&stream, len).unwrap();
    for (rows, stride, resident, block) in [
        (133, 2052, 2052, 512),
        (132, 2052, 2052, 1024),
        (133, 2052, 40_000, 1024),
        (132, 2048, 2048, 512),
        (133, 2048, 40_000, 512),
    ] {
        let (counts, k, selected) = (table(rows), table(rows), table(rows));
        let top_k = TopK {
            scores: &DeviceBuffer::zeroed(&stream, rows * stride as usize).unwrap(),
            counts: &counts,
            k: &k,
            stride,
            resident,
            keys: &DeviceBuffer::zeroed(&stream, 1).unwrap(),
            capacity: 1,
            ids: &table(rows),
            selected: &selected,
        };
        driver.log();
        // SAFETY: the stand-in's kernels touch nothing.
        unsafe { top_k.launch(&kernels, &stream) }.unwrap();
        let log = driver.log();
        assert!(log[0].starts_with(&format!("launch top_k {rows} 1 1, {block} 1 1, ")), "{log:?}");
    }
}
