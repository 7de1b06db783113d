//! Traces of what steps select, and what a cache would do with them.
//!
//! A [`Trace`] is generated from a [`Preset`], recorded from a model or read from a file; an [`Experiment`] replays it
//! through the tables that the backends use, under any policy and in any size; a [`StepModel`] says what the misses
//! would cost.

mod adversary;
mod calibrate;
mod cluster_table;
mod drawn;
mod experiment;
mod generator;
mod locality;
mod noise;
pub mod plot;
mod preset;
mod record;
mod replay;
mod step_model;
#[cfg(test)]
mod tests;
mod trace;
mod trace_file;

pub use calibrate::{Checkpoints, calibrate, checkpoints};
pub use drawn::Draw;
pub use experiment::{Batch, Experiment, Outcome, Outcomes};
pub use locality::Locality;
pub use preset::{Preset, TraceSize};
pub use record::Recorder;
pub use replay::{Policy, Replay, replay};
pub use step_model::{StepModel, StepTime};
pub use trace::{Trace, TraceRow};
pub use trace_file::TraceError;
