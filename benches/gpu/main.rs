//! The GPU's figures: `cargo xtask bench-gpu`. Ceilings and kernels in one run, ratios between them.
//!
//! Criterion samples them, over CUDA events around single launches, or around a graph of short ones, with a cold L2; outputs are
//! checked before anything is timed. What needs no GPU, the table and the picture, is in `spinkv_benches`.

mod aside;
mod attend;
mod cluster;
mod cuda_events;
mod engine;
mod gather;
mod index;
mod layer_step;
mod linear;
mod low_rank;
mod measure;
mod model;
mod offload;
mod prefill;
mod resolve;
mod select;
mod tables;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use clap::builder::RangedU64ValueParser;
use measure::Bench;
use spinkv_benches::report::Report;
use spinkv_benches::roofline;
use spinkv_benches::sampling::LEAST_REPEATS;

/// Measures SpinKV's kernels on the GPU of this machine, beside the machine's own ceilings.
///
/// A row is a kernel at one operating point: its shape, tokens of context, hits and misses as the
/// device counted them, bytes that must move, median time and range, GB/s, and how much that is of
/// the ceiling measured in the same run; TFLOP/s of what arithmetic bounds. Inputs come from memory,
/// not from the L2.
///
/// Criterion keeps the samples and compares them with those of the run before: report.txt in
/// --output-dir.
///
/// Examples: bench-gpu --json all.json --plot roofline.svg
///           bench-gpu resolve --repeats 50
///           bench-gpu --from all.json --plot roofline.svg     (needs no GPU)
#[derive(Parser)]
#[command(name = "bench-gpu", max_term_width = 110, verbatim_doc_comment)]
struct Arguments {
    /// Only groups whose name holds this: gather (and gather_bulk, restore), resolve, select, chunk_mean, chunk_bounds, cluster,
    /// write_back, append, attend, layer_step, prefill (and prefill_wgmma), linear (and gemm, gemm_wgmma), store_prompt, model (embed,
    /// Only groups whose name holds this: gather (and gather_bulk, restore), resolve, select, chunk_mean, chunk_bounds, gate_pool,
    /// write_back, append, attend, layer_step, prefill (and prefill_wgmma), linear (and gemm, gemm_wgmma), low_rank (and rebuild_keys), store_prompt, model (embed,
    /// rms_norm, rotate, swiglu, argmax, sample), engine (prompts and decode steps of a whole model).
    filter: Option<String>,
    /// Timed repetitions of each row, at least 10.
    #[arg(long, default_value_t = 15, value_parser = RangedU64ValueParser::<usize>::new().range(LEAST_REPEATS as u64..))]
    repeats: usize,
    /// Mebibytes of pinned host memory that pages are gathered from.
    #[arg(long, default_value_t = 4096)]
    arena_mib: usize,
    /// Writes all rows to a file, as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Draws all rows that move bytes to a file, as SVG: GB/s over bytes of a launch, under the ceilings.
    #[arg(long)]
    plot: Option<PathBuf>,
    /// Measures nothing: takes the rows from a file that --json wrote.
    #[arg(long, requires = "plot", conflicts_with_all = ["filter", "json"])]
    from: Option<PathBuf>,
    /// Where Criterion's files go [default: CRITERION_HOME, or target/criterion/gpu].
    #[arg(long)]
    output_dir: Option<PathBuf>,
    /// Cargo's own; without effect.
    #[arg(long, hide = true)]
    bench: bool,
}

/// How a part of the run ended.
type Outcome<T = ()> = Result<T, Box<dyn std::error::Error>>;

/// A group of rows.
type Group = fn(&mut Bench) -> Outcome;

const GROUPS: &[(&str, Group)] = &[
    ("gather gather_bulk restore", gather::run),
    ("resolve", resolve::run),
    ("select", select::run),
    ("chunk_mean", index::chunk_mean),
    ("chunk_bounds", index::chunk_bounds),
    ("cluster", cluster::run),
    ("write_back", offload::write_back),
    ("append", offload::append),
    ("attend", attend::run),
    ("layer_step", layer_step::run),
    ("prefill", prefill::run),
    ("linear gemm gemm_wgmma", linear::run),
    ("low_rank rebuild_keys", low_rank::run),
    ("store_prompt", offload::store_prompt),
    ("engine", engine::run),
    ("model embed rms_norm rotate swiglu argmax sample", model::run),
];

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-gpu: {error}");
            ExitCode::from(2)
        }
    }
}

fn run(arguments: &Arguments) -> Outcome {
    let (report, outcome) = match &arguments.from {
        Some(path) => (read(path)?, Ok(())),
        None => measured(arguments)?,
    };
    if let Some(path) = &arguments.json {
        let json = serde_json::to_string_pretty(&report)?;
        fs::write(path, json).map_err(|error| format!("{}: {error}", path.display()))?;
    }
    // What stopped the run says more than what it left to draw.
    outcome?;
    if let Some(path) = &arguments.plot {
        roofline::plot(path, &report)?;
    }
    Ok(())
}

fn read(path: &Path) -> Outcome<Report> {
    let failed = |error: String| format!("{}: {error}", path.display());
    let json = fs::read(path).map_err(|error| failed(error.to_string()))?;
    Ok(serde_json::from_slice(&json).map_err(|error| failed(error.to_string()))?)
}

/// Runs the groups until one fails; what was measured until then is in the report.
fn measured(arguments: &Arguments) -> Outcome<(Report, Outcome)> {
    let folder = arguments.output_dir.clone().unwrap_or_else(|| {
        std::env::var_os("CRITERION_HOME").map_or_else(|| "target/criterion/gpu".into(), PathBuf::from)
    });
    let named = |name: &str| arguments.filter.as_ref().is_none_or(|filter| name.contains(filter.as_str()));
    if !GROUPS.iter().any(|(name, _)| named(name)) {
        let filter = arguments.filter.as_deref().unwrap_or_default();
        return Err(format!("no group's name holds \"{filter}\"; see --help").into());
    }
    let mut bench = Bench::open(arguments.repeats, arguments.arena_mib << 20, &folder)?;
    let context = bench.context.clone();
    let (gpu, driver) = (context.device().name.clone(), context.driver_version().to_string());
    println!("{gpu}, driver {driver}, medians of {}", arguments.repeats);
    let outcome = GROUPS.iter().filter(|(name, _)| named(name)).try_for_each(|(_, group)| group(&mut bench));
    Ok((Report { gpu, driver, repeats: arguments.repeats, rows: bench.into_rows() }, outcome))
}
