use std::sync::Arc;

use spinkv::backend::cuda::blas::{BlasError, BlasLt, Product, ProductOut};
use spinkv::backend::cuda::driver::{DeviceBuffer, Stream};
use spinkv::backend::cuda::kernels::{Kernels, Linear, LinearOutput, Swiglu};
use spinkv::memory::Word;
use spinkv_kernels::abi::WORD_ELEMENTS;

use super::WeightSizes;
use crate::error::Result;

/// Up to so many tokens our own kernels multiply, which stream weights past the tokens and overlap: they are faster than cuBLASLt's there
/// (benches/results/2026-11-27-h100-engine.md), and without it they multiply all.
const STREAMED_TOKENS: usize = 16;

/// Whether products of many tokens go through cuBLASLt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BlasUse {
    /// Where the machine has it; our own kernels where not.
    #[default]
    IfPresent,
    /// Without it nothing runs.
    Required,
    /// Our own kernels always.
    Never,
}

/// Products of activations and weights, each by the kernel that suits the number of tokens.
#[derive(Debug)]
pub(super) struct Products {
    kernels: Kernels,
    stream: Arc<Stream>,
    blas: Option<BlasLt>,
    /// Why there is no cuBLASLt, if it was looked for.
    missing: Option<BlasError>,
    partials: DeviceBuffer<Word>,
    arrivals: DeviceBuffer<u32>,
}

/// A matrix of weights, `[n, k]` bf16.
#[derive(Clone, Copy, Debug)]
pub(super) struct Weights<'a> {
    pub words: &'a DeviceBuffer<Word>,
    pub shape: [usize; 2],
}

/// Where products go: `[tokens, n]`.
#[derive(Clone, Copy, Debug)]
pub(super) enum Out<'a> {
    Bf16(&'a DeviceBuffer<Word>),
    F32(&'a DeviceBuffer<f32>),
    /// Added to what is there.
    AddF32(&'a DeviceBuffer<f32>),
}

impl Products {
    pub fn new(
        stream: Arc<Stream>,
        kernels: Kernels,
        sizes: &WeightSizes,
        blas_use: BlasUse,
    ) -> Result<Self> {
        let (blas, missing) = match blas_use {
            BlasUse::Never => (None, None),
            BlasUse::Required => (Some(BlasLt::load(stream.context())?), None),
            BlasUse::IfPresent => match BlasLt::load(stream.context()) {
                Ok(blas) => (Some(blas), None),
                Err(missing @ (BlasError::Missing { .. } | BlasError::MissingSymbol { .. })) => {
                    (None, Some(missing))
                }
                Err(other) => return Err(other.into()),
            },
        };
        let widest = [sizes.qkv(), sizes.output(), sizes.gate_up(), sizes.down(), sizes.embedding()];
        let widest = widest.into_iter().map(|[n, _]| n).max().unwrap_or(0);
        Ok(Self {
            partials: DeviceBuffer::zeroed(&stream, Linear::partials(&kernels))?,
            arrivals: DeviceBuffer::zeroed(&stream, Linear::arrivals(widest as u32))?,
            kernels,
            stream,
            blas,
            missing,
        })
    }

    /// Which library multiplies where there are many tokens, and why it is not cuBLASLt, if that was looked for.
    pub fn description(&self) -> String {
        match (&self.blas, &self.missing) {
            (Some(blas), _) => format!("cuBLASLt {} ({})", blas.version(), blas.path().display()),
            (None, Some(missing)) => format!("own kernels: {missing}"),
            (None, None) => "own kernels".to_owned(),
        }
    }

    /// Bytes of scratch on the GPU.
    pub fn bytes(&self) -> u64 {
        let workspace =
            if self.blas.is_some() { spinkv::backend::cuda::blas::WORKSPACE_BYTES as u64 } else { 0 };
        self.partials.bytes() + self.arrivals.bytes() + workspace
    }

    /// Whether the gate's products of so many tokens, or fewer, pass through memory.
    pub fn needs_scratch(&self, tokens: usize) -> bool {
        self.blas.is_some() && tokens > STREAMED_TOKENS
    }

    /// Async: `x`, `[tokens, k]`, times the transpose of the weights.
    pub fn product(
        &self,
        weights: Weights<'_>,
        x: &DeviceBuffer<Word>,
        tokens: usize,
        out: Out<'_>,
    ) -> Result<()> {
        let Weights { words, shape: [n, k] } = weights;
        if let (Some(blas), true) = (&self.blas, tokens > STREAMED_TOKENS) {
            let out = match out {
                Out::Bf16(words) => ProductOut::Bf16(words),
                Out::F32(floats) => ProductOut::F32(floats),
                Out::AddF32(floats) => ProductOut::AddF32(floats),
            };
            let product =
                Product { tokens, n, k, x, x_first_token: 0, weights: words, out, out_first_token: 0 };
            return Ok(blas.product(&self.stream, &product)?);
        }
        let output = match out {
            Out::Bf16(words) => LinearOutput::Bf16(words),
            Out::F32(floats) => LinearOutput::F32(floats),
            Out::AddF32(floats) => LinearOutput::AddF32(floats),
        };
        self.linear(weights, x, tokens, output)
    }

    /// Async: the gated activation of the MLP: `[tokens, mlp]` bf16 of weights `[2 * mlp, hidden]`. `scratch` is `[tokens, 2 * mlp]` where
    /// there are many tokens.
    pub fn gated(
        &self,
        weights: Weights<'_>,
        x: &DeviceBuffer<Word>,
        tokens: usize,
        scratch: &DeviceBuffer<Word>,
        activated: &DeviceBuffer<Word>,
    ) -> Result<()> {
        if !self.needs_scratch(tokens) {
            return self.linear(weights, x, tokens, LinearOutput::GatedBf16(activated));
        }
        self.product(weights, x, tokens, Out::Bf16(scratch))?;
        let width = (weights.shape[0] / 2) as u32;
        let swiglu = Swiglu { gate_up: scratch, tokens: tokens as u32, width, activated };
        // SAFETY: the scratch was written by the launch before, and all of it is used on this stream alone.
        Ok(unsafe { swiglu.launch(&self.kernels, &self.stream) }?)
    }

    fn linear(
        &self,
        Weights { words, shape: [n, k] }: Weights<'_>,
        x: &DeviceBuffer<Word>,
        tokens: usize,
        output: LinearOutput<'_>,
    ) -> Result<()> {
        let launch = Linear {
            weights: words,
            x,
            tokens: tokens as u32,
            n: n as u32,
            k_words: (k / WORD_ELEMENTS) as u32,
            output,
            partials: &self.partials,
            arrivals: &self.arrivals,
            overlaps: true,
        };
        // SAFETY: arrivals are 0 between launches, weights are never written, and all tensors are used on this stream alone.
        Ok(unsafe { launch.launch(&self.kernels, &self.stream) }?)
    }
}
