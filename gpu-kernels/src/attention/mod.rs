//! Attention: what the queries of a step make of the pages that Retrieve lists.

mod attend;
mod combine;
mod context;
mod tile;

pub use attend::{attend_64, attend_128};
