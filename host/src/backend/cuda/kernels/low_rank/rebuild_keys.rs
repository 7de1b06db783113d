use spinkv_kernels::abi::low_rank::rebuild_keys;
use spinkv_kernels::abi::{Entry, PageCopy, SEGMENT_KEYS, WORD_ELEMENTS, gather};

use super::super::super::driver::{
    Argument, DeviceBuffer, LaunchShape, Result, Stream, check_choice, check_length, check_operand,
    check_positive, launch_with,
};
use super::super::Kernels;
use super::check_rank;
use crate::memory::Word;

/// A launch of `rebuild_keys_64` or `rebuild_keys_128`: the keys of missed pages out of coefficients and bases, one layer of a decode step.
#[derive(Clone, Copy, Debug)]
pub struct RebuildKeys<'a> {
    /// `[batch * kv_heads, capacity]`: the misses, as [`Resolve`](super::super::Resolve) leaves them.
    pub copies: &'a DeviceBuffer<PageCopy>,
    /// `[batch * kv_heads, capacity]`: their page keys.
    pub copy_keys: &'a DeviceBuffer<u32>,
    /// `[batch * kv_heads]`: how many.
    pub counts: &'a DeviceBuffer<u32>,
    /// `[batch]`.
    pub entries: &'a DeviceBuffer<Entry>,
    /// KV heads of the layer.
    pub kv_heads: u32,
    /// Words of a head: 8 or 16, for 64 or 128 elements.
    pub head_words: u32,
    /// The layer.
    pub layer: u32,
    /// Layers of the model.
    pub layers: u32,
    /// All requests' directories.
    pub directories: &'a DeviceBuffer<u32>,
    /// `[segments, layers, 512 * page_tokens, rank / 8]` bf16.
    pub coefficients: &'a DeviceBuffer<Word>,
    /// A multiple of 32.
    pub rank: u32,
    /// `[bases, layers, kv_heads, head_dim, rank / 8]` bf16.
    pub bases: &'a DeviceBuffer<Word>,
    /// `[head_dim / 2]`, in radians a position. Angles are accurate up to 2^20.
    pub frequencies: &'a DeviceBuffer<f32>,
    /// Factor of sines and cosines; 1 but for YaRN.
    pub magnitude: f32,
    /// Tokens of a page.
    pub page_tokens: u32,
    /// `[pages, 2, page_tokens, head_words]` bf16: keys are written.
    pub pool: &'a DeviceBuffer<Word>,
    /// Blocks to spend on it.
    pub blocks: u32,
}

impl RebuildKeys<'_> {
    /// Blocks that a device runs at a time.
    pub fn blocks(kernels: &Kernels) -> u32 {
        2 * kernels.multiprocessors.max(1)
    }

    /// Async: the keys are there when `stream` has come this far.
    ///
    /// # Errors
    /// [`Choice`](super::super::super::driver::DriverError::Choice) for heads of neither 64 nor 128, [`Operand`](super::super::super::driver::DriverError::Operand) for a size of 0, a layer that there
    /// is not, more than [`MAX_LISTS`](gather::MAX_LISTS) lists, or tokens beyond 32 bits, [`Multiple`](super::super::super::driver::DriverError::Multiple) for a
    /// rank that is no multiple of 32, [`Positive`](super::super::super::driver::DriverError::Positive) for a magnitude that is no number above 0,
    /// [`Length`](super::super::super::driver::DriverError::Length) for buffers that do not fit each other, [`SharedMemory`](super::super::super::driver::DriverError::SharedMemory) for a basis
    /// that a block of this device has no room for, or a failed launch.
    ///
    /// # Safety
    /// When the launch runs, each of the first copies of a list, as many as it counts, names a page within the pool, and its key one of a
    /// segment in the entry's directory; no pool page is named twice; entries that have copies name a basis; and until it has run nothing
    /// writes what it reads, and nothing uses the keys of those pages.
    pub unsafe fn launch(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        let Self { kv_heads, head_words, layer, layers, rank, page_tokens, blocks, .. } = *self;
        let any = 1..=u64::from(u32::MAX);
        check_choice("rebuild_keys head_words", head_words, &rebuild_keys::HEAD_WORDS)?;
        check_rank("rebuild_keys rank", rank)?;
        check_operand("rebuild_keys kv_heads", kv_heads.into(), any.clone())?;
        check_operand("rebuild_keys layers", layers.into(), any.clone())?;
        check_operand("rebuild_keys layer", layer.into(), 0..=u64::from(layers - 1))?;
        check_operand("rebuild_keys page_tokens", page_tokens.into(), 1..=1 << 16)?;
        check_operand("rebuild_keys blocks", blocks.into(), 1..=i32::MAX as u64)?;
        check_positive("rebuild_keys magnitude", self.magnitude)?;
        let lists = self.entries.len() * kv_heads as usize;
        check_operand("rebuild_keys lists", lists as u64, 1..=gather::MAX_LISTS.into())?;
        let capacity = self.copies.len() / lists;
        let tokens = self.copies.len() as u64 * u64::from(page_tokens);
        // A block's first tile beyond the last token is counted, too.
        check_operand("rebuild_keys tokens", tokens, 0..=u64::from(u32::MAX) / 2)?;
        let rank_words = rank / WORD_ELEMENTS as u32;
        let of_all = |len: usize, of_each: u64| match usize::try_from(of_each) {
            Ok(of_each) => len / of_each * of_each,
            Err(_) => 0,
        };
        let (layers_64, rank_64) = (u64::from(layers), u64::from(rank_words));
        let segment = layers_64 * u64::from(SEGMENT_KEYS) * u64::from(page_tokens) * rank_64;
        let head_dim = head_words * WORD_ELEMENTS as u32;
        let basis = layers_64 * u64::from(kv_heads) * u64::from(head_dim) * rank_64;
        let page = 2 * u64::from(page_tokens) * u64::from(head_words);
        for (what, expected, found) in [
            ("rebuild_keys copies", lists * capacity, self.copies.len()),
            ("rebuild_keys copy_keys", self.copies.len(), self.copy_keys.len()),
            ("rebuild_keys counts", lists, self.counts.len()),
            ("rebuild_keys coefficients", of_all(self.coefficients.len(), segment), self.coefficients.len()),
            ("rebuild_keys bases", of_all(self.bases.len(), basis), self.bases.len()),
            ("rebuild_keys pool", of_all(self.pool.len(), page), self.pool.len()),
            ("rebuild_keys frequencies", head_dim as usize / 2, self.frequencies.len()),
        ] {
            check_length(what, expected, found)?;
        }
        let arguments: [Argument; 17] = [
            self.copies.into(),
            self.copy_keys.into(),
            self.counts.into(),
            (lists as u32).into(),
            (capacity as u32).into(),
            self.entries.into(),
            kv_heads.into(),
            layer.into(),
            layers.into(),
            self.directories.into(),
            self.coefficients.into(),
            rank_words.into(),
            self.bases.into(),
            self.frequencies.into(),
            self.magnitude.into(),
            page_tokens.into(),
            self.pool.into(),
        ];
        let function = match head_words {
            8 => &kernels.low_rank.rebuild_keys_64,
            _ => &kernels.low_rank.rebuild_keys_128,
        };
        let shape = LaunchShape::linear(blocks, rebuild_keys::BLOCK)
            .with_shared_bytes(rebuild_keys::shared_bytes(head_dim, rank_words, lists as u32));
        // SAFETY: order and types are the kernels'; the caller answers for what the lists name.
        unsafe { launch_with(function, &shape, stream, arguments) }
    }
}
