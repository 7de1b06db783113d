//! Attention: what the queries of a step make of the pages that Retrieve lists.

mod attend;
mod combine;
mod context;
mod estimate;
mod page_biases;
mod prefill;
mod tile;

pub use attend::{attend_64, attend_128};
pub use estimate::estimate;
pub use page_biases::page_biases;
pub use prefill::{prefill_64, prefill_128};
#[cfg(any(not(target_arch = "nvptx64"), sm_90a))]
pub use prefill::{prefill_wgmma_64, prefill_wgmma_128};
