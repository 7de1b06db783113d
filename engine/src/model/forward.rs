use std::mem;
use std::ops::ControlFlow;

use spinkv::backend::Backend;
use spinkv::backend::cpu::linalg::Old;
use spinkv::pipeline::{Pipeline, RequestId};

use super::rope::Rotations;
use super::weights::Layer;
use super::{Model, ops};
use crate::error::{Error, Result};

/// Tokens of a prompt that pass through a layer at a time. Large enough for full-speed matrix products, small
/// enough that the widest activations (queries, MLP) are held for this many tokens only. Where prompts share pages chunks are smaller.
pub const PREFILL_CHUNK: usize = 512;

/// The fewest tokens of a chunk that keep the machine busy.
const LEAST_CHUNK: usize = 128;

/// Tokens of a prompt that pass through a layer at a time, where prompts share pages in blocks of `block` tokens: whole blocks, or equal parts of
/// one. A prompt then has the same chunks behind a shared prefix as without one, and so the same bits: the order in which products are summed
/// depends on the tokens of a chunk alone.
fn prompt_chunk(block: Option<usize>) -> usize {
    let Some(mut chunk) = block else { return PREFILL_CHUNK };
    while chunk < LEAST_CHUNK {
        chunk *= 2;
    }
    while chunk > PREFILL_CHUNK && chunk.is_multiple_of(2) {
        chunk /= 2;
    }
    chunk
}

/// The positions of a prompt whose final hidden states are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// The last one, from which generation goes on.
    Last,
    /// All of them.
    All,
}

/// One request's part in a decode step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecodeToken {
    /// The request.
    pub request: RequestId,
    /// Its newest token.
    pub token: u32,
}

/// A prompt on its way through the layers: what [`Model::prompt_layer`] passes on from one to the next.
#[derive(Debug)]
pub struct Prompt {
    request: RequestId,
    wanted: Wanted,
    /// The residual stream of the tokens behind the prefix, `[tokens - prefix, hidden_size]`.
    hidden: Vec<f32>,
    /// Of the same tokens.
    rotations: Rotations,
    tokens: usize,
    /// Tokens that others have computed.
    prefix: usize,
    /// Tokens of a chunk.
    chunk: usize,
    /// Layers that are done.
    layer: usize,
}

impl Prompt {
    /// The request whose prompt it is.
    pub fn request(&self) -> RequestId {
        self.request
    }

    /// Tokens, from the first on, whose pages were there already.
    pub fn cached_tokens(&self) -> usize {
        self.prefix
    }

    /// The final hidden states of what is wanted, `[wanted tokens, hidden_size]`, once all layers are done.
    fn finish(&mut self) -> Vec<f32> {
        let mut hidden = mem::take(&mut self.hidden);
        if self.wanted == Wanted::Last {
            hidden.drain(..hidden.len() - hidden.len() / (self.tokens - self.prefix));
        }
        hidden
    }
}

impl Model {
    /// Passes a prompt through the model, layer by layer: only one layer's keys and values are held outside
    /// the KV memory at a time. `progress` hears of every chunk, as (done, total), and may break off.
    ///
    /// Returns the final hidden states of `wanted`, `[wanted tokens, hidden_size]`, for [`logits`](Self::logits).
    /// The last layer computes nothing for the others but their keys and values.
    ///
    /// # Errors
    /// Those of [`begin_prompt`](Self::begin_prompt) and [`prompt_layer`](Self::prompt_layer).
    pub fn prefill<B: Backend<Tensor = [f32]>>(
        &self,
        pipeline: &mut Pipeline<B>,
        request: RequestId,
        tokens: &[u32],
        wanted: Wanted,
        mut progress: impl FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<Vec<f32>> {
        let mut prompt = self.begin_prompt(pipeline, request, tokens, wanted)?;
        loop {
            if let Some(hidden) = self.prompt_layer(pipeline, &mut prompt, &mut progress)? {
                return Ok(hidden);
            }
        }
    }

    /// A prompt before its first layer. Where the backend shares pages between prompts, and only the last token's state is wanted, it begins
    /// behind those that are there.
    ///
    /// # Errors
    /// [`Error::TokenOutOfVocabulary`], [`Error::EmptyPrompt`], and those of [`Pipeline::share_prefix`]; nothing of the request has then changed.
    pub fn begin_prompt<B: Backend<Tensor = [f32]>>(
        &self,
        pipeline: &mut Pipeline<B>,
        request: RequestId,
        tokens: &[u32],
        wanted: Wanted,
    ) -> Result<Prompt> {
        if tokens.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        let vocab_size = self.config.vocab_size;
        if let Some(id) = tokens.iter().copied().find(|id| *id as usize >= vocab_size) {
            return Err(Error::TokenOutOfVocabulary { id, vocab_size });
        }
        let block = pipeline.backend().prefix_block();
        let chunk = prompt_chunk(block);
        let prefix = match block {
            Some(_) if wanted == Wanted::Last => pipeline.share_prefix(request, tokens, chunk)?,
            _ => 0,
        };
        Ok(Prompt {
            request,
            wanted,
            hidden: self.embed(tokens[prefix..].iter().copied())?,
            rotations: self.rope.rotations(prefix..tokens.len()),
            tokens: tokens.len(),
            prefix,
            chunk,
            layer: 0,
        })
    }

    /// The next layer of a prompt; decode steps of other requests may run between two of them. `progress` hears of every chunk, as (done,
    /// total) of the whole prompt, and may break off. After the last layer it returns the final hidden states of what is wanted.
    ///
    /// # Errors
    /// [`Error::Cancelled`] if `progress` broke off, and those of [`Pipeline::prefill`]; the prompt and its request can then only be dropped
    /// and released.
    pub fn prompt_layer<B: Backend<Tensor = [f32]>>(
        &self,
        pipeline: &mut Pipeline<B>,
        prompt: &mut Prompt,
        mut progress: impl FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<Option<Vec<f32>>> {
        let Prompt { request, wanted, ref mut hidden, ref rotations, tokens, prefix, chunk, layer: index } =
            *prompt;
        let (layers, layer) = (self.layers.len(), &self.layers[index]);
        let (query_heads, kv_heads) = (self.config.query_heads, self.config.kv_heads);
        let chunk_width = chunk * self.config.hidden_size;
        let chunks = (tokens - prefix).div_ceil(chunk);
        let of_prefix = prefix * kv_heads * self.config.head_dim;
        let mut keys = Vec::with_capacity(tokens * kv_heads * self.config.head_dim);
        keys.resize(of_prefix, 0.0);
        let mut values = Vec::with_capacity(keys.capacity());
        values.resize(of_prefix, 0.0);
        for hidden in hidden.chunks(chunk_width) {
            let normed = self.normed(hidden, &layer.attention_norm);
            keys.extend(layer.key.apply(&normed));
            values.extend(layer.value.apply(&normed));
        }
        self.norm_heads(&mut keys[of_prefix..], layer.key_norm.as_deref());
        rotations.apply(0, kv_heads, &mut keys[of_prefix..]);
        pipeline.fill_prefix(request, index, tokens, &mut keys, &mut values)?;

        let mut attention = pipeline.prefill(request, index, tokens, &keys, &values)?;
        // Nothing reads the last layer's outputs but those that are wanted.
        let skipped = match wanted {
            Wanted::Last if index + 1 == layers => chunks - 1,
            _ => 0,
        };
        attention.skip(skipped * chunk)?;
        for (number, hidden) in hidden.chunks_mut(chunk_width).enumerate().skip(skipped) {
            let normed = self.normed(hidden, &layer.attention_norm);
            let mut queries = layer.query.apply(&normed);
            self.norm_heads(&mut queries, layer.query_norm.as_deref());
            rotations.apply(number * chunk, query_heads, &mut queries);
            let mut attended = vec![0.0; queries.len()];
            attention.attend(hidden.len() / self.config.hidden_size, &queries, &mut attended)?;
            self.finish_layer(layer, &attended, hidden);
            if progress(index * chunks + number + 1, layers * chunks).is_break() {
                return Err(Error::Cancelled);
            }
        }
        prompt.layer += 1;
        Ok((prompt.layer == layers).then(|| prompt.finish()))
    }

    /// One decode step for a batch of distinct requests. Returns the final hidden states, `[batch,
    /// hidden_size]`.
    ///
    /// # Errors
    /// [`Error::TokenOutOfVocabulary`] and those of [`Pipeline::decode`].
    pub fn decode<B: Backend<Tensor = [f32]>>(
        &self,
        pipeline: &mut Pipeline<B>,
        batch: &[DecodeToken],
    ) -> Result<Vec<f32>> {
        let mut hidden = self.embed(batch.iter().map(|part| part.token))?;
        let requests: Vec<_> = batch.iter().map(|part| part.request).collect();
        let positions =
            requests.iter().map(|request| pipeline.tokens(*request)).collect::<spinkv::Result<Vec<_>>>()?;
        let rotations = self.rope.rotations(positions.into_iter());
        for (index, layer) in self.layers.iter().enumerate() {
            let normed = self.normed(&hidden, &layer.attention_norm);
            let (mut queries, mut keys) = (layer.query.apply(&normed), layer.key.apply(&normed));
            let values = layer.value.apply(&normed);
            self.norm_heads(&mut queries, layer.query_norm.as_deref());
            self.norm_heads(&mut keys, layer.key_norm.as_deref());
            rotations.apply(0, self.config.query_heads, &mut queries);
            rotations.apply(0, self.config.kv_heads, &mut keys);
            let mut attended = vec![0.0; queries.len()];
            pipeline.decode(index, &requests, &queries, &keys, &values, &mut attended)?;
            self.finish_layer(layer, &attended, &mut hidden);
        }
        Ok(hidden)
    }

    fn normed(&self, hidden: &[f32], weight: &[f32]) -> Vec<f32> {
        let mut normed = vec![0.0; hidden.len()];
        ops::rms_norm(hidden, weight, self.config.rms_norm_eps as f32, &mut normed);
        normed
    }

    fn norm_heads(&self, heads: &mut [f32], weight: Option<&[f32]>) {
        if let Some(weight) = weight {
            ops::rms_norm_in_place(heads, weight, self.config.rms_norm_eps as f32);
        }
    }

    /// Adds the attention output and then the MLP to the residual stream.
    fn finish_layer(&self, layer: &Layer, attended: &[f32], hidden: &mut [f32]) {
        layer.output.apply_to(attended, Old::Add, hidden);
        let normed = self.normed(hidden, &layer.mlp_norm);
        let mut gate = layer.gate.apply(&normed);
        ops::silu_mul(&mut gate, &layer.up.apply(&normed));
        layer.down.apply_to(&gate, Old::Add, hidden);
    }
}
