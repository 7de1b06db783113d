//! `manifest.toml` beside the PTX: which compilers made it and what each kernel takes. One line a kernel, for reviews.

use std::collections::BTreeMap;
use std::fmt;

use cuda_builder::ptx::{Collectives, Module};
use cuda_builder::{Arch, Ptxas, Report, Resources, Toolchain};
use serde::Deserialize;

/// The versions that PTX and the numbers about it depend on.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Compilers {
    pub rustc: String,
    pub llvm: String,
    pub ptxas: Option<String>,
}

impl Compilers {
    pub fn of(toolchain: &Toolchain, ptxas: Option<&Ptxas>) -> Self {
        Self {
            rustc: toolchain.rustc_version().to_owned(),
            llvm: toolchain.llvm_version().to_string(),
            ptxas: ptxas.map(|ptxas| ptxas.version().to_owned()),
        }
    }

    /// Whether both make the same PTX of the same source.
    pub fn make_the_same_ptx(&self, other: &Self) -> bool {
        (&self.rustc, &self.llvm) == (&other.rustc, &other.llvm)
    }

    /// Those of a manifest.
    pub fn parse(manifest: &str) -> Result<Self, toml::de::Error> {
        #[derive(Deserialize)]
        struct Head {
            compilers: Compilers,
        }
        toml::from_str::<Head>(manifest).map(|head| head.compilers)
    }
}

impl fmt::Display for Compilers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "rustc {}, LLVM {}, ptxas {}",
            self.rustc,
            self.llvm,
            self.ptxas.as_deref().unwrap_or("none")
        )
    }
}

/// A manifest to be written.
pub struct Manifest {
    compilers: Compilers,
    archs: BTreeMap<Arch, BTreeMap<String, Kernel>>,
}

struct Kernel {
    resources: Resources,
    collectives: Collectives,
}

impl Manifest {
    pub fn new(compilers: Compilers) -> Self {
        Self { compilers, archs: BTreeMap::new() }
    }

    /// Takes in the kernels of a module of PTX and what ptxas reported of it.
    pub fn add(&mut self, arch: Arch, ptx: &str, report: &Report) {
        let module = Module::parse(ptx);
        let kernels = module.entries().map(|entry| {
            let resources = report.kernels.get(&entry.name).copied().unwrap_or_default();
            (entry.name.clone(), Kernel { resources, collectives: module.collectives(entry) })
        });
        self.archs.insert(arch, kernels.collect());
    }
}

impl fmt::Display for Manifest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Compilers { rustc, llvm, ptxas } = &self.compilers;
        writeln!(
            f,
            "# Written by `cargo xtask build-kernels`, checked by `cargo xtask check-kernels`. Per kernel: registers of a"
        )?;
        writeln!(
            f,
            "# thread; static shared memory of a block, stack and spills of a thread in bytes; collectives in the PTX."
        )?;
        writeln!(f, "\n[compilers]\nrustc = {rustc:?}\nllvm = {llvm:?}")?;
        if let Some(ptxas) = ptxas {
            writeln!(f, "ptxas = {ptxas:?}")?;
        }
        for (arch, kernels) in &self.archs {
            writeln!(f, "\n[{arch}]")?;
            for (name, Kernel { resources, collectives }) in kernels {
                let Resources { registers, shared, frame, .. } = resources;
                write!(
                    f,
                    "{name} = {{ registers = {registers}, shared = {shared}, stack = {}, ",
                    frame.stack
                )?;
                write!(f, "spill_stores = {}, spill_loads = {}, ", frame.spill_stores, frame.spill_loads)?;
                let collectives = collectives.to_string();
                let padding = if collectives.is_empty() { "" } else { " " };
                writeln!(f, "collectives = {{{padding}{collectives}{padding}}} }}")?;
            }
        }
        Ok(())
    }
}

/// The lines that only one of two manifests has, with `-` and `+`, under their architecture.
pub fn difference(old: &str, new: &str) -> Vec<String> {
    let (old, new) = (lines_by_section(old), lines_by_section(new));
    let removed = old.iter().filter(|line| !new.contains(line)).map(|line| ("-", line));
    let added = new.iter().filter(|line| !old.contains(line)).map(|line| ("+", line));
    let mut lines: Vec<_> = removed.chain(added).collect();
    // Both versions of a kernel's line next to each other.
    lines.sort_by_key(|&(sign, &(section, line))| {
        let name = line.split(" = ").next();
        (section, name, sign == "+")
    });
    lines.into_iter().map(|(sign, (section, line))| format!("{sign} {section} {line}")).collect()
}

fn lines_by_section(manifest: &str) -> Vec<(&str, &str)> {
    let mut section = "";
    let mut lines = Vec::new();
    for line in manifest.lines() {
        if line.starts_with('[') {
            section = line;
        }
        lines.push((section, line));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    const PTX: &str =
        ".visible .entry b() {\n bar.sync 0;\n bar.sync 0;\n}\n.visible .entry a() {\n ret;\n}\n";

    fn manifest(registers: u32) -> String {
        let compilers = Compilers {
            rustc: "1.96.0 (ac68faa20 2026-05-25)".to_owned(),
            llvm: "22.1.8".to_owned(),
            ptxas: Some("13.0.88".to_owned()),
        };
        let mut manifest = Manifest::new(compilers);
        let mut report = Report::default();
        report.kernels.insert("b".to_owned(), Resources { registers, shared: 64, ..Resources::default() });
        manifest.add(Arch::Sm90a, PTX, &report);
        manifest.add(Arch::Sm80, PTX, &report);
        manifest.to_string()
    }

    #[test]
    fn kernels_are_lines_in_order_and_toml() {
        let text = manifest(40);
        let lines: Vec<&str> = text.lines().filter(|line| line.starts_with(['[', 'a', 'b'])).collect();
        let a = "a = { registers = 0, shared = 0, stack = 0, spill_stores = 0, spill_loads = 0, collectives = {} }";
        let b = "b = { registers = 40, shared = 64, stack = 0, spill_stores = 0, spill_loads = 0, \
                 collectives = { barrier = 2 } }";
        assert_eq!(lines, ["[compilers]", "[sm_80]", a, b, "[sm_90a]", a, b]);
        let parsed: toml::Table = toml::from_str(&text).unwrap();
        assert_eq!(parsed["sm_90a"]["b"]["collectives"]["barrier"].as_integer(), Some(2));
    }

    #[test]
    fn compilers_are_read_back() {
        let compilers = Compilers::parse(&manifest(40)).unwrap();
        assert_eq!(compilers.to_string(), "rustc 1.96.0 (ac68faa20 2026-05-25), LLVM 22.1.8, ptxas 13.0.88");
        let without_ptxas = Compilers { ptxas: None, ..compilers.clone() };
        assert!(compilers.make_the_same_ptx(&without_ptxas));
        assert!(!compilers.make_the_same_ptx(&Compilers { llvm: "22.1.9".to_owned(), ..compilers.clone() }));
        assert!(Compilers::parse("[sm_80]").is_err());
    }

    #[test]
    fn a_difference_names_architecture_and_kernel() {
        let difference = difference(&manifest(40), &manifest(48).replace("[sm_80]\na = {", "[sm_80]\nc = {"));
        let starts: Vec<&str> = difference.iter().map(|line| &line[..line.len().min(30)]).collect();
        assert_eq!(
            starts,
            [
                "- [sm_80] a = { registers = 0,",
                "- [sm_80] b = { registers = 40",
                "+ [sm_80] b = { registers = 48",
                "+ [sm_80] c = { registers = 0,",
                "- [sm_90a] b = { registers = 4",
                "+ [sm_90a] b = { registers = 4",
            ]
        );
    }
}
