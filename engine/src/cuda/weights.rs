//! A model's weights in GPU memory, all of them or what one of several GPUs has.

mod matrices;
mod tensors;

use std::path::Path;

use spinkv::Shard;
use spinkv::backend::cuda::driver::{Context, DeviceBuffer, Stream};
use spinkv::backend::cuda::kernels::{FillRandom, Kernels};
use spinkv::memory::Word;
use spinkv_kernels::abi::WORD_ELEMENTS;

use super::sizes::{WeightBytes, WeightSizes};
use super::staging::Staging;
use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use matrices::{LayerMatrix, Matrix};
use tensors::{Norm, NormKind, Piece, Tensors};

/// Words of a staging buffer, 32 MiB: enough that a copy's own time hides what begins and ends it.
const STAGING_WORDS: usize = (32 << 20) / size_of::<Word>();

/// Staging buffers: one is filled while the GPU copies out of the others.
const STAGING_BUFFERS: usize = 3;

/// The standard deviation of random weights, the `initializer_range` of both families: outputs of a normed input are then of the size
/// of the input, and a residual stream of 80 layers stays within a hundred.
const RANDOM_DEVIATION: f32 = 0.02;

/// The weights of a model, or a [shard](Shard)'s part of them, whose sizes are then those that follow. Matrices are bf16, `[outputs, inputs]` row-major; norms are f32.
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
        Self::open_shard(stream, dir, config, Shard::WHOLE, progress)
    }

    /// The same of `shard`'s part alone, which is all that is read.
    ///
    /// # Errors
    /// Those of [`open`](Self::open) and of [`ModelConfig::shard`].
    pub fn open_shard(
        stream: &Stream,
        dir: impl AsRef<Path>,
        config: &ModelConfig,
        shard: Shard,
        progress: impl FnMut(u64, u64),
    ) -> Result<Self> {
        let checkpoint = Checkpoint::open(dir)?;
        Self::load(stream, &checkpoint, (config, shard), STAGING_WORDS, progress)
    }

    fn load(
        stream: &Stream,
        checkpoint: &Checkpoint,
        (config, shard): (&ModelConfig, Shard),
        staging_words: usize,
        mut progress: impl FnMut(u64, u64),
    ) -> Result<Self> {
        let sizes = WeightSizes::new(&config.shard(shard)?)?;
        let tensors = Tensors::find(checkpoint, &WeightSizes::new(config)?, shard)?;
        check_memory(stream.context(), &sizes)?;
        let total = sizes.bytes().total();
        // Norms come first: they are small, and each write of one waits for the stream.
        let weights = Self::allocate(stream.context(), sizes, |_, tensor| {
            let elements = tensors.norm(tensor).to_f32();
            Ok(DeviceBuffer::from_slice(stream, &elements)?)
        })?;
        let mut done = sizes.bytes().norms;
        progress(done, total);

        let longest = tensors.matrices.iter().map(Piece::words).max().unwrap_or(0);
        let mut staging = Staging::new(stream.context(), STAGING_BUFFERS, staging_words.min(longest).max(1))?;
        for piece in &tensors.matrices {
            let target = weights.matrix(piece.matrix);
            let fill = |first: usize, words: &mut [Word]| {
                piece.bf16_bits(first * WORD_ELEMENTS, bytemuck::cast_slice_mut(words));
            };
            staging.upload(stream, target, piece.at, piece.words(), fill, |words| {
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
        Self::random_shard(stream, kernels, config, Shard::WHOLE, seed)
    }

    /// `shard`'s part of the same weights.
    ///
    /// # Errors
    /// Those of [`random`](Self::random) and of [`ModelConfig::shard`].
    pub fn random_shard(
        stream: &Stream,
        kernels: &Kernels,
        config: &ModelConfig,
        shard: Shard,
        seed: u64,
    ) -> Result<Self> {
        let (whole, sizes) = (WeightSizes::new(config)?, WeightSizes::new(&config.shard(shard)?)?);
        check_memory(stream.context(), &sizes)?;
        let weights = Self::allocate(stream.context(), sizes, |len, _| {
            Ok(DeviceBuffer::from_slice(stream, &vec![1.0; len])?)
        })?;
        let fill = |out: &DeviceBuffer<Word>, seed| {
            FillRandom { out, seed, deviation: RANDOM_DEVIATION }.launch(kernels, stream)
        };
        // Numbers follow from their places, so a shard's are filled as those of all, and then taken out.
        let widest = if shard.is_whole() { 0 } else { whole.widest_layer_words() };
        let scratch = DeviceBuffer::uninit(stream.context(), widest)?;
        for matrix in Matrix::all(&sizes) {
            let (out, seed) = (weights.matrix(matrix), matrix.seed(seed));
            let windows = matrix.windows(&whole, shard)?;
            let of_all = windows.iter().map(|window| window.stride).max().unwrap_or(0) * matrix.rows(&whole);
            if out.len() * WORD_ELEMENTS == of_all {
                fill(out, seed)?;
                continue;
            }
            let filled = scratch.part(0..of_all / WORD_ELEMENTS)?;
            fill(&filled, seed)?;
            let mut at = 0;
            for window in windows {
                let [from, width, stride] =
                    [window.place(0), window.width(), window.stride].map(|elements| elements / WORD_ELEMENTS);
                out.copy_rows_from(stream, at, &filled, from, (window.rows.len(), width, stride))?;
                at += window.len() / WORD_ELEMENTS;
            }
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

#[cfg(test)]
mod tests;
