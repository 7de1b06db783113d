//! A model over several GPUs of one host: tensor parallelism by KV heads.
//!
//! Each GPU, a *rank*, has whole KV heads with their query heads and its part of the MLP, with the weights, the pipeline and the KV memory that
//! belong to them: what is kept, selected and fetched of a row is its rank's, and nothing of it crosses GPUs. Embedding, norms and head are
//! everywhere. Twice a layer, behind attention's output and behind the MLP, the ranks' products are summed into the residual stream of each:
//! by NCCL, inside the captured step, too.
//!
//! All ranks take the same calls in the same order, each on a thread of its own. What one of them enqueues waits on its GPU for the others, so
//! before it does they agree that all of them will: a rank that refuses has all refuse, and nothing has happened. A rank that
//! fails after that fails the model: waits are broken off, communicators aborted, and every later call returns [`Error::RankFailed`].

mod group;
mod lockstep;
mod rank;
mod runner;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use spinkv::backend::cuda::{CudaBackend, CudaLimits};
use spinkv::memory::HostProgress;
use spinkv::{KvConfig, Shard};

pub use group::{GpuGroup, WeightSource};
pub(in crate::cuda) use rank::Rank;
pub use runner::ParallelPrompt;

use super::{CudaModel, CudaOptions, DeviceWeights, GpuReport, Overlap};
use crate::config::ModelConfig;
use crate::error::{Error, Result};

/// A model over the GPUs of a [`GpuGroup`]; over one alone, a [`CudaModel`].
#[derive(Debug)]
pub struct TensorParallel {
    /// The whole model's.
    config: ModelConfig,
    /// By rank. They have graphs that hold sums, and go before the group.
    models: Vec<Mutex<CudaModel>>,
    group: Arc<GpuGroup>,
}

/// What each of `gpus` ranks has of `kv`.
///
/// # Errors
/// Those of [`KvConfig::shard`]; [`Error::UnequalRanks`].
pub fn shards(kv: &KvConfig, gpus: usize) -> Result<Vec<KvConfig>> {
    let shards = Shard::all(gpus).map(|shard| kv.shard(shard)).collect::<spinkv::Result<Vec<_>>>()?;
    let expected = shards[0].rows_by_reach();
    // Then plans are the same, and what admits a request, or keeps all its pages steady, is so on all ranks or on none.
    match shards.iter().position(|shard| shard.rows_by_reach() != expected) {
        Some(rank) => {
            let found = shards[rank].rows_by_reach().steady;
            Err(Error::UnequalRanks { rank, found, expected: expected.steady })
        }
        None => Ok(shards),
    }
}

/// What each of `gpus` ranks has of `limits`.
fn limits_of_rank(limits: &CudaLimits, gpus: usize) -> CudaLimits {
    CudaLimits {
        gpu_pages: limits.gpu_pages.map(|pages| pages / gpus),
        host_bytes: limits.host_bytes.map(|bytes| bytes / gpus as u64),
        ..*limits
    }
}

/// Whether a model of `kv`, by rank, can be made, as far as no GPU is needed to tell. `limits` are those of all ranks together.
///
/// # Errors
/// Those of [`CudaBackend::check`].
pub fn check(kv: &[KvConfig], limits: &CudaLimits) -> Result<()> {
    let limits = limits_of_rank(limits, kv.len());
    Ok(kv.iter().try_for_each(|shard| CudaBackend::check(shard, &limits))?)
}

impl TensorParallel {
    /// A model of these weights, one a rank, with KV memory for `kv`, one a rank: see [`shards`]. Limits are those of all GPUs together.
    ///
    /// # Errors
    /// Those of [`CudaModel::new`] and [`ModelConfig::shard`]; [`Error::RankFailed`] if a rank of the group failed before.
    ///
    /// # Panics
    /// If there are not as many weights or as much `kv` as ranks.
    pub fn new(
        group: &Arc<GpuGroup>,
        config: ModelConfig,
        weights: Vec<DeviceWeights>,
        kv: Vec<KvConfig>,
        options: &CudaOptions,
    ) -> Result<Self> {
        assert_eq!((weights.len(), kv.len()), (group.gpus(), group.gpus()), "one a rank");
        check_failure(group)?;
        let options = CudaOptions { limits: limits_of_rank(&options.limits, group.gpus()), ..*options };
        let parts: Vec<_> = weights.into_iter().zip(kv).map(|parts| Mutex::new(Some(parts))).collect();
        let make = |shard: Shard| {
            let (weights, kv) = lock(&parts[shard.rank()]).take().expect("each rank takes its own");
            let rank = group.ties.as_ref().map(|ties| ties.ranks[shard.rank()].clone());
            let context = &group.contexts()[shard.rank()];
            CudaModel::of_rank(context, config.shard(shard)?, weights, kv, &options, rank)
        };
        let models = group.in_threads(make, make)?.into_iter().map(Mutex::new).collect();
        Ok(Self { config, models, group: group.clone() })
    }

    /// As [`CudaModel::set_overlap`].
    ///
    /// # Errors
    /// As there; [`Error::UnsupportedByBackend`] for halves over several GPUs.
    pub fn set_overlap(&mut self, overlap: Overlap) -> Result<()> {
        if overlap == Overlap::Halves && self.models.len() > 1 {
            let what = "overlap halves of a batch over several GPUs";
            return Err(Error::UnsupportedByBackend { backend: "cuda", what });
        }
        self.models.iter().try_for_each(|model| lock(model).set_overlap(overlap))
    }

    /// Keeps the pages of prompts for others that begin alike, as [`CudaBackend::share_prefixes`]: `limit` bytes of them over all GPUs. Each has its heads' part of the
    /// same prompts, since all are asked the same, in the same order.
    ///
    /// # Errors
    /// As there.
    pub fn share_prefixes(&mut self, limit: Option<u64>) -> Result<()> {
        let each = limit.map(|limit| limit / self.models.len() as u64);
        for model in &self.models {
            lock(model).pipeline_mut().backend_mut().share_prefixes(each)?;
        }
        Ok(())
    }

    /// Forgets all that is kept of prompts, as [`CudaBackend::clear_prefixes`].
    fn clear_prefixes(&self) {
        self.models.iter().for_each(|model| lock(model).pipeline_mut().backend_mut().clear_prefixes());
    }

    /// The whole model's dimensions.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The GPUs.
    pub fn group(&self) -> &Arc<GpuGroup> {
        &self.group
    }

    /// Runs `work` for every rank with its number and its part of the model, each on a thread of its own, and returns what they return. All of
    /// them must make the same calls that compute, in the same order.
    ///
    /// # Errors
    /// The first error of a rank, if there is one; [`Error::RankFailed`] if one has failed before.
    pub fn on_ranks<T: Send>(
        &self,
        work: impl Fn(usize, &mut CudaModel) -> Result<T> + Sync,
    ) -> Result<Vec<T>> {
        let Some(ties) = &self.group.ties else {
            return Ok(vec![work(0, &mut lock(&self.models[0]))?]);
        };
        check_failure(&self.group)?;
        ties.lockstep.begin();
        let _watch = Watch(self);
        let outcomes = ties.pool.broadcast(|thread| {
            let rank = thread.index();
            let link = &ties.ranks[rank];
            let unwinding = Unwinding(link);
            let outcome = work(rank, &mut lock(&self.models[rank]));
            std::mem::forget(unwinding);
            link.leave(outcome.as_ref().map(|_| ()));
            outcome
        });
        // What a rank has to say comes before what others make of it.
        let (others, own): (Vec<_>, Vec<_>) =
            outcomes.into_iter().partition(|outcome| matches!(outcome, Err(Error::OtherRank)));
        let outcome = own.into_iter().chain(others).collect();
        if matches!(outcome, Err(Error::OtherRank)) {
            check_failure(&self.group)?;
        }
        outcome
    }

    /// Gives everything else back and keeps the weights, by rank.
    ///
    /// # Errors
    /// Work that failed before.
    pub fn into_weights(self) -> Result<Vec<DeviceWeights>> {
        check_failure(&self.group)?;
        let models =
            self.models.into_iter().map(|model| model.into_inner().unwrap_or_else(PoisonError::into_inner));
        models.map(CudaModel::into_weights).collect()
    }

    /// Who makes the products of many tokens.
    pub fn products(&self) -> String {
        lock(&self.models[0]).products()
    }

    /// GPU memory by what for, by rank.
    ///
    /// # Errors
    /// A refused call.
    pub fn memory(&self) -> Result<Vec<GpuReport>> {
        self.models.iter().map(|model| lock(model).memory()).collect()
    }

    /// Pins `bytes` of host memory, over all ranks, before the first request. `progress` hears of each chunk.
    ///
    /// # Errors
    /// Those of [`CudaBackend::reserve_host`].
    pub fn reserve_host(&mut self, bytes: u64, progress: &mut dyn FnMut(HostProgress)) -> Result<()> {
        let each = bytes / self.models.len() as u64;
        for (rank, model) in self.models.iter().enumerate() {
            let backend = &mut lock(model);
            let before = each * rank as u64;
            backend.pipeline_mut().backend_mut().reserve_host(
                each,
                &mut |HostProgress { ready_bytes, .. }| {
                    progress(HostProgress { ready_bytes: before + ready_bytes, total_bytes: bytes });
                },
            )?;
        }
        Ok(())
    }
}

/// Refuses to go on after a failure.
fn check_failure(group: &GpuGroup) -> Result<()> {
    match group.ties.as_ref().and_then(|ties| ties.lockstep.failure()) {
        Some((rank, message)) => Err(Error::RankFailed { rank, message }),
        None => Ok(()),
    }
}

/// A rank's thread in a piece of work: dropped only where that panics.
struct Unwinding<'a>(&'a Rank);

impl Drop for Unwinding<'_> {
    fn drop(&mut self) {
        self.0.leave_in_panic();
    }
}

/// Behind a piece of work, when all ranks are at its end: after a failure, what still waits on a GPU is ended.
struct Watch<'a>(&'a TensorParallel);

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        if check_failure(&self.0.group).is_err() {
            self.0.models.iter().for_each(|model| lock(model).abort());
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
