//! What serving costs: prompts, decode steps, and what each part of the design is worth.
//!
//! A bench makes a plan of [`Group`]s or prompts, a machine measures it (a model on the CPU or on a GPU, over the backends that serve), and a report has the figures,
//! for people and as JSON. Every figure says how it came to be: [measured](How::Measured), [replayed](How::Replayed) from what was selected, or a
//! [bound](How::Bound).

mod ablation;
mod cpu;
#[cfg(all(feature = "cuda", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
pub mod cuda;
mod decode;
mod drawn;
mod drifting;
mod error;
#[cfg(feature = "serve")]
pub mod load;
mod plan;
pub mod plot;
mod prefill;
mod prompts;
mod replayed;
mod report;
mod scored;
mod traced;

pub use ablation::{AblationReport, CurvePoint, Gain};
pub use cpu::CpuMachine;
pub use decode::{DecodeReport, Machine, Outcome, Selected, decode};
pub use drawn::{DrawnSelections, WantedHits};
pub use drifting::Drifting;
pub use error::BenchError;
pub use plan::{BatchSize, Caching, DecodeOptions, Group, Selections};
pub use prefill::{PrefillOptions, PrefillReport, PrefillRow};
pub use prompts::Prompts;
pub use report::{Facts, How, MemoryByUse, Point, Stages};
pub use traced::Traced;

/// Hears how far a bench has come: what is done next, how much is done, of how much.
pub type Listen<'a> = &'a mut dyn FnMut(&str, usize, usize);

/// Tokens, as 4096 or 4k; at least 1, at most 16M.
pub fn tokens(text: &str) -> Option<usize> {
    let (digits, unit) = match text.strip_suffix(['k', 'K']) {
        Some(digits) => (digits, 1024),
        None => (text, 1),
    };
    let tokens = digits.parse::<usize>().ok()?.checked_mul(unit)?;
    (1..=16_777_216).contains(&tokens).then_some(tokens)
}

/// The median of some numbers; 0 of none.
fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers.get(numbers.len() / 2).copied().unwrap_or(0.0)
}
