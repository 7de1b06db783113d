//! The committed PTX: complete, without slow memory accesses, and with the instructions that `cuda_std`'s documentation
//! names.

use std::collections::BTreeSet;

use cuda_builder::ptx::{Function, Module, Space};
use cuda_std_conformance::{ARCHITECTURES, CASES, Case, ptx};

/// Name and text of each architecture's module.
fn modules() -> impl Iterator<Item = (&'static str, &'static str)> {
    ARCHITECTURES
        .iter()
        .map(|&architecture| (architecture, ptx(architecture).expect("the PTX of its own list")))
}

/// The cases that stand in an architecture's module.
fn cases(architecture: &'static str) -> impl Iterator<Item = &'static Case> {
    CASES.iter().filter(move |case| case.needs.architectures().contains(&architecture))
}

/// The instructions of a function, a line each, without comments.
fn code<'a>(text: &'a str, function: &Function) -> Vec<&'a str> {
    let body = text.lines().take(function.last_line).skip(function.first_line - 1);
    body.map(|line| line.split("//").next().expect("a first part").trim())
        .filter(|line| !line.is_empty())
        .collect()
}

/// Whether `word` stands in `line` as a whole: `ld.global` does not stand in `ld.global.nc`.
fn has_word(line: &str, word: &str) -> bool {
    let part_of_a_word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | ':' | '_');
    line.match_indices(word).any(|(at, _)| {
        let (before, after) = (&line[..at], &line[at + word.len()..]);
        !before.ends_with(part_of_a_word) && !after.starts_with(part_of_a_word)
    })
}

#[test]
fn every_architecture_has_its_cases_and_no_other_kernel() {
    let names: BTreeSet<&str> = CASES.iter().map(|case| case.name).collect();
    assert_eq!(names.len(), CASES.len(), "two cases of one name");
    for (architecture, text) in modules() {
        let module = Module::parse(text);
        assert_eq!(module.target, architecture);
        let entries: BTreeSet<&str> = module.entries().map(|entry| entry.name.as_str()).collect();
        let named: BTreeSet<&str> = cases(architecture).map(|case| case.name).collect();
        assert_eq!(entries, named, "{architecture}");
    }
}

#[test]
fn every_kernel_holds_what_its_functions_promise() {
    let mut missing = Vec::new();
    for (architecture, text) in modules() {
        let module = Module::parse(text);
        for case in cases(architecture) {
            assert!(!case.expects.is_empty(), "{} expects nothing", case.name);
            let entry = module.entries().find(|entry| entry.name == case.name).expect("an entry a case");
            let code = code(text, entry);
            let absent = case.expects.iter().filter(|word| !code.iter().any(|line| has_word(line, word)));
            missing.extend(absent.map(|word| format!("{architecture} {}: {word}", case.name)));
        }
    }
    assert!(missing.is_empty(), "\n{}", missing.join("\n"));
}

#[test]
fn no_kernel_calls_or_looks_for_an_address_space_or_spills_to_memory() {
    for (architecture, text) in modules() {
        for function in &Module::parse(text).functions {
            let name = format!("{architecture} {}", function.name);
            let generic: Vec<_> = function.opcodes_of(Space::Generic).collect();
            assert!(generic.is_empty(), "{name}: {generic:?}");
            assert!(
                function.opcodes_of(Space::Local).next().is_none() && !function.has_local_variables,
                "{name}"
            );
            assert!(function.calls.is_empty(), "{name}: {:?}", function.calls);
        }
    }
}

/// Orders and scopes reach the hardware: no combination is spelled by no case.
#[test]
fn every_order_and_scope_of_every_atomic_is_spelled() {
    let orders = ["relaxed", "acquire", "release", "acq_rel"];
    let scopes = ["cta", "gpu", "sys"];
    let operations = [
        "add.u32", "min.u32", "max.u32", "and.b32", "or.b32", "xor.b32", "exch.b32", "cas.b32", "add.s32",
        "min.s32", "max.s32", "add.u64", "min.u64", "max.u64", "and.b64", "or.b64", "xor.b64", "exch.b64",
        "cas.b64", "add.f32",
    ];
    let module = Module::parse(ptx("sm_80").expect("its PTX"));
    let spelled: BTreeSet<&str> =
        module.entries().flat_map(|entry| entry.opcodes.keys().map(String::as_str)).collect();
    for order in orders {
        for scope in scopes {
            for space in ["global", "shared"] {
                for operation in operations {
                    let opcode = format!("atom.{order}.{scope}.{space}.{operation}");
                    assert!(spelled.contains(opcode.as_str()), "no {opcode}");
                }
            }
        }
    }
}
