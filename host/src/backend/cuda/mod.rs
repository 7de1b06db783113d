//! NVIDIA GPUs.
//!
//! So far the [`driver`] layer (devices, memory, streams, modules, launches) and the first [`kernels`]. The stages come on top of
//! them.

pub mod driver;
pub mod kernels;
