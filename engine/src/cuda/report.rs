use spinkv::backend::cuda::CudaBytes;

/// GPU memory by what for, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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

impl GpuReport {
    /// All kinds together.
    pub fn total(&self) -> u64 {
        self.before + self.weights + self.activations + self.prompt + self.kv.total()
    }
}
