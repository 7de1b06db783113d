//! The device face: each function is an instruction or two.
//!
//! Collectives and addresses go through the support IR (`device.ll`), which says why.

mod address;
mod atomic;
mod bulk;
mod copy;
mod math;
mod mma;
mod pointer;
mod thread;
mod warp;
mod wgmma;

pub use atomic::{AtomicFace, fence};
pub use bulk::*;
pub use copy::*;
pub use math::*;
pub use mma::*;
pub use pointer::{GlobalPointer, SharedPointer, dynamic_shared};
pub use thread::*;
pub use warp::*;
pub use wgmma::*;

// Never reached: kernels are built with immediate-abort, which traps at the place of the panic.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
