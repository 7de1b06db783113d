//! From a kernel crate to PTX, in four steps.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;

use crate::arch::Arch;
use crate::process::{ToolError, run};
use crate::toolchain::{Toolchain, ToolchainError};

const TARGET: &str = "nvptx64-nvidia-cuda";

/// The profile of device builds. One of its own, so that the workspace's settings for host code do not reach kernels.
const PROFILE: &str = "device";

/// Functions that the driver itself has for kernels.
const DRIVER_FUNCTIONS: [&str; 4] = ["vprintf", "malloc", "free", "__assertfail"];

/// Builds one kernel crate. Every setting has a default; only the crate is needed.
#[derive(Clone, Debug)]
pub struct CudaBuilder {
    kernel_crate: PathBuf,
    arch: Arch,
    support_ir: Vec<PathBuf>,
    line_info: bool,
    fma_contraction: bool,
    emit_llvm_ir: bool,
    build_args: Vec<OsString>,
    target_dir: Option<PathBuf>,
    copy_to: Option<PathBuf>,
    toolchain: Option<Toolchain>,
}

/// What a build made for one architecture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Built {
    /// The architecture.
    pub arch: Arch,
    /// The PTX.
    pub ptx: PathBuf,
    /// The optimised LLVM IR that the PTX was made from, if it was asked for.
    pub llvm_ir: Option<PathBuf>,
}

/// Why there is no PTX.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CudaBuilderError {
    /// There is no device toolchain.
    #[error(transparent)]
    Toolchain(#[from] ToolchainError),
    /// One of the tools failed: most often cargo, because the kernel crate does not compile.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// The folder holds no crate.
    #[error("no kernel crate in {0:?}: it has no Cargo.toml")]
    NoCrate(PathBuf),
    /// The crate has no library.
    #[error("the crate in {0:?} has no library target, so there is nothing to build kernels from")]
    NoLibrary(PathBuf),
    /// The crate has a library without kernels.
    #[error(
        "{0:?} has no kernel: no `extern \"ptx-kernel\"` function with `#[unsafe(no_mangle)]` is left after linking"
    )]
    NoKernels(String),
    /// Something is called that nobody defines. The driver would refuse the module.
    #[error("{library:?} calls functions that neither it nor the support IR defines: {}", names.join(", "))]
    Undefined {
        /// The library.
        library: String,
        /// The functions.
        names: Vec<String>,
    },
    /// Cargo succeeded, but the compiler's output is not where it should be.
    #[error(
        "cargo succeeded but left no bitcode at {0:?}; is another toolchain in use than the builder knows?"
    )]
    NoBitcode(PathBuf),
    /// What cargo says of the crate is not as expected.
    #[error("cargo metadata of {0:?} is not understood")]
    Metadata(PathBuf),
    /// A file could not be read or written.
    #[error("{path:?}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Of an operation on the file at `path`.
fn io_error(path: &Path) -> impl FnOnce(io::Error) -> CudaBuilderError {
    move |source| CudaBuilderError::Io { path: path.to_owned(), source }
}

impl CudaBuilder {
    /// A builder for the crate in the folder `kernel_crate`: for [`Arch::Sm90a`], with line information and without
    /// contraction of `a * b + c`, unless told otherwise.
    pub fn new(kernel_crate: impl Into<PathBuf>) -> Self {
        Self {
            kernel_crate: kernel_crate.into(),
            arch: Arch::Sm90a,
            support_ir: Vec::new(),
            line_info: true,
            fma_contraction: false,
            emit_llvm_ir: false,
            build_args: Vec::new(),
            target_dir: None,
            copy_to: None,
            toolchain: None,
        }
    }

    /// The architecture that [`build`](Self::build) builds for.
    #[must_use]
    pub fn arch(mut self, arch: Arch) -> Self {
        self.arch = arch;
        self
    }

    /// Links a file of LLVM IR (text or bitcode) into the module. Call it once a file.
    #[must_use]
    pub fn support_ir(mut self, file: impl Into<PathBuf>) -> Self {
        self.support_ir.push(file.into());
        self
    }

    /// Whether PTX says which source line an instruction comes from. It does not change the instructions.
    #[must_use]
    pub fn generate_line_info(mut self, line_info: bool) -> Self {
        self.line_info = line_info;
        self
    }

    /// Whether `a * b + c` may become one rounded-once instruction. Rust's rules say no, as does the default: kernels
    /// then agree with host code and ask for `fma` where they want it.
    #[must_use]
    pub fn fma_contraction(mut self, fma_contraction: bool) -> Self {
        self.fma_contraction = fma_contraction;
        self
    }

    /// Whether the optimised LLVM IR is kept, as text, in the target folder.
    #[must_use]
    pub fn emit_llvm_ir(mut self, emit_llvm_ir: bool) -> Self {
        self.emit_llvm_ir = emit_llvm_ir;
        self
    }

    /// More arguments for cargo, such as `--features x` or `--locked`.
    #[must_use]
    pub fn build_args(mut self, arguments: impl IntoIterator<Item = impl Into<OsString>>) -> Self {
        self.build_args.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// Where build products go. By default the folder `device` in the workspace's own target folder: apart from it,
    /// because cargo locks a target folder while it builds, and the caller may itself be run by cargo.
    #[must_use]
    pub fn target_dir(mut self, folder: impl Into<PathBuf>) -> Self {
        self.target_dir = Some(folder.into());
        self
    }

    /// Where [`build`](Self::build) puts the PTX, instead of in the target folder.
    #[must_use]
    pub fn copy_to(mut self, file: impl Into<PathBuf>) -> Self {
        self.copy_to = Some(file.into());
        self
    }

    /// The tools to build with, instead of [`Toolchain::find`]'s.
    #[must_use]
    pub fn toolchain(mut self, toolchain: Toolchain) -> Self {
        self.toolchain = Some(toolchain);
        self
    }

    /// Builds for one architecture and says where the PTX is.
    ///
    /// # Errors
    /// If no toolchain is complete, the crate does not compile, or something it calls is defined nowhere.
    pub fn build(&self) -> Result<PathBuf, CudaBuilderError> {
        let prepared = self.prepare()?;
        let built = prepared.finish(&prepared.compile(self.arch)?, self.arch)?;
        match &self.copy_to {
            None => Ok(built.ptx),
            Some(file) => copy(&built.ptx, file),
        }
    }

    /// Builds for several architectures and writes `folder/sm_80.ptx` and so on. Takes little longer than building
    /// for one: `core` and all dependencies are shared. Nothing is written to `folder` unless all succeed.
    ///
    /// # Errors
    /// As [`build`](Self::build).
    pub fn build_archs(
        &self,
        archs: &[Arch],
        folder: impl AsRef<Path>,
    ) -> Result<Vec<Built>, CudaBuilderError> {
        let prepared = self.prepare()?;
        // While the compiler is at one, LLVM's tools are at the one before.
        let mut all = thread::scope(|scope| {
            let mut under_way = Vec::new();
            for &arch in archs {
                let bitcode = prepared.compile(arch)?;
                let prepared = &prepared;
                under_way.push(scope.spawn(move || prepared.finish(&bitcode, arch)));
            }
            let join = |thread: thread::ScopedJoinHandle<'_, _>| thread.join().expect("it does not panic");
            under_way.into_iter().map(join).collect::<Result<Vec<Built>, CudaBuilderError>>()
        })?;
        for built in &mut all {
            built.ptx = copy(&built.ptx, &folder.as_ref().join(format!("{}.ptx", built.arch)))?;
        }
        Ok(all)
    }

    fn prepare(&self) -> Result<Prepared<'_>, CudaBuilderError> {
        let manifest = self.kernel_crate.join("Cargo.toml");
        // Cargo runs elsewhere, in the workspace's root.
        let manifest =
            manifest.canonicalize().map_err(|_| CudaBuilderError::NoCrate(self.kernel_crate.clone()))?;
        let toolchain = match &self.toolchain {
            Some(toolchain) => toolchain.clone(),
            None => Toolchain::find()?,
        };
        let about = Metadata::ask(&toolchain, &manifest)?;
        let target_dir = match &self.target_dir {
            Some(folder) => std::path::absolute(folder).map_err(io_error(folder))?,
            None => about.target_dir.join("device"),
        };
        let products = target_dir.join("ptx").join(&about.library);
        std::fs::create_dir_all(&products).map_err(io_error(&products))?;
        // Another build in the same folder would replace the bitcode between the compiler's work and ours.
        let lock_path = target_dir.join(".cuda_builder-lock");
        let lock = File::create(&lock_path).map_err(io_error(&lock_path))?;
        lock.lock().map_err(io_error(&lock_path))?;
        Ok(Prepared { settings: self, toolchain, manifest, about, target_dir, products, _lock: lock })
    }
}

fn copy(from: &Path, to: &Path) -> Result<PathBuf, CudaBuilderError> {
    if let Some(folder) = to.parent() {
        std::fs::create_dir_all(folder).map_err(io_error(folder))?;
    }
    std::fs::copy(from, to).map_err(io_error(to))?;
    Ok(to.to_owned())
}

/// What cargo says of the crate.
struct Metadata {
    workspace_root: PathBuf,
    target_dir: PathBuf,
    /// The library's name, with underscores.
    library: String,
}

impl Metadata {
    fn ask(toolchain: &Toolchain, manifest: &Path) -> Result<Self, CudaBuilderError> {
        let mut cargo = toolchain.cargo_command();
        cargo.args(["metadata", "--no-deps", "--format-version", "1", "--manifest-path"]).arg(manifest);
        let text = run(&mut cargo)?.stdout;
        let not_understood = || CudaBuilderError::Metadata(manifest.to_owned());
        let all: serde_json::Value = serde_json::from_str(&text).map_err(|_| not_understood())?;
        let path = |name: &str| all[name].as_str().map(PathBuf::from).ok_or_else(not_understood);
        let packages = all["packages"].as_array().ok_or_else(not_understood)?;
        let package = packages
            .iter()
            .find(|package| package["manifest_path"].as_str().is_some_and(|path| Path::new(path) == manifest))
            .ok_or_else(not_understood)?;
        let mut targets = package["targets"].as_array().into_iter().flatten();
        let library = targets
            .find(|target| target["kind"][0] == "lib" || target["kind"][0] == "rlib")
            .and_then(|target| target["name"].as_str())
            .ok_or_else(|| CudaBuilderError::NoLibrary(manifest.to_owned()))?;
        Ok(Self {
            workspace_root: path("workspace_root")?,
            target_dir: path("target_directory")?,
            library: library.replace('-', "_"),
        })
    }
}

/// A builder that has found everything and holds the target folder's lock.
struct Prepared<'a> {
    settings: &'a CudaBuilder,
    toolchain: Toolchain,
    manifest: PathBuf,
    about: Metadata,
    target_dir: PathBuf,
    /// The folder of the PTX and of the files between the steps.
    products: PathBuf,
    _lock: File,
}

impl Prepared<'_> {
    /// From bitcode, which is then gone, to PTX.
    fn finish(&self, bitcode: &Path, arch: Arch) -> Result<Built, CudaBuilderError> {
        let linked = self.link(bitcode, arch)?;
        std::fs::remove_file(bitcode).map_err(io_error(bitcode))?;
        let optimised = self.optimise(&linked, arch)?;
        let ptx = self.generate(&optimised, arch)?;
        let llvm_ir = if self.settings.emit_llvm_ir {
            Some(optimised)
        } else {
            std::fs::remove_file(&optimised).map_err(io_error(&optimised))?;
            None
        };
        std::fs::remove_file(&linked).map_err(io_error(&linked))?;
        Ok(Built { arch, ptx, llvm_ir })
    }

    /// The kernel crate and all it depends on, as one module of bitcode.
    fn compile(&self, arch: Arch) -> Result<PathBuf, CudaBuilderError> {
        let bitcode = self.target_dir.join(TARGET).join(PROFILE).join("deps");
        let bitcode = bitcode.join(format!("{}.bc", self.about.library));
        // A file of a build that failed must not be taken for this one's.
        if bitcode.exists() {
            std::fs::remove_file(&bitcode).map_err(io_error(&bitcode))?;
        }
        let mut cargo = self.toolchain.cargo_command();
        cargo.current_dir(&self.about.workspace_root);
        // This variable outranks rustflags of every configuration file, which are meant for host code.
        cargo.env("CARGO_ENCODED_RUSTFLAGS", self.rustflags());
        cargo
            .args(["rustc", "--quiet", "--lib", "--crate-type", "cdylib", "--manifest-path"])
            .arg(&self.manifest);
        cargo.args(["-Zbuild-std=core", "-Zpanic-immediate-abort", "--target", TARGET]);
        cargo.arg("--target-dir").arg(&self.target_dir).args(["--profile", PROFILE]);
        for setting in [
            "inherits='release'",
            "opt-level=3",
            "lto='fat'",
            "codegen-units=1",
            // Most of a first build is `core`: on all of the machine's cores. Fat LTO joins the parts again.
            "package.core.codegen-units=16",
            "panic='immediate-abort'",
            "overflow-checks=false",
            "debug-assertions=false",
            "incremental=false",
            "strip='none'",
        ] {
            cargo.arg("--config").arg(format!("profile.{PROFILE}.{setting}"));
        }
        cargo.args(&self.settings.build_args);
        // Only these concern the architecture, and they reach only the kernel crate: one build of the dependencies
        // serves all. `-C linker=true` makes rustc's own link step do nothing.
        cargo.args(["--", "--emit=llvm-bc", "-C", "linker=true", "-C", &format!("target-cpu={arch}")]);
        cargo.args(["--check-cfg", "cfg(sm_90, sm_90a)"]);
        if arch.has_sm_90() {
            cargo.args(["--cfg", "sm_90"]);
        }
        if arch.has_wgmma() {
            cargo.args(["--cfg", "sm_90a"]);
        }
        let written = run(&mut cargo)?;
        if !written.stderr.is_empty() {
            // The compiler's warnings.
            eprintln!("{}", written.stderr);
        }
        if !bitcode.exists() {
            return Err(CudaBuilderError::NoBitcode(bitcode));
        }
        // Out of the way of the next architecture's.
        let own = self.products.join(format!("{arch}.bc"));
        std::fs::rename(&bitcode, &own).map_err(io_error(&own))?;
        Ok(own)
    }

    /// Flags for every crate, `core` included, in cargo's encoding.
    fn rustflags(&self) -> OsString {
        // The one level of debug information that ptxas accepts. Who does not want it loses it later, so that all
        // builds share one `core`.
        let mut flags = OsString::from("-Cdebuginfo=line-directives-only");
        let mut remap = |from: &Path, to: &str| {
            flags.push("\x1f--remap-path-prefix=");
            flags.push(from);
            flags.push("=");
            flags.push(to);
        };
        remap(&self.about.workspace_root, ".");
        let home = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo"));
        if let Some(cargo_home) = std::env::var_os("CARGO_HOME").map(PathBuf::from).or(home) {
            remap(&cargo_home.join("registry/src"), "registry");
            remap(&cargo_home.join("git/checkouts"), "git");
        }
        // Of two that match the last one counts, so these stand after folders that may hold them.
        let library = self.toolchain.library();
        remap(library, "rust-src/library");
        if let Ok(real) = library.canonicalize() {
            remap(&real, "rust-src/library");
        }
        flags
    }

    /// The module joined with the support IR.
    fn link(&self, bitcode: &Path, arch: Arch) -> Result<PathBuf, CudaBuilderError> {
        let linked = self.products.join(format!("{arch}.linked.ll"));
        let mut command = self.toolchain.llvm_command("llvm-link");
        run(command.arg("-S").arg(bitcode).args(&self.settings.support_ir).arg("-o").arg(&linked))?;
        Ok(linked)
    }

    /// The module with nothing but kernels and what they use.
    fn optimise(&self, linked: &Path, arch: Arch) -> Result<PathBuf, CudaBuilderError> {
        let kernels = kernels_in(&read(linked)?).join(",");
        if kernels.is_empty() {
            return Err(CudaBuilderError::NoKernels(self.about.library.clone()));
        }
        let optimised = self.products.join(format!("{arch}.ll"));
        let mut command = self.toolchain.llvm_command("opt");
        command.arg(format!("-internalize-public-api-list={kernels}"));
        command.arg("-passes=internalize,globaldce,default<O3>,globaldce");
        if !self.settings.line_info {
            command.arg("-strip-debug");
        }
        run(command.arg("-S").arg(linked).arg("-o").arg(&optimised))?;
        let names = undefined_in(&read(&optimised)?);
        if names.is_empty() {
            Ok(optimised)
        } else {
            Err(CudaBuilderError::Undefined { library: self.about.library.clone(), names })
        }
    }

    /// PTX.
    fn generate(&self, optimised: &Path, arch: Arch) -> Result<PathBuf, CudaBuilderError> {
        let ptx = self.products.join(format!("{arch}.ptx"));
        let mut command = self.toolchain.llvm_command("llc");
        command.args(["-O3", &format!("-mcpu={arch}"), &format!("-mattr=+ptx{}", arch.ptx_version())]);
        // The comments repeat `.loc` lines in words and are two thirds of the text.
        command.arg("-asm-verbose=false");
        if self.settings.fma_contraction {
            // Without it, exactly the operations that carry LLVM's `contract` flag are contracted: those of support IR.
            command.arg("-fp-contract=fast");
        }
        run(command.arg(optimised).arg("-o").arg(&ptx))?;
        Ok(ptx)
    }
}

fn read(path: &Path) -> Result<String, CudaBuilderError> {
    std::fs::read_to_string(path).map_err(io_error(path))
}

/// The names of the kernels that a module in LLVM's text form defines.
fn kernels_in(module: &str) -> Vec<&str> {
    let definitions =
        module.lines().filter(|line| line.starts_with("define ") && line.contains(" ptx_kernel "));
    definitions.filter_map(function_name).collect()
}

/// The names of the functions that a module in LLVM's text form calls but that exist nowhere.
fn undefined_in(module: &str) -> Vec<String> {
    let declared = module.lines().filter(|line| line.starts_with("declare ")).filter_map(function_name);
    let unknown = declared.filter(|name| !name.starts_with("llvm.") && !DRIVER_FUNCTIONS.contains(name));
    unknown.map(str::to_owned).collect()
}

/// The name in the first line of a function in LLVM's text form. Attributes before it may have parentheses, but no `@`.
fn function_name(line: &str) -> Option<&str> {
    let (_, rest) = line.split_once('@')?;
    match rest.strip_prefix('"') {
        Some(quoted) => quoted.split_once('"').map(|(name, _)| name),
        None => rest.split_once('(').map(|(name, _)| name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODULE: &str = r#"
@TABLE = internal unnamed_addr constant [4 x i8] c"abcd", align 4
define ptx_kernel void @gather(ptr noundef captures(none) %x) unnamed_addr #0 !dbg !10 {
  %r = call i32 @"odd name"(i32 1)
}
define internal fastcc noundef range(i32 0, 8) i32 @helper(i32 noundef %0) unnamed_addr #6 {
}
define weak_odr ptx_kernel void @scatter() {
}
declare void @llvm.nvvm.barrier.cta.sync.aligned.all(i32) #1
declare noundef i32 @vprintf(ptr, ptr)
declare i32 @"odd name"(i32) unnamed_addr #2
declare float @expf(float)
"#;

    #[test]
    fn kernels_are_found_in_ir() {
        assert_eq!(kernels_in(MODULE), ["gather", "scatter"]);
    }

    #[test]
    fn functions_that_nobody_defines_are_found_in_ir() {
        assert_eq!(undefined_in(MODULE), ["odd name", "expf"]);
    }

    #[test]
    fn a_folder_without_a_crate_is_named() {
        let empty = tempfile::tempdir().unwrap();
        let error = CudaBuilder::new(empty.path()).build().unwrap_err();
        assert!(matches!(&error, CudaBuilderError::NoCrate(folder) if folder == empty.path()), "{error}");
    }
}
