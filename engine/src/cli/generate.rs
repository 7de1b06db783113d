use std::io::{IsTerminal, Read};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use spinkv::algorithms::{MethodOptions, OwnOptions, RowRules, SEER_ATTENTION};
use spinkv::backend::BackendKind;
use spinkv::gates::Gates;
use spinkv::memory::MemoryLimits;
use spinkv::pipeline::{Budget, SteadyZone};
use spinkv_engine::config::ModelConfig;
use spinkv_engine::gates;
use spinkv_engine::generate::{Event, GenerateOptions, Generation, Prepared, generate};
use spinkv_engine::model::Model;
use spinkv_engine::sampling::SamplingParams;
use spinkv_engine::tokenizer::Tokenizer;
use spinkv_engine::{Error, Result};

use super::output::Output;
use super::pages::PageArguments;
use super::{demo, report, say};

/// Answer one prompt, and say what it took.
///
/// Without a model it runs the bundled one, needle-tiny, and without a prompt as well it asks it for a fact that is
/// hidden in 4,000 tokens of documentation. The text goes to standard output, everything else to standard error;
/// with --json one object with both goes to standard output.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  spinkv generate
  spinkv generate --method streaming-llm          # the same question, without the middle: a wrong answer
  spinkv generate --budget 256 --gpu-pages 600    # a small budget and a small cache
  spinkv generate --model DIR --prompt 'Once upon a time' --method dense
  spinkv generate --prompt-file long.txt --json | jq .pages
  cat long.txt | spinkv generate --model DIR -")]
pub(crate) struct GenerateArguments {
    /// Directory of a Qwen3 or Llama checkpoint: config.json, tokenizer.json, safetensors [default: the bundled
    /// models/needle-tiny]
    #[arg(long, value_name = "DIR")]
    pub(super) model: Option<PathBuf>,

    /// The prompt
    #[arg(long, value_name = "TEXT", group = "source")]
    prompt: Option<String>,

    /// A file that holds the prompt, as UTF-8
    #[arg(long, value_name = "FILE", group = "source")]
    prompt_file: Option<PathBuf>,

    /// Read the prompt from standard input
    #[arg(value_name = "-", value_parser = ["-"], group = "source", hide_possible_values = true)]
    stdin: Option<String>,

    /// Sparse-attention method: dense, streaming-llm, shadowkv, quest, token-topk or seer-attention
    #[arg(long, default_value = "shadowkv", value_name = "NAME", help_heading = "Attention")]
    method: String,

    /// Tokens that a step may select for each KV head beyond sinks and window: a number (1024), a percentage of the
    /// context (1.56%) or a fraction (0.0156)
    #[arg(
        long,
        default_value = "1024",
        value_name = "BUDGET",
        allow_hyphen_values = true,
        help_heading = "Attention"
    )]
    budget: String,

    /// First tokens of the sequence that are always read
    #[arg(long, default_value_t = 4, value_name = "TOKENS", help_heading = "Attention")]
    sinks: usize,

    /// Newest tokens that are always read, at least 1
    #[arg(long, default_value_t = 64, value_name = "TOKENS", help_heading = "Attention")]
    window: usize,

    /// An option that only this method has, as NAME=VALUE; may be given more than once. shadowkv: outliers=CHUNKS; quest:
    /// chunk=TOKENS, merge=max|sum|mean
    #[arg(long, value_name = "NAME=VALUE", help_heading = "Attention")]
    method_option: Vec<String>,

    /// Learned gates, for seer-attention: a safetensors file [default: gates.safetensors beside the checkpoint]
    #[arg(long, value_name = "FILE", help_heading = "Attention")]
    gates: Option<PathBuf>,

    /// The first layers that read everything, whatever the budget
    #[arg(long, default_value_t = 0, value_name = "LAYERS", help_heading = "Attention")]
    dense_layers: usize,

    /// Heads that read sinks and window alone, as LAYER:KV_HEAD; * is all layers (DuoAttention's streaming heads)
    #[arg(long, value_name = "HEADS", value_delimiter = ',', help_heading = "Attention")]
    steady_heads: Vec<String>,

    #[command(flatten)]
    pages: PageArguments,

    /// GPU pages for all rows (layers x KV heads) together [default: as many as the request wants]
    #[arg(long, value_name = "PAGES", help_heading = "Memory")]
    gpu_pages: Option<usize>,

    /// GPU memory for pages, tables, summaries and a prompt's layers together, in MiB [default: no limit]
    #[arg(long, value_name = "MIB", help_heading = "Memory")]
    gpu_mib: Option<u64>,

    /// Cache pages beyond those that one step needs, as a multiple of them
    #[arg(long, default_value_t = spinkv::pipeline::DEFAULT_BUFFERING, value_name = "RATIO", help_heading = "Memory")]
    buffering: f64,

    /// Host memory for the full KV, in MiB [default: no limit]
    #[arg(long, value_name = "MIB", help_heading = "Memory")]
    host_mib: Option<u64>,

    /// Host memory for the full KV that is made real before the prompt is read, in MiB: at most --host-mib
    #[arg(long, default_value_t = 0, value_name = "MIB", help_heading = "Memory")]
    reserve_host_mib: u64,

    /// Where the pipeline runs: cpu or cuda
    #[arg(long, default_value = "cpu", value_name = "NAME", help_heading = "Memory")]
    backend: String,

    /// GPUs of this machine that share the model, by KV heads; more than one need NCCL
    #[arg(long, default_value_t = 1, value_name = "COUNT", help_heading = "GPU")]
    pub(super) gpus: usize,

    /// Whether products of many tokens go through cuBLASLt on a GPU: if the machine has it (auto), else not at all (require), or never (off)
    #[arg(long, default_value = "auto", value_name = "WHEN", value_parser = ["auto", "require", "off"], help_heading = "GPU")]
    pub(super) cublaslt: String,

    /// A model of this shape with random weights, made on the GPU, instead of a checkpoint: qwen3-8b, qwen3-14b, qwen3-32b,
    /// llama-3.1-8b or llama-3.1-70b. For speed alone: it has no tokenizer and no text
    #[arg(
        long,
        value_name = "NAME",
        conflicts_with = "model",
        requires = "prompt_tokens",
        help_heading = "GPU"
    )]
    pub(super) random_weights: Option<String>,

    /// Only the first layers of the random weights
    #[arg(long, value_name = "LAYERS", requires = "random_weights", help_heading = "GPU")]
    pub(super) layers: Option<usize>,

    /// Tokens of a random prompt, for random weights
    #[arg(long, value_name = "TOKENS", group = "source", requires = "random_weights", help_heading = "GPU")]
    pub(super) prompt_tokens: Option<usize>,

    /// The most tokens to generate
    #[arg(long, default_value_t = 64, value_name = "TOKENS", help_heading = "Sampling")]
    max_tokens: usize,

    /// 0 takes the likeliest token; higher values draw more freely
    #[arg(
        long,
        default_value_t = 0.0,
        value_name = "T",
        allow_hyphen_values = true,
        help_heading = "Sampling"
    )]
    temperature: f32,

    /// Draw from the K likeliest tokens
    #[arg(long, value_name = "K", help_heading = "Sampling")]
    top_k: Option<usize>,

    /// Draw from the likeliest tokens that together reach probability P
    #[arg(
        long,
        default_value_t = 1.0,
        value_name = "P",
        allow_hyphen_values = true,
        help_heading = "Sampling"
    )]
    top_p: f32,

    /// Draw from the tokens that are at least P times as likely as the likeliest
    #[arg(
        long,
        default_value_t = 0.0,
        value_name = "P",
        allow_hyphen_values = true,
        help_heading = "Sampling"
    )]
    min_p: f32,

    /// Seed of the draws: the same seed gives the same text
    #[arg(long, default_value_t = 0, value_name = "SEED", help_heading = "Sampling")]
    pub(super) seed: u64,

    /// Go on past the model's end token
    #[arg(long, help_heading = "Sampling")]
    ignore_eos: bool,

    /// Also write which pages the steps select to FILE, for `spinkv simulate --trace FILE`
    #[arg(long, value_name = "FILE")]
    record_trace: Option<PathBuf>,

    /// Print one JSON object instead of text and table
    #[arg(long)]
    json: bool,
}

/// The prompt and, for the bundled question, what is known of it.
pub(super) struct Prompt {
    pub text: String,
    pub question: Option<demo::Question>,
}

/// Runs `spinkv generate`.
pub(crate) fn run(arguments: &GenerateArguments) -> Result<()> {
    let backend = BackendKind::by_name(&arguments.backend)?;
    let options = arguments.options()?;
    // A misspelt name is refused before standard input is waited for.
    match spinkv::algorithms::by_name(&options.method, &options.method_options) {
        // Which comes with the model.
        Ok(_) | Err(spinkv::Error::NoRotary { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    match backend {
        BackendKind::Cpu if arguments.gpus != 1 => {
            let what = "use GPUs: --gpus is for --backend cuda";
            Err(Error::UnsupportedByBackend { backend: "cpu", what })
        }
        BackendKind::Cpu if arguments.random_weights.is_some() => {
            Err(Error::UnsupportedByBackend { backend: "cpu", what: "make random weights" })
        }
        BackendKind::Cpu => on_cpu(arguments, &options),
        #[cfg(all(
            feature = "cuda",
            target_os = "linux",
            any(target_arch = "x86_64", target_arch = "aarch64")
        ))]
        BackendKind::Cuda => super::generate_cuda::run(arguments, &options),
    }
}

fn on_cpu(arguments: &GenerateArguments, options: &GenerateOptions) -> Result<()> {
    let directory = arguments.model.clone().unwrap_or_else(demo::model);
    let prompt = arguments.read_prompt(&directory)?;
    let (config, tokenizer) = (ModelConfig::open(&directory)?, Tokenizer::open(&directory)?);
    let prepared = Prepared::new(&config, &tokenizer, &prompt.text, options)?;
    let mut console = Console::new(arguments);
    let model =
        Model::open(&directory, config, |done, total| console.show("loading", done as u64, total as u64))?;
    console.introduce(&directory, &prompt);
    let generation = generate(&model, &tokenizer, prepared, |event| console.hear(event));
    console.close(options, generation?, directory.display().to_string(), &prompt, None)
}

/// What a generation shows while it runs, and in the end.
pub(super) struct Console<'a> {
    arguments: &'a GenerateArguments,
    bar: ProgressBar,
    output: Output,
}

impl<'a> Console<'a> {
    pub fn new(arguments: &'a GenerateArguments) -> Self {
        Self { arguments, bar: progress_bar(arguments.json), output: Output::default() }
    }

    /// How far something has come.
    pub fn show(&self, message: &'static str, done: u64, total: u64) {
        self.bar.set_message(message);
        self.bar.set_length(total);
        self.bar.set_position(done);
    }

    /// Says what the bundled question is.
    pub fn introduce(&self, directory: &Path, prompt: &Prompt) {
        self.bar.set_length(0);
        if let (Some(question), false) = (&prompt.question, self.arguments.json) {
            self.bar.suspend(|| say(&report::introduction(directory, question)));
        }
    }

    /// Shows what a generation tells.
    pub fn hear(&mut self, event: Event<'_>) -> ControlFlow<()> {
        match event {
            Event::Reserve { done, total } => self.show("reserving", done as u64, total as u64),
            Event::Prefill { done, total } => self.show("reading", done as u64, total as u64),
            Event::Text(_) if self.arguments.json => {}
            Event::Text(text) => {
                self.bar.finish_and_clear();
                return self.output.write(text);
            }
        }
        ControlFlow::Continue(())
    }

    /// Saves the trace and prints what it took.
    pub fn close(
        mut self,
        options: &GenerateOptions,
        generation: Generation,
        model: String,
        prompt: &Prompt,
        device: Option<report::Device>,
    ) -> Result<()> {
        self.bar.finish_and_clear();
        if let (Some(path), Some(trace)) = (&self.arguments.record_trace, &generation.trace) {
            trace.save(path)?;
        }
        let report = report::Report::new(model, options, &generation, prompt.question.as_ref(), device);
        let json = self.arguments.json;
        let _ = self.output.write(&if json { report.json() + "\n" } else { "\n".to_owned() });
        std::mem::take(&mut self.output).finish()?;
        if !json {
            say(&report.to_string());
        }
        Ok(())
    }
}

impl Drop for Console<'_> {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

impl GenerateArguments {
    fn options(&self) -> Result<GenerateOptions> {
        let budget: Budget = self.budget.parse()?;
        let steady = SteadyZone { sinks: self.sinks, window: self.window };
        let mut own = OwnOptions::default();
        self.method_option.iter().try_for_each(|option| own.add(option))?;
        let steady_heads = self.steady_heads.iter().map(|rule| rule.parse());
        let steady_heads = steady_heads.collect::<spinkv::Result<_>>()?;
        let rules = RowRules { dense_layers: self.dense_layers, steady_heads };
        Ok(GenerateOptions {
            method: self.method.clone(),
            method_options: MethodOptions {
                budget,
                steady,
                own,
                rules,
                gates: self.read_gates()?,
                rotary: None,
            },
            pages: self.pages.options()?,
            limits: MemoryLimits {
                gpu_pages: self.gpu_pages,
                gpu_bytes: self.gpu_mib.map(|mib| mib.saturating_mul(1 << 20)),
                host_bytes: self.host_mib.map(|mib| mib.saturating_mul(1 << 20)),
            },
            reserve_host_bytes: self.reserve_host_mib.saturating_mul(1 << 20),
            buffering: self.buffering,
            max_tokens: self.max_tokens,
            sampling: SamplingParams {
                temperature: self.temperature,
                top_k: self.top_k,
                top_p: self.top_p,
                min_p: self.min_p,
                seed: self.seed,
            },
            ignore_eos: self.ignore_eos,
            record_trace: self.record_trace.is_some(),
        })
    }

    /// The gates, if the method needs them: of a file, or as random as the weights.
    fn read_gates(&self) -> Result<Option<Arc<Gates>>> {
        if self.method != SEER_ATTENTION {
            return Ok(None);
        }
        let read = match (&self.gates, &self.random_weights) {
            (None, Some(name)) => {
                let config = ModelConfig::preset(name)?;
                gates::random(
                    &self.layers.map_or(Ok(config.clone()), |layers| config.with_layers(layers))?,
                    self.seed,
                )
            }
            (file, _) => {
                let directory = self.model.clone().unwrap_or_else(demo::model);
                let config = ModelConfig::open(&directory)?;
                gates::open(file.clone().unwrap_or_else(|| directory.join(gates::FILE)), &config)
            }
        };
        Ok(Some(Arc::new(read?)))
    }

    pub(super) fn read_prompt(&self, model: &Path) -> Result<Prompt> {
        let plain = |text| Ok(Prompt { text, question: None });
        if let Some(text) = &self.prompt {
            return plain(text.clone());
        }
        if let Some(path) = &self.prompt_file {
            let bytes = std::fs::read(path).map_err(|source| Error::Io { path: path.clone(), source })?;
            return plain(utf8(bytes, path.display().to_string())?);
        }
        if self.stdin.is_some() {
            let mut bytes = Vec::new();
            let name = "standard input";
            let read = std::io::stdin().read_to_end(&mut bytes);
            read.map_err(|source| Error::Io { path: name.into(), source })?;
            return plain(utf8(bytes, name.to_owned())?);
        }
        if self.model.is_some() {
            return Err(Error::NoPrompt { model: model.to_owned() });
        }
        let question = demo::question(model)?;
        Ok(Prompt { text: question.text.clone(), question: Some(question) })
    }
}

fn utf8(bytes: Vec<u8>, source_name: String) -> Result<String> {
    String::from_utf8(bytes)
        .map_err(|error| Error::PromptNotUtf8 { source_name, offset: error.utf8_error().valid_up_to() })
}

/// A bar on standard error, if that is a terminal.
fn progress_bar(json: bool) -> ProgressBar {
    let hidden = json || !std::io::stderr().is_terminal();
    let target = if hidden { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
    let style = ProgressStyle::with_template("{msg} [{bar:40}] {percent}% {elapsed} (left: {eta})")
        .expect("the template is valid")
        .progress_chars("=> ");
    let bar = ProgressBar::with_draw_target(Some(0), target).with_style(style);
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}
