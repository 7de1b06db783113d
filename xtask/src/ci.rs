//! What a change must pass, and benches: calls of cargo and of other tasks, one after another.

use std::time::Instant;

use crate::check::CheckKernels;
use crate::{Outcome, example};

/// Everything that a change must pass.
///
/// Format, lints, docs, the GPU kernels (see check-kernels), all tests and the examples. Needs what `cargo xtask doctor` calls
/// required, and no GPU. About 10 minutes on 2 cores from a fresh clone, 5 after that.
///
/// Example: cargo xtask ci --slow
#[derive(clap::Args)]
pub struct Ci {
    /// Also run the tests that take minutes each (32K-token prompts).
    #[arg(long)]
    slow: bool,
}

/// Criterion benches of the pipeline's stages on the CPU.
///
/// Needs nothing but cargo; some minutes. Results go to target/criterion.
///
/// Example: cargo xtask bench select
#[derive(clap::Args)]
pub struct Bench {
    /// Only benches whose name holds this.
    filter: Option<String>,
}

impl Ci {
    pub fn run(self) -> Outcome {
        step("format", || cargo("fmt --all --check", None))?;
        step("lints", || cargo("clippy --workspace --all-targets --locked -- --deny warnings", None))?;
        // As embedders build them: without the features that the workspace's tests turn on in each other.
        step("lints of what embedders build", || {
            cargo("clippy --package spinkv --package spinkv-kernels --locked -- --deny warnings", None)
        })?;
        step("docs", || {
            let deny = ("RUSTDOCFLAGS", "--deny warnings");
            cargo("doc --workspace --no-deps --document-private-items --locked", Some(deny))
        })?;
        step("kernels", || CheckKernels::default().run())?;
        step("tests", || cargo("test --workspace --locked", None))?;
        step("examples", example::check)?;
        if self.slow {
            step("slow tests", || cargo("test --package spinkv-tests --locked -- --ignored", None))?;
        }
        Ok(())
    }
}

impl Bench {
    pub fn run(self) -> Outcome {
        let filter = self.filter.map(|filter| format!(" -- {filter}")).unwrap_or_default();
        step("benches", || cargo(&format!("bench --package spinkv-benches --bench cpu_stages{filter}"), None))
    }
}

/// Runs a part of a task and says how long it took.
fn step(name: &str, run: impl FnOnce() -> Outcome) -> Outcome {
    let start = Instant::now();
    run().map_err(|error| format!("{name}: {error}"))?;
    eprintln!("xtask: {name} passed in {:.0} s", start.elapsed().as_secs_f64());
    Ok(())
}

/// Calls cargo with these arguments, and a variable of the environment if one is given.
fn cargo(arguments: &str, environment: Option<(&str, &str)>) -> Outcome {
    crate::passes(crate::cargo().args(arguments.split_whitespace()).envs(environment))
}
