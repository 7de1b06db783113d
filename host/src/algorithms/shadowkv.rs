use super::OwnOptionsReader;
use crate::Result;
use crate::partition::PartitionKind;
use crate::pipeline::{Always, Budget, GroupMerge, Index, Method, PartitionScore, Select, SteadyZone};

/// Tokens of a chunk, in the paper and in its published code.
const CHUNK_TOKENS: usize = 8;

/// ShadowKV (arXiv 2410.21465) as the Spin paper uses it: the landmark of a chunk of 8 tokens is the mean of
/// its rotated keys, each query head's landmark scores go through a softmax, the heads of a GQA group are
/// merged by their maximum, and the best chunks are read, keys and values. Of each prompt the chunks whose landmarks stand least for
/// their keys, its outliers, are read by every step, beside the budget.
///
/// Unlike the published code, generated tokens join the landmarks when they leave the local window. Its keys in low rank are [`LowRankKeys`](super::LowRankKeys) of this method.
#[derive(Clone, Copy, Debug)]
pub struct ShadowKv {
    /// How much a step selects.
    pub budget: Budget,
    /// What it always reads.
    pub steady: SteadyZone,
    /// Outlier chunks of each row; 0 for none.
    pub outliers: usize,
}

impl ShadowKv {
    /// With [as many outliers](Self::outliers_of) as the budget wants.
    pub fn new(budget: Budget, steady: SteadyZone) -> Self {
        Self { budget, steady, outliers: Self::outliers_of(budget) }
    }

    /// Outlier chunks of the published code: 48, the constant of its reference, or in proportion to the budget if that is more: 24 for each 1,024
    /// tokens. With fewer, small budgets lose what the outliers hold.
    pub fn outliers_of(budget: Budget) -> usize {
        match budget {
            Budget::Tokens(tokens) => ((tokens as f64 * 24.0 / 1024.0) as usize).max(48),
            Budget::Fraction(_) => 48,
        }
    }

    /// With the option `outliers` (chunks of each row) as a user gives it.
    ///
    /// # Errors
    /// [`Error::InvalidMethodOption`](crate::Error::InvalidMethodOption).
    pub fn with_options(mut self, own: &mut OwnOptionsReader<'_>) -> Result<Self> {
        self.outliers = own.take("outliers")?.unwrap_or(self.outliers);
        Ok(self)
    }
}

impl Method for ShadowKv {
    fn name(&self) -> &str {
        "shadowkv"
    }

    fn partition(&self) -> PartitionKind {
        PartitionKind::Chunk { tokens: CHUNK_TOKENS }
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

    fn always(&self) -> Always {
        Always::Outliers { partitions: self.outliers }
    }
}
