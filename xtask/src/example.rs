//! The crates outside the workspace: cargo as it must be called for them, and what a change may not break.

use std::process::Command;

use crate::{Outcome, call_of, passes};

/// The crate that uses one kernel, its folder below examples/ and its program.
pub const NAME: &str = "reuse-a-kernel";

/// The crate that has a method of its own.
const METHOD: &str = "custom-method";

/// Exit code of the programs where no kernel can run.
const NO_GPU: i32 = 2;

/// A call of cargo for a crate, with the workspace's target folder: what they need alike is built once.
pub fn cargo(subcommand: &str, example: &str) -> Command {
    let mut cargo = crate::cargo();
    cargo.args([subcommand, "--manifest-path", &format!("examples/{example}/Cargo.toml")]);
    if std::env::var_os("CARGO_TARGET_DIR").is_none() {
        cargo.env("CARGO_TARGET_DIR", "target");
    }
    cargo
}

/// Format and lints; without a GPU the programs say so; the method runs on the CPU, and its kernels under the emulator.
pub fn check() -> Outcome {
    for example in [NAME, METHOD] {
        passes(cargo("fmt", example).args(["--all", "--check"]))?;
        passes(cargo("clippy", example).args(["--all-targets", "--locked", "--", "--deny", "warnings"]))?;
    }
    without_gpu(NAME, &[])?;
    without_gpu(METHOD, &["--", "--backend", "cuda"])?;
    passes(cargo("run", METHOD).args(["--quiet", "--locked"]))?;
    passes(cargo("test", METHOD).args([
        "--locked",
        "--package",
        "custom-method-kernels",
        "--features",
        "emulate",
    ]))
}

/// Also on a machine that has one: it hides from the driver.
fn without_gpu(example: &str, arguments: &[&str]) -> Outcome {
    let mut cargo = cargo("run", example);
    cargo.args(["--quiet", "--locked"]).args(arguments).env("CUDA_VISIBLE_DEVICES", "");
    eprintln!("xtask: {}", call_of(&cargo));
    let output = cargo.output().map_err(|error| format!("cargo did not start: {error}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    let names_it = ["no CUDA driver on this machine", "the CUDA driver is installed and finds no GPU"]
        .iter()
        .any(|text| said.contains(text));
    if output.status.code() == Some(NO_GPU) && names_it && output.stdout.is_empty() {
        return Ok(());
    }
    Err(format!("{example} without a GPU ends with {} and says\n{said}", output.status).into())
}
