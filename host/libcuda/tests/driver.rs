//! The functions without a driver, and through a stand-in for one. A process loads a driver once, so every case runs
//! in a process of its own.
#![cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]

use std::ffi::{c_int, c_uint, c_void};
use std::process::Command;

unsafe extern "C" {
    fn cuInit(flags: c_uint) -> c_uint;
    fn cuDriverGetVersion(version: *mut c_int) -> c_uint;
    fn cuCtxSynchronize() -> c_uint;
    fn cuProfilerStop() -> c_uint;
    fn cuLaunchKernel(
        function: usize,
        grid_x: c_uint,
        grid_y: c_uint,
        grid_z: c_uint,
        block_x: c_uint,
        block_y: c_uint,
        block_z: c_uint,
        shared_bytes: c_uint,
        stream: usize,
        parameters: usize,
        extra: *mut c_void,
    ) -> c_uint;
}

const CASE: &str = "SPINKV_LIBCUDA_TEST_CASE";

/// Runs `case` in a process of its own, which finds libraries in `libraries` first. True in that process.
fn in_a_process_of_its_own(case: &str, libraries: Option<&std::path::Path>) -> bool {
    if std::env::var(CASE).as_deref() == Ok(case) {
        return true;
    }
    let mut command = Command::new(std::env::current_exe().expect("a test binary has a path"));
    command.args([case, "--exact", "--nocapture"]).env(CASE, case);
    if let Some(libraries) = libraries {
        command.env("LD_LIBRARY_PATH", libraries);
    }
    assert!(command.status().expect("a test binary runs").success(), "{case} failed in its process");
    false
}

#[test]
fn without_a_driver_every_call_says_so() {
    if !in_a_process_of_its_own("without_a_driver_every_call_says_so", None) {
        return;
    }
    // SAFETY: it reads no argument while nothing is loaded.
    assert_eq!(unsafe { cuCtxSynchronize() }, 3, "nothing is loaded yet");
    let Err(error) = spinkv_libcuda::load() else {
        println!("SKIPPED: without_a_driver_every_call_says_so, since this machine has a CUDA driver");
        return;
    };
    assert!(error.to_string().contains("libcuda.so.1"), "{error}");
    let mut version = 0;
    // SAFETY: no driver is loaded, so these are functions that read no argument.
    let codes = unsafe { [cuInit(0), cuDriverGetVersion(&raw mut version), cuCtxSynchronize()] };
    assert_eq!(codes, [100; 3]);
    assert_eq!(spinkv_libcuda::load(), Err(error));
}

#[test]
fn a_driver_gets_every_argument_and_gives_every_code() {
    let name = "a_driver_gets_every_argument_and_gives_every_code";
    let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("fake-driver");
    if std::env::var_os(CASE).is_none() {
        std::fs::create_dir_all(&folder).expect("a writable folder");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/driver.c");
        let mut compiler = Command::new("cc");
        compiler.args(["-shared", "-fPIC", source, "-o"]).arg(folder.join(spinkv_libcuda::LIBRARY));
        assert!(compiler.status().expect("a C compiler").success());
    }
    if !in_a_process_of_its_own(name, Some(&folder)) {
        return;
    }
    let mut version = 0;
    let mut seen = [0u64; 10];
    // SAFETY: the declared types are those of the stand-in, which writes an integer and ten words.
    unsafe {
        assert_eq!(cuDriverGetVersion(&raw mut version), 0, "it loads the driver");
        assert_eq!(version, 13000);
        assert_eq!(cuInit(0), 0);
        assert_eq!(cuInit(7), 1);
        assert_eq!(cuCtxSynchronize(), 916);
        assert_eq!(cuProfilerStop(), 500, "not in this driver");
        let extra = seen.as_mut_ptr().cast();
        assert_eq!(cuLaunchKernel(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, extra), 0);
    }
    assert_eq!(seen, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
}
