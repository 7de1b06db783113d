//! Benches on a GPU.

mod decode;
mod prefill;
mod streamed;
#[cfg(test)]
mod tests;

use spinkv::KvConfig;
use spinkv::backend::cuda::driver::{Context, Stream};
use spinkv::backend::cuda::kernels::Kernels;
use spinkv::backend::cuda::{CudaBackend, CudaLimits};

use super::Prompts;
use crate::config::ModelConfig;
use crate::cuda::{BlasUse, CudaModel, CudaOptions, DeviceWeights};
use crate::error::Result;

/// Where a GPU's weights come from.
#[derive(Clone, Debug)]
pub enum WeightSource {
    /// A checkpoint's directory.
    Checkpoint(std::path::PathBuf),
    /// Random ones, of this seed.
    Random(u64),
}

/// A model on a GPU, whose KV memory is made anew for each group.
#[derive(Debug)]
pub struct CudaMachine {
    context: Context,
    config: ModelConfig,
    source: WeightSource,
    blas: BlasUse,
    prompts: Prompts,
    /// Who makes products of many tokens, once that is known.
    products: Option<String>,
    /// Between two models.
    weights: Option<DeviceWeights>,
}

impl CudaMachine {
    /// A machine without weights yet.
    pub fn new(
        context: Context,
        config: ModelConfig,
        source: WeightSource,
        blas: BlasUse,
        prompts: Prompts,
    ) -> Self {
        Self { context, config, source, blas, prompts, products: None, weights: None }
    }

    /// The GPU and who makes the products.
    pub fn device(&self) -> String {
        let name = &self.context.device().name;
        self.products.as_ref().map_or(name.clone(), |products| format!("{name}, products by {products}"))
    }

    /// The weights of the model before, or new ones: a model that could not be made took its weights along.
    fn weights(&mut self) -> Result<DeviceWeights> {
        if let Some(weights) = self.weights.take() {
            return Ok(weights);
        }
        let stream = Stream::new(&self.context)?;
        match &self.source {
            WeightSource::Checkpoint(dir) => DeviceWeights::open(&stream, dir, &self.config, |_, _| {}),
            WeightSource::Random(seed) => {
                DeviceWeights::random(&stream, &Kernels::load(&self.context)?, &self.config, *seed)
            }
        }
    }

    /// A model with KV memory for `requests` of up to `max_tokens` tokens.
    fn model(
        &mut self,
        kv: &KvConfig,
        requests: usize,
        max_tokens: usize,
        buffering: f64,
    ) -> Result<CudaModel> {
        let limits = CudaLimits { requests, max_tokens, buffering, gpu_pages: None, host_bytes: None };
        CudaBackend::check(kv, &limits)?;
        let weights = self.weights()?;
        let options = CudaOptions { limits, blas: self.blas };
        let model = CudaModel::new(&self.context, self.config.clone(), weights, kv.clone(), &options)?;
        self.products = Some(model.products());
        Ok(model)
    }
}
