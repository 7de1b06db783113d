//! What the tests of this package share: seeded inputs, an attention that shares no code with the pipeline, a
//! driver that takes requests through a pipeline token by token, and the bundled checkpoints.

mod attention_reference;
pub mod checkpoints;
mod inputs;
mod run;
pub mod small;

pub use attention_reference::{attention_over, close, dense_reference};
pub use inputs::{Sequence, Style};
pub use run::{Layers, Run, Setup};
