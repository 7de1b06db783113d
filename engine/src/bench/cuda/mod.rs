//! Benches on a GPU.

mod decode;
mod prefill;
mod streamed;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use spinkv::KvConfig;
use spinkv::backend::cuda::CudaLimits;

use super::Prompts;
use crate::config::ModelConfig;
pub use crate::cuda::WeightSource;
use crate::cuda::{BlasUse, CudaOptions, DeviceWeights, GpuGroup, TensorParallel, parallel};
use crate::error::Result;

/// A model on a GPU or over several, whose KV memory is made anew for each group.
#[derive(Debug)]
pub struct CudaMachine {
    gpus: Arc<GpuGroup>,
    config: ModelConfig,
    source: WeightSource,
    blas: BlasUse,
    prompts: Prompts,
    /// Who makes products of many tokens, once that is known.
    products: Option<String>,
    /// Between two models, by rank.
    weights: Option<Vec<DeviceWeights>>,
}

impl CudaMachine {
    /// A machine without weights yet.
    pub fn new(
        gpus: GpuGroup,
        config: ModelConfig,
        source: WeightSource,
        blas: BlasUse,
        prompts: Prompts,
    ) -> Self {
        Self { gpus: Arc::new(gpus), config, source, blas, prompts, products: None, weights: None }
    }

    /// The GPUs and who makes the products.
    pub fn device(&self) -> String {
        let name = self.gpus.description();
        match &self.products {
            Some(products) => format!("{name}, products by {products}"),
            None => name,
        }
    }

    /// The weights of the model before, or new ones: a model that could not be made took its weights along.
    fn weights(&mut self) -> Result<Vec<DeviceWeights>> {
        match self.weights.take() {
            Some(weights) => Ok(weights),
            None => self.gpus.weights(&self.config, &self.source, |_, _| {}),
        }
    }

    /// A model with KV memory for `requests` of up to `max_tokens` tokens; `kv` is each rank's.
    fn model(
        &mut self,
        kv: Vec<KvConfig>,
        requests: usize,
        max_tokens: usize,
        buffering: f64,
    ) -> Result<TensorParallel> {
        let limits = CudaLimits { requests, max_tokens, buffering, gpu_pages: None, host_bytes: None };
        parallel::check(&kv, &limits)?;
        let weights = self.weights()?;
        let options = CudaOptions { limits, blas: self.blas };
        let model = TensorParallel::new(&self.gpus, self.config.clone(), weights, kv, &options)?;
        self.products = Some(model.products());
        Ok(model)
    }
}
