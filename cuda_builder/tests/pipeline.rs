//! The whole way from Rust to PTX, on the crates in `fixture/`. Needs the device toolchain and fails without it; no
//! GPU.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use cuda_builder::ptx::{Access, Collectives, Module, Space, absolute_paths};
use cuda_builder::{Arch, CudaBuilder, CudaBuilderError, ToolError};

/// A copy of the fixture in a folder of its own. Folders stay between runs, so that `core` is compiled once.
struct Checkout {
    root: PathBuf,
    /// Tests build one after another: they change sources, and the machine is busy with one build.
    _alone: MutexGuard<'static, ()>,
}

impl Checkout {
    fn at(path: &str) -> Self {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join(path);
        copy_folder(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixture"), &root);
        Self { root, _alone: alone }
    }

    fn builder(&self) -> CudaBuilder {
        let builder = CudaBuilder::new(self.root.join("kernels")).build_args(["--locked"]);
        builder.support_ir(self.root.join("support.ll"))
    }

    fn build(&self, builder: &CudaBuilder) -> String {
        match builder.build() {
            Ok(ptx) => fs::read_to_string(ptx).unwrap(),
            Err(error) => panic!("the fixture does not build: {error}"),
        }
    }

    /// Replaces `from` by `to` in a source file of the kernels.
    fn edit(&self, from: &str, to: &str) {
        let path = self.root.join("kernels/src/lib.rs");
        let source = fs::read_to_string(&path).unwrap();
        assert!(source.contains(from), "{from:?} is not in the fixture");
        fs::write(&path, source.replace(from, to)).unwrap();
    }
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_folder(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), to).unwrap();
        }
    }
}

fn module_of(ptx: &str) -> Module {
    Module::parse(ptx)
}

#[test]
fn the_same_bytes_come_out_of_two_checkouts() {
    let build = |path: &str| {
        let checkout = Checkout::at(path);
        let folder = checkout.root.join("out");
        let built =
            checkout.builder().build_archs(&Arch::ALL, &folder).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(built.iter().map(|built| built.arch).collect::<Vec<_>>(), Arch::ALL);
        built
            .into_iter()
            .map(|built| (built.arch, fs::read_to_string(built.ptx).unwrap()))
            .collect::<Vec<_>>()
    };
    let (one, other) = (build("a"), build("another/checkout with a space/of-the-fixture"));
    for ((arch, one), (_, other)) in one.iter().zip(&other) {
        let difference = one.lines().zip(other.lines()).find(|(one, other)| one != other);
        assert!(one == other, "{arch} differs: {difference:?}");
        assert_eq!(absolute_paths(one), [""; 0]);
        let module = module_of(one);
        assert_eq!(module.target, arch.name());
        assert_eq!(module.version, format!("{}.{}", arch.ptx_version() / 10, arch.ptx_version() % 10));
        // What makes it a test: symbols with a hash of their crate's identity, of a function and a table that are not
        // inlined.
        assert!(module.functions.iter().any(|function| function.name.contains("fixture_tables3mix")));
        assert!(one.contains("fixture_tables5TABLE"));
    }
}

#[test]
fn kernels_alone_are_exported_and_what_they_do_not_use_is_gone() {
    let checkout = Checkout::at("a");
    let ptx = checkout.build(&checkout.builder());
    let module = module_of(&ptx);
    let mut entries: Vec<_> = module.entries().map(|entry| entry.name.as_str()).collect();
    entries.sort_unstable();
    assert_eq!(entries, ["checked", "exchange", "mixed", "saxpy"]);
    assert_eq!(ptx.matches(".visible").count(), entries.len(), "something other than a kernel is visible");
    assert!(!ptx.contains("unused_by_kernels") && !ptx.contains("__unused_support"), "{ptx}");
    assert!(
        !ptx.contains("__dynamic_shared") && !ptx.contains("__shuffle_xor"),
        "support was not inlined: {ptx}"
    );
}

#[test]
fn newer_architectures_have_kernels_of_their_own() {
    let checkout = Checkout::at("newer");
    let kernel = |name| format!("#[unsafe(no_mangle)]\npub unsafe extern \"ptx-kernel\" fn {name}() {{}}\n");
    let (newer, hopper) = (kernel("newer"), kernel("hopper"));
    checkout.edit(
        "/// `out[i] = a",
        &format!("#[cfg(sm_90)]\n{newer}\n#[cfg(sm_90a)]\n{hopper}\n/// `out[i] = a"),
    );
    for arch in Arch::ALL {
        let ptx = checkout.build(&checkout.builder().arch(arch));
        let has = |name| module_of(&ptx).entries().any(|entry| entry.name == name);
        assert_eq!((has("newer"), has("hopper")), (arch.has_sm_90(), arch.has_wgmma()), "{arch}");
    }
}

#[test]
fn lines_point_at_the_source() {
    let checkout = Checkout::at("a");
    let ptx = checkout.build(&checkout.builder());
    let module = module_of(&ptx);
    assert!(module.files.iter().any(|file| file == "./kernels/src/lib.rs"), "{:?}", module.files);
    assert!(module.files.iter().any(|file| file.starts_with("rust-src/library/core/")), "{:?}", module.files);
    for function in &module.functions {
        assert!(function.locations > 0, "{} has no line information", function.name);
    }
    let source = fs::read_to_string(checkout.root.join("kernels/src/lib.rs")).unwrap();
    let line = source.lines().position(|line| line.contains("a * *x.add(i)")).unwrap() + 1;
    let file = module.files.iter().position(|file| file.ends_with("kernels/src/lib.rs")).unwrap() + 1;
    assert!(ptx.contains(&format!("\t.loc\t{file} {line} ")), "no instruction comes from line {line}");

    let bare = checkout.build(&checkout.builder().generate_line_info(false));
    assert!(!bare.contains(".loc") && !bare.contains(".file"), "{bare}");
}

#[test]
fn memory_spaces_and_collectives_are_as_written() {
    let checkout = Checkout::at("a");
    let ptx = checkout.build(&checkout.builder());
    let module = module_of(&ptx);
    for function in &module.functions {
        assert_eq!(
            function.opcodes_of(Space::Generic).count(),
            0,
            "{}: {:?}",
            function.name,
            function.opcodes
        );
        assert_eq!(function.opcodes_of(Space::Local).count(), 0, "{}: {:?}", function.name, function.opcodes);
    }
    let exchange = module.entries().find(|entry| entry.name == "exchange").unwrap();
    let expected = Collectives { shuffle: 1, barrier: 1, ..Collectives::default() };
    assert_eq!(module.collectives(exchange), expected);
    let accesses = exchange.accesses();
    assert_eq!(accesses[&(Access::Store, Space::Shared)], 1);
    assert_eq!(accesses[&(Access::Load, Space::Shared)], 1);
}

#[test]
fn a_failed_bounds_check_is_a_trap() {
    let checkout = Checkout::at("a");
    let ptx = checkout.build(&checkout.builder());
    let module = module_of(&ptx);
    let checked = module.entries().find(|entry| entry.name == "checked").unwrap();
    assert_eq!(checked.opcodes.get("trap"), Some(&1), "{:?}", checked.opcodes);
    assert!(checked.calls.is_empty(), "a panic calls {:?}", checked.calls);
}

#[test]
fn contraction_is_a_choice() {
    let checkout = Checkout::at("a");
    let saxpy = |contraction| {
        let ptx = checkout.build(&checkout.builder().fma_contraction(contraction));
        module_of(&ptx).entries().find(|entry| entry.name == "saxpy").unwrap().opcodes.clone()
    };
    assert!(!saxpy(false).contains_key("fma.rn.f32"));
    assert_eq!(saxpy(true).get("fma.rn.f32"), Some(&1));
}

#[test]
fn ir_is_kept_on_demand_and_ptx_goes_where_it_is_told() {
    let checkout = Checkout::at("a");
    let out = checkout.root.join("out/ir");
    let built = checkout.builder().emit_llvm_ir(true).build_archs(&[Arch::Sm80], &out).unwrap();
    let ir = fs::read_to_string(built[0].llvm_ir.as_ref().unwrap()).unwrap();
    assert!(ir.contains("define ptx_kernel void @saxpy"), "{ir}");
    assert_eq!(built[0].ptx, out.join("sm_80.ptx"));
    let file = checkout.root.join("out/one/kernels.ptx");
    assert_eq!(checkout.builder().arch(Arch::Sm80).copy_to(&file).build().unwrap(), file);
    assert_eq!(fs::read(&file).unwrap(), fs::read(&built[0].ptx).unwrap());
}

#[test]
fn mistakes_are_explained() {
    let checkout = Checkout::at("a");
    // Without the support file, what it defines is missing.
    let error = CudaBuilder::new(checkout.root.join("kernels")).build().unwrap_err();
    let CudaBuilderError::Undefined { mut names, .. } = error else { panic!("{error}") };
    names.sort_unstable();
    assert_eq!(names, ["__dynamic_shared", "__shuffle_xor"]);
    // A library that has no kernel.
    let error = CudaBuilder::new(checkout.root.join("tables")).build().unwrap_err();
    assert!(matches!(&error, CudaBuilderError::NoKernels(library) if library == "fixture_tables"), "{error}");
    // The compiler's message arrives.
    checkout.edit("mix(i as u32, 7)", "mix(i, 7)");
    let error = checkout.builder().build().unwrap_err();
    let CudaBuilderError::Tool(ToolError::Failed { stderr, .. }) = error else { panic!("{error}") };
    assert!(stderr.contains("mismatched types") && stderr.contains("kernels/src/lib.rs"), "{stderr}");
}
