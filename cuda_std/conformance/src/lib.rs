//! A small kernel for every function of `cuda_std`.
//!
//! `cuda_std` has two faces, PTX and an emulator, and a kernel is only as trustworthy under the emulator as the two agree.
//! Each [`Case`] here is a kernel that calls one function on a row of input words a thread and writes what it gets to a row
//! of output words; the same [`inputs()`] on both must give the same output, to the bit. Launched with anything else than a
//! case's own shape a kernel is undefined.
//!
//! Seen from a host crate there are the table of [`CASES`] and the [`ptx()`]; the feature `emulate` adds `run_on_emulator`.
//!
//! A launch has two arguments, the addresses of the input and of the output: [`Case::input_words`] words of input and
//! [`Case::output_words`] words of output, which are 0 before it. Both start at multiples of 256 bytes, as allocations do.

#![cfg_attr(target_arch = "nvptx64", no_std)]
#![cfg_attr(target_arch = "nvptx64", feature(abi_ptx))]
#![allow(
    unsafe_op_in_unsafe_fn,
    clippy::missing_safety_doc,
    reason = "a kernel's contract is its case's shape, and the emulator checks each access"
)]
// The modules of newer architectures have few of the cases, and so use little of what these share.
#![cfg_attr(sm_90, allow(dead_code, unused_imports, unused_macros))]
// A host build without the emulator has tables alone.
#![cfg_attr(not(any(target_arch = "nvptx64", feature = "emulate")), allow(unused_macros))]

#[macro_use]
mod conform;

#[cfg(not(target_arch = "nvptx64"))]
mod case;
#[cfg(all(not(target_arch = "nvptx64"), feature = "emulate"))]
mod emulate;
#[cfg(not(target_arch = "nvptx64"))]
mod inputs;
#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
mod kernel;
#[cfg(not(target_arch = "nvptx64"))]
mod ptx;

mod atomic;
mod bulk;
mod copy;
mod math;
mod mma;
mod shared;
mod thread;
mod view;
mod warp;
mod wgmma;

#[cfg(not(target_arch = "nvptx64"))]
pub use case::{CASES, Case, Domain, Needs};
#[cfg(all(not(target_arch = "nvptx64"), feature = "emulate"))]
pub use emulate::{Kernel, run_on_emulator};
#[cfg(not(target_arch = "nvptx64"))]
pub use inputs::inputs;
#[cfg(not(target_arch = "nvptx64"))]
pub use ptx::{ARCHITECTURES, ptx};
