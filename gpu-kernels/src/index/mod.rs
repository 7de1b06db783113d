//! Index: keys become summaries.

mod chunk_mean;

pub use chunk_mean::chunk_mean;
