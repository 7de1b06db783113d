use super::index::mean_key;
use super::select::{score, top_k};
use crate::backend::{StepEntry, StepKind};
use crate::memory::{HostArena, KvDtype, PagePool, PhysicalPage, RequestPlan, SlabId, Word};
use crate::paging::{HostTable, Lru, Resolution, RowCache, SteadyPages};
use crate::partition::SelectedPage;
use crate::pipeline::{Budget, Candidates, Counters, Index, Partition, Place, Select};
use crate::{Error, KvConfig, Result};

/// The memory that rows live in.
#[derive(Debug)]
pub(super) struct Tiers {
    pub pool: PagePool,
    pub arena: HostArena,
    pub counters: Counters,
}

/// New keys or values of one row: token `i` is at `data[i * stride..][..head_dim]`.
#[derive(Clone, Copy, Debug)]
pub(super) struct NewTokens<'a> {
    pub data: &'a [f32],
    pub stride: usize,
    pub head_dim: usize,
}

impl NewTokens<'_> {
    fn get(&self, token: usize) -> &[f32] {
        &self.data[token * self.stride..][..self.head_dim]
    }
}

/// One row: its tables, its summaries, and the lists that its stages hand on.
#[derive(Debug)]
pub(super) struct Row {
    steady: SteadyPages,
    cache: RowCache<Lru>,
    host: HostTable,
    /// `[partitions, width]`, from the first retrievable partition on.
    summaries: Vec<f32>,
    /// Select's result: partition ids, ascending.
    selected: Vec<u32>,
    /// Retrieve's result: the pages to attend to and their valid tokens, in token order.
    listed: Vec<(PhysicalPage, u32)>,
    pages: Vec<SelectedPage>,
    resolution: Resolution,
}

impl Row {
    /// A row without tokens, which may use `pages` and `slabs` as its plan says and keeps its summaries in
    /// `summaries`. All tables get their final size, so no step allocates for them.
    pub fn new(
        config: &KvConfig,
        plan: &RequestPlan,
        summaries: Vec<f32>,
        mut pages: Vec<PhysicalPage>,
        slabs: Vec<SlabId>,
    ) -> Self {
        let slots = pages.split_off(plan.row.steady_pages);
        Self {
            steady: SteadyPages::new(pages),
            cache: RowCache::new(slots, config.retrievable_pages(plan.max_tokens).end),
            host: HostTable::new(slabs),
            summaries,
            selected: Vec::new(),
            listed: Vec::new(),
            pages: Vec::new(),
            resolution: Resolution::default(),
        }
    }

    /// Room for the summaries of a row at its longest.
    ///
    /// # Errors
    /// [`Error::AllocationFailed`] if the system has no memory.
    pub fn reserve_summaries(config: &KvConfig, plan: &RequestPlan) -> Result<Vec<f32>> {
        let elements = config.retrievable_partitions(plan.max_tokens).len() * config.summary_width();
        let mut summaries = Vec::new();
        summaries.try_reserve_exact(elements).map_err(|_| Error::AllocationFailed {
            what: "summaries".to_owned(),
            bytes: (elements * size_of::<f32>()) as u64,
        })?;
        Ok(summaries)
    }

    /// Index: summarises the partitions that become retrievable with this step. Not for methods without one.
    pub fn index(
        &mut self,
        config: &KvConfig,
        pool: &PagePool,
        place: Place,
        entry: &StepEntry,
        keys: NewTokens<'_>,
    ) {
        let width = config.summary_width();
        let (layout, head_dim) = (config.layout(), keys.head_dim);
        let tokens = config.partition_tokens();
        let retrievable = config.zones(entry.after()).retrievable;
        let (indexed, wanted) = (self.summaries.len() / width, retrievable.len() / tokens);
        if indexed == wanted {
            return;
        }
        self.summaries.resize(wanted * width, 0.0);
        let mut partition_keys = vec![0.0; tokens * head_dim];
        for (offset, summary) in self.summaries.chunks_exact_mut(width).enumerate().skip(indexed) {
            let first = retrievable.start + offset * tokens;
            for (token, key) in (first..).zip(partition_keys.chunks_exact_mut(head_dim)) {
                if token < entry.before {
                    let page = (token / layout.page_tokens()) as u32;
                    let page = self.steady.lookup(page).expect("a token before its index is steady");
                    layout.read_key(pool.page(page), token % layout.page_tokens(), key);
                } else {
                    store_rounded(layout.dtype(), keys.get(token - entry.before), key);
                }
            }
            match config.method().index() {
                Index::Custom(operator) => {
                    let partition = Partition { place, first_token: first, head_dim, keys: &partition_keys };
                    operator.summarize(&partition, summary);
                }
                Index::MeanKey | Index::Nothing => mean_key(&partition_keys, summary),
            }
        }
    }

    /// Offload: stores the new tokens on both tiers and moves what left the steady zone to the cache.
    pub fn offload(
        &mut self,
        config: &KvConfig,
        tiers: &mut Tiers,
        entry: &StepEntry,
        keys: NewTokens<'_>,
        values: NewTokens<'_>,
    ) {
        let Tiers { pool, arena, counters } = tiers;
        let layout = config.layout();
        let page_tokens = layout.page_tokens();
        let retrievable = config.retrievable_pages(entry.after());
        // The step begins here: pages that are adopted in it are as young as those it selects.
        self.cache.tick();
        let mut left = false;
        let mut token = entry.before;
        while token < entry.after() {
            let key = (token / page_tokens) as u32;
            let end = ((key as usize + 1) * page_tokens).min(entry.after());
            let complete = end == (key as usize + 1) * page_tokens;

            // A page that is steady already is filled first: it may leave with this very step. Then those that
            // leave make room, and only then new pages join.
            let steady = self.steady.lookup(key);
            if steady.is_none() && !left {
                self.leave_steady(&retrievable, counters);
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
                write(self.host_page(arena, key));
            } else {
                let page = steady.unwrap_or_else(|| self.steady.push(key));
                write(pool.page_mut(page));
                if complete {
                    self.host_page(arena, key).copy_from_slice(pool.page(page));
                }
            }
            if complete {
                self.host.publish(key);
                counters.offloaded_pages += 1;
            }
            token = end;
        }
        if !left {
            self.leave_steady(&retrievable, counters);
        }
    }

    /// Hands the steady pages that are now retrievable to the cache; their bytes stay where they are.
    fn leave_steady(&mut self, retrievable: &std::ops::Range<u32>, counters: &mut Counters) {
        while let Some((key, page)) = self.steady.leave(retrievable.clone()) {
            assert!(self.host.published(key).is_some(), "page {key} left before the host had it");
            let adoption = self.cache.adopt(key, page);
            self.steady.recycle(adoption.spare);
            counters.adopted_pages += u64::from(adoption.spare != page);
            counters.evicted_pages += u64::from(adoption.evicted.is_some());
        }
    }

    fn host_page<'a>(&self, arena: &'a mut HostArena, key: u32) -> &'a mut [Word] {
        arena.page_mut(self.host.lookup(key).expect("the plan counts the host's pages"))
    }

    /// Select: picks partitions for the group's queries, `[group, head_dim]`.
    pub fn select(
        &mut self,
        config: &KvConfig,
        place: Place,
        entry: &StepEntry,
        queries: &[f32],
    ) -> Result<()> {
        let (head_dim, tokens) = (config.layout().head_dim(), config.partition_tokens());
        let ids = config.retrievable_partitions(entry.after());
        let (first, count) = (ids.start, ids.len());
        let limit = |budget: Budget| budget.partitions(entry.after(), tokens).min(count);
        self.selected.clear();
        match config.method().select() {
            Select::Nothing => {}
            Select::Everything => self.selected.extend(ids),
            Select::TopK { budget, .. } if limit(budget) == count => {
                self.selected.extend(ids);
            }
            Select::TopK { merge, budget } => {
                let (mut scores, mut logits) = (vec![0.0; count], vec![0.0; count]);
                score(queries, &self.summaries, head_dim, merge, &mut scores, &mut logits);
                top_k(&scores, limit(budget), &mut self.selected);
                self.selected.iter_mut().for_each(|id| *id += first);
            }
            Select::Custom { picker, budget } => {
                let candidates = Candidates {
                    place,
                    queries,
                    head_dim,
                    summaries: &self.summaries,
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
    pub fn retrieve(&mut self, config: &KvConfig, tiers: &mut Tiers, entry: &StepEntry) -> Result<()> {
        let Tiers { pool, arena, counters } = tiers;
        self.pages.clear();
        config.partition_map().expand(&self.selected, &mut self.pages);
        self.cache.resolve(&self.pages, &mut self.resolution)?;
        for copy in &self.resolution.copies {
            let source = self.host.published(copy.key).expect("a selected page is complete on the host");
            pool.page_mut(copy.page).copy_from_slice(arena.page(source));
        }

        let misses = self.resolution.copies.len() as u64;
        if entry.kind == StepKind::Prompt {
            counters.warm_pages += misses;
        } else {
            counters.hits += self.resolution.hits() as u64;
            counters.misses += misses;
        }
        counters.evicted_pages += self.resolution.evicted.len() as u64;

        let retrievable = config.retrievable_pages(entry.after());
        let page_tokens = config.layout().page_tokens();
        let (sinks, tail) = self
            .steady
            .pages()
            .split_at(self.steady.pages().partition_point(|(key, _)| *key < retrievable.start));
        let steady = |(key, page): &(u32, PhysicalPage)| {
            (*page, page_tokens.min(entry.after() - *key as usize * page_tokens) as u32)
        };
        let selected = self.resolution.pages.iter().zip(&self.pages);
        self.listed.clear();
        self.listed.extend(sinks.iter().map(steady));
        self.listed.extend(selected.map(|(page, selected)| (*page, selected.tokens)));
        self.listed.extend(tail.iter().map(steady));
        Ok(())
    }

    /// The pages of this step and their valid tokens, in token order.
    pub fn listed(&self) -> &[(PhysicalPage, u32)] {
        &self.listed
    }

    /// The partitions of this step.
    pub fn selected(&self) -> &[u32] {
        &self.selected
    }

    /// The row's places on both tiers, to be freed.
    pub fn pages(&self) -> impl Iterator<Item = PhysicalPage> {
        self.steady.physical_pages().chain(self.cache.physical_pages().iter().copied())
    }

    pub fn host(&self) -> &HostTable {
        &self.host
    }

    pub fn cache(&self) -> &RowCache<Lru> {
        &self.cache
    }

    pub fn gpu_table_bytes(&self) -> usize {
        self.cache.bytes() + self.steady.bytes()
    }

    pub fn summary_bytes(&self) -> usize {
        size_of_val(self.summaries.as_slice())
    }
}

fn store_rounded(dtype: KvDtype, from: &[f32], to: &mut [f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = dtype.round(*from);
    }
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
