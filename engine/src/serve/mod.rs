//! Serving many requests at a time: continuous batching under memory pressure, and an API over HTTP as OpenAI's.
//!
//! [`Scheduler`] decides who runs; it is single-threaded and deterministic. [`Engine`] is the thread that owns it, and [`server`] the API in
//! front.

mod engine;
mod job;
mod metrics;
mod queue;
mod scheduler;
pub mod server;
mod template;
mod text;

pub use engine::{Engine, EngineHandle, Phase, Status, Submission};
pub use job::{Event, Finished, Job, JobId, Output, Piece, Reason, ScoredToken};
pub use scheduler::{Load, Scheduler, SchedulerOptions};
pub use template::{ChatMessage, ChatTemplate};
