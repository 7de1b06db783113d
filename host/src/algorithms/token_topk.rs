use crate::partition::PartitionKind;
use crate::pipeline::{Budget, GroupMerge, Index, Method, PartitionScore, Select, SteadyZone};

/// Exact top-k over single tokens: every key is scored, by the softmax of its dot products with the query heads, the heads of a GQA
/// group are merged by their maximum, and the tokens with the most weight are selected. What other methods estimate from summaries,
/// this one knows: the yardstick of how few tokens are enough.
///
/// The summary of a token is its key, so the GPU keeps a copy of all keys and scans it in every step. Memory moves whole pages, and
/// attention reads all tokens of a page that is fetched; the budget counts the selected tokens alone. In the worst case each lies on a
/// page of its own: a step can then read as many pages as the budget has tokens, which is what a request is
/// [charged](crate::memory::RowPlan::mandatory_pages).
#[derive(Clone, Copy, Debug)]
pub struct TokenTopK {
    /// How many tokens a step selects.
    pub budget: Budget,
    /// What it always reads.
    pub steady: SteadyZone,
}

impl Method for TokenTopK {
    fn name(&self) -> &str {
        "token-topk"
    }

    fn partition(&self) -> PartitionKind {
        PartitionKind::Token
    }

    fn index(&self) -> Index<'_> {
        Index::MeanKey
    }

    fn select(&self) -> Select<'_> {
        Select::TopK { score: PartitionScore::DotProduct, merge: GroupMerge::Max, budget: self.budget }
    }

    fn steady(&self) -> SteadyZone {
        self.steady
    }
}
