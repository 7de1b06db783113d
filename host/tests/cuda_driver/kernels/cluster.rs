use spinkv::backend::cuda::driver::{DeviceBuffer, DriverError, PinnedArena};
use spinkv::backend::cuda::kernels::{
    ClusterPages, ClusterRun, ClusterScratch, ClusterShape, ClusterTables, Kernels,
};
use spinkv_kernels::abi::WORD_BYTES;
use spinkv_kernels::abi::cluster::{MAX_TOKENS, store};

use super::{ANY, length, operand, short};
use crate::driver;

#[test]
fn a_run_of_clusters_is_checked_and_launched() {
    let driver = driver();
    let (context, stream) = driver.open();
    let kernels = Kernels::load(&context).unwrap();
    let table = |len| DeviceBuffer::<u32>::zeroed(&stream, len).unwrap();
    let words = |len| DeviceBuffer::zeroed(&stream, len).unwrap();
    // 32 clusters of 2 heads of 8 words; pages of 4 tokens, 2 of them a partition: at most 32 + 12 partitions and 49 pages a row.
    let shape = ClusterShape { tokens: 100, kv_heads: 2, head_words: 8, spans: 2, span_centroids: 16 };
    let scratch = ClusterScratch {
        sums: words(32),
        means: words(32),
        centroids: words(512),
        biases: DeviceBuffer::zeroed(&stream, 64).unwrap(),
        assigned: table(200),
        sizes: table(64),
        firsts: DeviceBuffer::zeroed(&stream, 64).unwrap(),
        members: table(392),
    };
    let (keys, values, few_keys) = (words(103 * 16), words(103 * 16), words(103 * 16 - 1));
    let (directories, slabs, valid) = (table(10), table(40), table(40));
    let (row_pages, partition_tokens) = (table(2 * 9), table(4 * 8));
    let (summaries, value_means) = (words(4 * 8 * 8), words(4 * 8 * 8));
    let (short_table, short_words, few_rows) = (table(31), words(255), table(17));
    let host_pages = PinnedArena::reserve(&context, 16 * 64 * WORD_BYTES, |_| {}).unwrap();
    let tables = ClusterTables {
        page_tokens: 4,
        directories: &directories,
        directory: 3,
        first_row: 2,
        request_rows: 4,
        segment_partitions: 8,
        capacity: 49,
        row_pages: &row_pages,
        first_place: 5,
        partition_tokens: &partition_tokens,
        summaries: &summaries,
        value_means: &value_means,
    };
    let pages = ClusterPages {
        host_slabs: &slabs,
        first_slab: 1,
        slab_stride: 9,
        host_valid: &valid,
        host_pages: &host_pages,
        blocks: 3,
    };
    let right =
        ClusterRun { shape, keys: &keys, values: &values, first: 3, scratch: &scratch, tables, pages };
    driver.log();
    // SAFETY: the stand-in's kernels touch nothing.
    let launch = |run: ClusterRun<'_>| unsafe { run.launch(&kernels, &stream) };
    let sized = |shape| launch(ClusterRun { shape, ..right });
    let kept = |tables| launch(ClusterRun { tables, ..right });
    let stored = |pages| launch(ClusterRun { pages, ..right });

    let width = sized(ClusterShape { head_words: 12, ..shape });
    let choice = DriverError::Choice { what: "cluster head_words", value: 12, allowed: &[8, 16] };
    assert_eq!(width, Err(choice));
    for (what, min, max, wrong) in [
        ("cluster kv_heads", 1, ANY, ClusterShape { kv_heads: 0, ..shape }),
        ("cluster tokens", 1, MAX_TOKENS.into(), ClusterShape { tokens: 0, ..shape }),
        ("cluster spans", 1, 512, ClusterShape { spans: 0, ..shape }),
        ("cluster span_centroids", 8, 50, ClusterShape { span_centroids: 0, ..shape }),
    ] {
        assert_eq!(sized(wrong), Err(operand(what, 0, min, max)));
    }
    let long = sized(ClusterShape { tokens: MAX_TOKENS + 1, ..shape });
    assert_eq!(long, Err(operand("cluster tokens", u64::from(MAX_TOKENS) + 1, 1, MAX_TOKENS.into())));
    let many = sized(ClusterShape { span_centroids: 56, ..shape });
    assert_eq!(many, Err(operand("cluster span_centroids", 56, 8, 50)));
    let odd = DriverError::Multiple { what: "cluster span_centroids", value: 12, of: 8 };
    assert_eq!(sized(ClusterShape { span_centroids: 12, ..shape }), Err(odd));
    let wide = sized(ClusterShape { kv_heads: 1 << 24, ..shape });
    assert_eq!(wide, Err(operand("cluster words of keys", 103 << 27, 1, ANY)));
    let few = launch(ClusterRun { keys: &few_keys, ..right });
    assert_eq!(few, Err(short("cluster keys", 1648, 1647)));
    let few = launch(ClusterRun { values: &few_keys, ..right });
    assert_eq!(few, Err(short("cluster values", 1648, 1647)));
    let beyond = launch(ClusterRun { first: 4, ..right });
    assert_eq!(beyond, Err(short("cluster keys", 1664, 1648)));

    let none = kept(ClusterTables { segment_partitions: 0, ..tables });
    assert_eq!(none, Err(operand("cluster segment_partitions", 0, 1, ANY)));
    for page_tokens in [0, 65] {
        let refused = kept(ClusterTables { page_tokens, ..tables });
        assert_eq!(refused, Err(operand("cluster page_tokens", page_tokens.into(), 1, 64)));
    }
    let below = kept(ClusterTables { first_row: 3, ..tables });
    assert_eq!(below, Err(operand("cluster first_row + kv_heads", 5, 1, 4)));
    let full = kept(ClusterTables { capacity: 48, ..tables });
    assert_eq!(full, Err(operand("cluster capacity", 48, 49, ANY)));
    let directory = kept(ClusterTables { directory: 4, ..tables });
    let what = "cluster directories";
    assert_eq!(directory, Err(DriverError::OutOfRange { what, start: 4, len: 7, limit: 10 }));
    let rows = kept(ClusterTables { row_pages: &few_rows, ..tables });
    let what = "cluster row_pages";
    assert_eq!(rows, Err(DriverError::OutOfRange { what, start: 14, len: 4, limit: 17 }));
    let no_segment = kept(ClusterTables { partition_tokens: &short_table, ..tables });
    assert_eq!(no_segment, Err(short("cluster partition_tokens", 32, 31)));
    let no_segment = kept(ClusterTables { summaries: &short_words, ..tables });
    assert_eq!(no_segment, Err(short("cluster summaries", 256, 255)));
    let no_segment = kept(ClusterTables { value_means: &short_words, ..tables });
    assert_eq!(no_segment, Err(short("cluster value_means", 256, 255)));

    for blocks in [0, store::MAX_BLOCKS + 1] {
        let refused = operand("cluster blocks", blocks.into(), 1, store::MAX_BLOCKS.into());
        assert_eq!(stored(ClusterPages { blocks, ..pages }), Err(refused));
    }
    let bits = stored(ClusterPages { host_valid: &short_table, ..pages });
    assert_eq!(bits, Err(length("cluster host_valid", 40, 31)));
    let no_slab = kept(ClusterTables { page_tokens: 5, ..tables });
    assert_eq!(no_slab, Err(short("cluster arena words", 1280, 1024)));
    for (what, least, few) in [
        ("cluster sums", 32, ClusterScratch { sums: words(31), ..of(&stream) }),
        ("cluster means", 32, ClusterScratch { means: words(31), ..of(&stream) }),
        ("cluster centroids", 512, ClusterScratch { centroids: words(511), ..of(&stream) }),
        (
            "cluster biases",
            64,
            ClusterScratch { biases: DeviceBuffer::zeroed(&stream, 63).unwrap(), ..of(&stream) },
        ),
        ("cluster assigned", 200, ClusterScratch { assigned: table(199), ..of(&stream) }),
        ("cluster sizes", 64, ClusterScratch { sizes: table(63), ..of(&stream) }),
        (
            "cluster firsts",
            64,
            ClusterScratch { firsts: DeviceBuffer::zeroed(&stream, 63).unwrap(), ..of(&stream) },
        ),
        ("cluster members", 392, ClusterScratch { members: table(391), ..of(&stream) }),
    ] {
        assert_eq!(launch(ClusterRun { scratch: &few, ..right }), Err(short(what, least, least - 1)));
    }
    assert_eq!(driver.log().iter().filter(|line| line.starts_with("launch")).count(), 0);

    launch(right).unwrap();
    let log = driver.log();
    let [k, v] = [&keys, &values].map(DeviceBuffer::address);
    let (sums, means, centroids) =
        (scratch.sums.address(), scratch.means.address(), scratch.centroids.address());
    let (biases, assigned, sizes) =
        (scratch.biases.address(), scratch.assigned.address(), scratch.sizes.address());
    let (firsts, members) = (scratch.firsts.address(), scratch.members.address());
    let row_pages = row_pages.address();
    let [directories, slabs, valid] = [&directories, &slabs, &valid].map(DeviceBuffer::address);
    let partition_tokens = partition_tokens.address();
    let [summaries, value_means] = [&summaries, &value_means].map(DeviceBuffer::address);
    let host = host_pages.device_address();
    let assign = |blocks: u32, parameters: &str, counted: u32| {
        let to = format!("{centroids:#x} {biases:#x} {assigned:#x} {counted} {sizes:#x}");
        format!("launch cluster_assign_64 {blocks} 1 1, 128 1 1, 33792: {k:#x} 3 100 2 {parameters} {to}")
    };
    let update = format!(
        "launch cluster_update 8 1 1, 256 1 1, 5120: {k:#x} 3 100 2 8 2 16 {means:#x} {assigned:#x} {centroids:#x} {biases:#x}"
    );
    let mut expected = vec![
        format!("launch cluster_sums 1 1 1, 128 1 1, 0: {k:#x} 3 100 16 {sums:#x}"),
        format!(
            "launch cluster_start 2 1 1, 256 1 1, 4608: {k:#x} 3 100 2 8 2 16 {sums:#x} {means:#x} {centroids:#x} {biases:#x}"
        ),
    ];
    for _ in 0..9 {
        expected.extend([assign(4, "2 16", 0), update.clone()]);
    }
    let at = format!("{directories:#x} 3 2 4 8");
    expected.extend([
        "fill 256".to_owned(),
        assign(2, "1 32", 1),
        format!(
            "launch cluster_pages 2 1 1, 256 1 1, 64: {sizes:#x} 32 4 7 {row_pages:#x} {firsts:#x}"
        ),
        format!(
            "launch cluster_list 8 1 1, 256 1 1, 5120: {assigned:#x} 100 8 32 4 {firsts:#x} {members:#x} 49"
        ),
        format!(
            "launch cluster_means 13 1 1, 256 1 1, 0: {k:#x} {v:#x} 3 2 8 4 7 {row_pages:#x} {members:#x} 49 {at} {summaries:#x} {value_means:#x} {partition_tokens:#x}"
        ),
        format!(
            "launch cluster_store 3 1 1, 256 1 1, 0: {k:#x} {v:#x} 3 2 8 4 7 {row_pages:#x} {members:#x} 49 {slabs:#x} 1 9 2 {valid:#x} {host:#x}"
        ),
    ]);
    assert_eq!(log, expected);
}

/// Scratch for the run, from the sizes that it works out itself.
fn of(stream: &spinkv::backend::cuda::driver::Stream) -> ClusterScratch {
    ClusterScratch::new(stream, 1000, 2, 8, 4).unwrap()
}

#[test]
fn scratch_has_room_for_the_papers_clusters() {
    let driver = driver();
    let (context, stream) = driver.open();
    let shape = ClusterShape::new(1000, 2, 8);
    assert_eq!((shape.spans, shape.span_centroids, shape.clusters()), (1, 64, 64));
    let scratch = of(&stream);
    let lengths =
        [scratch.centroids.len(), scratch.assigned.len(), scratch.sums.len(), scratch.members.len()];
    // 62 + 8 clusters, 302 pages.
    assert_eq!(lengths, [2 * 70 * 8, 2000, 2 * 2 * 16, 2 * 302 * 4]);
    let refused = ClusterScratch::new(&stream, MAX_TOKENS + 1, 2, 8, 4).unwrap_err();
    assert_eq!(refused, operand("cluster tokens", u64::from(MAX_TOKENS) + 1, 1, MAX_TOKENS.into()));
    assert_eq!(
        ClusterScratch::new(&stream, 1, 2, 8, 0).unwrap_err(),
        operand("cluster page_tokens", 0, 1, ANY)
    );
    drop(context);
}
