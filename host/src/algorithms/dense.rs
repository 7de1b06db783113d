use crate::partition::PartitionKind;
use crate::pipeline::{Index, Method, Select, SteadyZone};

/// Every token, every step: the exact answer, and the yardstick of the others.
///
/// It goes through the same pages and tables as they do, with a cache that holds the whole context.
#[derive(Clone, Copy, Debug, Default)]
pub struct Dense {
    /// What stays outside the cache.
    pub steady: SteadyZone,
}

impl Method for Dense {
    fn name(&self) -> &str {
        "dense"
    }

    /// Tokens, so that any page size will do.
    fn partition(&self) -> PartitionKind {
        PartitionKind::Token
    }

    fn index(&self) -> Index<'_> {
        Index::Nothing
    }

    fn select(&self) -> Select<'_> {
        Select::Everything
    }

    fn steady(&self) -> SteadyZone {
        self.steady
    }
}
