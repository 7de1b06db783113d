//! A layer's step: the order of its launches, and which stages do not go together.

use spinkv::backend::cuda::driver::{DeviceBuffer, DriverError, PinnedArena, Stream};
use spinkv::backend::cuda::kernels::{
    Append, Attend, Awaited, Gather, IndexOperator, IndexStep, Kernels, KvTables, Marks, OffloadPages,
    PartitionPages, ProjectKeys, RebuildKeys, Resolve, Score, SelectPartitions, SummaryTable,
};
use spinkv::backend::cuda::operators::{
    GpuIndex, GpuSelect, LayerIndex, LayerSelect, PromptIndex, SelectStage, StepIndex, SummaryRows,
};
use spinkv::backend::cuda::{LayerStep, LowRankStages, capture_step};
use spinkv::pipeline::GroupMerge;
use spinkv_kernels::abi::page_code::PageCode;
use spinkv_kernels::abi::{Entry, PageCopy, SLAB_PAGES, WORD_BYTES};

use super::{Driver, driver};

const ALL: [&str; 7] = ["chunk_mean_step", "append", "score", "select", "resolve", "gather", "attend_64"];

/// The kernel that a line of the log launches.
fn kernel_of(line: &str) -> Option<String> {
    let launch = line.trim_start_matches("overlapping ").strip_prefix("launch ")?;
    launch.split(' ').next().map(str::to_owned)
}

/// The kernels that were launched since the last look at the log.
fn launched(driver: &Driver) -> Vec<String> {
    driver.log().iter().filter_map(|line| kernel_of(line)).collect()
}

/// Operators that launch nothing.
#[derive(Debug)]
struct Idle;

impl GpuIndex for Idle {
    unsafe fn prompt(&self, _: &Kernels, _: &Stream, _: &PromptIndex<'_>) -> Result<(), DriverError> {
        Ok(())
    }
    unsafe fn step(&self, _: &Kernels, _: &Stream, _: &StepIndex<'_>) -> Result<(), DriverError> {
        Ok(())
    }
}

impl GpuSelect for Idle {
    unsafe fn select(&self, _: &Kernels, _: &Stream, _: &SelectStage<'_>) -> Result<(), DriverError> {
        Ok(())
    }
}

#[test]
fn a_layers_stages_are_checked_together_and_launched_in_order() {
    let driver = driver();
    let (context, stream) = driver.open();
    let kernels = Kernels::load(&context).unwrap();
    let entries = |count| DeviceBuffer::from_slice(&stream, &vec![Entry::default(); count]).unwrap();
    let table = |len| DeviceBuffer::<u32>::zeroed(&stream, len).unwrap();
    let floats = |len| DeviceBuffer::<f32>::zeroed(&stream, len).unwrap();
    let words = |len| DeviceBuffer::zeroed(&stream, len).unwrap();
    let copies = |len| DeviceBuffer::from_slice(&stream, &vec![PageCopy::default(); len]).unwrap();
    // 2 requests of 2 layers of 3 KV heads: 6 rows. Pages of 8 tokens of 8 words.
    let (two, three) = (entries(2), entries(3));
    let (directories, segments, summaries) =
        (table(4), DeviceBuffer::zeroed(&stream, 1).unwrap(), words(6 * 8 * 8));
    let (slots, states, steady, slabs) = (table(64), table(16), table(9), table(6));
    let (pool, keys) = (words(128), words(6 * 8));
    let host_pages = PinnedArena::reserve(&context, SLAB_PAGES as usize * 128 * WORD_BYTES, |_| {}).unwrap();
    // 2 query heads each, 16 logits; 7 ids and 4 pages of a row.
    let (logits, statistics, ids, counts) = (floats(12 * 16), floats(12 * 2), table(6 * 7), table(6));
    let (pages, page_copies) = (table(6 * 4), copies(6 * 4));
    let (more_logits, more_statistics, more_ids) = (floats(12 * 20), floats(12 * 4), table(6 * 8));
    let (two_counts, nine_counts, more_copies) = (table(2), table(9), copies(6 * 5));
    let (arrived, other_counts, other_pool) = (table(6), table(6), words(128));
    let (queries, more_pages, more_words) = (words(12 * 8), table(6 * 5), words(256));
    let (outputs, lse, partials) = (words(12 * 8), floats(12), words(6 * 2 * 8 * 17));

    let summary_table = SummaryTable {
        operator: IndexOperator::Mean,
        entries: &two,
        directories: &directories,
        first_row: 3,
        request_rows: 6,
        kv_heads: 3,
        head_words: 8,
        partition_tokens: 8,
        segment_partitions: 8,
        summaries: &summaries,
    };
    let index = IndexStep { table: summary_table, steady: &steady, pool: &pool, page_tokens: 8 };
    let of_append = OffloadPages {
        entries: &two,
        steady: &steady,
        pool: &pool,
        host_slabs: &slabs,
        host_valid: &slabs,
        host_pages: &host_pages,
        first_row: 3,
        kv_heads: 3,
        head_words: 8,
        page_tokens: 8,
        on_host: true,
        host_words: 128,
        code: None,
    };
    let append = Append { pages: of_append, keys: &keys, values: &keys };
    let score = Score {
        entries: &two,
        directories: &directories,
        summaries: &summaries,
        queries: &queries,
        kv_heads: 3,
        group: 2,
        head_words: 8,
        bounds: false,
        segment_partitions: 8,
        request_rows: 6,
        layer: 1,
        scale: 0.25,
        stride: 16,
        row_pages: None,
        always: None,
        logits: &logits,
        statistics: &statistics,
    };
    let select = SelectPartitions {
        entries: &two,
        logits: &logits,
        statistics: Some(&statistics),
        kv_heads: 3,
        group: 2,
        stride: 16,
        merge: GroupMerge::Max,
        least: None,
        top_p: 1.0,
        marks: None,
        first_row: 3,
        row_pages: None,
        estimates: None,
        resident: 16,
        keys: &keys,
        capacity: 7,
        ids: &ids,
        selected: &counts,
    };
    let tables = KvTables {
        directories: &directories,
        segments: &segments,
        owners: &slots,
        physical: &slots,
        states: &states,
        steady: &steady,
        host_slabs: &slabs,
        host_valid: &slabs,
        request_rows: 6,
    };
    let resolve = Resolve {
        entries: &two,
        kv_heads: 3,
        layer: 1,
        ids: &ids,
        id_counts: &counts,
        partitions: PartitionPages::Pages(1),
        tables,
        slot_capacity: 32,
        segment_capacity: 2,
        pages: &pages,
        misses_last: true,
        page_counts: &counts,
        copies: &page_copies,
        copy_keys: None,
        copy_counts: &counts,
        arrived: &arrived,
        faults: &counts,
    };
    let gather = Gather {
        copies: &page_copies,
        counts: &counts,
        host_pages: &host_pages,
        device_pages: &pool,
        page_words: 128,
        device_words: 128,
        code: None,
        blocks: 2,
        arrived: Some(&arrived),
    };
    let attend = Attend {
        entries: &two,
        kv_heads: 3,
        group: 2,
        layer: 1,
        head_words: 8,
        pages: &pages,
        page_counts: &counts,
        steady: &steady,
        biases: None,
        pool: &pool,
        page_tokens: 8,
        queries: &queries,
        scale: 0.125,
        awaited: Some(Awaited { copy_counts: &counts, arrived: &arrived }),
        splits: 2,
        partials: &partials,
        arrivals: &counts,
        outputs: &outputs,
        lse: &lse,
    };
    let right = LayerStep {
        index: Some(index.into()),
        append,
        select: Some((score, select).into()),
        resolve,
        gather,
        attend,
        clusters: None,
        low_rank: None,
    };
    driver.log();
    // SAFETY: the stand-in's kernels touch nothing.
    let launch = |step: LayerStep<'_>| unsafe { step.launch(&kernels, &stream) };

    launch(right).unwrap();
    assert_eq!(launched(&driver), ALL);
    launch(LayerStep { index: None, select: None, ..right }).unwrap();
    assert_eq!(launched(&driver), ["append", "resolve", "gather", "attend_64"]);

    let with_table = |table| LayerStep { index: Some(IndexStep { table, ..index }.into()), ..right };
    let with_pages = |pages| LayerStep { append: Append { pages, ..append }, ..right };
    let with_score = |score| LayerStep { select: Some((score, select).into()), ..right };
    let with_select = |select| LayerStep { select: Some((score, select).into()), ..right };
    let with_resolve = |resolve| LayerStep { resolve, ..right };
    let with_gather = |gather| LayerStep { gather, ..right };
    let with_attend = |attend| LayerStep { attend, ..right };
    let pages_of_four = LayerStep { index: Some(IndexStep { page_tokens: 4, ..index }.into()), ..right };
    let marks = Some(Marks { forced: None, masked: None, words: 1 });
    let other_logits = SelectPartitions { logits: &more_logits, ..select };
    for (what, expected, found, wrong) in [
        ("index requests", 2, 3, with_table(SummaryTable { entries: &three, ..summary_table })),
        ("index kv_heads", 3, 2, with_table(SummaryTable { kv_heads: 2, ..summary_table })),
        ("index first_row", 3, 0, with_table(SummaryTable { first_row: 0, ..summary_table })),
        ("index request_rows", 6, 9, with_table(SummaryTable { request_rows: 9, ..summary_table })),
        ("index head_words", 8, 4, with_table(SummaryTable { head_words: 4, ..summary_table })),
        ("index page_tokens", 8, 4, pages_of_four),
        ("append requests", 2, 3, with_pages(OffloadPages { entries: &three, ..of_append })),
        ("append kv_heads", 3, 2, with_pages(OffloadPages { kv_heads: 2, ..of_append })),
        ("append first_row", 3, 0, with_pages(OffloadPages { first_row: 0, ..of_append })),
        ("score requests", 2, 3, with_score(Score { entries: &three, ..score })),
        ("score kv_heads", 3, 2, with_score(Score { kv_heads: 2, ..score })),
        ("score layer", 1, 0, with_score(Score { layer: 0, ..score })),
        ("score request_rows", 6, 9, with_score(Score { request_rows: 9, ..score })),
        ("select requests", 2, 3, with_select(SelectPartitions { entries: &three, ..select })),
        ("select kv_heads", 3, 2, with_select(SelectPartitions { kv_heads: 2, ..select })),
        ("select group", 2, 1, with_select(SelectPartitions { group: 1, ..select })),
        ("select first_row", 3, 0, with_select(SelectPartitions { marks, first_row: 0, ..select })),
        ("select stride", 16, 12, with_select(SelectPartitions { stride: 12, ..select })),
        ("select logits", 192, 240, with_select(other_logits)),
        (
            "select statistics",
            24,
            48,
            with_select(SelectPartitions { statistics: Some(&more_statistics), ..select }),
        ),
        ("resolve ids", 42, 48, with_resolve(Resolve { ids: &more_ids, ..resolve })),
        ("resolve id_counts", 6, 9, with_resolve(Resolve { id_counts: &nine_counts, ..resolve })),
        ("gather copies", 24, 30, with_gather(Gather { copies: &more_copies, ..gather })),
        ("gather counts", 6, 2, with_gather(Gather { counts: &two_counts, ..gather })),
        ("gather page_words", 128, 64, with_gather(Gather { page_words: 64, ..gather })),
        ("gather device_words", 128, 129, with_gather(Gather { device_words: 129, ..gather })),
        ("gather code", 0, 1, with_gather(Gather { code: Some(PageCode::E4m3), ..gather })),
        ("attend requests", 2, 3, with_attend(Attend { entries: &three, ..attend })),
        ("attend kv_heads", 3, 2, with_attend(Attend { kv_heads: 2, ..attend })),
        ("attend layer", 1, 0, with_attend(Attend { layer: 0, ..attend })),
        ("attend head_words", 8, 16, with_attend(Attend { head_words: 16, ..attend })),
        ("attend page_tokens", 8, 16, with_attend(Attend { page_tokens: 16, ..attend })),
        ("attend pages", 24, 30, with_attend(Attend { pages: &more_pages, ..attend })),
        ("attend page_counts", 6, 9, with_attend(Attend { page_counts: &nine_counts, ..attend })),
        ("attend steady", 9, 6, with_attend(Attend { steady: &slabs, ..attend })),
        ("attend pool", 128, 256, with_attend(Attend { pool: &more_words, ..attend })),
    ] {
        assert_eq!(launch(wrong), Err(DriverError::Length { what, expected, found }));
    }
    let summarised_elsewhere = with_table(SummaryTable { summaries: &other_pool, ..summary_table });
    let bounds = LayerStep {
        index: Some(
            IndexStep { table: SummaryTable { operator: IndexOperator::Bounds, ..summary_table }, ..index }
                .into(),
        ),
        ..right
    };
    for (what, wrong) in [
        ("append pool", with_pages(OffloadPages { pool: &other_pool, ..of_append })),
        ("resolve id_counts", with_resolve(Resolve { id_counts: &other_counts, ..resolve })),
        ("gather counts", with_gather(Gather { counts: &other_counts, ..gather })),
        ("gather arrived", with_gather(Gather { arrived: Some(&other_counts), ..gather })),
        ("gather arrived", with_gather(Gather { arrived: None, ..gather })),
        ("gather arrived", with_resolve(Resolve { arrived: &other_counts, ..resolve })),
        ("attend page_counts", with_attend(Attend { page_counts: &other_counts, ..attend })),
        (
            "attend copy_counts",
            with_attend(Attend {
                awaited: Some(Awaited { copy_counts: &other_counts, arrived: &arrived }),
                ..attend
            }),
        ),
        ("score summaries", summarised_elsewhere),
    ] {
        assert_eq!(launch(wrong), Err(DriverError::OtherBuffer { what }));
    }
    assert_eq!(launch(bounds), Err(DriverError::Operand { what: "score bounds", value: 0, min: 1, max: 1 }));
    let in_order = launch(with_resolve(Resolve { misses_last: false, ..resolve }));
    assert_eq!(in_order, Err(DriverError::Operand { what: "attend misses_last", value: 0, min: 1, max: 1 }));
    // All of a step but one stage is of layer 1.
    let other_layer = launch(with_resolve(Resolve { layer: 0, ..resolve }));
    assert_eq!(other_layer, Err(DriverError::Length { what: "index first_row", expected: 0, found: 3 }));
    assert_eq!(driver.log(), [""; 0], "nothing was launched");

    // Keys in low rank: the host has values alone, and attention comes behind all of them.
    let (left_copies, left_keys, left_counts, missed) = (copies(6), table(6), table(6), table(6 * 4));
    let (frequencies, bases, coefficients) = (floats(32), words(2 * 3 * 64 * 4), words(2 * 512 * 8 * 4));
    let (more_bases, three_keys) = (words(2 * 2 * 3 * 64 * 4), table(6 * 4));
    let project = ProjectKeys {
        entries: &two,
        steady: &steady,
        pool: &pool,
        kv_heads: 3,
        head_words: 8,
        layer: 1,
        layers: 2,
        page_tokens: 8,
        frequencies: &frequencies,
        magnitude: 1.0,
        bases: &bases,
        rank: 32,
        directories: &directories,
        coefficients: &coefficients,
        copies: &left_copies,
        copy_keys: &left_keys,
        counts: &left_counts,
    };
    let replace = RebuildKeys {
        copies: &left_copies,
        copy_keys: &left_keys,
        counts: &left_counts,
        entries: &two,
        kv_heads: 3,
        head_words: 8,
        layer: 1,
        layers: 2,
        directories: &directories,
        coefficients: &coefficients,
        rank: 32,
        bases: &bases,
        frequencies: &frequencies,
        magnitude: 1.0,
        page_tokens: 8,
        pool: &pool,
        blocks: 2,
    };
    let rebuild = RebuildKeys { copies: &page_copies, copy_keys: &missed, counts: &counts, ..replace };
    let stages = LowRankStages { project, replace, rebuild };
    let of_low_rank = LayerStep {
        append: Append { pages: OffloadPages { host_words: 64, ..of_append }, ..append },
        resolve: Resolve { copy_keys: Some(&missed), ..resolve },
        gather: Gather { page_words: 64, arrived: None, ..gather },
        attend: Attend { awaited: None, ..attend },
        low_rank: Some(stages),
        ..right
    };
    driver.log();
    launch(of_low_rank).unwrap();
    let rebuilt = [
        "chunk_mean_step",
        "project_keys",
        "rebuild_keys_64",
        "append",
        "score",
        "select",
        "resolve",
        "rebuild_keys_64",
        "gather",
        "attend_64",
    ];
    assert_eq!(launched(&driver), rebuilt);
    let with = |stages| LayerStep { low_rank: Some(stages), ..of_low_rank };
    let with_project = |project| with(LowRankStages { project, ..stages });
    let with_replace = |replace| with(LowRankStages { replace, ..stages });
    let with_rebuild = |rebuild| with(LowRankStages { rebuild, ..stages });
    let awaited = Attend { awaited: Some(Awaited { copy_counts: &counts, arrived: &arrived }), ..attend };
    for (what, expected, found, wrong) in [
        ("project entries", 2, 3, with_project(ProjectKeys { entries: &three, ..project })),
        ("project kv_heads", 3, 2, with_project(ProjectKeys { kv_heads: 2, ..project })),
        ("project layer", 1, 0, with_project(ProjectKeys { layer: 0, ..project })),
        ("project head_words", 8, 16, with_project(ProjectKeys { head_words: 16, ..project })),
        ("project page_tokens", 8, 16, with_project(ProjectKeys { page_tokens: 16, ..project })),
        ("replace copies", 6, 24, with_replace(RebuildKeys { copies: &page_copies, ..replace })),
        ("rebuild copies", 24, 6, with_rebuild(RebuildKeys { copies: &left_copies, ..rebuild })),
        ("rebuild entries", 2, 3, with_rebuild(RebuildKeys { entries: &three, ..rebuild })),
        ("rebuild kv_heads", 3, 2, with_replace(RebuildKeys { kv_heads: 2, ..replace })),
        ("rebuild layer", 1, 0, with_rebuild(RebuildKeys { layer: 0, ..rebuild })),
        ("rebuild layers", 2, 3, with_rebuild(RebuildKeys { layers: 3, ..rebuild })),
        ("rebuild head_words", 8, 16, with_replace(RebuildKeys { head_words: 16, ..replace })),
        ("rebuild page_tokens", 8, 16, with_rebuild(RebuildKeys { page_tokens: 16, ..rebuild })),
        ("rebuild rank", 32, 64, with_replace(RebuildKeys { rank: 64, ..replace })),
        ("gather awaited words", 128, 64, LayerStep { attend: awaited, ..of_low_rank }),
    ] {
        assert_eq!(launch(wrong), Err(DriverError::Length { what, expected, found }));
    }
    for (what, wrong) in [
        ("project steady", with_project(ProjectKeys { steady: &nine_counts, ..project })),
        ("project pool", with_project(ProjectKeys { pool: &other_pool, ..project })),
        ("replace counts", with_replace(RebuildKeys { counts: &other_counts, ..replace })),
        ("replace copy_keys", with_replace(RebuildKeys { copy_keys: &other_counts, ..replace })),
        ("rebuild copy_keys", with_rebuild(RebuildKeys { copy_keys: &three_keys, ..rebuild })),
        ("rebuild copy_keys", LayerStep { resolve, ..of_low_rank }),
        ("rebuild counts", with_rebuild(RebuildKeys { counts: &left_counts, ..rebuild })),
        ("rebuild bases", with_rebuild(RebuildKeys { bases: &more_bases, ..rebuild })),
        ("rebuild pool", with_replace(RebuildKeys { pool: &other_pool, ..replace })),
    ] {
        assert_eq!(launch(wrong), Err(DriverError::OtherBuffer { what }));
    }
    assert_eq!(driver.log(), [""; 0], "nothing was launched");

    // A method's own stages are held to the same, but for what they make of summaries.
    let (own_index, own_select) = (Idle, Idle);
    let own_rows = SummaryRows::from(summary_table);
    let with_rows = |rows| {
        let stage = StepIndex { rows, steady: index.steady, pool: index.pool, page_tokens: 8 };
        LayerStep { index: Some(LayerIndex::Own(&own_index, stage)), ..right }
    };
    let scratch = words(0);
    let with_own = |score, select| {
        let stage = SelectStage { score, select, scratch: &scratch, first_request: 0 };
        LayerStep { select: Some(LayerSelect::Own(&own_select, stage)), ..right }
    };
    driver.log();
    for (what, expected, found, wrong) in [
        ("index requests", 2, 3, with_rows(SummaryRows { entries: &three, ..own_rows })),
        ("index first_row", 3, 0, with_rows(SummaryRows { first_row: 0, ..own_rows })),
        ("score layer", 1, 0, with_own(Score { layer: 0, ..score }, select)),
        ("resolve ids", 48, 42, with_own(score, SelectPartitions { ids: &more_ids, ..select })),
    ] {
        assert_eq!(launch(wrong), Err(DriverError::Length { what, expected, found }));
    }
    let elsewhere = launch(with_rows(SummaryRows { summaries: &other_pool, ..own_rows }));
    assert_eq!(elsewhere, Err(DriverError::OtherBuffer { what: "score summaries" }));
    assert_eq!(driver.log(), [""; 0], "nothing was launched");
    let both =
        LayerStep { index: with_rows(own_rows).index, ..with_own(Score { bounds: true, ..score }, select) };
    launch(both).unwrap();
    assert_eq!(launched(&driver), ["append", "resolve", "gather", "attend_64"]);

    // Two layers as a graph: the same launches, one after another.
    // SAFETY: the stand-in's kernels touch nothing.
    let capture = |layers: &[LayerStep<'_>]| unsafe { capture_step(layers, &kernels, &stream) };
    let graph = capture(&[right, LayerStep { index: None, ..right }]).unwrap();
    let log = driver.log();
    let expected = ALL.iter().chain(&ALL[1..]);
    let (kernels_in, expected): (Vec<_>, Vec<_>) = log[1..14]
        .iter()
        .zip(expected)
        .map(|(line, name)| (kernel_of(line).unwrap(), name.to_string()))
        .unzip();
    assert_eq!(kernels_in, expected);
    let overlapping = log.iter().filter(|line| line.starts_with("overlapping launch attend_64"));
    assert_eq!(overlapping.count(), 2, "attention that awaits its pages begins beside their gather");
    assert_eq!(log[0], "capture, mode 1");
    assert_eq!(log[14..], ["captured", "instantiate, flags 0", "upload", "destroy graph"]);
    drop(graph);
    driver.log();
    let graph = capture(&[of_low_rank]).unwrap();
    assert_eq!(launched(&driver), rebuilt, "all of a step over keys in low rank is in its graph");
    drop(graph);

    driver.log();
    let refused = capture(&[with_gather(Gather { page_words: 64, ..gather })]).unwrap_err();
    assert_eq!(refused, DriverError::Length { what: "gather page_words", expected: 128, found: 64 });
    assert_eq!(driver.log(), ["capture, mode 1", "captured", "destroy graph"]);
}
