use spinkv_kernels::abi::PageCopy;

use super::driver::{DeviceBuffer, PinnedArena, Result, Stream, check_operand, check_range};
use crate::memory::Word;

/// Full pages that the host has, not coded ones, back on the GPU between steps, by the copy engine: whole runs of them where they lie one after another on both
/// tiers. It needs no multiprocessor and moves long runs at the bus's speed; single pages are [`Gather`](super::kernels::Gather)'s.
#[derive(Clone, Copy, Debug)]
pub struct Restore<'a> {
    /// `[host pages, page_words]`.
    pub host_pages: &'a PinnedArena,
    /// `[device pages, page_words]`.
    pub device_pages: &'a DeviceBuffer<Word>,
    /// Words of a page.
    pub page_words: usize,
}

/// What a [`Restore`] has given to the copy engine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// Runs of pages. Each is a copy, or two where it crosses from one pinned chunk of the arena into the next.
    pub runs: usize,
    /// Bytes of all.
    pub bytes: u64,
}

/// Pages that lie one after another on both tiers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    host_page: usize,
    device_page: usize,
    pages: usize,
}

impl Restore<'_> {
    /// Async: the pages are there when `stream` has come this far. The order of the list does not count, but for a device page that
    /// it names twice: it then has one of the two.
    ///
    /// As for any copy of the arena, a host page that is written meanwhile arrives old or new; nothing else may use the device pages.
    ///
    /// # Errors
    /// [`Operand`](super::driver::DriverError::Operand) for a page size of 0,
    /// [`OutOfRange`](super::driver::DriverError::OutOfRange) for a page that is not there,
    /// [`OtherContext`](super::driver::DriverError::OtherContext): nothing is copied then. Or a refused call.
    pub fn enqueue(&self, copies: &[PageCopy], stream: &Stream) -> Result<Restored> {
        let page_words = self.page_words;
        check_operand("restore page_words", page_words as u64, 1..=u64::from(u32::MAX))?;
        let page_bytes = page_words * size_of::<Word>();
        let (host_pages, device_pages) =
            (self.host_pages.len() / page_bytes, self.device_pages.len() / page_words);
        for copy in copies {
            check_range("restore host page", copy.host_page as usize, 1, host_pages)?;
            check_range("restore device page", copy.device_page as usize, 1, device_pages)?;
        }
        let runs = runs(copies);
        for Run { host_page, device_page, pages } in &runs {
            let (at, from, len) = (device_page * page_words, host_page * page_bytes, pages * page_words);
            self.device_pages.copy_from_arena(stream, at, self.host_pages, from, len)?;
        }
        Ok(Restored { runs: runs.len(), bytes: copies.len() as u64 * page_bytes as u64 })
    }
}

/// The longest runs that a list parts into, ascending by host page.
fn runs(copies: &[PageCopy]) -> Vec<Run> {
    let mut sorted = copies.to_vec();
    sorted.sort_unstable_by_key(|copy| (copy.host_page, copy.device_page));
    let mut runs: Vec<Run> = Vec::new();
    for copy in sorted {
        let (host_page, device_page) = (copy.host_page as usize, copy.device_page as usize);
        match runs.last_mut() {
            Some(run)
                if (run.host_page + run.pages, run.device_page + run.pages) == (host_page, device_page) =>
            {
                run.pages += 1;
            }
            _ => runs.push(Run { host_page, device_page, pages: 1 }),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs_of(copies: &[(u32, u32)]) -> Vec<(usize, usize, usize)> {
        let copies: Vec<PageCopy> =
            copies.iter().map(|&(host_page, device_page)| PageCopy { host_page, device_page }).collect();
        runs(&copies).iter().map(|run| (run.host_page, run.device_page, run.pages)).collect()
    }

    #[test]
    fn pages_that_follow_each_other_on_both_tiers_are_one_run() {
        assert_eq!(runs_of(&[]), []);
        assert_eq!(runs_of(&[(5, 9)]), [(5, 9, 1)]);
        assert_eq!(runs_of(&[(5, 9), (6, 10), (7, 11)]), [(5, 9, 3)]);
        assert_eq!(runs_of(&[(7, 11), (5, 9), (6, 10)]), [(5, 9, 3)], "in any order");
        assert_eq!(runs_of(&[(0, u32::MAX), (1, 0)]), [(0, u32::MAX as usize, 1), (1, 0, 1)], "no wrapping");
    }

    #[test]
    fn a_gap_or_a_turn_on_either_tier_ends_a_run() {
        assert_eq!(runs_of(&[(1, 1), (2, 2), (4, 3)]), [(1, 1, 2), (4, 3, 1)], "a gap on the host");
        assert_eq!(runs_of(&[(1, 1), (2, 2), (3, 4)]), [(1, 1, 2), (3, 4, 1)], "a gap on the device");
        assert_eq!(runs_of(&[(1, 3), (2, 2), (3, 1)]), [(1, 3, 1), (2, 2, 1), (3, 1, 1)], "backwards");
        assert_eq!(runs_of(&[(1, 1), (1, 2), (2, 2)]), [(1, 1, 1), (1, 2, 1), (2, 2, 1)], "a page for two");
    }

    #[test]
    fn runs_hold_every_page_once_and_none_could_be_longer() {
        // Every way to put three host pages of five on device pages of four.
        for code in 0..5usize.pow(3) * 4usize.pow(3) {
            let digit = |at: u32, base: usize, shift: usize| (code / shift / base.pow(at) % base) as u32;
            let copies: Vec<_> = (0..3).map(|at| (digit(at, 5, 64), digit(at, 4, 1))).collect();
            let runs = runs_of(&copies);
            let pages = |&(host, device, pages): &(usize, usize, usize)| {
                (0..pages).map(move |page| ((host + page) as u32, (device + page) as u32))
            };
            let mut found: Vec<_> = runs.iter().flat_map(pages).collect();
            let mut given = copies.clone();
            found.sort_unstable();
            given.sort_unstable();
            assert_eq!(found, given);
            let distinct = (0..3).all(|one| (0..one).all(|other| copies[one].0 != copies[other].0));
            let follows = |(one, other): (&(usize, usize, usize), &(usize, usize, usize))| {
                (one.0 + one.2, one.1 + one.2) == (other.0, other.1)
            };
            assert!(
                !distinct || !runs.iter().zip(&runs[1.min(runs.len())..]).any(follows),
                "{copies:?}: {runs:?}"
            );
        }
    }
}
