//! Models on an NVIDIA GPU.

mod sizes;
mod staging;
#[cfg(test)]
mod stand_in;
pub mod weights;

pub use sizes::{WeightBytes, WeightSizes};
pub use weights::{DeviceLayer, DeviceWeights};
