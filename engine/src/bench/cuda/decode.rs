use std::sync::Arc;
use std::time::Instant;

use spinkv::backend::cuda::CudaBackend;
use spinkv::backend::cuda::driver::Context;
use spinkv::pipeline::{Counters, Method};
use spinkv::{KvConfig, Shard};

use super::CudaMachine;
use super::streamed::Streamed;
use crate::bench::cpu::traced;
use crate::bench::decode::{Machine, Outcome, Selected, point, slots};
use crate::bench::plan::{Caching, DecodeOptions, Group, Selections};
use crate::bench::replayed::policy_of;
use crate::bench::{How, MemoryByUse, Point, Stages, Traced};
use crate::config::ModelConfig;
use crate::cuda::{CudaModel, GpuReport, Overlap, StepPart, StepProfile, TensorParallel, parallel};
use crate::error::Result;
use crate::model::DecodeToken;

/// Steps of those that stream all KV from the host: each takes as long as dozens of others.
const STREAMED_STEPS: usize = 3;

impl CudaMachine {
    /// The group's model, and what each rank draws.
    pub(super) fn made(
        &mut self,
        group: &Group,
        drawn: Option<&(Arc<Traced>, KvConfig)>,
        options: &DecodeOptions,
    ) -> Result<(TensorParallel, Vec<Option<Arc<Traced>>>)> {
        let (ranks, max_tokens) = (self.gpus.gpus(), options.max_tokens(group.context));
        let (kv, traced) = match drawn {
            None => (parallel::shards(&group.kv, ranks)?, vec![None; ranks]),
            Some((method, kv)) => {
                let of_rank = |shard: Shard| -> Result<(KvConfig, Option<Arc<Traced>>)> {
                    if shard.is_whole() {
                        return Ok((kv.clone(), Some(method.clone())));
                    }
                    let heads = shard.part("kv_heads", kv.shape().kv_heads)?;
                    let method = Arc::new(method.of_heads(heads)?);
                    let kv = KvConfig::new(
                        kv.shape().shard(shard)?,
                        kv.host_layout(),
                        method.clone() as Arc<dyn Method>,
                    )?;
                    Ok((kv, Some(method)))
                };
                Shard::all(ranks).map(of_rank).collect::<Result<Vec<_>>>()?.into_iter().unzip()
            }
        };
        Ok((self.model(kv, group.batch, max_tokens, group.buffering)?, traced))
    }

    /// Fills a rank's memory with the group's requests.
    pub(super) fn fill(
        &self,
        model: &mut CudaModel,
        group: &Group,
        options: &DecodeOptions,
        traced: Option<&Traced>,
    ) -> Result<Vec<DecodeToken>> {
        let max_tokens = options.max_tokens(group.context);
        if let Some(traced) = traced {
            traced.begin_on_gpu(model.pipeline().backend().stream(), 0)?;
        }
        let real = matches!(self.source, super::WeightSource::Checkpoint(_));
        let mut batch = Vec::with_capacity(group.batch);
        for number in 0..group.batch {
            let request = model.pipeline_mut().admit(max_tokens)?;
            let prompt = self.prompts.prompt(number, group.context);
            if real {
                model.prefill(request, &prompt, |_, _| std::ops::ControlFlow::Continue(()))?;
            } else {
                model.fill(request, &prompt)?;
            }
            batch.push(DecodeToken { request, token: *prompt.last().unwrap_or(&0) });
        }
        Ok(batch)
    }
}

impl Machine for CudaMachine {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn measure(&mut self, group: &Group, options: &DecodeOptions) -> Result<Outcome> {
        let dense = group.caches.iter().all(|caching| caching.is_dense());
        let drawn: Option<(Arc<Traced>, KvConfig)> = match options.selections {
            Selections::Drawn { hit_ratio } if !dense => Some(traced(group, options, hit_ratio)?),
            _ => None,
        };
        let mut outcome = Outcome::default();
        if let Some((method, kv)) = &drawn {
            let slots = slots(group, options)?;
            let rows = method.drawn().page_rows(kv);
            outcome.selected = Some(Selected { rows, warm_up: options.warm_up, requests: 1, slots });
        }
        let ran: Vec<_> = group.caches.iter().copied().filter(|one| policy_of(*one).is_none()).collect();
        if ran.is_empty() {
            return Ok(outcome);
        }
        let (model, traced) = self.made(group, drawn.as_ref(), options)?;
        let measured = model.on_ranks(|rank, model| {
            let (traced, context) = (traced[rank].as_deref(), &self.gpus.contexts()[rank]);
            let mut batch = self.fill(model, group, options, traced)?;
            let run = |caching| {
                if caching == Caching::DenseStreamed {
                    streamed(context, model, &mut batch, group).map(Some)
                } else {
                    run(model, &mut batch, (group, caching), options, traced)
                }
            };
            let points = ran.iter().copied().map(run).collect::<Result<Vec<Option<Point>>>>()?;
            Ok(points.into_iter().flatten().collect::<Vec<_>>())
        })?;
        self.weights = Some(model.into_weights()?);
        let mut ranks = measured.into_iter();
        outcome.points = ranks.next().unwrap_or_default();
        for points in ranks {
            outcome.points.iter_mut().zip(&points).for_each(|(all, rank)| add_rank(all, rank));
        }
        Ok(outcome)
    }
}

/// What a step of another rank adds to a point: times are those of rank 0, which all ranks go through together.
fn add_rank(all: &mut Point, rank: &Point) {
    all.hits += rank.hits;
    all.misses += rank.misses;
    all.adopted += rank.adopted;
    all.fetched_bytes_per_step += rank.fetched_bytes_per_step;
    all.memory = all.memory.plus(&rank.memory);
}

/// Runs one caching of a group, whose requests go on from where they are, on one rank.
fn run(
    model: &mut CudaModel,
    batch: &mut [DecodeToken],
    (group, caching): (&Group, Caching),
    options: &DecodeOptions,
    traced: Option<&Traced>,
) -> Result<Option<Point>> {
    let in_halves = caching == Caching::InHalves;
    model.set_overlap(match caching {
        Caching::Serial => Overlap::Off,
        Caching::InHalves => Overlap::Halves,
        _ => Overlap::Attention,
    })?;
    if in_halves && !model.has_halves(group.batch) {
        return Ok(None);
    }
    let before_step = |backend: &mut CudaBackend, step: usize| -> Result<()> {
        if let Some(traced) = traced {
            // What is drawn stands still for who is to miss nothing.
            let step = if caching == Caching::Resident { 0 } else { step };
            traced.begin_on_gpu(backend.stream(), step)?;
        }
        if caching == Caching::NoCache {
            backend.empty_caches()?;
        }
        Ok(())
    };
    // All cachings of a memory go through the same selections: what one has fetched is no hit of the next.
    model.pipeline_mut().backend_mut().empty_caches()?;
    for step in 0..options.warm_up {
        before_step(model.pipeline_mut().backend_mut(), step)?;
        greedy(model, batch)?;
    }
    let before = counters(model)?;
    let profile = model.profile_with(batch, options.steps, |backend, number| {
        before_step(backend, options.warm_up + number)
    })?;
    let after = counters(model)?;
    // A cache that is emptied before each step keeps the host busy with that.
    let mut host_ms = None;
    if caching != Caching::NoCache {
        let first = options.warm_up + 2 * options.steps;
        let start = Instant::now();
        for step in first..first + options.steps {
            before_step(model.pipeline_mut().backend_mut(), step)?;
            greedy(model, batch)?;
        }
        host_ms = Some(start.elapsed().as_secs_f64() * 1e3 / options.steps as f64);
    }
    let timed = (2 * options.steps) as f64;
    let misses = after.misses - before.misses;
    let page_bytes = group.kv.host_layout().page_bytes() as f64;
    Ok(Some(Point {
        step_ms: Some(profile.graph_ms),
        host_ms,
        // Those of one half run beside those of the other.
        stages_ms: (!in_halves).then(|| stages(&profile)),
        hits: after.hits - before.hits,
        misses,
        adopted: after.adopted_pages - before.adopted_pages,
        fetched_bytes_per_step: misses as f64 * page_bytes / timed,
        memory: memory(model, group)?,
        ..point(group, caching, slots(group, options)?)
    }))
}

/// The resident step beside a copy of all its pages from the host, which wait for nothing of each other: whoever really streams them has to.
fn streamed(
    context: &Context,
    model: &mut CudaModel,
    batch: &mut [DecodeToken],
    group: &Group,
) -> Result<Point> {
    let bytes = model.pipeline().config().shape().rows()
        * group.batch
        * group.kv.layout().pages(group.context)
        * group.kv.layout().page_bytes();
    let streamed = Streamed::new(context, bytes)?;
    let mut ms = Vec::with_capacity(STREAMED_STEPS);
    for round in 0..=STREAMED_STEPS {
        let start = Instant::now();
        streamed.enqueue()?;
        greedy(model, batch)?;
        streamed.wait()?;
        if round > 0 {
            ms.push(start.elapsed().as_secs_f64() * 1e3);
        }
    }
    let step_ms = crate::bench::median(ms);
    // Two layers of it, one that is read and one that comes.
    let layers = group.kv.shape().layers;
    let kv_pages = (bytes / layers * layers.min(2)) as u64;
    let memory = MemoryByUse { kv_pages, ..memory(model, group)? }.totalled();
    Ok(Point {
        how: How::Bound,
        step_ms: Some(step_ms),
        host_ms: Some(step_ms),
        fetched_bytes_per_step: bytes as f64,
        memory,
        ..point(group, Caching::DenseStreamed, 0)
    })
}

/// A step of the batch, which is left at its newest tokens.
fn greedy(model: &mut CudaModel, batch: &mut [DecodeToken]) -> Result<()> {
    let ids = model.decode_greedy(batch)?;
    batch.iter_mut().zip(ids).for_each(|(part, id)| part.token = id);
    Ok(())
}

fn counters(model: &mut CudaModel) -> Result<Counters> {
    model.pipeline_mut().backend_mut().settle()?;
    Ok(model.pipeline().counters())
}

fn stages(profile: &StepProfile) -> Stages {
    let of = |part| profile.parts.iter().find(|(other, _)| *other == part).map_or(0.0, |(_, ms)| *ms);
    Stages {
        projections: of(StepPart::Projections),
        offload: of(StepPart::Offload),
        select: of(StepPart::Select),
        attention: of(StepPart::Attention),
        mlp: of(StepPart::Mlp),
        head: of(StepPart::Head),
        ..Stages::default()
    }
    .summed()
}

fn memory(model: &CudaModel, group: &Group) -> Result<MemoryByUse> {
    let GpuReport { weights, activations, prompt, kv, .. } = model.memory()?;
    let rows = model.pipeline().config().shape().rows();
    let slabs = group.kv.host_slabs(group.context) * rows * group.batch;
    let slab_bytes = group.kv.host_layout().slab_bytes();
    Ok(MemoryByUse {
        weights,
        activations,
        prompt,
        kv_pages: kv.pages,
        kv_tables: kv.tables,
        kv_summaries: kv.summaries + kv.key_factors,
        kv_lists: kv.lists + kv.operators,
        host_pages: slabs as u64 * slab_bytes,
        ..MemoryByUse::default()
    }
    .totalled())
}
