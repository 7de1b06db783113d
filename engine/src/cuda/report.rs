use std::iter::Sum;

use spinkv::backend::cuda::CudaBytes;

/// GPU memory by what for, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GpuReport {
    /// In use before the model was made: the driver's context, the kernels, other processes.
    pub before: u64,
    /// Weights.
    pub weights: u64,
    /// Activations of a decode step and of a chunk of a prompt, logits, scratch of products.
    pub activations: u64,
    /// Residual, and K and V of two layers, of the longest prompt.
    pub prompt: u64,
    /// The KV memory.
    pub kv: CudaBytes,
    /// In use now, as the driver says.
    pub in_use: u64,
}

impl Sum for GpuReport {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |sum, one| Self {
            before: sum.before + one.before,
            weights: sum.weights + one.weights,
            activations: sum.activations + one.activations,
            prompt: sum.prompt + one.prompt,
            kv: sum.kv + one.kv,
            in_use: sum.in_use + one.in_use,
        })
    }
}

impl GpuReport {
    /// All kinds together.
    pub fn total(&self) -> u64 {
        self.before + self.weights + self.activations + self.prompt + self.kv.total()
    }
}
