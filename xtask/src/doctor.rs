//! What this machine has of what the project needs.

mod fetch;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use cuda_builder::{Ptxas, Toolchain};
use serde::Serialize;

use crate::Outcome;

/// Say what this machine has of what the project needs.
///
/// A table of every tool: which version, where, what for, and which package has it if it is missing. Fails if one is
/// missing that building and testing need. Takes a second.
///
/// Example: cargo xtask doctor --fetch-ptxas
#[derive(clap::Args)]
pub struct Doctor {
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
    /// First get the manifest's ptxas from PyPI (47 MB) into target/nvidia, unless it is there. Needs python3 with pip.
    #[arg(long)]
    fetch_ptxas: bool,
}

impl Doctor {
    pub fn run(self) -> Outcome {
        if self.fetch_ptxas && !fetch::is_there() {
            fetch::ptxas()?;
        }
        let findings = examine();
        if self.json {
            println!("{}", serde_json::to_string_pretty(&findings)?);
        } else {
            print!("{}", table(&findings));
        }
        let missing: Vec<&str> = findings.iter().filter(|f| f.is_a_problem()).map(|f| f.tool).collect();
        if missing.is_empty() { Ok(()) } else { Err(format!("missing: {}", missing.join(", ")).into()) }
    }
}

/// One line of the table.
#[derive(Debug, Serialize)]
struct Finding {
    tool: &'static str,
    needed_for: &'static str,
    /// Whether building and testing without a GPU need it.
    required: bool,
    #[serde(flatten)]
    state: State,
}

#[derive(Debug, Serialize)]
#[serde(tag = "state", rename_all = "lowercase")]
enum State {
    Found { version: String, path: PathBuf },
    Missing { get: String },
}

impl Finding {
    fn is_a_problem(&self) -> bool {
        self.required && matches!(self.state, State::Missing { .. })
    }
}

fn examine() -> Vec<Finding> {
    let mut findings = host_tools();
    findings.extend(device_toolchain());
    findings.extend(gpu());
    findings
}

fn host_tools() -> Vec<Finding> {
    // As in Cargo.toml: rust-version.
    let rust = "rustup, or apt-get install rustc-web cargo-web (1.90 or newer)";
    let clippy = "rustup component add clippy, or apt-get install rust-web-clippy";
    let rustfmt = "rustup component add rustfmt, or apt-get install rustfmt-web";
    [
        ("rustc", "host code", rust),
        ("cargo", "everything", rust),
        ("cargo-clippy", "cargo xtask ci", clippy),
        ("rustfmt", "cargo xtask ci", rustfmt),
        ("cc", "linking; tokenizers", "apt-get install gcc libc6-dev"),
    ]
    .map(|(tool, needed_for, get)| Finding {
        tool,
        needed_for,
        required: true,
        state: program(tool, &[], get),
    })
    .into()
}

fn device_toolchain() -> Vec<Finding> {
    let finding =
        |tool, state| Finding { tool, needed_for: "build-kernels, check-kernels", required: true, state };
    let found = |version: String, path: &Path| State::Found { version, path: path.to_owned() };
    let mut findings = match Toolchain::find() {
        Ok(toolchain) => {
            // The first word; the rest says who built it.
            let version = toolchain.rustc_version().split(' ').next().unwrap_or_default().to_owned();
            vec![
                finding("device rustc", found(version.clone(), toolchain.rustc())),
                finding("device cargo", found(version.clone(), toolchain.cargo())),
                finding("source of core", found(version, toolchain.library())),
                finding("LLVM tools", found(toolchain.llvm_version().to_string(), toolchain.llvm_bin())),
            ]
        }
        Err(error) => vec![finding("device toolchain", State::Missing { get: error.to_string() })],
    };
    findings.push(finding(
        "ptxas",
        match Ptxas::find() {
            Ok(ptxas) => found(ptxas.version().to_owned(), ptxas.path()),
            Err(error) => State::Missing { get: format!("cargo xtask doctor --fetch-ptxas ({error})") },
        },
    ));
    findings
}

fn gpu() -> Vec<Finding> {
    let optional = |tool, needed_for, state| Finding { tool, needed_for, required: false, state };
    let driver = "NVIDIA's driver 525 or newer (565 for Blackwell): apt-get install nvidia-driver, from NVIDIA's repository";
    let cuda = ["/usr/local/cuda/bin".into(), std::env::var("CUDA_HOME").unwrap_or_default() + "/bin"];
    let nsight = newest_in(Path::new("/opt/nvidia/nsight-compute"));
    let folders = [&cuda[..], &[nsight]].concat();
    vec![
        optional("GPU", "the cuda backend", gpu_device(driver)),
        optional("libcuda", "the cuda backend", libcuda(driver)),
        optional("libcublasLt", "models on a GPU", cublas_lt()),
        optional(
            "ncu",
            "profiling kernels",
            program("ncu", &folders, "apt-get install cuda-nsight-compute-13-0, from NVIDIA's repository"),
        ),
        optional(
            "compute-sanitizer",
            "tests on a GPU",
            program(
                "compute-sanitizer",
                &folders,
                "apt-get install cuda-sanitizer-13-0, from NVIDIA's repository",
            ),
        ),
    ]
}

/// A program in `PATH` or one of `folders`.
fn program(name: &str, folders: &[String], get: &str) -> State {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(folders.iter().map(PathBuf::from));
    let missing = || State::Missing { get: get.to_owned() };
    let Some(path) = folders.map(|folder| folder.join(name)).find(|path| path.is_file()) else {
        return missing();
    };
    match Command::new(&path).arg("--version").output() {
        Ok(output) if output.status.success() => {
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            State::Found { version: version_in(&text).unwrap_or_default().to_owned(), path }
        }
        // A proxy of rustup without the component, or a program for another machine.
        _ => missing(),
    }
}

/// The last word of `text` that is a version. (Compilers say first who packaged them.)
fn version_in(text: &str) -> Option<&str> {
    let numeric = |word: &&str| word.contains('.') && word.starts_with(|c: char| c.is_ascii_digit());
    text.lines().find_map(|line| line.split([' ', ',', '(', ')', '-']).rfind(numeric))
}

fn newest_in(folder: &Path) -> String {
    let entries = folder.read_dir().into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).max().unwrap_or_default().to_string_lossy().into_owned()
}

fn gpu_device(get: &str) -> State {
    let path = PathBuf::from("/dev/nvidiactl");
    if !path.exists() {
        return State::Missing { get: format!("an NVIDIA GPU of compute capability 8.0 or newer; {get}") };
    }
    let driver = std::fs::read_to_string("/proc/driver/nvidia/version").unwrap_or_default();
    let version = driver.lines().next().and_then(version_of_driver).unwrap_or_default();
    State::Found { version: version.to_owned(), path }
}

/// `580.159.04` of `NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04  Wed …`.
fn version_of_driver(line: &str) -> Option<&str> {
    let is_version = |word: &&str| word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.');
    line.split_whitespace().find(is_version)
}

/// Where the loader would find the driver's library.
fn libcuda(get: &str) -> State {
    library("libcuda.so.1").unwrap_or_else(|| State::Missing { get: get.to_owned() })
}

/// Where the cuda backend would find cuBLASLt: the file that it is told of, or the newest that the loader knows.
fn cublas_lt() -> State {
    let named = std::env::var_os("SPINKV_CUBLASLT").map(PathBuf::from).filter(|path| path.is_file());
    let found = named.map(|path| State::Found { version: version_of_library(&path), path });
    let found = found.or_else(|| ["libcublasLt.so.13", "libcublasLt.so.12"].into_iter().find_map(library));
    found.unwrap_or_else(|| State::Missing {
        get: "apt-get install libcublas-13-0, from NVIDIA's repository; or pip install nvidia-cublas, and \
              SPINKV_CUBLASLT names its libcublasLt.so.13"
            .to_owned(),
    })
}

/// Where the loader would find a library. It is not loaded: that can start the driver.
fn library(name: &str) -> Option<State> {
    let cached = ["ldconfig", "/sbin/ldconfig"].iter().find_map(|ldconfig| {
        let output = Command::new(ldconfig).arg("-p").output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let line = text.lines().find(|line| line.trim_start().starts_with(name))?;
        line.split("=> ").nth(1).map(PathBuf::from)
    });
    let folders = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let named = std::env::split_paths(&folders).map(|folder| folder.join(name)).find(|path| path.is_file());
    let path = named.or(cached)?;
    Some(State::Found { version: version_of_library(&path), path })
}

/// What follows `.so.` in a library's real name: the driver's version, or cuBLASLt's.
fn version_of_library(path: &Path) -> String {
    let real = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let name = real.file_name().unwrap_or_default().to_string_lossy().into_owned();
    name.split_once(".so.").map_or_else(String::new, |(_, version)| version.to_owned())
}

fn table(findings: &[Finding]) -> String {
    let mut text = String::new();
    let width = |of: fn(&Finding) -> usize| findings.iter().map(of).max().unwrap_or_default();
    let (tool, needed) = (width(|f| f.tool.len()), width(|f| f.needed_for.len()));
    let version = width(|f| match &f.state {
        State::Found { version, .. } => version.len(),
        State::Missing { .. } => "MISSING".len(),
    });
    for finding in findings {
        let (state, place) = match &finding.state {
            State::Found { version, path } => (version.as_str(), path.display().to_string()),
            State::Missing { get } if finding.required => ("MISSING", get.clone()),
            State::Missing { get } => ("none", get.clone()),
        };
        let Finding { tool: name, needed_for, .. } = finding;
        // Writing to a string does not fail.
        _ = writeln!(text, "{name:tool$}  {state:version$}  {needed_for:needed$}  {place}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings() -> Vec<Finding> {
        let found = State::Found { version: "1.96.0".to_owned(), path: PathBuf::from("/usr/bin/rustc") };
        let missing = || State::Missing { get: "apt-get install x".to_owned() };
        vec![
            Finding { tool: "rustc", needed_for: "host code", required: true, state: found },
            Finding { tool: "ptxas", needed_for: "kernels", required: true, state: missing() },
            Finding { tool: "ncu", needed_for: "profiling", required: false, state: missing() },
        ]
    }

    #[test]
    fn only_what_is_required_is_a_problem() {
        let problems: Vec<bool> = findings().iter().map(Finding::is_a_problem).collect();
        assert_eq!(problems, [false, true, false]);
    }

    #[test]
    fn the_table_is_aligned() {
        assert_eq!(
            table(&findings()),
            "rustc  1.96.0   host code  /usr/bin/rustc\n\
             ptxas  MISSING  kernels    apt-get install x\n\
             ncu    none     profiling  apt-get install x\n"
        );
    }

    #[test]
    fn json_says_the_same() {
        let json = serde_json::to_value(findings()).unwrap();
        assert_eq!(json[0]["version"], "1.96.0");
        assert_eq!(json[1]["state"], "missing");
        assert_eq!(json[1]["get"], "apt-get install x");
    }

    #[test]
    fn versions_are_found() {
        assert_eq!(version_in("rustc 1.95.0 (59807616e 2026-04-14)"), Some("1.95.0"));
        assert_eq!(version_in("cc (Debian 12.2.0-14+deb12u1) 12.2.0\nCopyright"), Some("12.2.0"));
        assert_eq!(version_in("NVIDIA (R) Compute Sanitizer\nVersion 2025.3.0"), Some("2025.3.0"));
        let driver = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build";
        assert_eq!(version_of_driver(driver), Some("580.159.04"));
        let library = |path: &str| version_of_library(Path::new(path));
        assert_eq!(library("/no/such/folder/libcublasLt.so.13.1.0.3"), "13.1.0.3");
        assert_eq!(library("/no/such/folder/libcublasLt.so"), "");
    }
}
