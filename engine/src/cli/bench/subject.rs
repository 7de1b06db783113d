use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use spinkv::backend::BackendKind;
use spinkv::gates::Gates;
use spinkv::pipeline::SteadyZone;
use spinkv_engine::bench::{Facts, Prompts};
use spinkv_engine::config::ModelConfig;
use spinkv_engine::eval::MethodChoice;
use spinkv_engine::pages::PageOptions;
use spinkv_engine::{Error, Result, gates};

use super::super::pages::PageArguments;
use super::super::{demo, say};

/// What is measured, and where.
#[derive(Debug, Args)]
pub(super) struct SubjectArguments {
    /// Directory of a Qwen3 or Llama checkpoint [default: the bundled models/needle-tiny]
    #[arg(long, value_name = "DIR", help_heading = "Model")]
    model: Option<PathBuf>,

    /// Random weights of this shape instead, made on the GPU: qwen3-8b, qwen3-14b, qwen3-32b, llama-3.1-8b or llama-3.1-70b
    #[arg(long, value_name = "NAME", conflicts_with = "model", help_heading = "Model")]
    random_weights: Option<String>,

    /// Only the first layers of the random weights; the report says so, and works out what all of them would take
    #[arg(long, value_name = "LAYERS", requires = "random_weights", help_heading = "Model")]
    layers: Option<usize>,

    /// Learned gates, for seer-attention: a safetensors file [default: beside the checkpoint; random ones for random weights]
    #[arg(long, value_name = "FILE", help_heading = "Model")]
    gates: Option<PathBuf>,

    /// Where the pipeline runs: cpu or cuda
    #[arg(long, default_value = "cpu", value_name = "NAME", help_heading = "Model")]
    backend: String,

    /// GPUs of this machine that share the model, by KV heads; more than one need NCCL
    #[arg(long, default_value_t = 1, value_name = "COUNT", help_heading = "Model")]
    gpus: usize,

    /// Whether products of many tokens go through cuBLASLt on a GPU, as for `spinkv generate`
    #[arg(long, default_value = "auto", value_name = "WHEN", value_parser = ["auto", "require", "off"], help_heading = "Model")]
    cublaslt: String,

    /// First tokens of the sequence that are always read
    #[arg(long, default_value_t = 4, value_name = "TOKENS", help_heading = "Memory")]
    sinks: usize,

    /// Newest tokens that are always read, at least 1
    #[arg(long, default_value_t = 64, value_name = "TOKENS", help_heading = "Memory")]
    window: usize,

    #[command(flatten)]
    pages: PageArguments,

    /// Seed of random weights and prompts, and of what is drawn
    #[arg(long, default_value_t = 0, value_name = "SEED")]
    pub seed: u64,

    /// Print one JSON object instead of tables
    #[arg(long)]
    pub json: bool,
}

/// What the arguments come to, before weights are loaded.
pub(super) struct Subject {
    pub backend: BackendKind,
    pub config: ModelConfig,
    pub directory: PathBuf,
    pub prompts: Prompts,
    pub steady: SteadyZone,
    pub pages: PageOptions,
    pub gates: Option<Arc<Gates>>,
    /// All but the device and the notes.
    pub facts: Facts,
}

impl SubjectArguments {
    pub fn subject(&self, methods: &[MethodChoice]) -> Result<Subject> {
        let backend = BackendKind::by_name(&self.backend)?;
        let directory = self.model.clone().unwrap_or_else(demo::model);
        let whole = match &self.random_weights {
            Some(_) if self.backend == "cpu" => {
                return Err(Error::UnsupportedByBackend { backend: "cpu", what: "make random weights" });
            }
            Some(name) => ModelConfig::preset(name)?,
            None => ModelConfig::open(&directory)?,
        };
        super::super::check_gpus(backend, self.gpus, &whole)?;
        let all_layers = whole.layers;
        let config = match self.layers {
            Some(layers) => whole.with_layers(layers)?,
            None => whole,
        };
        let names = || methods.iter().map(MethodChoice::name);
        let gates = match (&self.gates, self.is_random()) {
            (None, true) if names().any(|name| name == spinkv::algorithms::SEER_ATTENTION) => {
                Some(Arc::new(gates::random(&config, self.seed)?))
            }
            (None, true) => None,
            (file, _) => gates::for_methods(names(), file.as_deref(), &directory, &config)?,
        };
        let prompts = if self.is_random() {
            Prompts::random(config.vocab_size, self.seed)
        } else {
            Prompts::open(&directory, config.vocab_size, self.seed)?
        };
        let pages = self.pages.options()?;
        let layout = pages.layout(config.head_dim)?;
        let facts = Facts {
            page_bytes: layout.page().page_bytes() as u64,
            model: self.random_weights.clone().unwrap_or_else(|| directory.display().to_string()),
            layers: config.layers,
            all_layers,
            random_weights: self.is_random(),
            random_prompts: prompts.are_random(),
            backend: self.backend.clone(),
            ..Facts::default()
        };
        Ok(Subject {
            backend,
            config,
            directory,
            prompts,
            steady: SteadyZone { sinks: self.sinks, window: self.window },
            pages,
            gates,
            facts,
        })
    }

    pub fn is_on_gpu(&self) -> bool {
        self.backend == "cuda"
    }

    pub fn is_random(&self) -> bool {
        self.random_weights.is_some()
    }

    /// The GPUs' machine; its weights come with the first group.
    #[cfg(all(feature = "cuda", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
    pub fn on_gpu(&self, subject: &Subject) -> Result<spinkv_engine::bench::cuda::CudaMachine> {
        use spinkv_engine::bench::cuda::{CudaMachine, WeightSource};
        use spinkv_engine::cuda::{BlasUse, GpuGroup};

        let source = if self.is_random() {
            WeightSource::Random(self.seed)
        } else {
            WeightSource::Checkpoint(subject.directory.clone())
        };
        let blas = match self.cublaslt.as_str() {
            "require" => BlasUse::Required,
            "off" => BlasUse::Never,
            _ => BlasUse::IfPresent,
        };
        let (config, prompts) = (subject.config.clone(), subject.prompts.clone());
        Ok(CudaMachine::new(GpuGroup::open(self.gpus)?, config, source, blas, prompts))
    }
}

/// The device that the CPU backend runs on.
pub(super) fn cpu() -> String {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    format!("the CPU, {cores} cores")
}

/// Shows how far a bench has come: a bar on a terminal, else a line for each part, which a log keeps.
pub(super) struct Shown {
    bar: Option<ProgressBar>,
}

impl Shown {
    pub fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{msg} [{bar:30}] {pos}/{len} {elapsed}")
                .expect("the template is valid")
                .progress_chars("=> ");
            let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr()).with_style(style);
            bar.enable_steady_tick(Duration::from_millis(500));
            bar
        });
        Self { bar }
    }

    pub fn hear(&self, message: &str, done: usize, of: usize) {
        match &self.bar {
            Some(bar) => {
                bar.set_message(message.to_owned());
                bar.set_length(of as u64);
                bar.set_position(done as u64);
            }
            None => say(&format!("{}/{of} {message}\n", done + 1)),
        }
    }

    pub fn finish(&self) {
        self.bar.iter().for_each(ProgressBar::finish_and_clear);
    }
}
