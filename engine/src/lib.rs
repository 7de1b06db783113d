//! Models over the `spinkv` KV memory: checkpoints, tokenizers, the forward pass, sampling and generation.

pub mod bench;
pub mod checkpoint;
pub mod config;
#[cfg(all(feature = "cuda", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
pub mod cuda;
pub mod error;
pub mod eval;
pub mod gates;
pub mod generate;
pub mod memory;
pub mod model;
pub mod pages;
pub mod runner;
pub mod sampling;
#[cfg(feature = "serve")]
pub mod serve;
pub mod simulator;
pub mod tokenizer;

pub use error::{Error, Result};
