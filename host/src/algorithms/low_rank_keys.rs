use std::sync::Arc;

use super::OwnOptionsReader;
use crate::partition::PartitionKind;
use crate::pipeline::{Always, Index, KeyStore, LowRank, Method, Place, Reach, Select, SteadyZone};
use crate::{Error, KvShape, Result, Rotary};

/// The rank of the ShadowKV paper and of its published code, for 8 KV heads of 128.
pub const RANK: usize = 160;

/// A method whose keys are kept in [low rank](LowRank), so that the host has values alone: of [`ShadowKv`](super::ShadowKv) the original one
/// (arXiv 2410.21465). What the method selects is as it was, by the keys as they came; what is read of it is nearly so.
#[derive(Clone, Debug)]
pub struct LowRankKeys {
    method: Arc<dyn Method>,
    low_rank: LowRank,
}

impl LowRankKeys {
    /// `method` with keys in `low_rank`.
    pub fn new(method: Arc<dyn Method>, low_rank: LowRank) -> Self {
        Self { method, low_rank }
    }

    /// `method` as a user's options have it: `keys=low-rank`, in a rank of [`RANK`] or of `rank`, which says as much by itself; `keys=full`, as by
    /// default, is the method as it is.
    ///
    /// # Errors
    /// [`Error::InvalidMethodOption`]; [`Error::NoRotary`] without the model's `rotary`.
    pub(super) fn from_options(
        method: Arc<dyn Method>,
        rotary: Option<&Arc<Rotary>>,
        own: &mut OwnOptionsReader<'_>,
    ) -> Result<Arc<dyn Method>> {
        let (keys, rank) = (own.take::<String>("keys")?, own.take::<usize>("rank")?);
        let low_rank = match keys.as_deref() {
            None => rank.is_some(),
            Some("low-rank") => true,
            Some("full") if rank.is_none() => false,
            Some("full") => return Err(own.invalid("keys", "a rank is given, too")),
            Some(_) => return Err(own.invalid("keys", "expected full or low-rank")),
        };
        if !low_rank {
            return Ok(method);
        }
        if rank == Some(0) {
            return Err(own.invalid("rank", "at least 1"));
        }
        let missing = || Error::NoRotary { method: method.name().to_owned() };
        let rotary = rotary.cloned().ok_or_else(missing)?;
        Ok(Arc::new(Self::new(method, LowRank { rank: rank.unwrap_or(RANK), rotary })))
    }
}

impl Method for LowRankKeys {
    fn name(&self) -> &str {
        self.method.name()
    }

    fn partition(&self) -> PartitionKind {
        self.method.partition()
    }

    fn index(&self) -> Index<'_> {
        self.method.index()
    }

    fn select(&self) -> Select<'_> {
        self.method.select()
    }

    fn steady(&self) -> SteadyZone {
        self.method.steady()
    }

    fn always(&self) -> Always {
        self.method.always()
    }

    fn estimated(&self) -> f32 {
        self.method.estimated()
    }

    fn keys(&self) -> KeyStore {
        KeyStore::LowRank(self.low_rank.clone())
    }

    fn reach(&self, place: Place) -> Reach {
        self.method.reach(place)
    }

    fn check(&self, shape: &KvShape) -> Result<()> {
        self.method.check(shape)
    }
}
