use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use spinkv::algorithms::{self, MethodOptions, OwnOptions};
use spinkv::backend::BackendKind;
use spinkv::memory::{MemoryLimits, PrefixCache};
use spinkv::pipeline::{Budget, DEFAULT_BUFFERING, SteadyZone};
use spinkv::{KvConfig, KvShape};
use spinkv_engine::bench::Drifting;
use spinkv_engine::config::ModelConfig;
use spinkv_engine::gates;
use spinkv_engine::model::STREAMED_TOKENS;
use spinkv_engine::pages::PageOptions;
use spinkv_engine::serve::SchedulerOptions;
use spinkv_engine::serve::server::ServerOptions;
use spinkv_engine::tokenizer::Tokenizer;
use spinkv_engine::{Error, Result};

use super::super::pages::dtype;
use super::super::{check_gpus, demo};
use super::ServeArguments;

/// The seed of random weights and gates.
pub(super) const RANDOM_SEED: u64 = 0;

/// Where weights and tokens come from.
#[derive(Clone, Debug)]
pub(crate) enum Source {
    /// A checkpoint's directory.
    Checkpoint(PathBuf),
    /// Random ones, of the shape of this name.
    Random(String),
}

impl Source {
    /// The tokenizer of a vocabulary of `vocab_size` tokens.
    pub(super) fn tokenizer(&self, vocab_size: usize) -> Result<Tokenizer> {
        match self {
            Self::Checkpoint(directory) => Tokenizer::open(directory),
            Self::Random(_) => Tokenizer::numbered(vocab_size),
        }
    }

    /// The checkpoint's directory.
    pub(crate) fn directory(&self) -> Option<&Path> {
        match self {
            Self::Checkpoint(directory) => Some(directory),
            Self::Random(_) => None,
        }
    }

    /// What the model is called unless it is told otherwise.
    fn name(&self) -> String {
        let directory = match self {
            Self::Checkpoint(directory) => directory,
            Self::Random(name) => return name.clone(),
        };
        let full = directory.canonicalize();
        let name = full.as_deref().unwrap_or(directory).file_name();
        name.map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
    }
}
/// Bytes of pages of prompts that are kept for others, where requests leave so much, if there is no limit of the host memory.
const PREFIX_BYTES: u64 = 1 << 30;

/// How much is kept of prompts for others: at most so many bytes, or what requests leave of the host memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PrefixLimit(pub Option<u64>);

/// All settings, checked.
pub(super) struct Settings {
    pub backend: BackendKind,
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "a setting of GPUs"))]
    pub gpus: usize,
    pub source: Source,
    pub config: ModelConfig,
    pub kv: KvConfig,
    pub limits: MemoryLimits,
    pub buffering: f64,
    pub reserve_host_bytes: u64,
    /// How much is kept of prompts for others; `None` for nothing.
    pub prefixes: Option<PrefixLimit>,
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "a setting of GPUs"))]
    pub cublaslt: String,
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "a setting of GPUs"))]
    pub overlap: String,
    pub scheduling: SchedulerOptions,
}

impl ServeArguments {
    pub(super) fn settings(&self) -> Result<Settings> {
        let backend = BackendKind::by_name(self.backend.as_deref().unwrap_or("cpu"))?;
        let name = self.method.as_deref().unwrap_or("shadowkv");
        let (source, mut config) = self.source(backend)?;
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
            gates: match source.directory() {
                None if self.gates.is_none() && name == algorithms::SEER_ATTENTION => {
                    Some(Arc::new(gates::random(&config, RANDOM_SEED)?))
                }
                directory => {
                    let directory = directory.unwrap_or(Path::new(""));
                    gates::for_methods([name].into_iter(), self.gates.as_deref(), directory, &config)?
                }
            },
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
        let drifting =
            self.selections.as_deref().map_or(source.directory().is_none(), |who| who == "drifting");
        let method = if drifting { Drifting::of(method, &shape)? } else { method };
        let kv = KvConfig::new(shape, pages.layout(config.head_dim)?, method)?;
        let gpus = self.gpus.unwrap_or(1);
        check_gpus(backend, gpus, &config)?;
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
            turn: self.turn.map(|turn| at_least("turn", turn, 1)).transpose()?,
        };
        let prefixes = self.prefixes(backend, &kv, &limits)?;
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
        let overlap = self.overlap.clone().unwrap_or_else(|| "attention".to_owned());
        if cpu && overlap == "halves" {
            return Err(Error::UnsupportedByBackend { backend: "cpu", what: "overlap halves of a batch" });
        }
        Ok(Settings {
            backend,
            source,
            gpus,
            config,
            kv,
            limits,
            buffering: self.buffering.unwrap_or(DEFAULT_BUFFERING),
            reserve_host_bytes,
            prefixes,
            cublaslt: self.cublaslt.clone().unwrap_or_else(|| "auto".to_owned()),
            overlap,
            scheduling,
        })
    }

    /// The model's source and configuration.
    fn source(&self, backend: BackendKind) -> Result<(Source, ModelConfig)> {
        match &self.random_weights {
            Some(_) if backend == BackendKind::Cpu => {
                Err(Error::UnsupportedByBackend { backend: "cpu", what: "make random weights" })
            }
            Some(name) => {
                let whole = ModelConfig::preset(name)?;
                let layers = self.layers.unwrap_or(whole.layers);
                Ok((Source::Random(name.clone()), whole.with_layers(layers)?))
            }
            None if self.layers.is_some() => Err(Error::InvalidSetting {
                name: "layers",
                value: self.layers.unwrap_or_default().to_string(),
                allowed: "only random weights can be cut",
            }),
            None => {
                let directory = self.model.clone().unwrap_or_else(demo::model);
                let config = ModelConfig::open(&directory)?;
                Ok((Source::Checkpoint(directory), config))
            }
        }
    }

    /// What is asked for is refused where it cannot be; what is not asked for is done where it can.
    fn prefixes(
        &self,
        backend: BackendKind,
        kv: &KvConfig,
        limits: &MemoryLimits,
    ) -> Result<Option<PrefixLimit>> {
        let limit = match self.prefix_mib {
            Some(0) => return Ok(None),
            Some(mib) => Some(mib.saturating_mul(1 << 20)),
            // A GPU's host memory has a limit of its own.
            None if limits.host_bytes.is_some() || backend != BackendKind::Cpu => None,
            None => Some(PREFIX_BYTES),
        };
        match PrefixCache::new(kv, limit) {
            Ok(_) => Ok(Some(PrefixLimit(limit))),
            Err(_) if self.prefix_mib.is_none() => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    pub(super) fn server(&self, settings: &Settings) -> Result<ServerOptions> {
        let named = self.served_model_name.clone();
        let seconds = self.request_timeout.unwrap_or(600);
        Ok(ServerOptions {
            model: named.unwrap_or_else(|| settings.source.name()),
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

    pub(super) fn keys(&self) -> Result<Vec<String>> {
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
