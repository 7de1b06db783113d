use spinkv_kernels::abi::page_code::{NO_CODE, PageCode, coded_words};
use spinkv_kernels::abi::{
    Entry, MAX_PAGE_WORDS, PageCopy, SLAB_PAGES, WORD_BYTES, append, store_prompt, write_back,
};

use super::super::driver::{
    Argument, DeviceBuffer, LaunchShape, PinnedArena, Result, Stream, check_length, check_operand,
    check_range, launch_with,
};
use super::Kernels;
use crate::memory::Word;

/// The pages of both tiers, and the tables that lead to them, of one layer's Offload.
#[derive(Clone, Copy, Debug)]
pub struct OffloadPages<'a> {
    /// `[requests]`.
    pub entries: &'a DeviceBuffer<Entry>,
    /// Steady lists of all requests: physical pages.
    pub steady: &'a DeviceBuffer<u32>,
    /// `[pages, 2, page_tokens, head_words]`: GPU pages.
    pub pool: &'a DeviceBuffer<Word>,
    /// Host tables of all requests: slabs.
    pub host_slabs: &'a DeviceBuffer<u32>,
    /// A u32 for each of `host_slabs`: its [valid bits](spinkv_kernels::abi::valid_place).
    pub host_valid: &'a DeviceBuffer<u32>,
    /// `[slabs, 16, host_words]`: host pages.
    pub host_pages: &'a PinnedArena,
    /// Row of KV head 0: layer * `kv_heads`.
    pub first_row: u32,
    /// KV heads.
    pub kv_heads: u32,
    /// Words of a key: head dim / 8.
    pub head_words: u32,
    /// Tokens of a page.
    pub page_tokens: u32,
    /// Whether full pages go to the host: not those of the sequence where the host has clusters.
    pub on_host: bool,
    /// Words of a host page: the end of the GPU page, which is its values or all of it; or its codes and their scales.
    pub host_words: u32,
    /// The code of host pages, if they are coded: pages that are full are rounded to it on the GPU, too.
    pub code: Option<PageCode>,
}

impl OffloadPages<'_> {
    /// Refuses entries that are none, and sizes that do not fit together.
    fn check(&self) -> Result<u32> {
        let requests = self.entries.len();
        check_length("offload host_valid", self.host_slabs.len(), self.host_valid.len())?;
        for (what, size) in [
            ("offload requests", requests as u64),
            ("offload kv_heads", self.kv_heads.into()),
            ("offload head_words", self.head_words.into()),
            ("offload page_tokens", self.page_tokens.into()),
        ] {
            check_operand(what, size, 1..=u32::MAX.into())?;
        }
        let names = ["offload page words", "offload pool words"];
        let page_words = check_page(names, self.page_tokens, self.head_words, self.pool)?;
        check_operand("offload host_words", self.host_words.into(), 1..=page_words as u64)?;
        if self.code.is_some() {
            check_operand("offload head_words % 2", (self.head_words % 2).into(), 0..=0)?;
            let coded = coded_words(page_words as u32).into();
            check_operand("offload host_words", self.host_words.into(), coded..=coded)?;
        }
        let slab_words = self.host_words as usize * SLAB_PAGES as usize;
        check_range("offload arena words", 0, slab_words, self.host_pages.len() / WORD_BYTES)?;
        Ok(requests as u32)
    }
}

/// Words of a page of `page_tokens` tokens, of which the pool has one at least. The names are those of its words and of the pool's.
pub(super) fn check_page(
    [words, pool_words]: [&'static str; 2],
    page_tokens: u32,
    head_words: u32,
    pool: &DeviceBuffer<Word>,
) -> Result<usize> {
    let page_words = 2 * u128::from(page_tokens) * u128::from(head_words);
    let page_words = u64::try_from(page_words).unwrap_or(u64::MAX);
    check_operand(words, page_words, 2..=MAX_PAGE_WORDS.into())?;
    check_range(pool_words, 0, page_words as usize, pool.len())?;
    Ok(page_words as usize)
}

/// A launch of `append`: stores each entry's new token in its steady page; pages that are now full go to the host.
#[derive(Clone, Copy, Debug)]
pub struct Append<'a> {
    /// Where they go.
    pub pages: OffloadPages<'a>,
    /// `[requests, kv_heads, head_words]` bf16.
    pub keys: &'a DeviceBuffer<Word>,
    /// As the keys.
    pub values: &'a DeviceBuffer<Word>,
}

impl Append<'_> {
    /// Async: the tokens are stored when `stream` has come this far, and full pages and their valid bits with them.
    ///
    /// # Errors
    /// [`Length`](super::super::driver::DriverError::Length) for keys and values of another number,
    /// [`Operand`](super::super::driver::DriverError::Operand) for no request, a size of 0, a page beyond
    /// [`MAX_PAGE_WORDS`] or a batch beyond [`MAX_ROWS`](append::MAX_ROWS),
    /// [`OutOfRange`](super::super::driver::DriverError::OutOfRange) for a pool without room for a page or an arena without room
    /// for a slab, or a failed launch.
    ///
    /// # Safety
    /// When the launch runs, each entry with tokens has a steady page for its last token in each row, and a slab for it if that
    /// fills it, within pool and arena; no page is named by two rows; and until it has run nothing else uses those pages and bits
    /// or writes the keys and values.
    pub unsafe fn launch(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        let OffloadPages { kv_heads, head_words, .. } = self.pages;
        let requests = self.pages.check()?;
        let rows = u64::from(requests) * u64::from(kv_heads);
        check_operand("append requests * kv_heads", rows, 1..=append::MAX_ROWS.into())?;
        let words = rows as usize * head_words as usize;
        check_length("append keys", words, self.keys.len())?;
        check_length("append values", words, self.values.len())?;
        let arguments: [Argument; 16] = [
            self.pages.entries.into(),
            self.keys.into(),
            self.values.into(),
            self.pages.steady.into(),
            self.pages.pool.into(),
            self.pages.host_slabs.into(),
            self.pages.host_valid.into(),
            self.pages.host_pages.into(),
            requests.into(),
            self.pages.first_row.into(),
            kv_heads.into(),
            head_words.into(),
            self.pages.page_tokens.into(),
            u32::from(self.pages.on_host).into(),
            self.pages.host_words.into(),
            self.pages.code.map_or(NO_CODE, |code| code as u32).into(),
        ];
        let shape = LaunchShape::linear(append::grid(rows as u32), append::BLOCK).overlapping();
        // SAFETY: order and types are the kernel's; the caller answers for what the tables name.
        unsafe { launch_with(&kernels.append, &shape, stream, arguments) }
    }
}

/// A launch of `store_prompt`: stores a ragged batch of prompts as pages.
#[derive(Clone, Copy, Debug)]
pub struct StorePrompt<'a> {
    /// Where they go.
    pub pages: OffloadPages<'a>,
    /// `[tokens, kv_heads, head_words]` bf16.
    pub keys: &'a DeviceBuffer<Word>,
    /// As the keys.
    pub values: &'a DeviceBuffer<Word>,
    /// `[requests]`: where a request's token 0 lies in the keys.
    pub first_token: &'a DeviceBuffer<u32>,
    /// `[requests + 1]`, ascending, from 0: pages of the requests before, of each `tokens / page_tokens`, rounded up.
    pub first_page: &'a DeviceBuffer<u32>,
    /// The last of `first_page`: pages of the batch, for each KV head.
    pub batch_pages: u32,
    /// Blocks to spend on it. The bus to the host bounds it; a few saturate that.
    pub blocks: u32,
}

impl StorePrompt<'_> {
    /// Async: the pages are there when `stream` has come this far, and valid bits with them.
    ///
    /// # Errors
    /// [`Length`](super::super::driver::DriverError::Length) if keys and values differ, or the tables disagree about the requests,
    /// [`Operand`](super::super::driver::DriverError::Operand) for no request, a size of 0, a page beyond [`MAX_PAGE_WORDS`], a batch
    /// beyond [`MAX_PAGES`](store_prompt::MAX_PAGES) or blocks outside of the launch's limits,
    /// [`OutOfRange`](super::super::driver::DriverError::OutOfRange) for a pool without room for a page or an arena without room
    /// for a slab, or a failed launch. A batch without a page launches nothing.
    ///
    /// # Safety
    /// When the launch runs, `first_page` ascends from 0 to `batch_pages` by the entries' tokens, which lie in keys and values from
    /// `first_token` on; each complete page has its slab and each that does not leave its steady page, within arena and pool; no
    /// page is named twice; and until it has run nothing else uses those pages and bits or writes the keys and values.
    pub unsafe fn launch(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        let OffloadPages { kv_heads, head_words, .. } = self.pages;
        let requests = self.pages.check()?;
        check_length("store_prompt values", self.keys.len(), self.values.len())?;
        check_length("store_prompt first_token", requests as usize, self.first_token.len())?;
        check_length("store_prompt first_page", requests as usize + 1, self.first_page.len())?;
        check_operand("store_prompt blocks", self.blocks.into(), 1..=store_prompt::MAX_BLOCKS.into())?;
        let pages = u64::from(self.batch_pages) * u64::from(kv_heads);
        check_operand("store_prompt pages * kv_heads", pages, 0..=store_prompt::MAX_PAGES.into())?;
        if pages == 0 {
            return Ok(());
        }
        let arguments: [Argument; 18] = [
            self.keys.into(),
            self.values.into(),
            self.pages.entries.into(),
            self.first_token.into(),
            self.first_page.into(),
            self.pages.steady.into(),
            self.pages.pool.into(),
            self.pages.host_slabs.into(),
            self.pages.host_valid.into(),
            self.pages.host_pages.into(),
            requests.into(),
            self.pages.first_row.into(),
            kv_heads.into(),
            head_words.into(),
            self.pages.page_tokens.into(),
            u32::from(self.pages.on_host).into(),
            self.pages.host_words.into(),
            self.pages.code.map_or(NO_CODE, |code| code as u32).into(),
        ];
        let shape = LaunchShape::linear(self.blocks, store_prompt::BLOCK);
        // SAFETY: order and types are the kernel's; the caller answers for what the tables name.
        unsafe { launch_with(&kernels.store_prompt, &shape, stream, arguments) }
    }
}

/// Valid bits that a [`WriteBack`] sets.
#[derive(Clone, Copy, Debug)]
pub struct ValidBits<'a> {
    /// `[capacity]`: each copy's [place](spinkv_kernels::abi::valid_place).
    pub places: &'a DeviceBuffer<u32>,
    /// A u32 for each slab in the host tables.
    pub host_valid: &'a DeviceBuffer<u32>,
}

/// A launch of `write_back`: copies the pages that a list on the device names from the pool to the arena.
#[derive(Clone, Copy, Debug)]
pub struct WriteBack<'a> {
    /// `[capacity]`, ascending in host page for speed.
    pub copies: &'a DeviceBuffer<PageCopy>,
    /// `[1]`: how many of them to make; more than there are counts as all.
    pub count: &'a DeviceBuffer<u32>,
    /// `[device pages, page_words]`.
    pub device_pages: &'a DeviceBuffer<Word>,
    /// `[host pages, page_words]`.
    pub host_pages: &'a PinnedArena,
    /// Words of a page.
    pub page_words: u32,
    /// Bits to set once the pages are there, if any.
    pub valid: Option<ValidBits<'a>>,
    /// Blocks to spend on it. A few saturate the bus.
    pub blocks: u32,
}

impl WriteBack<'_> {
    /// Async: the pages are there when `stream` has come this far.
    ///
    /// # Errors
    /// [`Length`](super::super::driver::DriverError::Length) if the count is not one number or the places are not as many as the copies,
    /// [`Operand`](super::super::driver::DriverError::Operand) for a page size of 0 or beyond [`MAX_PAGE_WORDS`], blocks outside of the
    /// launch's limits or a list that 32 bits do not count, [`OutOfRange`](super::super::driver::DriverError::OutOfRange) for an arena
    /// without room for a page, or a failed launch.
    ///
    /// # Safety
    /// When the launch runs, each of the first `count` copies names a page within the arena and a page within the pool, and its place a bit
    /// within the valid bits; no arena page is named twice; and until it has run nothing writes those pool pages and nothing uses
    /// those arena pages.
    pub unsafe fn launch(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        check_length("write_back count", 1, self.count.len())?;
        check_operand("write_back page_words", self.page_words.into(), 1..=MAX_PAGE_WORDS.into())?;
        check_operand("write_back blocks", self.blocks.into(), 1..=write_back::MAX_BLOCKS.into())?;
        check_operand("write_back copies", self.copies.len() as u64, 0..=u32::MAX.into())?;
        let arena_words = self.host_pages.len() / WORD_BYTES;
        check_range("write_back arena words", 0, self.page_words as usize, arena_words)?;
        // Without bits the kernel looks at neither table, and the count stands in for both.
        let (places, host_valid) =
            self.valid.map_or((self.count, self.count), |valid| (valid.places, valid.host_valid));
        if self.valid.is_some() {
            check_length("write_back places", self.copies.len(), places.len())?;
        }
        let arguments: [Argument; 9] = [
            self.copies.into(),
            self.count.into(),
            (self.copies.len() as u32).into(),
            self.device_pages.into(),
            self.host_pages.into(),
            self.page_words.into(),
            u32::from(self.valid.is_some()).into(),
            places.into(),
            host_valid.into(),
        ];
        let shape = LaunchShape::linear(self.blocks, write_back::BLOCK);
        // SAFETY: order and types are the kernel's; the caller answers for what the list names.
        unsafe { launch_with(&kernels.write_back, &shape, stream, arguments) }
    }
}
