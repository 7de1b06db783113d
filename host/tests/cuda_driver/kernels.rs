//! What the kernels' launch types refuse, and what a launch hands over. In each, the operands are right but for one.

use spinkv::backend::cuda::driver::{DeviceBuffer, DriverError, PinnedArena};
use spinkv::backend::cuda::kernels::{
    Append, Attend, Estimates, Gather, GatherVariant, IndexOperator, IndexPrompts, IndexStep, Kernels,
    KvTables, Marks, OffloadPages, PartitionPages, Resolve, Score, SelectPartitions, StorePrompt,
    SummaryTable, TopK, ValidBits, WriteBack,
};
use spinkv::pipeline::GroupMerge;
use spinkv_kernels::abi::{
    Entry, PageCopy, WORD_BYTES, append, attend, gather, gather_bulk, index_prompts, resolve, score, select,
    store_prompt, write_back,
};

use super::driver;

const ANY: u64 = u32::MAX as u64;

fn operand(what: &'static str, value: u64, min: u64, max: u64) -> DriverError {
    DriverError::Operand { what, value, min, max }
}

fn short(what: &'static str, len: usize, limit: usize) -> DriverError {
    DriverError::OutOfRange { what, start: 0, len, limit }
}

fn multiple(what: &'static str, value: u64) -> DriverError {
    DriverError::Multiple { what, value, of: 4 }
}

fn length(what: &'static str, expected: usize, found: usize) -> DriverError {
    DriverError::Length { what, expected, found }
}

#[test]
fn a_gather_is_checked_and_launched() {
    let driver = driver();
    let (context, stream) = driver.open();
    let kernels = Kernels::load(&context).unwrap();
    let list = |copies| DeviceBuffer::from_slice(&stream, &vec![PageCopy::default(); copies]).unwrap();
    let (copies, none, counts) = (list(3), list(0), DeviceBuffer::zeroed(&stream, 2).unwrap());
    let count = DeviceBuffer::zeroed(&stream, 1).unwrap();
    let host_pages = PinnedArena::reserve(&context, 4 * 16 * WORD_BYTES, |_| {}).unwrap();
    let device_pages = DeviceBuffer::zeroed(&stream, 2 * 16).unwrap();
    let right = Gather {
        copies: &copies,
        counts: &count,
        host_pages: &host_pages,
        device_pages: &device_pages,
        page_words: 16,
        blocks: 24,
    };
    driver.log();
    // SAFETY: the stand-in's kernels touch nothing.
    let launch = |gather: Gather<'_>| unsafe { gather.launch(&kernels, &stream) };

    let length = DriverError::Length { what: "gather copies", expected: 2, found: 3 };
    assert_eq!(launch(Gather { counts: &counts, ..right }), Err(length));
    let no_list = DeviceBuffer::zeroed(&stream, 0).unwrap();
    assert_eq!(launch(Gather { counts: &no_list, ..right }), Err(operand("gather lists", 0, 1, 8192)));
    driver.log();
    let no_words = operand("gather page_words", 0, 1, ANY);
    assert_eq!(launch(Gather { page_words: 0, ..right }), Err(no_words));
    const MAX_BLOCKS: u32 = 2_097_151;
    assert_eq!(gather::MAX_BLOCKS, MAX_BLOCKS);
    for blocks in [0, MAX_BLOCKS + 1, 1 << 30, u32::MAX] {
        let refused = operand("gather blocks", blocks.into(), 1, MAX_BLOCKS.into());
        assert_eq!(launch(Gather { blocks, ..right }), Err(refused));
    }
    let long = operand("gather copies", 3, 0, 1);
    assert_eq!(launch(Gather { page_words: 1 << 31, ..right }), Err(long));
    let less_than_a_page = short("gather arena words", 65, 64);
    assert_eq!(launch(Gather { page_words: 65, ..right }), Err(less_than_a_page.clone()));
    let message = "gather arena words: 65 elements from 0 on are beyond the end at 64";
    assert_eq!(less_than_a_page.to_string(), message);
    assert_eq!(driver.log(), [""; 0], "nothing was launched");

    let line = |gather: Gather<'_>| {
        let list = gather.copies;
        let [copies, count, host, pool] =
            [list.address(), count.address(), host_pages.device_address(), device_pages.address()];
        let (capacity, shared) = (list.len(), gather::shared_bytes(1));
        let Gather { blocks, page_words, .. } = gather;
        format!(
            "launch gather {blocks} 1 1, 512 1 1, {shared}: {copies:#x} {count:#x} 1 {capacity} {host:#x} {pool:#x} {page_words}"
        )
    };
    for accepted in [right, Gather { blocks: MAX_BLOCKS, page_words: 64, ..right }] {
        launch(accepted).unwrap();
        assert_eq!(driver.log(), [line(accepted)]);
    }
    launch(Gather { copies: &none, ..right }).unwrap();
    assert_eq!(driver.log().len(), 1, "an empty list is a list");

    // Pages of 4 KiB, and a list of as many as one block has rings.
    let host_pages = PinnedArena::reserve(&context, 256 * WORD_BYTES, |_| {}).unwrap();
    let large = Gather { host_pages: &host_pages, page_words: 256, blocks: 1, ..right };
    driver.log();
    assert_eq!(large.variant(&kernels), GatherVariant::Bulk);
    launch(large).unwrap();
    let [list, count, pool] = [copies.address(), count.address(), device_pages.address()];
    let parameters = format!("{list:#x} {count:#x} 1 3 {:#x} {pool:#x} 256", host_pages.device_address());
    let shared = gather_bulk::shared_bytes(1);
    assert_eq!(
        shared,
        16 * 4096 + 16 * 8 + 16 * 4 + 4 * (4 + 2),
        "stages, barriers, targets, sums and starts"
    );
    assert_eq!(driver.log(), [format!("launch gather_bulk 1 1 1, 64 1 1, {shared}: {parameters}")]);
    assert_eq!(Gather { blocks: 2, ..large }.variant(&kernels), GatherVariant::ZeroCopy);
    assert_eq!(right.variant(&kernels), GatherVariant::ZeroCopy);
    // SAFETY: the stand-in's kernels touch nothing.
    unsafe { large.launch_as(GatherVariant::ZeroCopy, &kernels, &stream).unwrap() };
    assert_eq!(
        driver.log(),
        [format!("launch gather 1 1 1, 512 1 1, {}: {parameters}", gather::shared_bytes(1))]
    );
}

#[test]
fn an_index_of_prompts_is_checked_and_launched() {
    let driver = driver();
    let (context, stream) = driver.open();
    let kernels = Kernels::load(&context).unwrap();
    let table = |len| DeviceBuffer::<u32>::zeroed(&stream, len).unwrap();
    let words = |len| DeviceBuffer::zeroed(&stream, len).unwrap();
    let (first_token, first_chunk, directories, other) = (table(2), table(3), table(4), table(1));
    let entries = |count| DeviceBuffer::from_slice(&stream, &vec![Entry::default(); count]).unwrap();
    let (entries, no_entries, keys) = (entries(2), entries(0), words(64));
    // A segment of each operator: 6 rows of 8 partitions of 4 words, once, twice, thrice.
    let [mean, bounds, gate, one_short] = [192, 2 * 192, 3 * 192, 191].map(words);
    let table = SummaryTable {
        operator: IndexOperator::Mean,
        entries: &entries,
        directories: &directories,
        first_row: 4,
        request_rows: 6,
        kv_heads: 2,
        head_words: 4,
        partition_tokens: 16,
        segment_partitions: 8,
        summaries: &mean,
    };
    let right =
        IndexPrompts { table, keys: &keys, first_token: &first_token, first_chunk: &first_chunk, chunks: 33 };
    driver.log();
    // SAFETY: the stand-in's kernels touch nothing.
    let launch = |prompts: IndexPrompts<'_>| unsafe { prompts.launch(&kernels, &stream) };
    let with = |table| launch(IndexPrompts { table, ..right });

    let length = |what, expected, found| Err(DriverError::Length { what, expected, found });
    let tokens = launch(IndexPrompts { first_token: &other, ..right });
    assert_eq!(tokens, length("index first_token", 2, 1));
    let chunks = launch(IndexPrompts { first_chunk: &first_token, ..right });
    assert_eq!(chunks, length("index first_chunk", 3, 2));
    for (what, empty) in [
        ("index requests", SummaryTable { entries: &no_entries, ..table }),
        ("index kv_heads", SummaryTable { kv_heads: 0, ..table }),
        ("index head_words", SummaryTable { head_words: 0, ..table }),
        ("index partition_tokens", SummaryTable { partition_tokens: 0, ..table }),
        ("index segment_partitions", SummaryTable { segment_partitions: 0, ..table }),
    ] {
        assert_eq!(with(empty), Err(operand(what, 0, 1, ANY)));
    }
    let below = with(SummaryTable { first_row: 5, ..table });
    assert_eq!(below, Err(operand("index first_row + kv_heads", 7, 1, 6)));
    let segment = |len, limit| Err(short("index summaries of a segment", len, limit));
    assert_eq!(with(SummaryTable { summaries: &one_short, ..table }), segment(192, 191));
    let gate_in_bounds = SummaryTable { operator: IndexOperator::Gate, summaries: &bounds, ..table };
    assert_eq!(with(gate_in_bounds), segment(3 * 192, 2 * 192));
    let max = u64::from(index_prompts::MAX_WORDS);
    let many = launch(IndexPrompts { chunks: (max / 8) as u32 + 1, ..right });
    assert_eq!(many, Err(operand("index chunks * kv_heads * head_words", max / 8 * 8 + 8, 0, max)));
    assert_eq!(driver.log(), [""; 0], "nothing was launched");

    for (operator, name, summaries) in [
        (IndexOperator::Mean, "chunk_mean", &mean),
        (IndexOperator::Bounds, "chunk_bounds", &bounds),
        (IndexOperator::Gate, "gate_pool", &gate),
    ] {
        let table = SummaryTable { operator, summaries, ..table };
        with(table).unwrap();
        let [token, chunk, directories] =
            [&first_token, &first_chunk, &directories].map(DeviceBuffer::address);
        let [keys, summaries] = [&keys, summaries].map(DeviceBuffer::address);
        let entries = entries.address();
        let parameters = format!(
            "{keys:#x} {entries:#x} {token:#x} {chunk:#x} {directories:#x} 2 4 6 2 4 16 8 {summaries:#x}"
        );
        // 33 x 2 x 4 words.
        assert_eq!(driver.log(), [format!("launch {name} 2 1 1, 256 1 1, 0: {parameters}")]);
    }
    launch(IndexPrompts { chunks: 0, ..right }).unwrap();
    assert_eq!(driver.log(), [""; 0], "no partition, no launch");

    // The same table in a decode step.
    let (steady, pool) = (DeviceBuffer::zeroed(&stream, 9).unwrap(), words(2 * 16 * 4));
    let right = IndexStep { table, steady: &steady, pool: &pool, page_tokens: 16 };
    driver.log();
    // SAFETY: the stand-in's kernels touch nothing.
    let launch = |step: IndexStep<'_>| unsafe { step.launch(&kernels, &stream) };
    let no_tokens = launch(IndexStep { page_tokens: 0, ..right });
    assert_eq!(no_tokens, Err(operand("index page_tokens", 0, 1, ANY)));
    let no_page = launch(IndexStep { page_tokens: 17, ..right });
    assert_eq!(no_page, Err(short("index page words", 136, 128)));
    assert_eq!(driver.log(), [""; 0], "nothing was launched");
    for (operator, name, summaries) in [
        (IndexOperator::Mean, "chunk_mean_step", &mean),
        (IndexOperator::Bounds, "chunk_bounds_step", &bounds),
        (IndexOperator::Gate, "gate_pool_step", &gate),
    ] {
        launch(IndexStep { table: SummaryTable { operator, summaries, ..table }, ..right }).unwrap();
        let [steady, directories] = [&steady, &directories].map(DeviceBuffer::address);
        let [pool, summaries] = [&pool, summaries].map(DeviceBuffer::address);
        let entries = entries.address();
        let parameters =
            format!("{entries:#x} {steady:#x} {pool:#x} {directories:#x} 4 6 2 4 16 16 8 {summaries:#x}");
        assert_eq!(driver.log(), [format!("launch {name} 2 1 1, 128 1 1, 0: {parameters}")]);
    }
}

#[test]
fn offloads_are_checked_and_launched() {
    let driver = driver();
    let (context, stream) = driver.open();
    let kernels = Kernels::load(&context).unwrap();
    let table = |len| DeviceBuffer::<u32>::zeroed(&stream, len).unwrap();
    let words = |len| DeviceBuffer::zeroed(&stream, len).unwrap();
    let (steady, slabs, valid, first_token, first_page) = (table(9), table(6), table(6), table(2), table(3));
    let entries = |count| DeviceBuffer::from_slice(&stream, &vec![Entry::default(); count]).unwrap();
    let (entries, no_entries, keys, values, long) = (entries(2), entries(0), words(24), words(24), words(32));
    // Pages of 4 tokens of 2 heads of 6 words: 48 words, 768 in a slab.
    let pool = words(48);
    let host_pages = PinnedArena::reserve(&context, 768 * WORD_BYTES, |_| {}).unwrap();
    let pages = OffloadPages {
        entries: &entries,
        steady: &steady,
        pool: &pool,
        host_slabs: &slabs,
        host_valid: &valid,
        host_pages: &host_pages,
        first_row: 2,
        kv_heads: 2,
        head_words: 6,
        page_tokens: 4,
    };
    driver.log();
    // SAFETY: the stand-in's kernels touch nothing.
    let append = |append: Append<'_>| unsafe { append.launch(&kernels, &stream) };
    // SAFETY: as above.
    let store = |prompt: StorePrompt<'_>| unsafe { prompt.launch(&kernels, &stream) };
    let right = Append { pages, keys: &keys, values: &values };
    let prompt = StorePrompt {
        pages,
        keys: &keys,
        values: &values,
        first_token: &first_token,
        first_page: &first_page,
        batch_pages: 7,
        blocks: 3,
    };

    let length = |what, expected, found| Err(DriverError::Length { what, expected, found });
    for (what, pages) in [
        ("offload requests", OffloadPages { entries: &no_entries, ..pages }),
        ("offload kv_heads", OffloadPages { kv_heads: 0, ..pages }),
        ("offload head_words", OffloadPages { head_words: 0, ..pages }),
        ("offload page_tokens", OffloadPages { page_tokens: 0, ..pages }),
    ] {
        assert_eq!(append(Append { pages, ..right }), Err(operand(what, 0, 1, ANY)));
        assert_eq!(store(StorePrompt { pages, ..prompt }), Err(operand(what, 0, 1, ANY)));
    }
    let other_bits = OffloadPages { host_valid: &steady, ..pages };
    assert_eq!(append(Append { pages: other_bits, ..right }), length("offload host_valid", 6, 9));
    let wide = OffloadPages { page_tokens: 1 << 30, ..pages };
    let refused = operand("offload page words", 12 << 30, 2, 1 << 31);
    assert_eq!(append(Append { pages: wide, ..right }), Err(refused));
    let no_page = OffloadPages { page_tokens: 5, ..pages };
    assert_eq!(append(Append { pages: no_page, ..right }), Err(short("offload pool words", 60, 48)));
    let no_slab = OffloadPages { page_tokens: 5, pool: &words(60), ..pages };
    driver.log();
    assert_eq!(append(Append { pages: no_slab, ..right }), Err(short("offload arena words", 960, 768)));
    assert_eq!(append(Append { keys: &long, ..right }), length("append keys", 24, 32));
    assert_eq!(append(Append { values: &long, ..right }), length("append values", 24, 32));
    let rows = append(Append { pages: OffloadPages { kv_heads: u32::MAX, ..pages }, ..right });
    let max = append::MAX_ROWS.into();
    assert_eq!(rows, Err(operand("append requests * kv_heads", 2 * ANY, 1, max)));

    let other = store(StorePrompt { values: &long, ..prompt });
    assert_eq!(other, length("store_prompt values", 24, 32));
    let tokens = store(StorePrompt { first_token: &first_page, ..prompt });
    assert_eq!(tokens, length("store_prompt first_token", 2, 3));
    let firsts = store(StorePrompt { first_page: &first_token, ..prompt });
    assert_eq!(firsts, length("store_prompt first_page", 3, 2));
    let max = store_prompt::MAX_BLOCKS;
    for blocks in [0, max + 1] {
        let refused = operand("store_prompt blocks", blocks.into(), 1, max.into());
        assert_eq!(store(StorePrompt { blocks, ..prompt }), Err(refused));
    }
    let max = store_prompt::MAX_PAGES.into();
    let many = store(StorePrompt { batch_pages: u32::MAX, ..prompt });
    assert_eq!(many, Err(operand("store_prompt pages * kv_heads", 2 * ANY, 0, max)));
    assert_eq!(driver.log().iter().filter(|line| line.starts_with("launch")).count(), 0);

    append(right).unwrap();
    let [steady, slabs, valid] = [&steady, &slabs, &valid].map(DeviceBuffer::address);
    let [token, page] = [&first_token, &first_page].map(DeviceBuffer::address);
    let [keys, values, pool] = [&keys, &values, &pool].map(DeviceBuffer::address);
    let entries = entries.address();
    let host = host_pages.device_address();
    let places = format!("{steady:#x} {pool:#x} {slabs:#x} {valid:#x} {host:#x}");
    let parameters = format!("{entries:#x} {keys:#x} {values:#x} {places} 2 2 2 6 4");
    assert_eq!(driver.log(), [format!("launch append 1 1 1, 128 1 1, 0: {parameters}")]);
    store(prompt).unwrap();
    let parameters = format!("{keys:#x} {values:#x} {entries:#x} {token:#x} {page:#x} {places} 2 2 2 6 4");
    assert_eq!(driver.log(), [format!("launch store_prompt 3 1 1, 256 1 1, 0: {parameters}")]);
    store(StorePrompt { batch_pages: 0, ..prompt }).unwrap();
    assert_eq!(driver.log(), [""; 0], "no page, no launch");
}

#[test]
fn a_write_back_is_checked_and_launched() {
    let driver = driver();
    let (context, stream) = driver.open();
    let kernels = Kernels::load(&context).unwrap();
    let table = |len| DeviceBuffer::<u32>::zeroed(&stream, len).unwrap();
    let copies = DeviceBuffer::from_slice(&stream, &[PageCopy::default(); 3]).unwrap();
    let (count, places, two_places, host_valid) = (table(1), table(3), table(2), table(5));
    let host_pages = PinnedArena::reserve(&context, 4 * 16 * WORD_BYTES, |_| {}).unwrap();
    let device_pages = DeviceBuffer::zeroed(&stream, 2 * 16).unwrap();
    let bits = ValidBits { places: &places, host_valid: &host_valid };
    let right = WriteBack {
        copies: &copies,
        count: &count,
        device_pages: &device_pages,
        host_pages: &host_pages,
        page_words: 16,
        valid: Some(bits),
        blocks: 4,
    };
    driver.log();
    // SAFETY: the stand-in's kernels touch nothing.
    let launch = |write_back: WriteBack<'_>| unsafe { write_back.launch(&kernels, &stream) };

    let length = |what, expected, found| Err(DriverError::Length { what, expected, found });
    assert_eq!(launch(WriteBack { count: &places, ..right }), length("write_back count", 1, 3));
    let other = ValidBits { places: &two_places, ..bits };
    assert_eq!(launch(WriteBack { valid: Some(other), ..right }), length("write_back places", 3, 2));
    for page_words in [0, (1 << 31) + 1] {
        let refused = operand("write_back page_words", page_words.into(), 1, 1 << 31);
        assert_eq!(launch(WriteBack { page_words, ..right }), Err(refused));
    }
    const MAX_BLOCKS: u32 = 2_097_151;
    assert_eq!(write_back::MAX_BLOCKS, MAX_BLOCKS);
    for blocks in [0, MAX_BLOCKS + 1] {
        let refused = operand("write_back blocks", blocks.into(), 1, MAX_BLOCKS.into());
        assert_eq!(launch(WriteBack { blocks, ..right }), Err(refused));
    }
    let less = short("write_back arena words", 65, 64);
    assert_eq!(launch(WriteBack { page_words: 65, ..right }), Err(less));
    assert_eq!(driver.log(), [""; 0], "nothing was launched");

    launch(right).unwrap();
    launch(WriteBack { valid: None, ..right }).unwrap();
    let [count, places, valid] = [&count, &places, &host_valid].map(DeviceBuffer::address);
    let (list, pool, host) = (copies.address(), device_pages.address(), host_pages.device_address());
    let line = |marked: u32, places, valid| {
        format!(
            "launch write_back 4 1 1, 512 1 1, 0: {list:#x} {count:#x} 3 {pool:#x} {host:#x} 16 {marked} {places:#x} {valid:#x}"
        )
    };
    assert_eq!(driver.log(), [line(1, places, valid), line(0, count, count)]);
}

#[test]
fn a_resolve_is_checked_and_launched() {
    let driver = driver();
    let (context, stream) = driver.open();
    let kernels = Kernels::load(&context).unwrap();
    let table = |len| DeviceBuffer::<u32>::zeroed(&stream, len).unwrap();
    let entries = DeviceBuffer::from_slice(&stream, &[Entry::default(); 3]).unwrap();
    let segments = DeviceBuffer::zeroed(&stream, 4 * 512).unwrap();
    let (ids, pages, rows, slots, states) = (table(6 * 7), table(6 * 5), table(6), table(64), table(16));
    let copies = DeviceBuffer::from_slice(&stream, &[PageCopy::default(); 30]).unwrap();
    let tables = KvTables {
        directories: &rows,
        segments: &segments,
        owners: &slots,
        physical: &slots,
        states: &states,
        steady: &rows,
        host_slabs: &rows,
        host_valid: &rows,
        request_rows: 4,
    };
    let right = Resolve {
        entries: &entries,
        kv_heads: 2,
        layer: 1,
        ids: &ids,
        id_counts: &rows,
        partitions: PartitionPages::Shared(8),
        tables,
        slot_capacity: 32,
        segment_capacity: 3,
        pages: &pages,
        page_counts: &rows,
        copies: &copies,
        copy_counts: &rows,
        faults: &rows,
    };
    driver.log();
    // SAFETY: the stand-in's kernels touch nothing.
    let launch = |resolve: Resolve<'_>| unsafe { resolve.launch(&kernels, &stream) };

    for (what, value, min, max, wrong) in [
        ("resolve kv_heads", 0, 1, ANY, Resolve { kv_heads: 0, ..right }),
        ("resolve layer", 2, 0, 1, Resolve { layer: 2, ..right }),
        ("resolve partitions", 0, 1, ANY, Resolve { partitions: PartitionPages::Pages(0), ..right }),
        ("resolve slot_capacity", 0, 1, 65532, Resolve { slot_capacity: 0, ..right }),
        ("resolve slot_capacity", 65536, 1, 65532, Resolve { slot_capacity: 65536, ..right }),
        ("resolve segment_capacity", 0, 1, 32768, Resolve { segment_capacity: 0, ..right }),
        ("resolve pages of a row", 0, 1, 65535, Resolve { pages: &table(5), ..right }),
    ] {
        assert_eq!(launch(wrong), Err(operand(what, value, min, max)));
    }
    let uneven = launch(Resolve { slot_capacity: 30, ..right }).unwrap_err();
    assert_eq!(uneven, multiple("resolve slot_capacity", 30));
    assert_eq!(uneven.to_string(), "resolve slot_capacity is 30, which is no multiple of 4");
    for (what, expected, found, wrong) in [
        ("resolve ids", 36, 41, Resolve { ids: &table(41), ..right }),
        ("resolve id_counts", 6, 7, Resolve { id_counts: &table(7), ..right }),
        ("resolve pages", 30, 31, Resolve { pages: &table(31), ..right }),
        ("resolve copy_counts", 6, 5, Resolve { copy_counts: &table(5), ..right }),
        ("resolve faults", 6, 5, Resolve { faults: &table(5), ..right }),
        ("resolve states", 16, 15, Resolve { tables: KvTables { states: &table(15), ..tables }, ..right }),
    ] {
        assert_eq!(launch(wrong), Err(length(what, expected, found)));
    }
    driver.log();
    launch(right).unwrap();
    let shared = resolve::shared_bytes(32, 3, 5);
    let start = format!(
        "launch resolve 6 1 1, 256 1 1, {shared}: {:#x} 2 1 4 {:#x}",
        entries.address(),
        ids.address()
    );
    let log = driver.log();
    assert!(log.len() == 1 && log[0].starts_with(&start), "{log:?} and not {start}");
}

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
    // Of 6 rows 4 heads: 8 words a query, 516 logits in 2 tiles.
    let (queries, logits, statistics) = (words(24 * 8), floats(24 * 516), floats(24 * 4));
    let [queries_of_bounds, few_queries] = [24 * 16, 24 * 8 - 1].map(words);
    let [few_logits, few_statistics] = [24 * 516 - 1, 24 * 4 - 1].map(floats);
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
        ("score statistics", 24 * 4, Score { statistics: &few_statistics, ..right }),
    ] {
        assert_eq!(launch(wrong), Err(short(what, len, len - 1)));
    }
    launch(Score { entries: &no_entries, ..right }).unwrap();
    assert_eq!(driver.log(), [""; 0], "nothing was launched");

    for (head_words, bounds, right) in [(8, 0, right), (16, 1, Score { head_words: 16, ..wide })] {
        launch(right).unwrap();
        let shared = score::shared_bytes(head_words << bounds);
        let tables = format!("{:#x} {:#x}", entries.address(), directories.address());
        let read = format!("{:#x} {:#x}", summaries.address(), right.queries.address());
        let written = format!("{:#x} {:#x}", logits.address(), statistics.address());
        let numbers = format!("3 4 {head_words} {bounds} 512 6 1 0.25 516");
        let line = format!("launch score 12 1 1, 128 1 1, {shared}: {tables} {read} {numbers} {written}");
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
    // Of 6 rows 4 heads: 516 logits in 2 tiles, marks in 17 words, 7 ids, 5 estimates.
    let (logits, statistics, keys) = (floats(24 * 516), floats(24 * 4), words(6 * 129));
    let (forced, masked, few_marks) = (table(6 * 17), table(6 * 17), table(6 * 17 - 1));
    let (ids, selected, estimated_ids, estimated) = (table(6 * 7), table(6), table(6 * 5), table(6));
    let (few_ids, few_estimates, other) = (table(6 * 7 - 1), table(6 * 5 - 1), table(5));
    let (few_logits, few_statistics, few_keys) =
        (floats(24 * 516 - 1), floats(24 * 4 - 1), words(6 * 129 - 1));
    let marks = Marks { forced: &forced, masked: &masked, words: 17 };
    let estimates = Estimates { count: 5, ids: &estimated_ids, estimated: &estimated };
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
        ("select statistics", 24 * 4, SelectPartitions { statistics: Some(&few_statistics), ..right }),
        ("select forced", 6 * 17, with_marks(Marks { forced: &few_marks, ..marks })),
        ("select masked", 6 * 17, with_marks(Marks { masked: &few_marks, ..marks })),
        ("select estimated ids", 30, with_estimates(Estimates { ids: &few_estimates, ..estimates })),
        ("select keys", 6 * 129, SelectPartitions { keys: &few_keys, ..right }),
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
            "launch select 6 1 1, 1024 1 1, {shared}: {entries:#x} {logits:#x} {statistics:#x} 3 4 516 {scores} {marks} {resident} {keys:#x} 7 {ids:#x} {selected:#x} {estimates}"
        )
    };
    let marked = format!("{forced:#x} {masked:#x} 17 5");
    let estimates = format!("{estimated_ids:#x} {estimated:#x}");
    // Softmax, merge, least, top-p: of logarithms the least is one too.
    for (merge, least, scores) in [
        (GroupMerge::Max, Some(0.5), "1 0 -0.69 0.75"),
        (GroupMerge::Max, Some(-3.0), "1 0 -inf 0.75"),
        (GroupMerge::Max, None, "1 0 -inf 0.75"),
        (GroupMerge::Sum, Some(0.5), "1 1 0.50 0.75"),
        (GroupMerge::Mean, Some(0.5), "1 2 0.50 0.75"),
    ] {
        launch(SelectPartitions { merge, least, ..right }).unwrap();
        let expected = line(statistics, scores, &marked, 512, keys.address(), &estimates);
        assert_eq!(driver.log(), [expected]);
    }
    // Without what may be left out: what stands in for it is neither read nor written.
    let bare = SelectPartitions { statistics: None, marks: None, estimates: None, top_p: 1.0, ..right };
    launch(SelectPartitions { resident: 516, keys: &few_keys, ..bare }).unwrap();
    let (unmarked, unestimated) = (format!("{ids:#x} {ids:#x} 0 0"), format!("{ids:#x} {selected:#x}"));
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
        assert_eq!(driver.log(), [format!("launch top_k 3 1 1, 1024 1 1, {shared}: {parameters}")]);
    }
}

#[test]
fn attention_is_checked_and_launched() {
    let driver = driver();
    let (context, stream) = driver.open();
    let kernels = Kernels::load(&context).unwrap();
    let entries = |count| DeviceBuffer::from_slice(&stream, &vec![Entry::default(); count]).unwrap();
    let table = |len| DeviceBuffer::<u32>::zeroed(&stream, len).unwrap();
    let floats = |len| DeviceBuffer::<f32>::zeroed(&stream, len).unwrap();
    let words = |len| DeviceBuffer::zeroed(&stream, len).unwrap();
    let (entries, no_entries, steady, pool) = (entries(2), entries(0), table(9), words(1));
    // 6 rows of 5 pages of 32 tokens, 10 heads of 8 words: 12 units in 4 splits.
    let (pages, page_counts, biases) = (table(6 * 5), table(6), floats(6 * 5 * 32));
    let (queries, outputs, lse) = (words(60 * 8), words(60 * 8), floats(60));
    let partial = attend::partial_words(8) as usize;
    assert_eq!(partial, 8 * (2 * 8 + 1), "of 8 heads 64 f32 and a word of statistics");
    let (partials, arrivals) = (words(12 * 4 * partial), table(12));
    let [few_words, few_partials] = [60 * 8 - 1, 12 * 4 * partial - 1].map(words);
    let [few_biases, few_lse] = [6 * 5 * 32 - 1, 60 - 1].map(floats);
    let few_arrivals = table(11);
    let right = Attend {
        entries: &entries,
        kv_heads: 3,
        group: 10,
        layer: 1,
        head_words: 8,
        pages: &pages,
        page_counts: &page_counts,
        steady: &steady,
        biases: Some(&biases),
        pool: &pool,
        page_tokens: 32,
        queries: &queries,
        scale: 0.25,
        splits: 4,
        partials: &partials,
        arrivals: &arrivals,
        outputs: &outputs,
        lse: &lse,
    };
    driver.log();
    // SAFETY: the stand-in's kernels touch nothing.
    let launch = |attend: Attend<'_>| unsafe { attend.launch(&kernels, &stream) };

    for head_words in [0, 12] {
        let choice = DriverError::Choice { what: "attend head_words", value: head_words, allowed: &[8, 16] };
        assert_eq!(launch(Attend { head_words, ..right }), Err(choice));
    }
    for page_tokens in [0, 12, 128] {
        let allowed = &[8, 16, 32, 64];
        let choice = DriverError::Choice { what: "attend page_tokens", value: page_tokens, allowed };
        assert_eq!(
            choice.to_string(),
            format!("attend page_tokens is {page_tokens}; allowed: 8, 16, 32, 64")
        );
        assert_eq!(launch(Attend { page_tokens, ..right }), Err(choice));
    }
    let most = i32::MAX as u64;
    for (what, value, min, max, wrong) in [
        ("attend kv_heads", 0, 1, ANY, Attend { kv_heads: 0, ..right }),
        ("attend group", 0, 1, 16, Attend { group: 0, ..right }),
        ("attend group", 17, 1, 16, Attend { group: 17, ..right }),
        ("attend splits", 0, 1, 256, Attend { splits: 0, ..right }),
        ("attend splits", 257, 1, 256, Attend { splits: 257, ..right }),
        ("attend units * splits", 1 << 32, 0, most, Attend { kv_heads: 1 << 28, ..right }),
        ("attend words of queries", 80 << 27, 0, ANY, Attend { kv_heads: 1 << 26, ..right }),
    ] {
        assert_eq!(launch(wrong), Err(operand(what, value, min, max)));
    }
    let swapped = Attend { pages: &page_counts, page_counts: &pages, ..right };
    assert_eq!(launch(swapped), Err(length("attend page_counts", 6, 30)));
    for (what, len, wrong) in [
        ("attend biases", 6 * 5 * 32, Attend { biases: Some(&few_biases), ..right }),
        ("attend partials", 12 * 4 * partial, Attend { partials: &few_partials, ..right }),
        ("attend arrivals", 12, Attend { arrivals: &few_arrivals, ..right }),
        ("attend queries", 60 * 8, Attend { queries: &few_words, ..right }),
        ("attend outputs", 60 * 8, Attend { outputs: &few_words, ..right }),
        ("attend lse", 60, Attend { lse: &few_lse, ..right }),
    ] {
        assert_eq!(launch(wrong), Err(short(what, len, len - 1)));
    }
    launch(Attend { entries: &no_entries, ..right }).unwrap();
    assert_eq!(driver.log(), [""; 0], "nothing was launched");

    let [pages, counts, steady, arrivals] =
        [&pages, &page_counts, &steady, &arrivals].map(DeviceBuffer::address);
    let [pool, queries, outputs] = [&pool, &queries, &outputs].map(DeviceBuffer::address);
    let [biases, lse] = [&biases, &lse].map(DeviceBuffer::address);
    let entries = entries.address();
    let line = |start: &str, biases: &str, splits: u32, partials: u64, arrivals: u64| {
        format!(
            "launch {start}: {entries:#x} 3 10 1 {pages:#x} {counts:#x} 5 {steady:#x} {biases} {pool:#x} 32 {queries:#x} 0.25 {splits} {partials:#x} {arrivals:#x} {outputs:#x} {lse:#x}"
        )
    };
    launch(right).unwrap();
    let start = format!("attend_64 48 1 1, 128 1 1, {}", attend::shared_bytes(8));
    let expected = line(&start, &format!("{biases:#x} 1"), 4, partials.address(), arrivals);
    assert_eq!(driver.log(), [expected]);

    // One split needs no scratch, and 5 heads of 128 as much room as 10 of 64.
    let one = Attend { splits: 1, partials: &few_words, arrivals: &few_arrivals, biases: None, ..right };
    launch(Attend { head_words: 16, group: 5, ..one }).unwrap();
    let start = format!("attend_128 6 1 1, 128 1 1, {}", attend::shared_bytes(16));
    let expected = line(&start, &format!("{lse:#x} 0"), 1, few_words.address(), few_arrivals.address());
    assert_eq!(driver.log(), [expected.replace(" 3 10 1 ", " 3 5 1 ")]);
}
