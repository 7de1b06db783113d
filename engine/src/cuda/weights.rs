//! A model's weights in GPU memory.

use std::path::Path;

use spinkv::backend::cuda::driver::{Context, DeviceBuffer, Stream};
use spinkv::backend::cuda::kernels::{FillRandom, Kernels};
use spinkv::memory::Word;
use spinkv_kernels::abi::WORD_ELEMENTS;

use super::sizes::{WeightBytes, WeightSizes};
use super::staging::Staging;
use crate::checkpoint::{Checkpoint, RawTensor};
use crate::config::ModelConfig;
use crate::error::{Error, Result};

/// Words of a staging buffer, 32 MiB: enough that a copy's own time hides what begins and ends it.
const STAGING_WORDS: usize = (32 << 20) / size_of::<Word>();

/// Staging buffers: one is filled while the GPU copies out of the others.
const STAGING_BUFFERS: usize = 3;

/// The standard deviation of random weights, the `initializer_range` of both families: outputs of a normed input are then of the size
/// of the input, and a residual stream of 80 layers stays within a hundred.
const RANDOM_DEVIATION: f32 = 0.02;

/// The weights of a model. Matrices are bf16, `[outputs, inputs]` row-major; norms are f32.
#[derive(Debug)]
pub struct DeviceWeights {
    /// `[vocab, hidden]`; also the head where there is none.
    pub embedding: DeviceBuffer<Word>,
    /// The layers.
    pub layers: Vec<DeviceLayer>,
    /// `[hidden]`.
    pub final_norm: DeviceBuffer<f32>,
    /// `[vocab, hidden]`; `None` where the embedding is the head.
    pub head: Option<DeviceBuffer<Word>>,
    sizes: WeightSizes,
}

/// The weights of one layer.
#[derive(Debug)]
pub struct DeviceLayer {
    /// `[hidden]`, before attention.
    pub attention_norm: DeviceBuffer<f32>,
    /// `[(query_heads + 2 kv_heads) * head_dim, hidden]`: the queries' rows, the keys', the values'.
    pub qkv: DeviceBuffer<Word>,
    /// `[head_dim]`, over each query head; Qwen3 only.
    pub query_norm: Option<DeviceBuffer<f32>>,
    /// `[head_dim]`, over each key head; Qwen3 only.
    pub key_norm: Option<DeviceBuffer<f32>>,
    /// `[hidden, query_heads * head_dim]`.
    pub output: DeviceBuffer<Word>,
    /// `[hidden]`, before the MLP.
    pub mlp_norm: DeviceBuffer<f32>,
    /// `[2 * mlp, hidden]`: the gate's rows, then the up projection's.
    pub gate_up: DeviceBuffer<Word>,
    /// `[hidden, mlp]`.
    pub down: DeviceBuffer<Word>,
}

impl DeviceWeights {
    /// Loads the checkpoint in `dir`, whose configuration is `config` (of fewer layers, if not all are wanted). f16 and f32 are rounded to
    /// bf16. `progress` hears of (done, total) bytes of GPU memory. Returns when all of it is there, for whichever stream.
    ///
    /// # Errors
    /// Those of [`WeightSizes::new`] and [`Checkpoint::open`]; a tensor that is missing or has another shape than the configuration calls
    /// for; [`Error::GpuMemory`] before anything is uploaded; a refused call of the driver.
    pub fn open(
        stream: &Stream,
        dir: impl AsRef<Path>,
        config: &ModelConfig,
        progress: impl FnMut(u64, u64),
    ) -> Result<Self> {
        let checkpoint = Checkpoint::open(dir)?;
        Self::load(stream, &checkpoint, config, STAGING_WORDS, progress)
    }

    fn load(
        stream: &Stream,
        checkpoint: &Checkpoint,
        config: &ModelConfig,
        staging_words: usize,
        mut progress: impl FnMut(u64, u64),
    ) -> Result<Self> {
        let sizes = WeightSizes::new(config)?;
        let tensors = Tensors::find(checkpoint, &sizes)?;
        check_memory(stream.context(), &sizes)?;
        let total = sizes.bytes().total();
        // Norms come first: they are small, and each write of one waits for the stream.
        let weights = Self::allocate(stream.context(), sizes, |_, tensor| {
            let elements = tensors.norm(tensor).to_f32();
            Ok(DeviceBuffer::from_slice(stream, &elements)?)
        })?;
        let mut done = sizes.bytes().norms;
        progress(done, total);

        let longest = tensors.matrices.iter().map(|piece| piece.raw.len() / WORD_ELEMENTS).max().unwrap_or(0);
        let mut staging = Staging::new(stream.context(), STAGING_BUFFERS, staging_words.min(longest).max(1))?;
        for piece in &tensors.matrices {
            let target = weights.matrix(piece.matrix);
            let len = piece.raw.len() / WORD_ELEMENTS;
            let fill = |first: usize, words: &mut [Word]| {
                piece.raw.bf16_bits(first * WORD_ELEMENTS, bytemuck::cast_slice_mut(words));
            };
            staging.upload(stream, target, piece.at, len, fill, |words| {
                done += (words * size_of::<Word>()) as u64;
                progress(done, total);
            })?;
        }
        stream.synchronize()?;
        Ok(weights)
    }

    /// Random weights of a model's shape, made on the GPU: nearly normal with a standard deviation of 0.02, norms of 1. The same seed
    /// gives the same weights everywhere, and the first layers are the same however many there are.
    ///
    /// # Errors
    /// Those of [`WeightSizes::new`], [`Error::GpuMemory`], or a refused call of the driver.
    pub fn random(stream: &Stream, kernels: &Kernels, config: &ModelConfig, seed: u64) -> Result<Self> {
        let sizes = WeightSizes::new(config)?;
        check_memory(stream.context(), &sizes)?;
        let weights = Self::allocate(stream.context(), sizes, |len, _| {
            Ok(DeviceBuffer::from_slice(stream, &vec![1.0; len])?)
        })?;
        for matrix in Matrix::all(&sizes) {
            let (out, seed) = (weights.matrix(matrix), matrix.seed(seed));
            FillRandom { out, seed, deviation: RANDOM_DEVIATION }.launch(kernels, stream)?;
        }
        stream.synchronize()?;
        Ok(weights)
    }

    /// The shapes.
    pub fn sizes(&self) -> &WeightSizes {
        &self.sizes
    }

    /// Bytes in GPU memory, by kind.
    pub fn bytes(&self) -> WeightBytes {
        self.sizes.bytes()
    }

    /// The head, which may be the embedding.
    pub fn head(&self) -> &DeviceBuffer<Word> {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// Memory for all of it, the norms filled by `norm`, which is told how long and which.
    fn allocate(
        context: &Context,
        sizes: WeightSizes,
        norm: impl Fn(usize, Norm) -> Result<DeviceBuffer<f32>>,
    ) -> Result<Self> {
        let matrix = |shape| DeviceBuffer::uninit(context, WeightSizes::words(shape));
        let layer = |index: usize| -> Result<DeviceLayer> {
            let head_norm = |kind| {
                let norm = || norm(sizes.head_dim, Norm { layer: index, kind });
                sizes.head_norms.then(norm).transpose()
            };
            Ok(DeviceLayer {
                attention_norm: norm(sizes.hidden, Norm { layer: index, kind: NormKind::Attention })?,
                qkv: matrix(sizes.qkv())?,
                query_norm: head_norm(NormKind::Query)?,
                key_norm: head_norm(NormKind::Key)?,
                output: matrix(sizes.output())?,
                mlp_norm: norm(sizes.hidden, Norm { layer: index, kind: NormKind::Mlp })?,
                gate_up: matrix(sizes.gate_up())?,
                down: matrix(sizes.down())?,
            })
        };
        Ok(Self {
            embedding: matrix(sizes.embedding())?,
            layers: (0..sizes.layers).map(layer).collect::<Result<_>>()?,
            final_norm: norm(sizes.hidden, Norm { layer: sizes.layers, kind: NormKind::Final })?,
            head: (!sizes.tied).then(|| matrix(sizes.embedding())).transpose()?,
            sizes,
        })
    }

    fn matrix(&self, matrix: Matrix) -> &DeviceBuffer<Word> {
        match matrix {
            Matrix::Embedding => &self.embedding,
            Matrix::Head => self.head(),
            Matrix::Layer(index, kind) => {
                let layer = &self.layers[index];
                match kind {
                    LayerMatrix::Qkv => &layer.qkv,
                    LayerMatrix::Output => &layer.output,
                    LayerMatrix::GateUp => &layer.gate_up,
                    LayerMatrix::Down => &layer.down,
                }
            }
        }
    }
}

/// Refuses what the GPU has no room for, before anything is taken.
fn check_memory(context: &Context, sizes: &WeightSizes) -> Result<()> {
    let (needed, memory) = (sizes.gpu_bytes(), context.memory()?);
    if needed > memory.free_bytes {
        return Err(Error::GpuMemory { needed, free: memory.free_bytes, total: memory.total_bytes });
    }
    Ok(())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Matrix {
    Embedding,
    Head,
    Layer(usize, LayerMatrix),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LayerMatrix {
    Qkv,
    Output,
    GateUp,
    Down,
}

impl Matrix {
    /// All that there are, the head only where it is one of its own.
    fn all(sizes: &WeightSizes) -> impl Iterator<Item = Self> + use<> {
        const OF_LAYER: [LayerMatrix; 4] =
            [LayerMatrix::Qkv, LayerMatrix::Output, LayerMatrix::GateUp, LayerMatrix::Down];
        let layers = (0..sizes.layers).flat_map(|layer| OF_LAYER.map(|kind| Self::Layer(layer, kind)));
        let head = (!sizes.tied).then_some(Self::Head);
        [Self::Embedding].into_iter().chain(layers).chain(head)
    }

    /// A seed of its own: the model's and the matrix's number, mixed (the finaliser of SplitMix64) so that neighbouring seeds
    /// and matrices share nothing.
    fn seed(self, seed: u64) -> u64 {
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
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Norm {
    /// The number of layers for the final one.
    layer: usize,
    kind: NormKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NormKind {
    Attention,
    Query,
    Key,
    Mlp,
    Final,
}

/// Every tensor of a checkpoint, found and of the right shape before any memory is taken.
struct Tensors<'a> {
    norms: Vec<(Norm, RawTensor<'a>)>,
    matrices: Vec<Piece<'a>>,
}

/// A tensor that is all or part of a matrix.
struct Piece<'a> {
    matrix: Matrix,
    /// The matrix's word that it begins at.
    at: usize,
    raw: RawTensor<'a>,
}

impl<'a> Tensors<'a> {
    fn find(checkpoint: &'a Checkpoint, sizes: &WeightSizes) -> Result<Self> {
        let WeightSizes { hidden, queries, keys, mlp, head_dim, .. } = *sizes;
        let mut tensors = Self { norms: Vec::new(), matrices: Vec::new() };
        tensors.stack(
            checkpoint,
            Matrix::Embedding,
            &[("model.embed_tokens.weight", sizes.vocab)],
            hidden,
        )?;
        for layer in 0..sizes.layers {
            let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
            let mut stack = |kind, parts: &[(&str, usize)], columns| {
                let names: Vec<_> = parts.iter().map(|&(part, rows)| (name(part), rows)).collect();
                tensors.stack(checkpoint, Matrix::Layer(layer, kind), &names, columns)
            };
            let projections =
                [("self_attn.q_proj", queries), ("self_attn.k_proj", keys), ("self_attn.v_proj", keys)];
            stack(LayerMatrix::Qkv, &projections, hidden)?;
            stack(LayerMatrix::Output, &[("self_attn.o_proj", hidden)], queries)?;
            stack(LayerMatrix::GateUp, &[("mlp.gate_proj", mlp), ("mlp.up_proj", mlp)], hidden)?;
            stack(LayerMatrix::Down, &[("mlp.down_proj", hidden)], mlp)?;
            let mut norm = |kind, part, width| -> Result<()> {
                let raw = checkpoint.raw(&name(part), &[width])?;
                tensors.norms.push((Norm { layer, kind }, raw));
                Ok(())
            };
            norm(NormKind::Attention, "input_layernorm", hidden)?;
            if sizes.head_norms {
                norm(NormKind::Query, "self_attn.q_norm", head_dim)?;
                norm(NormKind::Key, "self_attn.k_norm", head_dim)?;
            }
            norm(NormKind::Mlp, "post_attention_layernorm", hidden)?;
        }
        let last = Norm { layer: sizes.layers, kind: NormKind::Final };
        tensors.norms.push((last, checkpoint.raw("model.norm.weight", &[hidden])?));
        if !sizes.tied {
            tensors.stack(checkpoint, Matrix::Head, &[("lm_head.weight", sizes.vocab)], hidden)?;
        }
        Ok(tensors)
    }

    /// Tensors of these names and rows, one below the other. Rows are whole words, so every piece begins at one.
    fn stack(
        &mut self,
        checkpoint: &'a Checkpoint,
        matrix: Matrix,
        parts: &[(impl AsRef<str>, usize)],
        columns: usize,
    ) -> Result<()> {
        let mut at = 0;
        for (name, rows) in parts {
            let raw = checkpoint.raw(name.as_ref(), &[*rows, columns])?;
            self.matrices.push(Piece { matrix, at, raw });
            at += raw.len() / WORD_ELEMENTS;
        }
        Ok(())
    }

    fn norm(&self, norm: Norm) -> RawTensor<'a> {
        let found = self.norms.iter().find(|(known, _)| *known == norm);
        found.expect("every norm was found").1
    }
}

#[cfg(test)]
mod tests;
