//! Commands and what they print.

mod demo;
pub(crate) mod generate;
mod report;

use std::io::Write;

use clap::{Parser, Subcommand};

/// Writes to standard error. If that is closed nobody listens, which is no reason to fail.
pub(crate) fn say(text: &str) {
    let _ = std::io::stderr().lock().write_all(text.as_bytes());
}

/// Long-context LLMs with sparse attention over hierarchical KV memory.
///
/// The full KV cache stays in host memory; the GPU keeps summaries, a small cache of pages and compact tables, and
/// each step fetches only the pages it misses. The cpu backend runs the same pipeline without a GPU.
#[derive(Debug, Parser)]
#[command(name = "spinkv", version, max_term_width = 110)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Answer one prompt, and say what it took.
    Generate(generate::GenerateArguments),
}
