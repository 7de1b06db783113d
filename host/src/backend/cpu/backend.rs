use std::collections::HashMap;

use rayon::prelude::*;

use super::row::{NewTokens, Row, Tiers};
use super::{attend, attend_prompt};
use crate::backend::{Backend, PromptChunk, Step, StepEntry};
use crate::memory::{HostArena, MemoryLimits, MemoryUsage, PagePool, RequestPlan, Word};
use crate::pipeline::{Counters, Place, RequestId};
use crate::{KvConfig, KvShape, Result};

/// The reference backend. See the [module](super).
#[derive(Debug)]
pub struct CpuBackend {
    config: KvConfig,
    tiers: Tiers,
    requests: HashMap<RequestId, Rows>,
}

/// The rows of a request, `[layers, kv_heads]`.
type Rows = Vec<Row>;

impl CpuBackend {
    /// A backend without requests.
    pub fn new(config: KvConfig, limits: MemoryLimits) -> Self {
        let layout = *config.layout();
        Self {
            config,
            tiers: Tiers {
                pool: PagePool::new(layout, limits.gpu_pages),
                arena: HostArena::new(layout, limits.host_bytes),
                counters: Counters::default(),
            },
            requests: HashMap::new(),
        }
    }

    /// The partitions that a row's last step selected, ascending; `None` for an unknown row.
    pub fn selected(&self, request: RequestId, layer: usize, kv_head: usize) -> Option<&[u32]> {
        self.row(request, layer, kv_head).map(Row::selected)
    }

    /// For each page of a row's cache, by page key, whether it holds the same bytes as its host page; what
    /// stands behind "no stale page is ever read". `None` for an unknown row.
    pub fn audit(&self, request: RequestId, layer: usize, kv_head: usize) -> Option<Vec<(u32, bool)>> {
        let row = self.row(request, layer, kv_head)?;
        let compare = |(key, page)| {
            let host = row.host().published(key);
            (key, host.is_some_and(|host| self.tiers.arena.page(host) == self.tiers.pool.page(page)))
        };
        Some(row.cache().resident().map(compare).collect())
    }

    fn row(&self, request: RequestId, layer: usize, kv_head: usize) -> Option<&Row> {
        let shape = self.config.shape();
        let known = layer < shape.layers && kv_head < shape.kv_heads;
        let rows = self.requests.get(&request).filter(|_| known)?;
        Some(&rows[layer * shape.kv_heads + kv_head])
    }
}

/// A row that takes part in a step.
struct Part<'a> {
    row: &'a mut Row,
    entry: StepEntry,
    place: Place,
    /// The entry's first token within the step's keys and values.
    first_token: usize,
    /// The entry's last query within the step's queries.
    last_query: usize,
    /// The row's number among the step's rows, `[entries, kv_heads]`.
    index: usize,
}

impl Part<'_> {
    /// The row's new keys or values, out of a tensor `[tokens, kv_heads, head_dim]`.
    fn new_tokens<'a>(&self, shape: &KvShape, tensor: &'a [f32]) -> NewTokens<'a> {
        let (stride, head_dim) = (shape.kv_heads * shape.head_dim, shape.head_dim);
        NewTokens {
            data: &tensor[self.first_token * stride + self.place.kv_head * head_dim..],
            stride,
            head_dim,
        }
    }

    /// The group's part of the entry's last query, out of a tensor `[queries, query_heads, head_dim]`.
    fn last_queries<'a>(&self, shape: &KvShape, tensor: &'a [f32]) -> &'a [f32] {
        let width = shape.group() * shape.head_dim;
        &tensor[(self.last_query * shape.kv_heads + self.place.kv_head) * width..][..width]
    }
}

/// The rows of a step, in the order `[entries, kv_heads]`.
fn parts<'a>(requests: &'a mut HashMap<RequestId, Rows>, shape: &KvShape, step: &Step<'_>) -> Vec<Part<'a>> {
    let mut entries = HashMap::with_capacity(step.entries.len());
    let (mut first_token, mut queries) = (0, 0);
    for (index, entry) in step.entries.iter().enumerate() {
        queries += entry.queries;
        entries.insert(entry.request, (index, *entry, first_token, queries - 1));
        first_token += entry.new;
    }
    let mut parts = Vec::with_capacity(step.entries.len() * shape.kv_heads);
    for (request, rows) in requests.iter_mut() {
        let Some(&(index, entry, first_token, last_query)) = entries.get(request) else { continue };
        let rows = &mut rows[step.layer * shape.kv_heads..][..shape.kv_heads];
        for (kv_head, row) in rows.iter_mut().enumerate() {
            let place = Place { layer: step.layer, kv_head };
            let index = index * shape.kv_heads + kv_head;
            parts.push(Part { row, entry, place, first_token, last_query, index });
        }
    }
    // A hash map's order must not show.
    parts.sort_unstable_by_key(|part| part.index);
    parts
}

impl Backend for CpuBackend {
    type Tensor = [f32];

    fn config(&self) -> &KvConfig {
        &self.config
    }

    fn elements(tensor: &[f32]) -> usize {
        tensor.len()
    }

    fn admit(&mut self, request: RequestId, plan: RequestPlan) -> Result<RequestPlan> {
        let Self { config, tiers: Tiers { pool, arena, .. }, requests } = self;
        let plan = plan.fit(pool.free_pages(), pool.limit())?;
        let summaries: Vec<_> =
            (0..plan.rows).map(|_| Row::reserve_summaries(config, &plan)).collect::<Result<_>>()?;
        let mut slabs = arena.take(plan.host_slabs())?;
        let mut pages = match pool.take(plan.gpu_pages()) {
            Ok(pages) => pages,
            Err(error) => {
                slabs.into_iter().for_each(|slab| arena.give_back(slab));
                return Err(error);
            }
        };
        let row = |summaries| {
            let pages = pages.split_off(pages.len() - plan.row.gpu_pages());
            let slabs = slabs.split_off(slabs.len() - plan.row.host_slabs);
            Row::new(config, &plan, summaries, pages, slabs)
        };
        requests.insert(request, summaries.into_iter().map(row).collect());
        Ok(plan)
    }

    fn release(&mut self, request: RequestId) {
        for row in self.requests.remove(&request).into_iter().flatten() {
            row.host().slabs().iter().for_each(|slab| self.tiers.arena.give_back(*slab));
            self.tiers.pool.give_back(row.pages());
        }
    }

    fn index(&mut self, step: &Step<'_>, keys: &[f32]) -> Result<()> {
        let Self { config, tiers: Tiers { pool, .. }, requests } = self;
        // Most decode steps index nothing: not worth waking threads for.
        let partitions = |tokens| config.retrievable_partitions(tokens).len();
        let grows = |entry: &StepEntry| partitions(entry.after()) > partitions(entry.before);
        if config.summary_width() > 0 && step.entries.iter().any(grows) {
            let shape = config.shape();
            parts(requests, shape, step).into_par_iter().for_each(|part| {
                let keys = part.new_tokens(shape, keys);
                part.row.index(config, pool, part.place, &part.entry, keys);
            });
        }
        Ok(())
    }

    fn offload(&mut self, step: &Step<'_>, keys: &[f32], values: &[f32]) -> Result<()> {
        let Self { config, tiers, requests } = self;
        let shape = config.shape();
        for part in parts(requests, shape, step) {
            let (keys, values) = (part.new_tokens(shape, keys), part.new_tokens(shape, values));
            part.row.offload(config, tiers, &part.entry, keys, values);
        }
        Ok(())
    }

    fn select(&mut self, step: &Step<'_>, queries: &[f32]) -> Result<()> {
        let Self { config, requests, .. } = self;
        let shape = config.shape();
        parts(requests, shape, step).into_par_iter().try_for_each(|part| {
            let queries = part.last_queries(shape, queries);
            part.row.select(config, part.place, &part.entry, queries)
        })
    }

    fn retrieve(&mut self, step: &Step<'_>) -> Result<()> {
        let Self { config, tiers, requests } = self;
        let shape = config.shape();
        parts(requests, shape, step)
            .into_iter()
            .try_for_each(|part| part.row.retrieve(config, tiers, &part.entry))
    }

    fn attend(&mut self, step: &Step<'_>, queries: &[f32], out: &mut [f32]) -> Result<()> {
        let Self { config, tiers: Tiers { pool, .. }, requests } = self;
        let shape = config.shape();
        let width = shape.group() * shape.head_dim;
        parts(requests, shape, step).into_par_iter().zip(out.par_chunks_mut(width)).for_each(
            |(part, out)| {
                let listed = part.row.listed().iter();
                let pages: Vec<(&[Word], usize)> =
                    listed.map(|(page, tokens)| (pool.page(*page), *tokens as usize)).collect();
                attend(part.last_queries(shape, queries), &pages, config.layout(), out);
            },
        );
        Ok(())
    }

    fn attend_prompt(
        &mut self,
        chunk: &PromptChunk,
        queries: &[f32],
        keys: &[f32],
        values: &[f32],
        out: &mut [f32],
    ) -> Result<()> {
        attend_prompt(self.config.shape(), chunk, queries, keys, values, out);
        Ok(())
    }

    fn counters(&self) -> Counters {
        self.tiers.counters
    }

    fn usage(&self) -> MemoryUsage {
        let page_bytes = self.config.layout().page_bytes() as u64;
        let mut usage = MemoryUsage {
            gpu_pages_bytes: self.tiers.pool.used_pages() as u64 * page_bytes,
            host_pages_bytes: self.tiers.arena.used_slabs() as u64 * self.tiers.arena.slab_bytes(),
            ..MemoryUsage::default()
        };
        for row in self.requests.values().flatten() {
            usage.gpu_tables_bytes += row.gpu_table_bytes() as u64;
            usage.gpu_summaries_bytes += row.summary_bytes() as u64;
            usage.host_tables_bytes += row.host().bytes() as u64;
        }
        usage
    }
}
