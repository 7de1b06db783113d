use std::fmt;
use std::ops::Range;
use std::str::FromStr;
use std::sync::Arc;

use crate::partition::PartitionKind;
use crate::pipeline::{Always, Index, KeyStore, Method, Place, Reach, Select, SteadyZone};
use crate::{Error, KvShape, Result};

/// Which rows do not read what the method selects.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RowRules {
    /// The first layers that read everything, as Quest and others keep theirs.
    pub dense_layers: usize,
    /// Heads that read the steady zone alone: the streaming heads of DuoAttention (arXiv 2410.10819).
    pub steady_heads: Vec<HeadRule>,
}

/// A KV head of one layer, or of all. Written as `3:1` or `*:1` (layer, KV head).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadRule {
    /// The layer; `None` for all.
    pub layer: Option<usize>,
    /// The KV head.
    pub kv_head: usize,
}

impl FromStr for HeadRule {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let refused = || Error::InvalidHeadRule { text: text.to_owned() };
        let (layer, kv_head) = text.trim().split_once(':').ok_or_else(refused)?;
        let layer = if layer == "*" { None } else { Some(layer.parse().map_err(|_| refused())?) };
        Ok(Self { layer, kv_head: kv_head.parse().map_err(|_| refused())? })
    }
}

impl fmt::Display for HeadRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.layer {
            Some(layer) => write!(f, "{layer}:{}", self.kv_head),
            None => write!(f, "*:{}", self.kv_head),
        }
    }
}

impl RowRules {
    /// Whether all rows do as the method says.
    pub fn is_empty(&self) -> bool {
        self.dense_layers == 0 && self.steady_heads.is_empty()
    }

    fn reach(&self, place: Place) -> Reach {
        if place.layer < self.dense_layers {
            return Reach::Everything;
        }
        let named = |rule: &HeadRule| {
            rule.kv_head == place.kv_head && rule.layer.is_none_or(|layer| layer == place.layer)
        };
        if self.steady_heads.iter().any(named) { Reach::Steady } else { Reach::Selected }
    }
}

/// A method with rules for some rows; all others do as the method says.
pub struct PerRow {
    method: Arc<dyn Method>,
    rules: RowRules,
}

impl PerRow {
    /// `method` with `rules`.
    pub fn new(method: Arc<dyn Method>, rules: RowRules) -> Self {
        Self { method, rules }
    }
}

impl fmt::Debug for PerRow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PerRow").field("method", &self.method).field("rules", &self.rules).finish()
    }
}

impl Method for PerRow {
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
        self.method.keys()
    }

    fn of_heads(&self, heads: Range<usize>) -> Result<Option<Arc<dyn Method>>> {
        let method = self.method.of_heads(heads.clone())?.unwrap_or_else(|| self.method.clone());
        let own = self.rules.steady_heads.iter().filter(|rule| heads.contains(&rule.kv_head));
        let steady_heads =
            own.map(|rule| HeadRule { kv_head: rule.kv_head - heads.start, ..*rule }).collect();
        let rules = RowRules { dense_layers: self.rules.dense_layers, steady_heads };
        Ok(Some(Arc::new(Self::new(method, rules))))
    }

    fn check(&self, shape: &KvShape) -> Result<()> {
        let refuse = |reason: String| Err(Error::InvalidMethod { method: self.name().to_owned(), reason });
        let KvShape { layers, kv_heads, .. } = *shape;
        if self.rules.dense_layers > layers {
            return refuse(format!("{} dense layers, the model has {layers}", self.rules.dense_layers));
        }
        let beyond =
            |rule: &&HeadRule| rule.kv_head >= kv_heads || rule.layer.is_some_and(|layer| layer >= layers);
        if let Some(rule) = self.rules.steady_heads.iter().find(beyond) {
            return refuse(format!("head {rule}, the model has {layers} layers of {kv_heads} KV heads"));
        }
        self.method.check(shape)
    }

    fn reach(&self, place: Place) -> Reach {
        match self.rules.reach(place) {
            Reach::Selected => self.method.reach(place),
            ruled => ruled,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::algorithms::StreamingLlm;

    #[test]
    fn rules_are_read_as_people_write_them_and_layers_come_before_heads() {
        let rules = RowRules {
            dense_layers: 2,
            steady_heads: ["3:1", " *:0"].map(|text| text.parse().unwrap()).to_vec(),
        };
        let method = PerRow::new(Arc::new(StreamingLlm::default()), rules);
        let reach = |layer, kv_head| method.reach(Place { layer, kv_head });
        assert_eq!([reach(0, 0), reach(1, 1)], [Reach::Everything; 2]);
        assert_eq!([reach(2, 0), reach(3, 0), reach(3, 1)], [Reach::Steady; 3]);
        assert_eq!([reach(2, 1), reach(4, 1)], [Reach::Selected; 2]);
        for text in ["", "1", ":", "a:1", "1:*", "-1:0", "1:1:1"] {
            assert_eq!(text.parse::<HeadRule>(), Err(Error::InvalidHeadRule { text: text.to_owned() }));
        }
    }
}
