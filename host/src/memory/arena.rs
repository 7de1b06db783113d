use super::{HostLayout, HostMemory, HostProgress, PlainMemory, Stamped, Word};
use crate::{Error, Result};

/// Pages of one slab. A slab belongs to one row, so a row's misses stay within few address ranges, and the
/// host table needs one entry for this many pages; a short request wastes at most this many pages a row.
pub const SLAB_PAGES: usize = 16;

/// The id of a slab of the host arena.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlabId(u32);

impl SlabId {
    /// Which of the arena's slabs it is: its pages are `16 * number ..` of the memory.
    pub fn number(self) -> u32 {
        self.0
    }
}

/// The place of a page in the host arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostPage {
    /// The slab.
    pub slab: SlabId,
    /// The page within it, below [`SLAB_PAGES`].
    pub index: usize,
}

/// Host memory for the full KV of every request, in slabs of [`SLAB_PAGES`] pages.
///
/// Layer-major: within each extension the slabs of one layer lie side by side, so that what a layer's step misses,
/// over all requests, lies in a narrow range of addresses. Extensions double, up to a GiB ahead of need, so there are few. Slabs are counted
/// by reference: the row that took one, any row that shares it, and every transfer that touches it; the last to
/// let go frees it.
#[derive(Debug)]
pub struct HostArena<M = PlainMemory> {
    layout: HostLayout,
    limit_bytes: Option<u64>,
    memory: M,
    slabs: Vec<Slab>,
    /// Vacant slabs of each layer, the lowest last: `[layers]`.
    vacant: Vec<Vec<SlabId>>,
    used: usize,
}

/// Bytes that are made ready ahead of need, at most: everybody waits while memory is pinned, some 0.14 s a GiB.
const MOST_AHEAD_BYTES: u64 = 1 << 30;

#[derive(Clone, Copy, Debug)]
struct Slab {
    layer: u32,
    references: u32,
    generation: u32,
}

impl<M: HostMemory> HostArena<M> {
    /// An arena of at most `limit_bytes` for the rows of `layers` layers.
    pub fn new(layout: impl Into<HostLayout>, layers: usize, limit_bytes: Option<u64>, memory: M) -> Self {
        let (layout, vacant) = (layout.into(), vec![Vec::new(); layers]);
        Self { layout, limit_bytes, memory, slabs: Vec::new(), vacant, used: 0 }
    }

    /// Bytes of one slab.
    pub fn slab_bytes(&self) -> u64 {
        self.layout.slab_bytes()
    }

    /// Makes `slabs` slabs of each layer ready beforehand, so that taking them allocates nothing; `progress`
    /// hears of each chunk.
    ///
    /// # Errors
    /// [`Error::OutOfHostMemory`] beyond the limit; what the memory refuses. Nothing is then changed.
    pub fn reserve(&mut self, slabs: usize, progress: &mut dyn FnMut(HostProgress)) -> Result<()> {
        let layers = self.vacant.len();
        let ready = self.slabs.len() / layers;
        let missing = slabs.saturating_sub(ready);
        check_limit(&self.layout, missing * layers, self.slabs.len(), self.limit_bytes)?;
        if missing == 0 { Ok(()) } else { self.extend(missing, progress) }
    }

    /// Takes `count` slabs for rows of `layer`.
    ///
    /// # Errors
    /// [`Error::OutOfHostMemory`] if they don't fit the limit, [`Error::AllocationFailed`] if the system has no
    /// memory; nothing is then taken.
    pub fn take(&mut self, layer: usize, count: usize) -> Result<Vec<SlabId>> {
        check_limit(&self.layout, count, self.used, self.limit_bytes)?;
        let missing = count.saturating_sub(self.vacant[layer].len());
        if missing > 0 {
            let layers = self.vacant.len();
            let ready = self.slabs.len() / layers;
            let limit = self.limit_bytes.map_or(usize::MAX, |limit| (limit / self.slab_bytes()) as usize);
            if missing > limit / layers - ready {
                let (needed, free) = (missing as u64 * self.slab_bytes(), 0);
                let (what, limit) =
                    (format!("{count} KV slabs of one layer"), self.limit_bytes.unwrap_or(u64::MAX));
                return Err(Error::OutOfHostMemory { what, needed, free, limit });
            }
            let ahead = ready.min((MOST_AHEAD_BYTES / self.slab_bytes()) as usize / layers);
            let more = missing.max(ahead).min(limit / layers - ready);
            let quiet = &mut |_| {};
            self.extend(more, quiet).or_else(|_| self.extend(missing, quiet))?;
        }
        let vacant = &mut self.vacant[layer];
        let mut taken = vacant.split_off(vacant.len() - count);
        taken.reverse();
        taken.iter().for_each(|slab| self.slabs[slab.0 as usize].references = 1);
        self.used += count;
        Ok(taken)
    }

    /// Keeps a slab until one more [`release`](Self::release).
    ///
    /// # Panics
    /// If nobody holds it.
    pub fn retain(&mut self, slab: SlabId) {
        let references = &mut self.slabs[slab.0 as usize].references;
        assert!(*references > 0, "{slab:?} is retained and nobody holds it");
        *references += 1;
    }

    /// Lets go of a slab; the last one to do so frees it. In debug builds its bytes become NaNs, so that a stale
    /// read shows.
    ///
    /// # Panics
    /// If nobody holds it.
    pub fn release(&mut self, slab: SlabId) {
        let state = &mut self.slabs[slab.0 as usize];
        assert!(state.references > 0, "{slab:?} released twice");
        state.references -= 1;
        if state.references == 0 {
            state.generation = state.generation.wrapping_add(1);
            self.vacant[state.layer as usize].push(slab);
            self.used -= 1;
            if cfg!(debug_assertions) {
                let poison = vec![Word::MAX; self.layout.page_words()];
                (0..SLAB_PAGES).for_each(|index| self.write(HostPage { slab, index }, &poison));
            }
        }
    }

    /// The slab with its generation, to be kept beyond a step.
    pub fn stamp(&self, slab: SlabId) -> Stamped<SlabId> {
        Stamped { id: slab, generation: self.slabs[slab.0 as usize].generation }
    }

    /// Whether the slab is still what it was when it was stamped.
    pub fn is_current(&self, slab: Stamped<SlabId>) -> bool {
        let state = self.slabs[slab.id.0 as usize];
        state.references > 0 && state.generation == slab.generation
    }

    /// How often a slab is held.
    pub fn references(&self, slab: SlabId) -> u32 {
        self.slabs[slab.0 as usize].references
    }

    /// What the slabs lie in, for whoever needs its address: slab by slab, page by page, from its start on.
    pub fn memory(&self) -> &M {
        &self.memory
    }

    /// As [`memory`](Self::memory), to change how it grows.
    pub fn memory_mut(&mut self) -> &mut M {
        &mut self.memory
    }

    /// Slabs that somebody holds.
    pub fn used_slabs(&self) -> usize {
        self.used
    }

    /// Slabs that are ready and that nobody holds.
    pub fn vacant_slabs(&self) -> usize {
        self.slabs.len() - self.used
    }

    /// What its pages hold.
    pub fn layout(&self) -> &HostLayout {
        &self.layout
    }

    /// Copies what the host page holds into a GPU page; the rest of that stays as it is.
    ///
    /// # Panics
    /// If `to` is not a whole GPU page.
    pub fn load(&self, page: HostPage, to: &mut [Word]) {
        assert_eq!(to.len(), self.layout.page().page_words(), "a page is read whole");
        if self.layout.code().is_none() {
            return self.memory.read(self.first_word(page), &mut to[self.layout.kept()]);
        }
        let mut host = vec![0; self.layout.page_words()];
        self.read(page, &mut host);
        self.layout.to_gpu(&host, to);
    }

    /// Copies of a GPU page what the host page holds.
    ///
    /// # Panics
    /// If `from` is not a whole GPU page.
    pub fn store(&mut self, page: HostPage, from: &[Word]) {
        assert_eq!(from.len(), self.layout.page().page_words(), "a page is written whole");
        if self.layout.code().is_none() {
            return self.memory.write(self.first_word(page), &from[self.layout.kept()]);
        }
        let mut host = vec![0; self.layout.page_words()];
        self.layout.to_host(from, &mut host);
        self.write(page, &host);
    }

    /// Copies the bytes of a host page out.
    pub fn read(&self, page: HostPage, to: &mut [Word]) {
        self.memory.read(self.first_word(page), to);
    }

    /// Copies the bytes of a host page in.
    pub fn write(&mut self, page: HostPage, from: &[Word]) {
        assert_eq!(from.len(), self.layout.page_words(), "a page is written whole");
        self.memory.write(self.first_word(page), from);
    }

    /// Where a page begins in the memory, in words: page `slab * 16 + index` of all.
    pub fn first_word(&self, page: HostPage) -> usize {
        (page.slab.0 as usize * SLAB_PAGES + page.index) * self.layout.page_words()
    }

    /// Appends `slabs` slabs of each layer.
    fn extend(&mut self, slabs: usize, progress: &mut dyn FnMut(HostProgress)) -> Result<()> {
        let (first, layers) = (self.slabs.len(), self.vacant.len());
        let (count, most) = (slabs.saturating_mul(layers), u32::MAX as usize);
        if count > most - first {
            // More than 32-bit ids can name.
            let bytes = |slabs: usize| (slabs as u64).saturating_mul(self.slab_bytes());
            let (needed, free, limit) = (bytes(count), bytes(most - first), bytes(most));
            let what = format!("{count} KV slabs");
            return Err(Error::OutOfHostMemory { what, needed, free, limit });
        }
        self.memory.extend(count * SLAB_PAGES * self.layout.page_words(), progress)?;
        for layer in 0..layers {
            let ids = (first + layer * slabs..first + (layer + 1) * slabs).rev().map(|id| SlabId(id as u32));
            self.vacant[layer].splice(0..0, ids);
            let slab = Slab { layer: layer as u32, references: 0, generation: 0 };
            self.slabs.resize(self.slabs.len() + slabs, slab);
        }
        Ok(())
    }
}

/// Whether `count` slabs fit beside `used` ones under a limit.
fn check_limit(layout: &HostLayout, count: usize, used: usize, limit: Option<u64>) -> Result<()> {
    let Some(limit) = limit else { return Ok(()) };
    let bytes = layout.slab_bytes();
    let (needed, free) = (count as u64 * bytes, limit.saturating_sub(used as u64 * bytes));
    if needed > free {
        return Err(Error::OutOfHostMemory { what: format!("{count} KV slabs"), needed, free, limit });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{KvDtype, PageLayout};

    /// Remembers by how many words it grew, and has none.
    #[derive(Debug, Default)]
    struct Growth(Vec<usize>);

    impl HostMemory for Growth {
        fn extend(&mut self, words: usize, _: &mut dyn FnMut(HostProgress)) -> Result<()> {
            self.0.push(words);
            Ok(())
        }

        fn read(&self, _: usize, _: &mut [Word]) {
            unreachable!("nobody reads");
        }

        fn write(&mut self, _: usize, _: &[Word]) {
            unreachable!("nobody writes");
        }
    }

    #[test]
    fn extensions_double_up_to_a_gibibyte_ahead() {
        // Slabs of 32 KiB: 16,384 of each layer are a GiB.
        let layout = PageLayout::new(8, 64, KvDtype::Bf16).unwrap();
        let mut arena = HostArena::new(layout, 2, None, Growth::default());
        assert_eq!(arena.slab_bytes(), 32 << 10);
        for count in [1, 2, 1, 16_000, 16_000, 1_000, 50_000] {
            arena.take(0, count).unwrap();
        }
        let words = arena.slab_bytes() as usize / size_of::<Word>();
        let grown: Vec<_> = arena.memory().0.iter().map(|of| of / words / 2).collect();
        assert_eq!(grown, [1, 2, 3, 15_998, 16_004, 16_384, 34_612]);
    }
}
