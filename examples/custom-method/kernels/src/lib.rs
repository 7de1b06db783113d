//! The kernels of the method: the key of each chunk that is farthest from the origin, for prompts and for decode steps.
//!
//! Without features this crate is the PTX text and the launch shape, which any host can use. Compiled for nvptx64 (by `build-kernels`, see the
//! program's crate) it is the kernels, with the feature `emulate` the same source for `cuda_std`'s emulator.

#![cfg_attr(target_arch = "nvptx64", no_std)]
#![cfg_attr(target_arch = "nvptx64", feature(abi_ptx))]
#![allow(
    unsafe_op_in_unsafe_fn,
    clippy::missing_safety_doc,
    reason = "a kernel's contract stands in its doc and covers its whole body; the emulator checks each access against it"
)]

pub mod entry;

#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
mod farthest;
#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
pub use farthest::{farthest_key, farthest_key_step};

/// Threads of a block: a warp.
pub const BLOCK: u32 = 32;

/// The widest key, in words of 8 elements: a lane has one.
pub const MAX_HEAD_WORDS: u32 = BLOCK;

/// The PTX for a GPU of `arch`, one of the names that `spinkv`'s driver layer gives; `None` for any other.
#[cfg(not(target_arch = "nvptx64"))]
pub fn ptx(arch: &str) -> Option<&'static str> {
    match arch {
        "sm_80" => Some(include_str!("../ptx/sm_80.ptx")),
        "sm_90a" => Some(include_str!("../ptx/sm_90a.ptx")),
        "sm_100a" => Some(include_str!("../ptx/sm_100a.ptx")),
        _ => None,
    }
}
