use spinkv_kernels::abi::{ENTRY_WORDS, Entry, attend};

use super::super::driver::{
    Argument, DeviceBuffer, LaunchShape, Result, Stream, check_choice, check_length, check_multiple,
    check_operand, check_positive, check_range, launch_with,
};
use super::Kernels;
use crate::memory::Word;

/// A launch of `attend_64` or `attend_128`: attention of a decode step over the pages that `resolve` lists and the steady zone's, one
/// layer.
#[derive(Clone, Copy, Debug)]
pub struct Attend<'a> {
    /// `[batch]`.
    pub entries: &'a DeviceBuffer<Entry>,
    /// KV heads.
    pub kv_heads: u32,
    /// Query heads of a KV head.
    pub group: u32,
    /// Whose steady pages.
    pub layer: u32,
    /// Words of a head: 8 or 16, for 64 or 128 elements.
    pub head_words: u32,
    /// `[batch * kv_heads, list capacity]`: physical pages of the selections.
    pub pages: &'a DeviceBuffer<u32>,
    /// `[batch * kv_heads]`: how many.
    pub page_counts: &'a DeviceBuffer<u32>,
    /// Physical pages of the steady zone, as the entries say.
    pub steady: &'a DeviceBuffer<u32>,
    /// `[batch * kv_heads, list capacity * page_tokens]`: added to the logits of the selection's tokens.
    pub biases: Option<&'a DeviceBuffer<f32>>,
    /// `[physical pages, 2, page_tokens, head_words]`.
    pub pool: &'a DeviceBuffer<Word>,
    /// Tokens of a page: 8, 16, 32 or 64.
    pub page_tokens: u32,
    /// `[batch, kv_heads * group, head_words]` bf16.
    pub queries: &'a DeviceBuffer<Word>,
    /// Factor of the logits.
    pub scale: f32,
    /// The misses that are still on their way, if it is to run beside the [`Gather`](super::Gather) launched before it.
    pub awaited: Option<Awaited<'a>>,
    /// Blocks that share a row's tokens; [`Kernels::attend_splits`] knows a good number.
    pub splits: u32,
    /// `[units, splits, partial words]` if there is more than one split: scratch. Units are rows, twice as many for groups of more
    /// than 8.
    pub partials: &'a DeviceBuffer<Word>,
    /// `[units]`: 0 before and after.
    pub arrivals: &'a DeviceBuffer<u32>,
    /// `[batch, kv_heads * group, head_words]` bf16.
    pub outputs: &'a DeviceBuffer<Word>,
    /// `[batch, kv_heads * group]`: logarithms of the sums of e^logit.
    pub lse: &'a DeviceBuffer<f32>,
}

/// How a row of [`Attend`] knows that its pages are there.
#[derive(Clone, Copy, Debug)]
pub struct Awaited<'a> {
    /// `[batch * kv_heads]`: how many pages are fetched.
    pub copy_counts: &'a DeviceBuffer<u32>,
    /// `[batch * kv_heads]`: words of them that are there.
    pub arrived: &'a DeviceBuffer<u32>,
}

impl Attend<'_> {
    /// Async: outputs are there when `stream` has come this far. An empty batch launches nothing.
    ///
    /// # Errors
    /// [`Choice`](super::super::driver::DriverError::Choice) for heads of neither 64 nor 128 and pages of another size,
    /// [`Positive`](super::super::driver::DriverError::Positive) for a `scale` that is no number above 0,
    /// [`Multiple`](super::super::driver::DriverError::Multiple) for pages that do not part into a list a row,
    /// [`Operand`](super::super::driver::DriverError::Operand) for a size of 0, a group beyond [`MAX_GROUP`](attend::MAX_GROUP), more splits than [`MAX_SPLITS`](attend::MAX_SPLITS), or lists, units or queries
    /// beyond 32 bits, [`Length`](super::super::driver::DriverError::Length) and
    /// [`OutOfRange`](super::super::driver::DriverError::OutOfRange) for a buffer that does not fit, or a failed launch.
    ///
    /// # Safety
    /// The steady lists have the layer. When the launch runs, lists and steady pages name pages of the pool, and of each entry the tail begins at page `leaving_key +
    /// leaving`; `arrivals` are 0; what is awaited is what the launch before it counts; until it has run nothing writes what it reads, and nothing uses what it writes.
    pub unsafe fn launch(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        let Self { kv_heads, group, head_words, page_tokens, splits, scale, .. } = *self;
        let most = u64::from(u32::MAX);
        check_operand("attend kv_heads", kv_heads.into(), 1..=most)?;
        check_operand("attend group", group.into(), 1..=attend::MAX_GROUP.into())?;
        check_choice("attend head_words", head_words, &[8, 16])?;
        let kernel = if head_words == 8 { &kernels.attend_64 } else { &kernels.attend_128 };
        check_choice("attend page_tokens", page_tokens, &attend::PAGE_TOKENS)?;
        check_operand("attend splits", splits.into(), 1..=attend::MAX_SPLITS.into())?;
        check_positive("attend scale", scale)?;
        let rows = self.entries.len() as u64 * u64::from(kv_heads);
        let units = rows * u64::from(attend::blocks_of_group(group));
        check_operand("attend units * splits", units * u64::from(splits), 0..=i32::MAX as u64)?;
        let words = rows * u64::from(group) * u64::from(head_words);
        check_operand("attend words of queries", words, 0..=most)?;
        if rows == 0 {
            return Ok(());
        }
        let list_capacity = self.pages.len() as u64 / rows;
        check_operand("attend pages", self.pages.len() as u64, 0..=most)?;
        check_multiple("attend pages", self.pages.len() as u64, rows)?;
        check_length("attend page_counts", rows as usize, self.page_counts.len())?;
        if let Some(biases) = self.biases {
            let tokens = rows * list_capacity * u64::from(page_tokens);
            check_range("attend biases", 0, tokens as usize, biases.len())?;
        }
        if let Some(Awaited { copy_counts, arrived }) = self.awaited {
            check_length("attend copy_counts", rows as usize, copy_counts.len())?;
            check_length("attend arrived", rows as usize, arrived.len())?;
        }
        // Not read if nothing is awaited.
        let Awaited { copy_counts, arrived } =
            self.awaited.unwrap_or(Awaited { copy_counts: self.page_counts, arrived: self.page_counts });
        if splits > 1 {
            let partials = units * u64::from(splits) * u64::from(attend::partial_words(head_words));
            check_range("attend partials", 0, partials as usize, self.partials.len())?;
            check_range("attend arrivals", 0, units as usize, self.arrivals.len())?;
        }
        check_range("attend queries", 0, words as usize, self.queries.len())?;
        check_range("attend outputs", 0, words as usize, self.outputs.len())?;
        check_range("attend lse", 0, (rows * u64::from(group)) as usize, self.lse.len())?;
        const { assert!(ENTRY_WORDS * size_of::<Word>() == size_of::<Entry>(), "entries are read as words") };
        let arguments: [Argument; 22] = [
            self.entries.into(),
            kv_heads.into(),
            group.into(),
            self.layer.into(),
            self.pages.into(),
            self.page_counts.into(),
            (list_capacity as u32).into(),
            self.steady.into(),
            // Without biases it is not read.
            self.biases.unwrap_or(self.lse).into(),
            u32::from(self.biases.is_some()).into(),
            self.pool.into(),
            page_tokens.into(),
            self.queries.into(),
            self.scale.into(),
            copy_counts.into(),
            arrived.into(),
            u32::from(self.awaited.is_some()).into(),
            splits.into(),
            self.partials.into(),
            self.arrivals.into(),
            self.outputs.into(),
            self.lse.into(),
        ];
        let shape = LaunchShape::linear((units * u64::from(splits)) as u32, attend::BLOCK)
            .with_shared_bytes(attend::shared_bytes(head_words));
        let shape = if self.awaited.is_some() { shape.overlapping() } else { shape };
        // SAFETY: order and types are the kernel's; the caller answers for pages and entries.
        unsafe { launch_with(kernel, &shape, stream, arguments) }
    }
}
