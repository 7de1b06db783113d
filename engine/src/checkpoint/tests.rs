use half::{bf16, f16};
use proptest::prelude::*;
use serde_json::json;
use tempfile::TempDir;

use super::raw::CHUNK;
use super::*;

const MODELS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../models");

type Tensor<'a> = (&'a str, &'a str, Vec<usize>, Vec<u8>);

/// A safetensors file by hand, so that the tests do not lean on the library they check.
fn file_bytes(tensors: &[Tensor], pad_header: usize) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, dtype, shape, bytes) in tensors {
        let start = data.len();
        data.extend_from_slice(bytes);
        let entry = json!({ "dtype": dtype, "shape": shape, "data_offsets": [start, data.len()] });
        header.insert((*name).to_owned(), entry);
    }
    with_header(&(serde_json::to_string(&header).unwrap() + &" ".repeat(pad_header)), &data)
}

fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn write(dir: &TempDir, name: &str, bytes: &[u8]) -> PathBuf {
    let path = dir.path().join(name);
    fs::write(&path, bytes).unwrap();
    path
}

fn open_bytes(bytes: &[u8]) -> Result<Checkpoint> {
    let dir = tempfile::tempdir().unwrap();
    Checkpoint::open_file(write(&dir, "x.safetensors", bytes))
}

fn error<T>(result: Result<T>) -> Error {
    match result {
        Ok(_) => panic!("should have failed"),
        Err(error) => error,
    }
}

#[test]
fn opens_the_models() {
    for (model, layers) in [("needle-tiny", 4), ("tiny-llama31-random", 2)] {
        let checkpoint = Checkpoint::open(format!("{MODELS}/{model}")).unwrap();
        let embedding = checkpoint.tensor_f32("model.embed_tokens.weight", &[4096, 256]).unwrap();
        assert_eq!(embedding.len(), 4096 * 256);
        assert!(
            embedding.iter().all(|value| value.is_finite()) && embedding.iter().any(|&value| value != 0.0)
        );
        assert!(checkpoint.contains(&format!("model.layers.{}.mlp.down_proj.weight", layers - 1)));
        assert!(!checkpoint.contains(&format!("model.layers.{layers}.mlp.down_proj.weight")));
        let file = fs::metadata(format!("{MODELS}/{model}/model.safetensors")).unwrap();
        assert_eq!(checkpoint.file_bytes(), file.len());
    }
}

#[test]
fn every_half_value_converts_exactly_at_any_alignment() {
    let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    // Header lengths of both parities, so that the data lies on even and odd addresses.
    for pad in 0..4 {
        let tensors =
            [("b", "BF16", vec![256, 256], bytes.clone()), ("h", "F16", vec![256, 256], bytes.clone())];
        let checkpoint = open_bytes(&file_bytes(&tensors, pad)).unwrap();
        let b = checkpoint.tensor_f32("b", &[256, 256]).unwrap();
        let h = checkpoint.tensor_f32("h", &[256, 256]).unwrap();
        for bits in 0..=u16::MAX {
            let (b, h) = (b[usize::from(bits)], h[usize::from(bits)]);
            let (bf, hf) = (bf16::from_bits(bits), f16::from_bits(bits));
            assert!(b == bf.to_f32() || (b.is_nan() && bf.is_nan()), "bf16 {bits:#x}");
            assert!(h == hf.to_f32() || (h.is_nan() && hf.is_nan()), "f16 {bits:#x}");
            assert_eq!(b.is_sign_negative(), bits >> 15 == 1);
        }
    }
}

#[test]
fn conversion_is_the_same_across_chunk_boundaries() {
    let count = 2 * CHUNK + 513;
    let values: Vec<f32> = (0..count).map(|i| (i % 2048) as f32 - 1000.0).collect();
    let halves = values.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect();
    let tensors = [("f", "F32", vec![count], f32_bytes(&values)), ("h", "F16", vec![count], halves)];
    let checkpoint = open_bytes(&file_bytes(&tensors, 1)).unwrap();
    assert_eq!(checkpoint.tensor_f32("f", &[count]).unwrap(), values);
    assert_eq!(checkpoint.tensor_f32("h", &[count]).unwrap(), values);
}

#[test]
fn integers_scalars_and_empty_tensors() {
    let tensors: [Tensor; 4] = [
        ("wide", "I64", vec![2], [i64::MIN, 7].iter().flat_map(|value| value.to_le_bytes()).collect()),
        ("narrow", "I32", vec![2, 1], [-5i32, 9].iter().flat_map(|value| value.to_le_bytes()).collect()),
        ("scalar", "F32", vec![], f32_bytes(&[2.5])),
        ("empty", "BF16", vec![0, 3], vec![]),
    ];
    let checkpoint = open_bytes(&file_bytes(&tensors, 0)).unwrap();
    assert_eq!(checkpoint.tensor_i64("wide").unwrap(), [i64::MIN, 7]);
    assert_eq!(checkpoint.tensor_i64("narrow").unwrap(), [-5, 9]);
    assert_eq!(checkpoint.shape("narrow").unwrap(), [2, 1]);
    assert_eq!(checkpoint.tensor_f32("scalar", &[]).unwrap(), [2.5]);
    assert!(checkpoint.tensor_f32("empty", &[0, 3]).unwrap().is_empty());
    let mut names: Vec<_> = checkpoint.names().collect();
    names.sort_unstable();
    assert_eq!(names, ["empty", "narrow", "scalar", "wide"]);
}

#[test]
fn wrong_names_shapes_and_dtypes_are_errors() {
    let tensors: [Tensor; 2] =
        [("w", "F32", vec![2, 1], f32_bytes(&[1.0, 2.0])), ("bytes", "U8", vec![1], vec![3])];
    let checkpoint = open_bytes(&file_bytes(&tensors, 0)).unwrap();
    let text = error(checkpoint.tensor_f32("w", &[1, 2])).to_string();
    assert!(text.ends_with("x.safetensors: tensor \"w\" has shape [2, 1]; expected [1, 2]"), "{text}");
    let text = error(checkpoint.tensor_f32("bytes", &[1])).to_string();
    assert!(text.ends_with("tensor \"bytes\" has dtype U8; supported: BF16, F16, F32"), "{text}");
    assert!(matches!(error(checkpoint.tensor_i64("w")), Error::TensorDtype { .. }));
    let text = error(checkpoint.tensor_f32("v", &[1])).to_string();
    assert!(text.ends_with("x.safetensors: has no tensor \"v\""), "{text}");
    assert!(matches!(error(checkpoint.shape("v")), Error::MissingTensor { .. }));
    assert!(matches!(error(checkpoint.tensor_i64("v")), Error::MissingTensor { .. }));
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let whole = file_bytes(&[("w", "F32", vec![4], f32_bytes(&[1.0, 2.0, 3.0, 4.0]))], 3);
    assert!(open_bytes(&whole).is_ok());
    let header_end = whole.len() - 16;
    for length in 0..whole.len() {
        match error(open_bytes(&whole[..length])) {
            Error::CorruptWeights { .. } => assert!(length < header_end),
            Error::WeightsLength { found, expected, .. } => {
                assert!(length >= header_end);
                assert_eq!((found, expected), (length, whole.len()));
            }
            other => panic!("{other:?}"),
        }
    }
    let longer = [whole.as_slice(), &[0]].concat();
    assert!(matches!(error(open_bytes(&longer)), Error::WeightsLength { .. }));
}

#[test]
fn headers_that_lie_are_refused() {
    let entry = |shape: &str, start: usize, end: usize| {
        format!(r#"{{"w":{{"dtype":"U8","shape":{shape},"data_offsets":[{start},{end}]}}}}"#)
    };
    let most = usize::MAX;
    for header in [
        entry("[4]", 0, 5),
        entry("[4]", 1, 5),
        entry("[4]", 4, 0),
        entry("[2305843009213693952, 16]", 0, 4),
        entry(&format!("[{most}]"), 0, most),
        entry("[4]", 0, 4).replace("U8", "U9"),
        entry("[-4]", 0, 4),
        "{".to_owned(),
        "[]".to_owned(),
        String::new(),
    ] {
        let result = open_bytes(&with_header(&header, &[0; 4]));
        assert!(
            matches!(error(result), Error::CorruptWeights { .. } | Error::WeightsLength { .. }),
            "{header}"
        );
    }
    // A header length near the top of u64, and a Git LFS pointer in place of the weights.
    assert!(matches!(error(open_bytes(&[0xff; 64])), Error::CorruptWeights { .. }));
    let pointer = b"version https://git-lfs.github.com/spec/v1\n";
    assert!(matches!(error(open_bytes(pointer)), Error::CorruptWeights { .. }));
}

/// Two shards and the same tensors in one file.
fn sharded() -> (TempDir, TempDir) {
    let (single, shards) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let a: Tensor = ("a", "F32", vec![2], f32_bytes(&[1.0, -2.0]));
    let b: Tensor = ("b", "BF16", vec![1, 2], vec![0x80, 0x3f, 0x00, 0xc0]);
    let c: Tensor = ("c", "F32", vec![1], f32_bytes(&[0.5]));
    write(&single, "model.safetensors", &file_bytes(&[a.clone(), b.clone(), c.clone()], 0));
    write(&shards, "model-00001-of-00002.safetensors", &file_bytes(&[a, c], 1));
    write(&shards, "model-00002-of-00002.safetensors", &file_bytes(&[b], 0));
    let index = json!({ "metadata": { "total_size": 16 }, "weight_map": {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00002-of-00002.safetensors",
        "c": "model-00001-of-00002.safetensors",
    } });
    write(&shards, "model.safetensors.index.json", index.to_string().as_bytes());
    (single, shards)
}

#[test]
fn shards_hold_the_same_as_a_single_file() {
    let (single_dir, shards_dir) = sharded();
    let single = Checkpoint::open(single_dir.path()).unwrap();
    let shards = Checkpoint::open(shards_dir.path()).unwrap();
    for name in ["a", "b", "c"] {
        let shape = single.shape(name).unwrap();
        assert_eq!(shards.shape(name).unwrap(), shape);
        assert_eq!(shards.tensor_f32(name, shape).unwrap(), single.tensor_f32(name, shape).unwrap());
    }
    assert_eq!(shards.tensor_f32("b", &[1, 2]).unwrap(), [1.0, -2.0]);
    let on_disk = |name: &str| fs::metadata(shards_dir.path().join(name)).unwrap().len();
    let both = on_disk("model-00001-of-00002.safetensors") + on_disk("model-00002-of-00002.safetensors");
    assert_eq!(shards.file_bytes(), both);
    let text = error(shards.shape("d")).to_string();
    assert!(text.ends_with("model.safetensors.index.json: has no tensor \"d\""), "{text}");
}

#[test]
fn broken_indexes_are_refused() {
    let (_, dir) = sharded();
    let shard = dir.path().join("model-00002-of-00002.safetensors");
    let bytes = fs::read(&shard).unwrap();

    fs::write(&shard, &bytes[..bytes.len() - 1]).unwrap();
    assert!(
        matches!(error(Checkpoint::open(dir.path())), Error::WeightsLength { path, .. } if path == shard)
    );

    fs::write(&shard, file_bytes(&[("z", "F32", vec![1], f32_bytes(&[0.0]))], 0)).unwrap();
    let found = error(Checkpoint::open(dir.path()));
    assert!(matches!(found, Error::MissingTensor { path, name } if path == shard && name == "b"));

    fs::remove_file(&shard).unwrap();
    let text = error(Checkpoint::open(dir.path())).to_string();
    assert!(text.contains("index.json: names the shard \"model-00002-of-00002.safetensors\""), "{text}");

    write(&dir, "model.safetensors.index.json", b"{\"weight_map\": 3}");
    assert!(matches!(error(Checkpoint::open(dir.path())), Error::Json { .. }));
}

#[test]
fn directories_without_weights_say_what_was_sought() {
    let dir = tempfile::tempdir().unwrap();
    let text = error(Checkpoint::open(dir.path())).to_string();
    assert!(text.ends_with("has neither model.safetensors nor model.safetensors.index.json"), "{text}");
    assert!(matches!(error(Checkpoint::open(dir.path().join("none"))), Error::Io { .. }));
    assert!(matches!(error(Checkpoint::open_file(dir.path().join("none"))), Error::Io { .. }));
}

proptest! {
    #[test]
    fn flipped_bytes_never_panic(at in 0usize..200, to in any::<u8>()) {
        let mut bytes = file_bytes(&[("w", "F32", vec![2, 2], vec![0; 16]), ("i", "I64", vec![2], vec![0; 16])], 0);
        let at = at % bytes.len();
        bytes[at] = to;
        if let Ok(checkpoint) = open_bytes(&bytes) {
            for name in checkpoint.names() {
                let shape = checkpoint.shape(name).unwrap();
                let _ = (checkpoint.tensor_f32(name, shape), checkpoint.tensor_i64(name));
            }
        }
    }
}

/// Any part of a tensor, across the borders of what one task converts, rounded to nearest, ties to even.
#[test]
fn parts_convert_to_bf16() {
    let count = 2 * CHUNK + 513;
    let values: Vec<f32> = (0..count).map(|i| (i % 2000) as f32 / 7.0 - 100.0).collect();
    let halves: Vec<f16> = values.iter().map(|&value| f16::from_f32(value)).collect();
    let bf16s: Vec<bf16> = values.iter().map(|&value| bf16::from_f32(value)).collect();
    let bytes = [
        ("BF16", bf16s.iter().flat_map(|value| value.to_le_bytes()).collect()),
        ("F16", halves.iter().flat_map(|value| value.to_le_bytes()).collect()),
        ("F32", f32_bytes(&values)),
    ];
    let from_halves: Vec<bf16> = halves.iter().map(|value| bf16::from_f32(value.to_f32())).collect();
    for ((dtype, bytes), expected) in bytes.into_iter().zip([&bf16s, &from_halves, &bf16s]) {
        let checkpoint = open_bytes(&file_bytes(&[("x", dtype, vec![count], bytes)], 1)).unwrap();
        let raw = checkpoint.raw("x", &[count]).unwrap();
        assert_eq!((raw.len(), raw.is_empty()), (count, false));
        for range in [0..count, 3..CHUNK + 700, count - 1..count, 5..5] {
            let mut bits = vec![0xffff; range.len()];
            raw.bf16_bits(range.start, &mut bits);
            let expected: Vec<u16> = expected[range.clone()].iter().map(|value| value.to_bits()).collect();
            assert!(bits == expected, "{dtype} {range:?}");
        }
    }
    let ties = f32_bytes(&[1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, f32::INFINITY, -0.0]);
    let checkpoint = open_bytes(&file_bytes(&[("x", "F32", vec![4], ties)], 0)).unwrap();
    let mut bits = [0; 4];
    checkpoint.raw("x", &[4]).unwrap().bf16_bits(0, &mut bits);
    assert_eq!(bits, [0x3f80, 0x3f82, 0x7f80, 0x8000]);
}
