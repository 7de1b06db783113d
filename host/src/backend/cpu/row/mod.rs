mod clusters;
mod tokens;

use std::borrow::Cow;
use std::ops::Range;

use self::clusters::{ClusterSummaries, RowClusters};
use super::attend::Estimate;
use super::index::{key_bounds, least_cosine, mean_key, outliers};
use super::select::{Wish, choose, score_partitions_beside, top_k_beside};
use crate::backend::{StepEntry, StepKind};
use crate::memory::{
    Direction, HostArena, HostPage, PagePool, PhysicalPage, PrefixCache, RequestPlan, RowId, SlabId,
    Transfer, Transfers,
};
use crate::paging::{
    BucketedLru, Directory, HostTable, PageCopy, Resolution, RowCache, RowSlots, SegmentPool, SlotId,
    SteadyPages, StepClock,
};
use crate::partition::SelectedPage;
use crate::pipeline::{Always, Budget, Candidates, Counters, Index, Partition, Place, Reach, Select};
use crate::{Error, KvConfig, Result};

pub(super) use self::tokens::{NewTokens, Tokens};

/// The most pages of one transfer: a prompt's pages go to the host in pieces, each published by itself.
const TRANSFER_PAGES: usize = 64;

/// The memory that rows live in.
#[derive(Debug)]
pub(super) struct Tiers {
    pub pool: PagePool,
    pub arena: HostArena,
    pub segments: SegmentPool,
    pub transfers: Transfers,
    pub prefixes: Option<PrefixCache>,
    pub counters: Counters,
}

impl Tiers {
    /// Takes slabs, of cached prefixes if need be.
    pub fn take_slabs(&mut self, layer: usize, count: usize) -> Result<Vec<SlabId>> {
        PrefixCache::take_slabs(self.prefixes.as_mut(), layer, count, &mut self.arena)
    }

    /// Starts a transfer; what is handed back is complete.
    fn start(&mut self, transfer: Transfer) -> Option<Transfer> {
        self.transfers.start(transfer, &mut self.pool, &mut self.arena)
    }

    /// Waits for transfers, and returns them.
    fn wait(&mut self, which: impl Fn(&Transfer) -> bool) -> Vec<Transfer> {
        self.transfers.wait(which, &mut self.pool, &mut self.arena)
    }
}

/// What a row shares with the others of its request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shared<'a> {
    pub id: RowId,
    pub directory: &'a Directory,
    pub clock: StepClock,
}

impl<'a> Shared<'a> {
    fn map(&self, pool: &'a mut SegmentPool) -> RowSlots<'a> {
        RowSlots { pool, directory: self.directory, row: self.id.row as usize }
    }

    pub fn slot(&self, pool: &SegmentPool, key: u32) -> Option<SlotId> {
        self.directory.slot(pool, self.id.row as usize, key)
    }
}

/// One row: its tables, and the lists that its stages hand on.
#[derive(Debug)]
pub(super) struct Row {
    steady: SteadyPages,
    cache: RowCache<BucketedLru>,
    host: HostTable,
    /// Bits of the partitions that every step reads; see [`KvConfig::mark_words`].
    always: Box<[u32]>,
    clusters: RowClusters,
    /// Select's result: partition ids, ascending.
    selected: Vec<u32>,
    /// Retrieve's result: the pages to attend to and their valid tokens, in token order.
    listed: Vec<(PhysicalPage, u32)>,
    pages: Vec<SelectedPage>,
    resolution: Resolution,
}

impl Row {
    /// A row without tokens, which may use `pages` as its plan says.
    pub fn new(config: &KvConfig, plan: &RequestPlan, mut pages: Vec<PhysicalPage>) -> Self {
        let slots = pages.split_off(plan.row.steady_pages);
        Self {
            steady: SteadyPages::new(pages, config.sink_pages()),
            cache: RowCache::new(slots, BucketedLru::default()),
            host: HostTable::default(),
            always: vec![0; config.mark_words(plan.max_tokens)].into(),
            clusters: RowClusters::default(),
            selected: Vec::new(),
            listed: Vec::new(),
            pages: Vec::new(),
            resolution: Resolution::default(),
        }
    }

    /// Index: summarises the partitions that become retrievable with this step into `summaries`, one piece a
    /// segment, [of so many elements](KvConfig::summary_elements), and of a prompt chooses those that every step reads. Not for methods without one.
    pub fn index(
        &mut self,
        config: &KvConfig,
        pool: &PagePool,
        place: Place,
        entry: &StepEntry,
        [keys, values]: [NewTokens<'_>; 2],
        summaries: &mut [&mut [f32]],
    ) {
        let of_row = Tokens { pool, layout: config.layout(), before: entry.before, keys };
        let leaving = config.leaving_tokens(entry.before, entry.after());
        if config.clusters() {
            return self.index_clusters(config, &of_row, values, leaving, summaries);
        }
        let (width, head_dim) = (config.summary_width(), keys.head_dim);
        let (tokens, segment_partitions) = (config.partition_tokens(), config.segment_partitions());
        let mut partition_keys = vec![0.0; tokens * head_dim];
        let chooses = entry.kind == StepKind::Prompt && !self.always.is_empty();
        let mut cosines = Vec::new();
        for first in leaving.step_by(tokens) {
            for (token, key) in (first..).zip(partition_keys.chunks_exact_mut(head_dim)) {
                of_row.key(&self.steady, token, key);
            }
            let id = first / tokens;
            let (segment, index) = (id / segment_partitions, id % segment_partitions);
            let summary = &mut summaries[segment][index * width..][..width];
            match config.method().index() {
                Index::Custom(operator) => {
                    let partition = Partition { place, first_token: first, head_dim, keys: &partition_keys };
                    operator.summarize(&partition, summary);
                }
                Index::KeyBounds => key_bounds(&partition_keys, summary),
                Index::MeanKey | Index::Nothing | Index::Clusters => mean_key(&partition_keys, summary),
            }
            if chooses {
                cosines.push(least_cosine(&partition_keys, head_dim));
            }
        }
        if chooses {
            let Always::Outliers { partitions } = config.method().always() else {
                unreachable!("there are marks only for outliers")
            };
            let mut ids = Vec::new();
            outliers(&cosines, partitions, &mut ids);
            self.always.fill(0);
            // A prompt's first partition is the first that can be selected.
            ids.iter().for_each(|id| self.always[*id as usize / 32] |= 1 << (id % 32));
        }
    }

    /// Offload: stores the new tokens on both tiers and moves what left the steady zone to the cache.
    pub fn offload(
        &mut self,
        config: &KvConfig,
        tiers: &mut Tiers,
        shared: &Shared<'_>,
        entry: &StepEntry,
        keys: NewTokens<'_>,
        values: NewTokens<'_>,
    ) {
        // The step begins here: pages that are adopted in it are as young as those it selects.
        self.cache.begin_step(shared.clock);
        if config.clusters() {
            return self.offload_clusters(config, tiers, shared, entry, keys, values);
        }
        let layout = config.layout();
        let page_tokens = layout.page_tokens();
        let retrievable = config.left_pages(entry.after());
        self.host.set_computed((entry.after() / page_tokens) as u32);
        let mut transfer = Transfer::new(shared.id, Direction::ToHost);
        let mut staging = vec![0; layout.page_words()];
        let mut left = false;
        let mut token = entry.before;
        while token < entry.after() {
            let key = (token / page_tokens) as u32;
            let end = ((key as usize + 1) * page_tokens).min(entry.after());
            let complete = end == (key as usize + 1) * page_tokens;
            // A prefix that another request computed.
            let shared_page = self.host.published(key).is_some();

            // A page that is steady already is filled first: it may leave with this very step. Then those that
            // leave make room, and only then new pages join.
            let steady = self.steady.lookup(key);
            if steady.is_none() && !left {
                self.send(tiers, shared, &mut transfer);
                self.leave_steady(tiers, shared, &retrievable);
                left = true;
            }
            let write = |page: &mut [_]| {
                for token in token..end {
                    let new = token - entry.before;
                    layout.write_token(page, token % page_tokens, keys.get(new), values.get(new));
                }
            };
            if steady.is_none() && retrievable.contains(&key) {
                // The middle of a prompt never sees the GPU pool.
                if !shared_page {
                    write(&mut staging);
                    transfer.add_staged(key, &staging, self.host_page(key));
                }
            } else {
                let page = steady.unwrap_or_else(|| self.steady.push(key));
                assert!(!tiers.pool.is_held(page), "{page:?} is written while a transfer reads it");
                write(tiers.pool.page_mut(page));
                if complete && !shared_page {
                    config.host_layout().round(tiers.pool.page_mut(page));
                    transfer.add(key, page, self.host_page(key));
                }
            }
            if transfer.len() == TRANSFER_PAGES {
                self.send(tiers, shared, &mut transfer);
            }
            token = end;
        }
        self.send(tiers, shared, &mut transfer);
        if !left {
            self.leave_steady(tiers, shared, &retrievable);
        }
    }

    /// Starts a transfer to the host, and leaves an empty one.
    fn send(&mut self, tiers: &mut Tiers, shared: &Shared<'_>, transfer: &mut Transfer) {
        if !transfer.is_empty() {
            let full = std::mem::replace(transfer, Transfer::new(shared.id, Direction::ToHost));
            tiers.counters.offloaded_pages += full.len() as u64;
            let complete = tiers.start(full);
            complete.iter().for_each(|transfer| self.complete(&tiers.segments, shared, transfer));
        }
    }

    /// Waits for those transfers of this row that `which` names.
    fn wait(&mut self, tiers: &mut Tiers, shared: &Shared<'_>, which: impl Fn(&Transfer) -> bool) {
        for transfer in tiers.wait(|transfer| transfer.row() == shared.id && which(transfer)) {
            self.complete(&tiers.segments, shared, &transfer);
        }
    }

    /// A transfer of this row is complete: pages on the host are published, and slots that it pinned let go of.
    pub fn complete(&mut self, segments: &SegmentPool, shared: &Shared<'_>, transfer: &Transfer) {
        for key in transfer.keys() {
            let slot = shared.slot(segments, key);
            match transfer.direction() {
                Direction::ToHost => {
                    self.host.publish(key);
                    slot.into_iter().for_each(|slot| self.cache.unpin(slot));
                }
                Direction::ToGpu => self.cache.unpin(slot.expect("a page in flight keeps its slot")),
            }
        }
    }

    /// Hands the steady pages that are now retrievable to the cache; their bytes stay where they are. One that the
    /// host has not got yet is pinned until it has.
    fn leave_steady(&mut self, tiers: &mut Tiers, shared: &Shared<'_>, retrievable: &Range<u32>) {
        while let Some((key, page)) = self.steady.leave(retrievable) {
            if self.host.published(key).is_none() && self.cache.pinned() == self.cache.capacity() {
                self.wait(tiers, shared, |transfer| transfer.touches(page));
            }
            let mut map = shared.map(&mut tiers.segments);
            let adoption = self.cache.adopt(&mut map, key, page);
            if self.host.published(key).is_none() {
                let slot =
                    shared.slot(&tiers.segments, key).expect("a page that only the GPU has gets a slot");
                self.cache.pin(slot);
            }
            self.steady.replace(key, adoption.spare);
            tiers.counters.adopted_pages += u64::from(adoption.spare != page);
            tiers.counters.evicted_pages += u64::from(adoption.evicted.is_some());
        }
    }

    fn host_page(&self, key: u32) -> HostPage {
        self.host.lookup(key).expect("slabs come before the pages that they hold")
    }

    /// Select: picks partitions for the group's queries, `[group, head_dim]`, by `summaries`, one piece a segment,
    /// `[partitions, width]`.
    pub fn select(
        &mut self,
        config: &KvConfig,
        place: Place,
        entry: &StepEntry,
        queries: &[f32],
        summaries: &[&mut [f32]],
    ) -> Result<()> {
        let head_dim = config.layout().head_dim();
        let ids = self.partitions(config, entry.after());
        let (first, count) = (ids.start, ids.len());
        let limit = |budget: Budget| config.budget_partitions(budget, entry.after()).min(count);
        self.selected.clear();
        self.clusters.estimated.clear();
        let select = match config.reach(place) {
            Reach::Selected => config.method().select(),
            Reach::Everything => Select::Everything,
            Reach::Steady => Select::Nothing,
        };
        match select {
            Select::Nothing => {}
            Select::Everything => self.selected.extend(ids),
            Select::TopK { budget, .. } if limit(budget) + self.always_read() >= count => {
                self.selected.extend(ids);
            }
            Select::TopK { score, merge, budget } => {
                let mut scores = vec![0.0; count];
                let summaries = in_one_piece(config, summaries, ids);
                let always = &self.always;
                let marked =
                    |id: u32| always.get(id as usize / 32).is_some_and(|word| word >> (id % 32) & 1 != 0);
                score_partitions_beside(score, queries, &summaries, head_dim, merge, &marked, &mut scores);
                if config.clusters() {
                    let estimates = (count as f32 * config.method().estimated()) as usize;
                    let wish = Wish { k: limit(budget), estimates, ..Wish::default() };
                    // Clusters are counted from 0.
                    (self.selected, self.clusters.estimated) = choose(&scores, &wish, |_| 0);
                    return Ok(());
                }
                top_k_beside(&scores, limit(budget), &marked, &mut self.selected);
                self.selected.iter_mut().for_each(|id| *id += first);
            }
            Select::Custom { picker, budget } => {
                let candidates = Candidates {
                    place,
                    queries,
                    position: entry.after() - 1,
                    head_dim,
                    summaries: &in_one_piece(config, summaries, ids),
                    first,
                    count,
                    limit: limit(budget),
                };
                if candidates.limit > 0 {
                    picker.pick(&candidates, &mut self.selected);
                }
                check_selection(config.method().name(), &candidates, &self.selected)?;
            }
        }
        Ok(())
    }

    /// Retrieve: makes the selected pages resident and lists the pages of this step in token order.
    pub fn retrieve(
        &mut self,
        config: &KvConfig,
        tiers: &mut Tiers,
        shared: &Shared<'_>,
        entry: &StepEntry,
        summaries: &[&mut [f32]],
    ) -> Result<()> {
        self.pages.clear();
        config.partition_map().expand(&self.selected, &mut self.pages);
        if config.clusters() {
            let summaries = ClusterSummaries::new(config, summaries);
            let tokens = |id: u32| summaries.estimate(id).tokens as u32;
            self.pages.iter_mut().for_each(|page| page.tokens = tokens(page.key));
        }
        self.wait_for_selection(tiers, shared);
        self.cache.resolve(&mut shared.map(&mut tiers.segments), &self.pages, &mut self.resolution)?;
        let mut transfer = Transfer::new(shared.id, Direction::ToGpu);
        for copy in &self.resolution.copies {
            let source = self.host.published(copy.key).expect("a selected page is complete on the host");
            transfer.add(copy.key, copy.page, source);
        }
        if tiers.start(transfer).is_none() {
            for copy in &self.resolution.copies {
                let slot = shared.slot(&tiers.segments, copy.key).expect("a page that is fetched has a slot");
                self.cache.pin(slot);
            }
        }
        if entry.kind == StepKind::Decode {
            // Also for what a prompt's warm start fetches.
            self.wait(tiers, shared, |transfer| transfer.direction() == Direction::ToGpu);
        }

        let (misses, counters) = (self.resolution.copies.len() as u64, &mut tiers.counters);
        if entry.kind == StepKind::Prompt {
            counters.warm_pages += misses;
        } else {
            counters.hits += self.resolution.hits() as u64;
            counters.misses += misses;
        }
        counters.evicted_pages += self.resolution.evicted.len() as u64;

        let page_tokens = config.layout().page_tokens();
        let steady = |(key, page): (u32, PhysicalPage)| {
            (page, page_tokens.min(entry.after() - key as usize * page_tokens) as u32)
        };
        let selected = self.resolution.pages.iter().zip(&self.pages);
        self.listed.clear();
        self.listed.extend(self.steady.sinks().map(steady));
        self.listed.extend(selected.map(|(page, selected)| (*page, selected.tokens)));
        self.listed.extend(self.steady.tail().map(steady));
        Ok(())
    }

    /// Waits until each selected page is on the GPU or complete on the host, and until no pin is in their way.
    fn wait_for_selection(&mut self, tiers: &mut Tiers, shared: &Shared<'_>) {
        if tiers.transfers.under_way().is_empty() {
            return;
        }
        let nowhere = |page: &SelectedPage| {
            shared.slot(&tiers.segments, page.key).is_none() && self.host.published(page.key).is_none()
        };
        if self.pages.iter().any(nowhere) {
            self.wait(tiers, shared, |transfer| transfer.direction() == Direction::ToHost);
        }
        if self.pages.len() + self.cache.pinned() > self.cache.capacity() {
            self.wait(tiers, shared, |_| true);
        }
    }

    /// Gives the cache `slots` slots, `spare` holding the pages for new ones, and returns the pages of those that
    /// go.
    pub fn resize(
        &mut self,
        tiers: &mut Tiers,
        shared: &Shared<'_>,
        slots: usize,
        spare: &mut Vec<PhysicalPage>,
    ) {
        let capacity = self.cache.capacity();
        if slots >= capacity {
            self.cache.grow(spare.split_off(spare.len() - (slots - capacity)));
            return;
        }
        if self.cache.pinned() > slots {
            self.wait(tiers, shared, |_| true);
        }
        let shrunk = self.cache.shrink(&mut shared.map(&mut tiers.segments), capacity - slots);
        assert_eq!(self.cache.capacity(), slots, "pins keep no more slots than stay");
        tiers.counters.shrunk_pages += shrunk.evicted.len() as u64;
        tiers.pool.give_back(shrunk.pages);
    }

    /// The ids of the partitions that can be selected at a length.
    fn partitions(&self, config: &KvConfig, tokens: usize) -> Range<u32> {
        if config.clusters() { 0..self.clusters.pages } else { config.retrievable_partitions(tokens) }
    }

    /// Pages of the row's clusters.
    pub fn cluster_pages(&self) -> usize {
        self.clusters.pages as usize
    }

    /// The partitions that this step estimates, ascending.
    pub fn estimated(&self) -> &[u32] {
        &self.clusters.estimated
    }

    /// What stands for the partitions that this step estimates.
    pub fn estimates<'a>(&self, config: &KvConfig, summaries: &'a [&'a mut [f32]]) -> Vec<Estimate<'a>> {
        let summaries = ClusterSummaries::new(config, summaries);
        self.clusters.estimated.iter().map(|id| summaries.estimate(*id)).collect()
    }

    /// The pages of this step and their valid tokens, in token order.
    pub fn listed(&self) -> &[(PhysicalPage, u32)] {
        &self.listed
    }

    /// The pages that this step fetches.
    pub fn fetched(&self) -> &[PageCopy] {
        &self.resolution.copies
    }

    /// The partitions of this step.
    pub fn selected(&self) -> &[u32] {
        &self.selected
    }

    /// The row's GPU pages.
    pub fn pages(&self) -> impl Iterator<Item = PhysicalPage> {
        self.steady.physical_pages().iter().copied().chain(self.cache.physical_pages())
    }

    /// Bits of the partitions that every step reads.
    pub fn always(&self) -> &[u32] {
        &self.always
    }

    /// Partitions that every step reads.
    fn always_read(&self) -> usize {
        self.always.iter().map(|word| word.count_ones() as usize).sum()
    }

    pub fn steady(&self) -> &SteadyPages {
        &self.steady
    }

    pub fn host(&self) -> &HostTable {
        &self.host
    }

    pub fn host_mut(&mut self) -> &mut HostTable {
        &mut self.host
    }

    pub fn cache(&self) -> &RowCache<BucketedLru> {
        &self.cache
    }
}

/// The summaries of partitions `ids`, which may lie in several segments.
fn in_one_piece<'a>(config: &KvConfig, segments: &'a [&mut [f32]], ids: Range<u32>) -> Cow<'a, [f32]> {
    let (partitions, width) = (config.segment_partitions(), config.summary_width());
    let (first, end) = (ids.start as usize, ids.end as usize);
    if width == 0 || first == end {
        return Cow::Borrowed(&[]);
    }
    let pieces = (first / partitions..end.div_ceil(partitions)).map(|segment| {
        let start = segment * partitions;
        let range = first.max(start) - start..(end - start).min(partitions);
        &segments[segment][range.start * width..range.end * width]
    });
    let pieces: Vec<&[f32]> = pieces.collect();
    if let [piece] = pieces[..] { Cow::Borrowed(piece) } else { Cow::Owned(pieces.concat()) }
}

fn check_selection(method: &str, candidates: &Candidates<'_>, ids: &[u32]) -> Result<()> {
    let reason = if ids.len() > candidates.limit {
        format!("{} partitions, the budget allows {}", ids.len(), candidates.limit)
    } else if !ids.is_sorted_by(|a, b| a < b) {
        "ids do not ascend strictly".to_owned()
    } else if let Some(id) = ids.iter().find(|id| !candidates.ids().contains(id)) {
        format!("partition {id} is outside {:?}", candidates.ids())
    } else {
        return Ok(());
    };
    Err(Error::InvalidSelection { method: method.to_owned(), reason })
}
