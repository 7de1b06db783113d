//! Select: which partitions the queries of a step read.

mod block;
mod drift;
mod gate_query;
mod order;
mod partitions;
mod score;
mod top_k;

pub use drift::drift;
pub use gate_query::gate_query;
pub(crate) use order::{key_of, score_of};
pub use partitions::select;
pub use score::score;
pub use top_k::top_k;
