use std::ops::Range;

use crate::pipeline::{Index, Select};
use crate::{Error, KvConfig, KvShape, Result};

/// One GPU's part of a model that is shared out by KV heads: that of rank `rank` of `ranks`. A rank has whole KV heads with the query heads
/// that share them, so all that is kept, selected and fetched of a row is one rank's, and no two ranks have to agree on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    rank: usize,
    ranks: usize,
}

impl Shard {
    /// All of a model.
    pub const WHOLE: Self = Self { rank: 0, ranks: 1 };

    /// The shards of `ranks` ranks, in their order; at least one.
    pub fn all(ranks: usize) -> impl ExactSizeIterator<Item = Self> + Clone {
        let ranks = ranks.max(1);
        (0..ranks).map(move |rank| Self { rank, ranks })
    }

    /// Its number, from 0.
    pub fn rank(self) -> usize {
        self.rank
    }

    /// How many there are.
    pub fn ranks(self) -> usize {
        self.ranks
    }

    /// Whether it is all there is.
    pub fn is_whole(self) -> bool {
        self.ranks == 1
    }

    /// Its part of `total` things that lie behind each other, of which every rank has as many; `what` names them.
    ///
    /// # Errors
    /// [`Error::Indivisible`].
    pub fn part(self, what: &'static str, total: usize) -> Result<Range<usize>> {
        let Self { rank, ranks } = self;
        if total == 0 || !total.is_multiple_of(ranks) {
            return Err(Error::Indivisible { what, value: total, ranks });
        }
        let each = total / ranks;
        Ok(rank * each..(rank + 1) * each)
    }
}

impl KvShape {
    /// The shape of a shard's part: its KV heads, and their query heads.
    ///
    /// # Errors
    /// [`Error::Indivisible`].
    pub fn shard(&self, shard: Shard) -> Result<Self> {
        let kv_heads = shard.part("kv_heads", self.kv_heads)?.len();
        Self::new(self.layers, kv_heads * self.group(), kv_heads, self.head_dim)
    }
}

impl KvConfig {
    /// What a shard has of it: the rows of its KV heads, which do as they do in the whole.
    ///
    /// # Errors
    /// [`Error::Indivisible`]; [`Error::Unshardable`] for keys in low rank, whose basis is of all KV heads together, and for a method with
    /// operators of its own that does not [say](crate::pipeline::Method::of_heads) what they are of some heads.
    pub fn shard(&self, shard: Shard) -> Result<Self> {
        if shard.is_whole() {
            return Ok(self.clone());
        }
        let shape = self.shape().shard(shard)?;
        let method = self.method();
        let refused = |what| Err(Error::Unshardable { method: method.name().to_owned(), what });
        if self.low_rank().is_some() {
            return refused("keys in low rank: their basis is of all KV heads together");
        }
        let heads = shard.part("kv_heads", self.shape().kv_heads)?;
        let method = match method.of_heads(heads)? {
            Some(method) => method,
            None if matches!(method.index(), Index::Custom(_))
                || matches!(method.select(), Select::Custom { .. }) =>
            {
                return refused("operators of its own, which do not say what they are of some KV heads");
            }
            None => self.shared_method(),
        };
        Self::new(shape, self.host_layout(), method)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::Rotary;
    use crate::algorithms::{Dense, HeadRule, LowRankKeys, PerRow, Quest, RowRules, SeerAttention, ShadowKv};
    use crate::gates::{Gates, LayerGate};
    use crate::memory::{KvDtype, PageLayout};
    use crate::partition::PartitionKind;
    use crate::pipeline::{Budget, Candidates, LowRank, Method, Pick, Place, Reach, SteadyZone};

    /// Picks by itself and says nothing of heads.
    #[derive(Debug)]
    struct Own;

    impl Method for Own {
        fn name(&self) -> &str {
            "own"
        }

        fn partition(&self) -> PartitionKind {
            PartitionKind::Chunk { tokens: 8 }
        }

        fn index(&self) -> Index<'_> {
            Index::Nothing
        }

        fn select(&self) -> Select<'_> {
            Select::Custom { picker: self, budget: Budget::Tokens(512) }
        }
    }

    impl Pick for Own {
        fn pick(&self, _: &Candidates<'_>, _: &mut Vec<u32>) {}
    }

    fn config(kv_heads: usize, method: Arc<dyn Method>) -> KvConfig {
        let shape = KvShape::new(2, 3 * kv_heads, kv_heads, 64).unwrap();
        KvConfig::new(shape, PageLayout::new(8, 64, KvDtype::Bf16).unwrap(), method).unwrap()
    }

    proptest! {
        #[test]
        fn shards_lie_behind_each_other_and_are_all(ranks in 1_usize..9, each in 1_usize..100) {
            let total = ranks * each;
            let parts: Vec<usize> = Shard::all(ranks)
                .flat_map(|shard| shard.part("rows", total).unwrap())
                .collect();
            prop_assert_eq!(parts, (0..total).collect::<Vec<_>>());
            for beyond in 1..ranks {
                let value = total + beyond;
                let refused = Error::Indivisible { what: "rows", value, ranks };
                prop_assert_eq!(Shard::all(ranks).last().unwrap().part("rows", value), Err(refused));
            }
        }

        #[test]
        fn rows_of_shards_reach_as_far_as_in_the_whole(
            ranks in 1_usize..4, heads in 1_usize..4, dense_layers in 0_usize..3,
            rules in prop::collection::vec((prop::option::of(0_usize..2), 0_usize..3), 0..4),
        ) {
            let kv_heads = ranks * heads;
            let rule = |&(layer, kv_head)| HeadRule { layer, kv_head: kv_head % kv_heads };
            let rules = RowRules { dense_layers, steady_heads: rules.iter().map(rule).collect() };
            let whole = config(kv_heads, Arc::new(PerRow::new(Arc::new(Dense::default()), rules)));
            for layer in 0..2 {
                let reaches: Vec<Reach> = Shard::all(ranks)
                    .flat_map(|shard| {
                        let shard = whole.shard(shard).unwrap();
                        (0..heads).map(move |kv_head| shard.reach(Place { layer, kv_head }))
                    })
                    .collect();
                let of_whole = (0..kv_heads).map(|kv_head| whole.reach(Place { layer, kv_head }));
                prop_assert_eq!(reaches, of_whole.collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn a_shard_has_its_heads_and_the_methods_numbers() {
        let whole = config(8, Arc::new(Quest::new(Budget::Tokens(512), SteadyZone::default())));
        for shard in Shard::all(4) {
            let part = whole.shard(shard).unwrap();
            assert_eq!(*part.shape(), KvShape::new(2, 6, 2, 64).unwrap());
            assert_eq!(part.method().name(), "quest");
            assert_eq!(part.max_selected(9000), whole.max_selected(9000));
            assert_eq!(part.host_slabs(9000), whole.host_slabs(9000));
        }
        let refused = Error::Indivisible { what: "kv_heads", value: 8, ranks: 3 };
        assert_eq!(whole.shard(Shard::all(3).next().unwrap()).unwrap_err(), refused);
    }

    #[test]
    fn gates_go_with_their_heads() {
        let shape = KvShape::new(1, 4, 4, 8).unwrap();
        let rotary = |width: usize| Rotary::new(vec![0.5; width / 2], 1.0);
        let counted = |elements: usize| (0..elements).map(|i| i as f32).collect::<Vec<_>>();
        let layer = LayerGate {
            query: counted(4 * 16 * 8),
            key: counted(4 * 16 * 24),
            query_norm: Some(counted(16)),
            key_norm: Some(counted(16)),
        };
        let gates = Gates::new(shape, 16, rotary(8), rotary(16), vec![layer]).unwrap();
        for shard in Shard::all(2) {
            let part = gates.of_heads(shard.part("kv_heads", 4).unwrap()).unwrap();
            for kv_head in 0..2 {
                let (own, whole) = (part.head(0, kv_head), gates.head(0, 2 * shard.rank() + kv_head));
                assert_eq!((own.query, own.key), (whole.query, whole.key));
                assert_eq!((own.query_norm, own.key_norm), (whole.query_norm, whole.key_norm));
            }
        }
        // The method takes its own heads' along, whatever is around it.
        let shape = KvShape { head_dim: 64, layers: 2, query_heads: 6, kv_heads: 2 };
        let layer = LayerGate {
            query: counted(2 * 16 * 3 * 64),
            key: counted(2 * 16 * 3 * 64),
            ..LayerGate::default()
        };
        let gates = Gates::new(shape, 16, rotary(64), rotary(16), vec![layer.clone(), layer]).unwrap();
        let seer = Arc::new(SeerAttention::new(
            Arc::new(gates),
            Budget::Tokens(512),
            SteadyZone { sinks: 4, window: 64 },
        ));
        let rules = RowRules { dense_layers: 1, steady_heads: Vec::new() };
        let whole = config(2, Arc::new(PerRow::new(seer, rules)));
        let part = whole.shard(Shard::all(2).last().unwrap()).unwrap();
        assert_eq!(part.shape().kv_heads, 1, "its gates fit its shape, which the method checks");
    }

    #[test]
    fn what_cannot_be_shared_out_says_so() {
        let shard = Shard::all(2).next().unwrap();
        let shadow = Arc::new(ShadowKv::new(Budget::Tokens(512), SteadyZone::default()));
        let rotary = Arc::new(Rotary::new(vec![0.5; 32], 1.0));
        let keys = config(2, Arc::new(LowRankKeys::new(shadow, LowRank { rank: 16, rotary })));
        for (whole, what) in [(keys, "low rank"), (config(2, Arc::new(Own)), "operators of its own")] {
            let refused = whole.shard(shard).unwrap_err().to_string();
            assert!(refused.contains(what), "{refused}");
            assert!(whole.shard(Shard::WHOLE).is_ok(), "one rank has everything");
        }
    }
}
