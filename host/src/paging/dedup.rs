use super::bits::Bits;

/// Takes repeated ids out of a selection, which a [`RowCache`](super::RowCache) does not accept: forced ids that
/// top-k picked as well, several partitions on one page, the selections of several queries.
///
/// One bit for each id that a row can have, as a GPU would keep it in shared memory.
#[derive(Clone, Debug, Default)]
pub struct Deduplicator {
    seen: Bits,
}

impl Deduplicator {
    /// For ids below `ids`.
    pub fn new(ids: u32) -> Self {
        let mut seen = Bits::default();
        seen.grow(ids as usize);
        Self { seen }
    }

    /// Keeps the first of equal ids, in order, and returns how many repeated ones went.
    ///
    /// # Panics
    /// If an id is out of range.
    pub fn first_occurrences(&mut self, ids: &mut Vec<u32>) -> usize {
        let before = ids.len();
        ids.retain(|id| self.seen.insert(*id as usize));
        ids.iter().for_each(|id| self.seen.remove(*id as usize));
        before - ids.len()
    }

    /// The same for ids that ascend, which needs no memory of those seen.
    pub fn ascending(ids: &mut Vec<u32>) -> usize {
        debug_assert!(ids.is_sorted(), "ids must ascend");
        let before = ids.len();
        ids.dedup();
        before - ids.len()
    }
}
