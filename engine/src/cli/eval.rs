use std::io::IsTerminal;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use spinkv::backend::BackendKind;
use spinkv::pipeline::{Budget, SteadyZone};
use spinkv_engine::config::ModelConfig;
use spinkv_engine::eval::plot::plot;
use spinkv_engine::eval::{
    self, EvalError, EvalOptions, Evaluation, Journal, MethodChoice, Progress, Report, Task,
};
use spinkv_engine::gates;
use spinkv_engine::model::Model;
use spinkv_engine::tokenizer::Tokenizer;
use spinkv_engine::{Error, Result};

use super::demo;
use super::output::Output;
use super::pages::PageArguments;

#[derive(Debug, Args)]
#[command(after_help = "What is measured:
  needle      8 to 32 secret codes at random lines of held-out text, one of which is asked for: exact match of seven
              digits, generated greedily
  perplexity  held-out text after a long prompt, given token by token: nats a token, how many more than with dense
              attention, and the divergence of the distributions
  Prompts are dense with every method; the steps after them are the method's. On the CPU a prompt passes through the
  model once, and each method takes over its keys and values.

Examples:
  spinkv eval                                              # dense, streaming-llm and shadowkv at 4K, needles
  spinkv eval --methods shadowkv --budgets 256,1.56% --contexts 4k,8k --prompts 64
  spinkv eval --task both --tokens 32 --plot accuracy.svg --json > accuracy.json
  spinkv eval --contexts 4k,8k,16k,32k --resume eval.jsonl # may be stopped, and goes on where it was
  spinkv eval --methods dense,NAME:OPTION=VALUE            # with an option that only this method has")]
pub(crate) struct EvalArguments {
    /// Directory of a Qwen3 or Llama checkpoint [default: the bundled models/needle-tiny]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,

    /// Learned gates, for seer-attention: a safetensors file [default: gates.safetensors beside the checkpoint]
    #[arg(long, value_name = "FILE")]
    gates: Option<PathBuf>,

    /// Folder of haystack.txt (held-out text) and nouns.txt (a noun a line) [default: the model's]
    #[arg(long, value_name = "DIR")]
    haystack: Option<PathBuf>,

    /// Methods, as for `spinkv generate --method`; options of a method's own follow as NAME:OPTION=VALUE:OPTION=VALUE
    #[arg(
        long,
        value_name = "NAMES",
        value_delimiter = ',',
        default_value = "dense,streaming-llm,shadowkv",
        help_heading = "What to measure"
    )]
    methods: Vec<String>,

    /// Budgets, for methods that have one: tokens (1024), percentages of the context (1.56%) or fractions (0.0156)
    #[arg(
        long,
        value_name = "BUDGETS",
        value_delimiter = ',',
        default_value = "256,512,1024,2048",
        allow_hyphen_values = true,
        help_heading = "What to measure"
    )]
    budgets: Vec<String>,

    /// Tokens of the contexts, prompt and answer together: 4096 or 4k
    #[arg(
        long,
        value_name = "TOKENS",
        value_delimiter = ',',
        default_value = "4k",
        help_heading = "What to measure"
    )]
    contexts: Vec<String>,

    /// needle, perplexity or both
    #[arg(long, value_name = "TASK", default_value = "needle", value_parser = ["needle", "perplexity", "both"],
          help_heading = "What to measure")]
    task: String,

    /// Prompts of each task and context
    #[arg(long, value_name = "PROMPTS", default_value_t = 16, help_heading = "What to measure")]
    prompts: usize,

    /// Tokens that are scored after each prompt of the task perplexity
    #[arg(long, value_name = "TOKENS", default_value_t = 64, help_heading = "What to measure")]
    tokens: usize,

    /// Seed of the prompts
    #[arg(long, value_name = "SEED", default_value_t = 0, help_heading = "What to measure")]
    seed: u64,

    /// Leave out the share of the attention mass that is read (CPU)
    #[arg(long, help_heading = "What to measure")]
    no_recall: bool,

    /// First tokens of the sequence that are always read
    #[arg(long, default_value_t = 4, value_name = "TOKENS", help_heading = "Memory")]
    sinks: usize,

    /// Newest tokens that are always read, at least 1
    #[arg(long, default_value_t = 64, value_name = "TOKENS", help_heading = "Memory")]
    window: usize,

    #[command(flatten)]
    pages: PageArguments,

    /// Cache pages beyond those that one step needs, as a multiple of them
    #[arg(long, default_value_t = spinkv::pipeline::DEFAULT_BUFFERING, value_name = "RATIO", help_heading = "Memory")]
    buffering: f64,

    /// Where the pipeline runs: cpu or cuda
    #[arg(long, default_value = "cpu", value_name = "NAME", help_heading = "Running")]
    backend: String,

    /// Prompts under way at a time on the CPU, each on its share of the cores [default: as many as there are cores]
    #[arg(long, value_name = "JOBS", help_heading = "Running", value_parser = clap::value_parser!(u32).range(1..=1024))]
    jobs: Option<u32>,

    /// Memory for keys and values of prompts under way on the CPU, in MiB; a prompt that needs more passes through the model anew
    /// for every method
    #[arg(long, value_name = "MIB", default_value_t = 4096, help_heading = "Running")]
    keep_mib: u64,

    /// Whether products of many tokens go through cuBLASLt on a GPU, as for `spinkv generate`
    #[arg(long, default_value = "auto", value_name = "WHEN", value_parser = ["auto", "require", "off"], help_heading = "Running")]
    cublaslt: String,

    /// Keep results in FILE, a line each, and take from it those that it has. Results of other settings are left alone
    #[arg(long, value_name = "FILE")]
    resume: Option<PathBuf>,

    /// Draw accuracy over bytes fetched to FILE, as SVG
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,

    /// Print one JSON object instead of tables
    #[arg(long)]
    json: bool,
}

/// Runs `spinkv eval`.
pub(crate) fn run(arguments: &EvalArguments) -> Result<()> {
    let backend = BackendKind::by_name(&arguments.backend)?;
    let mut options = arguments.options()?;
    let directory = arguments.model.clone().unwrap_or_else(demo::model);
    let (config, tokenizer) = (ModelConfig::open(&directory)?, Tokenizer::open(&directory)?);
    let names = options.methods.iter().map(MethodChoice::name);
    options.gates = gates::for_methods(names, arguments.gates.as_deref(), &directory, &config)?;
    let haystack = arguments.haystack.as_ref().unwrap_or(&directory);
    let evaluation = Evaluation::new(&directory, &config, &tokenizer, haystack, options)?;
    #[cfg(all(feature = "cuda", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
    if backend == BackendKind::Cuda {
        eval::cuda::check(&evaluation)?;
    }
    // Hours later would be late.
    if let Some(path) = &arguments.plot {
        std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .map_err(|source| Error::Io { path: path.clone(), source })?;
    }
    let mut journal = match &arguments.resume {
        Some(path) => Journal::open(path)?,
        None => Journal::in_memory(),
    };
    let bar = progress_bar();
    match backend {
        BackendKind::Cpu => {
            on_cpu(arguments, &evaluation, &directory, config, &tokenizer, &mut journal, &bar)?;
        }
        #[cfg(all(
            feature = "cuda",
            target_os = "linux",
            any(target_arch = "x86_64", target_arch = "aarch64")
        ))]
        BackendKind::Cuda => {
            on_cuda(arguments, &evaluation, &directory, &config, &tokenizer, &mut journal, &bar)?;
        }
    }
    bar.finish_and_clear();
    let report = Report::new(&evaluation, directory.display().to_string(), &arguments.backend, &journal);
    if let Some(path) = &arguments.plot {
        plot(path, &report).map_err(|reason| Error::Plot { path: path.clone(), reason })?;
    }
    let mut output = Output::default();
    let _ = output.write(&if arguments.json { report.json() + "\n" } else { report.to_string() });
    output.finish()
}

fn on_cpu(
    arguments: &EvalArguments,
    evaluation: &Evaluation,
    directory: &Path,
    config: ModelConfig,
    tokenizer: &Tokenizer,
    journal: &mut Journal,
    bar: &ProgressBar,
) -> Result<()> {
    let model = Model::open(directory, config, |done, total| load(bar, done as u64, total as u64))?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let jobs = arguments.jobs.map_or(cores, |jobs| jobs as usize);
    let keep = arguments.keep_mib.saturating_mul(1 << 20);
    eval::run(evaluation, &model, tokenizer, journal, (jobs, keep), |progress| show(bar, progress))
}

#[cfg(all(feature = "cuda", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
fn on_cuda(
    arguments: &EvalArguments,
    evaluation: &Evaluation,
    directory: &Path,
    config: &ModelConfig,
    tokenizer: &Tokenizer,
    journal: &mut Journal,
    bar: &ProgressBar,
) -> Result<()> {
    use spinkv::backend::cuda::driver::{Device, Stream};
    use spinkv_engine::cuda::{BlasUse, DeviceWeights};

    let context = &Device::open(0)?;
    let stream = Stream::new(context)?;
    let weights = DeviceWeights::open(&stream, directory, config, |done, total| load(bar, done, total))?;
    let blas = match arguments.cublaslt.as_str() {
        "require" => BlasUse::Required,
        "off" => BlasUse::Never,
        _ => BlasUse::IfPresent,
    };
    let listen = |progress| show(bar, progress);
    eval::cuda::run(evaluation, (context, config, weights), blas, tokenizer, journal, listen)
}

fn load(bar: &ProgressBar, done: u64, total: u64) {
    bar.set_message("loading");
    bar.set_length(total);
    bar.set_position(done);
}

fn show(bar: &ProgressBar, progress: Progress) -> ControlFlow<()> {
    if progress.done == 0 {
        // The time for loading says nothing of what is to come.
        bar.reset();
        bar.set_length(progress.total);
    }
    bar.set_message(format!("{} of {}", progress.results, progress.of));
    bar.set_position(progress.done);
    ControlFlow::Continue(())
}

impl EvalArguments {
    fn options(&self) -> Result<EvalOptions> {
        let methods = self.methods.iter().filter(|name| !name.trim().is_empty());
        let budgets = self.budgets.iter().filter(|budget| !budget.trim().is_empty());
        let contexts = self.contexts.iter().filter(|context| !context.trim().is_empty());
        let budgets = budgets.map(|budget| budget.parse::<Budget>()).collect::<spinkv::Result<_>>()?;
        Ok(EvalOptions {
            tasks: match self.task.as_str() {
                "needle" => vec![Task::Needle],
                "perplexity" => vec![Task::Perplexity],
                _ => vec![Task::Needle, Task::Perplexity],
            },
            methods: methods.map(|name| name.parse::<MethodChoice>()).collect::<Result<_>>()?,
            budgets,
            contexts: contexts.map(|text| context(text)).collect::<Result<_>>()?,
            prompts: self.prompts,
            scored_tokens: self.tokens,
            seed: self.seed,
            steady: SteadyZone { sinks: self.sinks, window: self.window },
            pages: self.pages.options()?,
            buffering: self.buffering,
            recall: !self.no_recall,
            gates: None,
        })
    }
}

/// Tokens, written as `4096` or `4k`.
fn context(text: &str) -> Result<usize> {
    let invalid = || Error::Eval(EvalError::InvalidContext { text: text.to_owned() });
    let number = text.trim();
    let (digits, unit) = match number.strip_suffix(['k', 'K']) {
        Some(digits) => (digits, 1024),
        None => (number, 1),
    };
    digits.parse::<usize>().ok().and_then(|tokens| tokens.checked_mul(unit)).ok_or_else(invalid)
}

/// A bar on standard error, if that is a terminal.
fn progress_bar() -> ProgressBar {
    let shown = std::io::stderr().is_terminal();
    let target = if shown { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let style = ProgressStyle::with_template("{msg} [{bar:40}] {percent}% {elapsed} (left: {eta})")
        .expect("the template is valid")
        .progress_chars("=> ");
    let bar = ProgressBar::with_draw_target(Some(0), target).with_style(style);
    bar.enable_steady_tick(Duration::from_millis(500));
    bar
}
