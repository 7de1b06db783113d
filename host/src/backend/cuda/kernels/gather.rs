use spinkv_kernels::abi::{PageCopy, WORD_BYTES, gather};

use super::super::driver::{
    Argument, DeviceBuffer, LaunchShape, PinnedArena, Result, Stream, check_length, check_operand,
    check_range, launch_with,
};
use super::Kernels;
use crate::memory::Word;

/// A launch of `gather`: copies the pages that a list on the device names from the arena to the pool.
///
/// # Launch
/// `blocks` blocks of [`BLOCK`](gather::BLOCK) threads: 1 to [`MAX_BLOCKS`](gather::MAX_BLOCKS), beyond which the kernel would not
/// come to an end.
#[derive(Clone, Copy, Debug)]
pub struct Gather<'a> {
    /// `[capacity]`, ascending in host page for speed.
    pub copies: &'a DeviceBuffer<PageCopy>,
    /// `[1]`: how many of them to make; more than there are counts as all.
    pub count: &'a DeviceBuffer<u32>,
    /// `[host pages, page_words]`.
    pub host_pages: &'a PinnedArena,
    /// `[device pages, page_words]`.
    pub device_pages: &'a DeviceBuffer<Word>,
    /// Words of a page.
    pub page_words: u32,
    /// Blocks to spend on it. A few saturate the bus; see `benches/results`.
    pub blocks: u32,
}

impl Gather<'_> {
    /// Async: the pages are there when `stream` has come this far.
    ///
    /// # Errors
    /// [`Length`](super::super::driver::DriverError::Length) if the count is not one number,
    /// [`Operand`](super::super::driver::DriverError::Operand) for a page size of 0, blocks outside of the launch's limits or a list
    /// beyond [`max_copies`](gather::max_copies), [`OutOfRange`](super::super::driver::DriverError::OutOfRange) for an arena without
    /// room for a page, or a failed launch.
    ///
    /// # Safety
    /// When the launch runs, each of the first `count` copies names a page within the arena and a page within the pool; no
    /// pool page is named twice; and until it has run nothing writes those arena pages and nothing uses those pool pages.
    pub unsafe fn launch(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        check_length("gather count", 1, self.count.len())?;
        check_operand("gather page_words", self.page_words.into(), 1..=u32::MAX.into())?;
        check_operand("gather blocks", self.blocks.into(), 1..=gather::MAX_BLOCKS.into())?;
        let max_copies = gather::max_copies(self.page_words).into();
        check_operand("gather copies", self.copies.len() as u64, 0..=max_copies)?;
        check_range("gather arena words", 0, self.page_words as usize, self.host_pages.len() / WORD_BYTES)?;
        let arguments: [Argument; 6] = [
            self.copies.into(),
            self.count.into(),
            (self.copies.len() as u32).into(),
            self.host_pages.into(),
            self.device_pages.into(),
            self.page_words.into(),
        ];
        // SAFETY: order and types are the kernel's; the caller answers for what the list names.
        unsafe {
            launch_with(&kernels.gather, &LaunchShape::linear(self.blocks, gather::BLOCK), stream, arguments)
        }
    }
}
