use std::ops::ControlFlow;

use spinkv::backend::cpu::attend_prompt;
use spinkv::backend::{Backend, PromptChunk, Step, StepKind};
use spinkv::memory::{MemoryUsage, RequestPlan};
use spinkv::pipeline::{Counters, Pipeline, RequestId};
use spinkv::{Error as KvError, KvConfig, Result as KvResult};

use crate::error::Result;
use crate::model::{Model, Wanted};

/// What a prompt leaves behind in every layer: all that a method's Index, Offload and first Select see of it.
///
/// A request that is [fed](Self::feed) holds the same bytes, bit for bit, as one whose prompt passed through the model. The outputs of
/// the prompt's own attention, which is dense whatever the method, are in `logits` already.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredPrompt {
    tokens: usize,
    layers: Vec<StoredLayer>,
    /// The logits of the last token, `[vocab_size]`.
    logits: Vec<f32>,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct StoredLayer {
    /// `[tokens, kv_heads, head_dim]`, rotated, unrounded.
    keys: Vec<f32>,
    values: Vec<f32>,
    /// Of the last token, `[query_heads, head_dim]`, rotated.
    query: Vec<f32>,
}

impl StoredPrompt {
    /// Passes a prompt through the model, over no cache at all. `progress` hears of every chunk, as (done, total), and may break off.
    ///
    /// # Errors
    /// Those of [`Model::prefill`].
    pub fn new(
        model: &Model,
        kv: &KvConfig,
        tokens: &[u32],
        progress: impl FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<Self> {
        let mut pipeline = Pipeline::new(Capture::new(kv.clone()));
        let request = pipeline.admit(tokens.len())?;
        let hidden = model.prefill(&mut pipeline, request, tokens, Wanted::Last, progress)?;
        let logits = model.logits(&hidden);
        let layers = std::mem::take(&mut pipeline.backend_mut().layers);
        Ok(Self { tokens: tokens.len(), layers, logits })
    }

    /// Bytes of a prompt's K and V.
    pub fn bytes(kv: &KvConfig, tokens: usize) -> u64 {
        let shape = kv.shape();
        (2 * shape.layers * tokens * shape.kv_heads * shape.head_dim * size_of::<f32>()) as u64
    }

    /// Gives an empty request this prompt, in place of a pass through the model.
    ///
    /// # Errors
    /// Those of [`Pipeline::prefill`].
    pub fn feed<B: Backend<Tensor = [f32]>>(
        &self,
        pipeline: &mut Pipeline<B>,
        request: RequestId,
    ) -> Result<()> {
        for (index, layer) in self.layers.iter().enumerate() {
            let mut prompt = pipeline.prefill(request, index, self.tokens, &layer.keys, &layer.values)?;
            if self.tokens > 1 {
                prompt.skip(self.tokens - 1)?;
            }
            let mut unused = vec![0.0; layer.query.len()];
            prompt.attend(1, &layer.query, &mut unused)?;
        }
        Ok(())
    }

    /// The logits of the last token, `[vocab_size]`.
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }
}

/// A backend that keeps one request's K and V as they come, and reads all of them.
#[derive(Debug)]
struct Capture {
    config: KvConfig,
    request: Option<(RequestId, RequestPlan)>,
    layers: Vec<StoredLayer>,
}

impl Capture {
    fn new(config: KvConfig) -> Self {
        let layers = vec![StoredLayer::default(); config.shape().layers];
        Self { config, request: None, layers }
    }
}

impl Backend for Capture {
    type Tensor = [f32];

    fn config(&self) -> &KvConfig {
        &self.config
    }

    fn elements(tensor: &[f32]) -> usize {
        tensor.len()
    }

    fn admit(&mut self, request: RequestId, plan: RequestPlan) -> KvResult<()> {
        if self.request.is_some() {
            return Err(KvError::BatchTooLarge { requests: 2, limit: 1 });
        }
        self.request = Some((request, plan));
        Ok(())
    }

    fn plan(&self, request: RequestId) -> Option<&RequestPlan> {
        self.request.as_ref().filter(|(id, _)| *id == request).map(|(_, plan)| plan)
    }

    fn prepare(&mut self, _: &Step<'_>) -> KvResult<()> {
        Ok(())
    }

    fn release(&mut self, _: RequestId) {
        self.request = None;
        self.layers.fill(StoredLayer::default());
    }

    fn index(&mut self, _: &Step<'_>, _: &[f32], _: &[f32]) -> KvResult<()> {
        Ok(())
    }

    fn offload(&mut self, step: &Step<'_>, keys: &[f32], values: &[f32]) -> KvResult<()> {
        let layer = &mut self.layers[step.layer];
        layer.keys.extend_from_slice(keys);
        layer.values.extend_from_slice(values);
        Ok(())
    }

    fn select(&mut self, step: &Step<'_>, queries: &[f32]) -> KvResult<()> {
        let shape = self.config.shape();
        if step.entries.iter().any(|entry| entry.kind == StepKind::Prompt) {
            let last = queries.len() - shape.query_heads * shape.head_dim;
            self.layers[step.layer].query = queries[last..].to_vec();
        }
        Ok(())
    }

    fn retrieve(&mut self, _: &Step<'_>) -> KvResult<()> {
        Ok(())
    }

    fn attend(&mut self, step: &Step<'_>, queries: &[f32], out: &mut [f32]) -> KvResult<()> {
        let StoredLayer { keys, values, .. } = &self.layers[step.layer];
        for entry in step.entries {
            let chunk = PromptChunk { first: entry.before, tokens: 1, context: entry.after() };
            attend_prompt(self.config.shape(), &chunk, queries, keys, values, out);
        }
        Ok(())
    }

    fn attend_prompt(
        &mut self,
        chunk: &PromptChunk,
        queries: &[f32],
        keys: &[f32],
        values: &[f32],
        out: &mut [f32],
    ) -> KvResult<()> {
        attend_prompt(self.config.shape(), chunk, queries, keys, values, out);
        Ok(())
    }

    fn counters(&self) -> Counters {
        Counters::default()
    }

    fn usage(&self) -> MemoryUsage {
        MemoryUsage::default()
    }
}
