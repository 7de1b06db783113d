//! The method: what it is, and what it does on the CPU.

use spinkv::Result;
use spinkv::backend::cpu::{Wish, choose, score};
use spinkv::backend::cuda::operators::{LoadIndex, LoadSelect, OperatorSizes};
use spinkv::partition::PartitionKind;
use spinkv::pipeline::{
    Budget, Candidates, GroupMerge, Index, Method, Partition, Pick, Select, SteadyZone, Summarize,
};
use spinkv_kernels::abi::select::WEIGHT_OF_ONE;

use crate::gpu;

/// A chunk of 16 tokens is known by its key that is farthest from the origin, and a query reads the fewest chunks that have a part of the softmax of
/// all between them, as far as the budget goes.
#[derive(Clone, Copy, Debug)]
pub struct Farthest {
    /// The part of the softmax that is wanted, above 0 and up to 1.
    pub share: f32,
    /// The most tokens that a step selects.
    pub budget: Budget,
}

impl Method for Farthest {
    fn name(&self) -> &str {
        "farthest"
    }

    fn partition(&self) -> PartitionKind {
        PartitionKind::Chunk { tokens: 16 }
    }

    fn index(&self) -> Index<'_> {
        Index::Custom(self)
    }

    fn select(&self) -> Select<'_> {
        Select::Custom { picker: self, budget: self.budget }
    }

    fn steady(&self) -> SteadyZone {
        SteadyZone { sinks: 4, window: 32 }
    }
}

impl Summarize for Farthest {
    fn width(&self, head_dim: usize) -> usize {
        head_dim
    }

    fn summarize(&self, partition: &Partition<'_>, summary: &mut [f32]) {
        let square = |key: &[f32]| key.iter().map(|element| element * element).sum::<f32>();
        let keys = partition.keys.chunks_exact(partition.head_dim);
        // Of equal ones the first.
        let farthest = keys.reduce(|a, b| if square(b) > square(a) { b } else { a });
        summary.copy_from_slice(farthest.expect("a partition has a token"));
    }

    fn on_gpu<'a>(&'a self, sizes: &OperatorSizes) -> Result<Option<LoadIndex<'a>>> {
        gpu::index(sizes).map(Some)
    }
}

impl Pick for Farthest {
    fn pick(&self, candidates: &Candidates<'_>, ids: &mut Vec<u32>) {
        let Candidates { queries, head_dim, summaries, first, count, limit, .. } = *candidates;
        let (mut scores, mut logits) = (vec![0.0; count], vec![0.0; count]);
        score(queries, summaries, head_dim, GroupMerge::Sum, &mut scores, &mut logits);
        let wish = Wish { k: limit, top_p: self.share, ..Wish::default() };
        // Whole numbers, as on a GPU, so that a sum does not depend on its order.
        let (best, _) = choose(&scores, &wish, |score| (score * WEIGHT_OF_ONE) as u64);
        ids.extend(best.iter().map(|id| first + id));
    }

    fn on_gpu<'a>(&'a self, _sizes: &OperatorSizes) -> Result<Option<LoadSelect<'a>>> {
        Ok(Some(gpu::select(self.share)))
    }
}
