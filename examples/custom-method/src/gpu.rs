//! The method's operators on a GPU: Index with a kernel of its own, Select out of SpinKV's launches.

use std::mem::offset_of;

use custom_method_kernels::{BLOCK, MAX_HEAD_WORDS, entry, ptx};
use spinkv::backend::cuda::driver::{
    Argument, Function, LaunchShape, Module, Result as DriverResult, Stream, check_length, check_operand,
    launch_with,
};
use spinkv::backend::cuda::kernels::{Kernels, SelectPartitions};
use spinkv::backend::cuda::operators::{
    GpuIndex, GpuSelect, LoadIndex, LoadSelect, OperatorSizes, PromptIndex, SelectStage, StepIndex,
    SummaryRows,
};
use spinkv::pipeline::GroupMerge;
use spinkv::{Error, Result};
use spinkv_kernels::abi::Entry;

// What the kernels read is where they read it.
const _: () = assert!(
    size_of::<Entry>() == 4 * entry::NUMBERS
        && offset_of!(Entry, tokens) == 4 * entry::TOKENS
        && offset_of!(Entry, directory) == 4 * entry::DIRECTORY
        && offset_of!(Entry, first_steady) == 4 * entry::FIRST_STEADY
        && offset_of!(Entry, sink_pages) == 4 * entry::SINK_PAGES
        && offset_of!(Entry, ring_pages) == 4 * entry::RING_PAGES
        && offset_of!(Entry, new_partition) == 4 * entry::NEW_PARTITION
        && offset_of!(Entry, new_partitions) == 4 * entry::NEW_PARTITIONS
);

/// The Index, for a backend of these sizes.
///
/// # Errors
/// For heads that the kernels do not take.
pub fn index<'a>(sizes: &OperatorSizes) -> Result<LoadIndex<'a>> {
    let words = sizes.shape.head_dim / 8;
    if words > MAX_HEAD_WORDS as usize {
        let what = format!("keys of {} elements: at most {}", sizes.shape.head_dim, 8 * MAX_HEAD_WORDS);
        return Err(Error::UnsupportedOnGpu { what });
    }
    Ok(Box::new(|stream| Ok(Box::new(FarthestKeys::load(stream)?))))
}

/// The Select, which wants `share` of the softmax.
pub fn select<'a>(share: f32) -> LoadSelect<'a> {
    Box::new(move |_| Ok(Box::new(Share(share))))
}

/// The kernels. The fields are private: they are these and no others.
#[derive(Debug)]
struct FarthestKeys {
    prompts: Function,
    step: Function,
}

impl FarthestKeys {
    fn load(stream: &Stream) -> DriverResult<Self> {
        let context = stream.context();
        let text = ptx(context.device().ptx_arch()?.name()).expect("PTX for all that SpinKV knows");
        let module = Module::from_ptx(context, text)?;
        Ok(Self { prompts: module.function("farthest_key")?, step: module.function("farthest_key_step")? })
    }

    /// What both kernels ask of where summaries go.
    fn check(rows: &SummaryRows<'_>) -> DriverResult<u32> {
        check_length("farthest summary words", rows.head_words as usize, rows.summary_words as usize)?;
        check_operand("farthest head_words", rows.head_words.into(), 1..=MAX_HEAD_WORDS.into())?;
        rows.check()
    }
}

/// As many warps as there are rows.
fn shape(items: u32, kv_heads: u32) -> DriverResult<LaunchShape> {
    let blocks = u64::from(items) * u64::from(kv_heads);
    check_operand("farthest blocks", blocks, 1..=i32::MAX as u64)?;
    Ok(LaunchShape::linear(blocks as u32, BLOCK))
}

impl GpuIndex for FarthestKeys {
    unsafe fn prompt(&self, _: &Kernels, stream: &Stream, stage: &PromptIndex<'_>) -> DriverResult<()> {
        let PromptIndex { rows, keys, first_token, first_partition, partitions } = *stage;
        Self::check(&rows)?;
        let arguments: [Argument; 12] = [
            keys.into(),
            rows.entries.into(),
            first_token.into(),
            first_partition.into(),
            rows.directories.into(),
            rows.first_row.into(),
            rows.request_rows.into(),
            rows.kv_heads.into(),
            rows.head_words.into(),
            rows.partition_tokens.into(),
            rows.segment_partitions.into(),
            rows.summaries.into(),
        ];
        // SAFETY: order and types are the kernel's; the caller answers for the tables.
        unsafe { launch_with(&self.prompts, &shape(partitions, rows.kv_heads)?, stream, arguments) }
    }

    unsafe fn step(&self, _: &Kernels, stream: &Stream, stage: &StepIndex<'_>) -> DriverResult<()> {
        let StepIndex { rows, steady, pool, page_tokens } = *stage;
        let batch = Self::check(&rows)?;
        check_operand("farthest page_tokens", page_tokens.into(), 1..=u32::MAX.into())?;
        let arguments: [Argument; 12] = [
            rows.entries.into(),
            steady.into(),
            pool.into(),
            rows.directories.into(),
            rows.first_row.into(),
            rows.request_rows.into(),
            rows.kv_heads.into(),
            rows.head_words.into(),
            page_tokens.into(),
            rows.partition_tokens.into(),
            rows.segment_partitions.into(),
            rows.summaries.into(),
        ];
        // SAFETY: as above.
        unsafe { launch_with(&self.step, &shape(batch, rows.kv_heads)?, stream, arguments) }
    }
}

/// SpinKV's `score` as it stands, and its `select` with a sum over the heads and a share of it.
#[derive(Debug)]
struct Share(f32);

impl GpuSelect for Share {
    unsafe fn select(&self, kernels: &Kernels, stream: &Stream, stage: &SelectStage<'_>) -> DriverResult<()> {
        let select = SelectPartitions { merge: GroupMerge::Sum, top_p: self.0, ..stage.select };
        // SAFETY: the caller's part; a head's softmax adds up to 1, a group of at most 16 to 16 (`select` asks for at most 32).
        unsafe {
            stage.score.launch(kernels, stream)?;
            select.launch(kernels, stream)
        }
    }
}
