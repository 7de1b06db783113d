//! The crate outside the workspace that uses one kernel: cargo as it must be called for it, and what a change may not break.

use std::process::Command;

use crate::{Outcome, call_of, passes};

/// The crate, its folder below examples/ and its program.
pub const NAME: &str = "reuse-a-kernel";

const MANIFEST: &str = "examples/reuse-a-kernel/Cargo.toml";

/// Exit code of the program where no kernel can run.
const NO_GPU: i32 = 2;

/// A call of cargo for the crate, with the workspace's target folder: what they need alike is built once.
pub fn cargo(subcommand: &str) -> Command {
    let mut cargo = crate::cargo();
    cargo.args([subcommand, "--manifest-path", MANIFEST]);
    if std::env::var_os("CARGO_TARGET_DIR").is_none() {
        cargo.env("CARGO_TARGET_DIR", "target");
    }
    cargo
}

/// Format and lints; and without a GPU the program says so.
pub fn check() -> Outcome {
    passes(cargo("fmt").arg("--check"))?;
    passes(cargo("clippy").args(["--locked", "--", "--deny", "warnings"]))?;
    without_gpu()
}

/// Also on a machine that has one: it hides from the driver.
fn without_gpu() -> Outcome {
    let mut cargo = cargo("run");
    cargo.args(["--quiet", "--locked"]).env("CUDA_VISIBLE_DEVICES", "");
    eprintln!("xtask: {}", call_of(&cargo));
    let output = cargo.output().map_err(|error| format!("cargo did not start: {error}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    let names_it = ["no CUDA driver on this machine", "the CUDA driver is installed and finds no GPU"]
        .iter()
        .any(|text| said.contains(text));
    if output.status.code() == Some(NO_GPU) && names_it && output.stdout.is_empty() {
        return Ok(());
    }
    Err(format!("without a GPU it ends with {} and says\n{said}", output.status).into())
}
