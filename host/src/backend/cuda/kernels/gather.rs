use spinkv_kernels::abi::page_code::{PageCode, coded_words};
use spinkv_kernels::abi::{PageCopy, WORD_BYTES, gather, gather_bulk};

use super::super::driver::{
    Argument, DeviceBuffer, DriverError, LaunchShape, PinnedArena, Result, Stream, check_length,
    check_operand, check_range, launch_with,
};
use super::Kernels;
use crate::memory::Word;

/// The least page that [`GatherVariant::choose`] has moved by bulk copies. `cargo xtask bench-gpu gather` times both variants.
const BULK_PAGE_BYTES: usize = 4096;

/// How pages are moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GatherVariant {
    /// `gather`: loads of the host's memory by every lane.
    ZeroCopy,
    /// `gather_bulk`: bulk copies through shared memory, from sm_90 on.
    Bulk,
    /// `gather_coded`: loads of codes, which become bf16 as they arrive.
    Coded,
}

impl GatherVariant {
    /// Bulk copies where the device has them, for large pages, if the lists have room for a page a ring.
    ///
    /// A piece of a page costs a thread of `gather_bulk` the same whatever its size, so small pages are better read by all lanes of
    /// `gather`; large ones fill the bus with half the blocks. A ring without a page is idle, where `gather` cuts one page among
    /// many warps. How many copies there are is known on the device alone, and the choice must hold for every replay of a captured
    /// step: so what counts is `capacity`, the most copies of all lists.
    fn choose(page_words: u32, capacity: usize, blocks: u32, has_bulk: bool) -> Self {
        let page_bytes = page_words as usize * WORD_BYTES;
        let rings = u64::from(blocks) * u64::from(gather_bulk::RINGS);
        if has_bulk && page_bytes >= BULK_PAGE_BYTES && capacity as u64 >= rings {
            Self::Bulk
        } else {
            Self::ZeroCopy
        }
    }
}

/// A launch of `gather`, `gather_bulk` or `gather_coded`: copies the pages that lists on the device name from the arena to the pool.
///
/// # Launch
/// `blocks` blocks of [`BLOCK`](gather::BLOCK) threads: 1 to [`MAX_BLOCKS`](gather::MAX_BLOCKS), beyond which the kernel would not
/// come to an end.
#[derive(Clone, Copy, Debug)]
pub struct Gather<'a> {
    /// `[lists, capacity]`, ascending in host page for speed.
    pub copies: &'a DeviceBuffer<PageCopy>,
    /// `[lists]`: how many of each list to make; more than its capacity counts as all.
    pub counts: &'a DeviceBuffer<u32>,
    /// `[host pages, page_words]`.
    pub host_pages: &'a PinnedArena,
    /// `[device pages, device_words]`.
    pub device_pages: &'a DeviceBuffer<Word>,
    /// Words of a host page.
    pub page_words: u32,
    /// Words of a GPU page, of which a host page is the end, if it is not coded.
    pub device_words: u32,
    /// The code of host pages, if they are coded.
    pub code: Option<PageCode>,
    /// Blocks to spend on it. A few saturate the bus; see `benches/results`.
    pub blocks: u32,
    /// `[lists]`, 0 before: words of each list's pages that are there, for an [`Attend`](super::Attend) that runs beside it.
    pub arrived: Option<&'a DeviceBuffer<u32>>,
}

impl Gather<'_> {
    /// The variant that [`launch`](Self::launch) takes.
    pub fn variant(&self, kernels: &Kernels) -> GatherVariant {
        if self.code.is_some() {
            return GatherVariant::Coded;
        }
        let has_bulk = kernels.gather_bulk.is_some();
        GatherVariant::choose(self.page_words, self.copies.len(), self.blocks, has_bulk)
    }

    /// Async: the pages are there when `stream` has come this far.
    ///
    /// # Errors
    /// [`Length`](DriverError::Length) if the copies do not part into lists of equal length or another number of lists is counted, [`Operand`](DriverError::Operand) for
    /// a page size of 0, a GPU page below it or, of coded pages, another than theirs, a variant that does not read codes and the reverse, blocks outside of the launch's limits, no list, more than [`MAX_LISTS`](gather::MAX_LISTS) or copies
    /// beyond [`max_copies`](gather::max_copies), [`OutOfRange`](DriverError::OutOfRange) for an arena without room for a page, or
    /// a failed launch.
    ///
    /// # Safety
    /// When the launch runs, each of the first copies of a list, as many as it counts, names a page within the arena and a page
    /// within the pool; no pool page is named twice; and until it has run nothing writes those arena pages and nothing uses those
    /// pool pages.
    pub unsafe fn launch(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        // Where the launch before it, a block a list, leaves these few a multiprocessor each. Beside more they would come two to one, and lose a quarter of the bus.
        let overlaps = self.counts.len() + self.blocks as usize <= kernels.multiprocessors as usize;
        // SAFETY: the caller's part.
        unsafe { self.launch_variant(self.variant(kernels), overlaps, kernels, stream) }
    }

    /// The same, not begun before all ahead of it has ended: where copies of several streams meet.
    ///
    /// # Errors
    /// Those of [`launch`](Self::launch).
    ///
    /// # Safety
    /// As for [`launch`](Self::launch).
    pub unsafe fn launch_behind(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        // SAFETY: the caller's part.
        unsafe { self.launch_variant(self.variant(kernels), false, kernels, stream) }
    }

    /// [`launch_behind`](Self::launch_behind) with a variant of the caller's choice, for benches and tests.
    ///
    /// # Errors
    /// Those of [`launch`](Self::launch), and [`UnknownFunction`](DriverError::UnknownFunction) for a variant that the device does
    /// not have.
    ///
    /// # Safety
    /// As for [`launch`](Self::launch).
    pub unsafe fn launch_as(&self, variant: GatherVariant, kernels: &Kernels, stream: &Stream) -> Result<()> {
        // SAFETY: the caller's part.
        unsafe { self.launch_variant(variant, false, kernels, stream) }
    }

    unsafe fn launch_variant(
        &self,
        variant: GatherVariant,
        overlaps: bool,
        kernels: &Kernels,
        stream: &Stream,
    ) -> Result<()> {
        let lists = self.counts.len();
        check_operand("gather lists", lists as u64, 1..=gather::MAX_LISTS.into())?;
        let capacity = self.copies.len() / lists;
        check_length("gather copies", lists * capacity, self.copies.len())?;
        check_operand("gather page_words", self.page_words.into(), 1..=u32::MAX.into())?;
        check_operand(
            "gather device_words",
            self.device_words.into(),
            self.page_words.into()..=u32::MAX.into(),
        )?;
        if self.code.is_some() {
            check_operand("gather device_words % 4", (self.device_words % 4).into(), 0..=0)?;
            let coded = coded_words(self.device_words).into();
            check_operand("gather page_words", self.page_words.into(), coded..=coded)?;
        }
        // Only one of the variants reads codes, and it reads nothing else.
        let (reads_codes, coded) = (variant == GatherVariant::Coded, u64::from(self.code.is_some()));
        check_operand("gather code", reads_codes.into(), coded..=coded)?;
        check_operand("gather blocks", self.blocks.into(), 1..=gather::MAX_BLOCKS.into())?;
        // Words are counted as they come out: of codes twice as many and more.
        let words = if self.code.is_some() { self.device_words } else { self.page_words };
        let max_copies = gather::max_copies(words).into();
        check_operand("gather copies", self.copies.len() as u64, 0..=max_copies)?;
        check_range("gather arena words", 0, self.page_words as usize, self.host_pages.len() / WORD_BYTES)?;
        if let Some(arrived) = self.arrived {
            check_length("gather arrived", lists, arrived.len())?;
        }
        let arguments: [Argument; 10] = [
            self.copies.into(),
            self.counts.into(),
            (lists as u32).into(),
            (capacity as u32).into(),
            self.host_pages.into(),
            self.device_pages.into(),
            self.page_words.into(),
            self.device_words.into(),
            // Without a count it is not touched.
            self.arrived.unwrap_or(self.counts).into(),
            u32::from(self.arrived.is_some()).into(),
        ];
        let lists = lists as u32;
        let of_lists = (gather::BLOCK, gather::shared_bytes(lists));
        let (function, (block, shared_bytes)) = match variant {
            GatherVariant::ZeroCopy => (&kernels.gather, of_lists),
            GatherVariant::Coded => (&kernels.gather_coded, of_lists),
            GatherVariant::Bulk => {
                let missing = || DriverError::UnknownFunction { name: "gather_bulk".to_owned() };
                let function = kernels.gather_bulk.as_ref().ok_or_else(missing)?;
                (function, (gather_bulk::BLOCK, gather_bulk::shared_bytes(lists)))
            }
        };
        let shape = LaunchShape::linear(self.blocks, block).with_shared_bytes(shared_bytes);
        let shape = if overlaps { shape.overlapping() } else { shape };
        // SAFETY: order and types are those of the kernels, of which one has a parameter more; the caller answers for what the lists name.
        unsafe {
            match self.code {
                None => launch_with(function, &shape, stream, arguments),
                Some(code) => {
                    let [a, b, c, d, e, f, g, h, i, j] = arguments;
                    let arguments = [a, b, c, d, e, f, g, h, i, j, (code as u32).into()];
                    launch_with(function, &shape, stream, arguments)
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_pages_of_long_lists_are_moved_by_bulk_copies() {
        let page_words = (BULK_PAGE_BYTES / WORD_BYTES) as u32;
        let choose = GatherVariant::choose;
        assert_eq!(choose(page_words, 16, 8, true), GatherVariant::Bulk);
        assert_eq!(choose(u32::MAX, usize::MAX, u32::MAX, true), GatherVariant::Bulk);
        assert_eq!(choose(page_words, 16, 8, false), GatherVariant::ZeroCopy, "not on this device");
        assert_eq!(choose(page_words - 1, 16, 8, true), GatherVariant::ZeroCopy, "small pages");
        assert_eq!(choose(page_words, 15, 8, true), GatherVariant::ZeroCopy, "idle rings");
    }
}
