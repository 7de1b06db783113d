#[cfg(all(feature = "cuda", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod gpu;

use std::ops::Range;
use std::sync::Arc;

use super::OwnOptionsReader;
use crate::backend::cpu::{Wish, choose, gate_key, gate_query, score};
use crate::gates::Gates;
use crate::partition::PartitionKind;
use crate::pipeline::{
    Budget, Candidates, GroupMerge, Index, Method, Partition, Pick, Select, SteadyZone, Summarize,
};
use crate::{Error, KvShape, Result};

/// Tokens of the blocks that the published gates, and the bundled ones, were trained with.
pub const TRAINED_BLOCK: usize = 64;

/// SeerAttention-R (arXiv 2506.08889): a learned gate scores blocks of keys. A block becomes one gate key, of the greatest, the least and the
/// mean of its keys before their rotary embedding; a group's queries become one gate query, so there is one score a KV head and nothing to
/// merge. Scores are the softmax of their scaled dot product over the blocks that may be selected, and the best are read, or those above a
/// threshold.
///
/// The published code always reads the first block and the query's own. Here the steady zone does: it has a sink at least, and it is rounded
/// outwards to whole blocks, so the first block and the one that the newest token stands in (and as many before it as the window reaches)
/// are never candidates and take no part in the softmax. Gate keys of generated blocks turn to the block's first token, as in training, where
/// the published code turns them to the last one.
///
/// Keys and queries come turned and are turned back at their positions. What is lost by that is the rounding of stored keys.
#[derive(Clone, Debug)]
pub struct SeerAttention {
    gates: Arc<Gates>,
    block: usize,
    threshold: Option<f32>,
    budget: Budget,
    steady: SteadyZone,
}

impl SeerAttention {
    /// The method with `gates`, on blocks of [`TRAINED_BLOCK`] tokens, without a threshold.
    pub fn new(gates: Arc<Gates>, budget: Budget, steady: SteadyZone) -> Self {
        Self { gates, block: TRAINED_BLOCK, threshold: None, budget, steady }
    }

    /// The same on blocks of `tokens` tokens: 16, 32 or 64.
    ///
    /// # Errors
    /// [`Error::InvalidMethod`] for others.
    pub fn with_block(self, tokens: usize) -> Result<Self> {
        if [16, 32, 64].contains(&tokens) {
            return Ok(Self { block: tokens, ..self });
        }
        let reason = format!("blocks of {tokens} tokens: 16, 32 or 64");
        Err(Error::InvalidMethod { method: self.name().to_owned(), reason })
    }

    /// The same that reads only blocks with a score of at least `threshold`, as far as the budget goes.
    ///
    /// # Errors
    /// [`Error::InvalidMethod`] for one outside of 0 to 1.
    pub fn with_threshold(self, threshold: f32) -> Result<Self> {
        if (0.0..=1.0).contains(&threshold) {
            return Ok(Self { threshold: Some(threshold), ..self });
        }
        let reason = format!("a threshold of {threshold}: scores are from 0 to 1");
        Err(Error::InvalidMethod { method: self.name().to_owned(), reason })
    }

    /// The method as a user's options have it: `block`, `threshold`.
    pub(super) fn from_options(
        gates: Arc<Gates>,
        budget: Budget,
        steady: SteadyZone,
        own: &mut OwnOptionsReader<'_>,
    ) -> Result<Self> {
        let mut method = Self::new(gates, budget, steady);
        if let Some(tokens) = own.take("block")? {
            method = method.with_block(tokens).map_err(|_| own.invalid("block", "16, 32 or 64"))?;
        }
        if let Some(threshold) = own.take("threshold")? {
            let refused = |_| own.invalid("threshold", "scores are from 0 to 1");
            method = method.with_threshold(threshold).map_err(refused)?;
        }
        Ok(method)
    }
}

impl Method for SeerAttention {
    fn name(&self) -> &str {
        super::SEER_ATTENTION
    }

    fn partition(&self) -> PartitionKind {
        PartitionKind::Chunk { tokens: self.block }
    }

    fn index(&self) -> Index<'_> {
        Index::Custom(self)
    }

    fn select(&self) -> Select<'_> {
        Select::Custom { picker: self, budget: self.budget }
    }

    /// With a sink at least, which is the first block.
    fn steady(&self) -> SteadyZone {
        SteadyZone { sinks: self.steady.sinks.max(1), ..self.steady }
    }

    fn of_heads(&self, heads: Range<usize>) -> Result<Option<Arc<dyn Method>>> {
        Ok(Some(Arc::new(Self { gates: Arc::new(self.gates.of_heads(heads)?), ..self.clone() })))
    }

    fn check(&self, shape: &KvShape) -> Result<()> {
        let made_for = self.gates.shape();
        if made_for == shape {
            return Ok(());
        }
        let reason = format!("gates for {made_for:?}, the model is {shape:?}");
        Err(Error::InvalidMethod { method: self.name().to_owned(), reason })
    }
}

/// A block's gate key.
impl Summarize for SeerAttention {
    fn width(&self, _head_dim: usize) -> usize {
        self.gates.rank()
    }

    fn summarize(&self, partition: &Partition<'_>, summary: &mut [f32]) {
        gate_key(&self.gates, partition.place, partition.first_token, partition.keys, summary);
    }

    #[cfg(all(feature = "cuda", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
    fn on_gpu<'a>(&'a self, sizes: &gpu::OperatorSizes) -> Result<Option<gpu::LoadIndex<'a>>> {
        gpu::index(self, sizes)
    }
}

/// The best blocks by the gate.
impl Pick for SeerAttention {
    fn pick(&self, candidates: &Candidates<'_>, ids: &mut Vec<u32>) {
        let Candidates { place, queries, position, summaries, first, count, limit, .. } = *candidates;
        let mut query = vec![0.0; self.gates.rank()];
        gate_query(&self.gates, place, position, queries, &mut query);
        let (mut scores, mut logits) = (vec![0.0; count], vec![0.0; count]);
        // Of one query the merge has nothing to do.
        score(&query, summaries, query.len(), GroupMerge::Max, &mut scores, &mut logits);
        let least = self.threshold.unwrap_or(f32::NEG_INFINITY);
        let (best, _) = choose(&scores, &Wish { k: limit, least, ..Wish::default() }, |_| 0);
        ids.extend(best.iter().map(|id| first + id));
    }

    #[cfg(all(feature = "cuda", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
    fn on_gpu<'a>(&'a self, sizes: &gpu::OperatorSizes) -> Result<Option<gpu::LoadSelect<'a>>> {
        gpu::select(self, sizes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rotary;
    use crate::gates::LayerGate;
    use crate::pipeline::Place;

    /// A head of 2 elements that never turns; a gate of 16, whose key is the mean of channel 0 and whose query is channel 0.
    fn method() -> SeerAttention {
        let shape = KvShape::new(1, 1, 1, 2).unwrap();
        let mut layer =
            LayerGate { query: vec![0.0; 16 * 2], key: vec![0.0; 16 * 6], ..LayerGate::default() };
        (layer.query[0], layer.key[4]) = (1.0, 1.0);
        let still = |head_dim: usize| Rotary::new(vec![0.0; head_dim / 2], 1.0);
        let gates = Gates::new(shape, 16, still(2), still(16), vec![layer]).unwrap();
        SeerAttention::new(Arc::new(gates), Budget::Tokens(1024), SteadyZone { sinks: 0, window: 1 })
    }

    fn picked(method: &SeerAttention, limit: usize) -> Vec<u32> {
        // Gate keys 0, 4, 8, 4 and a query of 2: logits 0, 2, 4, 2, scores e^logit / sum.
        let mut summaries = vec![0.0; 4 * 16];
        (summaries[16], summaries[32], summaries[48]) = (4.0, 8.0, 4.0);
        let (place, first, count) = (Place { layer: 0, kv_head: 0 }, 10, 4);
        let (queries, position, head_dim) = (&[2.0, 9.0][..], 99, 2);
        let candidates =
            Candidates { place, queries, position, head_dim, summaries: &summaries, first, count, limit };
        let mut ids = vec![];
        method.pick(&candidates, &mut ids);
        ids
    }

    #[test]
    fn the_best_blocks_are_picked_within_budget_and_threshold() {
        let method = method();
        assert_eq!(picked(&method, 1), [12]);
        assert_eq!(picked(&method, 2), [11, 12], "of equals the lower");
        assert_eq!(picked(&method, 4), [10, 11, 12, 13]);
        let (e2, e4) = (2f32.exp(), 4f32.exp());
        let share = e2 / (1.0 + 2.0 * e2 + e4);
        let above = |threshold| picked(&method.clone().with_threshold(threshold).unwrap(), 3);
        assert_eq!(above(share * 0.99), [11, 12, 13]);
        assert_eq!(above(share * 1.01), [12]);
        assert_eq!(above(1.0), [0; 0]);
    }

    #[test]
    fn summaries_are_gate_keys_and_the_first_block_is_steady() {
        let method = method();
        let mut summary = [f32::NAN; 16];
        let keys: Vec<f32> = (0..128).map(|i| if i % 2 == 0 { i as f32 / 2.0 } else { -1.0 }).collect();
        let partition =
            Partition { place: Place { layer: 0, kv_head: 0 }, first_token: 64, head_dim: 2, keys: &keys };
        method.summarize(&partition, &mut summary);
        assert_eq!((method.width(2), summary[0], summary[1]), (16, 31.5, 0.0));
        assert_eq!(method.steady(), SteadyZone { sinks: 1, window: 1 });
    }

    #[test]
    fn what_it_cannot_be_is_refused() {
        let method = method();
        for tokens in [0, 8, 48, 128] {
            let refused = method.clone().with_block(tokens).unwrap_err();
            assert!(
                matches!(&refused, Error::InvalidMethod { reason, .. } if reason.contains("16, 32 or 64"))
            );
        }
        for threshold in [-0.1, 1.1, f32::NAN] {
            let refused = method.clone().with_threshold(threshold).unwrap_err();
            assert!(matches!(refused, Error::InvalidMethod { .. }), "{threshold}");
        }
        let other = KvShape::new(2, 1, 1, 2).unwrap();
        let refused = method.check(&other).unwrap_err();
        assert!(matches!(&refused, Error::InvalidMethod { reason, .. } if reason.contains("layers: 2")));
    }
}
