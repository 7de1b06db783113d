use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use spinkv::algorithms::Dense;
use spinkv::gates::Gates;
use spinkv::memory::{HostLayout, RequestPlan};
use spinkv::pipeline::{Budget, DEFAULT_BUFFERING, SteadyZone};
use spinkv::{KvConfig, KvShape};
use std::sync::Arc;

use super::haystack::ANSWER_TOKENS;
use super::{EvalError, Haystack, Key, LEAST_CONTEXT, MethodChoice, Question, fingerprint};
use crate::config::ModelConfig;
use crate::error::Result;
use crate::gates;
use crate::pages::PageOptions;
use crate::tokenizer::Tokenizer;

/// What is asked of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Task {
    /// A number hidden in long text, answered greedily: exact match of its seven digits.
    Needle,
    /// Held-out text after a long prompt, token by token as it is: nats a token, and the divergence from dense attention.
    Perplexity,
}

impl Task {
    /// The name in tables and files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Needle => "needle",
            Self::Perplexity => "perplexity",
        }
    }
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What to evaluate.
#[derive(Clone, Debug, PartialEq)]
pub struct EvalOptions {
    /// The tasks.
    pub tasks: Vec<Task>,
    /// The methods.
    pub methods: Vec<MethodChoice>,
    /// The budgets, for methods that have one.
    pub budgets: Vec<Budget>,
    /// Tokens of the contexts: prompt and what follows it together.
    pub contexts: Vec<usize>,
    /// Prompts of each task and context.
    pub prompts: usize,
    /// Tokens of held-out text that are scored after each prompt.
    pub scored_tokens: usize,
    /// Seed of the prompts.
    pub seed: u64,
    /// What every step reads.
    pub steady: SteadyZone,
    /// How KV pages are made.
    pub pages: PageOptions,
    /// Cache pages wanted beyond the mandatory ones, as a multiple of them.
    pub buffering: f64,
    /// Whether to work out the share of the attention mass that is read; on the CPU.
    pub recall: bool,
    /// Learned gates, for methods that need them.
    pub gates: Option<Arc<Gates>>,
}

impl Default for EvalOptions {
    /// Needles at 4096 tokens, 16 prompts, no methods yet.
    fn default() -> Self {
        Self {
            tasks: vec![Task::Needle],
            methods: Vec::new(),
            budgets: [256, 512, 1024, 2048].map(Budget::Tokens).to_vec(),
            contexts: vec![4096],
            prompts: 16,
            scored_tokens: 64,
            seed: 0,
            steady: SteadyZone::default(),
            pages: PageOptions::default(),
            buffering: DEFAULT_BUFFERING,
            recall: true,
            gates: None,
        }
    }
}

/// What one entry of a table is about.
#[derive(Clone, Debug)]
pub struct Cell {
    /// The task.
    pub task: Task,
    /// Tokens of the context.
    pub context: usize,
    /// The method.
    pub method: MethodChoice,
    /// Its budget, where it has one.
    pub budget: Option<Budget>,
    /// Its KV memory.
    pub kv: KvConfig,
}

impl Cell {
    /// The budget as tables have it.
    pub fn budget_name(&self) -> String {
        self.budget.map_or_else(|| "-".to_owned(), |budget| budget.to_string())
    }
}

/// An evaluation that can be run: checked against a model's configuration, with the text that prompts are made from. Making one costs
/// little, so what cannot run is refused before weights are loaded.
#[derive(Debug)]
pub struct Evaluation {
    pub(super) options: EvalOptions,
    pub(super) cells: Vec<Cell>,
    pub(super) haystack: Haystack,
    /// Dense attention over the same pages.
    pub(super) dense: KvConfig,
    pub(super) model: String,
    /// Fingerprint of the gates, if there are any.
    pub(super) gates: Option<String>,
}

impl Evaluation {
    /// Checks `options` for the checkpoint in `dir` and reads the haystack in `haystack_dir`.
    ///
    /// # Errors
    /// [`EvalError`] for lists that are empty and contexts that do not fit; those of [`MethodChoice::build`], [`KvConfig::new`] and
    /// [`RequestPlan::new`] for methods, options and budgets that cannot run; those of [`Haystack::open`].
    pub fn new(
        dir: &Path,
        config: &ModelConfig,
        tokenizer: &Tokenizer,
        haystack_dir: &Path,
        mut options: EvalOptions,
    ) -> Result<Self> {
        let shape = KvShape::new(config.layers, config.query_heads, config.kv_heads, config.head_dim)?;
        for (empty, what) in [
            (options.tasks.is_empty(), "task"),
            (options.methods.is_empty(), "method"),
            (options.budgets.is_empty(), "budget"),
            (options.contexts.is_empty(), "context"),
            (options.prompts == 0, "prompt"),
            (options.scored_tokens == 0, "token to score"),
        ] {
            if empty {
                return Err(EvalError::Nothing { what }.into());
            }
        }
        options.tasks.sort_unstable();
        options.tasks.dedup();
        options.contexts.sort_unstable();
        options.contexts.dedup();
        keep_first(&mut options.methods);
        keep_first(&mut options.budgets);
        let limit = config.max_position_embeddings;
        for context in options.contexts.iter().copied() {
            if context > limit {
                return Err(EvalError::ContextTooLong { context, limit }.into());
            }
            if context < LEAST_CONTEXT {
                return Err(EvalError::context_too_short(context).into());
            }
            let least = options.scored_tokens.saturating_add(1);
            if options.tasks.contains(&Task::Perplexity) && context < least {
                return Err(EvalError::ContextTooShort { context, least }.into());
            }
        }
        let layout = options.pages.layout(shape.head_dim)?;
        let cells = cells(&options, config, shape, layout)?;
        // It fetches nothing, so nothing of it is coded.
        let dense = KvConfig::new(shape, *layout.page(), Arc::new(Dense { steady: options.steady }))?;
        let haystack = Haystack::open(haystack_dir, tokenizer)?;
        let model = fingerprint::of_model(dir)?;
        let gates = options.gates.as_deref().map(fingerprint::of_gates);
        Ok(Self { options, cells, haystack, dense, model, gates })
    }

    /// What it was made with, every list without repetitions.
    pub fn options(&self) -> &EvalOptions {
        &self.options
    }

    /// The cells, by task, context, method and budget.
    pub fn cells(&self) -> &[Cell] {
        &self.cells
    }

    /// A prompt of a task and context.
    ///
    /// # Errors
    /// Those of [`Haystack::needle`] and [`Haystack::window`].
    pub fn question(
        &self,
        tokenizer: &Tokenizer,
        task: Task,
        context: usize,
        prompt: usize,
    ) -> Result<Question> {
        let seed = self.options.seed;
        match task {
            Task::Needle => self.haystack.needle(tokenizer, seed, context, prompt),
            Task::Perplexity => {
                self.haystack.window(tokenizer, seed, context, self.options.scored_tokens, prompt)
            }
        }
    }

    /// All tokens that a request of this context holds at most.
    pub(super) fn max_tokens(context: usize) -> usize {
        // A needle's prompt leaves room for its answer.
        context
    }

    /// Steps after a prompt, at most.
    pub(super) fn steps(&self, task: Task) -> usize {
        match task {
            Task::Needle => ANSWER_TOKENS - 1,
            Task::Perplexity => self.options.scored_tokens,
        }
    }

    /// What a result is found by.
    pub(super) fn key(&self, cell: &Cell, prompt: usize, backend: &str) -> Key {
        let EvalOptions { seed, steady, pages, buffering, .. } = self.options;
        Key {
            format: Key::FORMAT,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            model: self.model.clone(),
            text: self.haystack.fingerprint().to_owned(),
            backend: backend.to_owned(),
            task: cell.task,
            context: cell.context,
            scored_tokens: if cell.task == Task::Perplexity { self.options.scored_tokens } else { 0 },
            seed,
            prompt,
            method: cell.method.label().to_owned(),
            gates: self.gates.clone().filter(|_| gates::needed_by(cell.method.name())),
            budget: cell.budget.map(|budget| budget.to_string()),
            sinks: steady.sinks,
            window: steady.window,
            page_tokens: pages.tokens,
            kv_dtype: pages.dtype_name().to_owned(),
            host_kv: pages.host.to_string(),
            buffering: buffering.to_string(),
            recall: self.options.recall && backend == "cpu",
        }
    }
}

fn cells(
    options: &EvalOptions,
    config: &ModelConfig,
    shape: KvShape,
    layout: HostLayout,
) -> Result<Vec<Cell>> {
    // Each method once per budget, whatever the tasks and contexts.
    let mut kinds = Vec::new();
    for method in &options.methods {
        for budget in &options.budgets {
            let built = method.build(*budget, options.steady, options.gates.clone(), config.rotary())?;
            let has_budget = built.select().budget().is_some();
            let kv = KvConfig::new(shape, layout, built)?;
            kinds.push((method, has_budget.then_some(*budget), kv));
            if !has_budget {
                break;
            }
        }
    }
    let mut cells = Vec::new();
    for task in options.tasks.iter().copied() {
        for context in options.contexts.iter().copied() {
            for (method, budget, kv) in &kinds {
                RequestPlan::new(kv, Evaluation::max_tokens(context), options.buffering)?;
                let (method, budget, kv) = ((*method).clone(), *budget, kv.clone());
                cells.push(Cell { task, context, method, budget, kv });
            }
        }
    }
    Ok(cells)
}

/// Removes what is in the list already.
fn keep_first<T: PartialEq + Clone>(list: &mut Vec<T>) {
    let mut kept: Vec<T> = Vec::with_capacity(list.len());
    for item in list.drain(..) {
        if !kept.contains(&item) {
            kept.push(item);
        }
    }
    *list = kept;
}
