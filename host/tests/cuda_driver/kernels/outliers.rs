use spinkv::backend::cuda::driver::{DeviceBuffer, DriverError};
use spinkv::backend::cuda::kernels::{ChunkSpread, Kernels, MarkPartitions};
use spinkv_kernels::abi::{Entry, SPREAD_WORDS, index_prompts};

use super::{ANY, length, operand, short};
use crate::driver;

#[test]
fn a_spread_is_checked_and_launched() {
    let driver = driver();
    let (context, stream) = driver.open();
    let kernels = Kernels::load(&context).unwrap();
    let entries = |count| DeviceBuffer::from_slice(&stream, &vec![Entry::default(); count]).unwrap();
    let table = |len| DeviceBuffer::<u32>::zeroed(&stream, len).unwrap();
    let (entries, no_entries, first_token, first_chunk, none) =
        (entries(2), entries(0), table(2), table(3), table(0));
    let keys = DeviceBuffer::zeroed(&stream, 64).unwrap();
    // Of 2 requests 3 heads, 40 numbers each.
    let [spreads, few] = [240, 239].map(|len| DeviceBuffer::<f32>::zeroed(&stream, len).unwrap());
    let right = ChunkSpread {
        entries: &entries,
        keys: &keys,
        first_token: &first_token,
        first_chunk: &first_chunk,
        chunks: 33,
        kv_heads: 3,
        head_words: 8,
        chunk_tokens: 16,
        stride: 40,
        spreads: &spreads,
    };
    driver.log();
    // SAFETY: the stand-in's kernels touch nothing.
    let launch = |spread: ChunkSpread<'_>| unsafe { spread.launch(&kernels, &stream) };

    let no_request = ChunkSpread { entries: &no_entries, first_token: &none, ..right };
    let max = u64::from(index_prompts::MAX_WORDS);
    for (what, value, min, max, wrong) in [
        ("spread requests", 0, 1, ANY, no_request),
        ("spread kv_heads", 0, 1, ANY, ChunkSpread { kv_heads: 0, ..right }),
        ("spread chunk_tokens", 0, 1, ANY, ChunkSpread { chunk_tokens: 0, ..right }),
        (
            "spread chunks * kv_heads * head_words",
            max / 24 * 24 + 24,
            0,
            max,
            ChunkSpread { chunks: (max / 24) as u32 + 1, ..right },
        ),
    ] {
        assert_eq!(launch(wrong), Err(operand(what, value, min, max)));
    }
    for head_words in [0, 3, 12, 33, 64] {
        let refused = launch(ChunkSpread { head_words, ..right });
        let (what, value, allowed) = ("spread head_words", head_words, &SPREAD_WORDS[..]);
        assert_eq!(refused, Err(DriverError::Choice { what, value, allowed }));
    }
    let tokens = launch(ChunkSpread { first_token: &first_chunk, ..right });
    assert_eq!(tokens, Err(length("spread first_token", 2, 3)));
    let chunks = launch(ChunkSpread { first_chunk: &first_token, ..right });
    assert_eq!(chunks, Err(length("spread first_chunk", 3, 2)));
    let room = launch(ChunkSpread { spreads: &few, ..right });
    assert_eq!(room, Err(short("spread spreads", 240, 239)));
    launch(ChunkSpread { chunks: 0, ..right }).unwrap();
    assert_eq!(driver.log(), [""; 0], "nothing was launched");

    launch(right).unwrap();
    let [token, chunk] = [&first_token, &first_chunk].map(DeviceBuffer::address);
    let (keys, entries, spreads) = (keys.address(), entries.address(), spreads.address());
    let parameters = format!("{keys:#x} {entries:#x} {token:#x} {chunk:#x} 2 3 8 16 40 {spreads:#x}");
    // 33 x 3 x 8 words.
    assert_eq!(driver.log(), [format!("launch chunk_spread 4 1 1, 256 1 1, 0: {parameters}")]);
}

#[test]
fn marks_are_checked_and_launched() {
    let driver = driver();
    let (context, stream) = driver.open();
    let kernels = Kernels::load(&context).unwrap();
    let entries = |count| DeviceBuffer::from_slice(&stream, &vec![Entry::default(); count]).unwrap();
    let table = |len| DeviceBuffer::<u32>::zeroed(&stream, len).unwrap();
    // Of 2 requests 3 heads, 5 ids each; marks of layer 1 in 7 words.
    let (entries, no_entries, ids, counts, marks) = (entries(2), entries(0), table(30), table(6), table(42));
    let (few_ids, few_counts, few_marks, none) = (table(29), table(5), table(41), table(0));
    let right = MarkPartitions {
        entries: &entries,
        ids: &ids,
        counts: &counts,
        capacity: 5,
        first_row: 3,
        kv_heads: 3,
        words: 7,
        marks: &marks,
    };
    driver.log();
    // SAFETY: the stand-in's kernels touch nothing.
    let launch = |marks: MarkPartitions<'_>| unsafe { marks.launch(&kernels, &stream) };
    let many = MarkPartitions { kv_heads: 1 << 30, ..right };
    for (what, value, min, max, wrong) in [
        ("mark kv_heads", 0, 1, ANY, MarkPartitions { kv_heads: 0, ..right }),
        ("mark words", 0, 1, ANY, MarkPartitions { words: 0, ..right }),
        ("mark batch * kv_heads", 1 << 31, 0, i32::MAX as u64, many),
    ] {
        assert_eq!(launch(wrong), Err(operand(what, value, min, max)));
    }
    let found = launch(MarkPartitions { counts: &few_counts, ..right });
    assert_eq!(found, Err(length("mark counts", 6, 5)));
    assert_eq!(launch(MarkPartitions { ids: &few_ids, ..right }), Err(length("mark ids", 30, 29)));
    assert_eq!(launch(MarkPartitions { marks: &few_marks, ..right }), Err(short("mark marks", 42, 41)));
    launch(MarkPartitions { entries: &no_entries, ids: &none, counts: &none, ..right }).unwrap();
    assert_eq!(driver.log(), [""; 0], "nothing was launched");

    launch(right).unwrap();
    let [ids, counts, marks] = [&ids, &counts, &marks].map(DeviceBuffer::address);
    let parameters = format!("{:#x} {ids:#x} {counts:#x} 5 3 3 7 {marks:#x}", entries.address());
    assert_eq!(driver.log(), [format!("launch mark 6 1 1, 128 1 1, 0: {parameters}")]);
}
