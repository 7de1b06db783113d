use spinkv::backend::cuda::driver::{DeviceBuffer, DriverError};
use spinkv::backend::cuda::kernels::{Kernels, Prefill, PrefillVariant};
use spinkv_kernels::abi::{prefill, prefill_wgmma};

use super::{ANY, length, operand, short};
use crate::driver;

#[test]
fn attention_of_prompts_is_checked_and_launched() {
    let driver = driver();
    let (context, stream) = driver.open();
    let kernels = Kernels::load(&context).unwrap();
    let table = |len| DeviceBuffer::<u32>::zeroed(&stream, len).unwrap();
    let floats = |len| DeviceBuffer::<f32>::zeroed(&stream, len).unwrap();
    let words = |len| DeviceBuffer::zeroed(&stream, len).unwrap();
    // 2 requests of 5 and 4 query tokens and 5 and 7 keys: 3 KV heads of 8 words, 6 query heads.
    let (first_query, first_key, first_tile) = (table(3), table(3), table(3));
    let (queries, outputs, lse) = (words(9 * 6 * 8), words(9 * 6 * 8), floats(9 * 6));
    let (keys, values) = (words(12 * 3 * 8), words(12 * 3 * 8));
    let [few_queries, few_keys] = [9 * 6 * 8 - 1, 12 * 3 * 8 - 1].map(words);
    let (few_lse, no_request, three_requests) = (floats(9 * 6 - 1), table(1), table(4));
    let right = Prefill {
        queries: &queries,
        keys: &keys,
        values: &values,
        first_query: &first_query,
        first_key: &first_key,
        first_tile: &first_tile,
        query_tokens: 9,
        key_tokens: 12,
        tiles: 2,
        kv_heads: 3,
        group: 2,
        head_words: 8,
        scale: 0.25,
        outputs: &outputs,
        lse: &lse,
    };
    driver.log();
    // SAFETY: the stand-in's kernels touch nothing.
    let launch = |prefill: Prefill<'_>| unsafe { prefill.launch(&kernels, &stream) };

    for head_words in [0, 12] {
        let choice = DriverError::Choice { what: "prefill head_words", value: head_words, allowed: &[8, 16] };
        assert_eq!(launch(Prefill { head_words, ..right }), Err(choice));
    }
    for scale in [0.0, -0.25, f32::INFINITY, f32::NAN] {
        let positive = DriverError::Positive { what: "prefill scale", value: scale.to_string() };
        let message = format!("prefill scale is {scale}; it must be above 0 and finite");
        assert_eq!(positive.to_string(), message);
        assert_eq!(launch(Prefill { scale, ..right }), Err(positive));
    }
    let (most, all) = (i32::MAX as u64, u32::MAX);
    for (what, value, min, max, wrong) in [
        ("prefill kv_heads", 0, 1, 65535, Prefill { kv_heads: 0, ..right }),
        ("prefill kv_heads", 65536, 1, 65535, Prefill { kv_heads: 65536, ..right }),
        ("prefill group", 0, 1, 16, Prefill { group: 0, ..right }),
        ("prefill group", 17, 1, 16, Prefill { group: 17, ..right }),
        ("prefill requests + 1", 1, 2, ANY, Prefill { first_tile: &no_request, ..right }),
        ("prefill tiles * heads", 6 * ANY, 0, most, Prefill { tiles: all, ..right }),
        ("prefill words of queries", 48 * ANY, 0, ANY, Prefill { query_tokens: all, ..right }),
        ("prefill words of keys", 24 * ANY, 0, ANY, Prefill { key_tokens: all, ..right }),
    ] {
        assert_eq!(launch(wrong), Err(operand(what, value, min, max)));
    }
    for (what, wrong) in [
        ("prefill first_query", Prefill { first_query: &three_requests, ..right }),
        ("prefill first_key", Prefill { first_key: &three_requests, ..right }),
    ] {
        assert_eq!(launch(wrong), Err(length(what, 3, 4)));
    }
    for (what, len, wrong) in [
        ("prefill queries", 9 * 6 * 8, Prefill { queries: &few_queries, ..right }),
        ("prefill keys", 12 * 3 * 8, Prefill { keys: &few_keys, ..right }),
        ("prefill values", 12 * 3 * 8, Prefill { values: &few_keys, ..right }),
        ("prefill outputs", 9 * 6 * 8, Prefill { outputs: &few_queries, ..right }),
        ("prefill lse", 9 * 6, Prefill { lse: &few_lse, ..right }),
    ] {
        assert_eq!(launch(wrong), Err(short(what, len, len - 1)));
    }
    launch(Prefill { tiles: 0, ..right }).unwrap();
    assert_eq!(driver.log(), [""; 0], "nothing was launched");

    let [queries, keys, values, outputs] = [&queries, &keys, &values, &outputs].map(DeviceBuffer::address);
    let [first_query, first_key, first_tile] =
        [&first_query, &first_key, &first_tile].map(DeviceBuffer::address);
    let lse = lse.address();
    let line = |start: &str, heads: &str| {
        format!(
            "launch {start}: {queries:#x} {keys:#x} {values:#x} {first_query:#x} {first_key:#x} {first_tile:#x} 2 {heads} 0.25 {outputs:#x} {lse:#x}"
        )
    };
    // 3 heads of 128 have as much room as 6 of 64.
    let wide = Prefill { head_words: 16, group: 1, key_tokens: 6, ..right };
    let narrow_line = |kernel: &str, block: u32, shared: u32| {
        line(&format!("{kernel} 12 1 1, {block} 1 1, {shared}"), "3 2")
    };
    let wide_line = |kernel: &str, block: u32, shared: u32| {
        line(&format!("{kernel} 6 1 1, {block} 1 1, {shared}"), "3 1")
    };
    // The stand-in is a Hopper: products of a warpgroup are its choice.
    assert_eq!(Prefill::variant(&kernels), PrefillVariant::Wgmma);
    launch(right).unwrap();
    assert_eq!(driver.log(), [narrow_line("prefill_wgmma_64", 256, prefill_wgmma::shared_bytes(8))]);
    launch(wide).unwrap();
    assert_eq!(driver.log(), [wide_line("prefill_wgmma_128", 256, prefill_wgmma::shared_bytes(16))]);
    // SAFETY: as above.
    let launch_mma =
        |prefill: Prefill<'_>| unsafe { prefill.launch_as(PrefillVariant::Mma, &kernels, &stream) };
    launch_mma(right).unwrap();
    assert_eq!(driver.log(), [narrow_line("prefill_64", 128, prefill::shared_bytes(8))]);
    launch_mma(wide).unwrap();
    assert_eq!(driver.log(), [wide_line("prefill_128", 128, prefill::shared_bytes(16))]);
}
