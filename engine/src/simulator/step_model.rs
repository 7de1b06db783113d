use serde::Serialize;

/// How long a decode step takes on one H200, from what it reads. A model of bandwidths alone: no launch gaps, no
/// load imbalance.
///
/// ```text
/// compute    weights + (batch x layers x (selected tokens x KV bytes + context x summary bytes)) / HBM
/// transfer   batch x layers x missed tokens x KV bytes / PCIe
/// serial     compute + transfer
/// overlapped max(compute, transfer)
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct StepModel {
    /// The model whose shape it is.
    pub model: &'static str,
    /// Layers.
    pub layers: u32,
    /// KV heads of a layer.
    pub kv_heads: u32,
    /// Bytes of K and V of one token of one layer: 2 x 8 heads x 128 x 2 (bf16).
    pub kv_bytes: u32,
    /// Time to read the weights, in seconds: the linear layers of Qwen3-14B as cuBLAS runs them, measured.
    pub weights_s: f64,
    /// What attention reads HBM with, in bytes a second: a dense paged decode kernel (FlashInfer), measured.
    pub hbm: f64,
    /// What a gather of pages of 2 KiB or more reads host memory with, in bytes a second: measured, PCIe Gen5 x16.
    pub pcie: f64,
    /// Bytes of summaries of one token of one layer, all KV heads: ShadowKV's mean keys of chunks of 8 are
    /// 8 x 128 x 2 / 8.
    pub summary_bytes: f64,
}

impl StepModel {
    /// Qwen3-14B on an H200, with one bf16 mean key for each `partition_tokens` tokens of each KV head.
    pub fn qwen3_14b(partition_tokens: u32) -> Self {
        Self {
            model: "Qwen3-14B, bf16, one H200",
            layers: 40,
            kv_heads: 8,
            kv_bytes: 4096,
            weights_s: 7.0e-3,
            hbm: 4.38e12,
            pcie: 51.0e9,
            summary_bytes: 2048.0 / f64::from(partition_tokens),
        }
    }

    /// Bytes of K and V of one token, all layers.
    pub fn token_bytes(&self) -> f64 {
        f64::from(self.layers) * f64::from(self.kv_bytes)
    }

    /// GPU memory of a request that keeps `cached` tokens of each row beside the summaries of its `context`.
    pub fn request_bytes(&self, context: f64, cached: f64) -> f64 {
        self.token_bytes() * cached + f64::from(self.layers) * self.summary_bytes * context
    }

    /// A step of `batch` requests, each of which selects `selected` tokens of each row and misses `missed`.
    pub fn step(&self, batch: u32, context: f64, selected: f64, missed: f64) -> StepTime {
        let batch = f64::from(batch);
        let read = self.token_bytes() * selected + f64::from(self.layers) * self.summary_bytes * context;
        let compute_s = self.weights_s + batch * read / self.hbm;
        let transfer_s = batch * self.token_bytes() * missed / self.pcie;
        StepTime { batch: batch as u32, compute_s, transfer_s }
    }

    /// A step of `batch` requests whose whole context is in HBM and is read.
    pub fn dense(&self, batch: u32, context: f64) -> StepTime {
        let compute_s = self.weights_s + f64::from(batch) * self.token_bytes() * context / self.hbm;
        StepTime { batch, compute_s, transfer_s: 0.0 }
    }
}

/// The two halves of a step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct StepTime {
    /// Requests of the step: one token each.
    pub batch: u32,
    /// Time on the GPU, in seconds.
    pub compute_s: f64,
    /// Time on PCIe, in seconds.
    pub transfer_s: f64,
}

impl StepTime {
    /// Tokens a second if nothing overlaps.
    pub fn serial(&self) -> f64 {
        f64::from(self.batch) / (self.compute_s + self.transfer_s)
    }

    /// Tokens a second if transfers hide behind the GPU's work as far as they can.
    pub fn overlapped(&self) -> f64 {
        f64::from(self.batch) / self.compute_s.max(self.transfer_s)
    }
}
