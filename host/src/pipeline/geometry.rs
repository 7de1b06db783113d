use std::ops::Range;

use super::{Index, Method, Select, SteadyZone, Zones};
use crate::memory::PageLayout;
use crate::partition::PartitionMap;
use crate::{Error, Result};

/// The sizes that follow from a method and a page layout, checked once.
#[derive(Clone, Debug)]
pub struct Geometry {
    layout: PageLayout,
    steady: SteadyZone,
    partition_tokens: usize,
    zone_unit: usize,
    summary_width: usize,
    map: PartitionMap,
}

impl Geometry {
    /// Checks a method's numbers and works out its sizes.
    ///
    /// # Errors
    /// [`Error::WindowZero`], [`Error::InvalidBudget`], [`Error::BudgetBelowSteady`] and
    /// [`Error::PageSizeDoesNotDivide`] as its numbers deserve; [`Error::UnsupportedPartition`] for clusters,
    /// which no backend stores yet; [`Error::InvalidMethod`] if its Index does not make what its Select reads.
    pub fn new(layout: &PageLayout, method: &dyn Method) -> Result<Self> {
        let (steady, kind) = (method.steady(), method.partition());
        steady.check()?;
        let map = PartitionMap::new(kind, layout.page_tokens(), method.name())?;
        let Some(partition_tokens) = kind.tokens() else {
            let (method, kind) = (method.name().to_owned(), kind.to_string());
            return Err(Error::UnsupportedPartition { method, kind });
        };
        if let Some(budget) = method.select().budget() {
            budget.check(&steady)?;
        }
        let head_dim = layout.head_dim();
        let summary_width = match method.index() {
            Index::Nothing => 0,
            Index::MeanKey => head_dim,
            Index::Custom(operator) => operator.width(head_dim),
        };
        if matches!(method.select(), Select::TopK { .. }) && summary_width != head_dim {
            let reason = format!(
                "top-k takes summaries of head_dim {head_dim}, its Index makes {summary_width} elements"
            );
            return Err(Error::InvalidMethod { method: method.name().to_owned(), reason });
        }
        let zone_unit = kind.zone_unit(layout.page_tokens());
        Ok(Self { layout: *layout, steady, partition_tokens, zone_unit, summary_width, map })
    }

    /// The page layout.
    pub fn layout(&self) -> &PageLayout {
        &self.layout
    }

    /// Tokens of a partition.
    pub fn partition_tokens(&self) -> usize {
        self.partition_tokens
    }

    /// Elements of a summary; 0 without an Index.
    pub fn summary_width(&self) -> usize {
        self.summary_width
    }

    /// From partitions to pages.
    pub fn map(&self) -> &PartitionMap {
        &self.map
    }

    /// The zones of a row of `tokens` tokens.
    pub fn zones(&self, tokens: usize) -> Zones {
        Zones::at(tokens, &self.steady, self.zone_unit)
    }

    /// The ids of the partitions that can be selected at a length.
    pub fn retrievable_partitions(&self, tokens: usize) -> Range<u32> {
        let zones = self.zones(tokens);
        (zones.retrievable.start / self.partition_tokens) as u32
            ..(zones.retrievable.end / self.partition_tokens) as u32
    }

    /// The keys of the pages that can be selected at a length; all others are steady.
    pub fn retrievable_pages(&self, tokens: usize) -> Range<u32> {
        let zones = self.zones(tokens);
        let page_tokens = self.layout.page_tokens();
        (zones.retrievable.start / page_tokens) as u32..(zones.retrievable.end / page_tokens) as u32
    }

    /// The most pages that the steady zone holds at any length.
    pub fn max_steady_pages(&self) -> usize {
        self.steady.max_pages(self.zone_unit, self.layout.page_tokens())
    }
}
