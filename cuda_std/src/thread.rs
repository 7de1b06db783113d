//! Who am I, and the barriers of a block.
//!
//! # Safety
//! A barrier is `unsafe`: every thread of the block that has not returned must reach the same one.

use crate::face;

macro_rules! index {
    ($($(#[$doc:meta])* $name:ident = $register:literal;)*) => { $(
        $(#[$doc])*
        ///
        #[doc = concat!("PTX: `%", $register, "`.")]
        #[inline(always)]
        pub fn $name() -> u32 {
            face::$name()
        }
    )* };
}

index! {
    /// The thread's place in its block, x.
    thread_idx_x = "tid.x";
    /// The thread's place in its block, y.
    thread_idx_y = "tid.y";
    /// The thread's place in its block, z.
    thread_idx_z = "tid.z";
    /// Threads of a block, x.
    block_dim_x = "ntid.x";
    /// Threads of a block, y.
    block_dim_y = "ntid.y";
    /// Threads of a block, z.
    block_dim_z = "ntid.z";
    /// The block's place in the grid, x.
    block_idx_x = "ctaid.x";
    /// The block's place in the grid, y.
    block_idx_y = "ctaid.y";
    /// The block's place in the grid, z.
    block_idx_z = "ctaid.z";
    /// Blocks of the grid, x.
    grid_dim_x = "nctaid.x";
    /// Blocks of the grid, y.
    grid_dim_y = "nctaid.y";
    /// Blocks of the grid, z.
    grid_dim_z = "nctaid.z";
}

/// The thread's number in a grid of one dimension.
///
/// PTX: `mad.lo.s32` of `%ctaid.x`, `%ntid.x` and `%tid.x`.
#[inline(always)]
pub fn index_1d() -> u32 {
    block_idx_x().wrapping_mul(block_dim_x()).wrapping_add(thread_idx_x())
}

/// Waits until all threads of the block are here; what they wrote before is then visible to all of them.
///
/// PTX: `bar.sync 0`; the lanes of a warp arrive together.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn sync_threads() {
    face::sync_threads();
}

/// [`sync_threads`], and how many threads of the block came with `predicate`.
///
/// PTX: `bar.red.popc.u32`.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn sync_threads_count(predicate: bool) -> u32 {
    face::sync_threads_count(predicate)
}

/// [`sync_threads`], and whether all threads of the block came with `predicate`.
///
/// PTX: `bar.red.and.pred`.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn sync_threads_and(predicate: bool) -> bool {
    face::sync_threads_and(predicate)
}

/// [`sync_threads`], and whether any thread of the block came with `predicate`.
///
/// PTX: `bar.red.or.pred`.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn sync_threads_or(predicate: bool) -> bool {
    face::sync_threads_or(predicate)
}

/// Lets the launch that depends on this one begin once every block has said so or ended, if it was launched to overlap; what this one
/// writes later it must then wait for by other means. Under the emulator launches do not overlap, and this does nothing.
///
/// PTX: `griddepcontrol.launch_dependents`, sm_90.
#[inline(always)]
pub fn launch_dependents() {
    face::launch_dependents();
}

/// Waits until the launches that this one depends on have ended and what they wrote is there, if it was launched to overlap; otherwise
/// that is so from the start, and it goes on at once. Under the emulator launches do not overlap, and this does nothing.
///
/// A launch that calls it in every block has ended after those before it, so whoever waits for its end needs not know of them.
///
/// PTX: `griddepcontrol.wait`, sm_90.
#[inline(always)]
pub fn wait_dependencies() {
    face::wait_dependencies();
}

/// Sleeps for about `nanoseconds`, between looks at a flag that another block will set.
///
/// PTX: `nanosleep.u32`.
#[inline(always)]
pub fn nanosleep(nanoseconds: u32) {
    face::nanosleep(nanoseconds);
}
