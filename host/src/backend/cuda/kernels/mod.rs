//! The kernels of `spinkv-kernels`, each launched through a type that names its operands.
//!
//! A launch checks everything that the host knows: lengths, limits, contexts. What lies in device memory (lists, counts) it cannot
//! see, so launching is `unsafe` where a kernel follows such a list.

mod attend;
mod cluster;
mod drift;
mod estimate;
mod fill_random;
mod gate;
mod gather;
mod index;
mod linear;
mod linear_plan;
mod low_rank;
mod model;
mod offload;
mod outliers;
mod prefill;
mod resolve;
mod score;
mod select;
mod splits;
mod top_k;

pub use attend::{Attend, Awaited};
pub use cluster::{ClusterPages, ClusterRun, ClusterScratch, ClusterShape, ClusterTables, GatherRun};
pub use drift::Drift;
pub use estimate::{ClusterNumbers, Estimate, PageBiases};
pub use fill_random::FillRandom;
pub use gate::{GateKeys, GateKeysStep, GateQueries, GateWeights};
pub use gather::{Gather, GatherVariant};
pub use index::{IndexOperator, IndexPrompts, IndexStep, SummaryTable};
pub use linear::{Linear, LinearOutput, LinearVariant};
pub use low_rank::{
    BasisScratch, CompleteBasis, Gram, InverseFactor, LowRankBasis, ProjectKeys, RebuildKeys, RowProduct,
    SmallPivots, StoreBasis, Unrotate, Weights,
};
pub use model::{Argmax, Embed, HeadNorms, Positions, RmsNorm, Rotate, Sample, Swiglu};
pub use offload::{Append, OffloadPages, StorePrompt, ValidBits, WriteBack};
pub use outliers::{ChunkSpread, MarkPartitions};
pub use prefill::{Prefill, PrefillVariant};
pub use resolve::{KvTables, PartitionPages, Resolve};
pub use score::Score;
pub use select::{Estimates, Marks, SelectPartitions};
pub use top_k::TopK;

use cluster::ClusterFunctions;
use index::IndexFunctions;
use low_rank::LowRankFunctions;
use model::ModelFunctions;

use spinkv_kernels::{abi, ptx};

use super::driver::{Context, Function, Module, PtxArch, Result};

/// All kernels, loaded for one device.
#[derive(Clone, Debug)]
pub struct Kernels {
    fill_random: Function,
    gather: Function,
    /// Where the architecture has bulk copies.
    gather_bulk: Option<Function>,
    gather_coded: Function,
    mean: IndexFunctions,
    bounds: IndexFunctions,
    gate_key: Function,
    gate_key_step: Function,
    gate_query: Function,
    chunk_spread: Function,
    mark: Function,
    cluster: ClusterFunctions,
    append: Function,
    store_prompt: Function,
    write_back: Function,
    resolve: Function,
    score: Function,
    select: Function,
    top_k: Function,
    drift: Function,
    estimate: Function,
    page_biases: Function,
    attend_64: Function,
    attend_128: Function,
    prefill_64: Function,
    prefill_128: Function,
    prefill_wgmma_64: Option<Function>,
    prefill_wgmma_128: Option<Function>,
    model: ModelFunctions,
    low_rank: LowRankFunctions,
    /// For [`TOKEN_TILES`](abi::linear::TOKEN_TILES) tokens.
    linear: [Function; 4],
    gemm: Function,
    gemm_wgmma: Option<Function>,
    multiprocessors: u32,
}

impl Kernels {
    /// Loads the kernels that suit the device.
    ///
    /// # Errors
    /// [`DriverError::InvalidModule`](super::driver::DriverError::InvalidModule) if the driver refuses them, for instance since it
    /// is older than their PTX version.
    pub fn load(context: &Context) -> Result<Self> {
        let arch = context.device().ptx_arch()?;
        let text = ptx(arch.name()).expect("PTX is built for every PtxArch");
        let module = Module::from_ptx(context, text)?;
        // Of shared memory these take as much as their rows need, up to all that a block can have.
        let shared = |name: &str| {
            let function = module.function(name)?;
            let fixed = function.attributes().static_shared_bytes;
            function.allow_shared_bytes(context.device().limits.opt_in_shared_bytes.saturating_sub(fixed))?;
            Ok(function)
        };
        let hopper = |name| (arch == PtxArch::Sm90a).then(|| shared(name)).transpose();
        let index = |prompts, step| {
            Ok(IndexFunctions { prompts: module.function(prompts)?, step: module.function(step)? })
        };
        Ok(Self {
            fill_random: module.function("fill_random")?,
            gather: module.function("gather")?,
            gather_coded: module.function("gather_coded")?,
            gather_bulk: (arch != PtxArch::Sm80).then(|| shared("gather_bulk")).transpose()?,
            mean: index("chunk_mean", "chunk_mean_step")?,
            bounds: index("chunk_bounds", "chunk_bounds_step")?,
            gate_key: module.function("gate_key")?,
            gate_key_step: module.function("gate_key_step")?,
            gate_query: module.function("gate_query")?,
            chunk_spread: module.function("chunk_spread")?,
            mark: module.function("mark")?,
            cluster: ClusterFunctions::load(&module, shared)?,
            append: module.function("append")?,
            store_prompt: module.function("store_prompt")?,
            write_back: module.function("write_back")?,
            resolve: shared("resolve")?,
            score: shared("score")?,
            select: shared("select")?,
            top_k: shared("top_k")?,
            drift: module.function("drift")?,
            estimate: module.function("estimate")?,
            page_biases: module.function("page_biases")?,
            attend_64: shared("attend_64")?,
            attend_128: shared("attend_128")?,
            prefill_64: shared("prefill_64")?,
            prefill_128: shared("prefill_128")?,
            prefill_wgmma_64: hopper("prefill_wgmma_64")?,
            prefill_wgmma_128: hopper("prefill_wgmma_128")?,
            model: ModelFunctions::load(&module)?,
            low_rank: LowRankFunctions::load(&module, shared)?,
            linear: [shared("linear_8")?, shared("linear_16")?, shared("linear_32")?, shared("linear_64")?],
            gemm: shared("gemm")?,
            gemm_wgmma: hopper("gemm_wgmma")?,
            multiprocessors: context.device().multiprocessors,
        })
    }

    /// All of them, with what the driver's compiler made of them.
    pub fn functions(&self) -> impl Iterator<Item = &Function> {
        let index = [&self.mean, &self.bounds];
        let index = index.into_iter().flat_map(|kernels| [&kernels.prompts, &kernels.step]);
        let rest = [
            &self.score,
            &self.select,
            &self.top_k,
            &self.resolve,
            &self.gather,
            &self.append,
            &self.gather_coded,
        ];
        let rest = index.chain(rest).chain([
            &self.gate_key,
            &self.gate_key_step,
            &self.gate_query,
            &self.chunk_spread,
            &self.mark,
            &self.store_prompt,
            &self.write_back,
            &self.estimate,
            &self.page_biases,
            &self.attend_64,
            &self.attend_128,
            &self.prefill_64,
            &self.prefill_128,
            &self.fill_random,
            &self.drift,
        ]);
        let rest = rest.chain(self.model.all()).chain(self.cluster.all()).chain(self.low_rank.all());
        let rest = rest.chain(&self.linear).chain([&self.gemm]);
        let optional = [&self.gather_bulk, &self.prefill_wgmma_64, &self.prefill_wgmma_128, &self.gemm_wgmma];
        rest.chain(optional.into_iter().flatten())
    }

    fn index(&self, operator: IndexOperator) -> &IndexFunctions {
        match operator {
            IndexOperator::Mean => &self.mean,
            IndexOperator::Bounds => &self.bounds,
        }
    }

    /// How many scores of rows of up to `stride` [`TopK`] and [`SelectPartitions`] can keep in shared memory on this device.
    pub fn resident(&self, stride: u32) -> u32 {
        let shared = self.select.shared_limit().min(self.top_k.shared_limit());
        let room = shared.saturating_sub(abi::select::SCRATCH_BYTES) / 4;
        stride.next_multiple_of(4).min(room / 4 * 4).min(abi::select::MAX_RESIDENT)
    }

    /// Threads of a block of `select` and `top_k` for `rows` rows of up to `stride` scores, of which `resident` are in shared memory.
    fn select_block(&self, rows: usize, stride: u32, resident: u32) -> u32 {
        // A block may have nearly all that a multiprocessor has.
        let shared = self.select.shared_limit().min(self.top_k.shared_limit());
        let fit = abi::select::shared_bytes(resident) <= shared / 2;
        abi::select::block(stride, fit && rows > self.multiprocessors as usize)
    }

    /// Into how many blocks [`Attend`] should split each of `units` (rows, twice as many for groups of more than 8) of up to `tokens`
    /// tokens.
    pub fn attend_splits(&self, units: u32, tokens: u32) -> u32 {
        splits::splits(units, tokens, self.multiprocessors)
    }
}
