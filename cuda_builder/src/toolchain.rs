//! Where the device toolchain is: rustc, cargo, the sources of `core`, and LLVM's tools of rustc's LLVM.

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::process::{ToolError, clean_command, run};

/// The oldest rustc that the builder was tried with.
const OLDEST_RUSTC: Version = Version { major: 1, minor: 96, patch: 0 };

/// The tools of LLVM that a build calls.
const LLVM_TOOLS: [&str; 3] = ["llvm-link", "opt", "llc"];

/// A version of three numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Version {
    pub major: u32,
    pub minor: u32,
    pub patch: u32,
}

impl Version {
    /// The version that `text` starts with: `1.96.0-nightly (…)` is 1.96.0.
    fn at_start_of(text: &str) -> Option<Self> {
        let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let mut numbers = text[..end].split('.').map(|number| number.parse().ok());
        Some(Self {
            major: numbers.next()??,
            minor: numbers.next()??,
            patch: numbers.next().flatten().unwrap_or(0),
        })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// Where a toolchain comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// `CUDA_BUILDER_RUSTC` names its rustc.
    Environment,
    /// A toolchain of rustup, by name.
    Rustup(String),
    /// Debian's packages.
    Debian,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Environment => f.write_str("CUDA_BUILDER_RUSTC"),
            Self::Rustup(name) => write!(f, "rustup's {name}"),
            Self::Debian => f.write_str("Debian's packages"),
        }
    }
}

impl Origin {
    /// What to do for `what` to be there.
    fn remedy(&self, what: Piece) -> String {
        match (self, what) {
            (Self::Environment, Piece::Rustc) => "set CUDA_BUILDER_RUSTC to a rustc".to_owned(),
            (Self::Environment, Piece::Cargo) => "set CUDA_BUILDER_CARGO".to_owned(),
            (Self::Environment, Piece::Sources) => "install the sources of that rustc's core".to_owned(),
            (Self::Environment, Piece::Llvm(major)) => {
                format!("set CUDA_BUILDER_LLVM_BIN to the tools of LLVM {major}")
            }
            (Self::Rustup(_), Piece::Rustc) => "rustup update".to_owned(),
            (Self::Rustup(name), Piece::Cargo) => format!("rustup component add cargo --toolchain {name}"),
            (Self::Rustup(name), Piece::Sources) => {
                format!("rustup component add rust-src --toolchain {name}")
            }
            (Self::Rustup(name), Piece::Llvm(_)) => {
                format!("rustup component add llvm-tools --toolchain {name}")
            }
            (Self::Debian, Piece::Rustc) => {
                "apt-get update && apt-get install rustc-web rust-web-src cargo-web llvm-22".to_owned()
            }
            (Self::Debian, Piece::Cargo) => "apt-get install cargo-web".to_owned(),
            (Self::Debian, Piece::Sources) => "apt-get install rust-web-src".to_owned(),
            (Self::Debian, Piece::Llvm(major)) => format!("apt-get install llvm-{major}"),
        }
    }
}

/// The parts of a toolchain, as far as their packages differ. LLVM's tools are of a major version.
#[derive(Clone, Copy)]
enum Piece {
    Rustc,
    Cargo,
    Sources,
    Llvm(u32),
}

/// Why a toolchain cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// A file that a build needs is not there.
    #[error("{what} is missing: no {path:?} ({remedy})")]
    Missing {
        /// What it is.
        what: &'static str,
        /// Where it was looked for.
        path: PathBuf,
        /// What to do.
        remedy: String,
    },
    /// The builder was not tried with a rustc so old.
    #[error("{path:?} is version {found}, older than {oldest} ({remedy})")]
    TooOld {
        /// The rustc.
        path: PathBuf,
        /// Its version.
        found: Version,
        /// The oldest that will do.
        oldest: Version,
        /// What to do.
        remedy: String,
    },
    /// LLVM's tools cannot read the bitcode of a rustc with another LLVM.
    #[error("{bin:?} has LLVM {tools}, but rustc's LLVM is {rustc} ({remedy})")]
    OtherLlvm {
        /// The folder of LLVM's tools.
        bin: PathBuf,
        /// The version of the tools.
        tools: Version,
        /// The version inside rustc.
        rustc: Version,
        /// What to do.
        remedy: String,
    },
    /// A tool does not say which version it is.
    #[error("no version in what {tool:?} prints: {printed:?}")]
    NoVersion {
        /// The tool.
        tool: PathBuf,
        /// What it printed.
        printed: String,
    },
    /// A tool does not run.
    #[error(transparent)]
    Tool(#[from] ToolError),
}

/// A toolchain that was looked at and cannot be used.
#[derive(Debug)]
pub struct Rejected {
    /// Which.
    pub origin: Origin,
    /// What is wrong with it; at least one thing.
    pub faults: Vec<Fault>,
}

/// No toolchain can be used.
#[derive(Debug)]
pub struct ToolchainError {
    /// Those that were looked at, in order.
    pub rejected: Vec<Rejected>,
}

impl fmt::Display for ToolchainError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no toolchain for device code; one of these has to become complete:")?;
        for rejected in &self.rejected {
            for fault in &rejected.faults {
                write!(f, "\n  {}: {fault}", rejected.origin)?;
            }
        }
        Ok(())
    }
}

impl std::error::Error for ToolchainError {}

/// A complete toolchain for device code.
#[derive(Clone, Debug)]
pub struct Toolchain {
    origin: Origin,
    rustc: PathBuf,
    cargo: PathBuf,
    library: PathBuf,
    llvm_bin: PathBuf,
    rustc_version: String,
    llvm_version: Version,
}

impl Toolchain {
    /// The first complete toolchain of: the one that `CUDA_BUILDER_RUSTC` names; rustup's, by name; Debian's packages.
    /// `CUDA_BUILDER_CARGO` and `CUDA_BUILDER_LLVM_BIN` take the place of that part in each of them.
    ///
    /// # Errors
    /// If none is complete, what each of them lacks and which package has it.
    pub fn find() -> Result<Self, ToolchainError> {
        Search::of_this_machine().find()
    }

    /// Where it comes from.
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// The compiler.
    pub fn rustc(&self) -> &Path {
        &self.rustc
    }

    /// The cargo that goes with it.
    pub fn cargo(&self) -> &Path {
        &self.cargo
    }

    /// The sources of the standard library: the folder that `core` lies in.
    pub fn library(&self) -> &Path {
        &self.library
    }

    /// The folder of LLVM's tools.
    pub fn llvm_bin(&self) -> &Path {
        &self.llvm_bin
    }

    /// All that `rustc --version` says after the name: a rebuild by another distributor is another compiler, because
    /// this text is hashed into symbols.
    pub fn rustc_version(&self) -> &str {
        &self.rustc_version
    }

    /// The version of LLVM's tools.
    pub fn llvm_version(&self) -> Version {
        self.llvm_version
    }

    /// A call of this cargo for device code, in an environment without the settings of host builds.
    pub(crate) fn cargo_command(&self) -> Command {
        let mut command = clean_command(&self.cargo);
        // -Zbuild-std and the target are unstable; a stable compiler has them all the same.
        command.env("RUSTC_BOOTSTRAP", "1").env("RUSTC", &self.rustc);
        command
    }

    /// A call of one of LLVM's tools, by its full path: the one in `PATH` may be another LLVM's.
    pub(crate) fn llvm_command(&self, tool: &str) -> Command {
        Command::new(self.llvm_bin.join(tool))
    }
}

/// Where to look.
struct Search {
    variable: fn(&str) -> Option<OsString>,
    /// The folder of rustup's toolchains.
    rustup: Option<PathBuf>,
    /// The root folder that Debian's packages are installed under.
    root: PathBuf,
}

/// A toolchain that may be incomplete.
struct Candidate {
    origin: Origin,
    rustc: PathBuf,
    cargo: PathBuf,
}

impl Search {
    fn of_this_machine() -> Self {
        let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        let home = variable("RUSTUP_HOME")
            .map(PathBuf::from)
            .or_else(|| variable("HOME").map(|home| PathBuf::from(home).join(".rustup")));
        Self { variable, rustup: home.map(|home| home.join("toolchains")), root: PathBuf::from("/") }
    }

    fn find(&self) -> Result<Toolchain, ToolchainError> {
        let mut rejected = Vec::new();
        for candidate in self.candidates() {
            let origin = candidate.origin.clone();
            match self.complete(candidate) {
                Ok(toolchain) => return Ok(toolchain),
                Err(faults) => rejected.push(Rejected { origin, faults }),
            }
        }
        Err(ToolchainError { rejected })
    }

    fn candidates(&self) -> Vec<Candidate> {
        if let Some(rustc) = (self.variable)("CUDA_BUILDER_RUSTC").map(PathBuf::from) {
            let cargo = rustc.with_file_name("cargo");
            // Whoever names a compiler wants that one or an error.
            return vec![Candidate { origin: Origin::Environment, rustc, cargo }];
        }
        let folders = self.rustup.iter().filter_map(|folder| folder.read_dir().ok());
        let mut toolchains: Vec<PathBuf> = folders.flatten().flatten().map(|entry| entry.path()).collect();
        toolchains.sort();
        let of_rustup = toolchains.into_iter().map(|folder| Candidate {
            origin: Origin::Rustup(folder.file_name().unwrap_or_default().to_string_lossy().into_owned()),
            rustc: folder.join("bin/rustc"),
            cargo: folder.join("bin/cargo"),
        });
        let debian = Candidate {
            origin: Origin::Debian,
            rustc: self.root.join("usr/bin/rustc"),
            cargo: self.root.join("usr/bin/cargo"),
        };
        of_rustup.chain([debian]).collect()
    }

    fn complete(&self, Candidate { origin, rustc, cargo }: Candidate) -> Result<Toolchain, Vec<Fault>> {
        let mut faults = Vec::new();
        let mut need = |what, path: &Path, piece| {
            let found = path.exists();
            if !found {
                faults.push(Fault::Missing { what, path: path.to_owned(), remedy: origin.remedy(piece) });
            }
            found
        };
        let cargo = (self.variable)("CUDA_BUILDER_CARGO").map_or(cargo, PathBuf::from);
        let has_rustc = need("rustc", &rustc, Piece::Rustc);
        need("cargo", &cargo, Piece::Cargo);
        if !has_rustc {
            // Which sources and which LLVM would fit is for rustc to say.
            return Err(faults);
        }

        let described = Rustc::ask(&rustc).map_err(|fault| vec![fault])?;
        if described.version < OLDEST_RUSTC {
            faults.push(Fault::TooOld {
                path: rustc,
                found: described.version,
                oldest: OLDEST_RUSTC,
                remedy: origin.remedy(Piece::Rustc),
            });
            return Err(faults);
        }
        let library = described.sysroot.join("lib/rustlib/src/rust/library");
        need("the source of core", &library.join("core/src/lib.rs"), Piece::Sources);
        match self.llvm(&origin, &described) {
            Ok((llvm_bin, llvm_version)) if faults.is_empty() => {
                let rustc_version = described.version_text;
                Ok(Toolchain { origin, rustc, cargo, library, llvm_bin, rustc_version, llvm_version })
            }
            Ok(_) => Err(faults),
            Err(of_llvm) => {
                faults.extend(of_llvm);
                Err(faults)
            }
        }
    }

    /// The folder of LLVM's tools and their version, if they can read the bitcode of `rustc`.
    fn llvm(&self, origin: &Origin, rustc: &Rustc) -> Result<(PathBuf, Version), Vec<Fault>> {
        let major = rustc.llvm.major;
        let named = (self.variable)("CUDA_BUILDER_LLVM_BIN").map(PathBuf::from);
        let origin = if named.is_some() { &Origin::Environment } else { origin };
        let remedy = || origin.remedy(Piece::Llvm(major));
        let bin = named.unwrap_or_else(|| match origin {
            Origin::Debian => self.root.join(format!("usr/lib/llvm-{major}/bin")),
            Origin::Rustup(_) | Origin::Environment => {
                rustc.sysroot.join("lib/rustlib").join(&rustc.host).join("bin")
            }
        });
        let missing = LLVM_TOOLS.map(|tool| bin.join(tool)).into_iter().filter(|path| !path.exists());
        let faults = missing.map(|path| Fault::Missing { what: "LLVM's tool", path, remedy: remedy() });
        let faults: Vec<Fault> = faults.collect();
        if !faults.is_empty() {
            return Err(faults);
        }
        match llvm_version_of(&bin.join("llc")) {
            Ok(tools) if tools.major == major => Ok((bin, tools)),
            Ok(tools) => Err(vec![Fault::OtherLlvm { bin, tools, rustc: rustc.llvm, remedy: remedy() }]),
            Err(fault) => Err(vec![fault]),
        }
    }
}

/// What a rustc says of itself.
struct Rustc {
    version: Version,
    version_text: String,
    host: String,
    llvm: Version,
    sysroot: PathBuf,
}

impl Rustc {
    fn ask(path: &Path) -> Result<Self, Fault> {
        let printed = run(clean_command(path).arg("-vV"))?.stdout;
        let sysroot = PathBuf::from(run(clean_command(path).args(["--print", "sysroot"]))?.stdout);
        Self::parse(&printed, sysroot).ok_or_else(|| Fault::NoVersion { tool: path.to_owned(), printed })
    }

    fn parse(verbose_version: &str, sysroot: PathBuf) -> Option<Self> {
        let field = |name: &str| verbose_version.lines().find_map(|line| line.strip_prefix(name));
        let version_text = field("rustc ")?;
        Some(Self {
            version: Version::at_start_of(version_text)?,
            version_text: version_text.to_owned(),
            host: field("host: ")?.to_owned(),
            llvm: Version::at_start_of(field("LLVM version: ")?)?,
            sysroot,
        })
    }
}

fn llvm_version_of(llc: &Path) -> Result<Version, Fault> {
    let printed = run(Command::new(llc).arg("--version"))?.stdout;
    llvm_version_in(&printed).ok_or_else(|| Fault::NoVersion { tool: llc.to_owned(), printed })
}

fn llvm_version_in(printed: &str) -> Option<Version> {
    let (_, version) = printed.split_once("LLVM version ")?;
    Version::at_start_of(version)
}

#[cfg(test)]
mod tests {
    use super::*;

    const VERBOSE: &str = "rustc 1.96.0 (ac68faa20 2026-05-25) (built from a source tarball)\nbinary: rustc\n\
        commit-hash: ac68faa20c58cbccd01ee7208bf3b6e93a7d7f96\nhost: x86_64-unknown-linux-gnu\nrelease: 1.96.0\n\
        LLVM version: 22.1.8";

    #[test]
    fn rustc_is_understood() {
        let rustc = Rustc::parse(VERBOSE, PathBuf::from("/usr")).unwrap();
        assert_eq!(rustc.version.to_string(), "1.96.0");
        assert_eq!(rustc.version_text, "1.96.0 (ac68faa20 2026-05-25) (built from a source tarball)");
        assert_eq!(rustc.host, "x86_64-unknown-linux-gnu");
        assert_eq!(rustc.llvm, Version { major: 22, minor: 1, patch: 8 });
        assert!(Rustc::parse("rustc one\nhost: x", PathBuf::new()).is_none());
    }

    #[test]
    fn versions_order_and_ignore_suffixes() {
        let nightly = Version::at_start_of("1.97.0-nightly (e22c616e4 2026-04-19)").unwrap();
        assert!(nightly > OLDEST_RUSTC);
        assert!(Version::at_start_of("1.63.0").unwrap() < OLDEST_RUSTC);
        assert_eq!(Version::at_start_of("22.1"), Some(Version { major: 22, minor: 1, patch: 0 }));
        assert_eq!(Version::at_start_of("unknown"), None);
    }

    #[test]
    fn llvm_is_understood_from_distributors_too() {
        let debian = "Debian LLVM version 22.1.8\n  Optimized build.";
        assert_eq!(llvm_version_in(debian).unwrap().to_string(), "22.1.8");
        let rustup = "LLVM (http://llvm.org/):\n  LLVM version 22.1.2-rust-1.95.0-stable\n";
        assert_eq!(llvm_version_in(rustup).unwrap().to_string(), "22.1.2");
        assert_eq!(llvm_version_in("llc: not found"), None);
    }

    #[test]
    fn what_is_missing_is_named_with_its_package() {
        let empty = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(empty.path().join("toolchains/stable-x86_64")).unwrap();
        let search = Search {
            variable: |_| None,
            rustup: Some(empty.path().join("toolchains")),
            root: empty.path().to_owned(),
        };
        let error = search.find().unwrap_err();
        assert_eq!(error.rejected.len(), 2);
        let text = error.to_string();
        assert!(text.contains("rustup's stable-x86_64: rustc is missing"), "{text}");
        assert!(
            text.contains("apt-get install rustc-web") && text.contains("apt-get install cargo-web"),
            "{text}"
        );
    }

    #[test]
    fn a_compiler_named_by_the_environment_is_the_only_candidate() {
        let search = Search {
            variable: |name| (name == "CUDA_BUILDER_RUSTC").then(|| "/nonexistent/bin/rustc".into()),
            rustup: None,
            root: PathBuf::from("/"),
        };
        let error = search.find().unwrap_err();
        assert_eq!(error.rejected.len(), 1);
        assert_eq!(error.rejected[0].origin, Origin::Environment);
        assert!(
            error.to_string().contains(r#"no "/nonexistent/bin/cargo" (set CUDA_BUILDER_CARGO)"#),
            "{error}"
        );
    }
}
