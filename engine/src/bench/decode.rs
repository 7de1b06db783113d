use std::fmt;

use serde::Serialize;
use spinkv::memory::RequestPlan;
use spinkv::pipeline::Reach;

use super::plan::{Caching, DecodeOptions, Group};
use super::replayed::{interpolate, policy_of, replay_rows, set_beside_floors};
use super::report::{memory_table, parts, table};
use super::{BenchError, Facts, How, Listen, MemoryByUse, Point};
use crate::config::ModelConfig;
use crate::error::Result;
use crate::simulator::TraceRow;

/// Who measures groups.
pub trait Machine {
    /// The model that runs.
    fn config(&self) -> &ModelConfig;

    /// Measures the cachings of a group that are not replayed, in their order, and says what its steps selected.
    ///
    /// # Errors
    /// What the model, the method or its memory refuses.
    fn measure(&mut self, group: &Group, options: &DecodeOptions) -> Result<Outcome>;
}

/// What a group did.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// By caching.
    pub points: Vec<Point>,
    /// What the rows selected, by pages, a step each, the warm start first; none where nobody knows.
    pub selected: Option<Selected>,
}

/// What the rows of some requests selected.
#[derive(Clone, Debug)]
pub struct Selected {
    /// The rows.
    pub rows: Vec<TraceRow>,
    /// Steps of them before those that are timed.
    pub warm_up: usize,
    /// Requests that they are of.
    pub requests: usize,
    /// Slots of a row's cache.
    pub slots: usize,
}

/// What `spinkv bench decode` prints.
#[derive(Clone, Debug, Serialize)]
pub struct DecodeReport {
    /// Of what, on what.
    pub facts: Facts,
    /// Steps before the timed ones.
    pub warm_up: usize,
    /// Timed steps.
    pub steps: usize,
    /// The budget of KV memory of the whole model.
    pub kv_bytes: Option<u64>,
    /// By context, batch, method, budget and cache.
    pub points: Vec<Point>,
}

/// Measures all groups of the options. What one refuses is said in its points, and the others go on.
///
/// # Errors
/// Options that nothing can be measured with.
pub fn decode(
    machine: &mut dyn Machine,
    options: &DecodeOptions,
    all_layers: usize,
    listen: Listen<'_>,
) -> Result<Vec<Point>> {
    options.check(machine.config())?;
    let config = machine.config().clone();
    let groups = options.groups(&config, all_layers)?;
    let mut points = Vec::new();
    for (done, group) in groups.iter().enumerate() {
        let Group { context, batch, method, budget, .. } = group;
        let budget = budget.map(|budget| format!(" {budget}")).unwrap_or_default();
        let name = format!("{method}{budget}, {batch} requests of {context} tokens");
        listen(&name, done, groups.len());
        let of_group = measured(machine, group, options).unwrap_or_else(|error| {
            let reason = error.to_string();
            group.caches.iter().map(|caching| skipped(group, *caching, &reason)).collect()
        });
        // Whoever is broken off has these.
        for point in &of_group {
            if let Some(ms) = point.step_ms {
                listen(&format!("{name}: {} {ms:.3} ms", point.cache), done, groups.len());
            }
        }
        points.extend(of_group);
    }
    let finish = |points: Vec<Point>| -> Vec<Point> {
        points.into_iter().map(|point| point.finish(config.layers, all_layers)).collect()
    };
    let mut points = finish(points);
    interpolate(&mut points);
    set_beside_floors(&mut points);
    Ok(finish(points))
}

/// The points of a group, measured and replayed ones in the order of its cachings.
fn measured(machine: &mut dyn Machine, group: &Group, options: &DecodeOptions) -> Result<Vec<Point>> {
    if !group.fits {
        let (requests, request_bytes) = (group.batch, group.request_bytes);
        let kv_bytes = options.kv_bytes.unwrap_or(0);
        return Err(BenchError::BeyondBudget { requests, request_bytes, kv_bytes }.into());
    }
    let Outcome { points, selected } = machine.measure(group, options)?;
    // A replayed cache would take what those of its group do.
    let memory = points.last().map(|point| point.memory).unwrap_or_default();
    let mut points = points.into_iter().peekable();
    let mut all = Vec::with_capacity(group.caches.len());
    for caching in group.caches.iter().copied() {
        let Some(policy) = policy_of(caching) else {
            // A batch that is not parted has none in halves.
            all.extend(points.next_if(|point| point.cache == caching));
            continue;
        };
        let Some(selected) = &selected else {
            all.push(skipped(group, caching, &BenchError::NotRecorded.to_string()));
            continue;
        };
        let Selected { rows, warm_up, requests, slots } = selected;
        let counted = replay_rows(rows, policy, *slots, *warm_up, options.seed);
        // Rows of one request may stand for those of all.
        let times = (group.batch / requests) as u64;
        let misses = counted.misses * times;
        let steps = counted.steps as f64 / rows.len().max(1) as f64;
        all.push(Point {
            how: How::Replayed,
            hits: (counted.probes - counted.misses) * times,
            misses,
            fetched_bytes_per_step: misses as f64 * group.kv.host_layout().page_bytes() as f64
                / steps.max(1.0),
            memory,
            ..point(group, caching, *slots)
        });
    }
    Ok(all)
}

/// A point of a group before there is a figure in it.
pub(super) fn point(group: &Group, caching: Caching, slots: usize) -> Point {
    Point {
        method: group.method.label().to_owned(),
        budget: group.budget.map(|budget| budget.to_string()),
        context: group.context,
        batch: group.batch,
        cache: caching,
        host_kv: group.kv.host_layout().format(),
        buffering: group.buffering,
        slots,
        how: How::Measured,
        skipped: None,
        step_ms: None,
        host_ms: None,
        tokens_per_s: None,
        tokens_per_s_all_layers: None,
        stages_ms: None,
        hits: 0,
        misses: 0,
        adopted: 0,
        hit_ratio: None,
        fetched_bytes_per_step: 0.0,
        pcie_gb_per_s: None,
        over_sum: None,
        over_max: None,
        memory: MemoryByUse::default(),
        request_bytes: group.request_bytes,
    }
}

fn skipped(group: &Group, caching: Caching, reason: &str) -> Point {
    Point { how: How::Skipped, skipped: Some(reason.to_owned()), ..point(group, caching, 0) }
}

/// Slots of a row's cache in the group's memory.
///
/// # Errors
/// Those of [`RequestPlan::new`].
pub(super) fn slots(group: &Group, options: &DecodeOptions) -> Result<usize> {
    let plan = RequestPlan::new(&group.kv, options.max_tokens(group.context), group.buffering)?;
    Ok(plan.slots(Reach::Selected))
}

impl fmt::Display for DecodeReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { facts, warm_up, steps, points, .. } = self;
        writeln!(f, "{facts}\n{steps} steps behind {warm_up}; ~ is a bound or replayed, not measured\n")?;
        table(points, f)?;
        if points.iter().any(|point| point.stages_ms.is_some()) {
            writeln!(f, "\nmilliseconds of a step by part")?;
            parts(points, f)?;
        }
        writeln!(f, "\nmemory by use")?;
        memory_table(points, f)
    }
}
