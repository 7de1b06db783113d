//! The reference backend: every stage in plain Rust on the CPU.
//!
//! Both tiers are ordinary memory, but the rules are those of a GPU: attention reads only pages of the GPU
//! pool, and a page that is not there is copied from the host arena first. The work of each stage is a free
//! function over slices: [`mean_key`], [`key_bounds`], [`score_partitions`], [`top_k`], [`gather()`], [`attend()`] and [`attend_prompt()`].

mod attend;
mod attend_prompt;
mod audit;
mod backend;
mod cluster;
mod gate;
mod gather;
mod index;
mod key_factors;
pub mod linalg;
pub mod low_rank;
pub mod math;
mod offload;
mod row;
mod select;

pub use attend::{Estimate, attend, attend_with_estimates};
pub use attend_prompt::{attend_prompt, attend_prompt_scratch};
pub use backend::CpuBackend;
pub use cluster::cluster;
pub use gate::{gate_key, gate_query};
pub use gather::{gather, gather_coded};
pub use index::{key_bounds, least_cosine, mean_key, outliers};
pub use offload::{OffloadPages, OffloadTables, write_back};
pub use select::{
    Wish, bound, choose, merge_heads, score, score_beside, score_bounds, score_partitions,
    score_partitions_beside, top_k, top_k_beside,
};
