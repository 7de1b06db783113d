//! Load on a server: requests that arrive by the clock, whatever has become of those before them, and what their answers took.
//!
//! [`Plan`] says what arrives when, from a seed; [`Client`] asks any endpoint of OpenAI's API for streamed completions; [`run()`] lets a plan happen and gives a
//! [`Record`] for each request; [`LoadPoint`] is what the records of one rate come to, and [`LoadReport`] a sweep over rates.

mod client;
mod error;
mod figures;
mod lengths;
mod plan;
mod report;
mod run;
mod scrape;

pub use client::{Client, Exchange, Fault};
pub use error::LoadError;
pub use figures::{LoadPoint, Percentiles, Slo};
pub use lengths::{Length, Lengths};
pub use plan::{Plan, PlanOptions, Session, Turn};
pub use report::LoadReport;
pub use run::{Record, RunOptions, Texts, run};
pub use scrape::{Scrape, ServerFigures};
