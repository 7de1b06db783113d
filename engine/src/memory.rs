//! How much memory a generation can take, worked out beforehand, and how much it took.

use serde::Serialize;
use spinkv::KvConfig;
use spinkv::backend::cpu::attend_prompt_scratch;
use spinkv::memory::{RequestPlan, SUMMARY_ELEMENT_BYTES, footprint};
use spinkv::pipeline::LowRank;

use crate::model::{Model, PREFILL_CHUNK};

/// What no formula counts: code, tokenizer, packing buffers of matrix products, small tables, the allocator's
/// slack.
const OVERHEAD_BYTES: u64 = 96 << 20;

/// An upper bound of the resident memory of a CPU generation, by kind, in bytes.
///
/// With `T` prompt tokens, `C` = [`PREFILL_CHUNK`], hidden size `H`, MLP width `F`, `Q` and `K` the widths of all
/// query and all KV heads, head width `d`, and 4-byte activations:
///
/// ```text
/// weights      4 x parameters
/// checkpoint   the safetensors files, which are mapped while they are read
/// gpu_pages    rows x (steady + mandatory + buffering pages) x page bytes
/// host_pages   rows x slabs x 16 pages x host page bytes, or what is reserved if that is more
/// summaries    rows x segments x partitions of a segment x width x 4
/// key_factors  4 rank (layers x segments x tokens of a segment + rows x d), of keys in low rank
/// activations  4 (T (H + 2 K + d) + C (2 H + 2 Q + 2 F)) + threads x one attention tile + 4 vocab;
///              of keys in low rank 4 T K more, and some matrices of rank and K
/// overhead     96 MiB
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct PeakBound {
    /// Weights, as f32.
    pub weights: u64,
    /// The checkpoint's files.
    pub checkpoint: u64,
    /// The GPU pool, which the CPU backend keeps in main memory as well.
    pub gpu_pages: u64,
    /// The host arena.
    pub host_pages: u64,
    /// Summaries.
    pub summaries: u64,
    /// What keys in low rank are rebuilt from.
    pub key_factors: u64,
    /// Activations of the prompt.
    pub activations: u64,
    /// Everything else.
    pub overhead: u64,
}

impl PeakBound {
    /// The bound for a prompt of `prompt_tokens` tokens under `plan`, with `reserved` bytes of host memory.
    pub fn new(
        model: &Model,
        kv: &KvConfig,
        plan: &RequestPlan,
        prompt_tokens: usize,
        reserved: u64,
    ) -> Self {
        let (config, layout) = (model.config(), kv.layout());
        let (hidden, mlp, head_dim) = (config.hidden_size, config.intermediate_size, config.head_dim);
        let (queries, keys) = (config.query_heads * head_dim, config.kv_heads * head_dim);
        let limits = plan.limits(kv);
        let longest = footprint(kv, plan, plan.max_tokens, SUMMARY_ELEMENT_BYTES);
        let activations = prompt_tokens * (hidden + 2 * keys + head_dim)
            + PREFILL_CHUNK * 2 * (hidden + queries + mlp)
            + config.vocab_size;
        let tiles = rayon::current_num_threads() * attend_prompt_scratch(&model.shape());
        let float = size_of::<f32>();
        // Keys turned back; some of them, the Gram matrix, and the vectors of an iteration three times, in f64.
        let low_rank = kv.low_rank().map_or(0, |LowRank { rank, .. }| {
            prompt_tokens * keys * float + 8 * (keys * (1024 + keys + 3 * rank) + 4 * rank * rank)
        });
        Self {
            weights: model.weight_bytes(),
            checkpoint: model.file_bytes(),
            gpu_pages: (plan.gpu_pages() * layout.page_bytes()) as u64,
            host_pages: limits.host_bytes.unwrap_or(0).max(reserved),
            summaries: longest.gpu.summaries,
            key_factors: longest.gpu.key_factors(),
            activations: (activations * float + tiles + low_rank) as u64,
            overhead: OVERHEAD_BYTES,
        }
    }

    /// All kinds together.
    pub fn total(&self) -> u64 {
        let Self {
            weights,
            checkpoint,
            gpu_pages,
            host_pages,
            summaries,
            key_factors,
            activations,
            overhead,
        } = self;
        weights + checkpoint + gpu_pages + host_pages + summaries + key_factors + activations + overhead
    }
}

/// The most memory that this process ever had resident, in bytes; `None` where the system does not tell.
pub fn peak_resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kib| kib * 1024)
}
