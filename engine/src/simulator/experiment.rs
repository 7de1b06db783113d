use std::time::Instant;

use rayon::prelude::*;
use serde::Serialize;

use super::{Policy, Replay, StepModel, StepTime, Trace, replay};

/// Which caches to try on each trace.
#[derive(Clone, Debug, PartialEq)]
pub struct Experiment {
    /// Policies.
    pub policies: Vec<Policy>,
    /// Slots of a row, as multiples of its mandatory pages; below 1 counts as 1.
    pub sizes: Vec<f64>,
    /// Steps before counting begins.
    pub warm_up: usize,
    /// Seed of policies that draw.
    pub seed: u64,
    /// Requests that are modelled together.
    pub batch: Batch,
}

/// Requests that are modelled together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Batch {
    /// A fixed number.
    Fixed(u32),
    /// As many as fit this many bytes of GPU memory, caches and summaries counted; at least 1.
    Fits(f64),
}

/// What one cache did on one trace.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Outcome {
    /// The trace.
    pub trace: String,
    /// The policy.
    pub policy: Policy,
    /// Slots over mandatory pages.
    pub size: f64,
    /// Hits over probes.
    pub hit_ratio: f64,
    /// The counts of all rows.
    pub replay: Replay,
    /// Bytes that a step of one request fetches, scaled to the modelled model's rows.
    pub pcie_bytes_per_step: f64,
    /// The modelled step.
    pub step: StepTime,
    /// Modelled tokens a second, transfers after compute.
    pub tokens_per_s: f64,
    /// Modelled tokens a second, transfers under compute.
    pub tokens_per_s_overlapped: f64,
}

/// All outcomes, and how fast they came.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcomes {
    /// By trace, policy and size, in the order given.
    pub outcomes: Vec<Outcome>,
    /// Selected pages that were looked up in all replays, warm-up included.
    pub probes: u64,
    /// Time of the replays, in seconds.
    pub seconds: f64,
}

impl Experiment {
    /// Replays to run for `traces`.
    pub fn replays(&self, traces: &[Trace]) -> usize {
        traces.iter().map(|trace| trace.rows.len()).sum::<usize>() * self.policies.len() * self.sizes.len()
    }

    /// Runs all replays on all cores; `progress` is called after each.
    pub fn run(&self, traces: &[Trace], progress: impl Fn() + Sync) -> Outcomes {
        let start = Instant::now();
        let cells = traces.iter().flat_map(|trace| {
            let cell = move |policy: &Policy| {
                self.sizes.iter().map({
                    let policy = *policy;
                    move |size| (trace, policy, *size)
                })
            };
            self.policies.iter().flat_map(cell)
        });
        let cells: Vec<_> = cells.collect();
        let outcomes: Vec<_> = cells
            .par_iter()
            .map(|(trace, policy, size)| {
                let rows = trace.rows.par_iter().map(|row| {
                    let slots = ((row.mandatory() as f64 * size).round() as usize).max(row.mandatory());
                    let counted = replay(row, *policy, slots, self.warm_up, self.seed);
                    progress();
                    counted
                });
                let sum = rows.reduce(Replay::default, |mut sum, one| {
                    sum.add(&one);
                    sum
                });
                self.outcome(trace, *policy, *size, sum)
            })
            .collect();
        let probes =
            traces.iter().map(Trace::probes).sum::<u64>() * (self.policies.len() * self.sizes.len()) as u64;
        Outcomes { outcomes, probes, seconds: start.elapsed().as_secs_f64() }
    }

    fn outcome(&self, trace: &Trace, policy: Policy, size: f64, replay: Replay) -> Outcome {
        let model = StepModel::qwen3_14b(trace.page_tokens);
        let context = f64::from(trace.context);
        let page = f64::from(trace.page_tokens);
        let per_row_step = |count: u64| page * count as f64 / replay.steps.max(1) as f64;
        let (selected, missed) = (per_row_step(replay.probes), per_row_step(replay.misses));
        let cached = page * replay.slots as f64 / trace.rows.len().max(1) as f64;
        let batch = self.batch.of(model.request_bytes(context, cached));
        let step = model.step(batch, context, selected, missed);
        Outcome {
            trace: trace.name.clone(),
            policy,
            size,
            hit_ratio: replay.hit_ratio(),
            replay,
            pcie_bytes_per_step: missed * model.token_bytes(),
            step,
            tokens_per_s: step.serial(),
            tokens_per_s_overlapped: step.overlapped(),
        }
    }

    /// The modelled step of requests of `context` tokens that are all in GPU memory.
    pub fn dense(&self, page_tokens: u32, context: u32) -> StepTime {
        let (model, context) = (StepModel::qwen3_14b(page_tokens), f64::from(context));
        model.dense(self.batch.of(model.token_bytes() * context), context)
    }
}

impl Batch {
    fn of(self, request_bytes: f64) -> u32 {
        match self {
            Self::Fixed(batch) => batch,
            Self::Fits(bytes) => ((bytes / request_bytes) as u32).max(1),
        }
    }
}
