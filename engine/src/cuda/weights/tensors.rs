use rayon::prelude::*;
use spinkv::Shard;
use spinkv_kernels::abi::WORD_ELEMENTS;

use super::super::WeightSizes;
use super::matrices::{LayerMatrix, Matrix, Window};
use crate::checkpoint::{Checkpoint, RawTensor};
use crate::error::Result;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Norm {
    /// The number of layers for the final one.
    pub layer: usize,
    pub kind: NormKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NormKind {
    Attention,
    Query,
    Key,
    Mlp,
    Final,
}

/// Every tensor of a checkpoint, found and of the right shape before any memory is taken.
pub(super) struct Tensors<'a> {
    norms: Vec<(Norm, RawTensor<'a>)>,
    pub matrices: Vec<Piece<'a>>,
    shard: Shard,
}

/// A tensor, or what a shard has of it, that is all or part of a matrix.
pub(super) struct Piece<'a> {
    pub matrix: Matrix,
    /// The word of the shard's matrix that it begins at.
    pub at: usize,
    raw: RawTensor<'a>,
    /// In the tensor.
    window: Window,
}

impl Piece<'_> {
    /// Words.
    pub fn words(&self) -> usize {
        self.window.len() / WORD_ELEMENTS
    }

    /// The bits of its elements from `first` on as bf16, as many as `out` has room for, by all threads.
    pub fn bf16_bits(&self, first: usize, out: &mut [u16]) {
        let Self { raw, window, .. } = self;
        if window.is_contiguous() {
            return raw.bf16_bits(window.place(first), out);
        }
        let width = window.width();
        let head = (width - first % width).min(out.len());
        let (begun, rows) = out.split_at_mut(head);
        raw.bf16_bits(window.place(first), begun);
        let rows = rows.par_chunks_mut(width).enumerate();
        rows.for_each(|(row, out)| raw.bf16_bits(window.place(first + head + row * width), out));
    }
}

impl<'a> Tensors<'a> {
    /// Those that `shard` has of a model whose shapes are `whole`.
    pub fn find(checkpoint: &'a Checkpoint, whole: &WeightSizes, shard: Shard) -> Result<Self> {
        let WeightSizes { hidden, queries, keys, mlp, head_dim, .. } = *whole;
        let mut tensors = Self { norms: Vec::new(), matrices: Vec::new(), shard };
        let embedding = [("model.embed_tokens.weight", whole.vocab)];
        tensors.stack(checkpoint, whole, Matrix::Embedding, &embedding)?;
        for layer in 0..whole.layers {
            let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
            let mut stack = |kind, parts: &[(&str, usize)]| {
                let names: Vec<_> = parts.iter().map(|&(part, rows)| (name(part), rows)).collect();
                tensors.stack(checkpoint, whole, Matrix::Layer(layer, kind), &names)
            };
            let projections =
                [("self_attn.q_proj", queries), ("self_attn.k_proj", keys), ("self_attn.v_proj", keys)];
            stack(LayerMatrix::Qkv, &projections)?;
            stack(LayerMatrix::Output, &[("self_attn.o_proj", hidden)])?;
            stack(LayerMatrix::GateUp, &[("mlp.gate_proj", mlp), ("mlp.up_proj", mlp)])?;
            stack(LayerMatrix::Down, &[("mlp.down_proj", hidden)])?;
            let mut norm = |kind, part, width| -> Result<()> {
                let raw = checkpoint.raw(&name(part), &[width])?;
                tensors.norms.push((Norm { layer, kind }, raw));
                Ok(())
            };
            norm(NormKind::Attention, "input_layernorm", hidden)?;
            if whole.head_norms {
                norm(NormKind::Query, "self_attn.q_norm", head_dim)?;
                norm(NormKind::Key, "self_attn.k_norm", head_dim)?;
            }
            norm(NormKind::Mlp, "post_attention_layernorm", hidden)?;
        }
        let last = Norm { layer: whole.layers, kind: NormKind::Final };
        tensors.norms.push((last, checkpoint.raw("model.norm.weight", &[hidden])?));
        if !whole.tied {
            tensors.stack(checkpoint, whole, Matrix::Head, &[("lm_head.weight", whole.vocab)])?;
        }
        Ok(tensors)
    }

    /// Tensors of these names and rows, one below the other, each a window of the matrix. Rows are whole words, so every piece begins
    /// at one.
    fn stack(
        &mut self,
        checkpoint: &'a Checkpoint,
        whole: &WeightSizes,
        matrix: Matrix,
        parts: &[(impl AsRef<str>, usize)],
    ) -> Result<()> {
        let (mut above, mut at) = (0, 0);
        for ((name, rows), window) in parts.iter().zip(matrix.windows(whole, self.shard)?) {
            let raw = checkpoint.raw(name.as_ref(), &[*rows, window.stride])?;
            let Window { rows: of_matrix, columns, stride } = window;
            let window = Window { rows: of_matrix.start - above..of_matrix.end - above, columns, stride };
            let piece = Piece { matrix, at, raw, window };
            at += piece.words();
            above += rows;
            self.matrices.push(piece);
        }
        Ok(())
    }

    pub fn norm(&self, norm: Norm) -> RawTensor<'a> {
        let found = self.norms.iter().find(|(known, _)| *known == norm);
        found.expect("every norm was found").1
    }
}
