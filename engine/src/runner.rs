//! A model together with its KV memory, whichever backend both are on: what generation needs of them.

use std::ops::ControlFlow;

use spinkv::backend::cpu::CpuBackend;
use spinkv::memory::{MemoryUsage, PrefixUsage, RequestPlan};
use spinkv::pipeline::{Counters, Pipeline, RequestId, StageTimes};

use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::model::{DecodeToken, Model, Prompt, Wanted};
use crate::sampling::Sampler;

/// The next tokens of a batch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Drawn {
    /// One a request; `None` where no logit is a finite number.
    pub tokens: Vec<Option<u32>>,
    /// `[batch, vocab_size]` if that was asked for, else empty.
    pub logits: Vec<f32>,
}

/// A model with KV memory for its requests.
pub trait Runner {
    /// A prompt between two layers.
    type Prompt;

    /// The model's dimensions.
    fn config(&self) -> &ModelConfig;

    /// Checks that the runner could admit a request of up to `max_tokens` tokens if it had no other.
    ///
    /// # Errors
    /// As for [`admit`](Self::admit); no waiting helps.
    fn check(&self, max_tokens: usize) -> Result<()>;

    /// Admits a request of up to `max_tokens` tokens.
    ///
    /// # Errors
    /// Those of [`Pipeline::admit`].
    fn admit(&mut self, max_tokens: usize) -> Result<RequestId>;

    /// Ends a request, whatever its state.
    fn release(&mut self, request: RequestId);

    /// The most requests that are admitted at a time, parked ones among them.
    fn places(&self) -> usize {
        usize::MAX
    }

    /// Takes a request's cache away for others, between two steps, or all its pages if it has none, and keeps its context.
    ///
    /// # Errors
    /// Those of [`Pipeline::park`].
    fn park(&mut self, request: RequestId) -> Result<()>;

    /// GPU pages that others get if a request is parked, but for its buffering, which they get anyway.
    ///
    /// # Errors
    /// For an unknown request.
    fn parked_pages(&self, request: RequestId) -> Result<usize> {
        Ok(self.plan(request)?.mandatory_pages())
    }

    /// Gives a parked request back what [`park`](Self::park) took.
    ///
    /// # Errors
    /// Those of [`Pipeline::resume`]; it is then still parked.
    fn resume(&mut self, request: RequestId) -> Result<()>;

    /// What an admitted request may hold.
    ///
    /// # Errors
    /// For an unknown request.
    fn plan(&self, request: RequestId) -> Result<RequestPlan>;

    /// Passes a prompt through the model and returns the logits of its last token, `[vocab_size]`. `progress` hears of parts that are
    /// done, as (done, total), and may break off.
    ///
    /// # Errors
    /// Those of [`begin_prompt`](Self::begin_prompt) and [`prompt_layer`](Self::prompt_layer).
    fn prefill(
        &mut self,
        request: RequestId,
        tokens: &[u32],
        progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<Vec<f32>> {
        let mut prompt = self.begin_prompt(request, tokens)?;
        loop {
            if let Some(logits) = self.prompt_layer(&mut prompt, progress)? {
                return Ok(logits);
            }
        }
    }

    /// A prompt before its first layer. A runner may have the activations of one prompt alone, so one that has begun before and is not through
    /// may be unable to go on.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`], [`Error::TokenOutOfVocabulary`], and what the
    /// model refuses.
    fn begin_prompt(&mut self, request: RequestId, tokens: &[u32]) -> Result<Self::Prompt>;

    /// Tokens of a prompt, from the first on, whose pages were there already and that are not computed again.
    fn cached_tokens(&self, prompt: &Self::Prompt) -> usize {
        let _ = prompt;
        0
    }

    /// The next layer of a prompt, between whose layers decode steps of other requests may run. `progress` hears of parts of the whole prompt
    /// that are done, as (done, total), and may break off. After the last layer it returns the logits of the prompt's last token,
    /// `[vocab_size]`.
    ///
    /// # Errors
    /// [`Error::Cancelled`], [`Error::PromptReplaced`], and what the model or its
    /// memory refuses; the prompt and its request can then only be dropped and released.
    fn prompt_layer(
        &mut self,
        prompt: &mut Self::Prompt,
        progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<Option<Vec<f32>>>;

    /// One decode step for a batch of distinct requests; their logits, `[batch, vocab_size]`.
    ///
    /// # Errors
    /// What the model or its memory refuses.
    fn decode(&mut self, batch: &[DecodeToken]) -> Result<Vec<f32>>;

    /// One decode step for a batch of distinct requests, and each one's next token, drawn by its sampler: `None` where no logit is a finite
    /// number. With `logits`, those come back too; without them a GPU's stay there.
    ///
    /// # Errors
    /// Those of [`decode`](Self::decode); no random number is then taken.
    ///
    /// # Panics
    /// If there are not as many samplers as requests.
    fn next_tokens(
        &mut self,
        batch: &[DecodeToken],
        samplers: &mut [&mut Sampler],
        logits: bool,
    ) -> Result<Drawn> {
        assert_eq!(batch.len(), samplers.len(), "a sampler a request");
        let all = self.decode(batch)?;
        let vocab_size = self.config().vocab_size;
        let rows = all.chunks_exact(vocab_size).zip(samplers);
        let tokens = rows.map(|(row, sampler)| sampler.sample(row).ok()).collect();
        Ok(Drawn { tokens, logits: if logits { all } else { Vec::new() } })
    }

    /// One decode step of one request, and its next token.
    ///
    /// # Errors
    /// Those of [`decode`](Self::decode), and [`Error::NoFiniteLogit`].
    fn next_token(&mut self, part: DecodeToken, sampler: &mut Sampler) -> Result<u32> {
        let drawn = self.next_tokens(&[part], &mut [sampler], false)?;
        drawn.tokens[0].ok_or(Error::NoFiniteLogit { len: self.config().vocab_size })
    }

    /// What happened to pages so far.
    ///
    /// # Errors
    /// A step that failed.
    fn counters(&mut self) -> Result<Counters>;

    /// Bytes of KV memory in use now.
    fn usage(&self) -> MemoryUsage;

    /// What is kept of prompts for others; `None` where they share no pages.
    fn prefixes(&self) -> Option<PrefixUsage> {
        None
    }

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
    type Prompt = Prompt;

    fn config(&self) -> &ModelConfig {
        self.model.config()
    }

    fn check(&self, max_tokens: usize) -> Result<()> {
        let plan = self.pipeline.plan(max_tokens)?;
        Ok(plan.check_limits(self.pipeline.config(), self.pipeline.backend().limits())?)
    }

    fn admit(&mut self, max_tokens: usize) -> Result<RequestId> {
        Ok(self.pipeline.admit(max_tokens)?)
    }

    fn release(&mut self, request: RequestId) {
        self.pipeline.release(request);
    }

    fn park(&mut self, request: RequestId) -> Result<()> {
        Ok(self.pipeline.park(request)?)
    }

    fn resume(&mut self, request: RequestId) -> Result<()> {
        Ok(self.pipeline.resume(request)?)
    }

    fn plan(&self, request: RequestId) -> Result<RequestPlan> {
        Ok(*self.pipeline.admitted(request)?)
    }

    fn begin_prompt(&mut self, request: RequestId, tokens: &[u32]) -> Result<Prompt> {
        self.model.begin_prompt(&mut self.pipeline, request, tokens, Wanted::Last)
    }

    fn cached_tokens(&self, prompt: &Prompt) -> usize {
        prompt.cached_tokens()
    }

    fn prompt_layer(
        &mut self,
        prompt: &mut Prompt,
        progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<Option<Vec<f32>>> {
        let hidden = self.model.prompt_layer(&mut self.pipeline, prompt, progress)?;
        Ok(hidden.map(|hidden| self.model.logits(&hidden)))
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

    fn prefixes(&self) -> Option<PrefixUsage> {
        self.pipeline.prefixes()
    }

    fn stage_times(&self) -> Option<(StageTimes, StageTimes)> {
        Some((*self.pipeline.decode_times(), *self.pipeline.prefill_times()))
    }

    fn cpu_pipeline(&self) -> Option<&Pipeline<CpuBackend>> {
        Some(&self.pipeline)
    }
}
