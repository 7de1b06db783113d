//! Asynchronous copies from global to shared memory (`cp.async`, sm_80).
//!
//! A thread starts copies, closes them into a group with [`commit_group`], and waits with [`wait_group`] or [`wait_all`].
//! Waiting covers the thread's own copies; others see them after a barrier that follows the wait.
//!
//! # Safety
//! As for [views](crate::view#safety), where the destination is written at some time between the start and the end of the wait: until
//! then nobody reads or writes it, and the source does not change.

use crate::{Global, Shared, Value, face};

/// What one copy moves: 4, 8 or 16 bytes.
pub trait CopyValue: Value {}

impl CopyValue for u32 {}
impl CopyValue for f32 {}
impl CopyValue for u64 {}
impl CopyValue for crate::U32x4 {}

/// Starts copying an element.
///
/// PTX: `cp.async.ca.shared.global` of 4 and 8 bytes, `cp.async.cg.shared.global` (past L1) of 16.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn copy_async<T: CopyValue>(to: Shared<T>, to_index: usize, from: Global<T>, from_index: usize) {
    face::copy_async(to.0, to_index, from.0, from_index);
}

/// Starts copying an element, or zeroes where `valid` is false; the source is then not read and may lie outside the view.
///
/// PTX: as [`copy_async`], with a source size of 0 for zeroes.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn copy_async_or_zero<T: CopyValue>(
    to: Shared<T>,
    to_index: usize,
    from: Global<T>,
    from_index: usize,
    valid: bool,
) {
    face::copy_async_or_zero(to.0, to_index, from.0, from_index, valid);
}

/// Closes the copies that the thread has started since the last group.
///
/// PTX: `cp.async.commit_group`.
#[inline(always)]
pub fn commit_group() {
    face::commit_group();
}

/// Waits until at most `PENDING` of the thread's newest groups are under way.
///
/// PTX: `cp.async.wait_group`.
#[inline(always)]
pub fn wait_group<const PENDING: u32>() {
    face::wait_group::<PENDING>();
}

/// Waits for all copies of the thread, in groups or not.
///
/// PTX: `cp.async.wait_all`.
#[inline(always)]
pub fn wait_all() {
    face::wait_all();
}
