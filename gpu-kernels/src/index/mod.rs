//! Index: keys become summaries.
//!
//! Three operators, each with a kernel for prompts (keys in the model's own tensor) and one for a decode step (keys in
//! steady pages). A gate's also projects what it makes. All walk the tokens in one way, so both kernels of an operator give the same bits for the same keys.
//!
//! Of prompts, the chunks that their means stand least for can be marked, to be read by every step: `chunk_spread`, `top_k`, `mark`.
//!
//! [`cluster`] makes partitions of keys that are alike, for methods whose summaries are those of clusters. [`low_rank`] finds what a layer's keys have in common.

mod chunk_bounds;
mod chunk_mean;
mod chunk_spread;
pub mod cluster;
mod gate_key;
pub mod low_rank;
mod mark;
mod operator;
mod prompts;
mod step;

pub use chunk_bounds::{chunk_bounds, chunk_bounds_step};
pub use chunk_mean::{chunk_mean, chunk_mean_step};
pub use chunk_spread::chunk_spread;
pub use gate_key::{gate_key, gate_key_step};
pub use mark::mark;
