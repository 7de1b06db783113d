use rayon::prelude::*;
use spinkv::backend::cpu::linalg::{Matrix, MatrixMut, Old, matmul};

use super::ops;
use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::error::Result;

/// Tokens of the largest batch whose requests get the same bits as alone: products of so many tokens, or fewer, are summed in one order. Those
/// of more tokens are `gemm`'s, whose order depends on their number.
pub const STREAMED_TOKENS: usize = 64;

/// Rows of a weight that a thread takes at a time.
const STREAMED_ROWS: usize = 64;

/// A projection without bias: `[outputs, inputs]`, row-major.
#[derive(Debug)]
pub(super) struct Linear {
    weight: Vec<f32>,
    outputs: usize,
    inputs: usize,
}

impl Linear {
    pub fn load(checkpoint: &Checkpoint, name: &str, outputs: usize, inputs: usize) -> Result<Self> {
        Ok(Self { weight: checkpoint.tensor_f32(name, &[outputs, inputs])?, outputs, inputs })
    }

    pub fn elements(&self) -> usize {
        self.weight.len()
    }

    /// The `index`-th row of the weight: an embedding.
    pub fn row(&self, index: usize) -> Option<&[f32]> {
        self.weight.chunks_exact(self.inputs).nth(index)
    }

    /// `x`, `[tokens, inputs]`, projected: `[tokens, outputs]`.
    pub fn apply(&self, x: &[f32]) -> Vec<f32> {
        let mut out = vec![0.0; x.len() / self.inputs * self.outputs];
        self.apply_to(x, Old::Replace, &mut out);
        out
    }

    /// As [`apply`](Self::apply), into `out` or added to it.
    pub fn apply_to(&self, x: &[f32], old: Old, out: &mut [f32]) {
        let tokens = x.len() / self.inputs;
        if (1..=STREAMED_TOKENS).contains(&tokens) {
            return self.stream(x, tokens, old, out);
        }
        matmul(
            MatrixMut::new(out, tokens, self.outputs, self.outputs),
            old,
            Matrix::new(x, tokens, self.inputs, self.inputs),
            Matrix::new(&self.weight, self.outputs, self.inputs, self.inputs).transposed(),
            true,
        );
    }
}

impl Linear {
    /// The product for few tokens: the weight passes by once, and a token's result does not depend on the others, not by a bit.
    fn stream(&self, x: &[f32], tokens: usize, old: Old, out: &mut [f32]) {
        let mut products = vec![0.0; self.outputs * tokens];
        let weights = self.weight.par_chunks(STREAMED_ROWS * self.inputs);
        let parts = products.par_chunks_mut(STREAMED_ROWS * tokens).zip(weights);
        parts.for_each(|(out, weight)| ops::dots(weight, x, self.inputs, out));
        for (token, out) in out.chunks_exact_mut(self.outputs).enumerate() {
            let products = products[token..].iter().step_by(tokens);
            match old {
                Old::Replace => out.iter_mut().zip(products).for_each(|(out, product)| *out = *product),
                Old::Add => out.iter_mut().zip(products).for_each(|(out, product)| *out += product),
            }
        }
    }
}

/// The weights of one transformer layer.
#[derive(Debug)]
pub(super) struct Layer {
    pub attention_norm: Vec<f32>,
    pub query: Linear,
    pub key: Linear,
    pub value: Linear,
    pub output: Linear,
    /// RMS norms over each query and each key head, `[head_dim]`; Qwen3 only.
    pub query_norm: Option<Vec<f32>>,
    pub key_norm: Option<Vec<f32>>,
    pub mlp_norm: Vec<f32>,
    pub gate: Linear,
    pub up: Linear,
    pub down: Linear,
}

impl Layer {
    pub fn load(checkpoint: &Checkpoint, config: &ModelConfig, index: usize) -> Result<Self> {
        let (hidden, mlp) = (config.hidden_size, config.intermediate_size);
        let queries = config.query_heads * config.head_dim;
        let keys = config.kv_heads * config.head_dim;
        let name = |part: &str| format!("model.layers.{index}.{part}.weight");
        let linear = |part, outputs, inputs| Linear::load(checkpoint, &name(part), outputs, inputs);
        let norm = |part, width| checkpoint.tensor_f32(&name(part), &[width]);
        let head_norm = |part| config.has_qk_norm().then(|| norm(part, config.head_dim)).transpose();
        Ok(Self {
            attention_norm: norm("input_layernorm", hidden)?,
            query: linear("self_attn.q_proj", queries, hidden)?,
            key: linear("self_attn.k_proj", keys, hidden)?,
            value: linear("self_attn.v_proj", keys, hidden)?,
            output: linear("self_attn.o_proj", hidden, queries)?,
            query_norm: head_norm("self_attn.q_norm")?,
            key_norm: head_norm("self_attn.k_norm")?,
            mlp_norm: norm("post_attention_layernorm", hidden)?,
            gate: linear("mlp.gate_proj", mlp, hidden)?,
            up: linear("mlp.up_proj", mlp, hidden)?,
            down: linear("mlp.down_proj", hidden, mlp)?,
        })
    }

    pub fn elements(&self) -> usize {
        let linears = [&self.query, &self.key, &self.value, &self.output, &self.gate, &self.up, &self.down];
        let head_norms = [&self.query_norm, &self.key_norm];
        linears.iter().map(|linear| linear.elements()).sum::<usize>()
            + self.attention_norm.len()
            + self.mlp_norm.len()
            + head_norms.iter().map(|norm| norm.as_ref().map_or(0, Vec::len)).sum::<usize>()
    }
}
