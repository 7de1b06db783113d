//! What a kernel may use of a GPU, under the names of [rust-cuda](https://github.com/Rust-GPU/rust-cuda)'s `cuda_std`.
//!
//! One source, two faces. For `nvptx64` every function is a PTX instruction or two. On the host, with the feature
//! `emulator`, the same functions run the kernel on the CPU: threads as coroutines, barriers and warp collectives as
//! scheduling points, every access checked (see `emulator`). The test that holds the two together runs each function on both and
//! compares bits.
//!
//! | module | what it has |
//! |---|---|
//! | [`view`] | [`Global`], [`GlobalMut`], [`Shared`]: the only ways to memory |
//! | [`thread`] | who am I; block barriers |
//! | [`warp`] | shuffle, vote, match, reduce, scan |
//! | [`shared`] | dynamic shared memory, carved by a const layout |
//! | [`atomic`] | scoped and ordered read-modify-writes, loads, stores and fences |
//! | [`copy`] | asynchronous copies from global to shared memory |
//! | [`bulk`] | bulk copies between the two, and the barriers that count their bytes (sm_90) |
//! | [`mma`] | matrix products of a warp, on the tensor cores |
//! | [`wgmma`] | matrix products of four warps, which read shared memory on their own (sm_90a) |
//! | [`math`], [`bf16`] | fused and approximate arithmetic, bf16 packing |
//!
//! # Safety
//!
//! A kernel's author answers for indices, for races and for who takes part in a collective; the compiler can check none
//! of them and a release build for the device checks nothing at all. So nearly everything here is `unsafe`, a
//! kernel is an `unsafe fn` whose doc states its contract, and the emulator is what finds the mistakes: it checks each
//! access against the bounds of its buffer and its row, and every collective for its lanes.
//!
//! # Hardware
//!
//! Everything needs sm_80 (Ampere) or newer; what needs more says so.

#![cfg_attr(target_arch = "nvptx64", no_std)]
#![cfg_attr(target_arch = "nvptx64", feature(asm_experimental_arch, link_llvm_intrinsics, stdarch_nvptx))]
#![cfg_attr(target_arch = "nvptx64", allow(internal_features))]
#![allow(
    unsafe_op_in_unsafe_fn,
    clippy::missing_safety_doc,
    reason = "each module states one contract for all its functions; most bodies are a single instruction"
)]

// Without the emulator a host build has nothing to stand behind the functions, so it has none.
#[cfg(target_arch = "nvptx64")]
#[path = "nvptx/mod.rs"]
mod face;
#[cfg(all(not(target_arch = "nvptx64"), feature = "emulator"))]
#[path = "emulator/face.rs"]
mod face;

#[cfg(all(not(target_arch = "nvptx64"), feature = "emulator"))]
pub mod emulator;

macro_rules! with_a_face {
    ($($item:item)*) => { $(#[cfg(any(target_arch = "nvptx64", feature = "emulator"))] $item)* };
}
with_a_face! {
    pub mod atomic;
    pub mod bf16;
    pub mod bulk;
    pub mod copy;
    pub mod math;
    pub mod mma;
    pub mod shared;
    pub mod thread;
    mod value;
    pub mod view;
    pub mod warp;
    pub mod wgmma;

    pub use value::{U32x4, Value};
    pub use view::{Global, GlobalMut, Rows, RowsMut, Shared};
    pub use cuda_std_macros::kernel;

    /// What most kernels import.
    pub mod prelude {
        pub use crate::view::{LoadCache, StoreCache};
        pub use crate::{Global, GlobalMut, Shared, U32x4, kernel, thread, warp};
    }
}
