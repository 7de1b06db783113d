use std::ops::ControlFlow;

use spinkv::memory::{MemoryUsage, RequestPlan};
use spinkv::pipeline::{Counters, RequestId, StageTimes};
use spinkv_kernels::abi::model::argmax::NONE;

use super::CudaModel;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::model::DecodeToken;
use crate::runner::Runner;
use crate::sampling::Sampler;

impl Runner for CudaModel {
    fn config(&self) -> &ModelConfig {
        Self::config(self)
    }

    fn admit(&mut self, max_tokens: usize) -> Result<RequestId> {
        Ok(self.pipeline_mut().admit(max_tokens)?)
    }

    fn release(&mut self, request: RequestId) {
        self.pipeline_mut().release(request);
    }

    fn plan(&self, request: RequestId) -> Result<RequestPlan> {
        Ok(*self.pipeline().admitted(request)?)
    }

    fn prefill(
        &mut self,
        request: RequestId,
        tokens: &[u32],
        progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<Vec<f32>> {
        Self::prefill(self, request, tokens, progress)
    }

    fn decode(&mut self, batch: &[DecodeToken]) -> Result<Vec<f32>> {
        Self::decode(self, batch)
    }

    fn next_token(&mut self, part: DecodeToken, sampler: &mut Sampler) -> Result<u32> {
        match self.decode_sampled(&[part], &[sampler.next_draw()])?[0] {
            NONE => Err(Error::NoFiniteLogit { len: Self::config(self).vocab_size }),
            token => Ok(token),
        }
    }

    fn counters(&mut self) -> Result<Counters> {
        self.pipeline_mut().backend_mut().settle()?;
        Ok(self.pipeline().counters())
    }

    fn usage(&self) -> MemoryUsage {
        self.pipeline().usage()
    }

    fn stage_times(&self) -> Option<(StageTimes, StageTimes)> {
        // A step is one graph, and its stages are never waited for.
        None
    }
}
