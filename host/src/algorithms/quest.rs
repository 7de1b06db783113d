use super::OwnOptionsReader;
use crate::Result;
use crate::partition::PartitionKind;
use crate::pipeline::{Budget, GroupMerge, Index, Method, PartitionScore, Select, SteadyZone};

/// Tokens of a page in the paper.
const CHUNK_TOKENS: usize = 16;

/// Quest (arXiv 2406.10774): a chunk of 16 tokens, which the paper calls a page, is known by the least and the greatest of each
/// channel of its rotated keys; they bound the dot product of a query with any of the keys from above, and the chunks with the
/// greatest bounds are read.
///
/// The paper selects for each query head, in models without GQA. Here all query heads that share a KV head read the same chunks: their
/// bounds are merged as they are, and [`merge`](Self::merge) says how: maximum and sum answered equally many of the bundled needles (8 of 8 at 4K tokens
/// with budgets of 256 and 512, 3 of 4 at 16K with 256), so the maximum, which no quiet head can outvote, is the default. Its first two layers, which the paper leaves dense, select as
/// the others do.
#[derive(Clone, Copy, Debug)]
pub struct Quest {
    /// How much a step selects.
    pub budget: Budget,
    /// What it always reads.
    pub steady: SteadyZone,
    /// Tokens of a chunk, a multiple of a page's.
    pub chunk: usize,
    /// How the bounds of a GQA group's query heads become one.
    pub merge: GroupMerge,
}

impl Quest {
    /// Chunks of 16 tokens, of whose bounds the greatest counts.
    pub fn new(budget: Budget, steady: SteadyZone) -> Self {
        Self { budget, steady, chunk: CHUNK_TOKENS, merge: GroupMerge::Max }
    }

    /// With the options `chunk` (tokens) and `merge` (`max`, `sum` or `mean`) as a user gives them.
    ///
    /// # Errors
    /// [`Error::InvalidMethodOption`](crate::Error::InvalidMethodOption).
    pub fn with_options(mut self, own: &mut OwnOptionsReader<'_>) -> Result<Self> {
        self.chunk = own.take("chunk")?.unwrap_or(self.chunk);
        if self.chunk == 0 {
            return Err(own.invalid("chunk", "a chunk has at least 1 token"));
        }
        self.merge = own.take("merge")?.unwrap_or(self.merge);
        Ok(self)
    }
}

impl Method for Quest {
    fn name(&self) -> &str {
        "quest"
    }

    fn partition(&self) -> PartitionKind {
        PartitionKind::Chunk { tokens: self.chunk }
    }

    fn index(&self) -> Index<'_> {
        Index::KeyBounds
    }

    fn select(&self) -> Select<'_> {
        Select::TopK { score: PartitionScore::Bound, merge: self.merge, budget: self.budget }
    }

    fn steady(&self) -> SteadyZone {
        self.steady
    }
}
