//! NVIDIA GPUs.
//!
//! The [`driver`] layer (devices, memory, streams, modules, launches, graphs), the [`kernels`] on it, a decode step's stages as one
//! [`LayerStep`], what comes back between steps by a [`Restore`], and all of it as a [`CudaBackend`]; a method's own
//! Index and Select as [`operators`]. Sums over several GPUs are [`nccl`]'s.

mod backend;
pub mod blas;
pub mod driver;
mod host_memory;
pub mod kernels;
mod library;
pub mod nccl;
pub mod operators;
mod restore;
mod step;

pub use backend::{CudaBackend, CudaBytes, CudaLimits, RowClusters, StepTensors};
pub use restore::{Restore, Restored};
pub use step::{Bus, ClusterStages, LayerStep, LowRankStages, capture_step};
