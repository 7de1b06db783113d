use spinkv::backend::cuda::driver::{DeviceBuffer, DriverError};
use spinkv::backend::cuda::kernels::{Attend, Awaited, Kernels};
use spinkv_kernels::abi::{Entry, attend};

use super::{ANY, length, operand, short};
use crate::driver;

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
    let more_counts = table(6);
    let (few_arrivals, uneven) = (table(11), table(6 * 5 + 1));
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
        awaited: None,
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
    for scale in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let positive = DriverError::Positive { what: "attend scale", value: scale.to_string() };
        assert_eq!(launch(Attend { scale, ..right }), Err(positive));
    }
    let multiple = DriverError::Multiple { what: "attend pages", value: 31, of: 6 };
    assert_eq!(launch(Attend { pages: &uneven, ..right }), Err(multiple));
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
            "launch {start}: {entries:#x} 3 10 1 {pages:#x} {counts:#x} 5 {steady:#x} {biases} {pool:#x} 32 {queries:#x} 0.25 {counts:#x} {counts:#x} 0 {splits} {partials:#x} {arrivals:#x} {outputs:#x} {lse:#x}"
        )
    };
    launch(right).unwrap();
    let start = format!("attend_64 48 1 1, 128 1 1, {}", attend::shared_bytes(8));
    let expected = line(&start, &format!("{biases:#x} 1"), 4, partials.address(), arrivals);
    assert_eq!(driver.log(), [expected]);

    // Beside a gather: rows wait for what it counts.
    let awaited = Some(Awaited { copy_counts: &page_counts, arrived: &more_counts });
    launch(Attend { awaited, ..right }).unwrap();
    let expected = line(&start, &format!("{biases:#x} 1"), 4, partials.address(), arrivals);
    let expected = expected.replace(
        &format!("{counts:#x} {counts:#x} 0"),
        &format!("{counts:#x} {:#x} 1", more_counts.address()),
    );
    assert_eq!(driver.log(), [format!("overlapping {expected}")]);
    let short = Some(Awaited { copy_counts: &page_counts, arrived: &few_arrivals });
    let refused = DriverError::Length { what: "attend arrived", expected: 6, found: 11 };
    assert_eq!(launch(Attend { awaited: short, ..right }), Err(refused));

    // One split needs no scratch, and 5 heads of 128 as much room as 10 of 64.
    let one = Attend { splits: 1, partials: &few_words, arrivals: &few_arrivals, biases: None, ..right };
    launch(Attend { head_words: 16, group: 5, ..one }).unwrap();
    let start = format!("attend_128 6 1 1, 128 1 1, {}", attend::shared_bytes(16));
    let expected = line(&start, &format!("{lse:#x} 0"), 1, few_words.address(), few_arrivals.address());
    assert_eq!(driver.log(), [expected.replace(" 3 10 1 ", " 3 5 1 ")]);
}
