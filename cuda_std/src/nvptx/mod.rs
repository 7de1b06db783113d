//! The device face: each function is an instruction or two.
//!
//! Collectives and addresses go through the support IR (`device.ll`), which says why.

mod address;
mod atomic;
mod copy;
mod math;
mod pointer;
mod thread;
mod warp;

pub use atomic::{AtomicFace, fence};
pub use copy::*;
pub use math::*;
pub use pointer::{GlobalPointer, SharedPointer, dynamic_shared};
pub use thread::*;
pub use warp::*;

// Never reached: kernels are built with immediate-abort, which traps at the place of the panic.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
