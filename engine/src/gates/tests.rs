use serde_json::json;
use spinkv::Error as KvError;

use super::*;
use crate::Error;

const NEEDLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/needle-tiny");

/// Two layers of 4 query heads, 2 KV heads and heads of 128; gates of 16.
fn config() -> ModelConfig {
    let config = ModelConfig::open(NEEDLE).unwrap();
    ModelConfig { layers: 2, query_heads: 4, ..config }
}

const RANK: usize = 16;

type Tensor = (String, Vec<usize>);

/// The tensors of both layers.
fn tensors(layout: &Layout, norms: bool) -> Vec<Tensor> {
    let of_layer = |layer: usize| {
        let (query, key) = if layout.inputs_first {
            (vec![2, 2, 128, RANK], vec![2, 384, RANK])
        } else {
            (vec![2, RANK, 256], vec![2, RANK, 384])
        };
        let mut all = vec![(layout.name(layer, layout.query), query), (layout.name(layer, layout.key), key)];
        if norms {
            all.push((layout.name(layer, layout.query_norm), vec![RANK]));
            all.push((layout.name(layer, layout.key_norm), vec![RANK]));
        }
        all
    };
    (0..2).flat_map(of_layer).collect()
}

/// Opens a file of f32 tensors, each of whose elements is its place in the tensor.
fn read(tensors: &[Tensor]) -> Result<Gates> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::<u8>::new());
    for (name, shape) in tensors {
        let start = data.len();
        let elements = shape.iter().product::<usize>();
        data.extend((0..elements).flat_map(|element| (element as f32).to_le_bytes()));
        let entry = json!({ "dtype": "F32", "shape": shape, "data_offsets": [start, data.len()] });
        header.insert(name.clone(), entry);
    }
    let header = serde_json::to_string(&header).unwrap();
    let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(FILE);
    std::fs::write(&path, bytes).unwrap();
    open(path, &config())
}

#[test]
fn the_bundled_gates_open() {
    let config = ModelConfig::open(NEEDLE).unwrap();
    let gates = open(format!("{NEEDLE}/{FILE}"), &config).unwrap();
    assert_eq!((gates.rank(), gates.layers().len()), (128, 4));
    assert_eq!(gates.model_rotary(), gates.gate_rotary());
}

#[test]
fn both_layouts_give_the_same_gates_in_their_own_order() {
    let bundled = read(&tensors(&BUNDLED, true)).unwrap();
    assert_eq!(bundled.head(1, 1).key[..3], [6144.0, 6145.0, 6146.0]);
    assert_eq!(bundled.head(1, 0).query_norm.unwrap()[15], 15.0);
    for prefix in ["layers", "model.layers"] {
        let gates = read(&tensors(&Layout { prefix, ..PUBLISHED }, false)).unwrap();
        let head = gates.head(1, 1);
        // Row 2, input 3 of the second head; of the query input 130 is channel 2 of the group's second.
        assert_eq!(head.key[2 * 384 + 3], (384 * RANK + 3 * RANK + 2) as f32);
        assert_eq!(head.query[5 * 256 + 130], (2 * 128 * RANK + (128 + 2) * RANK + 5) as f32);
        assert!(head.query_norm.is_none());
    }
}

#[test]
fn what_is_missing_or_misshapen_is_named() {
    let mut lacking = tensors(&BUNDLED, false);
    let gone = lacking.remove(2);
    let missing = read(&lacking).unwrap_err();
    assert!(matches!(&missing, Error::MissingTensor { name, .. } if *name == gone.0), "{missing}");
    let none = read(&[("other".to_owned(), vec![1])]).unwrap_err();
    assert!(matches!(&none, Error::MissingTensor { name, .. } if name == "layers.0.attn_gate.k_proj.weight"));

    let misshapen = |at: usize, shape: &[usize]| {
        let mut tensors = tensors(&BUNDLED, true);
        tensors[at].1 = shape.to_vec();
        read(&tensors).unwrap_err()
    };
    let wide = misshapen(4, &[2, RANK, 128]);
    assert!(
        matches!(&wide, Error::TensorShape { expected, found, .. } if *expected == [2, 16, 256] && *found == [2, 16, 128]),
        "{wide}"
    );
    let norm = misshapen(2, &[8]);
    assert!(matches!(&norm, Error::TensorShape { expected, .. } if *expected == [16]), "{norm}");
    let flat = misshapen(1, &[8]);
    assert!(matches!(&flat, Error::TensorShape { .. }), "{flat}");

    let mut odd = tensors(&BUNDLED, false);
    odd.iter_mut().for_each(|(_, shape)| shape[1] = 24);
    let rank = read(&odd).unwrap_err();
    assert!(matches!(rank, Error::Kv(KvError::GateRank { rank: 24, limit: 256 })), "{rank}");
    let mut one_norm = tensors(&BUNDLED, true);
    one_norm.pop();
    let norm = read(&one_norm).unwrap_err();
    assert!(matches!(norm, Error::Kv(KvError::GateTensor { layer: 1, tensor: "key norm", .. })), "{norm}");
}

#[test]
fn random_gates_are_as_wide_as_a_head_and_of_their_seed() {
    let [a, b, c] = [1, 1, 2].map(|seed| random(&config(), seed).unwrap());
    assert!(a == b && a != c && a.rank() == 128);
}
