use spinkv_kernels::abi::cluster::gather_run;

use super::super::super::driver::{Argument, DeviceBuffer, Result, Stream, check_operand, check_range};
use super::super::Kernels;
use super::{ANY, launch};
use crate::memory::Word;

/// A launch of `gather_run`: keys and values of a run of tokens out of the steady pages of one layer of one request.
#[derive(Clone, Copy, Debug)]
pub struct GatherRun<'a> {
    /// Physical pages of the steady zone, of all requests: a row's list is `[sink_pages + ring_pages]`.
    pub steady: &'a DeviceBuffer<u32>,
    /// Where row 0 of the request begins in them.
    pub first_steady: u32,
    /// Pages of the sinks.
    pub sink_pages: u32,
    /// Places of the tail's ring; at least 1.
    pub ring_pages: u32,
    /// Row of KV head 0: layer * `kv_heads`.
    pub first_row: u32,
    /// KV heads.
    pub kv_heads: u32,
    /// Words of a key.
    pub head_words: u32,
    /// Tokens of a page.
    pub page_tokens: u32,
    /// `[physical pages, 2, page_tokens, head_words]`.
    pub pool: &'a DeviceBuffer<Word>,
    /// The run's first token.
    pub first: u32,
    /// Its tokens.
    pub tokens: u32,
    /// `[tokens, kv_heads, head_words]` or more.
    pub keys: &'a DeviceBuffer<Word>,
    /// As the keys.
    pub values: &'a DeviceBuffer<Word>,
}

impl GatherRun<'_> {
    /// Async: keys and values are there when `stream` has come this far.
    ///
    /// # Errors
    /// [`Operand`](super::super::super::driver::DriverError::Operand) for a size of 0 or words beyond
    /// [`MAX_WORDS`](gather_run::MAX_WORDS), [`OutOfRange`](super::super::super::driver::DriverError::OutOfRange) for lists or tensors that are too short, or a
    /// failed launch.
    ///
    /// # Safety
    /// When the launch runs, the tokens lie in the steady pages that the lists name, within the pool; until it has run nothing writes what it reads, and
    /// nothing uses what it writes.
    pub unsafe fn launch(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        let Self { sink_pages, ring_pages, first_row, kv_heads, head_words, page_tokens, tokens, .. } = *self;
        for (what, size) in [
            ("gather_run kv_heads", kv_heads),
            ("gather_run head_words", head_words),
            ("gather_run page_tokens", page_tokens),
            ("gather_run ring_pages", ring_pages),
            ("gather_run tokens", tokens),
        ] {
            check_operand(what, size.into(), 1..=ANY)?;
        }
        let words = u128::from(tokens) * u128::from(kv_heads) * u128::from(head_words);
        let words = u64::try_from(2 * words).unwrap_or(u64::MAX);
        check_operand("gather_run words", words, 1..=gather_run::MAX_WORDS.into())?;
        let end = u64::from(self.first) + u64::from(tokens);
        check_operand("gather_run first + tokens", end, 1..=ANY)?;
        let list =
            (u64::from(sink_pages) + u64::from(ring_pages)) * (u64::from(first_row) + u64::from(kv_heads));
        check_range("gather_run steady", self.first_steady as usize, list as usize, self.steady.len())?;
        check_range("gather_run keys", 0, words as usize / 2, self.keys.len())?;
        check_range("gather_run values", 0, words as usize / 2, self.values.len())?;
        let page_words = 2 * page_tokens as usize * head_words as usize;
        check_range("gather_run pool", 0, page_words, self.pool.len())?;
        let arguments: [Argument; 13] = [
            self.steady.into(),
            self.first_steady.into(),
            sink_pages.into(),
            ring_pages.into(),
            first_row.into(),
            kv_heads.into(),
            head_words.into(),
            page_tokens.into(),
            self.pool.into(),
            self.first.into(),
            tokens.into(),
            self.keys.into(),
            self.values.into(),
        ];
        let shape = [gather_run::grid(words as u32).into(), gather_run::BLOCK.into(), 0];
        // SAFETY: order and types are the kernel's; the caller answers for what the lists name.
        unsafe { launch(&kernels.cluster.gather_run, shape, stream, arguments) }
    }
}
