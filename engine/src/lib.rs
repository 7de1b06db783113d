//! Models over the `spinkv` KV memory: checkpoints, tokenizers, the forward pass, sampling and generation.

pub mod checkpoint;
pub mod config;
pub mod error;
pub mod generate;
pub mod memory;
pub mod model;
pub mod sampling;
pub mod simulator;
pub mod tokenizer;

pub use error::{Error, Result};
