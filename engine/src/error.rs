//! What can go wrong, with the file or value at fault and the limit it broke.

use std::io;
use std::path::{Path, PathBuf};

use safetensors::SafeTensorError;

/// The crate's result type.
pub type Result<T> = std::result::Result<T, Error>;

/// A failure of the engine. Each message names the file or value at fault and what would have been accepted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or directory could not be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },

    /// A file is not the JSON that was expected: bad syntax, a missing field or a field of the wrong type.
    #[error("{}: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What the parser said, with line and column.
        source: serde_json::Error,
    },

    /// `config.json` names a model that the engine does not implement.
    #[error(
        "{}: architecture is {found:?}; supported: Qwen3ForCausalLM, LlamaForCausalLM{}",
        path.display(), did_you_mean(*suggestion)
    )]
    UnknownArchitecture {
        /// The `config.json`.
        path: PathBuf,
        /// The name in it; empty when it names none.
        found: String,
        /// The supported name that it may be a misspelling of.
        suggestion: Option<&'static str>,
    },

    /// A setting of `config.json` that the engine knows but does not implement.
    #[error("{}: {field} is {value}; supported: {supported}", path.display())]
    UnsupportedConfig {
        /// The `config.json`.
        path: PathBuf,
        /// The setting.
        field: &'static str,
        /// Its value, as JSON.
        value: String,
        /// What is accepted.
        supported: String,
    },

    /// Settings of `config.json` that contradict each other or lack a part.
    #[error("{}: {reason}", path.display())]
    InconsistentConfig {
        /// The `config.json`.
        path: PathBuf,
        /// The settings, their values and the rule between them.
        reason: String,
    },

    /// A model's name that is none of the presets.
    #[error(
        "unknown model {name:?}; known: {}{}", crate::config::PRESETS.join(", "), perhaps(*suggestion)
    )]
    UnknownModel {
        /// The name.
        name: String,
        /// The preset that it may be a misspelling of.
        suggestion: Option<&'static str>,
    },

    /// More layers than a model has, or none.
    #[error("{layers} layers asked for; the model has 1 to {limit}")]
    LayerCount {
        /// The number asked for.
        layers: usize,
        /// The model's own.
        limit: usize,
    },

    /// A model that runs on the CPU and that the GPU's kernels do not take.
    #[error("{field} is {value}; on a GPU supported: {supported}")]
    UnsupportedOnGpu {
        /// The setting of `config.json`.
        field: &'static str,
        /// Its value.
        value: usize,
        /// What is accepted.
        supported: &'static str,
    },

    /// Weights that the GPU has no room for.
    #[error("the weights need {needed} bytes of GPU memory; {free} of {total} are free")]
    GpuMemory {
        /// Bytes of the weights, as the driver hands memory out.
        needed: u64,
        /// Bytes that are free.
        free: u64,
        /// Bytes that the GPU has.
        total: u64,
    },

    /// The GPU or its driver refused.
    #[cfg(all(feature = "cuda", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
    #[error(transparent)]
    Driver(#[from] spinkv::backend::cuda::driver::DriverError),

    /// cuBLASLt is missing or refused.
    #[cfg(all(feature = "cuda", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
    #[error(transparent)]
    Blas(#[from] spinkv::backend::cuda::blas::BlasError),

    /// NCCL is missing or refused.
    #[cfg(all(feature = "cuda", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
    #[error(transparent)]
    Nccl(#[from] spinkv::backend::cuda::nccl::NcclError),

    /// More GPUs than the machine has, or none.
    #[error("{wanted} GPUs asked for; this machine has 1 to {found}")]
    GpuCount {
        /// The number asked for.
        wanted: usize,
        /// The machine's.
        found: usize,
    },

    /// Rows that reach further on one GPU than on another: what one request takes must be the same on all.
    #[error(
        "GPU {rank} has {found} KV heads that read sinks and window alone, GPU 0 has {expected}: each must have as many"
    )]
    UnequalRanks {
        /// The GPU's rank.
        rank: usize,
        /// Its rows.
        found: usize,
        /// Those of rank 0.
        expected: usize,
    },

    /// GPUs that keep the same prompts found different parts of one, as after memory that one of them alone was refused. All have forgotten theirs.
    #[error(
        "GPU {rank} has {found} tokens of the prompt, GPU 0 has {expected}; kept prompts are forgotten, the next try computes all of it"
    )]
    UnequalPrefixes {
        /// The GPU's rank.
        rank: usize,
        /// Tokens whose pages it has.
        found: usize,
        /// Those of rank 0.
        expected: usize,
    },

    /// A rank did not go on with a step, since another one did not.
    #[error("another GPU of the group did not go on")]
    OtherRank,

    /// A model over several GPUs of which one failed in the middle of a sum: the others have nothing to go on with.
    #[error("the GPU of rank {rank} failed, and the model with it: {message}")]
    RankFailed {
        /// The rank that failed first.
        rank: usize,
        /// Why.
        message: String,
    },

    /// Something that this backend cannot do.
    #[error("the {backend} backend cannot {what}")]
    UnsupportedByBackend {
        /// The backend.
        backend: &'static str,
        /// What was asked for.
        what: &'static str,
    },

    /// A directory without model weights.
    #[error("{}: has neither model.safetensors nor model.safetensors.index.json", dir.display())]
    MissingWeights {
        /// The checkpoint's directory.
        dir: PathBuf,
    },

    /// A shard index names a file that does not exist.
    #[error("{}: names the shard {shard:?}, which does not exist beside it", index.display())]
    MissingShard {
        /// The `model.safetensors.index.json`.
        index: PathBuf,
        /// The file name in it.
        shard: String,
    },

    /// A safetensors file whose header cannot be understood.
    #[error("{}: not a valid safetensors file: {source}", path.display())]
    CorruptWeights {
        /// The file.
        path: PathBuf,
        /// What is wrong with the header.
        source: SafeTensorError,
    },

    /// A safetensors file that is cut short, or longer than its tensors.
    #[error("{}: has {found} bytes; its header describes {expected}", path.display())]
    WeightsLength {
        /// The file.
        path: PathBuf,
        /// Length of the file in bytes.
        found: usize,
        /// Length in bytes that the header calls for; saturated where it passes `usize::MAX`.
        expected: usize,
    },

    /// A tensor that should be in a file is not.
    #[error("{}: has no tensor {name:?}", path.display())]
    MissingTensor {
        /// The safetensors file or the shard index.
        path: PathBuf,
        /// The tensor.
        name: String,
    },

    /// A tensor's shape is not what the configuration calls for.
    #[error("{}: tensor {name:?} has shape {found:?}; expected {expected:?}", path.display())]
    TensorShape {
        /// The safetensors file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Its shape, outermost first.
        found: Vec<usize>,
        /// The shape asked for.
        expected: Vec<usize>,
    },

    /// A tensor's element type cannot be converted to what was asked for.
    #[error("{}: tensor {name:?} has dtype {found}; supported: {supported}", path.display())]
    TensorDtype {
        /// The safetensors file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Its element type, as safetensors spells it.
        found: String,
        /// The accepted element types.
        supported: &'static str,
    },

    /// The tokenizer file cannot be used, or the tokenizer refused an input.
    #[error("{}: {message}", path.display())]
    Tokenizer {
        /// The `tokenizer.json`.
        path: PathBuf,
        /// What the tokenizer said.
        message: String,
    },

    /// A token id that the vocabulary does not have.
    #[error("token id {id} is out of the vocabulary; ids run from 0 to {}", vocab_size.saturating_sub(1))]
    TokenOutOfVocabulary {
        /// The id.
        id: u32,
        /// Number of ids.
        vocab_size: usize,
    },

    /// A sampling parameter out of its range.
    #[error("sampling parameter {name} is {value}; allowed: {allowed}")]
    InvalidSampling {
        /// The field of [`SamplingParams`](crate::sampling::SamplingParams).
        name: &'static str,
        /// Its value.
        value: f64,
        /// The range.
        allowed: &'static str,
    },

    /// The KV memory or the method refused.
    #[error(transparent)]
    Kv(#[from] spinkv::Error),

    /// A trace could not be read or written.
    #[error(transparent)]
    Trace(#[from] crate::simulator::TraceError),

    /// An evaluation cannot be run, or its results cannot be kept.
    #[error(transparent)]
    Eval(#[from] crate::eval::EvalError),

    /// A bench that cannot be run as asked for.
    #[error(transparent)]
    Bench(#[from] crate::bench::BenchError),

    /// A load that cannot be put on a server.
    #[cfg(feature = "serve")]
    #[error(transparent)]
    Load(#[from] crate::bench::load::LoadError),

    /// A plot could not be drawn.
    #[error("{}: {reason}", path.display())]
    Plot {
        /// The file.
        path: PathBuf,
        /// What the drawing said.
        reason: String,
    },

    /// A prompt without tokens.
    #[error("the prompt is empty: at least 1 token is needed")]
    EmptyPrompt,

    /// A prompt longer than the model's context.
    #[error("the prompt has {tokens} tokens; the model takes {limit} (max_position_embeddings)")]
    PromptTooLong {
        /// Tokens of the prompt.
        tokens: usize,
        /// The model's `max_position_embeddings`.
        limit: usize,
    },

    /// A prompt that cannot go on, since another one has begun and has the model's activations.
    #[error("the prompt of request {request:?} cannot go on: another prompt has begun since")]
    PromptReplaced {
        /// The request.
        request: spinkv::pipeline::RequestId,
    },

    /// As many jobs wait as may.
    #[error("the queue is full: {limit} requests wait")]
    QueueFull {
        /// The most that may wait.
        limit: usize,
    },

    /// A step that failed for another request of its batch took this one along.
    #[error("the batch failed: {message}")]
    BatchFailed {
        /// What the step said.
        message: String,
    },

    /// An engine that is over, or about to be.
    #[error("the engine takes no more requests")]
    EngineStopped,

    /// A chat template that is missing, cannot be read or refuses the messages.
    #[error("{}: {message}", path.display())]
    ChatTemplate {
        /// The file, or the checkpoint's directory.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },

    /// A file of settings that is not valid.
    #[error("{}: {message}", path.display())]
    SettingsFile {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },

    /// A setting of the server out of its range.
    #[error("{name} is {value:?}: {allowed}")]
    InvalidSetting {
        /// The setting.
        name: &'static str,
        /// Its value.
        value: String,
        /// What is accepted.
        allowed: &'static str,
    },

    /// A generation of no tokens.
    #[error("0 tokens asked for; at least 1 is needed")]
    NothingToGenerate,

    /// The caller broke off.
    #[error("cancelled")]
    Cancelled,

    /// A prompt that is not text.
    #[error("{source_name}: not UTF-8 from byte {offset} on")]
    PromptNotUtf8 {
        /// The prompt file, or "standard input".
        source_name: String,
        /// The first byte that is not UTF-8.
        offset: usize,
    },

    /// Neither a prompt nor a bundled question to fall back on.
    #[error("no prompt for {}: give --prompt TEXT, --prompt-file FILE, or - for standard input", model.display())]
    NoPrompt {
        /// The model's directory.
        model: PathBuf,
    },

    /// No token can be chosen, since every logit is NaN or infinite.
    #[error("none of the {len} logits is a finite number")]
    NoFiniteLogit {
        /// Number of logits.
        len: usize,
    },
}

impl Error {
    /// For `map_err` after an operation on `path`.
    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        move |source| Self::Io { path: path.to_path_buf(), source }
    }

    /// For `map_err` after parsing the JSON in `path`.
    pub(crate) fn json(path: &Path) -> impl FnOnce(serde_json::Error) -> Self + '_ {
        move |source| Self::Json { path: path.to_path_buf(), source }
    }
}

fn did_you_mean(suggestion: Option<&str>) -> String {
    suggestion.map_or_else(String::new, |name| format!(" (did you mean {name}?)"))
}

fn perhaps(suggestion: Option<&str>) -> String {
    suggestion.map_or_else(String::new, |name| format!("; did you mean {name:?}?"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_name_the_file_the_value_and_the_limit() {
        let path = PathBuf::from("m/config.json");
        let unsupported = Error::UnsupportedConfig {
            path: path.clone(),
            field: "hidden_act",
            value: "\"gelu\"".into(),
            supported: "silu".into(),
        };
        assert_eq!(unsupported.to_string(), "m/config.json: hidden_act is \"gelu\"; supported: silu");
        let unknown =
            Error::UnknownArchitecture { path, found: "LLaMA".into(), suggestion: Some("LlamaForCausalLM") };
        assert_eq!(
            unknown.to_string(),
            "m/config.json: architecture is \"LLaMA\"; supported: Qwen3ForCausalLM, LlamaForCausalLM \
             (did you mean LlamaForCausalLM?)"
        );
        let id = Error::TokenOutOfVocabulary { id: 4096, vocab_size: 4096 };
        assert_eq!(id.to_string(), "token id 4096 is out of the vocabulary; ids run from 0 to 4095");
    }

    #[test]
    fn errors_travel_between_threads_and_stay_small() {
        fn sendable<T: Send + Sync + 'static>() {}
        sendable::<Error>();
        assert!(size_of::<Error>() <= 128);
    }
}
