//! Retrieve: makes the selected pages resident.

mod gather;
#[cfg(any(not(target_arch = "nvptx64"), sm_90))]
mod gather_bulk;
mod gather_coded;
mod lists;
mod rebuild_keys;
mod resolve;

pub use gather::gather;
#[cfg(any(not(target_arch = "nvptx64"), sm_90))]
pub use gather_bulk::gather_bulk;
pub use gather_coded::gather_coded;
pub use rebuild_keys::{rebuild_keys_64, rebuild_keys_128};
pub use resolve::resolve;
