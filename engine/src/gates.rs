//! Learned gates of a model, in a safetensors file beside its checkpoint.

use std::path::Path;
use std::sync::Arc;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use spinkv::KvShape;
use spinkv::algorithms::SEER_ATTENTION;
use spinkv::gates::{Gates, LayerGate};

use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::error::Result;
use crate::model::rope::Rope;

/// The file that is looked for beside a checkpoint.
pub const FILE: &str = "gates.safetensors";

/// How a file names and lays out a gate.
struct Layout {
    /// Before `{layer}`, and behind it.
    prefix: &'static str,
    infix: &'static str,
    query: &'static str,
    key: &'static str,
    query_norm: &'static str,
    key_norm: &'static str,
    /// Projections are `[kv_heads, inputs, rank]`, the query's inputs `[group, head_dim]`; else `[kv_heads, rank, inputs]`.
    inputs_first: bool,
}

/// The bundled models' own.
const BUNDLED: Layout = Layout {
    prefix: "layers",
    infix: "attn_gate",
    query: "q_proj",
    key: "k_proj",
    query_norm: "q_norm",
    key_norm: "k_norm",
    inputs_first: false,
};

/// That of the published SeerAttention-R gates (microsoft/SeerAttention, AttnGate with Qproj and Kmaxminavg), in a checkpoint that holds the gates
/// alone; `model.layers` in one that holds the model, too.
const PUBLISHED: Layout = Layout {
    prefix: "layers",
    infix: "self_attn.attn_gate",
    query: "attngate_linear_q",
    key: "attngate_linear_k",
    query_norm: "attngate_qnorm",
    key_norm: "attngate_knorm",
    inputs_first: true,
};

impl Layout {
    fn name(&self, layer: usize, tensor: &str) -> String {
        format!("{}.{layer}.{}.{tensor}.weight", self.prefix, self.infix)
    }

    /// The layout of a file: that which its first layer has, else the bundled one, whose names errors then give.
    fn of(checkpoint: &Checkpoint) -> Self {
        let published = [PUBLISHED, Layout { prefix: "model.layers", ..PUBLISHED }];
        let there = |layout: &Self| checkpoint.contains(&layout.name(0, layout.key));
        published.into_iter().find(there).unwrap_or(BUNDLED)
    }
}

/// Whether a method scores by gates.
pub fn needed_by(method: &str) -> bool {
    method == SEER_ATTENTION
}

/// The gates of a checkpoint in `directory`, if one of the methods needs them: of `file`, or [`FILE`] beside the checkpoint.
///
/// # Errors
/// Those of [`open`].
pub fn for_methods<'a>(
    mut names: impl Iterator<Item = &'a str>,
    file: Option<&Path>,
    directory: &Path,
    config: &ModelConfig,
) -> Result<Option<Arc<Gates>>> {
    if !names.any(needed_by) {
        return Ok(None);
    }
    let file = file.map_or_else(|| directory.join(FILE), Path::to_owned);
    Ok(Some(Arc::new(open(file, config)?)))
}

/// Reads the gates of a model of `config` from a safetensors file: the bundled layout, `layers.{i}.attn_gate.{q_proj,k_proj}.weight` as `[KV heads,
/// rank, inputs]` with optional `q_norm` and `k_norm`, or that of the published gates.
///
/// # Errors
/// Those of [`Checkpoint::open_file`]; a tensor that is missing or has another shape than the model calls for; those of [`Gates::new`].
pub fn open(path: impl AsRef<Path>, config: &ModelConfig) -> Result<Gates> {
    let checkpoint = Checkpoint::open_file(path)?;
    let layout = Layout::of(&checkpoint);
    let shape = shape_of(config)?;
    let (group, head_dim) = (shape.group(), shape.head_dim);
    // The first layer's key projection says how wide gates are; all others must agree.
    let rank_at = if layout.inputs_first { 2 } else { 1 };
    let rank = checkpoint.shape(&layout.name(0, layout.key))?.get(rank_at).copied().unwrap_or(0);
    let projection = |layer: usize, tensor: &str, groups: Option<usize>| -> Result<Vec<f32>> {
        let name = layout.name(layer, tensor);
        let inputs = groups.unwrap_or(3) * head_dim;
        if !layout.inputs_first {
            return checkpoint.tensor_f32(&name, &[shape.kv_heads, rank, inputs]);
        }
        let weights = match groups {
            Some(groups) => checkpoint.tensor_f32(&name, &[shape.kv_heads, groups, head_dim, rank])?,
            None => checkpoint.tensor_f32(&name, &[shape.kv_heads, inputs, rank])?,
        };
        Ok(transposed(&weights, inputs, rank))
    };
    let norm = |layer: usize, tensor: &str| {
        let name = layout.name(layer, tensor);
        checkpoint.contains(&name).then(|| checkpoint.tensor_f32(&name, &[rank])).transpose()
    };
    let layers = (0..shape.layers).map(|layer| {
        Ok(LayerGate {
            query: projection(layer, layout.query, Some(group))?,
            key: projection(layer, layout.key, None)?,
            query_norm: norm(layer, layout.query_norm)?,
            key_norm: norm(layer, layout.key_norm)?,
        })
    });
    of_layers(config, shape, rank, layers.collect::<Result<_>>()?)
}

/// Random gates as wide as a head, without norms, for models of random weights: what they select means nothing, what they cost does.
///
/// # Errors
/// For a head width that no gate can have.
pub fn random(config: &ModelConfig, seed: u64) -> Result<Gates> {
    let shape = shape_of(config)?;
    let (rank, mut rng) = (shape.head_dim, ChaCha8Rng::seed_from_u64(seed));
    let mut weights = |inputs: usize| -> Vec<f32> {
        // The variance of outputs is that of inputs.
        let width = (3.0 / inputs as f32).sqrt();
        let mut even = || rng.next_u32() as f32 / u32::MAX as f32 * 2.0 - 1.0;
        (0..shape.kv_heads * rank * inputs).map(|_| width * even()).collect()
    };
    let layers = (0..shape.layers).map(|_| LayerGate {
        query: weights(shape.group() * shape.head_dim),
        key: weights(3 * shape.head_dim),
        ..LayerGate::default()
    });
    of_layers(config, shape, rank, layers.collect())
}

fn shape_of(config: &ModelConfig) -> Result<KvShape> {
    Ok(KvShape::new(config.layers, config.query_heads, config.kv_heads, config.head_dim)?)
}

fn of_layers(config: &ModelConfig, shape: KvShape, rank: usize, layers: Vec<LayerGate>) -> Result<Gates> {
    let rotary = |head_dim| Rope::new(&config.rope, head_dim).rotary().clone();
    Ok(Gates::new(shape, rank, rotary(shape.head_dim), rotary(rank), layers)?)
}

/// `[heads, inputs, rank]` as `[heads, rank, inputs]`.
fn transposed(weights: &[f32], inputs: usize, rank: usize) -> Vec<f32> {
    let heads = weights.chunks_exact((inputs * rank).max(1));
    heads
        .flat_map(|head| {
            (0..rank).flat_map(move |row| (0..inputs).map(move |input| head[input * rank + row]))
        })
        .collect()
}

#[cfg(test)]
mod tests;
