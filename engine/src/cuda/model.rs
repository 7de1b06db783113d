use std::collections::HashMap;
use std::sync::Arc;

use spinkv::KvConfig;
use spinkv::backend::Step;
use spinkv::backend::cuda::driver::{Context, Event, Graph, Result as DriverResult, Stream};
use spinkv::backend::cuda::kernels::Sample;
use spinkv::backend::cuda::{CudaBackend, CudaLimits};
use spinkv::pipeline::Pipeline;
use spinkv_kernels::abi::model::sample::SampleParams;

use super::halves::{Overlap, SecondHalf};
use super::parallel::Rank;
use super::parts::Parts;
use super::pass::StepPass;
use super::product::BlasUse;
use super::profile::StepPart;
use super::{DeviceWeights, GpuReport};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::model::DecodeToken;

/// A model on a GPU with its KV memory: prompts layer by layer, decode steps as one graph for each size of batch.
///
/// The residual stream is f32, what is multiplied bf16, sums f32. Work is enqueued on one stream, and only results are waited for.
#[derive(Debug)]
pub struct CudaModel {
    pub(super) config: ModelConfig,
    pub(super) weights: DeviceWeights,
    pub(super) pipeline: Pipeline<CudaBackend>,
    pub(super) parts: Parts,
    /// Prompts that have begun; the newest one has the activations.
    pub(super) prompts: u64,
    /// By the size of the batch, and whether all its requests are resident.
    pub(super) graphs: HashMap<(usize, bool), Graph>,
    /// Where steps are taken as two halves.
    pub(super) second: Option<SecondHalf>,
    /// What graphs are captured with.
    pub(super) overlap: Overlap,
    pub(super) blas: BlasUse,
    /// Bytes of GPU memory that were in use before this.
    used_before: u64,
    context: Context,
}

// A rank's model is made on a thread of its own and used on another.
const _: fn() = || {
    fn sendable<T: Send>() {}
    sendable::<CudaModel>();
};

/// What is enqueued behind each part of a step.
type Behind<'a> = &'a dyn Fn(StepPart) -> DriverResult<()>;

/// How a [`CudaModel`] is made.
#[derive(Clone, Copy, Debug)]
pub struct CudaOptions {
    /// How much KV it is made for.
    pub limits: CudaLimits,
    /// Who multiplies.
    pub blas: BlasUse,
}

impl CudaModel {
    /// A model of these weights, with KV memory for `kv`. GPU memory is taken now, but for graphs and for a scratch of prompts.
    ///
    /// # Errors
    /// Those of [`CudaBackend::new`]; [`Error::Blas`] for [`BlasUse::Required`] without cuBLASLt; [`Error::Driver`], for instance out of
    /// GPU memory.
    pub fn new(
        context: &Context,
        config: ModelConfig,
        weights: DeviceWeights,
        kv: KvConfig,
        options: &CudaOptions,
    ) -> Result<Self> {
        Self::of_rank(context, config, weights, kv, options, None)
    }

    /// One GPU's part of a model: `config`, `weights` and `kv` are the rank's.
    pub(super) fn of_rank(
        context: &Context,
        config: ModelConfig,
        weights: DeviceWeights,
        kv: KvConfig,
        options: &CudaOptions,
        rank: Option<Arc<Rank>>,
    ) -> Result<Self> {
        let memory = context.memory()?;
        let used_before = (memory.total_bytes - memory.free_bytes).saturating_sub(weights.bytes().total());
        let backend = CudaBackend::new(context, kv, &options.limits)?;
        let parts = Parts::new(&config, weights.sizes(), &backend, options, rank)?;
        let pipeline = Pipeline::new(backend).with_buffering(options.limits.buffering);
        let context = context.clone();
        Ok(Self {
            config,
            weights,
            pipeline,
            parts,
            prompts: 0,
            graphs: HashMap::new(),
            second: None,
            overlap: Overlap::default(),
            blas: options.blas,
            used_before,
            context,
        })
    }

    /// The model's dimensions.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Gives everything else back and keeps the weights, for a model with KV memory of another kind.
    ///
    /// # Errors
    /// Work that failed before.
    pub fn into_weights(self) -> Result<DeviceWeights> {
        self.parts.stream.synchronize()?;
        Ok(self.weights)
    }

    /// Ends what waits for other ranks, for good. The graphs go first, since the library waits for those that hold sums.
    pub(super) fn abort(&mut self) {
        self.graphs.clear();
        self.parts.rank.iter().for_each(|rank| rank.abort());
    }

    /// The KV memory and who is in it.
    pub fn pipeline(&self) -> &Pipeline<CudaBackend> {
        &self.pipeline
    }

    /// The same, to admit and release requests.
    pub fn pipeline_mut(&mut self) -> &mut Pipeline<CudaBackend> {
        &mut self.pipeline
    }

    /// Who makes the products of many tokens.
    pub fn products(&self) -> String {
        self.parts.products.description()
    }

    /// GPU memory by what for.
    ///
    /// # Errors
    /// A refused call.
    pub fn memory(&self) -> Result<GpuReport> {
        let memory = self.context.memory()?;
        let (activations, prompt) = self.parts.bytes();
        let activations = activations + self.second.as_ref().map_or(0, SecondHalf::bytes);
        Ok(GpuReport {
            before: self.used_before,
            weights: self.weights.bytes().total(),
            activations,
            prompt,
            kv: self.pipeline.backend().allocated(),
            in_use: memory.total_bytes - memory.free_bytes,
        })
    }

    /// One decode step for a batch of distinct requests, as a graph. Returns their logits, `[batch, vocab_size]`.
    ///
    /// # Errors
    /// [`Error::TokenOutOfVocabulary`] and those of [`Pipeline::decode_at_once`].
    pub fn decode(&mut self, batch: &[DecodeToken]) -> Result<Vec<f32>> {
        self.step(batch)?;
        self.logits(batch.len())
    }

    /// The logits of the last step's first `requests` requests, `[requests, vocab_size]`.
    ///
    /// # Errors
    /// Beyond the largest batch, or a failed launch.
    pub fn logits(&self, requests: usize) -> Result<Vec<f32>> {
        self.parts.read_logits(self.weights.sizes(), requests)
    }

    /// As [`decode`](Self::decode), of whose logits only the likeliest tokens come back; [`u32::MAX`] for a row without a finite logit.
    ///
    /// # Errors
    /// As for [`decode`](Self::decode).
    pub fn decode_greedy(&mut self, batch: &[DecodeToken]) -> Result<Vec<u32>> {
        self.step(batch)?;
        self.likeliest(batch.len())
    }

    /// As [`decode_greedy`](Self::decode_greedy), with each request's next token drawn on the GPU as [`Sampler`](crate::sampling::Sampler) draws it, from
    /// [`next_draw`](crate::sampling::Sampler::next_draw).
    ///
    /// # Errors
    /// As for [`decode`](Self::decode).
    ///
    /// # Panics
    /// If there are not as many draws as requests.
    pub fn decode_sampled(&mut self, batch: &[DecodeToken], draws: &[SampleParams]) -> Result<Vec<u32>> {
        assert_eq!(batch.len(), draws.len(), "a draw a request");
        self.step(batch)?;
        let (parts, vocab) = (&self.parts, self.weights.sizes().vocab);
        // The likeliest tokens are there already.
        if draws.iter().any(|draw| draw.temperature != 0.0) {
            parts.join_ranks()?;
            parts.draws.write(&parts.stream, 0, draws)?;
            let sample = Sample {
                logits: &parts.logits,
                batch: batch.len() as u32,
                vocab: vocab as u32,
                stride: vocab as u32,
                params: &parts.draws,
                ids: &parts.likeliest,
            };
            // SAFETY: all of it is used on this stream alone.
            unsafe { sample.launch(&parts.kernels, &parts.stream) }?;
        }
        self.likeliest(batch.len())
    }

    /// The likeliest tokens of the last step's batch. Waits for it.
    pub(super) fn likeliest(&self, batch: usize) -> Result<Vec<u32>> {
        self.parts.join_ranks()?;
        let mut ids = vec![0; batch];
        self.parts.likeliest.read(&self.parts.stream, 0, &mut ids)?;
        Ok(ids)
    }

    /// Just before the last step's graph.
    pub(super) fn began(&self) -> &Event {
        &self.parts.began
    }

    /// Enqueues a step.
    fn step(&mut self, batch: &[DecodeToken]) -> Result<()> {
        if batch.is_empty() {
            return Ok(());
        }
        let (bucket, resident) = self.kind_of(batch);
        if !self.graphs.contains_key(&(bucket, resident)) {
            let graph = self.capture(bucket, resident, &|_| Ok(()))?;
            self.graphs.insert((bucket, resident), graph);
        }
        let graph = &self.graphs[&(bucket, resident)];
        let (parts, vocab_size) = (&self.parts, self.config.vocab_size);
        run_step(&mut self.pipeline, parts, vocab_size, batch, bucket, graph)
    }

    /// The size of the batch that a step is captured for, and whether all its requests are resident.
    pub(super) fn kind_of(&self, batch: &[DecodeToken]) -> (usize, bool) {
        let backend = self.pipeline.backend();
        let resident = backend.is_resident(batch.iter().map(|part| part.request));
        (bucket_of(batch.len(), backend.capacity()), resident)
    }

    /// Enqueues a step as a graph of [its kind](Self::kind_of).
    pub(super) fn step_as(&mut self, batch: &[DecodeToken], bucket: usize, graph: &Graph) -> Result<()> {
        run_step(&mut self.pipeline, &self.parts, self.config.vocab_size, batch, bucket, graph)
    }

    /// The stream of all work.
    pub(super) fn stream(&self) -> &Stream {
        &self.parts.stream
    }

    /// A decode step of a batch of `bucket` as a graph. All kernels are loaded, and nothing is planned inside: products of few tokens are
    /// our own, those of more were planned here.
    pub(super) fn capture(&self, bucket: usize, resident: bool, behind: Behind<'_>) -> Result<Graph> {
        let parts = &self.parts;
        // Of earlier steps, too: what another rank's failure stops must not be waited for by the driver.
        parts.join_ranks()?;
        parts.enter(Ok(()))?;
        // What a first launch loads cannot be loaded during a capture.
        self.launch_step(bucket, resident, true, &|_| Ok(()))?;
        parts.join_ranks()?;
        parts.stream.synchronize()?;
        let mut failure = None;
        let graph = Graph::capture(&parts.stream, |_| {
            failure = self.launch_step(bucket, resident, false, behind).err();
            Ok(())
        });
        let graph = failure.map_or_else(|| Ok(graph?), Err)?;
        parts.exit();
        Ok(graph)
    }

    /// Enqueues the launches of a step, each part followed by `behind`; `rehearsed`, without the stages, whose entries there are none of
    /// yet.
    fn launch_step(&self, batch: usize, resident: bool, rehearsed: bool, behind: Behind<'_>) -> Result<()> {
        if let Some(half) = self.half_of(batch, resident) {
            return self.launch_halves(batch, half, rehearsed);
        }
        let backend = self.pipeline.backend();
        let part = StepPass::begin(self, &self.parts, 0..batch)?;
        for index in 0..self.weights.layers.len() {
            part.project(index)?;
            behind(StepPart::Projections)?;
            if !rehearsed {
                let behind = |stage| behind(StepPart::of(stage));
                // SAFETY: the step begins before the graph is launched; the tensors are used on this stream alone.
                unsafe { backend.launch_layer_with(index, batch, resident, &part.tensors(), behind) }?;
            }
            part.finish(index)?;
            behind(StepPart::Mlp)?;
        }
        part.end()?;
        Ok(behind(StepPart::Head)?)
    }
}

/// Refuses ids that the model does not have.
pub(super) fn check_ids(mut ids: impl Iterator<Item = u32>, vocab_size: usize) -> Result<()> {
    match ids.find(|id| *id as usize >= vocab_size) {
        Some(id) => Err(Error::TokenOutOfVocabulary { id, vocab_size }),
        None => Ok(()),
    }
}

/// Enqueues a step as a graph that was captured for batches of `bucket`.
fn run_step(
    pipeline: &mut Pipeline<CudaBackend>,
    parts: &Parts,
    vocab_size: usize,
    batch: &[DecodeToken],
    bucket: usize,
    graph: &Graph,
) -> Result<()> {
    let mut ids: Vec<u32> = batch.iter().map(|part| part.token).collect();
    check_ids(ids.iter().copied(), vocab_size)?;
    ids.resize(bucket, 0);
    let requests: Vec<_> = batch.iter().map(|part| part.request).collect();
    parts.join_ranks()?;
    let begin = |backend: &mut CudaBackend, step: &Step<'_>| {
        // A rank that cannot begin has the others not begin either.
        parts.enter(backend.begin_step(step, bucket).map_err(Error::from))
    };
    pipeline.decode_at_once(&requests, begin, |_| {
        parts.ids.write(&parts.stream, 0, &ids)?;
        parts.began.record(&parts.stream)?;
        // SAFETY: buffers and kernels are those that were captured; a step of the batch's size has begun.
        unsafe { graph.launch(&parts.stream) }?;
        parts.exit();
        Ok(())
    })
}

/// The size of the batch that a step of `requests` is captured for: few sizes, of which none wastes more than a third.
fn bucket_of(requests: usize, capacity: usize) -> usize {
    let power = requests.next_power_of_two();
    let bucket = if requests <= power * 3 / 4 { (power * 3 / 4).max(1) } else { power };
    bucket.max(requests).min(capacity)
}

#[cfg(test)]
mod tests {
    use super::bucket_of;

    #[test]
    fn buckets_are_few_and_hold_their_requests() {
        let buckets: std::collections::BTreeSet<_> =
            (1..=64).map(|requests| bucket_of(requests, 64)).collect();
        assert_eq!(buckets.into_iter().collect::<Vec<_>>(), [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]);
        for requests in 1..=40 {
            let bucket = bucket_of(requests, 40);
            assert!(
                (requests..=40).contains(&bucket) && bucket * 2 <= requests * 3 + 1,
                "{requests}: {bucket}"
            );
        }
    }
}
