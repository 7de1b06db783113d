use crate::{Error, Result};

/// The attention shape of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Layers that own a KV cache.
    pub layers: usize,
    /// Query heads of a layer.
    pub query_heads: usize,
    /// KV heads of a layer; divides `query_heads`.
    pub kv_heads: usize,
    /// Elements of one key, value or query.
    pub head_dim: usize,
}

impl KvShape {
    /// Checks and builds a shape.
    ///
    /// # Errors
    /// [`Error::InvalidShape`] if a number is zero or `kv_heads` does not divide `query_heads`.
    pub fn new(layers: usize, query_heads: usize, kv_heads: usize, head_dim: usize) -> Result<Self> {
        for (field, value) in
            [("layers", layers), ("query_heads", query_heads), ("kv_heads", kv_heads), ("head_dim", head_dim)]
        {
            if value == 0 {
                return Err(Error::InvalidShape { reason: format!("{field} is 0; at least 1 is needed") });
            }
        }
        if !query_heads.is_multiple_of(kv_heads) {
            return Err(Error::InvalidShape {
                reason: format!("query_heads {query_heads} is not a multiple of kv_heads {kv_heads}"),
            });
        }
        Ok(Self { layers, query_heads, kv_heads, head_dim })
    }

    /// Query heads that share one KV head (the GQA group size).
    pub fn group(&self) -> usize {
        self.query_heads / self.kv_heads
    }

    /// Rows of one request: one per (layer, KV head).
    pub fn rows(&self) -> usize {
        self.layers * self.kv_heads
    }
}
