use spinkv::backend::cuda::driver::DeviceBuffer;
use spinkv::backend::cuda::kernels::{IndexOperator, IndexPrompts, IndexStep, Kernels, SummaryTable};
use spinkv_kernels::abi::{Entry, index_prompts};

use super::{ANY, length, operand, short};
use crate::driver;

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
    // A segment of each operator: 6 rows of 8 partitions of 4 words, once, twice.
    let [mean, bounds, one_short] = [192, 2 * 192, 191].map(words);
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

    let tokens = launch(IndexPrompts { first_token: &other, ..right });
    assert_eq!(tokens, Err(length("index first_token", 2, 1)));
    let chunks = launch(IndexPrompts { first_chunk: &first_token, ..right });
    assert_eq!(chunks, Err(length("index first_chunk", 3, 2)));
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
    let bounds_in_mean = SummaryTable { operator: IndexOperator::Bounds, ..table };
    assert_eq!(with(bounds_in_mean), segment(2 * 192, 192));
    let max = u64::from(index_prompts::MAX_WORDS);
    let many = launch(IndexPrompts { chunks: (max / 8) as u32 + 1, ..right });
    assert_eq!(many, Err(operand("index chunks * kv_heads * head_words", max / 8 * 8 + 8, 0, max)));
    assert_eq!(driver.log(), [""; 0], "nothing was launched");

    for (operator, name, summaries) in
        [(IndexOperator::Mean, "chunk_mean", &mean), (IndexOperator::Bounds, "chunk_bounds", &bounds)]
    {
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
    ] {
        launch(IndexStep { table: SummaryTable { operator, summaries, ..table }, ..right }).unwrap();
        let [steady, directories] = [&steady, &directories].map(DeviceBuffer::address);
        let [pool, summaries] = [&pool, summaries].map(DeviceBuffer::address);
        let entries = entries.address();
        let parameters =
            format!("{entries:#x} {steady:#x} {pool:#x} {directories:#x} 4 6 2 4 16 16 8 {summaries:#x}");
        assert_eq!(driver.log(), [format!("overlapping launch {name} 2 1 1, 128 1 1, 0: {parameters}")]);
    }
}
