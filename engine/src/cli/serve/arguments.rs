use std::net::IpAddr;
use std::path::PathBuf;

use clap::Args;
use serde::Deserialize;
use spinkv_engine::{Error, Result};
use tracing_subscriber::EnvFilter;

use super::super::pages::HOST_FORMATS;
use super::super::say;

/// Serve a model over HTTP, with OpenAI's API.
///
/// Each setting may be a flag, an environment variable or a line of a TOML file (--config), in this order: flags win. In the file they have the flags'
/// names. Listens on this machine alone unless told otherwise.
#[derive(Debug, Default, Args, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
#[command(after_help = "Examples:
  spinkv serve                                    # the bundled model on http://127.0.0.1:8000
  spinkv serve --model DIR --gpu-pages 100000 --host-mib 65536
  SPINKV_API_KEY=secret spinkv serve --host 0.0.0.0
  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
    -d '{\"model\": \"needle-tiny\", \"prompt\": \"<|bos|>Vec\", \"max_tokens\": 16}'")]
pub(crate) struct ServeArguments {
    /// TOML file of settings
    #[arg(long, value_name = "FILE", env = "SPINKV_CONFIG")]
    #[serde(skip)]
    pub(super) config: Option<PathBuf>,

    /// Directory of a Qwen3 or Llama checkpoint [default: the bundled models/needle-tiny]
    #[arg(long, value_name = "DIR", env = "SPINKV_MODEL")]
    pub(super) model: Option<PathBuf>,

    /// Random weights of this shape instead, made on the GPU, to measure what serving a model of it takes: qwen3-8b, qwen3-14b, qwen3-32b, llama-3.1-8b
    /// or llama-3.1-70b. The text of token 17 is 17
    #[arg(long, value_name = "NAME", env = "SPINKV_RANDOM_WEIGHTS", conflicts_with = "model")]
    pub(super) random_weights: Option<String>,

    /// Only the first layers of the random weights
    #[arg(long, value_name = "LAYERS", env = "SPINKV_LAYERS")]
    pub(super) layers: Option<usize>,

    /// The model's name in the API [default: the directory's]
    #[arg(long, value_name = "NAME", env = "SPINKV_SERVED_MODEL_NAME")]
    pub(super) served_model_name: Option<String>,

    /// Address to listen on [default: 127.0.0.1]
    #[arg(long, value_name = "ADDRESS", env = "SPINKV_HOST", help_heading = "HTTP")]
    pub(super) host: Option<IpAddr>,

    /// Port to listen on; 0 takes a free one [default: 8000]
    #[arg(long, value_name = "PORT", env = "SPINKV_PORT", help_heading = "HTTP")]
    pub(super) port: Option<u16>,

    /// A key that requests to /v1 must bring; prefer the variable or a file, since others can see flags
    #[arg(long, value_name = "KEY", env = "SPINKV_API_KEY", hide_env_values = true, help_heading = "HTTP")]
    pub(super) api_key: Option<String>,

    /// A file of such keys, one a line
    #[arg(long, value_name = "FILE", env = "SPINKV_API_KEY_FILE", help_heading = "HTTP")]
    pub(super) api_key_file: Option<PathBuf>,

    /// Listen beyond this machine without a key
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL", env = "SPINKV_ALLOW_OPEN", help_heading = "HTTP")]
    pub(super) allow_open: Option<bool>,

    /// Size of the largest request, in MiB [default: 8]
    #[arg(long, value_name = "MIB", env = "SPINKV_MAX_BODY_MIB", help_heading = "HTTP")]
    pub(super) max_body_mib: Option<usize>,

    /// The most requests at a time, waiting ones included [default: 512]
    #[arg(long, value_name = "COUNT", env = "SPINKV_MAX_CONCURRENT", help_heading = "HTTP")]
    pub(super) max_concurrent: Option<usize>,

    /// How long a request may take, in seconds; 0 is no limit [default: 600]
    #[arg(long, value_name = "SECONDS", env = "SPINKV_REQUEST_TIMEOUT", help_heading = "HTTP")]
    pub(super) request_timeout: Option<u64>,

    /// How long requests that are there may take after SIGTERM, in seconds [default: 30]
    #[arg(long, value_name = "SECONDS", env = "SPINKV_DRAIN_TIMEOUT", help_heading = "HTTP")]
    pub(super) drain_timeout: Option<u64>,

    /// The most tokens of a chat's answer where the request does not say; memory is set aside for them [default: 1024]
    #[arg(long, value_name = "TOKENS", env = "SPINKV_DEFAULT_MAX_TOKENS", help_heading = "HTTP")]
    pub(super) default_max_tokens: Option<usize>,

    /// Requests that run at a time [default: 16]
    #[arg(long, value_name = "COUNT", env = "SPINKV_MAX_BATCH", help_heading = "Scheduling")]
    pub(super) max_batch: Option<usize>,

    /// Requests that wait [default: 256]
    #[arg(long, value_name = "COUNT", env = "SPINKV_MAX_QUEUE", help_heading = "Scheduling")]
    pub(super) max_queue: Option<usize>,

    /// Layers of a prompt that run between two decode steps [default: 1]
    #[arg(long, value_name = "LAYERS", env = "SPINKV_PROMPT_LAYERS", help_heading = "Scheduling")]
    pub(super) prompt_layers: Option<usize>,

    /// How often a waiting request may be overtaken [default: 16]
    #[arg(long, value_name = "COUNT", env = "SPINKV_PATIENCE", help_heading = "Scheduling")]
    pub(super) patience: Option<usize>,

    /// Park running requests of a lower priority where there is no room for one of a higher [default: true]
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL", env = "SPINKV_PREEMPT", help_heading = "Scheduling")]
    pub(super) preempt: Option<bool>,

    /// Tokens that a request generates before others of its priority may have its memory in turn; its KV waits on the host meanwhile [default: it keeps its memory]
    #[arg(long, value_name = "TOKENS", env = "SPINKV_TURN", help_heading = "Scheduling")]
    pub(super) turn: Option<usize>,

    /// Tokens of the longest request, prompt and answer together [default: the model's context]
    #[arg(long, value_name = "TOKENS", env = "SPINKV_MAX_CONTEXT", help_heading = "Scheduling")]
    pub(super) max_context: Option<usize>,

    /// Sparse-attention method [default: shadowkv]
    #[arg(long, value_name = "NAME", env = "SPINKV_METHOD", help_heading = "Attention")]
    pub(super) method: Option<String>,

    /// Tokens that a step may select for each KV head: a number, a percentage or a fraction [default: 1024]
    #[arg(long, value_name = "BUDGET", env = "SPINKV_BUDGET", help_heading = "Attention")]
    pub(super) budget: Option<String>,

    /// Who says what steps select: model; or drifting, to measure: scores and top-k run, and selections that change as those of text do replace their
    /// result [default: drifting for random weights, else model]
    #[arg(long, value_name = "WHO", value_parser = ["model", "drifting"], env = "SPINKV_SELECTIONS", help_heading = "Attention")]
    pub(super) selections: Option<String>,

    /// First tokens that are always read [default: 4]
    #[arg(long, value_name = "TOKENS", env = "SPINKV_SINKS", help_heading = "Attention")]
    pub(super) sinks: Option<usize>,

    /// Newest tokens that are always read [default: 64]
    #[arg(long, value_name = "TOKENS", env = "SPINKV_WINDOW", help_heading = "Attention")]
    pub(super) window: Option<usize>,

    /// An option that only this method has, as NAME=VALUE; may be given more than once
    #[arg(long, value_name = "NAME=VALUE", help_heading = "Attention")]
    pub(super) method_option: Vec<String>,

    /// Learned gates, for seer-attention: a safetensors file [default: gates.safetensors beside the checkpoint]
    #[arg(long, value_name = "FILE", help_heading = "Attention")]
    pub(super) gates: Option<PathBuf>,

    /// Where the pipeline runs: cpu or cuda [default: cpu]
    #[arg(long, value_name = "NAME", env = "SPINKV_BACKEND", help_heading = "Memory")]
    pub(super) backend: Option<String>,

    /// GPUs of this machine that share the model, by KV heads; more than one need NCCL [default: 1]
    #[arg(long, value_name = "COUNT", env = "SPINKV_GPUS", help_heading = "Memory")]
    pub(super) gpus: Option<usize>,

    /// Tokens of a KV page [default: 8]
    #[arg(long, value_name = "TOKENS", env = "SPINKV_PAGE_TOKENS", help_heading = "Memory")]
    pub(super) page_tokens: Option<usize>,

    /// How KV pages store their elements: bf16 or f32 [default: bf16]
    #[arg(long, value_name = "TYPE", value_parser = ["bf16", "f32"], env = "SPINKV_KV_DTYPE", help_heading = "Memory")]
    pub(super) kv_dtype: Option<String>,

    /// How the host keeps KV pages, as for `spinkv generate`: full, fp8 or int8 [default: full]
    #[arg(long, value_name = "FORMAT", value_parser = HOST_FORMATS, env = "SPINKV_HOST_KV", help_heading = "Memory")]
    pub(super) host_kv: Option<String>,

    /// GPU pages for all requests together [default: no limit; on a GPU, what a full batch of the longest wants]
    #[arg(long, value_name = "PAGES", env = "SPINKV_GPU_PAGES", help_heading = "Memory")]
    pub(super) gpu_pages: Option<usize>,

    /// GPU memory for pages, tables, summaries and a prompt's layers, in MiB; cpu backend [default: no limit]
    #[arg(long, value_name = "MIB", env = "SPINKV_GPU_MIB", help_heading = "Memory")]
    pub(super) gpu_mib: Option<u64>,

    /// Host memory for the full KV, in MiB [default: no limit; on a GPU, what a full batch of the longest needs]
    #[arg(long, value_name = "MIB", env = "SPINKV_HOST_MIB", help_heading = "Memory")]
    pub(super) host_mib: Option<u64>,

    /// Host memory that is made real beforehand, in MiB [default: 0]
    #[arg(long, value_name = "MIB", env = "SPINKV_RESERVE_HOST_MIB", help_heading = "Memory")]
    pub(super) reserve_host_mib: Option<u64>,

    /// Host memory for pages of prompts that are kept for later prompts that begin alike, in MiB; 0 keeps none. Requests take it back when they
    /// need the room. Full host pages, and methods whose pages hold tokens in order [default: what requests leave of --host-mib; without that 1024]
    #[arg(long, value_name = "MIB", env = "SPINKV_PREFIX_MIB", help_heading = "Memory")]
    pub(super) prefix_mib: Option<u64>,

    /// Cache pages beyond those that one step needs, as a multiple of them [default: 5]
    #[arg(long, value_name = "RATIO", env = "SPINKV_BUFFERING", help_heading = "Memory")]
    pub(super) buffering: Option<f64>,

    /// NVIDIA's cuBLASLt for products of many tokens: auto, require or off [default: auto]
    #[arg(long, value_name = "USE", value_parser = ["auto", "require", "off"], env = "SPINKV_CUBLASLT", help_heading = "Memory")]
    pub(super) cublaslt: Option<String>,

    /// What runs on a GPU while pages of KV come: nothing (off); attention over the pages that are there; or halves, the other half of the batch, which pays where a
    /// large batch waits longer for its pages than the weights take to read [default: attention]
    #[arg(long, value_name = "WHAT", value_parser = ["off", "attention", "halves"], env = "SPINKV_OVERLAP", help_heading = "Memory")]
    pub(super) overlap: Option<String>,

    /// What is logged, as tracing's filters say it [default: info]
    #[arg(long, value_name = "FILTER", env = "SPINKV_LOG", help_heading = "Logging")]
    pub(super) log: Option<String>,

    /// Log lines of JSON
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL", env = "SPINKV_LOG_JSON", help_heading = "Logging")]
    pub(super) log_json: Option<bool>,
}

/// Takes from a file what neither flag nor variable says.
macro_rules! fill {
    ($into:ident, $from:ident, $($field:ident)*) => {
        $($into.$field = $into.$field.take().or($from.$field);)*
    };
}

impl ServeArguments {
    /// With what its file says where neither flag nor variable does.
    pub(super) fn with_file(mut self) -> Result<Self> {
        let Some(path) = self.config.take() else { return Ok(self) };
        let text =
            std::fs::read_to_string(&path).map_err(|source| Error::Io { path: path.clone(), source })?;
        let file: Self = toml::from_str(&text).map_err(|error| Error::SettingsFile {
            path: path.clone(),
            message: error.to_string().trim_end().to_owned(),
        })?;
        if self.method_option.is_empty() {
            self.method_option = file.method_option;
        }
        fill!(self, file, model random_weights layers selections served_model_name host port api_key api_key_file allow_open max_body_mib max_concurrent
            request_timeout drain_timeout default_max_tokens max_batch max_queue prompt_layers patience preempt turn max_context
            method budget sinks window gates backend gpus page_tokens kv_dtype host_kv gpu_pages gpu_mib host_mib reserve_host_mib
            prefix_mib buffering cublaslt overlap log log_json);
        Ok(self)
    }

    pub(super) fn start_log(&self, usual: &str) -> Result<()> {
        let filter = self.log.as_deref().unwrap_or(usual);
        let filter = EnvFilter::try_new(filter).map_err(|_| Error::InvalidSetting {
            name: "log",
            value: filter.to_owned(),
            allowed: "a filter as info, or spinkv_engine=debug,warn",
        })?;
        let builder =
            tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false);
        let started =
            if self.log_json.unwrap_or(false) { builder.json().try_init() } else { builder.try_init() };
        if started.is_err() {
            say("spinkv: another log has begun before\n");
        }
        Ok(())
    }
}
