use super::OwnOptionsReader;
use crate::Result;
use crate::partition::{CLUSTER_RUN_UNIT, PartitionKind};
use crate::pipeline::{Budget, GroupMerge, Index, Method, PartitionScore, Select, SteadyZone};

/// Tokens that become clusters at a time, of what is generated.
const UPDATE_TOKENS: usize = 256;

/// The share of clusters that is estimated in the published configurations: 0.25, less the 0.018 that are read.
const ESTIMATED: f32 = 0.232;

/// RetroInfer (arXiv 2505.02922): keys are put into clusters of 16 tokens on average, each query head's scores of their mean keys go through a softmax, the
/// heads of a GQA group are added up, the best clusters are read, and the next best are estimated by their mean keys and mean values.
///
/// Unlike in the published code, a partition is one page of a cluster, with means of its own: so no cluster is too large for a cache, a large one
/// is read as far as it is worth it, and an estimate is never above what it stands for. Generated tokens join the clusters 256 at a time instead of 1,024, so fewer of
/// them are read in each step beside the budget; the prompt's last tokens, up to that number, do so too.
#[derive(Clone, Copy, Debug)]
pub struct RetroInfer {
    /// How much a step reads: as many pages of clusters as fit if all were full.
    pub budget: Budget,
    /// What it always reads.
    pub steady: SteadyZone,
    /// The share of partitions that is estimated: 0 for none, 1 for all that are not read.
    pub estimated: f32,
    /// Tokens that become clusters at a time: a multiple of [`CLUSTER_RUN_UNIT`].
    pub update: usize,
}

impl RetroInfer {
    /// The method as published, but for its smaller updates.
    pub fn new(budget: Budget, steady: SteadyZone) -> Self {
        Self { budget, steady, estimated: ESTIMATED, update: UPDATE_TOKENS }
    }

    /// With the options `estimated` (a share of the partitions) and `update` (tokens) as a user gives them.
    ///
    /// # Errors
    /// [`Error::InvalidMethodOption`](crate::Error::InvalidMethodOption).
    pub fn with_options(mut self, own: &mut OwnOptionsReader<'_>) -> Result<Self> {
        if let Some(estimated) = own.take("estimated")? {
            if !(0.0..=1.0).contains(&estimated) {
                return Err(own.invalid("estimated", "a share of the partitions is from 0 to 1"));
            }
            self.estimated = estimated;
        }
        if let Some(update) = own.take::<usize>("update")? {
            if update == 0 || !update.is_multiple_of(CLUSTER_RUN_UNIT) {
                let reason = format!("a multiple of {CLUSTER_RUN_UNIT} tokens");
                return Err(own.invalid("update", &reason));
            }
            self.update = update;
        }
        Ok(self)
    }
}

impl Method for RetroInfer {
    fn name(&self) -> &str {
        "retroinfer"
    }

    fn partition(&self) -> PartitionKind {
        PartitionKind::Cluster { run: self.update }
    }

    fn index(&self) -> Index<'_> {
        Index::Clusters
    }

    fn select(&self) -> Select<'_> {
        Select::TopK { score: PartitionScore::DotProduct, merge: GroupMerge::Sum, budget: self.budget }
    }

    fn steady(&self) -> SteadyZone {
        self.steady
    }

    fn estimated(&self) -> f32 {
        self.estimated
    }
}
