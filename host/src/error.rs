use crate::pipeline::RequestId;

/// The result of every fallible call of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong, with the value that was refused and the limit that it broke.
///
/// A refused call leaves every table as it was. An error out of a stage (on the CPU only
/// [`Error::InvalidSelection`] and [`Error::KeyNotFinite`]) leaves the requests of that batch half-way: they can only be released. All others
/// go on.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "each field is named in its variant's message")]
pub enum Error {
    #[error("invalid attention shape: {reason}")]
    InvalidShape { reason: String },

    #[error("{what} is {value}, which {ranks} GPUs cannot share out evenly")]
    Indivisible { what: &'static str, value: usize, ranks: usize },

    #[error("method {method:?} cannot be shared out over GPUs by KV heads: {what}")]
    Unshardable { method: String, what: &'static str },

    #[error("method {method:?} needs learned gates, and none are given")]
    NoGates { method: String },

    #[error("gates of rank {rank}: a multiple of 16 from 16 to {limit} is needed")]
    GateRank { rank: usize, limit: usize },

    #[error("the rotary position embedding of {of} has {found} elements a head, {expected} are needed")]
    GateRotary { of: &'static str, expected: usize, found: usize },

    #[error("gates of {found} layers for a model of {expected}")]
    GateLayers { expected: usize, found: usize },

    #[error("gate of layer {layer}: its {tensor} has {found} elements, {expected} are needed")]
    GateTensor { layer: usize, tensor: &'static str, expected: usize, found: usize },

    #[error(
        "method {method:?} keeps keys in low rank and needs the model's rotary position embedding, and none is given"
    )]
    NoRotary { method: String },

    #[error("keys in a rank of {rank}: from 1 to {limit}, the KV heads times the head width")]
    KeyRank { rank: usize, limit: usize },

    #[error(
        "request {request:?}: in layer {layer} the key of token {token} is not finite, and would be in all that is kept of the others"
    )]
    KeyNotFinite { request: RequestId, layer: usize, token: usize },

    #[error("invalid page layout: {reason}")]
    InvalidLayout { reason: String },

    #[error(
        "page size {page_tokens} does not divide the partition size {partition_tokens} of method \
         {method:?}: choose a page size that does (1 to {partition_tokens} tokens)"
    )]
    PageSizeDoesNotDivide { method: String, page_tokens: usize, partition_tokens: usize },

    #[error("method {method:?} does not fit together: {reason}")]
    InvalidMethod { method: String, reason: String },

    #[error("invalid budget {value:?}: {reason}")]
    InvalidBudget { value: String, reason: String },

    #[error(
        "budget of {budget} tokens is below the steady zone's {steady} (sinks {sinks} + window {window}): a \
         method that reads less than that is streaming-llm"
    )]
    BudgetBelowSteady { budget: usize, steady: usize, sinks: usize, window: usize },

    #[error("local window of 0 tokens: the newest token is always attended to, so the window is at least 1")]
    WindowZero,

    #[error(
        "steady zone of {tokens} tokens (sinks {sinks} + window {window}): at most {limit} can be addressed"
    )]
    SteadyZoneTooLarge { tokens: usize, sinks: usize, window: usize, limit: usize },

    #[error("buffering of {value} times the mandatory pages: it is a number of at least 0")]
    InvalidBuffering { value: f64 },

    #[error("unknown method {name:?}; known: {}{}", known.join(", "), suggest(suggestion))]
    UnknownMethod { name: String, known: Vec<&'static str>, suggestion: Option<&'static str> },

    #[error("method option {text:?}: expected NAME=VALUE")]
    MethodOptionSyntax { text: String },

    #[error("method {method:?} has no option {option:?}; {}{}", known_options(known), suggest(suggestion))]
    UnknownMethodOption {
        method: String,
        option: String,
        known: Vec<&'static str>,
        suggestion: Option<&'static str>,
    },

    #[error("method {method:?}, option {option}={value}: {reason}")]
    InvalidMethodOption { method: String, option: &'static str, value: String, reason: String },

    #[error("heads {text:?}: expected LAYER:KV_HEAD, with * for all layers")]
    InvalidHeadRule { text: String },

    #[error("backend {backend:?} is not built into this binary; built: {}", built.join(", "))]
    BackendNotBuilt { backend: String, built: Vec<&'static str> },

    #[error("unknown backend {backend:?}; known: {}", known.join(", "))]
    UnknownBackend { backend: String, known: Vec<&'static str> },

    #[error(
        "out of GPU pages: a request of {max_tokens} tokens needs at least {needed} pages \
         ({rows} rows x {steady} steady, {mandatory} mandatory in all), {free} of {total} are free"
    )]
    OutOfGpuPages {
        max_tokens: usize,
        needed: usize,
        rows: usize,
        steady: usize,
        mandatory: usize,
        free: usize,
        total: usize,
    },

    #[error(
        "out of GPU memory: a request of {max_tokens} tokens needs at least {needed} bytes (pages {pages}, tables \
         {tables}, summaries and factors of keys {summaries}, its prompt's K and V of two layers {prompt}), {free} of {limit} are free"
    )]
    OutOfGpuMemory {
        max_tokens: usize,
        needed: u64,
        pages: u64,
        tables: u64,
        summaries: u64,
        prompt: u64,
        free: u64,
        limit: u64,
    },

    #[error(
        "a request of {max_tokens} tokens needs {mandatory} mandatory slots a row, 16-bit slot ids name {limit}: \
         choose a smaller budget or pages of more than {page_tokens} tokens"
    )]
    TooManySlots { max_tokens: usize, mandatory: usize, page_tokens: usize, limit: usize },

    #[error("out of host memory: {needed} bytes needed for {what}, {free} of {limit} are free")]
    OutOfHostMemory { what: String, needed: u64, free: u64, limit: u64 },

    #[error("out of memory: the system refused {bytes} bytes for {what}")]
    AllocationFailed { what: String, bytes: u64 },

    #[cfg(all(feature = "cuda", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
    #[error(transparent)]
    Driver(#[from] crate::backend::cuda::driver::DriverError),

    #[error("the GPU has no kernels for {what}")]
    UnsupportedOnGpu { what: String },

    #[error("a batch of {requests} requests: the backend was made for {limit}")]
    BatchTooLarge { requests: usize, limit: usize },

    #[error(
        "request {request:?}: a selection could not be made resident in layer {layer}, KV head {kv_head} (fault {fault})"
    )]
    StepFault { request: RequestId, layer: usize, kv_head: usize, fault: u32 },

    #[error("request {request:?}, row {row}: {what}")]
    Inconsistent { request: RequestId, row: usize, what: String },

    #[error("request {0:?} is not admitted")]
    UnknownRequest(RequestId),

    #[error("request {0:?} is parked: it takes no step before it is resumed")]
    RequestParked(RequestId),

    #[error("request {0:?} is not parked")]
    RequestNotParked(RequestId),

    #[error("the backend does not park this request")]
    ParkingUnsupported,

    #[error("prompts of method {method:?} cannot share pages: {reason}")]
    PrefixesUnsupported { method: String, reason: String },

    #[error("request {0:?} was told another prompt before")]
    PrefixTaken(RequestId),

    #[error("request {0:?} appears twice in one batch")]
    DuplicateRequest(RequestId),

    #[error("request {0:?} failed in an earlier step and can only be released")]
    RequestFailed(RequestId),

    #[error("a request of {max_tokens} tokens is longer than a row can address: at most {limit}")]
    ContextTooLong { max_tokens: usize, limit: usize },

    #[error("a request of 0 tokens cannot be admitted: at least 1 token is needed")]
    EmptyRequest,

    #[error("request {request:?} was given {tokens} new tokens, but holds {held} of at most {limit}")]
    ContextFull { request: RequestId, tokens: usize, held: usize, limit: usize },

    #[error("request {request:?}: layer {found} was given where layer {expected} is next")]
    LayerOrder { request: RequestId, expected: usize, found: usize },

    #[error("request {request:?}: {expected} is under way, and {found} was given")]
    StepMismatch { request: RequestId, expected: String, found: String },

    #[error("request {request:?} already holds {held} tokens: a prompt goes into an empty request")]
    PrefillNotEmpty { request: RequestId, held: usize },

    #[error("request {request:?}: {found} queries were given, the prompt has {left} left in this layer")]
    PromptQueries { request: RequestId, found: usize, left: usize },

    #[error("{what} has {found} elements where {expected} were expected")]
    TensorLength { what: &'static str, expected: usize, found: usize },

    #[error("method {method:?} returned an invalid selection: {reason}")]
    InvalidSelection { method: String, reason: String },

    #[error(
        "a selection of {selected} pages does not fit a row's {capacity} slots, of which {pinned} hold other \
         pages that are pinned"
    )]
    SelectionExceedsCapacity { selected: usize, capacity: usize, pinned: usize },
}

/// The name that `name` is probably a misspelling of: at most two letters off, whatever the case. Digits must
/// agree, since they tell versions apart.
pub fn nearest_name(name: &str, known: &[&'static str]) -> Option<&'static str> {
    let digits = |text: &str| text.chars().filter(char::is_ascii_digit).collect::<String>();
    let name = name.to_lowercase();
    let candidates = known.iter().filter(|known| digits(known) == digits(&name));
    let distances =
        candidates.map(|known| (strsim::damerau_levenshtein(&name, &known.to_lowercase()), *known));
    distances.filter(|(distance, _)| *distance <= 2).min().map(|(_, known)| known)
}

fn suggest(suggestion: &Option<&'static str>) -> String {
    suggestion.map(|name| format!("; did you mean {name:?}?")).unwrap_or_default()
}

fn known_options(known: &[&'static str]) -> String {
    if known.is_empty() {
        "it has none of its own".to_owned()
    } else {
        format!("it has {}", known.join(", "))
    }
}
