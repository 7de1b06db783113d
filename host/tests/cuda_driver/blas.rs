//! Products against a stand-in for cuBLASLt, which works them out on the host.

use std::ffi::{CStr, CString, c_char, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;

use half::bf16;
use spinkv::backend::cuda::blas::{BlasError, BlasLt, OutElements, Product, ProductOut};
use spinkv::backend::cuda::driver::{DeviceBuffer, DriverError, Graph, Stream};
use spinkv::memory::Word;

use super::driver;

const WORKSPACE: usize = 4096;

struct Blas {
    path: PathBuf,
    log: extern "C" fn() -> *const c_char,
    reset: extern "C" fn(),
}

impl Blas {
    /// A stand-in of its own for each test, as `flags` make it.
    fn build(name: &str, flags: &[&str]) -> Self {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("stand-in-cublas-{name}.so"));
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cuda_driver/stand_in_cublas.c");
        let mut compiler = Command::new("cc");
        compiler.args(["-shared", "-fPIC", "-O1", source, "-o"]).arg(&path).args(flags);
        assert!(compiler.status().expect("a C compiler").success());
        let file = CString::new(path.to_str().expect("a UTF-8 path")).expect("a path without NUL");
        // SAFETY: the library has no constructors and is never unloaded; it has these functions, with these types.
        unsafe {
            let handle = libc::dlopen(file.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL);
            assert!(!handle.is_null(), "{} does not load", path.display());
            let symbol = |name: &CStr| libc::dlsym(handle, name.as_ptr());
            let log =
                std::mem::transmute::<*mut c_void, extern "C" fn() -> *const c_char>(symbol(c"stand_in_log"));
            let reset = std::mem::transmute::<*mut c_void, extern "C" fn()>(symbol(c"stand_in_reset"));
            reset();
            Self { path, log, reset }
        }
    }

    fn log(&self) -> Vec<String> {
        // SAFETY: a C string of the stand-in, which writes it on this thread alone.
        let text = unsafe { CStr::from_ptr((self.log)()) }.to_str().expect("ASCII");
        let lines = text.lines().map(str::to_owned).collect();
        (self.reset)();
        lines
    }
}

/// Small whole numbers, exact in bf16 and in any order of sums.
fn numbers(len: usize, seed: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 7 + i / 5 * 3 + seed) % 9) as f32 - 4.0).collect()
}

fn words(numbers: &[f32]) -> Vec<Word> {
    let elements: Vec<bf16> = numbers.iter().map(|&number| bf16::from_f32(number)).collect();
    bytemuck::pod_collect_to_vec(&elements)
}

fn floats(words: &[Word]) -> Vec<f32> {
    bytemuck::cast_slice::<Word, bf16>(words).iter().map(|element| element.to_f32()).collect()
}

/// `[tokens, n]`.
fn reference(x: &[f32], weights: &[f32], n: usize, k: usize) -> Vec<f32> {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
    x.chunks(k).flat_map(|x| weights[..n * k].chunks(k).map(move |row| dot(x, row))).collect()
}

fn upload(stream: &Stream, numbers: &[f32]) -> DeviceBuffer<Word> {
    DeviceBuffer::from_slice(stream, &words(numbers)).unwrap()
}

#[test]
fn products_are_stored_and_added_at_any_token() {
    let driver = driver();
    let (context, stream) = driver.open();
    let stand_in = Blas::build("products", &[]);
    let blas = BlasLt::load_from(&context, &[&stand_in.path], WORKSPACE).unwrap();
    assert_eq!((blas.path(), blas.version()), (stand_in.path.as_path(), 130_100));
    let log = stand_in.log();
    assert_eq!(log[..3], ["create", "descriptor, compute 68 scale 0", "preference"]);
    assert_eq!(log[3..6], ["descriptor attribute 3 is 1", "workspace 4096", "reductions 2"]);
    assert_eq!(log[6..], [5, 6, 7, 8].map(|attribute| format!("alignment {attribute} is 16")));

    let (n, k, tokens, behind) = (16, 24, 3, 2);
    let (x, weights) = (numbers((1 + tokens) * k, 0), numbers(n * k, 5));
    let expected = reference(&x[k..], &weights, n, k);
    let (x, weights) = (upload(&stream, &x), upload(&stream, &weights));
    let old = numbers((behind + tokens + 1) * n, 3);
    let product = |out| Product {
        tokens,
        n,
        k,
        x: &x,
        x_first_token: 1,
        weights: &weights,
        out,
        out_first_token: behind,
    };
    let rows = behind * n..(behind + tokens) * n;
    let with = |new: &dyn Fn(f32, f32) -> f32| {
        let mut all = old.clone();
        all[rows.clone()].iter_mut().zip(&expected).for_each(|(out, &product)| *out = new(*out, product));
        all
    };

    let rounded = upload(&stream, &old);
    blas.product(&stream, &product(ProductOut::Bf16(&rounded))).unwrap();
    assert_eq!(
        floats(&rounded.to_vec(&stream).unwrap()),
        with(&|_, product| bf16::from_f32(product).to_f32())
    );
    let log = stand_in.log();
    assert_eq!(log[..3], ["layout 14: 24 x 16, 24", "layout 14: 24 x 3, 24", "layout 14: 16 x 3, 16"]);
    assert_eq!(log[3], "heuristic for 3 tokens, 8 wanted");
    let matmul = "matmul by 3 and 30, alpha 1 beta 0, workspace 4096 at ";
    assert!(log[4].starts_with(matmul) && log[4].ends_with(", stream given"), "{log:?}");

    let full = DeviceBuffer::from_slice(&stream, &old).unwrap();
    blas.product(&stream, &product(ProductOut::F32(&full))).unwrap();
    assert_eq!(full.to_vec(&stream).unwrap(), with(&|_, product| product));
    let log = stand_in.log();
    assert_eq!(log[2..4], ["layout 0: 16 x 3, 16", "heuristic for 3 tokens, 8 wanted"]);

    let sum = DeviceBuffer::from_slice(&stream, &old).unwrap();
    blas.product(&stream, &product(ProductOut::AddF32(&sum))).unwrap();
    assert_eq!(sum.to_vec(&stream).unwrap(), with(&|old, product| old + product));
    let log = stand_in.log();
    assert_eq!(log.len(), 1, "adding takes the algorithm of storing: {log:?}");
    assert!(log[0].contains("alpha 1 beta 1"), "{log:?}");

    drop(blas);
    let gone =
        [&["destroy layout"; 6][..], &["destroy descriptor", "destroy preference", "destroy"]].concat();
    assert_eq!(stand_in.log(), gone);
}

#[test]
fn what_is_planned_is_not_asked_again_not_in_a_capture_either() {
    let driver = driver();
    let (context, stream) = driver.open();
    let stand_in = Blas::build("plans", &[]);
    let blas = BlasLt::load_from(&context, &[&stand_in.path], WORKSPACE).unwrap();
    blas.plan(5, 8, 8, OutElements::F32).unwrap();
    blas.plan(0, 8, 8, OutElements::F32).unwrap();
    assert!(stand_in.log().last().unwrap().starts_with("heuristic for 5"));
    let (x, weights) = (upload(&stream, &numbers(40, 0)), upload(&stream, &numbers(64, 1)));
    let out = DeviceBuffer::<f32>::zeroed(&stream, 40).unwrap();
    let all = |tokens| Product {
        tokens,
        n: 8,
        k: 8,
        x: &x,
        x_first_token: 0,
        weights: &weights,
        out: ProductOut::F32(&out),
        out_first_token: 0,
    };
    driver.log();
    for tokens in [5, 4] {
        let graph = Graph::capture(&stream, |stream| {
            blas.product(stream, &all(tokens)).unwrap();
            Ok(())
        });
        graph.unwrap();
        let heuristics = stand_in.log().iter().filter(|line| line.starts_with("heuristic")).count();
        assert_eq!(heuristics, if tokens == 5 { 0 } else { 1 });
        let log = driver.log();
        assert_eq!(log[..2], ["capture, mode 1", "captured"], "nothing else touches the stream: {log:?}");
    }
    blas.product(&stream, &all(0)).unwrap();
    assert_eq!(stand_in.log(), [""; 0], "no tokens launch nothing");
}

#[test]
fn operands_that_do_not_fit_are_refused() {
    let driver = driver();
    let (context, stream) = driver.open();
    let stand_in = Blas::build("refusals", &[]);
    let blas = BlasLt::load_from(&context, &[&stand_in.path], WORKSPACE).unwrap();
    let (x, weights) = (upload(&stream, &numbers(4 * 16, 0)), upload(&stream, &numbers(8 * 16, 1)));
    let (rounded, full) =
        (upload(&stream, &numbers(4 * 8, 0)), DeviceBuffer::zeroed(&stream, 4 * 8).unwrap());
    let right = Product {
        tokens: 3,
        n: 8,
        k: 16,
        x: &x,
        x_first_token: 1,
        weights: &weights,
        out: ProductOut::Bf16(&rounded),
        out_first_token: 1,
    };
    blas.product(&stream, &right).unwrap();
    stand_in.log();
    let range = |what, start, len, limit| DriverError::OutOfRange { what, start, len, limit };
    let operand = |what, value, min| DriverError::Operand { what, value, min, max: i32::MAX as u64 };
    let multiple = |what, value| DriverError::Multiple { what, value, of: 8 };
    let f32_out = Product { out: ProductOut::F32(&full), ..right };
    for (wrong, expected) in [
        (Product { x_first_token: 2, ..right }, range("product x", 4, 6, 8)),
        (Product { x_first_token: usize::MAX, ..right }, range("product x", usize::MAX, 6, 8)),
        (Product { n: 16, ..right }, range("product weights", 0, 32, 16)),
        (Product { out_first_token: 2, ..right }, range("product out", 2, 3, 4)),
        (Product { out_first_token: 2, ..f32_out }, range("product out", 16, 24, 32)),
        (
            Product { out_first_token: 2, out: ProductOut::AddF32(&full), ..right },
            range("product out", 16, 24, 32),
        ),
        (Product { n: 0, ..right }, operand("product n", 0, 1)),
        (Product { k: 0, ..right }, operand("product k", 0, 1)),
        (Product { tokens: 1 << 31, ..right }, operand("product tokens", 1 << 31, 0)),
        (Product { n: 12, ..right }, multiple("product n", 12)),
        (Product { k: 20, ..right }, multiple("product k", 20)),
    ] {
        assert_eq!(blas.product(&stream, &wrong), Err(expected.into()));
    }
    assert_eq!(blas.plan(1, 8, 4, OutElements::F32), Err(multiple("product k", 4).into()));
    assert_eq!(stand_in.log(), [""; 0], "nothing was launched");
    blas.product(&stream, &f32_out).unwrap();
}

#[test]
fn what_the_library_refuses_is_named() {
    let driver = driver();
    let (context, stream) = driver.open();
    let stand_in = Blas::build("statuses", &[]);
    let blas = BlasLt::load_from(&context, &[&stand_in.path], WORKSPACE).unwrap();
    let (x, weights) = (upload(&stream, &[0.0; 13 * 8]), upload(&stream, &[0.0; 64]));
    let out = DeviceBuffer::<f32>::zeroed(&stream, 13 * 8).unwrap();
    let failing = Product {
        tokens: 13,
        n: 8,
        k: 8,
        x: &x,
        x_first_token: 0,
        weights: &weights,
        out: ProductOut::F32(&out),
        out_first_token: 0,
    };
    let failed = blas.product(&stream, &failing).unwrap_err();
    let text = "cublasLtMatmul failed with status 13 (CUBLAS_STATUS_EXECUTION_FAILED)";
    assert_eq!(failed.to_string(), text);
    for tokens in [99, 100] {
        let none = blas.plan(tokens, 8, 8, OutElements::Bf16);
        assert_eq!(none, Err(BlasError::NoAlgorithm { tokens, n: 8, k: 8 }));
    }

    let refusing = Blas::build("create", &["-DCREATE_STATUS=1"]);
    let refused = BlasLt::load_from(&context, &[refusing.path], WORKSPACE).unwrap_err();
    let (call, name) = ("cublasLtCreate", "CUBLAS_STATUS_NOT_INITIALIZED".to_owned());
    assert_eq!(refused, BlasError::Status { call, code: 1, name });
    let unnamed = Blas::build("unnamed", &["-DCREATE_STATUS=77"]);
    let refused = BlasLt::load_from(&context, &[unnamed.path], WORKSPACE).unwrap_err();
    assert_eq!(refused.to_string(), "cublasLtCreate failed with status 77 (a status without a name)");
}

#[test]
fn every_file_that_was_tried_is_named() {
    let driver = driver();
    let (context, _stream) = driver.open();
    let text = Path::new(env!("CARGO_TARGET_TMPDIR")).join("not-a-library.so");
    std::fs::write(&text, "no library").unwrap();
    let candidates = [Path::new("libspinkv-no-such-library.so.13"), &text];
    let missing = BlasLt::load_from(&context, &candidates, WORKSPACE).unwrap_err().to_string();
    let absent =
        "no cuBLASLt on this machine: libspinkv-no-such-library.so.13 (cannot open shared object file";
    assert!(missing.starts_with(absent), "{missing}");
    assert!(missing.contains(&format!("{} (", text.display())), "{missing}");
    assert!(missing.contains("SPINKV_CUBLASLT can name its file"), "{missing}");

    // A file that loads ends the search, whether or not it is what it should be.
    let half = Blas::build("half", &["-DWITHOUT_MATMUL"]);
    let incomplete = BlasLt::load_from(&context, &[&text, &half.path], WORKSPACE).unwrap_err();
    assert_eq!(incomplete, BlasError::MissingSymbol { library: half.path, symbol: "cublasLtMatmul" });
}
