//! The SIMT emulator: runs the very sources of kernels on the CPU and finds their faults.
//!
//! ```
//! use cuda_std::emulator::{Buffer, FaultKind, Launch};
//! use cuda_std::prelude::*;
//!
//! /// Writes twice each value.
//! ///
//! /// # Safety
//! /// Both views hold `n` elements; launched with at least `n` threads in one dimension.
//! #[kernel]
//! pub unsafe fn double(values: Global<u32>, out: GlobalMut<u32>, n: u32) {
//!     let i = thread::index_1d();
//!     if i < n {
//!         out.store(i as usize, 2 * values.load(i as usize));
//!     }
//! }
//!
//! let values = Buffer::from_slice(&[3, 1, 4, 1, 5]);
//! let out = Buffer::poisoned(5);
//! let report = Launch::new(2, 4).run(|| unsafe { double(values.view(), out.view_mut(), 5) })?;
//! assert_eq!(out.to_vec(), [6, 2, 8, 2, 10]);
//! assert_eq!(report.global.loads, 5);
//!
//! // One element too many:
//! let fault = Launch::new(2, 4).run(|| unsafe { double(values.view(), out.view_mut(), 6) }).unwrap_err();
//! assert!(matches!(fault.kind, FaultKind::OutOfBounds { index: 5, buffer_len: 5, .. }));
//! assert_eq!((fault.kernel, fault.block.x, fault.thread.x), ("double", 1, 1));
//! # Ok::<(), cuda_std::emulator::Fault>(())
//! ```
//!
//! # Execution
//!
//! Each thread is a coroutine. Barriers, collectives, atomics and sleeps are the points where the turn passes to another
//! thread, and any access to memory may be, by chance. Whose turn comes, which blocks run together and in what order: all of
//! it follows from [`Launch::seed`]. A kernel that is right gives the same results for every seed, so tests run many.
//!
//! # Faults
//!
//! The first [`Fault`] ends the launch and says what happened where: [`FaultKind`] lists them. Races are found by what orders two
//! accesses, not by whether they happened to collide, so nearly every seed finds them. What orders:
//!
//! - a barrier: the threads of the block that pass it (a thread that has returned is past caring, and nothing
//!   orders what it did in its last epoch);
//! - [`sync_warp`](crate::warp::sync_warp): the lanes of its mask. Shuffles, votes, matches and reductions order nothing;
//! - a chain of a release (a release operation, or a fence before a relaxed one) and an acquire that saw its value (or a
//!   relaxed one with a fence after it). A release of block scope is for its block;
//! - a barrier in shared memory: what its arrivals did, and the bulk copies onto it, before who waited for the phase.
//!
//! # What it does not see
//!
//! - Stale values: a load gives what was stored last. Where hardware could give something older there is a race, and that is
//!   found.
//! - Some races of three or more: of each element the last plain and the last atomic write are remembered, and two loads.
//! - Scopes wider than the block, and the acquiring side of a block's fence: all are taken as those of the device.
//! - Who converges without being told to: `activemask` gives all lanes that have not returned.
//! - What never calls this crate: a loop without such a call is not interrupted, and if it does not end, neither does the launch.
//! - NaN bits of Rust's own operators, which are the CPU's; all else of their arithmetic is the same.
//! - Values that PTX leaves open: a shuffle from a lane that takes no part gives the own value.
//! - When the bytes of an asynchronous copy land, since touching them before the wait is a fault; the source is read at the
//!   start or at the wait, by chance. Those of a bulk copy arrive, and count, at a random poll of its barrier.
//! - When a warpgroup's product runs: its sums are NaN until a wait gives them back, and changing what it reads before is a fault. Whether
//!   registers of a left side change meanwhile.
//! - Proxy fences that global memory would need: between stores and a bulk copy of one launch.

pub(crate) mod arithmetic;
pub(crate) mod barrier;
pub(crate) mod buffer;
pub(crate) mod bulk;
mod copies;
mod fault;
mod launch;
pub(crate) mod machine;
pub(crate) mod mbarrier;
pub(crate) mod mma;
pub(crate) mod order;
mod panics;
mod schedule;
pub(crate) mod sfu;
mod shadow;
mod stacks;
pub(crate) mod warp;
pub(crate) mod wgmma;

pub use buffer::Buffer;
pub use fault::{Access, Fault, FaultKind, Index, LaunchError, Operation, Other, Space};
pub use launch::{Launch, Report, Traffic};

/// Notes the kernel's name; `#[kernel]` puts it first.
#[doc(hidden)]
pub fn enter_kernel(name: &'static str) {
    machine::with(|machine| machine.kernel = name);
}
