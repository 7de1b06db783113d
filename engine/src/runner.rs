//! A model together with its KV memory, whichever backend both are on: what generation needs of them.

use std::ops::ControlFlow;

use spinkv::backend::cpu::CpuBackend;
use spinkv::memory::{MemoryUsage, RequestPlan};
use spinkv::pipeline::{Counters, Pipeline, RequestId, StageTimes};

use crate::config::ModelConfig;
use crate::error::Result;
use crate::model::{DecodeToken, Model, Wanted};
use crate::sampling::Sampler;

/// A model with KV memory for its requests.
pub trait Runner {
    /// The model's dimensions.
    fn config(&self) -> &ModelConfig;

    /// Admits a request of up to `max_tokens` tokens.
    ///
    /// # Errors
    /// Those of [`Pipeline::admit`].
    fn admit(&mut self, max_tokens: usize) -> Result<RequestId>;

    /// Ends a request, whatever its state.
    fn release(&mut self, request: RequestId);

    /// What an admitted request may hold.
    ///
    /// # Errors
    /// For an unknown request.
    fn plan(&self, request: RequestId) -> Result<RequestPlan>;

    /// Passes a prompt through the model and returns the logits of its last token, `[vocab_size]`. `progress` hears of parts that are
    /// done, as (done, total), and may break off.
    ///
    /// # Errors
    /// [`Error::Cancelled`](crate::Error::Cancelled), and what the model or its memory refuses.
    fn prefill(
        &mut self,
        request: RequestId,
        tokens: &[u32],
        progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<Vec<f32>>;

    /// One decode step for a batch of distinct requests; their logits, `[batch, vocab_size]`.
    ///
    /// # Errors
    /// What the model or its memory refuses.
    fn decode(&mut self, batch: &[DecodeToken]) -> Result<Vec<f32>>;

    /// One decode step of one request, and its next token.
    ///
    /// # Errors
    /// Those of [`decode`](Self::decode), and [`Error::NoFiniteLogit`](crate::Error::NoFiniteLogit).
    fn next_token(&mut self, part: DecodeToken, sampler: &mut Sampler) -> Result<u32> {
        sampler.sample(&self.decode(&[part])?)
    }

    /// What happened to pages so far.
    ///
    /// # Errors
    /// A step that failed.
    fn counters(&mut self) -> Result<Counters>;

    /// Bytes of KV memory in use now.
    fn usage(&self) -> MemoryUsage;

    /// Time in the stages of decode steps and of prompts; `None` where stages are not timed one by one.
    fn stage_times(&self) -> Option<(StageTimes, StageTimes)>;

    /// The pipeline of the CPU backend, to record what steps select; `None` elsewhere.
    fn cpu_pipeline(&self) -> Option<&Pipeline<CpuBackend>> {
        None
    }
}

/// The model and its KV memory on the CPU.
#[derive(Debug)]
pub struct CpuRunner<'a> {
    model: &'a Model,
    pipeline: Pipeline<CpuBackend>,
}

impl<'a> CpuRunner<'a> {
    /// The model over a pipeline.
    pub fn new(model: &'a Model, pipeline: Pipeline<CpuBackend>) -> Self {
        Self { model, pipeline }
    }
}

impl Runner for CpuRunner<'_> {
    fn config(&self) -> &ModelConfig {
        self.model.config()
    }

    fn admit(&mut self, max_tokens: usize) -> Result<RequestId> {
        Ok(self.pipeline.admit(max_tokens)?)
    }

    fn release(&mut self, request: RequestId) {
        self.pipeline.release(request);
    }

    fn plan(&self, request: RequestId) -> Result<RequestPlan> {
        Ok(*self.pipeline.admitted(request)?)
    }

    fn prefill(
        &mut self,
        request: RequestId,
        tokens: &[u32],
        progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<Vec<f32>> {
        let hidden = self.model.prefill(&mut self.pipeline, request, tokens, Wanted::Last, progress)?;
        Ok(self.model.logits(&hidden))
    }

    fn decode(&mut self, batch: &[DecodeToken]) -> Result<Vec<f32>> {
        let hidden = self.model.decode(&mut self.pipeline, batch)?;
        Ok(self.model.logits(&hidden))
    }

    fn counters(&mut self) -> Result<Counters> {
        Ok(self.pipeline.counters())
    }

    fn usage(&self) -> MemoryUsage {
        self.pipeline.usage()
    }

    fn stage_times(&self) -> Option<(StageTimes, StageTimes)> {
        Some((*self.pipeline.decode_times(), *self.pipeline.prefill_times()))
    }

    fn cpu_pipeline(&self) -> Option<&Pipeline<CpuBackend>> {
        Some(&self.pipeline)
    }
}
