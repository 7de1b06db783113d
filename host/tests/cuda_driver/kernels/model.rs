use spinkv::backend::cuda::driver::{DeviceBuffer, DriverError};
use spinkv::backend::cuda::kernels::{
    Argmax, Embed, HeadNorms, Kernels, Positions, RmsNorm, Rotate, Sample, Swiglu,
};
use spinkv_kernels::abi::Entry;
use spinkv_kernels::abi::model::sample::SampleParams;

use super::{ANY, length, multiple, operand, short};
use crate::driver;

/// The widest row of the kernels.
const WIDEST: u64 = 1 << 24;
const BLOCKS: u64 = i32::MAX as u64;

fn no_word(what: &'static str, value: u64) -> DriverError {
    DriverError::Multiple { what, value, of: 8 }
}

fn not_positive(what: &'static str, value: f32) -> DriverError {
    DriverError::Positive { what, value: value.to_string() }
}

#[test]
fn embed_is_checked_and_launched() {
    let driver = driver();
    let (context, stream) = driver.open();
    let kernels = Kernels::load(&context).unwrap();
    let (ids, few_ids) =
        (DeviceBuffer::zeroed(&stream, 3).unwrap(), DeviceBuffer::zeroed(&stream, 2).unwrap());
    // 5 rows of 1032 elements, whose 258 quads take two blocks.
    let words = |len| DeviceBuffer::zeroed(&stream, len).unwrap();
    let (embedding, uneven) = (words(5 * 129), words(5 * 129 + 1));
    let floats = |len| DeviceBuffer::<f32>::zeroed(&stream, len).unwrap();
    let (residual, few) = (floats(3 * 1032), floats(3 * 1032 - 1));
    let right = Embed { ids: &ids, tokens: 3, embedding: &embedding, hidden: 1032, residual: &residual };
    driver.log();
    // SAFETY: the stand-in's kernels touch nothing.
    let launch = |embed: Embed<'_>| unsafe { embed.launch(&kernels, &stream) };

    assert_eq!(launch(Embed { hidden: 0, ..right }), Err(operand("embed hidden", 0, 1, WIDEST)));
    assert_eq!(launch(Embed { hidden: 1028, ..right }), Err(no_word("embed hidden", 1028)));
    let uneven = Embed { embedding: &uneven, ..right };
    assert_eq!(launch(uneven), Err(length("embed embedding", 5 * 129, 5 * 129 + 1)));
    assert_eq!(launch(Embed { ids: &few_ids, ..right }), Err(short("embed ids", 3, 2)));
    let refused = short("embed residual", 3 * 1032, 3 * 1032 - 1);
    assert_eq!(launch(Embed { residual: &few, ..right }), Err(refused));
    launch(Embed { tokens: 0, ..right }).unwrap();
    assert_eq!(driver.log(), [""; 0], "nothing was launched");

    launch(right).unwrap();
    let [ids, embedding, residual] = [ids.address(), embedding.address(), residual.address()];
    let expected = format!("launch embed 6 1 1, 256 1 1, 0: {ids:#x} {embedding:#x} 5 1032 {residual:#x}");
    assert_eq!(driver.log(), [expected]);
}

#[test]
fn rms_norm_is_checked_and_launched() {
    let driver = driver();
    let (context, stream) = driver.open();
    let kernels = Kernels::load(&context).unwrap();
    let floats = |len| DeviceBuffer::<f32>::zeroed(&stream, len).unwrap();
    let words = |len| DeviceBuffer::zeroed(&stream, len).unwrap();
    let (residual, weight, no_weight, odd_weight) = (floats(5 * 64), floats(64), floats(0), floats(60));
    let (normed, few) = (words(3 * 8), words(3 * 8 - 1));
    let right = RmsNorm {
        residual: &residual,
        weight: &weight,
        first_token: 2,
        tokens: 3,
        eps: 0.5,
        normed: &normed,
    };
    driver.log();
    // SAFETY: the stand-in's kernels touch nothing.
    let launch = |norm: RmsNorm<'_>| unsafe { norm.launch(&kernels, &stream) };

    let nothing = RmsNorm { weight: &no_weight, ..right };
    assert_eq!(launch(nothing), Err(operand("rms_norm weight", 0, 1, WIDEST)));
    assert_eq!(launch(RmsNorm { weight: &odd_weight, ..right }), Err(no_word("rms_norm weight", 60)));
    for eps in [0.0, -1.0, f32::NAN] {
        assert_eq!(launch(RmsNorm { eps, ..right }), Err(not_positive("rms_norm eps", eps)));
    }
    let refused = DriverError::OutOfRange { what: "rms_norm residual", start: 192, len: 192, limit: 320 };
    assert_eq!(launch(RmsNorm { first_token: 3, ..right }), Err(refused));
    assert_eq!(launch(RmsNorm { normed: &few, ..right }), Err(short("rms_norm normed", 24, 23)));
    launch(RmsNorm { tokens: 0, ..right }).unwrap();
    assert_eq!(driver.log(), [""; 0], "nothing was launched");

    launch(right).unwrap();
    let [residual, weight, normed] = [residual.address(), weight.address(), normed.address()];
    let expected =
        format!("launch rms_norm 3 1 1, 512 1 1, 128: {residual:#x} {weight:#x} 2 64 0.50 {normed:#x}");
    assert_eq!(driver.log(), [expected]);
}

#[test]
fn rotate_is_checked_and_launched() {
    let driver = driver();
    let (context, stream) = driver.open();
    let kernels = Kernels::load(&context).unwrap();
    let floats = |len| DeviceBuffer::<f32>::zeroed(&stream, len).unwrap();
    let words = |len| DeviceBuffer::zeroed(&stream, len).unwrap();
    let entries = |count| DeviceBuffer::from_slice(&stream, &vec![Entry::default(); count]).unwrap();
    let (entries, few_entries) = (entries(3), entries(2));
    // 12 query heads, 2 keys and 2 values of 64 elements: 16 heads in two groups; keys and values go to rows 4 to 6.
    let (projected, few_projected) = (words(3 * 16 * 8), words(3 * 16 * 8 - 1));
    let (queries, few_queries) = (words(3 * 12 * 8), words(3 * 12 * 8 - 1));
    let (keys, values, few_rows) = (words(7 * 2 * 8), words(7 * 2 * 8), words(7 * 2 * 8 - 1));
    let (frequencies, of_queries, of_keys, few) = (floats(32), floats(64), floats(64), floats(31));
    let norms = HeadNorms { queries: &of_queries, keys: &of_keys, eps: 0.25 };
    let right = Rotate {
        projected: &projected,
        tokens: 3,
        query_heads: 12,
        kv_heads: 2,
        head_words: 8,
        positions: Positions::Entries(&entries),
        frequencies: &frequencies,
        factor: 1.5,
        norms: Some(norms),
        queries: &queries,
        first_token: 4,
        keys: &keys,
        values: &values,
    };
    driver.log();
    // SAFETY: the stand-in's kernels touch nothing.
    let launch = |rotate: Rotate<'_>| unsafe { rotate.launch(&kernels, &stream) };

    let choice = DriverError::Choice { what: "rotate head_words", value: 12, allowed: &[8, 16] };
    assert_eq!(launch(Rotate { head_words: 12, ..right }), Err(choice));
    for factor in [0.0, f32::INFINITY] {
        assert_eq!(launch(Rotate { factor, ..right }), Err(not_positive("rotate factor", factor)));
    }
    let no_eps = Some(HeadNorms { eps: 0.0, ..norms });
    assert_eq!(launch(Rotate { norms: no_eps, ..right }), Err(not_positive("rotate norms eps", 0.0)));
    let wide = Rotate { query_heads: 1 << 28, ..right };
    let late = Rotate { positions: Positions::From(u32::MAX - 2), ..right };
    for (what, value, min, max, wrong) in [
        ("rotate query_heads", 0, 1, ANY, Rotate { query_heads: 0, ..right }),
        ("rotate kv_heads", 0, 1, ANY, Rotate { kv_heads: 0, ..right }),
        ("rotate words of a token", (1 << 31) + 32, 0, ANY / 4, wide),
        ("rotate positions", 1 << 32, 0, ANY, Rotate { tokens: 3, ..late }),
    ] {
        assert_eq!(launch(wrong), Err(operand(what, value, min, max)));
    }
    for (what, len, wrong) in [
        ("rotate projected", 3 * 16 * 8, Rotate { projected: &few_projected, ..right }),
        ("rotate queries", 3 * 12 * 8, Rotate { queries: &few_queries, ..right }),
        ("rotate keys", 7 * 2 * 8, Rotate { keys: &few_rows, ..right }),
        ("rotate values", 7 * 2 * 8, Rotate { values: &few_rows, ..right }),
    ] {
        assert_eq!(launch(wrong), Err(short(what, len, len - 1)));
    }
    let [queries_short, keys_short] =
        [HeadNorms { queries: &few, ..norms }, HeadNorms { keys: &few, ..norms }].map(Some);
    for (what, expected, found, wrong) in [
        ("rotate frequencies", 32, 31, Rotate { frequencies: &few, ..right }),
        ("rotate norms queries", 64, 31, Rotate { norms: queries_short, ..right }),
        ("rotate norms keys", 64, 31, Rotate { norms: keys_short, ..right }),
        ("rotate entries", 3, 2, Rotate { positions: Positions::Entries(&few_entries), ..right }),
    ] {
        assert_eq!(launch(wrong), Err(length(what, expected, found)));
    }
    launch(Rotate { tokens: 0, positions: Positions::From(7), ..right }).unwrap();
    assert_eq!(driver.log(), [""; 0], "nothing was launched");

    let [projected, entries] = [projected.address(), entries.address()];
    let [frequencies, of_queries, of_keys] = [&frequencies, &of_queries, &of_keys].map(DeviceBuffer::address);
    let [queries, keys, values] = [&queries, &keys, &values].map(DeviceBuffer::address);
    let start = format!("launch rotate 2 1 1, 128 1 1, 0: {projected:#x} 3 12 2 8");
    let end = format!("2 {queries:#x} 4 {keys:#x} {values:#x}");
    launch(right).unwrap();
    let expected =
        format!("{start} {entries:#x} 1 0 {frequencies:#x} 1.50 {of_queries:#x} {of_keys:#x} 1 0.25 {end}");
    assert_eq!(driver.log(), [expected]);
    // Neither entries nor norms: others stand in for them.
    launch(Rotate { positions: Positions::From(7), norms: None, ..right }).unwrap();
    let expected = format!(
        "{start} {projected:#x} 0 7 {frequencies:#x} 1.50 {frequencies:#x} {frequencies:#x} 0 1.00 {end}"
    );
    assert_eq!(driver.log(), [expected]);
}

#[test]
fn swiglu_is_checked_and_launched() {
    let driver = driver();
    let (context, stream) = driver.open();
    let kernels = Kernels::load(&context).unwrap();
    let words = |len| DeviceBuffer::zeroed(&stream, len).unwrap();
    // 257 words of a row take two blocks.
    let (gate_up, activated) = (words(3 * 2 * 257), words(3 * 257));
    let (few_gates, few) = (words(3 * 2 * 257 - 1), words(3 * 257 - 1));
    let right = Swiglu { gate_up: &gate_up, tokens: 3, width: 2056, activated: &activated };
    driver.log();
    // SAFETY: the stand-in's kernels touch nothing.
    let launch = |swiglu: Swiglu<'_>| unsafe { swiglu.launch(&kernels, &stream) };

    assert_eq!(launch(Swiglu { width: 0, ..right }), Err(operand("swiglu width", 0, 1, WIDEST)));
    assert_eq!(launch(Swiglu { width: 2052, ..right }), Err(no_word("swiglu width", 2052)));
    let refused = short("swiglu gate_up", 3 * 2 * 257, 3 * 2 * 257 - 1);
    assert_eq!(launch(Swiglu { gate_up: &few_gates, ..right }), Err(refused));
    let refused = short("swiglu activated", 3 * 257, 3 * 257 - 1);
    assert_eq!(launch(Swiglu { activated: &few, ..right }), Err(refused));
    launch(Swiglu { tokens: 0, ..right }).unwrap();
    assert_eq!(driver.log(), [""; 0], "nothing was launched");

    launch(right).unwrap();
    let [gate_up, activated] = [gate_up.address(), activated.address()];
    let expected = format!("launch swiglu 6 1 1, 256 1 1, 0: {gate_up:#x} 257 {activated:#x}");
    assert_eq!(driver.log(), [expected]);
}

#[test]
fn argmax_is_checked_and_launched() {
    let driver = driver();
    let (context, stream) = driver.open();
    let kernels = Kernels::load(&context).unwrap();
    let table = |len| DeviceBuffer::<u32>::zeroed(&stream, len).unwrap();
    let floats = |len| DeviceBuffer::<f32>::zeroed(&stream, len).unwrap();
    let keys = |len| DeviceBuffer::<u64>::zeroed(&stream, len).unwrap();
    // 8193 logits of a row take two blocks.
    let (logits, few_logits) = (floats(3 * 8196), floats(3 * 8196 - 1));
    let (greatest, arrivals, ids) = (keys(3), table(3), table(3));
    let (few_greatest, few) = (keys(2), table(2));
    let right = Argmax {
        logits: &logits,
        batch: 3,
        vocab: 8193,
        stride: 8196,
        greatest: &greatest,
        arrivals: &arrivals,
        ids: &ids,
    };
    driver.log();
    // SAFETY: the stand-in's kernels touch nothing.
    let launch = |argmax: Argmax<'_>| unsafe { argmax.launch(&kernels, &stream) };

    let uneven = Argmax { stride: 8198, ..right };
    assert_eq!(launch(uneven), Err(multiple("argmax stride", 8198)));
    for (what, value, min, max, wrong) in [
        ("argmax stride", 0, 1, WIDEST, Argmax { stride: 0, ..right }),
        ("argmax vocab", 0, 1, 8196, Argmax { vocab: 0, ..right }),
        ("argmax vocab", 8197, 1, 8196, Argmax { vocab: 8197, ..right }),
        ("argmax blocks", 1 << 31, 0, BLOCKS, Argmax { batch: 1 << 30, ..right }),
    ] {
        assert_eq!(launch(wrong), Err(operand(what, value, min, max)));
    }
    for (what, len, wrong) in [
        ("argmax logits", 3 * 8196, Argmax { logits: &few_logits, ..right }),
        ("argmax greatest", 3, Argmax { greatest: &few_greatest, ..right }),
        ("argmax arrivals", 3, Argmax { arrivals: &few, ..right }),
        ("argmax ids", 3, Argmax { ids: &few, ..right }),
    ] {
        assert_eq!(launch(wrong), Err(short(what, len, len - 1)));
    }
    launch(Argmax { batch: 0, ..right }).unwrap();
    assert_eq!(driver.log(), [""; 0], "nothing was launched");

    launch(right).unwrap();
    let [logits, greatest] = [logits.address(), greatest.address()];
    let [arrivals, ids] = [arrivals.address(), ids.address()];
    let expected = format!(
        "launch argmax 6 1 1, 256 1 1, 128: {logits:#x} 8193 8196 {greatest:#x} {arrivals:#x} {ids:#x}"
    );
    assert_eq!(driver.log(), [expected]);
}

#[test]
fn sample_is_checked_and_launched() {
    let driver = driver();
    let (context, stream) = driver.open();
    let kernels = Kernels::load(&context).unwrap();
    let table = |len| DeviceBuffer::<u32>::zeroed(&stream, len).unwrap();
    let floats = |len| DeviceBuffer::<f32>::zeroed(&stream, len).unwrap();
    let params = |len| DeviceBuffer::<SampleParams>::zeroed(&stream, len).unwrap();
    let (logits, few_logits) = (floats(3 * 12), floats(3 * 12 - 1));
    let (all_params, few_params, ids, few_ids) = (params(3), params(2), table(3), table(2));
    let right = Sample { logits: &logits, batch: 3, vocab: 10, stride: 12, params: &all_params, ids: &ids };
    driver.log();
    // SAFETY: the stand-in's kernels touch nothing.
    let launch = |sample: Sample<'_>| unsafe { sample.launch(&kernels, &stream) };

    assert_eq!(launch(Sample { stride: 14, ..right }), Err(multiple("sample stride", 14)));
    for (what, value, min, max, wrong) in [
        ("sample stride", 0, 1, WIDEST, Sample { stride: 0, ..right }),
        ("sample vocab", 0, 1, 12, Sample { vocab: 0, ..right }),
        ("sample vocab", 13, 1, 12, Sample { vocab: 13, ..right }),
        ("sample batch", 1 << 31, 0, BLOCKS, Sample { batch: 1 << 31, ..right }),
    ] {
        assert_eq!(launch(wrong), Err(operand(what, value, min, max)));
    }
    for (what, len, wrong) in [
        ("sample logits", 3 * 12, Sample { logits: &few_logits, ..right }),
        ("sample params", 3, Sample { params: &few_params, ..right }),
        ("sample ids", 3, Sample { ids: &few_ids, ..right }),
    ] {
        assert_eq!(launch(wrong), Err(short(what, len, len - 1)));
    }
    launch(Sample { batch: 0, ..right }).unwrap();
    assert_eq!(driver.log(), [""; 0], "nothing was launched");

    launch(right).unwrap();
    let [logits, params, ids] = [logits.address(), all_params.address(), ids.address()];
    let expected = format!("launch sample 3 1 1, 1024 1 1, 16768: {logits:#x} 10 12 {params:#x} {ids:#x}");
    assert_eq!(driver.log(), [expected]);
}
