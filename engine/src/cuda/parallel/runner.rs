use std::ops::ControlFlow;
use std::sync::Mutex;

use spinkv::memory::{MemoryUsage, PrefixUsage, RequestPlan};
use spinkv::pipeline::{Counters, RequestId, StageTimes};
use spinkv_kernels::abi::model::argmax::NONE;

use super::{TensorParallel, lock};
use crate::config::ModelConfig;
use crate::cuda::{CudaModel, CudaPrompt};
use crate::error::{Error, Result};
use crate::model::DecodeToken;
use crate::runner::{Drawn, Runner};
use crate::sampling::Sampler;

/// A prompt between two layers, by rank.
#[derive(Debug)]
pub struct ParallelPrompt(Vec<Mutex<CudaPrompt>>);

impl TensorParallel {
    /// Does something on every rank; where one refuses, the others undo it.
    fn all_or_none(
        &self,
        work: impl Fn(&mut CudaModel) -> Result<()> + Sync,
        undo: impl Fn(&mut CudaModel) -> Result<()>,
    ) -> Result<()> {
        let outcomes = self.on_ranks(|_, model| Ok(work(model)))?;
        if outcomes.iter().any(Result::is_err) {
            for (model, _) in self.models.iter().zip(&outcomes).filter(|(_, outcome)| outcome.is_ok()) {
                undo(&mut lock(model))?;
            }
        }
        outcomes.into_iter().collect()
    }
}

/// Ranks name their requests alike, since all of them are asked the same, in the same order; tokens are rank 0's.
impl Runner for TensorParallel {
    type Prompt = ParallelPrompt;

    fn config(&self) -> &ModelConfig {
        Self::config(self)
    }

    fn check(&self, max_tokens: usize) -> Result<()> {
        // The plans of all ranks are alike.
        Runner::check(&*lock(&self.models[0]), max_tokens)
    }

    fn admit(&mut self, max_tokens: usize) -> Result<RequestId> {
        let admitted = self.on_ranks(|_, model| Ok(model.admit(max_tokens)))?;
        let refused = admitted.iter().any(Result::is_err);
        if refused && admitted.len() > 1 {
            for (model, request) in self.models.iter().zip(&admitted) {
                request.iter().for_each(|request| lock(model).release(*request));
            }
        }
        let requests = admitted.into_iter().collect::<Result<Vec<_>>>()?;
        debug_assert!(requests.iter().all(|request| *request == requests[0]), "{requests:?}");
        Ok(requests[0])
    }

    fn release(&mut self, request: RequestId) {
        // After a failure, too, and each on a thread, since it waits for the GPU. The outcome is none.
        let _ = self.on_ranks(|_, model| {
            model.release(request);
            Ok(())
        });
    }

    fn places(&self) -> usize {
        lock(&self.models[0]).places()
    }

    fn park(&mut self, request: RequestId) -> Result<()> {
        self.all_or_none(|model| model.park(request), |model| model.resume(request))
    }

    fn resume(&mut self, request: RequestId) -> Result<()> {
        self.all_or_none(|model| model.resume(request), |model| model.park(request))
    }

    /// Of all ranks together.
    fn parked_pages(&self, request: RequestId) -> Result<usize> {
        self.models.iter().map(|model| lock(model).parked_pages(request)).sum()
    }

    /// That of all ranks together.
    fn plan(&self, request: RequestId) -> Result<RequestPlan> {
        let plans = self.models.iter().map(|model| lock(model).plan(request)).collect::<Result<Vec<_>>>()?;
        let (first, others) = plans.split_first().expect("at least one rank");
        Ok(others.iter().fold(*first, |mut all, plan| {
            all.rows += plan.rows;
            all.by_reach.selected += plan.by_reach.selected;
            all.by_reach.everything += plan.by_reach.everything;
            all.by_reach.steady += plan.by_reach.steady;
            // What others came or went for may have been given by one rank alone.
            all.row.buffering_pages = all.row.buffering_pages.min(plan.row.buffering_pages);
            all
        }))
    }

    fn begin_prompt(&mut self, request: RequestId, tokens: &[u32]) -> Result<ParallelPrompt> {
        let prompts = self.on_ranks(|_, model| model.begin_prompt(request, tokens))?;
        let expected = prompts[0].cached_tokens();
        let other = prompts.iter().position(|prompt| prompt.cached_tokens() != expected);
        if let Some(rank) = other {
            // From here on they are alike again; the request cannot be, and is its caller's to release.
            self.clear_prefixes();
            return Err(Error::UnequalPrefixes { rank, found: prompts[rank].cached_tokens(), expected });
        }
        Ok(ParallelPrompt(prompts.into_iter().map(Mutex::new).collect()))
    }

    fn prompt_layer(
        &mut self,
        prompt: &mut ParallelPrompt,
        progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<Option<Vec<f32>>> {
        let mut outcomes = self.on_ranks(|rank, model| {
            // Who breaks off is heard when all ranks have enqueued the same.
            let mut heard = Vec::new();
            let logits = model.prompt_layer(&mut lock(&prompt.0[rank]), |done, total| {
                heard.push((done, total));
                ControlFlow::Continue(())
            })?;
            Ok((logits, heard))
        })?;
        let (logits, heard) = outcomes.swap_remove(0);
        match heard.into_iter().try_for_each(|(done, total)| progress(done, total)) {
            ControlFlow::Continue(()) => Ok(logits),
            ControlFlow::Break(()) => Err(Error::Cancelled),
        }
    }

    fn decode(&mut self, batch: &[DecodeToken]) -> Result<Vec<f32>> {
        let mut logits = self.on_ranks(|rank, model| {
            if rank == 0 { model.decode(batch) } else { model.decode_greedy(batch).map(|_| Vec::new()) }
        })?;
        Ok(logits.swap_remove(0))
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
        let mut drawn = self.on_ranks(|rank, model| {
            if rank > 0 {
                model.decode_greedy(batch)?;
                return Ok(Drawn::default());
            }
            let ids = model.decode_sampled(batch, &draws)?;
            let tokens = ids.into_iter().map(|id| (id != NONE).then_some(id)).collect();
            Ok(Drawn { tokens, logits: if logits { model.logits(batch.len())? } else { Vec::new() } })
        })?;
        samplers.iter_mut().zip(after).for_each(|(sampler, after)| **sampler = after);
        Ok(drawn.swap_remove(0))
    }

    fn cached_tokens(&self, prompt: &ParallelPrompt) -> usize {
        // Of all ranks, or the prompt would not have begun.
        lock(&self.models[0]).cached_tokens(&lock(&prompt.0[0]))
    }

    /// Blocks and tokens are those of rank 0, since all keep the same; bytes are all ranks'.
    fn prefixes(&self) -> Option<PrefixUsage> {
        let mut usages = self.models.iter().filter_map(|model| lock(model).prefixes());
        let first = usages.next()?;
        Some(PrefixUsage { bytes: first.bytes + usages.map(|usage| usage.bytes).sum::<u64>(), ..first })
    }

    fn counters(&mut self) -> Result<Counters> {
        Ok(self.on_ranks(|_, model| model.counters())?.into_iter().sum())
    }

    fn usage(&self) -> MemoryUsage {
        self.models.iter().map(|model| lock(model).usage()).sum()
    }

    fn stage_times(&self) -> Option<(StageTimes, StageTimes)> {
        None
    }
}
