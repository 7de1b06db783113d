//! Compiles kernel crates to PTX, with the surface of rust-cuda's `cuda_builder` over rustc's own NVPTX backend.
//!
//! ```no_run
//! use cuda_builder::{Arch, CudaBuilder};
//!
//! let ptx = CudaBuilder::new("gpu-kernels")
//!     .arch(Arch::Sm90a)
//!     .support_ir("cuda_std/src/device.ll")
//!     .copy_to("target/kernels.ptx")
//!     .build()?;
//! # Ok::<(), cuda_builder::CudaBuilderError>(())
//! ```
//!
//! # What happens
//!
//! 1. `cargo rustc` compiles the crate, its dependencies and `core` to one LLVM module (fat LTO, no unwinding: a
//!    panic is a `trap`). The crate's manifest says nothing about it: it stays a plain library, which the host can
//!    build too.
//! 2. `llvm-link` joins the module with the support IR: LLVM IR for what Rust cannot spell, such as shared memory and
//!    instructions that must not move across control flow.
//! 3. `opt` makes everything but the kernels internal, drops what no kernel uses, and optimises. Unlike rustc's
//!    `llvm-bitcode-linker` it keeps line tables (Nsight Compute shows the Rust source) and internalises first, so
//!    that the optimiser may assume that nobody else calls a function.
//! 4. `llc` writes PTX.
//!
//! The architecture concerns steps 1 (the kernel crate alone) and 4. Dependencies and `core` are compiled once for all
//! architectures, so `cfg(sm_90)` and `cfg(sm_90a)` hold in the kernel crate only.
//!
//! # The same bytes everywhere
//!
//! The same sources and the same tools give the same PTX wherever the checkout lies:
//!
//! - Paths of the workspace, of cargo's registry and of the standard library's sources are remapped to `.`,
//!   `registry` and `rust-src`.
//! - Internal symbols carry a hash of their crate's identity. Cargo hashes the path of a crate inside the workspace
//!   relative to its root, so those are the same in every checkout. **A path dependency outside the workspace is
//!   hashed with its absolute path**: keep kernel crates and their path dependencies in one workspace.
//! - The profile is the builder's own, so the workspace's profiles and `RUSTFLAGS` do not reach kernels.
//!
//! [`ptx`] reads the result, [`Ptxas`] assembles it and says what each kernel costs; neither needs a GPU.

mod arch;
mod build;
mod process;
pub mod ptx;
mod ptxas;
mod toolchain;

pub use arch::{Arch, UnknownArch};
pub use build::{Built, CudaBuilder, CudaBuilderError};
pub use process::ToolError;
pub use ptxas::{Frame, Ptxas, PtxasError, Report, Resources};
pub use toolchain::{Fault, Origin, Rejected, Toolchain, ToolchainError, Version};
