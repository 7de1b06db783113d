//! Answers the `-lcuda` that `cust_raw` asks the linker for.
//!
//! The functions themselves are in this crate's own object code, so the archive is an empty one. A toolkit's libcuda.so
//! that the linker finds first does no harm: nothing is left for it to define, so it does not become a dependency.

use std::path::PathBuf;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    std::fs::write(out.join("libcuda.a"), "!<arch>\n").expect("OUT_DIR is writable");
    println!("cargo:rustc-link-search=native={}", out.display());
}
