use spinkv::KvConfig;

use crate::simulator::{Draw, Trace, TraceRow};

/// What a hit ratio is to be had by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct WantedHits {
    /// Hits among selected pages.
    pub ratio: f64,
    /// Pages that a row's cache has room for.
    pub slots: usize,
    /// Steps before hits are counted.
    pub warm_up: usize,
}

/// Selections that are drawn before the steps, for the rows of one request. Others select the same in other rows: each request has every row once, and no
/// two have the same one at the same place, as far as there are as many.
#[derive(Clone, Debug)]
pub struct DrawnSelections {
    trace: Trace,
    pace: f32,
    layers: usize,
    heads: usize,
    /// The KV head that is the first of these rows.
    first_head: usize,
    /// The id of partition 0 of the trace.
    first: u32,
}

impl DrawnSelections {
    /// Draws `steps` steps behind a context of `context` tokens, each of `count` partitions by their scores and of `fixed` ones that stay.
    pub fn new(
        kv: &KvConfig,
        context: usize,
        (count, fixed): (usize, usize),
        steps: usize,
        wanted: Option<WantedHits>,
        seed: u64,
    ) -> Self {
        let (shape, partition_tokens) = (kv.shape(), kv.partition_tokens());
        let draw = Draw {
            // What can be selected behind the prompt, and grows as the context does.
            context: kv.retrievable_partitions(context).len() * partition_tokens,
            partition_tokens,
            count,
            fixed,
            steps,
            layers: shape.layers,
            heads: shape.kv_heads,
        };
        let pace = wanted.map_or(1.0, |WantedHits { ratio, slots, warm_up }| {
            draw.pace_for(ratio, slots * kv.layout().page_tokens() / partition_tokens, warm_up, seed)
        });
        Self {
            trace: Trace::draw(&draw, pace, seed),
            pace,
            layers: shape.layers,
            heads: shape.kv_heads,
            first_head: 0,
            first: kv.retrievable_partitions(context).start,
        }
    }

    /// The same where KV head `first_head` is the first: a GPU's that has those from there on.
    pub fn from_head(&self, first_head: usize) -> Self {
        Self { first_head, ..self.clone() }
    }

    /// How fast they change: 1 as calibrated.
    pub fn pace(&self) -> f32 {
        self.pace
    }

    /// Steps that were drawn.
    pub fn steps(&self) -> usize {
        self.trace.steps()
    }

    /// The ids that a row selects in a step, ascending.
    pub fn ids(
        &self,
        request: usize,
        layer: usize,
        kv_head: usize,
        step: usize,
    ) -> impl ExactSizeIterator<Item = u32> {
        // 7 layers further for each request, and a head.
        let head = (self.first_head + kv_head + request) % self.heads;
        let layer = (layer + 7 * request) % self.layers;
        let row = &self.trace.rows[layer * self.heads + head];
        row.step(step).iter().map(|id| self.first + id)
    }

    /// The same by pages, as caches of `kv` hold them: the rows of one request.
    pub fn page_rows(&self, kv: &KvConfig) -> Vec<TraceRow> {
        let (map, mut pages) = (kv.partition_map(), Vec::new());
        let mut expand = |row: &TraceRow| {
            let last = self.first + row.keys();
            map.expand(&[last], &mut pages);
            let keys = pages.last().map_or(0, |page| page.key + 1);
            let mut by_pages = TraceRow::new(row.layer, row.head, keys);
            for ids in row.selections() {
                let ids: Vec<u32> = ids.iter().map(|id| self.first + id).collect();
                pages.clear();
                map.expand(&ids, &mut pages);
                by_pages.push(&pages.iter().map(|page| page.key).collect::<Vec<_>>());
            }
            by_pages
        };
        self.trace.rows.iter().map(&mut expand).collect()
    }
}
