//! Bulk copies between global and shared memory (`cp.async.bulk`, sm_90), and the barriers that count their bytes (`mbarrier`).
//!
//! One thread starts a copy of any length with one instruction, and the hardware does the rest:
//!
//! - **In**, from global to shared memory: a [`Barrier`] counts the bytes that arrive. The thread that starts copies says with
//!   [`arrive_expect`] how many will; whoever [`wait`]s for that phase of the barrier sees them.
//! - **Out**, from shared to global memory: the thread closes its copies into a group with [`commit_group`] and waits with
//!   [`wait_group_read`] until their sources may be used again, or with [`wait_group`] until they are written.
//!
//! The copies see memory through another proxy than loads and stores, so a [`fence`] stands between the initialisation of a barrier and
//! the first copy onto it, and between stores to shared memory and a copy out of it or over it. What has arrived needs none.
//!
//! ```ignore
//! if thread::thread_idx_x() == 0 {
//!     bulk::init(barriers, 0, 1);
//!     bulk::fence();
//!     bulk::arrive_expect(barriers, 0, 4096);
//!     bulk::copy_in(tile, from, 256, barriers, 0); // 256 words of 16 bytes
//!     bulk::wait(barriers, 0, 0);
//!     bulk::copy_out(to, tile, 256);
//!     bulk::commit_group();
//!     bulk::wait_group::<0>();
//! }
//! ```
//!
//! # Safety
//! As for [views](crate::view#safety), where both sides of a copy are in use from its start to the end of the wait for it: until then
//! nobody touches the destination, and the source does not change. A copy has 16 bytes or a multiple of it and begins at multiples of 16 on
//! both sides. A barrier is initialised once, before anyone uses it, is touched by nothing but these functions, and lives as long as the
//! block. Copies in are waited for by someone, and the sources of copies out by their thread, before the block ends.

use crate::{Global, GlobalMut, Shared, Value, face};

/// A barrier in shared memory. Its phases are numbered from 0; one ends when as many arrivals have come as it was initialised for, and as
/// many bytes as they expected.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub struct Barrier(u64);

// SAFETY: a u64.
unsafe impl Value for Barrier {}

/// Makes element `index` a barrier whose phases have `arrivals` arrivals each, 1 to 2^20 - 1.
///
/// PTX: `mbarrier.init.shared::cta.b64`, sm_80.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn init(barriers: Shared<Barrier>, index: usize, arrivals: u32) {
    face::barrier_init(barriers.0, index, arrivals);
}

/// Arrives, and has the phase wait for `bytes` more bytes; at most 2^20 - 1 may be under way. What the thread did before is ordered before
/// what others do after they waited for the phase.
///
/// PTX: `mbarrier.arrive.expect_tx.shared::cta.b64`, sm_90.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn arrive_expect(barriers: Shared<Barrier>, index: usize, bytes: u32) {
    face::barrier_arrive_expect(barriers.0, index, bytes);
}

/// Whether phase `phase` has ended: the one under way or the one before. May wait for a while before it says no.
///
/// The hardware sees the number's parity alone.
///
/// PTX: `mbarrier.try_wait.parity.shared::cta.b64`, sm_90.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn try_wait(barriers: Shared<Barrier>, index: usize, phase: u32) -> bool {
    face::barrier_try_wait(barriers.0, index, phase)
}

/// Waits until phase `phase` has ended: the one under way or the one before.
///
/// PTX: as [`try_wait`], in a loop.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn wait(barriers: Shared<Barrier>, index: usize, phase: u32) {
    while !try_wait(barriers, index, phase) {}
}

/// Starts copying the first `len` elements of `from` to those of `to`. Their bytes count in the phase of the barrier that is under way.
///
/// PTX: `cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes`, sm_90.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn copy_in<T: Value>(
    to: Shared<T>,
    from: Global<T>,
    len: usize,
    barriers: Shared<Barrier>,
    index: usize,
) {
    face::bulk_copy_in(to.0, from.0, len, barriers.0, index);
}

/// Starts copying the first `len` elements of `from` to those of `to`.
///
/// PTX: `cp.async.bulk.global.shared::cta.bulk_group`, sm_90.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn copy_out<T: Value>(to: GlobalMut<T>, from: Shared<T>, len: usize) {
    face::bulk_copy_out(to.0, from.0, len);
}

/// Closes the copies out that the thread has started since the last group.
///
/// PTX: `cp.async.bulk.commit_group`, sm_90.
#[inline(always)]
pub fn commit_group() {
    face::bulk_commit_group();
}

/// Waits until at most `PENDING` of the thread's newest groups are not yet written. The end of the launch waits for all.
///
/// PTX: `cp.async.bulk.wait_group`, sm_90.
#[inline(always)]
pub fn wait_group<const PENDING: u32>() {
    face::bulk_wait_group::<PENDING>();
}

/// Waits until at most `PENDING` of the thread's newest groups still read shared memory.
///
/// PTX: `cp.async.bulk.wait_group.read`, sm_90.
#[inline(always)]
pub fn wait_group_read<const PENDING: u32>() {
    face::bulk_wait_group_read::<PENDING>();
}

/// Shows bulk copies, and products of a [warpgroup](crate::wgmma), what loads, stores and `cp.async` have done in shared memory: those of
/// this thread, and those ordered before.
///
/// The emulator asks for it in the thread that stores, or, after a barrier of the block, in the one that copies.
///
/// PTX: `fence.proxy.async.shared::cta`, sm_90.
#[inline(always)]
pub fn fence() {
    face::fence_proxy_async();
}
