use spinkv_kernels::abi::low_rank::project_keys;
use spinkv_kernels::abi::{Entry, PageCopy, SEGMENT_KEYS, WORD_ELEMENTS};

use super::super::super::driver::{
    Argument, DeviceBuffer, LaunchShape, Result, Stream, check_choice, check_length, check_operand,
    check_positive, launch_with,
};
use super::super::Kernels;
use super::check_rank;
use crate::memory::Word;

/// A launch of `project_keys`: coefficients of the tokens whose pages leave the steady zone, one layer of a decode step, and a list of those pages
/// for [`RebuildKeys`](super::RebuildKeys).
#[derive(Clone, Copy, Debug)]
pub struct ProjectKeys<'a> {
    /// `[batch]`.
    pub entries: &'a DeviceBuffer<Entry>,
    /// Steady lists of all requests: physical pages.
    pub steady: &'a DeviceBuffer<u32>,
    /// `[pages, 2, page_tokens, head_words]` bf16: keys are read.
    pub pool: &'a DeviceBuffer<Word>,
    /// KV heads of the layer.
    pub kv_heads: u32,
    /// Words of a head: 8 or 16, for 64 or 128 elements.
    pub head_words: u32,
    /// The layer.
    pub layer: u32,
    /// Layers of the model.
    pub layers: u32,
    /// Tokens of a page.
    pub page_tokens: u32,
    /// `[head_dim / 2]`, in radians a position.
    pub frequencies: &'a DeviceBuffer<f32>,
    /// Factor of the sines and cosines that keys were turned with; 1 but for YaRN.
    pub magnitude: f32,
    /// `[bases, layers, kv_heads, head_dim, rank / 8]` bf16.
    pub bases: &'a DeviceBuffer<Word>,
    /// A multiple of 32.
    pub rank: u32,
    /// All requests' directories.
    pub directories: &'a DeviceBuffer<u32>,
    /// `[segments, layers, 512 * page_tokens, rank / 8]` bf16: written.
    pub coefficients: &'a DeviceBuffer<Word>,
    /// `[batch * kv_heads, capacity]`: written, pages without a host page.
    pub copies: &'a DeviceBuffer<PageCopy>,
    /// `[batch * kv_heads, capacity]`: written, their page keys.
    pub copy_keys: &'a DeviceBuffer<u32>,
    /// `[batch * kv_heads]`: written, how many.
    pub counts: &'a DeviceBuffer<u32>,
}

impl ProjectKeys<'_> {
    /// Async: coefficients and lists are there when `stream` has come this far.
    ///
    /// # Errors
    /// [`Choice`](super::super::super::driver::DriverError::Choice) for heads of neither 64 nor 128,
    /// [`Operand`](super::super::super::driver::DriverError::Operand) for a size of 0 or a layer that there is not,
    /// [`Multiple`](super::super::super::driver::DriverError::Multiple) for a rank that is no multiple of 32,
    /// [`Positive`](super::super::super::driver::DriverError::Positive) for a magnitude that is no number above 0,
    /// [`Length`](super::super::super::driver::DriverError::Length) for buffers that do not fit each other,
    /// [`SharedMemory`](super::super::super::driver::DriverError::SharedMemory) for keys that a block has no room for, or a failed launch.
    ///
    /// # Safety
    /// When the launch runs, each entry's leaving pages are steady, within the pool, and no more than a list has room for; their keys' segments are in
    /// its directory; it names a basis; and until it has run nothing writes what it reads, and nothing uses what it writes.
    pub unsafe fn launch(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        let Self { kv_heads, head_words, layer, layers, rank, page_tokens, .. } = *self;
        let any = 1..=u64::from(u16::MAX);
        check_choice("project_keys head_words", head_words, &[8, 16])?;
        check_rank("project_keys rank", rank)?;
        check_operand("project_keys kv_heads", kv_heads.into(), any.clone())?;
        check_operand("project_keys layers", layers.into(), any.clone())?;
        check_operand("project_keys layer", layer.into(), 0..=u64::from(layers) - 1)?;
        check_operand("project_keys page_tokens", page_tokens.into(), any)?;
        check_positive("project_keys magnitude", self.magnitude)?;
        let (batch, rank_words) = (self.entries.len(), rank / WORD_ELEMENTS as u32);
        check_operand("project_keys entries", batch as u64, 1..=u64::from(u16::MAX))?;
        let lists = batch * kv_heads as usize;
        let capacity = self.copies.len() / lists;
        let (head_dim, rank_64) = (head_words * WORD_ELEMENTS as u32, u64::from(rank_words));
        let width = u64::from(kv_heads) * u64::from(head_dim);
        let of_all = |len: usize, of_each: u64| match usize::try_from(of_each) {
            Ok(of_each) => len / of_each * of_each,
            Err(_) => 0,
        };
        let segment = u64::from(layers) * u64::from(SEGMENT_KEYS) * u64::from(page_tokens) * rank_64;
        for (what, expected, found) in [
            ("project_keys copies", lists * capacity, self.copies.len()),
            ("project_keys copy_keys", self.copies.len(), self.copy_keys.len()),
            ("project_keys counts", lists, self.counts.len()),
            ("project_keys coefficients", of_all(self.coefficients.len(), segment), self.coefficients.len()),
            (
                "project_keys bases",
                of_all(self.bases.len(), u64::from(layers) * width * rank_64),
                self.bases.len(),
            ),
            ("project_keys frequencies", head_dim as usize / 2, self.frequencies.len()),
        ] {
            check_length(what, expected, found)?;
        }
        let arguments: [Argument; 18] = [
            self.entries.into(),
            self.steady.into(),
            self.pool.into(),
            kv_heads.into(),
            layer.into(),
            layers.into(),
            head_words.into(),
            page_tokens.into(),
            self.frequencies.into(),
            (1.0 / self.magnitude).into(),
            self.bases.into(),
            rank_words.into(),
            self.directories.into(),
            self.coefficients.into(),
            self.copies.into(),
            self.copy_keys.into(),
            self.counts.into(),
            (capacity as u32).into(),
        ];
        let shape = LaunchShape::linear(project_keys::grid(batch as u32, rank_words), project_keys::BLOCK)
            .with_shared_bytes(project_keys::shared_bytes(width as u32));
        // SAFETY: order and types are the kernel's; the caller answers for what the entries name.
        unsafe { launch_with(&kernels.low_rank.project_keys, &shape, stream, arguments) }
    }
}
