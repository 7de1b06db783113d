use std::ops::ControlFlow;

use spinkv::memory::{MemoryUsage, PrefixUsage, RequestPlan};
use spinkv::pipeline::{Counters, RequestId, StageTimes};
use spinkv_kernels::abi::model::argmax::NONE;

use super::{CudaModel, CudaPrompt};
use crate::config::ModelConfig;
use crate::error::Result;
use crate::model::DecodeToken;
use crate::runner::{Drawn, Runner};
use crate::sampling::Sampler;

impl Runner for CudaModel {
    type Prompt = CudaPrompt;

    fn config(&self) -> &ModelConfig {
        Self::config(self)
    }

    fn admit(&mut self, max_tokens: usize) -> Result<RequestId> {
        Ok(self.pipeline_mut().admit(max_tokens)?)
    }

    fn check(&self, max_tokens: usize) -> Result<()> {
        let plan = self.pipeline().plan(max_tokens)?;
        Ok(self.pipeline().backend().check_alone(&plan)?)
    }

    fn release(&mut self, request: RequestId) {
        self.pipeline_mut().release(request);
    }

    fn places(&self) -> usize {
        self.pipeline().backend().capacity()
    }

    fn park(&mut self, request: RequestId) -> Result<()> {
        Ok(self.pipeline_mut().park(request)?)
    }

    fn parked_pages(&self, request: RequestId) -> Result<usize> {
        let plan = self.plan(request)?;
        let is_whole = self.pipeline().backend().is_resident([request]);
        Ok(if is_whole { plan.least_gpu_pages() } else { plan.mandatory_pages() })
    }

    fn resume(&mut self, request: RequestId) -> Result<()> {
        Ok(self.pipeline_mut().resume(request)?)
    }

    fn plan(&self, request: RequestId) -> Result<RequestPlan> {
        Ok(*self.pipeline().admitted(request)?)
    }

    fn begin_prompt(&mut self, request: RequestId, tokens: &[u32]) -> Result<CudaPrompt> {
        Self::begin_prompt(self, request, tokens)
    }

    fn cached_tokens(&self, prompt: &CudaPrompt) -> usize {
        prompt.cached_tokens()
    }

    fn prompt_layer(
        &mut self,
        prompt: &mut CudaPrompt,
        progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<Option<Vec<f32>>> {
        Self::prompt_layer(self, prompt, progress)
    }

    fn decode(&mut self, batch: &[DecodeToken]) -> Result<Vec<f32>> {
        Self::decode(self, batch)
    }

    fn next_tokens(
        &mut self,
        batch: &[DecodeToken],
        samplers: &mut [&mut Sampler],
        logits: bool,
    ) -> Result<Drawn> {
        assert_eq!(batch.len(), samplers.len(), "a sampler a request");
        // A refused step takes no random numbers.
        let mut after: Vec<Sampler> = samplers.iter().map(|sampler| (**sampler).clone()).collect();
        let draws: Vec<_> = after.iter_mut().map(Sampler::next_draw).collect();
        let ids = self.decode_sampled(batch, &draws)?;
        samplers.iter_mut().zip(after).for_each(|(sampler, after)| **sampler = after);
        let tokens = ids.into_iter().map(|id| (id != NONE).then_some(id)).collect();
        Ok(Drawn { tokens, logits: if logits { self.logits(batch.len())? } else { Vec::new() } })
    }

    fn counters(&mut self) -> Result<Counters> {
        self.pipeline_mut().backend_mut().settle()?;
        Ok(self.pipeline().counters())
    }

    fn usage(&self) -> MemoryUsage {
        self.pipeline().usage()
    }

    fn prefixes(&self) -> Option<PrefixUsage> {
        self.pipeline().prefixes()
    }

    fn stage_times(&self) -> Option<(StageTimes, StageTimes)> {
        // A step is one graph, and its stages are never waited for.
        None
    }
}
