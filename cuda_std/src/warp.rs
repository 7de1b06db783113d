//! Collectives of a warp's 32 threads.
//!
//! # Safety
//! `mask` names the lanes that take part, and every one of them must reach the same call with the same mask; the calling
//! lane is one of them. (Hardware forgives a mask that names lanes that have returned; the emulator does not.) A value
//! shuffled from a lane outside the mask is undefined.

use crate::face;
use crate::math::max;

/// All 32 lanes.
pub const FULL_MASK: u32 = u32::MAX;

/// Threads of a warp.
pub const WARP_SIZE: u32 = 32;

/// Where a shuffle takes its value from.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShuffleMode {
    /// The lane that is named.
    Idx,
    /// The lane whose number is xor-ed.
    Xor,
    /// A lower lane.
    Up,
    /// A higher lane.
    Down,
}

/// What a shuffle can move: 32 bits in one instruction, 64 in two.
pub trait ShuffleValue: Copy {
    #[doc(hidden)]
    unsafe fn shuffle(mode: ShuffleMode, mask: u32, value: Self, lane: u32, width: u32) -> Self;
}

macro_rules! shuffle_value {
    ($($ty:ty: |$value:ident| $to:expr, |$bits:ident| $from:expr;)*) => { $(
        impl ShuffleValue for $ty {
            #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
            #[inline(always)]
            unsafe fn shuffle(mode: ShuffleMode, mask: u32, $value: Self, lane: u32, width: u32) -> Self {
                // The clamp and segment operand: groups of `width` lanes; Up clamps at the group's first lane.
                let clamp = if matches!(mode, ShuffleMode::Up) { 0 } else { 31 };
                let $bits = face::shuffle(mode, mask, $to, lane, (WARP_SIZE - width) << 8 | clamp);
                $from
            }
        }
    )* };
}
shuffle_value! {
    u32: |value| value, |bits| bits;
    i32: |value| value as u32, |bits| bits as i32;
    f32: |value| value.to_bits(), |bits| f32::from_bits(bits);
}
impl ShuffleValue for u64 {
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    unsafe fn shuffle(mode: ShuffleMode, mask: u32, value: Self, lane: u32, width: u32) -> Self {
        let low = u32::shuffle(mode, mask, value as u32, lane, width);
        let high = u32::shuffle(mode, mask, (value >> 32) as u32, lane, width);
        u64::from(high) << 32 | u64::from(low)
    }
}

/// What a match can compare.
pub trait MatchValue: Copy {
    #[doc(hidden)]
    unsafe fn any(mask: u32, value: Self) -> u32;
    #[doc(hidden)]
    unsafe fn all(mask: u32, value: Self) -> (u32, bool);
}

macro_rules! match_value {
    ($($ty:ty, $any:ident, $all:ident;)*) => { $(
        impl MatchValue for $ty {
            #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
            #[inline(always)]
            unsafe fn any(mask: u32, value: Self) -> u32 {
                face::$any(mask, value)
            }
            #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
            #[inline(always)]
            unsafe fn all(mask: u32, value: Self) -> (u32, bool) {
                face::$all(mask, value)
            }
        }
    )* };
}
match_value! {
    u32, match_any_u32, match_all_u32;
    u64, match_any_u64, match_all_u64;
}

/// The thread's number within its warp.
///
/// PTX: `%laneid`.
#[inline(always)]
pub fn lane_id() -> u32 {
    face::lane_id()
}

/// The lanes that run together with this one just now; says nothing about who comes later. The emulator names all that have
/// not returned.
///
/// PTX: `activemask.b32`.
#[inline(always)]
pub fn activemask() -> u32 {
    face::activemask()
}

/// Waits for the lanes of `mask`; what they wrote before is then visible to them.
///
/// PTX: `bar.warp.sync`.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn sync_warp(mask: u32) {
    face::sync_warp(mask);
}

/// The value of lane `lane` (modulo `width`) of the own group of `width` lanes (a power of two).
///
/// PTX: `shfl.sync.idx.b32`.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn warp_shuffle_idx<T: ShuffleValue>(mask: u32, value: T, lane: u32, width: u32) -> T {
    T::shuffle(ShuffleMode::Idx, mask, value, lane, width)
}

/// The value of the lane whose number differs by the bits of `lane_mask`, which is below `width` (a power of two).
///
/// PTX: `shfl.sync.bfly.b32`.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn warp_shuffle_xor<T: ShuffleValue>(mask: u32, value: T, lane_mask: u32, width: u32) -> T {
    T::shuffle(ShuffleMode::Xor, mask, value, lane_mask, width)
}

/// The value of the lane `delta` below, within groups of `width` lanes (a power of two), for `delta` < 32; the first `delta` lanes of a
/// group keep their own.
///
/// PTX: `shfl.sync.up.b32`.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn warp_shuffle_up<T: ShuffleValue>(mask: u32, value: T, delta: u32, width: u32) -> T {
    T::shuffle(ShuffleMode::Up, mask, value, delta, width)
}

/// The value of the lane `delta` above, within groups of `width` lanes (a power of two), for `delta` < 32; the last `delta` lanes of a
/// group keep their own.
///
/// PTX: `shfl.sync.down.b32`.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn warp_shuffle_down<T: ShuffleValue>(mask: u32, value: T, delta: u32, width: u32) -> T {
    T::shuffle(ShuffleMode::Down, mask, value, delta, width)
}

/// Whether all lanes of `mask` came with `predicate`.
///
/// PTX: `vote.sync.all.pred`.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn warp_vote_all(mask: u32, predicate: bool) -> bool {
    face::vote_all(mask, predicate)
}

/// Whether any lane of `mask` came with `predicate`.
///
/// PTX: `vote.sync.any.pred`.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn warp_vote_any(mask: u32, predicate: bool) -> bool {
    face::vote_any(mask, predicate)
}

/// The lanes of `mask` that came with `predicate`.
///
/// PTX: `vote.sync.ballot.b32`.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn warp_vote_ballot(mask: u32, predicate: bool) -> u32 {
    face::vote_ballot(mask, predicate)
}

/// The lanes of `mask` that came with the same value as this one.
///
/// PTX: `match.any.sync.b32`, `.b64`.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn warp_match_any<T: MatchValue>(mask: u32, value: T) -> u32 {
    T::any(mask, value)
}

/// `mask` and `true` if all lanes of it came with one value, else 0 and `false`.
///
/// PTX: `match.all.sync.b32`, `.b64`.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn warp_match_all<T: MatchValue>(mask: u32, value: T) -> (u32, bool) {
    T::all(mask, value)
}

/// The wrapping sum of the values of the lanes of `mask`.
///
/// PTX: `redux.sync.add.u32`.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn warp_reduce_add(mask: u32, value: u32) -> u32 {
    face::reduce_add(mask, value)
}

/// The least of the values of the lanes of `mask`.
///
/// PTX: `redux.sync.min.u32`.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn warp_reduce_min(mask: u32, value: u32) -> u32 {
    face::reduce_min(mask, value)
}

/// The greatest of the values of the lanes of `mask`.
///
/// PTX: `redux.sync.max.u32`.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn warp_reduce_max(mask: u32, value: u32) -> u32 {
    face::reduce_max(mask, value)
}

/// The bitwise and of the values of the lanes of `mask`.
///
/// PTX: `redux.sync.and.b32`.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn warp_reduce_and(mask: u32, value: u32) -> u32 {
    face::reduce_and(mask, value)
}

/// The bitwise or of the values of the lanes of `mask`.
///
/// PTX: `redux.sync.or.b32`.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn warp_reduce_or(mask: u32, value: u32) -> u32 {
    face::reduce_or(mask, value)
}

/// The bitwise exclusive or of the values of the lanes of `mask`.
///
/// PTX: `redux.sync.xor.b32`.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn warp_reduce_xor(mask: u32, value: u32) -> u32 {
    face::reduce_xor(mask, value)
}

/// The sum of all 32 lanes' values, in every lane: a butterfly of five shuffles, halves first, so every lane has the same bits.
/// Of a sum that is NaN the bits are the machine's own.
///
/// PTX: five `shfl.sync.bfly.b32` and `add.rn.f32`.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn warp_sum(value: f32) -> f32 {
    let mut sum = value;
    let mut distance = WARP_SIZE / 2;
    while distance > 0 {
        sum += warp_shuffle_xor(FULL_MASK, sum, distance, WARP_SIZE);
        distance /= 2;
    }
    sum
}

/// The greatest of all 32 lanes' values, in every lane. A NaN counts as less than anything else.
///
/// PTX: five `shfl.sync.bfly.b32` and `max.f32`.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn warp_max(value: f32) -> f32 {
    let mut greatest = value;
    let mut distance = WARP_SIZE / 2;
    while distance > 0 {
        greatest = max(greatest, warp_shuffle_xor(FULL_MASK, greatest, distance, WARP_SIZE));
        distance /= 2;
    }
    greatest
}

/// The wrapping sum of the values of lanes 0 to this one.
///
/// PTX: five `shfl.sync.up.b32`.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn warp_inclusive_scan_add(value: u32) -> u32 {
    let lane = lane_id();
    let mut sum = value;
    let mut distance = 1;
    while distance < WARP_SIZE {
        let below = warp_shuffle_up(FULL_MASK, sum, distance, WARP_SIZE);
        if lane >= distance {
            sum = sum.wrapping_add(below);
        }
        distance *= 2;
    }
    sum
}

/// The wrapping sum of the values of the lanes below this one.
///
/// PTX: five `shfl.sync.up.b32`.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn warp_exclusive_scan_add(value: u32) -> u32 {
    warp_inclusive_scan_add(value).wrapping_sub(value)
}
