use std::ops::Range;

use spinkv::Shard;

use super::super::WeightSizes;
use crate::error::Result;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Matrix {
    Embedding,
    Head,
    Layer(usize, LayerMatrix),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LayerMatrix {
    Qkv,
    Output,
    GateUp,
    Down,
}

impl Matrix {
    /// All that there are, the head only where it is one of its own.
    pub fn all(sizes: &WeightSizes) -> impl Iterator<Item = Self> + use<> {
        const OF_LAYER: [LayerMatrix; 4] =
            [LayerMatrix::Qkv, LayerMatrix::Output, LayerMatrix::GateUp, LayerMatrix::Down];
        let layers = (0..sizes.layers).flat_map(|layer| OF_LAYER.map(|kind| Self::Layer(layer, kind)));
        let head = (!sizes.tied).then_some(Self::Head);
        [Self::Embedding].into_iter().chain(layers).chain(head)
    }

    /// A seed of its own: the model's and the matrix's number, mixed (the finaliser of SplitMix64) so that neighbouring seeds
    /// and matrices share nothing.
    pub fn seed(self, seed: u64) -> u64 {
        let number = match self {
            Self::Embedding => 1,
            Self::Head => 2,
            Self::Layer(layer, kind) => 3 + 4 * layer as u64 + kind as u64,
        };
        let mut mixed = seed.wrapping_add(number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Its rows in a model whose shapes are `whole`.
    pub fn rows(self, whole: &WeightSizes) -> usize {
        let [rows, _] = match self {
            Self::Embedding | Self::Head => whole.embedding(),
            Self::Layer(_, LayerMatrix::Qkv) => whole.qkv(),
            Self::Layer(_, LayerMatrix::Output) => whole.output(),
            Self::Layer(_, LayerMatrix::GateUp) => whole.gate_up(),
            Self::Layer(_, LayerMatrix::Down) => whole.down(),
        };
        rows
    }

    /// Where a shard's part of the matrix lies in that of the whole model, whose shapes are `whole`: windows that lie behind each other in
    /// the part, one for each tensor that the matrix is made of. Query, key and value heads, and the MLP's outputs, are rows of what
    /// makes them and columns of what takes them; embedding and head are everywhere.
    ///
    /// # Errors
    /// Numbers that cannot be shared out.
    pub fn windows(self, whole: &WeightSizes, shard: Shard) -> Result<Vec<Window>> {
        let WeightSizes { hidden, queries, keys, mlp, head_dim, .. } = *whole;
        let heads = |width: usize| -> Result<Range<usize>> {
            let heads = shard.part("attention heads", width / head_dim)?;
            Ok(heads.start * head_dim..heads.end * head_dim)
        };
        let rows = |first: usize, rows: Range<usize>| Window {
            rows: first + rows.start..first + rows.end,
            columns: 0..hidden,
            stride: hidden,
        };
        let columns = |columns, stride| Window { rows: 0..hidden, columns, stride };
        let of_mlp = || shard.part("intermediate_size", mlp);
        Ok(match self {
            Self::Embedding | Self::Head => vec![rows(0, 0..whole.vocab)],
            Self::Layer(_, LayerMatrix::Qkv) => vec![
                rows(0, heads(queries)?),
                rows(queries, heads(keys)?),
                rows(queries + keys, heads(keys)?),
            ],
            Self::Layer(_, LayerMatrix::Output) => vec![columns(heads(queries)?, queries)],
            Self::Layer(_, LayerMatrix::GateUp) => vec![rows(0, of_mlp()?), rows(mlp, of_mlp()?)],
            Self::Layer(_, LayerMatrix::Down) => vec![columns(of_mlp()?, mlp)],
        })
    }
}

/// Rows and columns of a row-major matrix, in elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Window {
    pub rows: Range<usize>,
    pub columns: Range<usize>,
    /// Columns of the matrix.
    pub stride: usize,
}

impl Window {
    /// Elements of a row of it.
    pub fn width(&self) -> usize {
        self.columns.len()
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.rows.len() * self.width()
    }

    /// Whether its rows are whole, so that they lie behind each other in the matrix, too.
    pub fn is_contiguous(&self) -> bool {
        self.width() == self.stride
    }

    /// The matrix's element that is its element `at`.
    pub fn place(&self, at: usize) -> usize {
        (self.rows.start + at / self.width()) * self.stride + self.columns.start + at % self.width()
    }
}
