//! Tasks for a GPU, and the bundle that takes them to a machine without Rust. Both run the same scripts, xtask/bundle.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::{Outcome, example};

/// The scripts of the bundle.
const SCRIPTS: [&str; 3] = ["test-gpu", "bench-gpu", "profile"];

/// What a bundle may weigh: small enough to send along with a job.
const LIMIT_BYTES: u64 = 64 << 20;

/// Test kernels, cuda_std and the driver layer on this machine's GPU.
///
/// Builds a bundle (see bundle) and runs its test-gpu: every kernel against its CPU reference on random ragged shapes, every
/// cuda_std wrapper bit for bit against the emulator, the driver layer, the example. Needs a GPU of compute capability 8.0 or newer and
/// its driver, no CUDA toolkit; --sanitize needs compute-sanitizer. Under a minute once built.
///
/// Examples: cargo xtask test-gpu
///           cargo xtask test-gpu -- --shapes 1000 --sanitize gather
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct TestGpu {
    /// Options of the script; `-- --help` lists them.
    #[arg(last = true)]
    options: Vec<String>,
}

/// Measure kernels on this machine's GPU, beside its own ceilings.
///
/// Builds a bundle and runs its bench-gpu, a sweep over operating points. A line has shape, context, hits and misses as the device
/// counted them, bytes, us, GB/s, and percent of the ceiling measured in the same run, with a cold L2. Criterion samples, over CUDA
/// events, and keeps what it found in target/criterion/gpu to compare the next run with. Needs a GPU, its driver, and 4 GiB of host
/// memory to pin; about a minute once built.
///
/// Examples: cargo xtask bench-gpu
///           cargo xtask bench-gpu -- gather --json gather.json --plot roofline.svg
///           cargo xtask bench-gpu -- --from gather.json --plot roofline.svg     (needs no GPU)
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct BenchGpu {
    /// Options of the bench; `-- --help` lists them.
    #[arg(last = true)]
    options: Vec<String>,
}

/// Profile one kernel with Nsight Compute and show its hot lines of Rust.
///
/// Builds a bundle and runs its profile. Needs a GPU; where ncu is missing or may not read counters, it falls back to machine code
/// with the lines of Rust between the instructions, and timings.
///
/// Example: cargo xtask profile gather
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Profile {
    /// The kernel's name, as in gpu-kernels/ptx/manifest.toml.
    kernel: String,
}

/// Make a folder that tests, benches and profiles on a GPU machine without Rust.
///
/// Takes test-gpu, bench-gpu and profile, three stripped programs, the PTX and the kernels' sources (for the profiler's source page);
/// copy it over and run ./test-gpu there. Needs no GPU here. The machine there needs a driver and glibc as new as here.
///
/// Example: cargo xtask bundle --to /tmp/spinkv-gpu && scp -r /tmp/spinkv-gpu gpu-host:
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Bundle {
    /// The folder; what it held is replaced.
    #[arg(long, default_value = "target/bundle")]
    to: PathBuf,
}

impl TestGpu {
    pub fn run(self) -> Outcome {
        run_script("test-gpu", &self.options)
    }
}

impl BenchGpu {
    pub fn run(self) -> Outcome {
        run_script("bench-gpu", &self.options)
    }
}

impl Profile {
    pub fn run(self) -> Outcome {
        run_script("profile", &[self.kernel])
    }
}

impl Bundle {
    pub fn run(self) -> Outcome {
        let bytes = bundle(&self.to)?;
        println!("{}: {:.1} MiB", self.to.display(), bytes as f64 / f64::from(1 << 20));
        Ok(())
    }
}

fn run_script(script: &str, options: &[String]) -> Outcome {
    let folder = Path::new("target/bundle");
    bundle(folder)?;
    // Reports and logs, unless the caller has a place for them.
    let out = std::env::var_os("OUT").unwrap_or_else(|| "target/gpu".into());
    fs::create_dir_all(&out)?;
    let status = Command::new(folder.join(script)).args(options).env("OUT", &out).status()?;
    if status.success() { Ok(()) } else { Err(format!("{script}: {status}").into()) }
}

/// Builds into `folder` and returns its bytes.
fn bundle(folder: &Path) -> Outcome<u64> {
    let tests = ["test", "--package", "spinkv-kernel-tests", "--test", "gpu", "--release", "--no-run"];
    let tests = executable(crate::cargo().args(tests))?;
    let bench = executable(crate::cargo().args([
        "bench",
        "--package",
        "spinkv-benches",
        "--bench",
        "gpu",
        "--no-run",
    ]))?;
    let example = executable(example::cargo("build", example::NAME).arg("--release"))?;
    if folder.exists() {
        // Nothing but a bundle is replaced.
        if !folder.join("bin/gpu-tests").exists() && fs::read_dir(folder)?.next().is_some() {
            return Err(format!("{} is not empty and not a bundle", folder.display()).into());
        }
        fs::remove_dir_all(folder)?;
    }
    fs::create_dir_all(folder.join("bin"))?;
    for (program, name) in [(tests, "gpu-tests"), (bench, "gpu-bench"), (example, example::NAME)] {
        let to = folder.join("bin").join(name);
        fs::copy(&program, &to)?;
        let stripped = Command::new("strip").arg(&to).status();
        if !stripped.is_ok_and(|status| status.success()) {
            eprintln!("xtask: strip did not run (package binutils): {name} stays large");
        }
    }
    for script in SCRIPTS {
        fs::copy(Path::new("xtask/bundle").join(script), folder.join(script))?;
    }
    // Paths as line information has them.
    copy_tree(Path::new("gpu-kernels/src"), &folder.join("gpu-kernels/src"))?;
    copy_tree(Path::new("cuda_std/src"), &folder.join("cuda_std/src"))?;
    copy_tree(Path::new("gpu-kernels/ptx"), &folder.join("ptx"))?;
    let bytes = tree_bytes(folder)?;
    if bytes > LIMIT_BYTES {
        return Err(
            format!("{} has {bytes} bytes; a bundle has at most {LIMIT_BYTES}", folder.display()).into()
        );
    }
    Ok(bytes)
}

/// Lets a call of cargo build a program, and returns it.
fn executable(cargo: &mut Command) -> Outcome<PathBuf> {
    cargo.args(["--locked", "--message-format", "json-render-diagnostics"]);
    let call = crate::call_of(cargo);
    eprintln!("xtask: {call}");
    let output = cargo.stderr(Stdio::inherit()).output()?;
    if !output.status.success() {
        return Err(format!("{call}: {}", output.status).into());
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    let program = messages.lines().rev().find_map(|line| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        message["executable"].as_str().map(PathBuf::from)
    });
    program.ok_or_else(|| format!("{call} built no program").into())
}

fn copy_tree(from: &Path, to: &Path) -> Outcome {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let to = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_tree(&entry.path(), &to)?;
        } else {
            fs::copy(entry.path(), to)?;
        }
    }
    Ok(())
}

fn tree_bytes(folder: &Path) -> Outcome<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        bytes +=
            if entry.file_type()?.is_dir() { tree_bytes(&entry.path())? } else { entry.metadata()?.len() };
    }
    Ok(bytes)
}
