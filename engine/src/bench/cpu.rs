use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

use spinkv::KvConfig;
use spinkv::backend::cpu::CpuBackend;
use spinkv::memory::MemoryLimits;
use spinkv::pipeline::{Pipeline, Stage};

use super::decode::{Machine, Outcome, Selected, point, slots};
use super::drawn::WantedHits;
use super::plan::{Caching, DecodeOptions, Group, Selections};
use super::replayed::policy_of;
use super::{Listen, MemoryByUse, Point, PrefillOptions, PrefillRow, Prompts, Stages, Traced, prefill};
use crate::config::ModelConfig;
use crate::error::Result;
use crate::eval::StoredPrompt;
use crate::model::{DecodeToken, Model};
use crate::simulator::{Recorder, TraceRow};

/// A model on the CPU. A prompt passes through it once, and every caching takes its keys and values over: since no cache changes a result, all select the same.
#[derive(Debug)]
pub struct CpuMachine<'a> {
    model: &'a Model,
    prompts: &'a Prompts,
    /// By context.
    stored: HashMap<usize, Vec<StoredPrompt>>,
}

impl<'a> CpuMachine<'a> {
    /// A machine that has read no prompt yet.
    pub fn new(model: &'a Model, prompts: &'a Prompts) -> Self {
        Self { model, prompts, stored: HashMap::new() }
    }

    /// Prompts as they pass through the model.
    ///
    /// # Errors
    /// What a method or its memory refuses.
    pub fn prefill(&mut self, options: &PrefillOptions, listen: Listen<'_>) -> Result<Vec<PrefillRow>> {
        prefill::on_cpu(self.model, self.prompts, options, listen)
    }

    fn store(&mut self, group: &Group) -> Result<()> {
        let stored = self.stored.entry(group.context).or_default();
        for number in stored.len()..group.batch {
            let tokens = self.prompts.prompt(number, group.context);
            let proceed = |_, _| ControlFlow::Continue(());
            stored.push(StoredPrompt::new(self.model, &group.kv, &tokens, proceed)?);
        }
        Ok(())
    }

    /// Runs one caching in a memory of its own; also what its rows selected.
    fn run(
        &self,
        group: &Group,
        caching: Caching,
        options: &DecodeOptions,
        traced: Option<(&Traced, &KvConfig)>,
    ) -> Result<(Point, Vec<TraceRow>)> {
        let kv = traced.map_or(&group.kv, |(_, kv)| kv);
        let max_tokens = options.max_tokens(group.context);
        let backend = CpuBackend::new(kv.clone(), MemoryLimits::default());
        let mut pipeline = Pipeline::new(backend).with_buffering(group.buffering);
        let begin = |step| traced.iter().for_each(|(traced, _)| traced.begin(step));
        begin(0);
        let (mut batch, mut recorders) = (Vec::new(), Vec::new());
        for stored in &self.stored[&group.context][..group.batch] {
            let request = pipeline.admit(max_tokens)?;
            stored.feed(&mut pipeline, request)?;
            batch.push(DecodeToken { request, token: likeliest(stored.logits()) });
            let mut recorder = Recorder::new(&pipeline, "bench", group.context, max_tokens);
            recorder.step(&pipeline, request);
            recorders.push(recorder);
        }
        let empties = matches!(caching, Caching::NoCache | Caching::DenseStreamed);
        let (mut decode_ms, mut head_ms) = (0.0, 0.0);
        let (mut before, mut times_before) = (pipeline.counters(), *pipeline.decode_times());
        for step in 0..options.warm_up + options.steps {
            if step == options.warm_up {
                (before, times_before) = (pipeline.counters(), *pipeline.decode_times());
                (decode_ms, head_ms) = (0.0, 0.0);
            }
            // What is drawn stands still for who is to miss nothing.
            begin(if caching == Caching::Resident { 0 } else { step });
            if empties {
                for part in &batch {
                    pipeline.park(part.request)?;
                    pipeline.resume(part.request)?;
                }
            }
            let start = Instant::now();
            let hidden = self.model.decode(&mut pipeline, &batch)?;
            let decoded = Instant::now();
            let logits = self.model.logits(&hidden);
            head_ms += decoded.elapsed().as_secs_f64() * 1e3;
            decode_ms += (decoded - start).as_secs_f64() * 1e3;
            let rows = logits.chunks_exact(self.model.config().vocab_size);
            batch.iter_mut().zip(rows).for_each(|(part, row)| part.token = likeliest(row));
            for (recorder, part) in recorders.iter_mut().zip(&batch) {
                recorder.step(&pipeline, part.request);
            }
        }
        let (after, steps) = (pipeline.counters(), options.steps as f64);
        let times = pipeline.decode_times();
        let of_stage = |stage| (times.get(stage) - times_before.get(stage)).as_secs_f64() * 1e3 / steps;
        let [index, offload, select, retrieve, attention] =
            [Stage::Index, Stage::Offload, Stage::Select, Stage::Retrieve, Stage::Attention].map(of_stage);
        let (step, head) = ((decode_ms + head_ms) / steps, head_ms / steps);
        let mlp = step - head - index - offload - select - retrieve - attention;
        let stages = Stages { index, offload, select, retrieve, attention, mlp, head, ..Stages::default() };
        let usage = pipeline.usage();
        let memory = MemoryByUse {
            weights: self.model.weight_bytes(),
            kv_pages: usage.gpu.pages(),
            kv_tables: usage.gpu.tables(),
            kv_summaries: usage.gpu.summaries + usage.gpu.key_factors(),
            host_pages: usage.host.pages,
            ..MemoryByUse::default()
        };
        let misses = after.misses - before.misses;
        let measured = Point {
            step_ms: Some(step),
            host_ms: Some(step),
            stages_ms: Some(stages.summed()),
            hits: after.hits - before.hits,
            misses,
            adopted: after.adopted_pages - before.adopted_pages,
            fetched_bytes_per_step: misses as f64 * kv.host_layout().page_bytes() as f64 / steps,
            memory: memory.totalled(),
            ..point(group, caching, slots(group, options)?)
        };
        Ok((measured, recorders.into_iter().flat_map(|recorder| recorder.finish().rows).collect()))
    }
}

impl Machine for CpuMachine<'_> {
    fn config(&self) -> &ModelConfig {
        self.model.config()
    }

    fn measure(&mut self, group: &Group, options: &DecodeOptions) -> Result<Outcome> {
        self.store(group)?;
        let dense = group.caches.iter().all(|caching| caching.is_dense());
        let traced = match options.selections {
            Selections::Drawn { hit_ratio } if !dense => Some(traced(group, options, hit_ratio)?),
            _ => None,
        };
        let traced = traced.as_ref().map(|(traced, kv)| (&**traced, kv));
        let mut outcome = Outcome::default();
        let ran: Vec<_> = group.caches.iter().copied().filter(|one| policy_of(*one).is_none()).collect();
        for caching in ran {
            let (measured, rows) = self.run(group, caching, options, traced)?;
            outcome.points.push(measured);
            // What stood still is nothing to replay.
            if traced.is_none() || caching != Caching::Resident {
                outcome.selected = Some(self.selected(group, options, rows)?);
            }
        }
        if outcome.selected.is_none() && group.caches.iter().any(|caching| policy_of(*caching).is_some()) {
            let (_, rows) = self.run(group, Caching::BucketedLru, options, traced)?;
            outcome.selected = Some(self.selected(group, options, rows)?);
        }
        Ok(outcome)
    }
}

impl CpuMachine<'_> {
    fn selected(&self, group: &Group, options: &DecodeOptions, rows: Vec<TraceRow>) -> Result<Selected> {
        // The warm start is the first step of the rows.
        let warm_up = options.warm_up + 1;
        Ok(Selected { rows, warm_up, requests: group.batch, slots: slots(group, options)? })
    }
}

/// A group's method with drawn selections, and its KV memory.
pub(super) fn traced(
    group: &Group,
    options: &DecodeOptions,
    hit_ratio: Option<f64>,
) -> Result<(Arc<Traced>, KvConfig)> {
    let wanted = hit_ratio
        .map(|ratio| {
            // The same selections for all cachings of a method: those that give the serving cache this ratio.
            let buffering = options.bufferings.iter().copied().fold(0.0, f64::max);
            let serving = Group { buffering, ..group.clone() };
            Ok::<_, crate::Error>(WantedHits {
                ratio,
                slots: slots(&serving, options)?,
                warm_up: options.warm_up,
            })
        })
        .transpose()?;
    let (steps, seed) = (options.run_steps(), options.seed);
    let method = Traced::new(&group.kv, group.built.clone(), group.context, steps, wanted, seed)?;
    let method = Arc::new(method);
    let kv = KvConfig::new(*group.kv.shape(), group.kv.host_layout(), method.clone())?;
    Ok((method, kv))
}

/// The id of the greatest logit.
fn likeliest(logits: &[f32]) -> u32 {
    let greatest = (0..logits.len()).reduce(|best, id| if logits[id] > logits[best] { id } else { best });
    greatest.unwrap_or(0) as u32
}
