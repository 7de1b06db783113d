//! How accurate sparse attention is beside dense attention, over methods, budgets and contexts.
//!
//! A [`Cell`] is a task, a context, a method and a budget; it is measured on the same prompts as all other cells of its task and
//! context. Two tasks: facts to find in long text ([`Task::Needle`]), and the loss of held-out text beside that of dense attention
//! ([`Task::Perplexity`]). [`Haystack`] makes the prompts; they depend on the seed, the task, the context and their number alone, so
//! any run on any machine asks the same.
//!
//! Prompts are dense whatever the method, so on the CPU each passes through the model once: a [`StoredPrompt`] keeps its K and V, and
//! each cell takes them over in place of the forward pass, bit for bit. [`Observed`] is the CPU backend of a cell; it also adds
//! up how much of the true attention mass lies in what steps read.

mod cpu;
#[cfg(all(feature = "cuda", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
pub mod cuda;
mod error;
mod fingerprint;
mod haystack;
mod journal;
mod measure;
mod method;
mod observed;
mod options;
pub mod plot;
mod report;
mod stored;
mod tables;
#[cfg(test)]
mod tests;

pub use cpu::{CellRunner, Progress, run};
pub use error::EvalError;
pub use haystack::{Answer, Haystack, LEAST_CONTEXT, Question};
pub use journal::{Journal, Key};
pub use measure::{Measured, MeasuredRunner, Recall, Reference, Seconds, TextLoss, measure};
pub use method::MethodChoice;
pub use observed::Observed;
pub use options::{Cell, EvalOptions, Evaluation, Task};
pub use report::{CellReport, Report};
pub use stored::StoredPrompt;
