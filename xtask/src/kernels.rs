//! Building the workspace's kernel crates.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Instant;

use cuda_builder::{Arch, Built, CudaBuilder, Ptxas, Toolchain};

use crate::Outcome;
use crate::manifest::{Compilers, Manifest};

/// LLVM IR of `cuda_std`, which every kernel crate is linked with.
const SUPPORT_IR: &str = "cuda_std/src/device.ll";

/// A crate of kernels whose PTX is under version control.
#[derive(Debug)]
pub struct KernelCrate {
    pub folder: &'static str,
    pub archs: &'static [Arch],
    /// Whether the PTX names lines of Rust, for profilers.
    line_info: bool,
}

/// The product: what engines launch. It has a manifest, and rules that [`crate::check`] holds it to.
pub const PRODUCT: KernelCrate = KernelCrate { folder: "gpu-kernels", archs: &Arch::ALL, line_info: true };

/// Kernels that test `cuda_std` on a GPU. They show what is right, not what is fast: nobody profiles them. Each stands in one module: that
/// of sm_80 runs anywhere, the others hold what needs more.
pub const CONFORMANCE: KernelCrate =
    KernelCrate { folder: "cuda_std/conformance", archs: &Arch::ALL, line_info: false };

impl KernelCrate {
    /// Where its PTX is kept.
    pub fn ptx_folder(&self) -> PathBuf {
        Path::new(self.folder).join("ptx")
    }

    pub fn ptx_file(&self, arch: Arch) -> PathBuf {
        self.ptx_folder().join(format!("{arch}.ptx"))
    }

    /// The product's manifest.
    pub fn manifest(&self) -> PathBuf {
        self.ptx_folder().join("manifest.toml")
    }

    /// Builds the crate for `archs` into `folder`.
    pub fn build(
        &self,
        toolchain: &Toolchain,
        archs: &[Arch],
        llvm_ir: bool,
        folder: &Path,
    ) -> Outcome<Vec<Built>> {
        let start = Instant::now();
        let names = archs.iter().map(|arch| arch.name()).collect::<Vec<_>>().join(", ");
        eprintln!("xtask: building {} for {names}", self.folder);
        let builder = CudaBuilder::new(self.folder).toolchain(toolchain.clone()).support_ir(SUPPORT_IR);
        let builder =
            builder.build_args(["--locked"]).emit_llvm_ir(llvm_ir).generate_line_info(self.line_info);
        let built = builder.build_archs(archs, folder)?;
        eprintln!("xtask: built {} in {:.1} s", self.folder, start.elapsed().as_secs_f64());
        Ok(built)
    }
}

/// Compile the GPU kernels to the PTX that is committed.
///
/// Builds gpu-kernels and cuda_std/conformance for sm_80, sm_90a and sm_100a, and writes their
/// ptx/ folders and gpu-kernels/ptx/manifest.toml: compiler versions, and registers, shared memory, stack, spills and
/// collectives of every kernel. Commit them with the change of the source; reviewers read the manifest.
///
/// Needs the device toolchain and ptxas, which `cargo xtask doctor` finds or says how to get; no GPU. About half a
/// minute on 2 cores the first time (it compiles core), a few seconds after that.
///
/// Example: cargo xtask build-kernels --arch sm_90a --emit-llvm-ir
#[derive(clap::Args)]
pub struct BuildKernels {
    /// Only this architecture: sm_80, sm_90a or sm_100a. May be given more than once. For trying things out: commit a
    /// build of all.
    #[arg(long = "arch", value_name = "ARCH")]
    archs: Vec<Arch>,
    /// Keep the optimised LLVM IR of each module, and say where.
    #[arg(long)]
    emit_llvm_ir: bool,
}

impl BuildKernels {
    pub fn run(self) -> Outcome {
        let toolchain = Toolchain::find()?;
        let ptxas = Ptxas::find()?;
        let compilers = Compilers::of(&toolchain, Some(&ptxas));
        let names = compilers.to_string();
        eprintln!("xtask: {names}");
        self.build(&PRODUCT, &toolchain)?;
        let mut manifest = Manifest::new(compilers);
        // One that was never built has nothing to say in the manifest; check-kernels misses it.
        let built = PRODUCT.archs.iter().map(|&arch| (arch, PRODUCT.ptx_file(arch)));
        let built: Vec<_> =
            built.filter_map(|(arch, file)| Some((arch, fs::read_to_string(&file).ok()?, file))).collect();
        let reports: Vec<_> = thread::scope(|scope| {
            let ptxas = &ptxas;
            let start = |(arch, _, file): &(Arch, String, PathBuf)| {
                let (arch, file) = (*arch, file.clone());
                scope.spawn(move || assemble(ptxas, &file, arch).map_err(|error| error.to_string()))
            };
            let threads: Vec<_> = built.iter().map(start).collect();
            threads.into_iter().map(|thread| thread.join().expect("it does not panic")).collect()
        });
        for ((arch, text, _), report) in built.iter().zip(reports) {
            manifest.add(*arch, text, &report?);
        }
        fs::write(PRODUCT.manifest(), manifest.to_string())?;
        eprintln!("xtask: wrote {}", PRODUCT.manifest().display());
        // It changes only with cuda_std, which kernels do not: it is not built again for each of theirs.
        let stamp = Path::new("target/device/conformance.stamp");
        let fingerprint = || fingerprint(&names);
        if self.archs.is_empty()
            && fs::read_to_string(stamp).is_ok_and(|kept| fingerprint().is_ok_and(|now| now == kept))
        {
            eprintln!("xtask: {} is as it was built", CONFORMANCE.folder);
            return Ok(());
        }
        self.build(&CONFORMANCE, &toolchain)?;
        if self.archs.is_empty() {
            fs::write(stamp, fingerprint()?)?;
        }
        Ok(())
    }

    fn build(&self, kernels: &KernelCrate, toolchain: &Toolchain) -> Outcome {
        let wanted = |arch: &&Arch| self.archs.is_empty() || self.archs.contains(arch);
        let archs: Vec<Arch> = kernels.archs.iter().filter(wanted).copied().collect();
        if archs.is_empty() {
            return Ok(());
        }
        for built in kernels.build(toolchain, &archs, self.emit_llvm_ir, &kernels.ptx_folder())? {
            eprintln!("xtask: wrote {}", built.ptx.display());
            if let Some(ir) = built.llvm_ir {
                eprintln!("xtask: LLVM IR in {}", ir.display());
            }
        }
        Ok(())
    }
}

/// A number that stands for all that the conformance kernels' PTX is made of, and that PTX: every file of `cuda_std`, what is locked, and
/// the compilers.
fn fingerprint(compilers: &str) -> Outcome<String> {
    let mut hasher = DefaultHasher::new();
    compilers.hash(&mut hasher);
    let mut places = vec![PathBuf::from("Cargo.lock"), PathBuf::from("cuda_std")];
    while let Some(place) = places.pop() {
        if place.is_dir() {
            let mut inside =
                fs::read_dir(&place)?.map(|entry| Ok(entry?.path())).collect::<Outcome<Vec<_>>>()?;
            inside.sort();
            places.append(&mut inside);
        } else {
            (&place, fs::read(&place)?).hash(&mut hasher);
        }
    }
    Ok(format!("{:016x}", hasher.finish()))
}

/// What ptxas says of a file; the machine code is not kept.
pub fn assemble(ptxas: &Ptxas, ptx: &Path, arch: Arch) -> Outcome<cuda_builder::Report> {
    let folder = tempfile::tempdir()?;
    let report = ptxas.assemble(ptx, arch, &folder.path().join("cubin"));
    report.map_err(|error| format!("{}: {error}", ptx.display()).into())
}
