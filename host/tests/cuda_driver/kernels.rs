//! What the kernels' launch types refuse, and what a launch hands over. In each, the operands are right but for one.

use spinkv::backend::cuda::driver::{DeviceBuffer, DriverError, PinnedArena};
use spinkv::backend::cuda::kernels::{ChunkMean, Gather, Kernels};
use spinkv_kernels::abi::{PageCopy, WORD_BYTES, chunk_mean, gather};

use super::driver;

const ANY: u64 = u32::MAX as u64;

fn operand(what: &'static str, value: u64, min: u64, max: u64) -> DriverError {
    DriverError::Operand { what, value, min, max }
}

fn short(what: &'static str, len: usize, limit: usize) -> DriverError {
    DriverError::OutOfRange { what, start: 0, len, limit }
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
        count: &count,
        host_pages: &host_pages,
        device_pages: &device_pages,
        page_words: 16,
        blocks: 24,
    };
    driver.log();
    // SAFETY: the stand-in's kernels touch nothing.
    let launch = |gather: Gather<'_>| unsafe { gather.launch(&kernels, &stream) };

    let length = DriverError::Length { what: "gather count", expected: 1, found: 2 };
    assert_eq!(launch(Gather { count: &counts, ..right }), Err(length));
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
        let capacity = list.len();
        let Gather { blocks, page_words, .. } = gather;
        format!(
            "launch gather {blocks} 1 1, 512 1 1, 0: {copies:#x} {count:#x} {capacity} {host:#x} {pool:#x} {page_words}"
        )
    };
    for accepted in [right, Gather { blocks: MAX_BLOCKS, page_words: 64, ..right }] {
        launch(accepted).unwrap();
        assert_eq!(driver.log(), [line(accepted)]);
    }
    launch(Gather { copies: &none, ..right }).unwrap();
    assert_eq!(driver.log().len(), 1, "an empty list is a list");
}

#[test]
fn chunk_means_are_checked_and_launched() {
    let driver = driver();
    let (context, stream) = driver.open();
    let kernels = Kernels::load(&context).unwrap();
    let table = |len| DeviceBuffer::<u32>::zeroed(&stream, len).unwrap();
    let words = |len| DeviceBuffer::zeroed(&stream, len).unwrap();
    let (first_token, first_chunk, empty) = (table(2), table(3), table(0));
    let (keys, summaries, one_short) = (words(64), words(3 * 2 * 4), words(3 * 2 * 4 - 1));
    let right = ChunkMean {
        keys: &keys,
        first_token: &first_token,
        first_chunk: &first_chunk,
        chunks: 3,
        kv_heads: 2,
        head_words: 4,
        chunk_tokens: 16,
        summaries: &summaries,
    };
    driver.log();
    // SAFETY: the stand-in's kernels touch nothing.
    let launch = |means: ChunkMean<'_>| unsafe { means.launch(&kernels, &stream) };

    let length = DriverError::Length { what: "chunk_mean first_chunk", expected: 3, found: 2 };
    assert_eq!(launch(ChunkMean { first_chunk: &first_token, ..right }), Err(length));
    let one = table(1);
    driver.log();
    let no_requests = launch(ChunkMean { first_token: &empty, first_chunk: &one, ..right });
    assert_eq!(no_requests, Err(operand("chunk_mean requests", 0, 1, ANY)));
    for (what, empty) in [
        ("chunk_mean kv_heads", ChunkMean { kv_heads: 0, ..right }),
        ("chunk_mean head_words", ChunkMean { head_words: 0, ..right }),
        ("chunk_mean chunk_tokens", ChunkMean { chunk_tokens: 0, ..right }),
    ] {
        assert_eq!(launch(empty), Err(operand(what, 0, 1, ANY)));
    }
    let max = u64::from(chunk_mean::MAX_SUMMARIES);
    let many = |value| Err(operand("chunk_mean chunks * kv_heads", value, 0, max));
    assert_eq!(launch(ChunkMean { chunks: max as u32 / 2 + 1, ..right }), many(max + 1));
    let all = ChunkMean { chunks: u32::MAX, kv_heads: u32::MAX, head_words: u32::MAX, ..right };
    assert_eq!(launch(all), many(ANY * ANY));
    let wide = ChunkMean { chunks: 1, kv_heads: 1, head_words: u32::MAX, ..right };
    let max = u64::from(chunk_mean::MAX_WORDS);
    assert_eq!(launch(wide), Err(operand("chunk_mean chunks * kv_heads * head_words", ANY, 0, max)));
    let one_short = launch(ChunkMean { summaries: &one_short, ..right });
    assert_eq!(one_short, Err(short("chunk_mean summaries", 24, 23)));
    assert_eq!(driver.log(), [""; 0], "nothing was launched");

    launch(right).unwrap();
    let [token, chunk] = [&first_token, &first_chunk].map(DeviceBuffer::address);
    let [keys, summaries] = [&keys, &summaries].map(DeviceBuffer::address);
    let parameters = format!("{keys:#x} {token:#x} {chunk:#x} 2 2 4 16 {summaries:#x}");
    assert_eq!(driver.log(), [format!("launch chunk_mean 1 1 1, 256 1 1, 0: {parameters}")]);
    launch(ChunkMean { chunks: 0, ..right }).unwrap();
    assert_eq!(driver.log(), [""; 0], "no chunk, no launch");
}
