use std::ops::Range;
use std::sync::Arc;

use spinkv_kernels::abi::cluster::{max_clusters, max_pages};

use crate::memory::{HostFormat, HostLayout, PageLayout, SLAB_PAGES};
use crate::paging::SEGMENT_KEYS;
use crate::partition::{CLUSTER_RUN_UNIT, PartitionKind, PartitionMap};
use crate::pipeline::{
    Budget, Index, KeyStore, LowRank, Method, Place, Reach, Select, SteadyZone, ZoneUnit, Zones,
};
use crate::{Error, KvShape, Result};

/// A model's attention shape, a page layout and a method that fit together, and the sizes that follow from
/// them.
#[derive(Clone, Debug)]
pub struct KvConfig {
    shape: KvShape,
    pages: HostLayout,
    method: Arc<dyn Method>,
    steady: SteadyZone,
    partition_tokens: usize,
    zone_unit: ZoneUnit,
    summary_width: usize,
    low_rank: Option<LowRank>,
    map: PartitionMap,
    /// `[layers, kv_heads]`.
    reaches: Vec<Reach>,
}

/// Rows of a request, by how far they reach.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RowsByReach {
    /// [`Reach::Selected`].
    pub selected: usize,
    /// [`Reach::Everything`].
    pub everything: usize,
    /// [`Reach::Steady`].
    pub steady: usize,
}

impl KvConfig {
    /// Checks that the parts fit together and works out their sizes. `pages` is a [`PageLayout`], or what the host holds of one.
    ///
    /// # Errors
    /// [`Error::InvalidLayout`] for pages of another head width than the shape's; [`Error::WindowZero`],
    /// [`Error::SteadyZoneTooLarge`], [`Error::InvalidBudget`], [`Error::BudgetBelowSteady`] and
    /// [`Error::PageSizeDoesNotDivide`] as the method's numbers deserve; [`Error::InvalidMethod`] if a method's Index does not make what its
    /// Select reads or its partitions are, or if it does not fit the shape; [`Error::KeyRank`] and [`Error::GateRotary`] for keys in a rank, or with
    /// a rotary embedding, that the shape does not have; [`Error::InvalidMethod`] for [coded](HostFormat::Coded) pages of a method that keeps keys in
    /// low rank or makes clusters, and for [values](HostFormat::Values) alone of any other.
    pub fn new(shape: KvShape, pages: impl Into<HostLayout>, method: Arc<dyn Method>) -> Result<Self> {
        let pages = pages.into();
        let layout = *pages.page();
        let head_dim = layout.head_dim();
        if head_dim != shape.head_dim {
            let reason =
                format!("pages for head_dim {head_dim} under a shape of head_dim {}", shape.head_dim);
            return Err(Error::InvalidLayout { reason });
        }
        method.check(&shape)?;
        let (steady, kind) = (method.steady(), method.partition());
        steady.check()?;
        let map = PartitionMap::new(kind, layout.page_tokens(), method.name())?;
        let partition_tokens = kind.tokens(layout.page_tokens());
        if let Some(budget) = method.select().budget() {
            budget.check(&steady)?;
        }
        let summary_width = method.index().width(head_dim);
        let invalid = |reason: String| Error::InvalidMethod { method: method.name().to_owned(), reason };
        match method.select() {
            Select::TopK { score, .. } => {
                let read = score.summary_width(head_dim);
                if summary_width != read {
                    return Err(invalid(format!(
                        "its Select ({score:?}) reads summaries of {read} elements, its Index makes {summary_width}"
                    )));
                }
            }
            _ if method.always().partitions() > 0 => {
                return Err(invalid(format!(
                    "{:?} are read beside the best ones: of top-k alone",
                    method.always()
                )));
            }
            _ => {}
        }
        check_clusters(&*method).map_err(invalid)?;
        let low_rank = check_keys(&*method, &shape)?;
        let clusters = matches!(kind, PartitionKind::Cluster { .. });
        if pages.code().is_some() && (low_rank.is_some() || clusters) {
            let beside = if clusters { "partitions that are clusters" } else { "keys in low rank" };
            return Err(invalid(format!("host pages in {} beside {beside}", pages.format())));
        }
        let pages = match (low_rank.is_some(), pages.format()) {
            (true, _) => pages.values(),
            (false, HostFormat::Values) => {
                return Err(invalid("values alone on the host, keys nowhere".to_owned()));
            }
            (false, _) => pages,
        };
        let zone_unit = kind.zone_unit(layout.page_tokens());
        let places = (0..shape.layers)
            .flat_map(|layer| (0..shape.kv_heads).map(move |kv_head| Place { layer, kv_head }));
        let reaches = places.map(|place| method.reach(place)).collect();
        Ok(Self {
            shape,
            pages,
            method,
            steady,
            partition_tokens,
            zone_unit,
            summary_width,
            low_rank,
            map,
            reaches,
        })
    }

    /// The attention shape.
    pub fn shape(&self) -> &KvShape {
        &self.shape
    }

    /// The page layout.
    pub fn layout(&self) -> &PageLayout {
        self.pages.page()
    }

    /// What a page's host page holds of it.
    pub fn host_layout(&self) -> HostLayout {
        self.pages
    }

    /// How keys are kept in low rank, if they are.
    pub fn low_rank(&self) -> Option<&LowRank> {
        self.low_rank.as_ref()
    }

    /// The method.
    pub fn method(&self) -> &dyn Method {
        &*self.method
    }

    /// The method, to be used elsewhere too.
    pub(crate) fn shared_method(&self) -> Arc<dyn Method> {
        self.method.clone()
    }

    /// Whether partitions are clusters.
    pub fn clusters(&self) -> bool {
        matches!(self.method.partition(), PartitionKind::Cluster { .. })
    }

    /// The most tokens of a partition; those of clusters may have fewer.
    pub fn partition_tokens(&self) -> usize {
        self.partition_tokens
    }

    /// Elements of a summary; 0 without an Index.
    pub fn summary_width(&self) -> usize {
        self.summary_width
    }

    /// How far a row reaches.
    ///
    /// # Panics
    /// For a place that the shape does not have.
    pub fn reach(&self, place: Place) -> Reach {
        assert!(place.kv_head < self.shape.kv_heads, "{place:?} of {:?}", self.shape);
        self.reaches[place.layer * self.shape.kv_heads + place.kv_head]
    }

    /// How far the rows of a request reach, `[layers, kv_heads]`.
    pub fn reaches(&self) -> &[Reach] {
        &self.reaches
    }

    /// A request's rows, by how far they reach.
    pub fn rows_by_reach(&self) -> RowsByReach {
        let count = |reach| self.reaches.iter().filter(|of_row| **of_row == reach).count();
        RowsByReach {
            selected: count(Reach::Selected),
            everything: count(Reach::Everything),
            steady: count(Reach::Steady),
        }
    }

    /// From partitions to pages.
    pub fn partition_map(&self) -> &PartitionMap {
        &self.map
    }

    /// The most partitions that a step of a request of up to `max_tokens` tokens selects: the budget's and those that are
    /// [always](Method::always) read, as far as there are as many.
    pub fn max_selected(&self, max_tokens: usize) -> usize {
        let selectable = self.retrievable_partitions(max_tokens).len();
        match self.method.select() {
            Select::Nothing => 0,
            Select::Everything => selectable,
            Select::TopK { budget, .. } | Select::Custom { budget, .. } => {
                let most = budget.partitions(max_tokens, self.partition_tokens);
                let best = if self.clusters() {
                    // As many as the longest row has of which everything is selected.
                    most.max(self.cluster_pages(most.saturating_mul(self.partition_tokens).min(max_tokens)))
                } else {
                    most
                };
                best.saturating_add(self.method.always().partitions()).min(selectable)
            }
        }
    }

    /// The most partitions that a step at a length of `tokens` picks by their scores. A budget that has room for the whole zone has it for all
    /// partitions, also for clusters, which need not fill theirs.
    pub fn budget_partitions(&self, budget: Budget, tokens: usize) -> usize {
        let most = budget.partitions(tokens, self.partition_tokens);
        let zone = self.zones(tokens).retrievable.len();
        if most.saturating_mul(self.partition_tokens) >= zone {
            most.max(self.retrievable_partitions(tokens).len())
        } else {
            most
        }
    }

    /// Bytes that a row's partitions of one segment have, with `element_bytes` for an element of a summary or of a mean value: summaries, and of clusters
    /// mean values and, in four bytes each, tokens.
    pub fn summary_bytes(&self, element_bytes: usize) -> usize {
        let of_cluster =
            if self.clusters() { self.layout().head_dim() * element_bytes + size_of::<u32>() } else { 0 };
        self.segment_partitions() * (self.summary_width * element_bytes + of_cluster)
    }

    /// Elements that a row's partitions of one segment have on the CPU: summaries, `[partitions, width]`; of clusters then mean values,
    /// `[partitions, head_dim]`, and tokens, `[partitions]`.
    pub fn summary_elements(&self) -> usize {
        let of_clusters = if self.clusters() { self.layout().head_dim() + 1 } else { 0 };
        self.segment_partitions() * (self.summary_width + of_clusters)
    }

    /// Elements of a request's basis of keys in low rank, `[layers, kv_heads, rank, head_dim]`; 0 for keys that are kept in full.
    pub fn basis_elements(&self) -> usize {
        let KvShape { layers, kv_heads, head_dim, .. } = self.shape;
        self.low_rank.as_ref().map_or(0, |low_rank| layers * kv_heads * low_rank.rank * head_dim)
    }

    /// Elements of the coefficients of a segment's tokens, `[layers, tokens, rank]`; 0 for keys that are kept in full.
    pub fn coefficient_elements(&self) -> usize {
        let tokens = SEGMENT_KEYS * self.layout().page_tokens();
        self.low_rank.as_ref().map_or(0, |low_rank| self.shape.layers * tokens * low_rank.rank)
    }

    /// Words of 32 bits that say which partitions of a row of up to `max_tokens` tokens are [always](Method::always) read: bit
    /// `i % 32` of word `i / 32` for the `i`-th that can be selected. 0 for methods without such ones.
    pub fn mark_words(&self, max_tokens: usize) -> usize {
        match self.method.always().partitions() {
            0 => 0,
            _ => self.retrievable_partitions(max_tokens).len().div_ceil(32),
        }
    }

    /// The zones of a row of `tokens` tokens.
    pub fn zones(&self, tokens: usize) -> Zones {
        Zones::at(tokens, &self.steady, self.zone_unit)
    }

    /// The ids of the partitions that can be selected at a length; of clusters a row has this many at most, from the first on.
    pub fn retrievable_partitions(&self, tokens: usize) -> Range<u32> {
        if self.clusters() {
            self.retrievable_pages(tokens)
        } else {
            self.left(tokens, self.partition_tokens)
        }
    }

    /// The keys of the pages that can be selected at a length; of clusters, whose pages have keys of their own, a row has this many at most.
    pub fn retrievable_pages(&self, tokens: usize) -> Range<u32> {
        if self.clusters() {
            0..self.cluster_pages(self.zones(tokens).retrievable.len()) as u32
        } else {
            self.left_pages(tokens)
        }
    }

    /// The pages of the sequence that have left the steady zone at a length; all others are steady.
    pub fn left_pages(&self, tokens: usize) -> Range<u32> {
        self.left(tokens, self.layout().page_tokens())
    }

    /// The most pages of a row's clusters of `tokens` tokens, in whatever runs they came.
    fn cluster_pages(&self, tokens: usize) -> usize {
        let tokens = tokens as u32;
        if tokens == 0 {
            return 0;
        }
        max_pages(tokens, max_clusters(tokens), self.layout().page_tokens() as u32) as usize
    }

    /// The tokens that leave the steady zone as a row grows from `before` tokens to `after`: whole pages and partitions.
    pub fn leaving_tokens(&self, before: usize, after: usize) -> Range<usize> {
        let (before, after) = (self.zones(before).retrievable, self.zones(after).retrievable);
        before.end.max(after.start)..after.end
    }

    /// The most pages that the steady zone holds at any length.
    pub fn max_steady_pages(&self) -> usize {
        self.steady.max_pages(self.zone_unit, self.layout().page_tokens())
    }

    /// Pages of the sinks, where the steady zone has as many.
    pub fn sink_pages(&self) -> usize {
        self.steady.sinks.next_multiple_of(self.zone_unit.sinks) / self.layout().page_tokens()
    }

    /// Segments that a row of `tokens` tokens needs: those of all pages that can be selected.
    pub fn segments(&self, tokens: usize) -> usize {
        let pages = self.retrievable_pages(tokens);
        if pages.is_empty() { 0 } else { (pages.end as usize).div_ceil(SEGMENT_KEYS) }
    }

    /// Partitions whose summaries one segment has room for: those that begin on its pages.
    pub fn segment_partitions(&self) -> usize {
        (SEGMENT_KEYS * self.layout().page_tokens()).div_ceil(self.partition_tokens)
    }

    /// Host slabs that a row of `tokens` tokens needs: pages that are not full yet are on the GPU alone, and so is the steady zone beside clusters.
    pub fn host_slabs(&self, tokens: usize) -> usize {
        let pages = if self.clusters() {
            self.retrievable_pages(tokens).len()
        } else {
            tokens / self.layout().page_tokens()
        };
        pages.div_ceil(SLAB_PAGES)
    }

    fn left(&self, tokens: usize, unit: usize) -> Range<u32> {
        let Range { start, end } = self.zones(tokens).retrievable;
        (start / unit) as u32..(end / unit) as u32
    }
}

/// How a method keeps keys in low rank, if it does: whether that fits the shape.
fn check_keys(method: &dyn Method, shape: &KvShape) -> Result<Option<LowRank>> {
    let KeyStore::LowRank(low_rank) = method.keys() else { return Ok(None) };
    let (limit, found) = (shape.kv_heads * shape.head_dim, low_rank.rotary.head_dim());
    if !(1..=limit).contains(&low_rank.rank) {
        return Err(Error::KeyRank { rank: low_rank.rank, limit });
    }
    if found != shape.head_dim {
        return Err(Error::GateRotary { of: "the model", expected: shape.head_dim, found });
    }
    if let kind @ PartitionKind::Cluster { .. } = method.partition() {
        // Their pages are not of the sequence, so there is no position to turn to.
        let reason = format!("keys in low rank, its partitions are {kind}");
        return Err(Error::InvalidMethod { method: method.name().to_owned(), reason });
    }
    Ok(Some(low_rank))
}

/// Whether a method's clusters go together with the rest of it; says why not.
fn check_clusters(method: &dyn Method) -> std::result::Result<(), String> {
    let (clusters, estimated) = (matches!(method.index(), Index::Clusters), method.estimated());
    match method.partition() {
        PartitionKind::Cluster { .. } if !clusters => {
            Err("its partitions are clusters, its Index makes none".to_owned())
        }
        PartitionKind::Cluster { run } if run == 0 || !run.is_multiple_of(CLUSTER_RUN_UNIT) => {
            Err(format!("clusters of {run} tokens at a time: a multiple of {CLUSTER_RUN_UNIT}"))
        }
        PartitionKind::Cluster { .. } if !(0.0..=1.0).contains(&estimated) => {
            Err(format!("{estimated} of the partitions are estimated: from 0 to 1"))
        }
        PartitionKind::Cluster { .. } => Ok(()),
        kind if clusters => Err(format!("its Index makes clusters, its partitions are {kind}")),
        kind if estimated != 0.0 => Err(format!("only clusters can be estimated, its partitions are {kind}")),
        _ => Ok(()),
    }
}
