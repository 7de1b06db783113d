//! Tables: which pages of a row are on the GPU, which leave, and where the rest are.
//!
//! These are the reference semantics. They know ids, never bytes, so that a GPU kernel can be held against
//! them and a simulator can run on them.

mod cache;
mod host_table;
mod policy;
mod steady;

pub use cache::{Adoption, PageCopy, Resolution, RowCache, SlotId};
pub use host_table::HostTable;
pub use policy::{EvictionPolicy, Lru};
pub use steady::SteadyPages;
