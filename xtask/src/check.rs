//! Holding the committed PTX to its source and to rules that a compiler could break unseen.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use cuda_builder::ptx::{Module, Space, absolute_paths};
use cuda_builder::{Arch, Frame, Ptxas, PtxasError, Report, Toolchain};

use crate::Outcome;
use crate::kernels::{CONFORMANCE, KernelCrate, PRODUCT, assemble};
use crate::manifest::{Compilers, Manifest, difference};
use crate::source::{self, Kernel};

/// Hold the committed PTX to its source.
///
/// Builds all kernels anew in a temporary folder and compares: the same bytes, the same manifest. Other compilers than
/// the manifest's are a problem too, unless --other-compilers says that bytes and registers may differ. Then, for the
/// committed PTX and the fresh one:
///
/// ptxas takes it for each architecture. Each `#[kernel]` of gpu-kernels is an entry and each entry a `#[kernel]`,
/// with as many collectives as its attribute declares, as in `#[kernel(collectives(shuffle = 5, barrier = 1))]`; those with
/// `sm_90` are entries of sm_90a and newer alone, those with `sm_90a` of that alone: a
/// compiler that duplicates or drops one makes a kernel hang. No spills, no local memory, no load, store or atomic
/// without a state space. No path of the building machine.
///
/// Needs the device toolchain and ptxas, which `cargo xtask doctor` finds or says how to get; no GPU. About half a
/// minute on 2 cores the first time (it compiles core), a few seconds after that.
///
/// Example: cargo xtask check-kernels --no-ptxas
#[derive(clap::Args, Default)]
pub struct CheckKernels {
    /// Go on without ptxas: PTX is then not assembled, nor are registers and spills looked at.
    #[arg(long)]
    no_ptxas: bool,
    /// Go on with other compilers than the manifest's: bytes and registers are then not compared, all else is.
    #[arg(long)]
    other_compilers: bool,
}

impl CheckKernels {
    pub fn run(self) -> Outcome {
        let toolchain = Toolchain::find()?;
        let ptxas = match Ptxas::find() {
            Ok(ptxas) if !self.no_ptxas => Some(ptxas),
            Ok(_) => None,
            Err(PtxasError::NotFound) if self.no_ptxas => None,
            Err(error) => {
                return Err(format!(
                    "{error}; `cargo xtask doctor --fetch-ptxas` does so, --no-ptxas goes on"
                )
                .into());
            }
        };
        let fresh = Compilers::of(&toolchain, ptxas.as_ref());
        let text = fs::read_to_string(PRODUCT.manifest());
        let manifest =
            text.map_err(|error| format!("{}: {error}; run build-kernels", PRODUCT.manifest().display()))?;
        let committed = Compilers::parse(&manifest)
            .map_err(|error| format!("{}: {error}", PRODUCT.manifest().display()))?;
        let same_ptx = fresh.make_the_same_ptx(&committed);
        if !same_ptx {
            eprintln!(
                "xtask: OTHER COMPILERS than the manifest's, so neither bytes nor registers are compared:"
            );
            eprintln!("xtask:   committed with {committed}");
            eprintln!("xtask:   here          {fresh}");
        }
        let mut problems = Vec::new();
        if (!same_ptx || (ptxas.is_some() && fresh != committed)) && !self.other_compilers {
            let advice = "install those, or run `cargo xtask build-kernels` and commit what changes";
            problems
                .push(format!("the compilers are not the manifest's: {advice} (--other-compilers goes on)"));
        }
        let check = Check { toolchain, ptxas, same_ptx };
        let product = check.crate_of(&PRODUCT, &mut problems)?;
        check.crate_of(&CONFORMANCE, &mut problems)?;
        check.product(&product, &mut problems)?;
        if check.ptxas.is_some() {
            let same = same_ptx && fresh == committed;
            if same_ptx && !same {
                eprintln!(
                    "xtask: another ptxas than the manifest's, so registers are not compared ({fresh})"
                );
            }
            check.manifest(fresh, &manifest, &product, same, &mut problems)?;
        } else {
            eprintln!("xtask: without ptxas: neither assembled nor compared with the manifest");
        }
        if problems.is_empty() {
            return Ok(());
        }
        for problem in &problems {
            eprintln!("xtask: {problem}");
        }
        let what = if problems.len() == 1 { "problem" } else { "problems" };
        Err(format!("{} {what} with the kernels", problems.len()).into())
    }
}

/// What a check knows throughout.
struct Check {
    toolchain: Toolchain,
    ptxas: Option<Ptxas>,
    /// Whether the compilers make the same bytes as those that made the committed PTX.
    same_ptx: bool,
}

/// A file of PTX to be looked at.
struct Ptx {
    arch: Arch,
    /// As problems call it.
    name: PathBuf,
    text: String,
    module: Module,
    report: Option<Report>,
}

fn machine_paths(ptx: &Ptx) -> Vec<String> {
    let problem = |path| format!("{}: holds a path of a machine, {path}", ptx.name.display());
    absolute_paths(&ptx.text).into_iter().map(problem).collect()
}

impl Check {
    /// Builds a crate anew, compares it with what is committed, and returns the PTX that the remaining rules concern:
    /// the fresh one, and the committed one where it may rightly differ.
    fn crate_of(&self, kernels: &KernelCrate, problems: &mut Vec<String>) -> Outcome<Vec<Ptx>> {
        let folder = tempfile::tempdir()?;
        let mut found = Vec::new();
        for built in kernels.build(&self.toolchain, kernels.archs, false, folder.path())? {
            let name = kernels.ptx_file(built.arch);
            let fresh = self.read(built.arch, &built.ptx, Path::new("fresh").join(&name))?;
            problems.extend(machine_paths(&fresh));
            if !name.exists() {
                problems.push(format!("{}: missing; run `cargo xtask build-kernels`", name.display()));
            } else {
                let committed = self.read(built.arch, &name, name.clone())?;
                if !self.same_ptx {
                    problems.extend(machine_paths(&committed));
                    found.push(committed);
                } else if let Some(problem) = first_difference(&committed, &fresh) {
                    problems.push(problem);
                }
            }
            found.push(fresh);
        }
        Ok(found)
    }

    fn read(&self, arch: Arch, file: &Path, name: PathBuf) -> Outcome<Ptx> {
        let text = fs::read_to_string(file)?;
        let report = self.ptxas.as_ref().map(|ptxas| assemble(ptxas, file, arch)).transpose()?;
        Ok(Ptx { arch, name, module: Module::parse(&text), text, report })
    }

    /// The rules for kernels that engines launch.
    fn product(&self, ptx: &[Ptx], problems: &mut Vec<String>) -> Outcome {
        let kernels = source::kernels_in(&Path::new(PRODUCT.folder).join("src"))?;
        for ptx in ptx {
            let of_file =
                entries_and_source(ptx.arch, &ptx.module, &kernels).into_iter().chain(memory(&ptx.module));
            let of_file = of_file.chain(ptx.report.iter().flat_map(spills));
            let of_file = of_file.chain(ptx.report.iter().flat_map(serialised));
            problems.extend(of_file.map(|problem| format!("{}: {problem}", ptx.name.display())));
        }
        Ok(())
    }

    /// Compares the manifest with that of the fresh PTX.
    fn manifest(
        &self,
        compilers: Compilers,
        committed: &str,
        product: &[Ptx],
        same: bool,
        problems: &mut Vec<String>,
    ) -> Outcome {
        let mut manifest = Manifest::new(compilers);
        for ptx in product.iter().filter(|ptx| ptx.name.starts_with("fresh")) {
            manifest.add(ptx.arch, &ptx.text, ptx.report.as_ref().ok_or("no report of ptxas")?);
        }
        let fresh = manifest.to_string();
        if fresh != committed {
            for line in difference(committed, &fresh) {
                eprintln!("xtask: {}: {line}", PRODUCT.manifest().display());
            }
            if same {
                let name = PRODUCT.manifest();
                problems
                    .push(format!("{}: differs, see above; run `cargo xtask build-kernels`", name.display()));
            }
        }
        Ok(())
    }
}

/// Where committed PTX first differs from what the source gives now.
fn first_difference(committed: &Ptx, fresh: &Ptx) -> Option<String> {
    if committed.text == fresh.text {
        return None;
    }
    let (mut old, mut new) = (committed.text.lines(), fresh.text.lines());
    let mut line = 1;
    let (old, new) = loop {
        match (old.next(), new.next()) {
            (Some(old), Some(new)) if old == new => line += 1,
            (None, None) => break ("another end of line", "the same text"),
            (old, new) => break (old.unwrap_or("the file's end"), new.unwrap_or("the file's end")),
        }
    };
    let function = committed.module.function_at(line).or_else(|| fresh.module.function_at(line));
    let function = function.map(|function| format!(", in {}", function.name)).unwrap_or_default();
    Some(format!(
        "{}:{line}{function}: is not what the source gives now; run `cargo xtask build-kernels`\n    committed: {}\n    \
         now:       {}",
        committed.name.display(),
        old.trim(),
        new.trim()
    ))
}

/// Kernels in one of PTX and source but not in the other, and collectives that the compiler multiplied or dropped.
fn entries_and_source(arch: Arch, module: &Module, kernels: &BTreeMap<String, Kernel>) -> Vec<String> {
    let mut problems = Vec::new();
    for entry in module.entries() {
        match kernels.get(&entry.name) {
            None => problems.push(format!("entry {} has no #[kernel] in the source", entry.name)),
            Some(kernel) if !kernel.declared.needs.are_met_by(arch) => problems.push(format!(
                "entry {} needs {}, as {} declares, and this is {arch}",
                entry.name,
                kernel.declared.needs,
                kernel.file.display()
            )),
            Some(kernel) => {
                let (declared, found) = (kernel.declared.collectives, module.collectives(entry));
                for ((kind, declared), (_, found)) in declared.by_kind().into_iter().zip(found.by_kind()) {
                    if declared != found {
                        problems.push(format!(
                            "entry {} has {found} collectives of kind {kind}, but {} declares {declared}",
                            entry.name,
                            kernel.file.display()
                        ));
                    }
                }
            }
        }
    }
    let missing = kernels.iter().filter(|(name, kernel)| {
        kernel.declared.needs.are_met_by(arch) && module.entries().all(|entry| entry.name != **name)
    });
    problems.extend(
        missing.map(|(name, kernel)| format!("kernel {name} of {} is not an entry", kernel.file.display())),
    );
    problems
}

/// Accesses that are slower than they look. Functions that are not inlined are looked at like kernels.
fn memory(module: &Module) -> Vec<String> {
    let mut problems = Vec::new();
    for function in &module.functions {
        for (space, what) in [(Space::Generic, "no state space"), (Space::Local, "local memory")] {
            for (opcode, count) in function.opcodes_of(space) {
                problems.push(format!("{}: {what} in {opcode} ({count} times)", function.name));
            }
        }
        if function.has_local_variables {
            problems.push(format!("{}: has variables in local memory", function.name));
        }
    }
    problems
}

/// Local memory that ptxas adds.
fn spills(report: &Report) -> Vec<String> {
    let kernels = report.kernels.iter().map(|(name, resources)| (name, resources.frame));
    let frames = kernels.chain(report.functions.iter().map(|(name, &frame)| (name, frame)));
    let bad = frames.filter(|(_, frame)| *frame != Frame::default());
    bad.map(|(name, Frame { stack, spill_stores, spill_loads })| {
        format!("{name}: {stack} bytes of stack, {spill_stores} stored and {spill_loads} loaded for spills; limit 0")
    })
    .collect()
}

/// Products of a warpgroup that wait for each other, where ptxas finds their registers moved.
fn serialised(report: &Report) -> Vec<String> {
    report.warnings.iter().filter(|warning| warning.contains("serialized")).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::{Declared, Needs};
    use cuda_builder::Resources;
    use cuda_builder::ptx::Collectives;

    fn ptx(text: &str) -> Ptx {
        let name = PathBuf::from("ptx/sm_80.ptx");
        Ptx { arch: Arch::Sm80, name, text: text.to_owned(), module: Module::parse(text), report: None }
    }

    fn kernels(declared: &[(&str, Collectives)]) -> BTreeMap<String, Kernel> {
        let file = || PathBuf::from("src/k.rs");
        declared
            .iter()
            .map(|&(name, collectives)| {
                let needs = match name {
                    "new" => Needs::Sm90,
                    "hopper" => Needs::Sm90a,
                    _ => Needs::Nothing,
                };
                let declared = Declared { needs, collectives };
                (name.to_owned(), Kernel { file: file(), declared })
            })
            .collect()
    }

    #[test]
    fn a_difference_names_line_and_kernel() {
        let old = ptx(".version 8.0\n.visible .entry k() {\n add.u32 %r1;\n}\n");
        assert_eq!(first_difference(&old, &old), None);
        let new = ptx(".version 8.0\n.visible .entry k() {\n sub.u32 %r1;\n}\n");
        let problem = first_difference(&old, &new).unwrap();
        assert!(problem.starts_with("ptx/sm_80.ptx:3, in k: is not what the source gives"), "{problem}");
        assert!(problem.ends_with("committed: add.u32 %r1;\n    now:       sub.u32 %r1;"), "{problem}");
        let longer = ptx(&format!("{}// more", old.text));
        assert!(first_difference(&old, &longer).unwrap().contains("committed: the file's end"));
    }

    #[test]
    fn entries_and_kernels_must_match() {
        let module = Module::parse(".visible .entry a() { bar.sync 0; }\n.visible .entry b() { ret; }");
        let one = Collectives { barrier: 1, ..Collectives::default() };
        assert_eq!(
            entries_and_source(Arch::Sm80, &module, &kernels(&[("a", one), ("b", Collectives::default())])),
            [""; 0]
        );
        assert_eq!(
            entries_and_source(Arch::Sm80, &module, &kernels(&[("a", Collectives::default()), ("c", one)])),
            [
                "entry a has 1 collectives of kind barrier, but src/k.rs declares 0",
                "entry b has no #[kernel] in the source",
                "kernel c of src/k.rs is not an entry",
            ]
        );
    }

    #[test]
    fn what_needs_sm_90_is_there_and_nowhere_else() {
        let (with, without) =
            (Module::parse(".visible .entry new() { ret; }"), Module::parse(".version 8.0\n"));
        let kernels = kernels(&[("new", Collectives::default())]);
        assert_eq!(entries_and_source(Arch::Sm80, &without, &kernels), [""; 0]);
        assert_eq!(entries_and_source(Arch::Sm90a, &with, &kernels), [""; 0]);
        let early = entries_and_source(Arch::Sm80, &with, &kernels);
        assert_eq!(early, ["entry new needs sm_90, as src/k.rs declares, and this is sm_80"]);
        let missing = entries_and_source(Arch::Sm100a, &without, &kernels);
        assert_eq!(missing, ["kernel new of src/k.rs is not an entry"]);
    }

    #[test]
    fn what_needs_sm_90a_is_there_and_nowhere_newer() {
        let with = Module::parse(".visible .entry hopper() { wgmma.fence.sync.aligned; }");
        let kernels = kernels(&[("hopper", Collectives { wgmma: 1, ..Collectives::default() })]);
        assert_eq!(entries_and_source(Arch::Sm90a, &with, &kernels), [""; 0]);
        let without = Module::parse(".version 8.0\n");
        for arch in [Arch::Sm80, Arch::Sm100a] {
            assert_eq!(entries_and_source(arch, &without, &kernels), [""; 0]);
            let there = entries_and_source(arch, &with, &kernels);
            assert_eq!(
                there,
                [format!("entry hopper needs sm_90a, as src/k.rs declares, and this is {arch}")]
            );
        }
    }

    #[test]
    fn slow_memory_is_a_problem() {
        let module = Module::parse(
            ".visible .entry a() { .local .b8 x[4]; ld.global.b32 %r1, [%rd1]; ld.b32 %r1, [%rd1]; st.local.b32 [x], 1; }",
        );
        assert_eq!(
            memory(&module),
            [
                "a: no state space in ld.b32 (1 times)",
                "a: local memory in st.local.b32 (1 times)",
                "a: has variables in local memory",
            ]
        );
    }

    #[test]
    fn spills_and_serialised_products_are_problems() {
        let mut report = Report::default();
        report.kernels.insert("good".to_owned(), Resources { registers: 255, ..Resources::default() });
        report.functions.insert("bad".to_owned(), Frame { stack: 8, ..Frame::default() });
        report.warnings = vec![
            "ptxas warning : Registers are spilled".to_owned(),
            "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"
                .to_owned(),
        ];
        assert_eq!(serialised(&report), report.warnings[1..]);
        assert_eq!(spills(&report), ["bad: 8 bytes of stack, 0 stored and 0 loaded for spills; limit 0"]);
    }
}
