use std::collections::HashSet;
use std::fs;
use std::path::Path;

use half::{bf16, f16};
use proptest::prelude::*;
use spinkv::backend::cuda::driver::DriverError;

use super::super::stand_in::{FREE_BYTES, MEMORY_BYTES, driver};
use super::matrices::Window;
use super::*;

const NEEDLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/needle-tiny");

/// A Llama of two layers, with a head of its own; widths that differ, so that none can stand for another.
fn llama() -> ModelConfig {
    let mut config = ModelConfig::preset("llama-3.1-8b").unwrap().with_layers(2).unwrap();
    (config.vocab_size, config.hidden_size, config.intermediate_size) = (40, 24, 56);
    (config.query_heads, config.kv_heads, config.head_dim) = (4, 2, 64);
    config
}

/// Every tensor of [`llama`]: name and shape.
fn tensors(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let (hidden, mlp) = (config.hidden_size, config.intermediate_size);
    let (queries, keys) = (config.query_heads * config.head_dim, config.kv_heads * config.head_dim);
    let mut tensors = vec![
        ("model.embed_tokens.weight".to_owned(), vec![config.vocab_size, hidden]),
        ("lm_head.weight".to_owned(), vec![config.vocab_size, hidden]),
        ("model.norm.weight".to_owned(), vec![hidden]),
    ];
    for layer in 0..config.layers {
        for (part, shape) in [
            ("input_layernorm", vec![hidden]),
            ("post_attention_layernorm", vec![hidden]),
            ("self_attn.q_proj", vec![queries, hidden]),
            ("self_attn.k_proj", vec![keys, hidden]),
            ("self_attn.v_proj", vec![keys, hidden]),
            ("self_attn.o_proj", vec![hidden, queries]),
            ("mlp.gate_proj", vec![mlp, hidden]),
            ("mlp.up_proj", vec![mlp, hidden]),
            ("mlp.down_proj", vec![hidden, mlp]),
        ] {
            tensors.push((format!("model.layers.{layer}.{part}.weight"), shape));
        }
    }
    tensors
}

/// Writes them as bf16, f16 and f32 in turn, numbers that no two tensors share.
fn write(dir: &Path, tensors: &[(String, Vec<usize>)]) {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (number, (name, shape)) in tensors.iter().enumerate() {
        let start = data.len();
        let dtype = ["BF16", "F16", "F32"][number % 3];
        for at in 0..shape.iter().product() {
            let value = ((at * 7919 + number * 104_729) % 65_521) as f32 / 1000.0 - 32.0;
            match dtype {
                "BF16" => data.extend(bf16::from_f32(value).to_le_bytes()),
                "F16" => data.extend(f16::from_f32(value).to_le_bytes()),
                _ => data.extend(value.to_le_bytes()),
            }
        }
        let entry =
            serde_json::json!({ "dtype": dtype, "shape": shape, "data_offsets": [start, data.len()] });
        header.insert(name.clone(), entry);
    }
    let header = serde_json::Value::Object(header).to_string();
    let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
    fs::write(dir.join("model.safetensors"), file).unwrap();
}

/// The named tensors, one below the other, rounded to bf16.
fn stacked(checkpoint: &Checkpoint, names: &[String]) -> Vec<u16> {
    let tensor = |name: &String| checkpoint.tensor_f32(name, checkpoint.shape(name).unwrap()).unwrap();
    names.iter().flat_map(tensor).map(|value| bf16::from_f32(value).to_bits()).collect()
}

fn bits(stream: &Stream, buffer: &DeviceBuffer<Word>) -> Vec<u16> {
    bytemuck::cast_slice(&buffer.to_vec(stream).unwrap()).to_vec()
}

/// Every buffer against the checkpoint.
fn check(stream: &Stream, checkpoint: &Checkpoint, weights: &DeviceWeights) {
    let stacked = |names: &[String]| stacked(checkpoint, names);
    assert_eq!(bits(stream, &weights.embedding), stacked(&["model.embed_tokens.weight".into()]));
    let norm = |buffer: &DeviceBuffer<f32>, name: String| {
        let expected = checkpoint.tensor_f32(&name, &[buffer.len()]).unwrap();
        assert_eq!(buffer.to_vec(stream).unwrap(), expected, "{name}");
    };
    norm(&weights.final_norm, "model.norm.weight".into());
    for (index, layer) in weights.layers.iter().enumerate() {
        let name = |part: &str| format!("model.layers.{index}.{part}.weight");
        let names = |parts: &[&str]| parts.iter().map(|part| name(part)).collect::<Vec<_>>();
        for (buffer, parts) in [
            (&layer.qkv, &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"][..]),
            (&layer.output, &["self_attn.o_proj"]),
            (&layer.gate_up, &["mlp.gate_proj", "mlp.up_proj"]),
            (&layer.down, &["mlp.down_proj"]),
        ] {
            assert!(bits(stream, buffer) == stacked(&names(parts)), "layer {index}: {parts:?}");
        }
        norm(&layer.attention_norm, name("input_layernorm"));
        norm(&layer.mlp_norm, name("post_attention_layernorm"));
        let head_norms = [(&layer.query_norm, "self_attn.q_norm"), (&layer.key_norm, "self_attn.k_norm")];
        for (buffer, part) in head_norms {
            assert_eq!(buffer.is_some(), checkpoint.contains(&name(part)));
            if let Some(buffer) = buffer {
                norm(buffer, name(part));
            }
        }
    }
}

#[test]
fn tensors_of_all_types_arrive_in_their_places() {
    let driver = driver();
    let stream = driver.stream();
    let (dir, config) = (tempfile::tempdir().unwrap(), llama());
    write(dir.path(), &tensors(&config));
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let longest = 256 * 24 / 8;
    for staging_words in [1 << 20, 64, 7] {
        let (mut seen, mut before) = (0, 0);
        let weights = DeviceWeights::load(
            &stream,
            &checkpoint,
            (&config, Shard::WHOLE),
            staging_words,
            |done, total| {
                assert!(done > before && done <= total, "{before}, {done} of {total}");
                (before, seen) = (done, seen + 1);
                assert_eq!(total, weights_bytes(&config));
            },
        )
        .unwrap();
        let log = driver.log();
        assert_eq!(before, weights_bytes(&config), "all of it is done");
        let staging = format!("pinned {} flags 3", 16 * staging_words.min(longest));
        assert_eq!(log.iter().filter(|line| **line == staging).count(), 3, "{staging}");
        let waits = log.iter().filter(|line| *line == "wait for event").count();
        assert_eq!(waits, seen - 1 - 3, "a buffer is filled again when its copy is done");
        check(&stream, &checkpoint, &weights);
        let head = weights.head.as_ref().expect("Llama 3.1 has one");
        assert_eq!(bits(&stream, head), stacked(&checkpoint, &["lm_head.weight".into()]));
        assert_eq!(weights.head().address(), head.address());
        assert_eq!(weights.bytes().total(), weights_bytes(&config));
    }
}

fn weights_bytes(config: &ModelConfig) -> u64 {
    let norms = (2 * config.layers + 1) * config.hidden_size;
    let all: usize = tensors(config).iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
    (2 * all + 2 * norms) as u64
}

#[test]
fn a_qwen3_checkpoint_is_loaded_whole_and_in_part() {
    let driver = driver();
    let stream = driver.stream();
    let (config, checkpoint) = (ModelConfig::open(NEEDLE).unwrap(), Checkpoint::open(NEEDLE).unwrap());
    let weights = DeviceWeights::open(&stream, NEEDLE, &config, |_, _| {}).unwrap();
    assert_eq!((weights.layers.len(), weights.head.is_some()), (4, false));
    assert_eq!(weights.head().address(), weights.embedding.address());
    check(&stream, &checkpoint, &weights);
    let short = config.with_layers(1).unwrap();
    let part = DeviceWeights::open(&stream, NEEDLE, &short, |_, _| {}).unwrap();
    assert_eq!(part.layers.len(), 1);
    check(&stream, &checkpoint, &part);
}

#[test]
fn what_cannot_be_loaded_takes_no_memory() {
    let driver = driver();
    let stream = driver.stream();
    let kernels = Kernels::load(stream.context()).unwrap();
    driver.log();
    let (dir, config) = (tempfile::tempdir().unwrap(), llama());
    let mut missing = tensors(&config);
    let last = missing.pop().unwrap().0;
    write(dir.path(), &missing);
    let open = |config| DeviceWeights::open(&stream, dir.path(), config, |_, _| panic!("nothing is done"));
    match open(&config).unwrap_err() {
        Error::MissingTensor { name, .. } => assert_eq!(name, last),
        other => panic!("{other}"),
    }
    let other = ModelConfig { intermediate_size: 64, ..config.clone() };
    assert!(matches!(open(&other).unwrap_err(), Error::TensorShape { .. }));
    let odd = ModelConfig { head_dim: 32, ..config.clone() };
    assert!(matches!(open(&odd).unwrap_err(), Error::UnsupportedOnGpu { field: "head_dim", .. }));

    // However small, 34 matrices take 2 MiB each, and 64 MiB are free.
    let deep = ModelConfig { layers: 8, ..config.clone() };
    write(dir.path(), &tensors(&deep));
    for refused in [open(&deep).unwrap_err(), DeviceWeights::random(&stream, &kernels, &deep, 1).unwrap_err()]
    {
        let needed = (2 * (8 * 4 + 2 + 1)) << 20;
        assert_eq!(
            refused.to_string(),
            format!("the weights need {needed} bytes of GPU memory; {FREE_BYTES} of {MEMORY_BYTES} are free")
        );
    }
    assert_eq!(driver.log(), [""; 0], "nothing was allocated or launched");
}

#[test]
fn a_failure_of_the_driver_is_passed_on() {
    let driver = driver();
    let stream = driver.stream();
    let refused = Staging::new(stream.context(), 1, usize::MAX).unwrap_err();
    assert!(matches!(refused, Error::Driver(DriverError::PinnedMemoryRefused { .. })), "{refused}");
}

#[test]
fn random_weights_have_a_seed_for_each_matrix() {
    let driver = driver();
    let stream = driver.stream();
    let kernels = Kernels::load(stream.context()).unwrap();
    driver.log();
    let config = llama();
    let launches = |config: &ModelConfig, seed| {
        let weights = DeviceWeights::random(&stream, &kernels, config, seed).unwrap();
        assert_eq!(weights.final_norm.to_vec(&stream).unwrap(), vec![1.0; 24]);
        for layer in &weights.layers {
            assert!(layer.query_norm.is_none() && layer.key_norm.is_none());
            let norms = [&layer.attention_norm, &layer.mlp_norm].map(|norm| norm.to_vec(&stream).unwrap());
            assert_eq!(norms, [vec![1.0; 24], vec![1.0; 24]]);
        }
        let matrices: Vec<_> =
            Matrix::all(&config_sizes(config)).map(|matrix| weights.matrix(matrix)).collect();
        let log = driver.log();
        let fills: Vec<_> = log.iter().filter_map(|line| line.strip_prefix("launch fill_random ")).collect();
        assert_eq!(fills.len(), matrices.len());
        let seeds = fills.iter().zip(&matrices).map(|(fill, matrix)| {
            let words: Vec<_> = fill.split_once(": ").unwrap().1.split(' ').collect();
            let filled = [format!("{:#x}", matrix.address()), matrix.len().to_string()];
            assert_eq!(words[..2], filled, "all of it");
            format!("{} {}", words[2], words[3])
        });
        seeds.collect::<Vec<_>>()
    };
    let seeds = launches(&config, 7);
    assert_eq!(seeds.len(), 1 + 2 * 4 + 1);
    assert_eq!(launches(&config, 7), seeds);
    let short = launches(&config.clone().with_layers(1).unwrap(), 7);
    assert_eq!((&short[..5], &short[5]), (&seeds[..5], &seeds[9]), "layers do not depend on how many follow");
    let neighbour = launches(&config, 8);
    let different: HashSet<_> = seeds.iter().chain(&neighbour).collect();
    assert_eq!(different.len(), 20);
}

fn config_sizes(config: &ModelConfig) -> WeightSizes {
    WeightSizes::new(config).unwrap()
}

/// The elements of a window of a matrix.
fn taken(matrix: &[u16], window: &Window) -> Vec<u16> {
    (0..window.len()).map(|at| matrix[window.place(at)]).collect()
}

#[test]
fn shards_of_a_checkpoint_are_its_windows() {
    let driver = driver();
    let stream = driver.stream();
    let (dir, config) = (tempfile::tempdir().unwrap(), ModelConfig { intermediate_size: 64, ..llama() });
    write(dir.path(), &tensors(&config));
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let (whole, sizes) =
        (DeviceWeights::open(&stream, dir.path(), &config, |_, _| {}).unwrap(), config_sizes(&config));
    for shard in Shard::all(2) {
        for staging_words in [1 << 20, 64, 7] {
            let mut done = 0;
            let part =
                DeviceWeights::load(&stream, &checkpoint, (&config, shard), staging_words, |now, _| {
                    done = now
                })
                .unwrap();
            assert_eq!(done, part.bytes().total(), "no more is read than a shard has");
            for matrix in Matrix::all(&sizes) {
                let of_whole = bits(&stream, whole.matrix(matrix));
                let windows = matrix.windows(&sizes, shard).unwrap();
                let expected: Vec<u16> = windows.iter().flat_map(|window| taken(&of_whole, window)).collect();
                assert!(bits(&stream, part.matrix(matrix)) == expected, "{shard:?}, {matrix:?}");
            }
            assert_eq!(part.final_norm.to_vec(&stream).unwrap(), whole.final_norm.to_vec(&stream).unwrap());
        }
    }
    let odd = ModelConfig { kv_heads: 3, query_heads: 6, ..config };
    let refused =
        DeviceWeights::open_shard(&stream, dir.path(), &odd, Shard::all(2).next().unwrap(), |_, _| {});
    let refused = refused.unwrap_err().to_string();
    assert_eq!(refused, "num_key_value_heads is 3, which 2 GPUs cannot share out evenly");
}

#[test]
fn random_shards_are_filled_as_the_whole_and_taken_out() {
    let driver = driver();
    let stream = driver.stream();
    let kernels = Kernels::load(stream.context()).unwrap();
    let config = ModelConfig { intermediate_size: 64, layers: 1, ..llama() };
    driver.log();
    let seeds = |log: &[String]| {
        let fills = log.iter().filter(|line| line.starts_with("launch fill_random"));
        // All but the shape of the launch and where it goes: words and seed.
        fills
            .map(|line| line.split_once(": 0x").unwrap().1.split_once(' ').unwrap().1.to_owned())
            .collect::<Vec<_>>()
    };
    let whole = DeviceWeights::random(&stream, &kernels, &config, 7).unwrap();
    let expected = seeds(&driver.log());
    for shard in Shard::all(2) {
        let part = DeviceWeights::random_shard(&stream, &kernels, &config, shard, 7).unwrap();
        let log = driver.log();
        assert_eq!(seeds(&log), expected, "of the whole matrices");
        let copies: Vec<_> =
            log.iter().filter(|line| line.starts_with("copy") && line.contains("rows")).collect();
        // Queries, keys, values; columns of the output; gate and up; columns of down.
        let (rows, half) = (
            |rows: usize| format!("copy {rows} rows of 48"),
            |width: usize| format!("copy 24 rows of {width}"),
        );
        assert_eq!(copies, [&rows(128), &rows(64), &rows(64), &half(256), &rows(32), &rows(32), &half(64)]);
        assert_eq!(part.layers[0].qkv.len() * 2, whole.layers[0].qkv.len());
    }
}

proptest! {
    /// Every element of a matrix is in one shard, and the products of shards add up to the whole's: rows of a projection are columns of the
    /// one that takes its outputs.
    #[test]
    fn shards_tile_the_matrices_and_their_products_add_up(
        ranks in 1_usize..5, heads in 1_usize..3, group in 1_usize..4, mlp in 1_usize..5, hidden in 1_usize..4,
    ) {
        let kv_heads = ranks * heads;
        let config = ModelConfig {
            kv_heads,
            query_heads: group * kv_heads,
            hidden_size: 8 * hidden,
            intermediate_size: 8 * ranks * mlp,
            layers: 1,
            ..llama()
        };
        let sizes = config_sizes(&config);
        for matrix in Matrix::all(&sizes) {
            let rows = matrix.rows(&sizes);
            let windows: Vec<Vec<Window>> =
                Shard::all(ranks).map(|shard| matrix.windows(&sizes, shard).unwrap()).collect();
            let elements = rows * windows[0][0].stride;
            let mut times = vec![0; elements];
            for window in windows.iter().flatten() {
                (0..window.len()).for_each(|at| times[window.place(at)] += 1);
            }
            let everywhere = matches!(matrix, Matrix::Embedding | Matrix::Head);
            prop_assert!(times.iter().all(|times| *times == if everywhere { ranks } else { 1 }), "{:?}", matrix);
        }
        for kind in [LayerMatrix::Output, LayerMatrix::Down] {
            let matrix = Matrix::Layer(0, kind);
            let [outputs, inputs] = if kind == LayerMatrix::Output { sizes.output() } else { sizes.down() };
            let weight = |at: usize| (at * 7 % 11) as i64 - 5;
            let x: Vec<i64> = (0..inputs).map(|at| (at * 5 % 13) as i64 - 6).collect();
            let mut sums = vec![0; outputs];
            for shard in Shard::all(ranks) {
                let windows = matrix.windows(&sizes, shard).unwrap();
                let [window] = &windows[..] else { panic!("{windows:?}") };
                for (at, sum) in sums.iter_mut().enumerate() {
                    let own = x[window.columns.clone()].iter().enumerate();
                    *sum += own.map(|(column, x)| x * weight(window.place(at * window.width() + column))).sum::<i64>();
                }
            }
            let of_whole = |row: usize| x.iter().enumerate().map(|(column, x)| x * weight(row * inputs + column)).sum::<i64>();
            prop_assert_eq!(sums, (0..outputs).map(of_whole).collect::<Vec<_>>());
        }
    }
}
