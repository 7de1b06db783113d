use std::path::{Path, PathBuf};
use std::time::Duration;

use spinkv::algorithms::{self, MethodOptions, OwnOptions};
use spinkv::backend::BackendKind;
use spinkv::memory::{MemoryLimits, PrefixCache};
use spinkv::pipeline::{Budget, DEFAULT_BUFFERING, SteadyZone};
use spinkv::{KvConfig, KvShape};
use spinkv_engine::config::ModelConfig;
use spinkv_engine::gates;
use spinkv_engine::model::STREAMED_TOKENS;
use spinkv_engine::pages::PageOptions;
use spinkv_engine::serve::SchedulerOptions;
use spinkv_engine::serve::server::ServerOptions;
use spinkv_engine::{Error, Result};

use super::super::demo;
use super::super::pages::dtype;
use super::ServeArguments;

/// Bytes of pages of prompts that are kept for others, where requests leave so much, if there is no limit of the host memory.
const PREFIX_BYTES: u64 = 1 << 30;

/// How much is kept of prompts for others: at most so many bytes, or what requests leave of the host memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PrefixLimit(pub Option<u64>);

/// All settings, checked.
pub(super) struct Settings {
    pub backend: BackendKind,
    pub directory: PathBuf,
    pub config: ModelConfig,
    pub kv: KvConfig,
    pub limits: MemoryLimits,
    pub buffering: f64,
    pub reserve_host_bytes: u64,
    /// How much is kept of prompts for others; `None` for nothing.
    pub prefixes: Option<PrefixLimit>,
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "a setting of GPUs"))]
    pub cublaslt: String,
    pub scheduling: SchedulerOptions,
}

impl ServeArguments {
    pub(super) fn settings(&self) -> Result<Settings> {
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
        Ok(Settings {
            backend,
            directory,
            config,
            kv,
            limits,
            buffering: self.buffering.unwrap_or(DEFAULT_BUFFERING),
            reserve_host_bytes,
            prefixes,
            cublaslt: self.cublaslt.clone().unwrap_or_else(|| "auto".to_owned()),
            scheduling,
        })
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

fn directory_name(directory: &Path) -> String {
    let full = directory.canonicalize();
    let name = full.as_deref().unwrap_or(directory).file_name();
    name.map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
}
