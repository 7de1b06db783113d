//! Prompts, layer by layer.

use std::ops::ControlFlow;

use spinkv::backend::Backend;
use spinkv::backend::cuda::kernels::{Positions, RmsNorm};
use spinkv::pipeline::RequestId;
use spinkv_kernels::abi::WORD_ELEMENTS;

use super::CudaModel;
use super::model::check_ids;
use crate::error::{Error, Result};

/// A prompt on its way through the layers, behind what others have computed of it. Its activations are the model's: a model has those of one prompt, the newest.
#[derive(Debug)]
pub struct CudaPrompt {
    request: RequestId,
    tokens: usize,
    /// Tokens that others have computed.
    prefix: usize,
    /// Layers that are enqueued.
    layer: usize,
    /// Its number among the model's prompts.
    number: u64,
}

impl CudaPrompt {
    /// Tokens, from the first on, whose pages were there already.
    pub fn cached_tokens(&self) -> usize {
        self.prefix
    }
}

impl CudaModel {
    /// Passes a prompt through the model, layer by layer: only two layers' keys and values are held outside the KV memory at a time. A
    /// layer's Index, write-back and warm start run under the next layer. `progress` hears of each layer that is done, as (done, total),
    /// and may break off. Returns the logits of the last token.
    ///
    /// # Errors
    /// Those of [`begin_prompt`](Self::begin_prompt) and [`prompt_layer`](Self::prompt_layer).
    pub fn prefill(
        &mut self,
        request: RequestId,
        tokens: &[u32],
        mut progress: impl FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<Vec<f32>> {
        let mut prompt = self.begin_prompt(request, tokens)?;
        loop {
            if let Some(logits) = self.prompt_layer(&mut prompt, &mut progress)? {
                return Ok(logits);
            }
        }
    }

    /// A prompt before its first layer. One that has begun before and is not through cannot go on.
    ///
    /// # Errors
    /// [`Error::TokenOutOfVocabulary`], [`Error::EmptyPrompt`], [`Error::PromptTooLong`] beyond what the model was made for, those of
    /// [`Pipeline::share_prefix`](spinkv::pipeline::Pipeline::share_prefix), or a failed launch.
    pub fn begin_prompt(&mut self, request: RequestId, tokens: &[u32]) -> Result<CudaPrompt> {
        check_ids(tokens.iter().copied(), self.config.vocab_size)?;
        let (parts, limit) = (&self.parts, self.parts.prompt_ids.len());
        if tokens.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        if tokens.len() > limit {
            return Err(Error::PromptTooLong { tokens: tokens.len(), limit });
        }
        let prefix = match self.pipeline.backend().prefix_block() {
            Some(_) => self.pipeline.share_prefix(request, tokens, 1)?,
            None => 0,
        };
        self.prompts += 1;
        parts.join_ranks()?;
        parts.prompt_ids.write(&parts.stream, 0, &tokens[prefix..])?;
        parts.embed(&self.weights, &parts.prompt_ids, tokens.len() - prefix, &parts.prompt_residual)?;
        Ok(CudaPrompt { request, tokens: tokens.len(), prefix, layer: 0, number: self.prompts })
    }

    /// Enqueues the next layer of a prompt and waits for the one before it; decode steps of other requests may run between two of them.
    /// `progress` hears of the layers that are done, as (done, total), and may break off. After the last layer it waits for all, and returns the
    /// logits of the last token.
    ///
    /// # Errors
    /// [`Error::PromptReplaced`] if another prompt has begun since, [`Error::Cancelled`] if `progress` broke off, and those of
    /// [`Pipeline::prefill`](spinkv::pipeline::Pipeline::prefill); the prompt and its request can then only be dropped and released.
    pub fn prompt_layer(
        &mut self,
        prompt: &mut CudaPrompt,
        mut progress: impl FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<Option<Vec<f32>>> {
        let CudaPrompt { request, tokens, prefix, layer: index, number } = *prompt;
        if number != self.prompts {
            return Err(Error::PromptReplaced { request });
        }
        let (layers, sizes, parts) = (self.weights.layers.len(), *self.weights.sizes(), &self.parts);
        let layer = &self.weights.layers[index];
        let mut kv = parts.prompt_kv[index % 2].part(&sizes, tokens)?;
        self.pipeline.fill_prefix(request, index, tokens, &mut kv.keys, &mut kv.values)?;
        let rest = tokens - prefix;
        let mut attention = self.pipeline.prefill(request, index, tokens, &kv.keys, &kv.values)?;
        let chunks = rest.div_ceil(parts.chunk_tokens);
        // Nothing reads the last layer's outputs but the last one.
        let skipped = if index + 1 == layers { chunks - 1 } else { 0 };
        attention.skip(skipped * parts.chunk_tokens)?;
        parts.enter(Ok(()))?;
        for chunk in 0..chunks {
            let first = chunk * parts.chunk_tokens;
            let count = parts.chunk_tokens.min(rest - first);
            let hidden = sizes.hidden;
            let residual = parts.prompt_residual.part(first * hidden..(first + count) * hidden)?;
            let position = prefix + first;
            let positions = Positions::From(position as u32);
            parts.project(&sizes, layer, &residual, count, &parts.chunk, positions, position, &kv)?;
            if chunk >= skipped {
                let words = 0..count * sizes.queries / WORD_ELEMENTS;
                let queries = parts.chunk.queries.part(words.clone())?;
                let mut attended = parts.chunk.attended.part(words)?;
                attention.attend(count, &queries, &mut attended)?;
                parts.finish(&sizes, layer, &residual, count, &parts.chunk)?;
            }
        }
        parts.exit();
        prompt.layer += 1;
        // The host is at most one layer ahead, so that progress is true, breaking off is quick, and a step of others between two layers waits for
        // no more than one.
        parts.layer_done[index % 2].record(&parts.stream)?;
        if index > 0 {
            parts.wait_for(&parts.layer_done[(index + 1) % 2])?;
            if progress(index, layers).is_break() {
                return Err(Error::Cancelled);
            }
        }
        if prompt.layer < layers {
            return Ok(None);
        }
        let logits = self.prompt_logits(rest)?;
        // The last layer's write-back is part of the prompt.
        self.pipeline.backend_mut().finish_prompt()?;
        if progress(layers, layers).is_break() { Err(Error::Cancelled) } else { Ok(Some(logits)) }
    }

    /// The logits of the last of the `tokens` tokens of a prompt that are computed, whose layers are enqueued.
    fn prompt_logits(&self, tokens: usize) -> Result<Vec<f32>> {
        let parts = &self.parts;
        let last = RmsNorm {
            residual: &parts.prompt_residual,
            weight: &self.weights.final_norm,
            first_token: tokens as u32 - 1,
            tokens: 1,
            eps: parts.eps,
            normed: &parts.step.normed,
        };
        // SAFETY: all of it is used on this stream alone.
        unsafe { last.launch(&parts.kernels, &parts.stream) }?;
        parts.head(&self.weights, 1)?;
        parts.read_logits(self.weights.sizes(), 1)
    }
}
