//! The GPU's figures: `cargo xtask bench-gpu`. Ceilings and kernels in one run, ratios between them.
//!
//! Times are CUDA events around single launches, medians after warm-up; outputs are checked before anything is timed.

mod chunk_mean;
mod gather;
mod measure;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use measure::{Bench, Row};
use serde::Serialize;

/// Measures SpinKV's kernels on the GPU of this machine, beside the machine's own ceilings.
#[derive(Parser)]
#[command(name = "bench-gpu", max_term_width = 110)]
struct Arguments {
    /// Only groups whose name holds this: gather, chunk_mean.
    filter: Option<String>,
    /// Timed repetitions of each row.
    #[arg(long, default_value_t = 15)]
    repeats: usize,
    /// Mebibytes of pinned host memory that pages are gathered from.
    #[arg(long, default_value_t = 4096)]
    arena_mib: usize,
    /// Writes all rows to a file, as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Cargo's own; without effect.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Serialize)]
struct Report<'a> {
    gpu: &'a str,
    driver: String,
    repeats: usize,
    rows: &'a [Row],
}

/// A group of rows.
type Group = fn(&mut Bench) -> Result<(), Box<dyn std::error::Error>>;

const GROUPS: [(&str, Group); 2] = [("gather", gather::run), ("chunk_mean", chunk_mean::run)];

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-gpu: {error}");
            ExitCode::from(2)
        }
    }
}

fn run(arguments: &Arguments) -> Result<(), Box<dyn std::error::Error>> {
    let mut bench = Bench::open(arguments.repeats, arguments.arena_mib << 20)?;
    let context = bench.context.clone();
    println!(
        "{}, driver {}, medians of {}",
        context.device().name,
        context.driver_version(),
        arguments.repeats
    );
    for (name, group) in GROUPS {
        if arguments.filter.as_ref().is_none_or(|filter| name.contains(filter.as_str())) {
            group(&mut bench)?;
        }
    }
    if let Some(path) = &arguments.json {
        let report = Report {
            gpu: &context.device().name,
            driver: context.driver_version().to_string(),
            repeats: arguments.repeats,
            rows: bench.rows(),
        };
        std::fs::write(path, serde_json::to_string_pretty(&report)?)?;
    }
    Ok(())
}
