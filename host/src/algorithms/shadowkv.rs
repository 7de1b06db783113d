use crate::partition::PartitionKind;
use crate::pipeline::{Budget, GroupMerge, Index, Method, Select, SteadyZone};

/// Tokens of a chunk, in the paper and in its published code.
const CHUNK_TOKENS: usize = 8;

/// ShadowKV (arXiv 2410.21465) as the Spin paper uses it: the landmark of a chunk of 8 tokens is the mean of
/// its rotated keys, each query head's landmark scores go through a softmax, the heads of a GQA group are
/// merged by their maximum, and the best chunks are read, keys and values.
///
/// Unlike the published code, generated tokens join the landmarks when they leave the local window. Its
/// low-rank keys and outlier chunks are not here.
#[derive(Clone, Copy, Debug)]
pub struct ShadowKv {
    /// How much a step selects.
    pub budget: Budget,
    /// What it always reads.
    pub steady: SteadyZone,
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
        Select::TopK { merge: GroupMerge::Max, budget: self.budget }
    }

    fn steady(&self) -> SteadyZone {
        self.steady
    }
}
