//! NVIDIA GPUs.
//!
//! The [`driver`] layer (devices, memory, streams, modules, launches, graphs), the [`kernels`] on it, a decode step's stages as one
//! [`LayerStep`], and what comes back between steps by a [`Restore`]. A [`Backend`](super::Backend) is not here yet.

pub mod driver;
mod host_memory;
pub mod kernels;
mod restore;
mod step;

pub use restore::{Restore, Restored};
pub use step::{LayerStep, capture_step};
