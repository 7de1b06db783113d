use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use serde::Deserialize;
use spinkv::algorithms::{self, MethodOptions, OwnOptions};
use spinkv::backend::BackendKind;
use spinkv::backend::cpu::CpuBackend;
use spinkv::memory::MemoryLimits;
use spinkv::pipeline::{Budget, DEFAULT_BUFFERING, Pipeline, SteadyZone};
use spinkv::{KvConfig, KvShape};
use spinkv_engine::config::ModelConfig;
use spinkv_engine::gates;
use spinkv_engine::model::{Model, STREAMED_TOKENS};
use spinkv_engine::pages::PageOptions;
use spinkv_engine::runner::CpuRunner;
use spinkv_engine::serve::server::{self, ServerOptions};
use spinkv_engine::serve::{ChatTemplate, Engine, EngineHandle, Scheduler, SchedulerOptions};
use spinkv_engine::tokenizer::Tokenizer;
use spinkv_engine::{Error, Result};
use tokio::net::TcpListener;
use tokio::sync::{Notify, oneshot};
use tracing_subscriber::EnvFilter;

use super::pages::{HOST_FORMATS, dtype};
use super::{demo, say};

/// How long is waited for clients that do not take in the end of their answers.
const LAST_WAIT: Duration = Duration::from_secs(5);

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
    config: Option<PathBuf>,

    /// Directory of a Qwen3 or Llama checkpoint [default: the bundled models/needle-tiny]
    #[arg(long, value_name = "DIR", env = "SPINKV_MODEL")]
    model: Option<PathBuf>,

    /// The model's name in the API [default: the directory's]
    #[arg(long, value_name = "NAME", env = "SPINKV_SERVED_MODEL_NAME")]
    served_model_name: Option<String>,

    /// Address to listen on [default: 127.0.0.1]
    #[arg(long, value_name = "ADDRESS", env = "SPINKV_HOST", help_heading = "HTTP")]
    host: Option<IpAddr>,

    /// Port to listen on; 0 takes a free one [default: 8000]
    #[arg(long, value_name = "PORT", env = "SPINKV_PORT", help_heading = "HTTP")]
    port: Option<u16>,

    /// A key that requests to /v1 must bring; prefer the variable or a file, since others can see flags
    #[arg(long, value_name = "KEY", env = "SPINKV_API_KEY", hide_env_values = true, help_heading = "HTTP")]
    api_key: Option<String>,

    /// A file of such keys, one a line
    #[arg(long, value_name = "FILE", env = "SPINKV_API_KEY_FILE", help_heading = "HTTP")]
    api_key_file: Option<PathBuf>,

    /// Listen beyond this machine without a key
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL", env = "SPINKV_ALLOW_OPEN", help_heading = "HTTP")]
    allow_open: Option<bool>,

    /// Size of the largest request, in MiB [default: 8]
    #[arg(long, value_name = "MIB", env = "SPINKV_MAX_BODY_MIB", help_heading = "HTTP")]
    max_body_mib: Option<usize>,

    /// The most requests at a time, waiting ones included [default: 512]
    #[arg(long, value_name = "COUNT", env = "SPINKV_MAX_CONCURRENT", help_heading = "HTTP")]
    max_concurrent: Option<usize>,

    /// How long a request may take, in seconds; 0 is no limit [default: 600]
    #[arg(long, value_name = "SECONDS", env = "SPINKV_REQUEST_TIMEOUT", help_heading = "HTTP")]
    request_timeout: Option<u64>,

    /// How long requests that are there may take after SIGTERM, in seconds [default: 30]
    #[arg(long, value_name = "SECONDS", env = "SPINKV_DRAIN_TIMEOUT", help_heading = "HTTP")]
    drain_timeout: Option<u64>,

    /// The most tokens of a chat's answer where the request does not say; memory is set aside for them [default: 1024]
    #[arg(long, value_name = "TOKENS", env = "SPINKV_DEFAULT_MAX_TOKENS", help_heading = "HTTP")]
    default_max_tokens: Option<usize>,

    /// Requests that run at a time [default: 16]
    #[arg(long, value_name = "COUNT", env = "SPINKV_MAX_BATCH", help_heading = "Scheduling")]
    max_batch: Option<usize>,

    /// Requests that wait [default: 256]
    #[arg(long, value_name = "COUNT", env = "SPINKV_MAX_QUEUE", help_heading = "Scheduling")]
    max_queue: Option<usize>,

    /// Layers of a prompt that run between two decode steps [default: 1]
    #[arg(long, value_name = "LAYERS", env = "SPINKV_PROMPT_LAYERS", help_heading = "Scheduling")]
    prompt_layers: Option<usize>,

    /// How often a waiting request may be overtaken [default: 16]
    #[arg(long, value_name = "COUNT", env = "SPINKV_PATIENCE", help_heading = "Scheduling")]
    patience: Option<usize>,

    /// Park running requests of a lower priority where there is no room for one of a higher; cpu backend [default: true]
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL", env = "SPINKV_PREEMPT", help_heading = "Scheduling")]
    preempt: Option<bool>,

    /// Tokens of the longest request, prompt and answer together [default: the model's context]
    #[arg(long, value_name = "TOKENS", env = "SPINKV_MAX_CONTEXT", help_heading = "Scheduling")]
    max_context: Option<usize>,

    /// Sparse-attention method [default: shadowkv]
    #[arg(long, value_name = "NAME", env = "SPINKV_METHOD", help_heading = "Attention")]
    method: Option<String>,

    /// Tokens that a step may select for each KV head: a number, a percentage or a fraction [default: 1024]
    #[arg(long, value_name = "BUDGET", env = "SPINKV_BUDGET", help_heading = "Attention")]
    budget: Option<String>,

    /// First tokens that are always read [default: 4]
    #[arg(long, value_name = "TOKENS", env = "SPINKV_SINKS", help_heading = "Attention")]
    sinks: Option<usize>,

    /// Newest tokens that are always read [default: 64]
    #[arg(long, value_name = "TOKENS", env = "SPINKV_WINDOW", help_heading = "Attention")]
    window: Option<usize>,

    /// An option that only this method has, as NAME=VALUE; may be given more than once
    #[arg(long, value_name = "NAME=VALUE", help_heading = "Attention")]
    method_option: Vec<String>,

    /// Learned gates, for seer-attention: a safetensors file [default: gates.safetensors beside the checkpoint]
    #[arg(long, value_name = "FILE", help_heading = "Attention")]
    gates: Option<PathBuf>,

    /// Where the pipeline runs: cpu or cuda [default: cpu]
    #[arg(long, value_name = "NAME", env = "SPINKV_BACKEND", help_heading = "Memory")]
    backend: Option<String>,

    /// Tokens of a KV page [default: 8]
    #[arg(long, value_name = "TOKENS", env = "SPINKV_PAGE_TOKENS", help_heading = "Memory")]
    page_tokens: Option<usize>,

    /// How KV pages store their elements: bf16 or f32 [default: bf16]
    #[arg(long, value_name = "TYPE", value_parser = ["bf16", "f32"], env = "SPINKV_KV_DTYPE", help_heading = "Memory")]
    kv_dtype: Option<String>,

    /// How the host keeps KV pages, as for `spinkv generate`: full, fp8 or int8 [default: full]
    #[arg(long, value_name = "FORMAT", value_parser = HOST_FORMATS, env = "SPINKV_HOST_KV", help_heading = "Memory")]
    host_kv: Option<String>,

    /// GPU pages for all requests together [default: no limit; on a GPU, what a full batch of the longest wants]
    #[arg(long, value_name = "PAGES", env = "SPINKV_GPU_PAGES", help_heading = "Memory")]
    gpu_pages: Option<usize>,

    /// GPU memory for pages, tables, summaries and a prompt's layers, in MiB; cpu backend [default: no limit]
    #[arg(long, value_name = "MIB", env = "SPINKV_GPU_MIB", help_heading = "Memory")]
    gpu_mib: Option<u64>,

    /// Host memory for the full KV, in MiB [default: no limit; on a GPU, what a full batch of the longest needs]
    #[arg(long, value_name = "MIB", env = "SPINKV_HOST_MIB", help_heading = "Memory")]
    host_mib: Option<u64>,

    /// Host memory that is made real beforehand, in MiB [default: 0]
    #[arg(long, value_name = "MIB", env = "SPINKV_RESERVE_HOST_MIB", help_heading = "Memory")]
    reserve_host_mib: Option<u64>,

    /// Cache pages beyond those that one step needs, as a multiple of them [default: 5]
    #[arg(long, value_name = "RATIO", env = "SPINKV_BUFFERING", help_heading = "Memory")]
    buffering: Option<f64>,

    /// NVIDIA's cuBLASLt for products of many tokens: auto, require or off [default: auto]
    #[arg(long, value_name = "USE", value_parser = ["auto", "require", "off"], env = "SPINKV_CUBLASLT", help_heading = "Memory")]
    cublaslt: Option<String>,

    /// What is logged, as tracing's filters say it [default: info]
    #[arg(long, value_name = "FILTER", env = "SPINKV_LOG", help_heading = "Logging")]
    log: Option<String>,

    /// Log lines of JSON
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL", env = "SPINKV_LOG_JSON", help_heading = "Logging")]
    log_json: Option<bool>,
}

/// Takes from a file what neither flag nor variable says.
macro_rules! fill {
    ($into:ident, $from:ident, $($field:ident)*) => {
        $($into.$field = $into.$field.take().or($from.$field);)*
    };
}

/// All settings, checked.
struct Settings {
    backend: BackendKind,
    directory: PathBuf,
    config: ModelConfig,
    kv: KvConfig,
    limits: MemoryLimits,
    buffering: f64,
    reserve_host_bytes: u64,
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "a setting of GPUs"))]
    cublaslt: String,
    scheduling: SchedulerOptions,
}

/// Runs `spinkv serve`.
pub(crate) fn run(arguments: ServeArguments) -> Result<()> {
    let arguments = arguments.with_file()?;
    arguments.start_log()?;
    let settings = arguments.settings()?;
    let address = SocketAddr::new(
        arguments.host.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST)),
        arguments.port.unwrap_or(8000),
    );
    let options = arguments.server(&settings)?;
    server::check_bind(&address, &options.api_keys, arguments.allow_open.unwrap_or(false))?;
    let tokenizer = Tokenizer::open(&settings.directory)?;
    let template = ChatTemplate::open(&settings.directory)?;
    if template.is_none() {
        tracing::warn!("the checkpoint has no chat template: /v1/chat/completions will refuse");
    }
    let drain = Duration::from_secs(arguments.drain_timeout.unwrap_or(30));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|source| Error::Io { path: "the HTTP threads".into(), source })?;
    runtime.block_on(async {
        let failed = |source| Error::Io { path: address.to_string().into(), source };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        tracing::info!(model = options.model, "listening on http://{address}");
        // The port is open while the model is loaded, and says so.
        let (engine, handle) = Engine::new();
        let (over, mut ended) = oneshot::channel();
        let for_engine = tokenizer.clone();
        std::thread::Builder::new()
            .name("engine".to_owned())
            .spawn(move || {
                // If nobody hears of it, everything is over already.
                let _ = over.send(run_engine(engine, settings, for_engine));
            })
            .map_err(|source| Error::Io { path: "the engine's thread".into(), source })?;
        let router = server::router(handle.clone(), tokenizer, template, options);
        let closing = Arc::new(Notify::new());
        let told = Arc::clone(&closing);
        let mut serving = Box::pin(server::serve(listener, router, async move { told.notified().await }));
        let early = tokio::select! {
            outcome = &mut serving => return outcome.map_err(failed),
            outcome = &mut ended => Some(outcome.unwrap_or(Err(Error::EngineStopped))),
            () = terminated() => None,
        };
        closing.notify_one();
        if let Some(outcome) = early {
            // Who asked hears of the failure.
            let _ = tokio::time::timeout(LAST_WAIT, serving).await;
            return outcome;
        }
        tracing::info!(seconds = drain.as_secs(), "draining");
        handle.drain();
        close(handle, serving, ended, drain).await
    })
}

/// Waits for the requests that are there, as long as `drain` and nobody's second signal say.
async fn close(
    handle: EngineHandle,
    serving: impl Future<Output = std::io::Result<()>> + Unpin,
    ended: oneshot::Receiver<Result<()>>,
    drain: Duration,
) -> Result<()> {
    let mut serving = serving;
    let answered = tokio::select! {
        _ = &mut serving => true,
        () = tokio::time::sleep(drain) => false,
        () = terminated() => false,
    };
    if !answered {
        tracing::warn!("requests are cancelled");
        handle.stop();
        let _ = tokio::time::timeout(LAST_WAIT, &mut serving).await;
    }
    match tokio::time::timeout(LAST_WAIT, ended).await {
        Ok(Ok(outcome)) => outcome?,
        Ok(Err(_)) => return Err(Error::EngineStopped),
        Err(_) => tracing::warn!("the engine is still in a step"),
    }
    tracing::info!("closed");
    Ok(())
}

/// The next SIGTERM or SIGINT.
async fn terminated() {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let Ok(mut terminate) = signal(SignalKind::terminate()) {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = tokio::signal::ctrl_c() => {}
            }
            return;
        }
    }
    let _ = tokio::signal::ctrl_c().await;
}

/// Loads the model and serves until told to end; on the engine's thread.
fn run_engine(engine: Engine, settings: Settings, tokenizer: Tokenizer) -> Result<()> {
    match settings.backend {
        BackendKind::Cpu => {
            let loaded = Model::open(&settings.directory, settings.config.clone(), |_, _| {});
            let made = loaded.and_then(|model| Ok((model, cpu_backend(&settings)?)));
            let (model, backend) = match made {
                Ok(made) => made,
                Err(error) => {
                    engine.abandon(&error);
                    return Err(error);
                }
            };
            let pipeline = Pipeline::new(backend).with_buffering(settings.buffering);
            let runner = CpuRunner::new(&model, pipeline);
            tracing::info!("ready");
            engine.run(
                Scheduler::new(runner, Some(tokenizer), settings.scheduling),
                settings.kv.host_layout().page_bytes(),
            );
        }
        #[cfg(all(
            feature = "cuda",
            target_os = "linux",
            any(target_arch = "x86_64", target_arch = "aarch64")
        ))]
        BackendKind::Cuda => {
            let page_bytes = settings.kv.host_layout().page_bytes();
            let scheduling = settings.scheduling;
            let model = match cuda_model(settings) {
                Ok(model) => model,
                Err(error) => {
                    engine.abandon(&error);
                    return Err(error);
                }
            };
            tracing::info!(products = model.products(), "ready");
            engine.run(Scheduler::new(model, Some(tokenizer), scheduling), page_bytes);
        }
    }
    Ok(())
}

fn cpu_backend(settings: &Settings) -> Result<CpuBackend> {
    let backend = CpuBackend::new(settings.kv.clone(), settings.limits);
    if settings.reserve_host_bytes == 0 {
        return Ok(backend);
    }
    Ok(backend.with_reserved_host(settings.reserve_host_bytes, &mut |_| {})?)
}

#[cfg(all(feature = "cuda", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
fn cuda_model(settings: Settings) -> Result<spinkv_engine::cuda::CudaModel> {
    use spinkv::backend::cuda::driver::{Device, Stream};
    use spinkv::backend::cuda::{CudaBackend, CudaLimits};
    use spinkv_engine::cuda::{BlasUse, CudaModel, CudaOptions, DeviceWeights};

    let Settings { config, kv, limits, buffering, directory, .. } = settings;
    let limits = CudaLimits {
        requests: settings.scheduling.max_batch,
        max_tokens: config.max_position_embeddings,
        buffering,
        gpu_pages: limits.gpu_pages,
        host_bytes: limits.host_bytes,
    };
    CudaBackend::check(&kv, &limits)?;
    let context = &Device::open(0)?;
    let weights = DeviceWeights::open(&Stream::new(context)?, &directory, &config, |_, _| {})?;
    let blas = match settings.cublaslt.as_str() {
        "require" => BlasUse::Required,
        "off" => BlasUse::Never,
        _ => BlasUse::IfPresent,
    };
    let mut model = CudaModel::new(context, config, weights, kv, &CudaOptions { limits, blas })?;
    if settings.reserve_host_bytes > 0 {
        let backend = model.pipeline_mut().backend_mut();
        backend.reserve_host(settings.reserve_host_bytes, &mut |_| {})?;
    }
    Ok(model)
}

impl ServeArguments {
    fn with_file(mut self) -> Result<Self> {
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
        fill!(self, file, model served_model_name host port api_key api_key_file allow_open max_body_mib max_concurrent
            request_timeout drain_timeout default_max_tokens max_batch max_queue prompt_layers patience preempt max_context
            method budget sinks window gates backend page_tokens kv_dtype host_kv gpu_pages gpu_mib host_mib reserve_host_mib
            buffering cublaslt log log_json);
        Ok(self)
    }

    fn start_log(&self) -> Result<()> {
        let filter = self.log.as_deref().unwrap_or("info");
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

    fn settings(&self) -> Result<Settings> {
        let backend = BackendKind::by_name(self.backend.as_deref().unwrap_or("cpu"))?;
        let name = self.method.as_deref().unwrap_or("shadowkv");
        let directory = self.model.clone().unwrap_or_else(demo::model);
        let mut config = ModelConfig::open(&directory)?;
        let defaults = MethodOptions::default();
        let mut own = OwnOptions::default();
        self.method_option.iter().try_for_each(|option| own.add(option))?;
        let method_options = MethodOptions {
            budget: self.budget.as_deref().map_or(Ok(Budget::Tokens(1024)), str::parse)?,
            steady: SteadyZone {
                sinks: self.sinks.unwrap_or(defaults.steady.sinks),
                window: self.window.unwrap_or(defaults.steady.window),
            },
            own,
            gates: gates::for_methods([name].into_iter(), self.gates.as_deref(), &directory, &config)?,
            rotary: Some(config.rotary()),
            ..defaults
        };
        let method = algorithms::by_name(name, &method_options)?;
        if let Some(tokens) = self.max_context {
            at_least("max-context", tokens, 1)?;
            config.max_position_embeddings = config.max_position_embeddings.min(tokens);
        }
        let shape = KvShape::new(config.layers, config.query_heads, config.kv_heads, config.head_dim)?;
        let usual = PageOptions::default();
        let pages = PageOptions {
            tokens: self.page_tokens.unwrap_or(usual.tokens),
            dtype: self.kv_dtype.as_deref().map_or(usual.dtype, dtype),
            host: self.host_kv.as_deref().map_or(Ok(usual.host), str::parse)?,
        };
        let kv = KvConfig::new(shape, pages.layout(config.head_dim)?, method)?;
        let mebibytes = |mib: u64| mib.saturating_mul(1 << 20);
        let limits = MemoryLimits {
            gpu_pages: self.gpu_pages,
            gpu_bytes: self.gpu_mib.map(mebibytes),
            host_bytes: self.host_mib.map(mebibytes),
        };
        let reserve_host_bytes = mebibytes(self.reserve_host_mib.unwrap_or(0));
        limits.check_reserve(reserve_host_bytes)?;
        let usual = SchedulerOptions::default();
        let scheduling = SchedulerOptions {
            max_batch: at_least("max-batch", self.max_batch.unwrap_or(usual.max_batch), 1)?,
            max_queue: self.max_queue.unwrap_or(usual.max_queue),
            prompt_layers: at_least("prompt-layers", self.prompt_layers.unwrap_or(usual.prompt_layers), 1)?,
            patience: self.patience.unwrap_or(usual.patience),
            preempt: self.preempt.unwrap_or(usual.preempt),
        };
        let cpu = backend == BackendKind::Cpu;
        if cpu && scheduling.max_batch > STREAMED_TOKENS {
            return Err(Error::InvalidSetting {
                name: "max-batch",
                value: scheduling.max_batch.to_string(),
                allowed: "the cpu backend takes up to 64, of which each request gets the results that it gets alone",
            });
        }
        if !cpu && limits.gpu_bytes.is_some() {
            let what = "limit its memory by --gpu-mib: --gpu-pages does";
            return Err(Error::UnsupportedByBackend { backend: "cuda", what });
        }
        Ok(Settings {
            backend,
            directory,
            config,
            kv,
            limits,
            buffering: self.buffering.unwrap_or(DEFAULT_BUFFERING),
            reserve_host_bytes,
            cublaslt: self.cublaslt.clone().unwrap_or_else(|| "auto".to_owned()),
            scheduling,
        })
    }

    fn server(&self, settings: &Settings) -> Result<ServerOptions> {
        let named = self.served_model_name.clone();
        let seconds = self.request_timeout.unwrap_or(600);
        Ok(ServerOptions {
            model: named.unwrap_or_else(|| directory_name(&settings.directory)),
            context: settings.config.max_position_embeddings,
            api_keys: self.keys()?,
            max_body_bytes: at_least("max-body-mib", self.max_body_mib.unwrap_or(8), 1)?
                .saturating_mul(1 << 20),
            max_concurrent: at_least("max-concurrent", self.max_concurrent.unwrap_or(512), 1)?.min(1 << 20),
            request_timeout: (seconds > 0).then(|| Duration::from_secs(seconds)),
            body_timeout: Duration::from_secs(30),
            default_max_tokens: at_least("default-max-tokens", self.default_max_tokens.unwrap_or(1024), 1)?,
        })
    }

    fn keys(&self) -> Result<Vec<String>> {
        let mut keys: Vec<_> = self.api_key.iter().cloned().collect();
        if let Some(path) = &self.api_key_file {
            let text =
                std::fs::read_to_string(path).map_err(|source| Error::Io { path: path.clone(), source })?;
            let of_file = keys.len();
            keys.extend(text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned));
            if keys.len() == of_file {
                // A server that was to ask for keys must not run without.
                return Err(Error::SettingsFile { path: path.clone(), message: "holds no key".to_owned() });
            }
        }
        if keys.iter().any(|key| key.trim().is_empty()) {
            let allowed = "a key that is not empty";
            return Err(Error::InvalidSetting { name: "api-key", value: "empty".to_owned(), allowed });
        }
        Ok(keys)
    }
}

fn at_least(name: &'static str, value: usize, least: usize) -> Result<usize> {
    if value >= least {
        return Ok(value);
    }
    Err(Error::InvalidSetting { name, value: value.to_string(), allowed: "at least 1 is needed" })
}

fn directory_name(directory: &Path) -> String {
    let full = directory.canonicalize();
    let name = full.as_deref().unwrap_or(directory).file_name();
    name.map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
}
