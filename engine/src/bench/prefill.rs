use std::fmt;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;
use spinkv::KvConfig;
use spinkv::backend::cpu::CpuBackend;
use spinkv::gates::Gates;
use spinkv::memory::MemoryLimits;
use spinkv::pipeline::{Budget, Pipeline, Stage, SteadyZone};

use super::{Facts, Listen, Prompts, median};
use crate::error::Result;
use crate::eval::MethodChoice;
use crate::model::{Model, Wanted};
use crate::pages::PageOptions;

/// What to measure of prompts.
#[derive(Clone, Debug)]
pub struct PrefillOptions {
    /// The methods whose Index is measured.
    pub methods: Vec<MethodChoice>,
    /// Their budget, by which some choose how much Index does.
    pub budget: Budget,
    /// Tokens of the prompts.
    pub contexts: Vec<usize>,
    /// Prompts of each kind that are timed, after one that is not.
    pub rounds: usize,
    /// What every step reads.
    pub steady: SteadyZone,
    /// How KV pages are made.
    pub pages: PageOptions,
    /// Learned gates, for methods that need them.
    pub gates: Option<Arc<Gates>>,
}

impl PrefillOptions {
    /// The KV memory of a method in a model of this shape, which turns keys by `rotary`.
    ///
    /// # Errors
    /// Those of [`MethodChoice::build`] and [`KvConfig::new`].
    pub fn kv(
        &self,
        shape: spinkv::KvShape,
        rotary: Arc<spinkv::Rotary>,
        method: &MethodChoice,
    ) -> Result<KvConfig> {
        let method = method.build(self.budget, self.steady, self.gates.clone(), rotary)?;
        Ok(KvConfig::new(shape, self.pages.layout(shape.head_dim)?, method)?)
    }
}

/// A prompt through the layers that there are.
#[derive(Clone, Debug, Default, Serialize)]
pub struct PrefillRow {
    /// The method.
    pub method: String,
    /// Tokens of the prompt.
    pub context: usize,
    /// Why there are no figures, if there are none.
    pub skipped: Option<String>,
    /// From nothing in the KV memory to the first token's logits, milliseconds.
    pub prompt_ms: f64,
    /// Tokens a second through these layers and the head.
    pub tokens_per_s: f64,
    /// One layer of the dense prompt alone: projections, causal attention, MLP.
    pub dense_layer_ms: f64,
    /// The method's Index of one layer, with nothing beside it; 0 for methods without.
    pub index_layer_ms: f64,
    /// Index over the dense layer: asked for are at most 0.05, of clusters 0.2.
    pub index_share: f64,
    /// What Index, Offload and the warm start add to the whole prompt, beside whose layers they run on a GPU.
    pub kept_ms: f64,
    /// That over the prompt without it.
    pub kept_share: f64,
}

impl PrefillRow {
    /// A row without figures.
    pub fn skipped(method: &MethodChoice, context: usize, reason: String) -> Self {
        Self { method: method.label().to_owned(), context, skipped: Some(reason), ..Self::default() }
    }

    /// `whole` and `dense` are the milliseconds of whole prompts, with and without what is kept of them.
    pub fn new(
        method: &MethodChoice,
        context: usize,
        (whole, dense): (f64, f64),
        (dense_layer_ms, index_layer_ms): (f64, f64),
    ) -> Self {
        Self {
            method: method.label().to_owned(),
            context,
            skipped: None,
            prompt_ms: whole,
            tokens_per_s: context as f64 / whole * 1e3,
            dense_layer_ms,
            index_layer_ms,
            index_share: index_layer_ms / dense_layer_ms,
            kept_ms: whole - dense,
            kept_share: (whole - dense) / dense,
        }
    }
}

/// What `spinkv bench prefill` prints.
#[derive(Clone, Debug, Serialize)]
pub struct PrefillReport {
    /// Of what, on what.
    pub facts: Facts,
    /// The methods' budget.
    pub budget: String,
    /// Prompts of each kind that were timed; figures are medians.
    pub rounds: usize,
    /// By context and method.
    pub prompts: Vec<PrefillRow>,
}

/// Measures on the CPU, where stages run one after the other: what Index takes is its time in the whole prompt.
///
/// # Errors
/// What a method or its memory refuses.
pub fn on_cpu(
    model: &Model,
    prompts: &Prompts,
    options: &PrefillOptions,
    listen: Listen<'_>,
) -> Result<Vec<PrefillRow>> {
    let (mut rows, of) = (Vec::new(), options.contexts.len() * options.methods.len());
    for context in options.contexts.iter().copied() {
        let tokens = prompts.prompt(0, context);
        for method in &options.methods {
            listen(&format!("{method}, {context} tokens"), rows.len(), of);
            let kv = options.kv(model.shape(), model.config().rotary(), method)?;
            let layers = model.config().layers as f64;
            let (mut whole, mut dense, mut index) = (Vec::new(), Vec::new(), Vec::new());
            for round in 0..=options.rounds {
                let backend = CpuBackend::new(kv.clone(), MemoryLimits::default());
                let mut pipeline = Pipeline::new(backend);
                let request = pipeline.admit(context + 1)?;
                let start = Instant::now();
                let proceed = |_, _| ControlFlow::Continue(());
                let hidden = model.prefill(&mut pipeline, request, &tokens, Wanted::Last, proceed)?;
                std::hint::black_box(model.logits(&hidden));
                let ms = start.elapsed().as_secs_f64() * 1e3;
                if round == 0 {
                    continue;
                }
                let times = pipeline.prefill_times();
                let of_stage = |stage| times.get(stage).as_secs_f64() * 1e3;
                let kept: f64 =
                    [Stage::Index, Stage::Offload, Stage::Select, Stage::Retrieve].map(of_stage).iter().sum();
                whole.push(ms);
                dense.push(ms - kept);
                index.push(of_stage(Stage::Index) / layers);
            }
            let dense = median(dense);
            let times = (dense / layers, median(index));
            rows.push(PrefillRow::new(method, context, (median(whole), dense), times));
        }
    }
    Ok(rows)
}

impl fmt::Display for PrefillReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.facts)?;
        writeln!(f, "prompts, medians of {}; Index of one layer beside one dense layer\n", self.rounds)?;
        writeln!(
            f,
            "  {:<24} {:>8} {:>11} {:>10} {:>15} {:>10} {:>7} {:>10} {:>7}",
            "method",
            "tokens",
            "prompt, ms",
            "tokens/s",
            "dense layer, ms",
            "index, ms",
            "share",
            "kept, ms",
            "share"
        )?;
        for row in &self.prompts {
            let PrefillRow { method, context, skipped, .. } = row;
            write!(f, "  {method:<24} {context:>8} ")?;
            match skipped {
                Some(reason) => writeln!(f, "skipped: {reason}")?,
                None => writeln!(
                    f,
                    "{:>11.1} {:>10.0} {:>15.3} {:>10.4} {:>6.2}% {:>10.2} {:>6.2}%",
                    row.prompt_ms,
                    row.tokens_per_s,
                    row.dense_layer_ms,
                    row.index_layer_ms,
                    100.0 * row.index_share,
                    row.kept_ms,
                    100.0 * row.kept_share
                )?,
            }
        }
        write!(
            f,
            "\nkept: Index, Offload to the host and the warm start together, by how much longer the whole prompt takes"
        )
    }
}
