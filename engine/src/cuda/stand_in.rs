//! A stand-in for the driver, the library's own, with a larger GPU: its memory is the host's, its kernels do nothing.

use std::ffi::{CStr, CString, c_char, c_int, c_long, c_void};
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use spinkv::backend::cuda::driver::{Device, Stream};
use spinkv::backend::cuda::nccl::Nccl;

/// Bytes that the GPU has free.
pub(super) const FREE_BYTES: u64 = 64 << 20;
/// Bytes that it has.
pub(super) const MEMORY_BYTES: u64 = 256 << 20;

/// It counts for the whole process: tests take turns.
pub(crate) struct Driver {
    log: extern "C" fn() -> *const c_char,
    reset: extern "C" fn(),
}

pub(crate) fn driver() -> MutexGuard<'static, Driver> {
    static DRIVER: OnceLock<Mutex<Driver>> = OnceLock::new();
    let driver = DRIVER.get_or_init(load).lock().unwrap_or_else(PoisonError::into_inner);
    (driver.reset)();
    driver
}

/// Builds and loads it, before anything asks for the driver. The system's loader then takes it for the driver, by its name.
fn load() -> Mutex<Driver> {
    let folder = tempfile::tempdir().unwrap();
    let library = folder.path().join("stand-in-libcuda.so");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/../host/tests/cuda_driver/stand_in.c");
    let mut compiler = Command::new("cc");
    compiler.args(["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", source, "-o"]).arg(&library);
    compiler.arg(format!("-DMEMORY_BYTES={MEMORY_BYTES}ul")).arg(format!("-DFREE_BYTES={FREE_BYTES}ul"));
    assert!(compiler.status().expect("a C compiler").success());
    let name = CString::new(library.to_str().expect("a UTF-8 path")).expect("a path without NUL");
    // SAFETY: the library has no constructors and is never unloaded; it has these functions, with these types.
    unsafe {
        let handle = libc::dlopen(name.as_ptr(), libc::RTLD_NOW);
        assert!(!handle.is_null(), "{} does not load", library.display());
        let symbol = |name: &CStr| libc::dlsym(handle, name.as_ptr());
        Mutex::new(Driver {
            log: std::mem::transmute::<*mut c_void, extern "C" fn() -> *const c_char>(symbol(
                c"stand_in_log",
            )),
            reset: std::mem::transmute::<*mut c_void, extern "C" fn()>(symbol(c"stand_in_reset")),
        })
    }
}

/// A stand-in for NCCL, the library's own: its sums are those of the host's memory. It has all groups of the process in one log, so tests that
/// have the driver have it.
pub(crate) struct StandInNccl {
    path: PathBuf,
    log: extern "C" fn() -> *const c_char,
    reset: extern "C" fn(),
    fail: extern "C" fn(c_int, c_long),
}

impl StandInNccl {
    fn build() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("stand-in-nccl.so");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/../host/tests/cuda_driver/stand_in_nccl.c");
        let status = Command::new("cc").args(["-shared", "-fPIC", source, "-o"]).arg(&path).status();
        assert!(status.expect("a C compiler").success());
        let name = CString::new(path.to_str().expect("a UTF-8 path")).expect("a path without NUL");
        // It stays until the process ends, since it is loaded by its name again.
        std::mem::forget(folder);
        // SAFETY: the library has no constructors and is never unloaded; it has these functions, with these types.
        unsafe {
            let handle = libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL);
            assert!(!handle.is_null(), "{} does not load", path.display());
            let symbol = |name: &CStr| libc::dlsym(handle, name.as_ptr());
            Self {
                log: std::mem::transmute::<*mut c_void, extern "C" fn() -> *const c_char>(symbol(
                    c"stand_in_log",
                )),
                reset: std::mem::transmute::<*mut c_void, extern "C" fn()>(symbol(c"stand_in_reset")),
                fail: std::mem::transmute::<*mut c_void, extern "C" fn(c_int, c_long)>(symbol(
                    c"stand_in_fail",
                )),
                path,
            }
        }
    }

    /// As the library loads it.
    pub fn load(&self) -> Nccl {
        Nccl::load_from(&[&self.path]).unwrap()
    }

    /// Lets the `call`-th sum of `rank` fail, counted from 0.
    pub fn fail(&self, rank: usize, call: usize) {
        (self.fail)(rank as c_int, call as c_long);
    }

    /// The lines since the last call.
    pub fn log(&self) -> Vec<String> {
        // SAFETY: a C string of the stand-in, which nobody writes: all ranks are at rest.
        let text = unsafe { CStr::from_ptr((self.log)()) }.to_str().expect("ASCII");
        let lines = text.lines().map(str::to_owned).collect();
        (self.reset)();
        lines
    }
}

impl Driver {
    /// A NCCL over the stand-in's GPUs, of which there are two.
    pub fn nccl(&self) -> &'static StandInNccl {
        static NCCL: OnceLock<StandInNccl> = OnceLock::new();
        let nccl = NCCL.get_or_init(StandInNccl::build);
        (nccl.reset)();
        nccl
    }

    pub fn stream(&self) -> Stream {
        let stream = Stream::new(&Device::open(0).unwrap()).unwrap();
        self.log();
        stream
    }

    /// The lines since the last call.
    pub fn log(&self) -> Vec<String> {
        // SAFETY: a C string of the stand-in, which writes it on this thread alone.
        let text = unsafe { CStr::from_ptr((self.log)()) }.to_str().expect("ASCII");
        let lines = text.lines().map(str::to_owned).collect();
        (self.reset)();
        lines
    }
}
