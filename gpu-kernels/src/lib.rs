//! SpinKV's GPU kernels.
//!
//! Seen from a host crate this is small: launch contracts and layouts ([`abi`]) and the generated PTX ([`ptx()`]), no GPU toolchain
//! needed. The kernels themselves, by pipeline stage, are compiled for the device by `cargo xtask build-kernels`, and for the
//! host with the feature `emulate`, which runs the same sources under `cuda_std`'s emulator.

#![cfg_attr(target_arch = "nvptx64", no_std)]
#![cfg_attr(target_arch = "nvptx64", feature(abi_ptx))]
#![allow(
    unsafe_op_in_unsafe_fn,
    clippy::missing_safety_doc,
    reason = "a kernel's contract stands in its doc and covers its whole body; the emulator checks each access against it"
)]

pub mod abi;
mod ptx;

pub use ptx::{ARCHITECTURES, ptx};

#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
pub mod attention;
#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
mod block;
#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
mod chain;
#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
mod codes;
#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
mod gate;
#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
pub mod index;
#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
pub mod linear;
#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
pub mod model;
#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
pub mod offload;
#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
mod ragged;
#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
pub mod retrieve;
#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
pub mod select;
#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
mod softmax;
#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
mod unroll;
