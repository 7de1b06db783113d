//! Models on an NVIDIA GPU, or on several of one host.

mod activations;
mod fill;
mod halves;
mod model;
pub mod parallel;
mod parts;
mod pass;
mod product;
mod profile;
mod prompt;
mod report;
mod runner;
mod sizes;
mod staging;
#[cfg(test)]
pub(crate) mod stand_in;
pub mod weights;

pub use halves::Overlap;
pub use model::{CudaModel, CudaOptions};
pub use parallel::{GpuGroup, TensorParallel, WeightSource};
pub use product::BlasUse;
pub use profile::{StepPart, StepProfile};
pub use prompt::CudaPrompt;
pub use report::GpuReport;
pub use sizes::{WeightBytes, WeightSizes};
pub use weights::{DeviceLayer, DeviceWeights};
