use std::collections::{HashMap, HashSet};

use super::CpuBackend;
use crate::backend::Backend;
use crate::memory::Direction;
use crate::paging::SEGMENT_KEYS;

impl CpuBackend {
    /// Checks what holds for the tables of all rows between any two calls; what stands behind the tests of whole
    /// traffics. Slow: it looks at every table entry and every page.
    ///
    /// # Panics
    /// If something does not hold.
    pub fn check_tables(&self) {
        self.check_rows();
        self.check_pages();
        self.check_slabs();
        self.check_segments();
    }

    /// Page keys and slots name each other; a cached page is complete on the host or pinned; one that no transfer
    /// touches has its host page's bytes, and keys as they are rebuilt.
    fn check_rows(&self) {
        let tiers = self.tiers();
        for (shared, row) in self.rows() {
            let (id, cache) = (shared.id, row.cache());
            let mut mapped = 0;
            for key in 0..(shared.directory.len() * SEGMENT_KEYS) as u32 {
                if let Some(slot) = shared.slot(&tiers.segments, key) {
                    assert_eq!(
                        cache.owner(slot),
                        Some(key),
                        "{id:?}: slot {} and page {key} disagree",
                        slot.0
                    );
                    mapped += 1;
                }
            }
            assert_eq!(mapped, cache.len(), "{id:?}: a slot holds a page that the segments do not know");
            for (key, page) in cache.resident() {
                let slot = shared.slot(&tiers.segments, key).expect("counted above");
                let pinned = cache.states().is_pinned(slot);
                let host = row.host().published(key);
                assert!(
                    host.is_some() || pinned,
                    "{id:?}: page {key} could leave and the host has not got it"
                );
                assert!(!pinned || tiers.pool.is_held(page), "{id:?}: page {key} is pinned for no transfer");
                // Pages of clusters are counted by themselves.
                let steady = !self.config().clusters() && row.steady().lookup(key).is_some();
                assert!(!steady, "{id:?}: page {key} is steady and cached");
                if let (Some(host), false) = (host, tiers.pool.is_held(page)) {
                    let bytes = self.fetched(id, key, host);
                    assert!(bytes == tiers.pool.page(page), "{id:?}: page {key} is not its host page");
                }
            }
            let published = row.host().valid_pages();
            assert!(published <= row.host().computed() as usize, "{id:?}: more is published than computed");
        }
    }

    /// Each GPU page is free, in one row, or waits for a transfer.
    fn check_pages(&self) {
        let census = self.page_census();
        let mut held = HashSet::new();
        for page in self.rows().flat_map(|(_, row)| row.pages()) {
            assert!(held.insert(page), "{page:?} is in two places");
        }
        assert_eq!(held.len(), census.used, "pages were lost or given out twice");
        let all = census.free + census.used + census.in_flight;
        assert_eq!(all, self.tiers().pool.limit(), "{census:?}");
    }

    /// Each slab is held once by its row and once by each transfer of one of its pages.
    fn check_slabs(&self) {
        let tiers = self.tiers();
        let mut references = HashMap::new();
        let rows = self.rows().flat_map(|(_, row)| row.host().slabs().iter().copied());
        let moving = tiers.transfers.under_way().iter().flat_map(|transfer| transfer.slabs());
        rows.chain(moving).for_each(|slab| *references.entry(slab).or_insert(0) += 1);
        assert_eq!(references.len(), tiers.arena.used_slabs(), "slabs were lost");
        for (slab, count) in references {
            assert_eq!(tiers.arena.references(slab), count, "{slab:?}");
        }
        // What a live row sends has not been published; what it fetches has.
        for transfer in tiers.transfers.under_way() {
            if let Some((_, row)) = self.rows().find(|(shared, _)| shared.id == transfer.row()) {
                let published = transfer.direction() == Direction::ToGpu;
                assert!(transfer.keys().all(|key| row.host().published(key).is_some() == published));
            }
        }
    }

    /// Each segment is in one directory.
    fn check_segments(&self) {
        let mut held = HashSet::new();
        for (shared, _) in self.rows().filter(|(shared, _)| shared.id.row == 0) {
            for segment in 0..shared.directory.len() {
                let id =
                    shared.directory.segment((segment * SEGMENT_KEYS) as u32).expect("within the directory");
                assert!(held.insert(id.id), "segment {} is in two directories", id.id);
            }
        }
        assert_eq!(held.len(), self.tiers().segments.used(), "segments were lost");
    }
}
