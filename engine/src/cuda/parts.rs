use std::sync::Arc;

use spinkv::backend::cuda::CudaBackend;
use spinkv::backend::cuda::driver::{DeviceBuffer, Event, Stream};
use spinkv::backend::cuda::kernels::{Embed, HeadNorms, Kernels, Positions, RmsNorm, Rotate};
use spinkv::memory::Word;
use spinkv_kernels::abi::WORD_ELEMENTS;
use spinkv_kernels::abi::model::sample::SampleParams;

use super::activations::{Activations, KeysValues};
use super::model::CudaOptions;
use super::parallel::Rank;
use super::product::{Out, Products, Weights};
use super::{DeviceLayer, DeviceWeights, WeightSizes};
use crate::config::ModelConfig;
use crate::error::Result;
use crate::model::rope::Rope;

/// Tokens of a prompt that pass through a layer at a time: enough for products at full speed, and few enough that the widest
/// activations are held for these alone.
const PREFILL_CHUNK: usize = 8192;

/// What the forward pass is made with, beside weights and KV memory.
#[derive(Debug)]
pub(super) struct Parts {
    pub stream: Arc<Stream>,
    pub kernels: Kernels,
    pub products: Arc<Products>,
    /// Of several GPUs that share the model.
    pub rank: Option<Arc<Rank>>,
    /// `[head_dim / 2]`, and the factor of sines and cosines.
    pub frequencies: DeviceBuffer<f32>,
    pub magnitude: f32,
    pub eps: f32,
    pub query_heads: usize,
    pub kv_heads: usize,
    /// Of a decode step: token ids `[requests]`, residual `[requests, hidden]`, logits `[requests, vocab]`.
    pub ids: DeviceBuffer<u32>,
    pub residual: DeviceBuffer<f32>,
    pub logits: DeviceBuffer<f32>,
    /// `[requests]`: how tokens are drawn.
    pub draws: DeviceBuffer<SampleParams>,
    /// `[requests]`: the likeliest tokens, and scratch.
    pub likeliest: DeviceBuffer<u32>,
    pub greatest: DeviceBuffer<u64>,
    pub arrivals: DeviceBuffer<u32>,
    pub step: Activations,
    pub step_kv: KeysValues,
    /// Of a prompt: token ids, residual of all its tokens, activations of a chunk, and keys and values of two layers in turn.
    pub prompt_ids: DeviceBuffer<u32>,
    pub prompt_residual: DeviceBuffer<f32>,
    pub chunk: Activations,
    pub chunk_tokens: usize,
    pub prompt_kv: [KeysValues; 2],
    /// Before the last step's graph.
    pub began: Event,
    /// Behind the layers of a prompt of an even number, and of the others.
    pub layer_done: [Event; 2],
}

impl Parts {
    pub fn new(
        config: &ModelConfig,
        sizes: &WeightSizes,
        backend: &CudaBackend,
        options: &CudaOptions,
        rank: Option<Arc<Rank>>,
    ) -> Result<Self> {
        let (stream, kernels) = (backend.stream().clone(), backend.kernels().clone());
        let products = Arc::new(Products::new(stream.clone(), kernels.clone(), sizes, options.blas)?);
        let rope = Rope::new(&config.rope, config.head_dim);
        let (requests, max_tokens) = (backend.capacity(), backend.max_tokens());
        let chunk_tokens = PREFILL_CHUNK.min(max_tokens);
        let context = stream.context();
        Ok(Self {
            frequencies: DeviceBuffer::from_slice(&stream, rope.rotary().frequencies())?,
            magnitude: rope.rotary().magnitude(),
            eps: config.rms_norm_eps as f32,
            query_heads: config.query_heads,
            kv_heads: config.kv_heads,
            ids: DeviceBuffer::zeroed(&stream, requests)?,
            residual: DeviceBuffer::zeroed(&stream, requests * sizes.hidden)?,
            logits: DeviceBuffer::zeroed(&stream, requests * sizes.vocab)?,
            draws: DeviceBuffer::from_slice(&stream, &vec![SampleParams::default(); requests])?,
            likeliest: DeviceBuffer::zeroed(&stream, requests)?,
            greatest: DeviceBuffer::zeroed(&stream, requests)?,
            arrivals: DeviceBuffer::zeroed(&stream, requests)?,
            step: Activations::new(sizes, requests, products.needs_scratch(requests), &stream)?,
            step_kv: KeysValues::new(sizes, requests, &stream)?,
            prompt_ids: DeviceBuffer::zeroed(&stream, max_tokens)?,
            prompt_residual: DeviceBuffer::uninit(context, max_tokens * sizes.hidden)?,
            chunk: Activations::new(sizes, chunk_tokens, products.needs_scratch(chunk_tokens), &stream)?,
            chunk_tokens,
            prompt_kv: [
                KeysValues::new(sizes, max_tokens, &stream)?,
                KeysValues::new(sizes, max_tokens, &stream)?,
            ],
            began: Event::new(context)?,
            layer_done: [Event::untimed(context)?, Event::untimed(context)?],
            products,
            rank,
            stream,
            kernels,
        })
    }

    /// Before sums with other ranks are enqueued: goes on if all of them are `ready`.
    pub fn enter(&self, ready: Result<()>) -> Result<()> {
        match &self.rank {
            Some(rank) => rank.enter(ready),
            None => ready,
        }
    }

    /// Behind the last of them.
    pub fn exit(&self) {
        self.rank.iter().for_each(|rank| rank.exit());
    }

    /// Waits for the stream where another rank's failure could let it stand still; else whoever reads of it does.
    pub fn join_ranks(&self) -> Result<()> {
        self.rank.as_ref().map_or(Ok(()), |rank| rank.wait(&self.stream))
    }

    /// Waits for an event of the stream.
    pub fn wait_for(&self, event: &Event) -> Result<()> {
        match &self.rank {
            Some(rank) => rank.wait_for(event),
            None => Ok(event.synchronize()?),
        }
    }

    /// Bytes of activations, logits and scratch, and of what the longest prompt needs.
    pub fn bytes(&self) -> (u64, u64) {
        let activations = self.step.bytes()
            + self.step_kv.bytes()
            + self.chunk.bytes()
            + self.logits.bytes()
            + self.residual.bytes()
            + self.products.bytes();
        let [even, odd] = &self.prompt_kv;
        (activations, self.prompt_residual.bytes() + self.prompt_ids.bytes() + even.bytes() + odd.bytes())
    }

    pub fn embed(
        &self,
        weights: &DeviceWeights,
        ids: &DeviceBuffer<u32>,
        tokens: usize,
        residual: &DeviceBuffer<f32>,
    ) -> Result<()> {
        let hidden = weights.sizes().hidden as u32;
        let embed = Embed { ids, tokens: tokens as u32, embedding: &weights.embedding, hidden, residual };
        // SAFETY: all of it is used on this stream alone.
        Ok(unsafe { embed.launch(&self.kernels, &self.stream) }?)
    }

    /// Norm, projections, norms of heads and rotation: queries, and keys and values from token `first_token` on.
    #[expect(clippy::too_many_arguments, reason = "a layer's operands; a struct of them would have one use")]
    pub fn project(
        &self,
        sizes: &WeightSizes,
        layer: &DeviceLayer,
        residual: &DeviceBuffer<f32>,
        tokens: usize,
        to: &Activations,
        positions: Positions<'_>,
        first_token: usize,
        kv: &KeysValues,
    ) -> Result<()> {
        self.norm(residual, &layer.attention_norm, tokens, &to.normed)?;
        let qkv = Weights { words: &layer.qkv, shape: sizes.qkv() };
        self.products.product(qkv, &to.normed, tokens, Out::Bf16(&to.projected))?;
        let norms = layer.query_norm.as_ref().zip(layer.key_norm.as_ref());
        let rotate = Rotate {
            projected: &to.projected,
            tokens: tokens as u32,
            query_heads: self.query_heads as u32,
            kv_heads: self.kv_heads as u32,
            head_words: (sizes.head_dim / WORD_ELEMENTS) as u32,
            positions,
            frequencies: &self.frequencies,
            factor: self.magnitude,
            norms: norms.map(|(queries, keys)| HeadNorms { queries, keys, eps: self.eps }),
            queries: &to.queries,
            first_token: first_token as u32,
            keys: &kv.keys,
            values: &kv.values,
        };
        // SAFETY: all of it is used on this stream alone, but for keys and values, which the backend reads before they are written again.
        Ok(unsafe { rotate.launch(&self.kernels, &self.stream) }?)
    }

    /// Adds the attention's output and then the MLP to the residual stream.
    pub fn finish(
        &self,
        sizes: &WeightSizes,
        layer: &DeviceLayer,
        residual: &DeviceBuffer<f32>,
        tokens: usize,
        from: &Activations,
    ) -> Result<()> {
        let output = Weights { words: &layer.output, shape: sizes.output() };
        self.add_product(output, &from.attended, tokens, residual)?;
        self.norm(residual, &layer.mlp_norm, tokens, &from.normed)?;
        let gate_up = Weights { words: &layer.gate_up, shape: sizes.gate_up() };
        self.products.gated(gate_up, &from.normed, tokens, &from.gate_up, &from.activated)?;
        let down = Weights { words: &layer.down, shape: sizes.down() };
        self.add_product(down, &from.activated, tokens, residual)
    }

    /// Adds a product to the residual stream. Of several ranks, each of which has a part of the weights' columns, the first one adds its
    /// product and the others put theirs in the place of it, so that the sum over all has the residual once.
    fn add_product(
        &self,
        weights: Weights<'_>,
        x: &DeviceBuffer<Word>,
        tokens: usize,
        residual: &DeviceBuffer<f32>,
    ) -> Result<()> {
        let Some(rank) = &self.rank else {
            return self.products.product(weights, x, tokens, Out::AddF32(residual));
        };
        let out = if rank.is_first() { Out::AddF32(residual) } else { Out::F32(residual) };
        self.products.product(weights, x, tokens, out)?;
        rank.sum(&self.stream, residual, tokens * weights.shape[0])
    }

    pub fn norm(
        &self,
        residual: &DeviceBuffer<f32>,
        weight: &DeviceBuffer<f32>,
        tokens: usize,
        normed: &DeviceBuffer<Word>,
    ) -> Result<()> {
        let norm = RmsNorm { residual, weight, first_token: 0, tokens: tokens as u32, eps: self.eps, normed };
        // SAFETY: all of it is used on this stream alone.
        Ok(unsafe { norm.launch(&self.kernels, &self.stream) }?)
    }

    /// The logits of `tokens` normed tokens of a step.
    pub fn head(&self, weights: &DeviceWeights, tokens: usize) -> Result<()> {
        let head = Weights { words: weights.head(), shape: weights.sizes().embedding() };
        self.products.product(head, &self.step.normed, tokens, Out::F32(&self.logits))
    }

    pub fn read_logits(&self, sizes: &WeightSizes, tokens: usize) -> Result<Vec<f32>> {
        self.join_ranks()?;
        let mut logits = vec![0.0; tokens * sizes.vocab];
        self.logits.read(&self.stream, 0, &mut logits)?;
        Ok(logits)
    }
}
