//! The CUDA driver's functions, linked without a CUDA toolkit and loaded when they are first needed.
//!
//! `cust` names some 350 functions of `libcuda` and leaves them to the linker. Linking the real library would need a
//! toolkit to build, and a driver to start at all. This crate defines each function as a jump through a table
//! instead. The table is filled from `libcuda.so.1` by [`load`], which `cuInit` and `cuDriverGetVersion` call first.
//! So one binary starts anywhere, has no `libcuda` among its dependencies, and learns of a missing driver as an error:
//!
//! | called | result |
//! |---|---|
//! | before [`load`] | 3, `CUDA_ERROR_NOT_INITIALIZED`, as the driver itself says before `cuInit` |
//! | without a driver | 100, `CUDA_ERROR_NO_DEVICE` |
//! | missing in a driver that is older than the function | 500, `CUDA_ERROR_NOT_FOUND` |
//!
//! The functions are hidden symbols: a Python extension or plugin that holds them does not put them in the way of other
//! users of the real library.
//!
//! # Building without a CUDA toolkit
//!
//! `cust`'s build script still looks for a folder `lib64`. This workspace has one; elsewhere, without a toolkit, an
//! empty one will do:
//!
//! ```toml
//! # .cargo/config.toml, after `mkdir -p .cuda/lib64`
//! [env]
//! CUDA_LIBRARY_PATH = { value = ".cuda", relative = true }
//! ```
//!
//! On systems other than 64-bit x86 or Arm Linux this crate is empty.
#![cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]

mod calls;
mod trampolines;

use std::ffi::{CStr, CString, c_int, c_uint, c_void};
use std::fmt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

use calls::{NAMES, SLOTS};

/// The file that [`load`] asks the system's loader for.
pub const LIBRARY: &str = "libcuda.so.1";

const NOT_INITIALIZED: c_uint = 3;
const NO_DEVICE: c_uint = 100;
const NOT_FOUND: c_uint = 500;

/// Why there is no driver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadError {
    /// What the system's loader said about [`LIBRARY`].
    pub reason: String,
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no CUDA driver: {LIBRARY}: {}", self.reason)
    }
}

impl std::error::Error for LoadError {}

/// Loads the driver, once in a process; later calls return what the first one did. The driver stays loaded.
///
/// # Errors
/// If the system's loader finds no [`LIBRARY`] or cannot load it.
pub fn load() -> Result<(), LoadError> {
    static LOADED: OnceLock<Result<(), LoadError>> = OnceLock::new();
    LOADED.get_or_init(load_now).clone()
}

fn load_now() -> Result<(), LoadError> {
    let file = CString::new(LIBRARY).expect("a name without NUL");
    // SAFETY: the name is a C string. Loading runs the library's constructors; it is the system's CUDA driver, which
    // is made to be loaded at any time.
    let library = unsafe { libc::dlopen(file.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if library.is_null() {
        SLOTS.iter().for_each(|slot| slot.store(no_device as *mut c_void, Ordering::Relaxed));
        return Err(LoadError { reason: loader_error() });
    }
    for (slot, name) in SLOTS.iter().zip(NAMES) {
        let name = CString::new(*name).expect("a name without NUL");
        // SAFETY: the library is loaded, for good, and the name is a C string.
        let function = unsafe { libc::dlsym(library, name.as_ptr()) };
        slot.store(if function.is_null() { not_found as *mut c_void } else { function }, Ordering::Release);
    }
    Ok(())
}

fn loader_error() -> String {
    // SAFETY: dlerror takes nothing and returns null or a C string that is this thread's until its next call.
    let text = unsafe { libc::dlerror() };
    if text.is_null() {
        return "cannot be loaded".to_owned();
    }
    // SAFETY: not null, so a C string, and no dl call comes between.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    text.strip_prefix(LIBRARY).map_or(&*text, |reason| reason.trim_start_matches([':', ' '])).to_owned()
}

/// What the table holds for functions that need `cuInit` before them.
extern "C" fn not_initialized() -> c_uint {
    NOT_INITIALIZED
}

extern "C" fn no_device() -> c_uint {
    NO_DEVICE
}

extern "C" fn not_found() -> c_uint {
    NOT_FOUND
}

/// What the table holds for `cuInit` before [`load`].
extern "C" fn load_and_init(flags: c_uint) -> c_uint {
    let _ = load(); // If it fails, the table answers.
    // SAFETY: load has replaced slot 0 by the driver's cuInit, whose type this is, or by a function that reads no
    // argument.
    let init = unsafe { function::<extern "C" fn(c_uint) -> c_uint>(&SLOTS[0]) };
    init(flags)
}

/// What the table holds for `cuDriverGetVersion` before [`load`].
extern "C" fn load_and_get_version(version: *mut c_int) -> c_uint {
    let _ = load();
    // SAFETY: load has replaced slot 1 by the driver's cuDriverGetVersion, whose type this is, or by a function that
    // reads no argument.
    let get_version = unsafe { function::<extern "C" fn(*mut c_int) -> c_uint>(&SLOTS[1]) };
    get_version(version)
}

/// The function in a slot.
///
/// # Safety
/// `F` is the type of that function.
unsafe fn function<F: Copy>(slot: &AtomicPtr<c_void>) -> F {
    const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
    let pointer = slot.load(Ordering::Acquire);
    // SAFETY: a slot always holds a function, and the caller vouches for its type.
    unsafe { std::mem::transmute_copy(&pointer) }
}
