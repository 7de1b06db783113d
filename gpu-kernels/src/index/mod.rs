//! Index: keys become summaries.
//!
//! Three operators, each with a kernel for prompts (keys in the model's own tensor) and one for a decode step (keys in
//! steady pages). All walk the tokens in one way, so both kernels of an operator give the same bits for the same keys.

mod chunk_bounds;
mod chunk_mean;
mod gate_pool;
mod operator;
mod prompts;
mod step;

pub use chunk_bounds::{chunk_bounds, chunk_bounds_step};
pub use chunk_mean::{chunk_mean, chunk_mean_step};
pub use gate_pool::{gate_pool, gate_pool_step};
