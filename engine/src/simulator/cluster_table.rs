/// Where the clusters of a row lie: each on pages of its own, one after the other.
#[derive(Clone, Debug, Default)]
pub struct ClusterTable {
    /// The page keys at which clusters end; the first begins at 0.
    ends: Vec<u32>,
}

impl ClusterTable {
    /// Adds a cluster of so many tokens after the others.
    pub fn push(&mut self, tokens: u32, page_tokens: u32) {
        self.ends.push(self.pages() + tokens.div_ceil(page_tokens));
    }

    /// Pages of all clusters together.
    pub fn pages(&self) -> u32 {
        self.ends.last().copied().unwrap_or(0)
    }

    /// The page keys of cluster `id`.
    pub fn keys(&self, id: u32) -> std::ops::Range<u32> {
        let first = if id == 0 { 0 } else { self.ends[id as usize - 1] };
        first..self.ends[id as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clusters_have_pages_of_their_own_without_gaps() {
        let mut table = ClusterTable::default();
        assert_eq!(table.pages(), 0);
        [1, 8, 0, 9].into_iter().for_each(|tokens| table.push(tokens, 8));
        assert_eq!([0, 1, 2, 3].map(|id| table.keys(id)), [0..1, 1..2, 2..2, 2..4]);
        assert_eq!(table.pages(), 4);
    }
}
