//! NVIDIA's assembler: it checks PTX strictly and says what each kernel costs.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::arch::Arch;
use crate::process::{ToolError, run};

/// Where a wheel of PyPI that is unpacked in `target/nvidia` has ptxas: CUDA 13's, CUDA 12's.
const IN_WHEELS: [&str; 2] = ["nvidia/cu13/bin/ptxas", "nvidia/cuda_nvcc/bin/ptxas"];

/// A ptxas that runs.
#[derive(Clone, Debug)]
pub struct Ptxas {
    path: PathBuf,
    version: String,
}

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
pub enum PtxasError {
    /// It is not installed.
    #[error(
        "no ptxas in PATH, CUDA_HOME/bin, /usr/local/cuda/bin or target/nvidia. CUDA toolkits have it, and so does the wheel \
         `nvidia-cuda-nvcc` on PyPI: unpack it in target/nvidia and make {} executable, or set CUDA_BUILDER_PTXAS",
        IN_WHEELS[0]
    )]
    NotFound,
    /// It does not run, or the PTX is wrong.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// It prints something that is not understood.
    #[error("{tool:?} printed what is not understood: {line:?}")]
    NotUnderstood {
        /// The ptxas.
        tool: PathBuf,
        /// What it printed.
        line: String,
    },
}

/// What ptxas says of a module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// By the kernel's name.
    pub kernels: BTreeMap<String, Resources>,
    /// Functions that were not inlined into kernels.
    pub functions: BTreeMap<String, Frame>,
    /// Warnings, spills and products of a warpgroup that are serialised (C7510 and its like) among them.
    pub warnings: Vec<String>,
}

/// What one kernel takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    /// Of each thread.
    pub registers: u32,
    /// Barriers of a block.
    pub barriers: u32,
    /// Bytes of shared memory of a block, without what a launch adds.
    pub shared: u32,
    /// Local memory of each thread.
    pub frame: Frame,
}

/// Local memory of each thread, in bytes. It lies in device memory, so there should be none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Frame {
    /// Arrays that are indexed at run time, and what is spilled.
    pub stack: u32,
    /// Bytes stored because registers ran out.
    pub spill_stores: u32,
    /// Bytes loaded back.
    pub spill_loads: u32,
}

impl Ptxas {
    /// The first of: `CUDA_BUILDER_PTXAS`; the folder `target/nvidia` of the current folder or one above it, where a wheel
    /// of PyPI may be unpacked; `PATH`; `CUDA_HOME/bin`; `/usr/local/cuda/bin`.
    ///
    /// # Errors
    /// If it is in none of these places, or does not run.
    pub fn find() -> Result<Self, PtxasError> {
        // What the variable names is the one or an error.
        if let Some(path) = std::env::var_os("CUDA_BUILDER_PTXAS").filter(|path| !path.is_empty()) {
            return Self::at(Path::new(&path));
        }
        let here = std::env::current_dir().unwrap_or_default();
        let places = places(|name| std::env::var_os(name), &here);
        places.iter().find(|path| path.is_file()).map_or(Err(PtxasError::NotFound), |path| Self::at(path))
    }

    /// The ptxas at `path`.
    ///
    /// # Errors
    /// If it does not run or does not say its version.
    pub fn at(path: &Path) -> Result<Self, PtxasError> {
        let printed = run(Command::new(path).arg("--version"))?.stdout;
        match version_in(&printed) {
            Some(version) => Ok(Self { path: path.to_owned(), version: version.to_owned() }),
            None => Err(PtxasError::NotUnderstood { tool: path.to_owned(), line: printed }),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its version, such as `13.0.88`.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Assembles `ptx` into the file `cubin` and reports what each kernel takes. Spills are warnings.
    ///
    /// # Errors
    /// If the PTX is wrong, with what ptxas says of it.
    pub fn assemble(&self, ptx: &Path, arch: Arch, cubin: &Path) -> Result<Report, PtxasError> {
        let mut command = Command::new(&self.path);
        command.args(["-v", "--warn-on-spills", "-lineinfo", &format!("-arch={arch}")]);
        let written = run(command.arg(ptx).arg("-o").arg(cubin))?;
        Report::parse(&written.stderr)
            .map_err(|line| PtxasError::NotUnderstood { tool: self.path.clone(), line: line.to_owned() })
    }
}

/// The files that ptxas may be, best first.
fn places(variable: impl Fn(&str) -> Option<OsString>, here: &Path) -> Vec<PathBuf> {
    // A project's own comes first: it is of the version that the project wants.
    let folders = here.ancestors().map(|folder| folder.join("target/nvidia"));
    let mut places: Vec<PathBuf> =
        folders.flat_map(|folder| IN_WHEELS.map(|ptxas| folder.join(ptxas))).collect();
    let path = variable("PATH").unwrap_or_default();
    places.extend(std::env::split_paths(&path).map(|folder| folder.join("ptxas")));
    places.extend(variable("CUDA_HOME").map(|home| PathBuf::from(home).join("bin/ptxas")));
    places.push(PathBuf::from("/usr/local/cuda/bin/ptxas"));
    places
}

/// `13.0.88` of `Cuda compilation tools, release 13.0, V13.0.88`.
fn version_in(printed: &str) -> Option<&str> {
    let (_, version) = printed.split_once(", V")?;
    version.split_whitespace().next()
}

impl Report {
    /// Reads what `ptxas -v` prints, or returns the line that is not understood.
    fn parse(printed: &str) -> Result<Self, &str> {
        let mut report = Self::default();
        let (mut kernel, mut function) = (None, None);
        for line in printed.lines() {
            let info = line
                .split_once("ptxas info")
                .and_then(|(_, rest)| rest.split_once(": "))
                .map(|(_, text)| text);
            if let Some(rest) = info.and_then(|info| info.strip_prefix("Compiling entry function '")) {
                let name = rest.split('\'').next().ok_or(line)?;
                report.kernels.insert(name.to_owned(), Resources::default());
                kernel = Some(name);
            } else if let Some(name) = info.and_then(|info| info.strip_prefix("Function properties for ")) {
                function = Some(name.trim());
            } else if line.contains("bytes stack frame") {
                let frame = Frame {
                    stack: number_before(line, " bytes stack frame").ok_or(line)?,
                    spill_stores: number_before(line, " bytes spill stores").ok_or(line)?,
                    spill_loads: number_before(line, " bytes spill loads").ok_or(line)?,
                };
                let name = function.ok_or(line)?;
                match report.kernels.get_mut(name) {
                    Some(resources) => resources.frame = frame,
                    None => _ = report.functions.insert(name.to_owned(), frame),
                }
            } else if let Some(used) = info.and_then(|info| info.strip_prefix("Used ")) {
                let resources = kernel.and_then(|name| report.kernels.get_mut(name)).ok_or(line)?;
                resources.registers = number_before(used, " registers").ok_or(line)?;
                resources.barriers = number_before(used, " barriers").unwrap_or(0);
                resources.shared = number_before(used, " bytes smem").unwrap_or(0);
            } else if line.contains("warning") || line.contains("serialized") {
                report.warnings.push(line.trim().to_owned());
            }
        }
        Ok(report)
    }
}

/// The number that stands before `unit` in `line`.
fn number_before(line: &str, unit: &str) -> Option<u32> {
    let before = line.split(unit).next().filter(|before| before.len() < line.len())?;
    let digits = before.rfind(|c: char| !c.is_ascii_digit()).map_or(0, |at| at + 1);
    before[digits..].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRINTED: &str = "\
ptxas info    : 64 bytes gmem
ptxas info    : Compiling entry function 'mixed' for 'sm_90a'
ptxas info    : Function properties for mixed
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers
ptxas info    : Compile time = 3.426 ms
ptxas info    : Function properties for _RNvCs3LTquLbh4EN_14fixture_tables3mix
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function 'attend' for 'sm_90a'
ptxas warning : Registers are spilled to local memory in function 'attend', 40 bytes spill stores, 44 bytes spill loads
ptxas info    : Function properties for attend
    48 bytes stack frame, 40 bytes spill stores, 44 bytes spill loads
ptxas info    : Used 255 registers, used 2 barriers, 48 bytes cumulative stack size, 16384 bytes smem, 400 bytes cmem[0]
ptxas info    : Compile time = 12.001 ms
";

    #[test]
    fn a_report_is_read() {
        let report = Report::parse(PRINTED).unwrap();
        assert_eq!(report.kernels.len(), 2);
        assert_eq!(report.kernels["mixed"], Resources { registers: 12, ..Resources::default() });
        let frame = Frame { stack: 48, spill_stores: 40, spill_loads: 44 };
        let attend = Resources { registers: 255, barriers: 2, shared: 16384, frame };
        assert_eq!(report.kernels["attend"], attend);
        let mix = Frame { stack: 8, ..Frame::default() };
        assert_eq!(
            report.functions.into_iter().collect::<Vec<_>>(),
            [("_RNvCs3LTquLbh4EN_14fixture_tables3mix".to_owned(), mix)]
        );
        assert_eq!(report.warnings.len(), 1);
    }

    #[test]
    fn an_older_form_without_barriers_is_read() {
        let printed = "ptxas info    : Compiling entry function 'k' for 'sm_80'\n\
            ptxas info    : Used 8 registers, 376 bytes cmem[0]\n";
        assert_eq!(Report::parse(printed).unwrap().kernels["k"].registers, 8);
    }

    #[test]
    fn lines_that_make_no_sense_are_returned() {
        for line in [
            "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads",
            "ptxas info    : Used 8 registers, used 0 barriers",
            "ptxas info    : Used many registers",
        ] {
            assert_eq!(Report::parse(line), Err(line));
        }
        assert_eq!(Report::parse(""), Ok(Report::default()));
    }

    #[test]
    fn the_version_is_read() {
        let printed = "ptxas: NVIDIA (R) Ptx optimizing assembler\nCuda compilation tools, release 13.0, V13.0.88\nBuild x";
        assert_eq!(version_in(printed), Some("13.0.88"));
        assert_eq!(version_in("ptxas"), None);
    }

    #[test]
    fn folders_are_looked_at_in_order() {
        let here = Path::new("/home/me/project/xtask");
        let found = places(
            |name| match name {
                "PATH" => Some("/usr/bin:/bin".into()),
                "CUDA_HOME" => Some("/opt/cuda".into()),
                _ => None,
            },
            here,
        );
        let last = ["/usr/bin/ptxas", "/bin/ptxas", "/opt/cuda/bin/ptxas", "/usr/local/cuda/bin/ptxas"];
        let (own, others) = found.split_at(found.len() - last.len());
        assert_eq!(others, last.map(PathBuf::from));
        assert!(own.contains(&PathBuf::from("/home/me/project/target/nvidia/nvidia/cu13/bin/ptxas")));
    }
}
