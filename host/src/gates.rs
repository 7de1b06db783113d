//! Learned gates: the weights by which SeerAttention-R (arXiv 2506.08889) scores blocks.

use std::ops::Range;

use crate::{Error, KvShape, Result, Rotary};

/// The epsilon of a gate's norms, as published.
pub const GATE_EPS: f32 = 1e-6;

/// The widest gate key: what one block of a kernel can hold.
pub const MAX_GATE_RANK: usize = 256;

/// Learned gates (SeerAttention-R, arXiv 2506.08889): for every layer and KV head two projections, by which a block of keys and a group of
/// queries become one vector each, and how these two turn with their positions.
#[derive(Clone, Debug, PartialEq)]
pub struct Gates {
    shape: KvShape,
    rank: usize,
    model: Rotary,
    gate: Rotary,
    layers: Vec<LayerGate>,
}

/// The weights of one layer, row-major.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerGate {
    /// `[kv_heads, rank, group * head_dim]`: of the queries of a group, one behind the other.
    pub query: Vec<f32>,
    /// `[kv_heads, rank, 3 * head_dim]`: of the greatest, the least and the mean of a block's keys.
    pub key: Vec<f32>,
    /// `[rank]`: the weight of an RMS norm behind the query's projection, of all KV heads.
    pub query_norm: Option<Vec<f32>>,
    /// The same behind the key's.
    pub key_norm: Option<Vec<f32>>,
}

/// The weights of one KV head of a layer; the shapes are those of [`LayerGate`].
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "LayerGate has them")]
pub struct HeadGate<'a> {
    pub query: &'a [f32],
    pub key: &'a [f32],
    pub query_norm: Option<&'a [f32]>,
    pub key_norm: Option<&'a [f32]>,
}

impl Gates {
    /// The gates of a model of `shape`, of `rank` elements a gate key. `model` is how the model's keys and queries are turned, `gate` how the
    /// gate's are: usually the same frequencies, at the gate's width.
    ///
    /// # Errors
    /// [`Error::GateRank`] for a rank that is no multiple of 16 up to [`MAX_GATE_RANK`], [`Error::GateRotary`] for an embedding of another
    /// width, [`Error::GateLayers`] for another number of layers than the model's, [`Error::GateTensor`] for a tensor of another length than
    /// its shape has.
    pub fn new(
        shape: KvShape,
        rank: usize,
        model: Rotary,
        gate: Rotary,
        layers: Vec<LayerGate>,
    ) -> Result<Self> {
        if rank == 0 || rank > MAX_GATE_RANK || !rank.is_multiple_of(16) {
            return Err(Error::GateRank { rank, limit: MAX_GATE_RANK });
        }
        for (of, expected, rotary) in [("the model", shape.head_dim, &model), ("the gate", rank, &gate)] {
            if rotary.head_dim() != expected {
                return Err(Error::GateRotary { of, expected, found: rotary.head_dim() });
            }
        }
        if layers.len() != shape.layers {
            return Err(Error::GateLayers { expected: shape.layers, found: layers.len() });
        }
        let rows = shape.kv_heads * rank;
        let norms = |layer: &LayerGate| (layer.query_norm.is_some(), layer.key_norm.is_some());
        for (index, layer) in layers.iter().enumerate() {
            let norm = |weight: &Option<Vec<f32>>, first: bool| match weight {
                Some(weight) => (if first { rank } else { 0 }, weight.len()),
                None => (if first { rank } else { 0 }, 0),
            };
            let of_first = norms(&layers[0]);
            let (query_norm, key_norm) =
                (norm(&layer.query_norm, of_first.0), norm(&layer.key_norm, of_first.1));
            for (tensor, (expected, found)) in [
                ("query projection", (rows * shape.group() * shape.head_dim, layer.query.len())),
                ("key projection", (rows * 3 * shape.head_dim, layer.key.len())),
                ("query norm", query_norm),
                ("key norm", key_norm),
            ] {
                if expected != found {
                    return Err(Error::GateTensor { layer: index, tensor, expected, found });
                }
            }
        }
        Ok(Self { shape, rank, model, gate, layers })
    }

    /// The shape of the model that they were made for.
    pub fn shape(&self) -> &KvShape {
        &self.shape
    }

    /// Elements of a gate key.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// How the model's keys and queries are turned.
    pub fn model_rotary(&self) -> &Rotary {
        &self.model
    }

    /// How gate keys and gate queries are turned.
    pub fn gate_rotary(&self) -> &Rotary {
        &self.gate
    }

    /// All layers' weights.
    pub fn layers(&self) -> &[LayerGate] {
        &self.layers
    }

    /// Those of the KV heads `heads` alone.
    ///
    /// # Errors
    /// [`Error::InvalidShape`] for no heads.
    ///
    /// # Panics
    /// For heads that the model does not have.
    pub fn of_heads(&self, heads: Range<usize>) -> Result<Self> {
        let KvShape { layers, kv_heads, head_dim, .. } = self.shape;
        let of_heads = |weights: &[f32]| {
            let each = weights.len() / kv_heads;
            weights[heads.start * each..heads.end * each].to_vec()
        };
        let layer = |layer: &LayerGate| LayerGate {
            query: of_heads(&layer.query),
            key: of_heads(&layer.key),
            ..layer.clone()
        };
        Ok(Self {
            shape: KvShape::new(layers, heads.len() * self.shape.group(), heads.len(), head_dim)?,
            layers: self.layers.iter().map(layer).collect(),
            ..self.clone()
        })
    }

    /// The weights of one KV head.
    ///
    /// # Panics
    /// For one that the model does not have.
    pub fn head(&self, layer: usize, kv_head: usize) -> HeadGate<'_> {
        let LayerGate { query, key, query_norm, key_norm } = &self.layers[layer];
        let of_head = |weights: &'_ [f32]| {
            let elements = weights.len() / self.shape.kv_heads;
            kv_head * elements..(kv_head + 1) * elements
        };
        HeadGate {
            query: &query[of_head(query)],
            key: &key[of_head(key)],
            query_norm: query_norm.as_deref(),
            key_norm: key_norm.as_deref(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rotary(head_dim: usize) -> Rotary {
        Rotary::new(vec![0.5; head_dim / 2], 1.0)
    }

    fn layer(norms: bool) -> LayerGate {
        let norm = norms.then(|| vec![1.0; 16]);
        let (query, key) = (vec![0.0; 2 * 16 * 3 * 8], vec![0.0; 2 * 16 * 3 * 8]);
        LayerGate { query, key, query_norm: norm.clone(), key_norm: norm }
    }

    #[test]
    fn what_does_not_fit_is_named_with_what_was_expected() {
        let shape = KvShape::new(2, 6, 2, 8).unwrap();
        let of = |rank, model, gate, layers| Gates::new(shape, rank, rotary(model), rotary(gate), layers);
        let layers = || vec![layer(true), layer(true)];
        assert!(of(16, 8, 16, layers()).is_ok());
        assert!(of(16, 8, 16, vec![layer(false), layer(false)]).is_ok());
        for rank in [0, 8, 24, 272] {
            assert_eq!(of(rank, 8, 16, layers()), Err(Error::GateRank { rank, limit: 256 }));
        }
        let rotary = |of, expected, found| Err(Error::GateRotary { of, expected, found });
        assert_eq!(of(16, 4, 16, layers()), rotary("the model", 8, 4));
        assert_eq!(of(16, 8, 8, layers()), rotary("the gate", 16, 8));
        assert_eq!(of(16, 8, 16, vec![layer(true)]), Err(Error::GateLayers { expected: 2, found: 1 }));
        let second = |change: fn(&mut LayerGate)| {
            let mut layers = layers();
            change(&mut layers[1]);
            of(16, 8, 16, layers).unwrap_err()
        };
        let tensor = |tensor, expected, found| Error::GateTensor { layer: 1, tensor, expected, found };
        assert_eq!(second(|layer| layer.query.truncate(700)), tensor("query projection", 768, 700));
        assert_eq!(second(|layer| layer.key.push(0.0)), tensor("key projection", 768, 769));
        assert_eq!(second(|layer| layer.query_norm = None), tensor("query norm", 16, 0));
        assert_eq!(second(|layer| layer.key_norm = Some(vec![1.0; 8])), tensor("key norm", 16, 8));
        let mut mixed = vec![layer(false), layer(false)];
        mixed[1].key_norm = Some(vec![1.0; 16]);
        assert_eq!(of(16, 8, 16, mixed), Err(tensor("key norm", 0, 16)), "all layers have norms or none");
    }

    #[test]
    fn a_head_has_its_own_part_of_the_weights() {
        let shape = KvShape::new(1, 2, 2, 8).unwrap();
        let counted = |elements: usize| (0..elements).map(|i| i as f32).collect::<Vec<_>>();
        let layer =
            LayerGate { query: counted(2 * 16 * 8), key: counted(2 * 16 * 24), ..LayerGate::default() };
        let gates = Gates::new(shape, 16, rotary(8), rotary(16), vec![layer]).unwrap();
        let head = gates.head(0, 1);
        assert_eq!((head.query[0], head.query.len()), (128.0, 128));
        assert_eq!((head.key[0], head.key.len()), (384.0, 384));
        assert!(head.query_norm.is_none() && head.key_norm.is_none());
    }
}
