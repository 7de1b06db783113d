//! Models on an NVIDIA GPU.

mod activations;
mod model;
mod product;
mod profile;
mod runner;
mod sizes;
mod staging;
#[cfg(test)]
mod stand_in;
pub mod weights;

pub use model::{CudaModel, CudaOptions, GpuReport};
pub use product::BlasUse;
pub use profile::{StepPart, StepProfile};
pub use sizes::{WeightBytes, WeightSizes};
pub use weights::{DeviceLayer, DeviceWeights};
