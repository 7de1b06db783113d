//! The project's own tasks, run as `cargo xtask`. One module a subject.

mod check;
mod ci;
mod doctor;
mod example;
mod gpu;
mod kernels;
mod manifest;
mod source;

use std::path::Path;
use std::process::{Command, ExitCode};

use clap::{Parser, Subcommand};

/// What a task ends with. The error is for a person to read.
type Outcome<T = ()> = Result<T, Box<dyn std::error::Error>>;

/// Tasks of the SpinKV workspace.
#[derive(Parser)]
#[command(name = "cargo xtask", max_term_width = 110)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    Ci(ci::Ci),
    Bench(ci::Bench),
    BuildKernels(kernels::BuildKernels),
    CheckKernels(check::CheckKernels),
    Doctor(doctor::Doctor),
    TestGpu(gpu::TestGpu),
    BenchGpu(gpu::BenchGpu),
    Profile(gpu::Profile),
    Bundle(gpu::Bundle),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let (name, outcome) = at_root().map_or_else(
        |error| ("xtask", Err(error)),
        |()| match arguments.task {
            Task::Ci(task) => ("ci", task.run()),
            Task::Bench(task) => ("bench", task.run()),
            Task::BuildKernels(task) => ("build-kernels", task.run()),
            Task::CheckKernels(task) => ("check-kernels", task.run()),
            Task::Doctor(task) => ("doctor", task.run()),
            Task::TestGpu(task) => ("test-gpu", task.run()),
            Task::BenchGpu(task) => ("bench-gpu", task.run()),
            Task::Profile(task) => ("profile", task.run()),
            Task::Bundle(task) => ("bundle", task.run()),
        },
    );
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {name} failed: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The cargo that runs xtask.
fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// How a person would spell a call of cargo.
fn call_of(cargo: &Command) -> String {
    let arguments: Vec<_> = cargo.get_args().map(|argument| argument.to_string_lossy()).collect();
    format!("cargo {}", arguments.join(" "))
}

/// Calls cargo and says so.
fn passes(cargo: &mut Command) -> Outcome {
    eprintln!("xtask: {}", call_of(cargo));
    match cargo.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(status.to_string().into()),
        Err(error) => Err(format!("cargo did not start: {error}").into()),
    }
}

/// Makes the workspace's root the current folder, so that all paths in tasks are relative to it.
fn at_root() -> Outcome {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    std::env::set_current_dir(&root).map_err(|error| format!("{}: {error}", root.display()).into())
}
