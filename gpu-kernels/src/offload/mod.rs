//! Offload: new keys and values become pages, on both tiers.

mod append;
mod store_prompt;
pub(crate) mod warp_copy;
mod write_back;

pub use append::append;
pub use store_prompt::store_prompt;
pub use write_back::write_back;
