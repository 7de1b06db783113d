use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::Serialize;
use spinkv::gates::Gates;
use spinkv::memory::{HostFormat, RequestPlan, footprint};
use spinkv::pipeline::{Budget, Method, SteadyZone};
use spinkv::{KvConfig, KvShape};

use super::BenchError;
use crate::config::ModelConfig;
use crate::error::Result;
use crate::eval::MethodChoice;
use crate::pages::PageOptions;

/// Bytes of an element of a summary in the memory that a budget is for: a GPU's.
const SUMMARY_BYTES: usize = 2;

/// What is kept of the KV on the GPU between steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Caching {
    /// Dense attention, and all of it.
    DenseHbm,
    /// Dense attention, and nothing: every step brings all of it from the host.
    DenseStreamed,
    /// Nothing: every step fetches all that it selects.
    NoCache,
    /// What the step before selected.
    PreviousStep,
    /// What the bucketed LRU keeps, and Attention waits for all pages of its layer.
    Serial,
    /// What the bucketed LRU keeps, which is what serves: Attention begins with the pages that are there.
    BucketedLru,
    /// The same, of half-batches in alternation: one computes while the other's pages come.
    InHalves,
    /// What an exact LRU would keep.
    ExactLru,
    /// What is best kept by one who knows the future.
    Belady,
    /// All that is ever selected: no step misses.
    Resident,
}

impl Caching {
    /// All of them, in the order of tables.
    pub const ALL: [Self; 10] = [
        Self::DenseHbm,
        Self::DenseStreamed,
        Self::NoCache,
        Self::PreviousStep,
        Self::Serial,
        Self::BucketedLru,
        Self::InHalves,
        Self::ExactLru,
        Self::Belady,
        Self::Resident,
    ];

    /// The name on the command line and in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::DenseHbm => "dense-hbm",
            Self::DenseStreamed => "dense-streamed",
            Self::NoCache => "no-cache",
            Self::PreviousStep => "previous-step",
            Self::Serial => "serial",
            Self::BucketedLru => "bucketed-lru",
            Self::InHalves => "in-halves",
            Self::ExactLru => "exact-lru",
            Self::Belady => "belady",
            Self::Resident => "resident",
        }
    }

    /// Whether it is about what a GPU does while pages come.
    pub fn is_of_gpu(self) -> bool {
        matches!(self, Self::Serial | Self::InHalves)
    }

    /// Whether attention is dense.
    pub fn is_dense(self) -> bool {
        matches!(self, Self::DenseHbm | Self::DenseStreamed)
    }

    /// Whether it has no buffering.
    fn is_bare(self) -> bool {
        matches!(self, Self::NoCache | Self::PreviousStep)
    }
}

impl fmt::Display for Caching {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Caching {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        let found = Self::ALL.into_iter().find(|caching| caching.name() == name);
        found.ok_or_else(|| format!("known: {}", Self::ALL.map(Self::name).join(", ")))
    }
}

/// Requests of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BatchSize {
    /// This many.
    Fixed(usize),
    /// As many as the budget of KV memory holds.
    Fit,
}

impl FromStr for BatchSize {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text.parse() {
            Ok(requests @ 1..=1024) => Ok(Self::Fixed(requests)),
            _ if text == "fit" => Ok(Self::Fit),
            _ => Err("requests, from 1 to 1024, or fit".to_owned()),
        }
    }
}

/// Who says what a step selects.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Selections {
    /// The method, from the model's queries.
    Model,
    /// Scores and top-k run, and their result is replaced by one drawn with the locality that was measured on real text; at another pace, if the
    /// hit ratio is given that the serving cache is to have.
    Drawn {
        /// Hits among selected pages, above 0 and below 1.
        hit_ratio: Option<f64>,
    },
}

/// What to measure of decode steps.
#[derive(Clone, Debug)]
pub struct DecodeOptions {
    /// The methods.
    pub methods: Vec<MethodChoice>,
    /// Their budgets.
    pub budgets: Vec<Budget>,
    /// Requests of a step.
    pub batches: Vec<BatchSize>,
    /// Tokens of each request before the first step.
    pub contexts: Vec<usize>,
    /// Buffering pages for each mandatory page.
    pub bufferings: Vec<f64>,
    /// What is kept between steps.
    pub caches: Vec<Caching>,
    /// Steps before those that are timed, while caches fill.
    pub warm_up: usize,
    /// Steps that are timed.
    pub steps: usize,
    /// Who says what a step selects.
    pub selections: Selections,
    /// The KV memory of the whole model in bytes: all its layers' caches, summaries, tables and steady zones, and K and V of two layers of the longest
    /// prompt.
    pub kv_bytes: Option<u64>,
    /// What every step reads.
    pub steady: SteadyZone,
    /// How KV pages are made.
    pub pages: PageOptions,
    /// Other formats of host pages, with which the serving cache is measured, too.
    pub coded: Vec<HostFormat>,
    /// Learned gates, for methods that need them.
    pub gates: Option<Arc<Gates>>,
    /// Seed of what is drawn.
    pub seed: u64,
}

/// Points that share one KV memory.
#[derive(Clone, Debug)]
pub struct Group {
    /// Tokens of each request before the first step.
    pub context: usize,
    /// Requests of a step.
    pub batch: usize,
    /// Whether the budget of KV memory has room for them.
    pub fits: bool,
    /// The method.
    pub method: MethodChoice,
    /// Its budget, if it has one.
    pub budget: Option<Budget>,
    /// The same with its options.
    pub built: Arc<dyn Method>,
    /// Its KV memory.
    pub kv: KvConfig,
    /// Buffering pages for each mandatory page.
    pub buffering: f64,
    /// What is kept between steps.
    pub caches: Vec<Caching>,
    /// Bytes of the whole model's KV memory that a request takes on a GPU, by formula.
    pub request_bytes: u64,
}

impl DecodeOptions {
    /// Refuses what nothing can be measured with, in a model of `config`.
    ///
    /// # Errors
    /// [`BenchError::Nothing`] and [`BenchError::Context`], and those of [`groups`](Self::groups).
    pub fn check(&self, config: &ModelConfig) -> Result<()> {
        for (empty, what) in [
            (self.methods.is_empty(), "method"),
            (self.budgets.is_empty(), "budget"),
            (self.batches.is_empty(), "batch"),
            (self.contexts.is_empty(), "context"),
            (self.bufferings.is_empty(), "buffering"),
            (self.caches.is_empty(), "cache"),
            (self.steps == 0, "step"),
        ] {
            if empty {
                return Err(BenchError::Nothing { what }.into());
            }
        }
        for context in self.contexts.iter().copied() {
            let taken = self.max_tokens(context) - context;
            // A partition of 64 tokens beside the steady zone, at least.
            let least = self.steady.tokens() + 128;
            let limit = config.max_position_embeddings.saturating_sub(taken);
            if context < least || context > limit {
                return Err(BenchError::Context { context, least, limit }.into());
            }
        }
        self.groups(config, config.layers).map(|_| ())
    }

    /// Steps that one caching takes, at most: a GPU's are timed three times, with and without events and by the host's clock.
    pub fn run_steps(&self) -> usize {
        self.warm_up + 3 * self.steps
    }

    /// Tokens that a request may come to hold: on a GPU cachings share a memory, and the next goes on where the one before has stopped.
    pub fn max_tokens(&self, context: usize) -> usize {
        let sharing = 2 + self.caches.iter().filter(|caching| caching.is_of_gpu()).count();
        context + sharing * self.run_steps() + 1
    }

    /// The groups to measure in a model of `config`, which has the first of `all_layers` layers.
    ///
    /// # Errors
    /// Those of [`MethodChoice::build`], [`KvConfig::new`] and [`RequestPlan::new`].
    pub fn groups(&self, config: &ModelConfig, all_layers: usize) -> Result<Vec<Group>> {
        let shape = KvShape::new(config.layers, config.query_heads, config.kv_heads, config.head_dim)?;
        let dense: MethodChoice = "dense".parse()?;
        let mut groups = Vec::new();
        let which = |keep: &dyn Fn(&Caching) -> bool| -> Vec<Caching> {
            self.caches.iter().copied().filter(keep).collect()
        };
        for context in self.contexts.iter().copied() {
            for batch in self.batches.iter().copied() {
                let mut add = |method: &MethodChoice, budget, buffering, host, caches: Vec<Caching>| {
                    if caches.is_empty() {
                        return Ok(());
                    }
                    let (place, pages) = ((context, batch, all_layers), PageOptions { host, ..self.pages });
                    groups.push(self.group(
                        config,
                        shape,
                        place,
                        (method, budget),
                        buffering,
                        (pages, caches),
                    )?);
                    Ok::<_, crate::Error>(())
                };
                let host = self.pages.host;
                add(&dense, None, 0.0, HostFormat::Full, which(&|caching| caching.is_dense()))?;
                for method in &self.methods {
                    for budget in self.budgets_of(config, method) {
                        add(method, budget, 0.0, host, which(&|caching| caching.is_bare()))?;
                        // What is drawn can stand still, so that nothing misses in any cache; a model's selections need room for everything.
                        let apart = self.selections == Selections::Model;
                        let largest = self.bufferings.iter().copied().fold(0.0, f64::max);
                        for buffering in self.bufferings.iter().copied() {
                            let resident = !apart && buffering == largest;
                            let caches = which(&|caching| match caching {
                                Caching::Resident => resident,
                                _ => !caching.is_dense() && !caching.is_bare(),
                            });
                            add(method, budget, buffering, host, caches)?;
                            for coded in self.coded.iter().copied().filter(|coded| *coded != host) {
                                let serving = which(&|caching| {
                                    matches!(caching, Caching::BucketedLru | Caching::InHalves)
                                });
                                add(method, budget, buffering, coded, serving)?;
                            }
                        }
                        if apart {
                            let resident = which(&|caching| *caching == Caching::Resident);
                            add(method, budget, f64::MAX, host, resident)?;
                        }
                    }
                }
            }
        }
        Ok(groups)
    }

    /// Budgets that make a difference to a method.
    fn budgets_of(&self, config: &ModelConfig, method: &MethodChoice) -> Vec<Option<Budget>> {
        let reads = method.build(self.budgets[0], self.steady, self.gates.clone(), config.rotary());
        match reads {
            Ok(method) if method.select().budget().is_none() => vec![None],
            _ => self.budgets.iter().copied().map(Some).collect(),
        }
    }

    fn group(
        &self,
        config: &ModelConfig,
        shape: KvShape,
        (context, batch, all_layers): (usize, BatchSize, usize),
        (method, budget): (&MethodChoice, Option<Budget>),
        buffering: f64,
        (pages, caches): (PageOptions, Vec<Caching>),
    ) -> Result<Group> {
        let budget_or_first = budget.unwrap_or(self.budgets[0]);
        let built = method.build(budget_or_first, self.steady, self.gates.clone(), config.rotary())?;
        let kv = KvConfig::new(shape, pages.layout(shape.head_dim)?, built.clone())?;
        let max_tokens = self.max_tokens(context);
        let plan = RequestPlan::new(&kv, max_tokens, buffering)?;
        // Every layer takes the same; K and V of two layers of one prompt are there once.
        let of_layers = footprint(&kv, &plan, max_tokens, SUMMARY_BYTES).gpu.total();
        let request_bytes = of_layers * all_layers as u64 / shape.layers as u64;
        let prompt_bytes = plan.prompt_bytes(&kv);
        let most = self.kv_bytes.map(|bytes| bytes.saturating_sub(prompt_bytes) / request_bytes.max(1));
        let most = most.map(|most| most.min(1024) as usize);
        let batch = match batch {
            BatchSize::Fixed(batch) => batch,
            BatchSize::Fit => most.unwrap_or(1).max(1),
        };
        let fits = most.is_none_or(|most| batch <= most);
        let method = method.clone();
        Ok(Group { context, batch, fits, method, budget, built, kv, buffering, caches, request_bytes })
    }
}
