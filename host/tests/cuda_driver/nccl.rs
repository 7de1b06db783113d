//! Sums over ranks against a stand-in for NCCL, which works them out on the host.

use std::ffi::{CStr, CString, c_char, c_int, c_long, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;

use spinkv::backend::cuda::driver::{Context, Device, DeviceBuffer, DriverError, Stream};
use spinkv::backend::cuda::nccl::{Nccl, NcclError, PATH_VARIABLE};

use super::driver;

struct Library {
    path: PathBuf,
    log: extern "C" fn() -> *const c_char,
    reset: extern "C" fn(),
    fail: extern "C" fn(c_int, c_long),
}

impl Library {
    /// A stand-in of its own for each test, as `flags` make it.
    fn build(name: &str, flags: &[&str]) -> Self {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("stand-in-nccl-{name}.so"));
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cuda_driver/stand_in_nccl.c");
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
            let fail =
                std::mem::transmute::<*mut c_void, extern "C" fn(c_int, c_long)>(symbol(c"stand_in_fail"));
            reset();
            Self { path, log, reset, fail }
        }
    }

    fn load(&self) -> Nccl {
        Nccl::load_from(&[&self.path]).unwrap()
    }

    fn log(&self) -> Vec<String> {
        // SAFETY: a C string of the stand-in, which writes it on this thread alone.
        let text = unsafe { CStr::from_ptr((self.log)()) }.to_str().expect("ASCII");
        let lines = text.lines().map(str::to_owned).collect();
        (self.reset)();
        lines
    }
}

fn both() -> [Context; 2] {
    [0, 1].map(|ordinal| Device::open(ordinal).unwrap())
}

#[test]
fn ranks_sum_what_they_have_and_give_their_communicators_back() {
    let _driver = driver();
    let library = Library::build("sums", &[]);
    let nccl = library.load();
    assert_eq!((nccl.path(), nccl.version().unwrap().as_str()), (library.path.as_path(), "2.27.5"));
    let contexts = both();
    let communicators = nccl.communicators(&contexts).unwrap();
    assert_eq!(library.log(), ["init 2"]);
    let ranks: Vec<_> = communicators
        .iter()
        .map(|communicator| {
            let stream = Stream::new(communicator.context()).unwrap();
            let own: Vec<f32> = (0..5).map(|i| (i * (communicator.rank() + 1)) as f32).collect();
            let buffer = DeviceBuffer::from_slice(&stream, &own).unwrap();
            (communicator, stream, buffer)
        })
        .collect();
    for (communicator, stream, buffer) in &ranks {
        communicator.all_reduce_sum(stream, buffer, 4).unwrap();
    }
    for (rank, (_, stream, buffer)) in ranks.iter().enumerate() {
        let untouched = 4.0 * (rank + 1) as f32;
        assert_eq!(buffer.to_vec(stream).unwrap(), [0.0, 3.0, 6.0, 9.0, untouched]);
    }
    assert_eq!(library.log(), ["sum 4"]);

    let (communicator, stream, buffer) = &ranks[0];
    let beyond =
        NcclError::Driver(DriverError::OutOfRange { what: "all-reduce", start: 0, len: 6, limit: 5 });
    assert_eq!(communicator.all_reduce_sum(stream, buffer, 6), Err(beyond));
    let (_, other_stream, other) = &ranks[1];
    for (stream, buffer, what) in [(other_stream, other, "NCCL"), (stream, other, "all-reduce buffer")] {
        let refused = NcclError::Driver(DriverError::OtherContext { what });
        assert_eq!(communicator.all_reduce_sum(stream, buffer, 5), Err(refused));
    }
    drop(ranks);
    drop(communicators);
    assert_eq!(library.log(), ["destroy 0", "destroy 1"]);
}

#[test]
fn a_result_is_told_with_the_librarys_words_and_an_aborted_rank_sums_no_more() {
    let _driver = driver();
    let library = Library::build("fails", &[]);
    let contexts = both();
    let communicators = library.load().communicators(&contexts).unwrap();
    let stream = Stream::new(&contexts[1]).unwrap();
    let buffer = DeviceBuffer::from_slice(&stream, &[1.0_f32]).unwrap();
    (library.fail)(1, 0);
    let failed = communicators[1].all_reduce_sum(&stream, &buffer, 1).unwrap_err();
    let expected = "ncclAllReduce failed with result 3 (internal error): the stand-in was told to fail";
    assert_eq!(failed.to_string(), expected);
    library.log();
    communicators[1].abort();
    communicators[1].abort();
    let aborted = Err(NcclError::Aborted { rank: 1 });
    assert_eq!(communicators[1].all_reduce_sum(&stream, &buffer, 1), aborted);
    drop(communicators);
    assert_eq!(library.log(), ["abort 1", "destroy 0"], "each once");
}

#[test]
fn what_is_missing_is_named() {
    let _driver = driver();
    let error = Nccl::load_from(&["libno-such-nccl.so", "/nonexistent/libnccl.so.2"]).unwrap_err();
    let NcclError::Missing { tried } = &error else { panic!("{error}") };
    assert_eq!(tried.len(), 2);
    let text = error.to_string();
    assert!(text.contains("/nonexistent/libnccl.so.2 (") && text.contains(PATH_VARIABLE), "{text}");
    // A library, and not this one.
    let other = Nccl::load_from(&["libc.so.6"]).unwrap_err();
    assert_eq!(other.to_string(), "libc.so.6 has no function ncclGetVersion");

    let library = Library::build("refuses", &["-DFAIL_INIT"]);
    let [first, _] = both();
    let refused = library.load().communicators(std::slice::from_ref(&first)).unwrap_err();
    assert!(matches!(refused, NcclError::Result { call: "ncclCommInitAll", code: 3, .. }), "{refused}");
    let twice = library.load().communicators(&[first.clone(), first]).unwrap_err();
    assert_eq!(twice.to_string(), "GPU 0 is two ranks, 0 and 1: each rank needs its own");
}
