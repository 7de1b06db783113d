//! Retrieve: makes the selected pages resident.

mod gather;

pub use gather::gather;
