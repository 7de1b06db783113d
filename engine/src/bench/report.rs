use std::fmt;

use indicatif::HumanBytes;
use serde::{Serialize, Serializer};
use spinkv::memory::HostFormat;

use super::Caching;

/// What a bench ran on.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Facts {
    /// The model.
    pub model: String,
    /// Its layers that ran.
    pub layers: usize,
    /// Its layers.
    pub all_layers: usize,
    /// Whether its weights are random: speeds mean something, selections and texts nothing.
    pub random_weights: bool,
    /// Whether prompts are random tokens.
    pub random_prompts: bool,
    /// cpu or cuda.
    pub backend: String,
    /// Bytes of a KV page.
    pub page_bytes: u64,
    /// The device, and who makes its products of many tokens.
    pub device: String,
    /// What figures are to be read with.
    pub notes: Vec<String>,
}

impl fmt::Display for Facts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { model, layers, all_layers, random_weights, random_prompts, device, notes, .. } = self;
        let weights = if *random_weights { ", random weights" } else { "" };
        let prompts = if *random_prompts { ", prompts of random tokens" } else { "" };
        write!(f, "{model}{weights}{prompts}, {layers} of {all_layers} layers, on {device}")?;
        notes.iter().try_for_each(|note| write!(f, "\n  {note}"))
    }
}

/// How a figure came to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum How {
    /// It ran.
    Measured,
    /// It ran with less work than the real thing would have: no real one is faster.
    Bound,
    /// Hits and bytes of a cache that replays what was selected; times between the measured ones, by missed pages.
    Replayed,
    /// It did not run.
    Skipped,
}

/// Milliseconds of a step by part; a part that a backend does not tell apart is 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Stages {
    /// Norms, projections of queries, keys and values, rotation.
    pub projections: f64,
    /// Index; on a GPU in Offload.
    pub index: f64,
    /// New tokens to their pages, full pages to the host.
    pub offload: f64,
    /// Scores and top-k.
    pub select: f64,
    /// Tables and copies; on a GPU in Attention, beside which it runs.
    pub retrieve: f64,
    /// Attention.
    pub attention: f64,
    /// Attention's output projection and the MLP; on the CPU projections and head, too.
    pub mlp: f64,
    /// Last norm, logits, likeliest token.
    pub head: f64,
    /// All of it.
    pub sum: f64,
}

impl Stages {
    /// With its sum.
    pub fn summed(self) -> Self {
        let Self { projections, index, offload, select, retrieve, attention, mlp, head, .. } = self;
        Self { sum: projections + index + offload + select + retrieve + attention + mlp + head, ..self }
    }
}

/// Bytes by what for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct MemoryByUse {
    /// Weights.
    pub weights: u64,
    /// Activations of steps and of a prompt's chunk, logits, scratch.
    pub activations: u64,
    /// Residual, and K and V of two layers, of the longest prompt.
    pub prompt: u64,
    /// Pages of steady zones and caches.
    pub kv_pages: u64,
    /// Tables.
    pub kv_tables: u64,
    /// Summaries, and what keys in low rank are rebuilt from.
    pub kv_summaries: u64,
    /// What stages hand on, and what a method's own operators hold.
    pub kv_lists: u64,
    /// In HBM; on the CPU what stands for it.
    pub total: u64,
    /// KV on the host.
    pub host_pages: u64,
}

impl MemoryByUse {
    /// Both together.
    pub fn plus(&self, other: &Self) -> Self {
        Self {
            weights: self.weights + other.weights,
            activations: self.activations + other.activations,
            prompt: self.prompt + other.prompt,
            kv_pages: self.kv_pages + other.kv_pages,
            kv_tables: self.kv_tables + other.kv_tables,
            kv_summaries: self.kv_summaries + other.kv_summaries,
            kv_lists: self.kv_lists + other.kv_lists,
            total: self.total + other.total,
            host_pages: self.host_pages + other.host_pages,
        }
    }

    /// With its total.
    pub fn totalled(self) -> Self {
        let Self { weights, activations, prompt, kv_pages, kv_tables, kv_summaries, kv_lists, .. } = self;
        Self {
            total: weights + activations + prompt + kv_pages + kv_tables + kv_summaries + kv_lists,
            ..self
        }
    }
}

/// One way to serve a batch, and what it takes.
#[derive(Clone, Debug, Serialize)]
pub struct Point {
    /// The method.
    pub method: String,
    /// Its budget.
    pub budget: Option<String>,
    /// Tokens of each request before the first step.
    pub context: usize,
    /// Requests of a step.
    pub batch: usize,
    /// What is kept between steps.
    pub cache: Caching,
    /// How the host keeps pages.
    #[serde(serialize_with = "by_name")]
    pub host_kv: HostFormat,
    /// Buffering pages for each mandatory page.
    pub buffering: f64,
    /// Slots of a row's cache.
    pub slots: usize,
    /// How the figures came to be.
    pub how: How,
    /// Why there are none.
    pub skipped: Option<String>,
    /// A step, milliseconds: of its graph on a GPU, of its call on the CPU.
    pub step_ms: Option<f64>,
    /// A step as the host sees it, with what it uploads and waits for, milliseconds.
    pub host_ms: Option<f64>,
    /// Tokens a second of the whole batch, by `step_ms`.
    pub tokens_per_s: Option<f64>,
    /// The same of all the model's layers, if fewer ran: each as long as those that ran. Worked out, not measured.
    pub tokens_per_s_all_layers: Option<f64>,
    /// A step by part, in a run with an event behind each.
    pub stages_ms: Option<Stages>,
    /// Pages that timed steps selected and found.
    pub hits: u64,
    /// And those that they had to fetch.
    pub misses: u64,
    /// Pages that went from the steady zone to a cache without a copy.
    pub adopted: u64,
    /// Hits over both; none if nothing was selected from a cache.
    pub hit_ratio: Option<f64>,
    /// Bytes that a step brings from the host.
    pub fetched_bytes_per_step: f64,
    /// Those over the time of a step.
    pub pcie_gb_per_s: Option<f64>,
    /// The step over the sum of the resident step and the fetched bytes at the copy engine's speed; none where that was not measured.
    pub over_sum: Option<f64>,
    /// The step over the larger of the two.
    pub over_max: Option<f64>,
    /// Memory by use.
    pub memory: MemoryByUse,
    /// KV memory of a request in all the model's layers, bytes, by formula.
    pub request_bytes: u64,
}

/// A cache, and how the host keeps pages, if not in full.
pub(super) fn cache_label(cache: Caching, host_kv: HostFormat) -> String {
    if host_kv == HostFormat::Full { cache.to_string() } else { format!("{cache}, {host_kv}") }
}

/// As users give it.
pub(super) fn by_name<S: Serializer>(format: &HostFormat, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(format)
}

impl Point {
    /// Fills in what follows from times and counts.
    pub fn finish(mut self, layers: usize, all_layers: usize) -> Self {
        let selected = self.hits + self.misses;
        self.hit_ratio = (selected > 0).then(|| self.hits as f64 / selected as f64);
        if let Some(step_ms) = self.step_ms.filter(|ms| *ms > 0.0) {
            let batch = self.batch as f64;
            self.tokens_per_s = Some(batch / step_ms * 1e3);
            self.pcie_gb_per_s = Some(self.fetched_bytes_per_step / step_ms / 1e6);
            // The head is there once, whatever the layers; beside a stream of bytes it takes no time.
            let head = self.stages_ms.map(|stages| stages.head);
            let head = if self.how == How::Bound { Some(0.0) } else { head };
            if let (Some(head), true) = (head, layers < all_layers) {
                let of_layers = (step_ms - head) * all_layers as f64 / layers as f64;
                self.tokens_per_s_all_layers = Some(batch / (of_layers + head) * 1e3);
            }
        }
        self
    }
}

/// Writes points as a table.
pub fn table(points: &[Point], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let all_layers = points.iter().any(|point| point.tokens_per_s_all_layers.is_some());
    write!(
        f,
        "  {:>7} {:>5} {:<18} {:>12} {:<18} {:>5} {:>9} {:>9}",
        "context", "batch", "method", "budget", "cache", "buf.", "step, ms", "tokens/s"
    )?;
    if all_layers {
        write!(f, " {:>10}", "all layers")?;
    }
    writeln!(f, " {:>6} {:>12} {:>6} {:>6} {:>6}", "hit", "fetched/step", "GB/s", "x sum", "x max")?;
    for point in points {
        let budget = point.budget.as_deref().unwrap_or("-");
        let buffering = match point.buffering {
            buffering if buffering > 1e6 => "all".to_owned(),
            buffering => buffering.to_string(),
        };
        write!(
            f,
            "  {:>7} {:>5} {:<18} {budget:>12} {:<18} {buffering:>5} ",
            point.context,
            point.batch,
            point.method,
            cache_label(point.cache, point.host_kv)
        )?;
        if let Some(reason) = &point.skipped {
            writeln!(f, "skipped: {reason}")?;
            continue;
        }
        let number = |number: Option<f64>, digits: usize| {
            number.map_or_else(|| "-".to_owned(), |number| format!("{number:.digits$}"))
        };
        let mark = if point.how == How::Measured { "" } else { "~" };
        write!(
            f,
            "{:>9} {:>9}",
            format!("{mark}{}", number(point.step_ms, 3)),
            number(point.tokens_per_s, 1)
        )?;
        if all_layers {
            write!(f, " {:>10}", number(point.tokens_per_s_all_layers, 1))?;
        }
        writeln!(
            f,
            " {:>6} {:>12} {:>6} {:>6} {:>6}",
            number(point.hit_ratio, 3),
            HumanBytes(point.fetched_bytes_per_step as u64).to_string(),
            number(point.pcie_gb_per_s, 1),
            number(point.over_sum, 2),
            number(point.over_max, 2)
        )?;
    }
    Ok(())
}

/// Writes the parts of the steps that were measured by part.
pub fn parts(points: &[Point], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    writeln!(
        f,
        "  {:>7} {:>5} {:<18} {:<18} {:>8} {:>8} {:>8} {:>8} {:>8} {:>9} {:>8} {:>8} {:>9}",
        "context",
        "batch",
        "method",
        "cache",
        "project",
        "index",
        "offload",
        "select",
        "retrieve",
        "attention",
        "MLP",
        "head",
        "sum"
    )?;
    for point in points {
        let Some(stages) = point.stages_ms else { continue };
        let Stages { projections, index, offload, select, retrieve, attention, mlp, head, sum } = stages;
        writeln!(
            f,
            "  {:>7} {:>5} {:<18} {:<18} {projections:>8.3} {index:>8.3} {offload:>8.3} {select:>8.3} {retrieve:>8.3} {attention:>9.3} {mlp:>8.3} {head:>8.3} {sum:>9.3}",
            point.context,
            point.batch,
            point.method,
            cache_label(point.cache, point.host_kv)
        )?;
    }
    Ok(())
}

/// Writes what points that ran hold in memory.
pub fn memory_table(points: &[Point], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    writeln!(
        f,
        "  {:>7} {:>5} {:<18} {:<18} {:>10} {:>11} {:>10} {:>10} {:>10} {:>10} {:>10} {:>10} {:>10}",
        "context",
        "batch",
        "method",
        "cache",
        "weights",
        "activations",
        "prompt",
        "pages",
        "tables",
        "summaries",
        "lists",
        "total",
        "on host"
    )?;
    let ran = |point: &&Point| matches!(point.how, How::Measured | How::Bound);
    for point in points.iter().filter(ran) {
        let MemoryByUse { weights, activations, prompt, kv_pages, kv_tables, .. } = point.memory;
        let MemoryByUse { kv_summaries, kv_lists, total, host_pages, .. } = point.memory;
        let bytes = |bytes: u64| HumanBytes(bytes).to_string();
        writeln!(
            f,
            "  {:>7} {:>5} {:<18} {:<18} {:>10} {:>11} {:>10} {:>10} {:>10} {:>10} {:>10} {:>10} {:>10}",
            point.context,
            point.batch,
            point.method,
            cache_label(point.cache, point.host_kv),
            bytes(weights),
            bytes(activations),
            bytes(prompt),
            bytes(kv_pages),
            bytes(kv_tables),
            bytes(kv_summaries),
            bytes(kv_lists),
            bytes(total),
            bytes(host_pages)
        )?;
    }
    Ok(())
}
