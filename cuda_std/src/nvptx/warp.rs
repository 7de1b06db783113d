use core::arch::asm;

use crate::warp::ShuffleMode;

unsafe extern "C" {
    fn __cuda_std_activemask() -> u32;
    fn __cuda_std_sync_warp(mask: u32);
    fn __cuda_std_shuffle_idx(mask: u32, value: u32, lane: u32, control: u32) -> u32;
    fn __cuda_std_shuffle_xor(mask: u32, value: u32, lane: u32, control: u32) -> u32;
    fn __cuda_std_shuffle_up(mask: u32, value: u32, lane: u32, control: u32) -> u32;
    fn __cuda_std_shuffle_down(mask: u32, value: u32, lane: u32, control: u32) -> u32;
    fn __cuda_std_vote_all(mask: u32, predicate: u32) -> u32;
    fn __cuda_std_vote_any(mask: u32, predicate: u32) -> u32;
    fn __cuda_std_vote_ballot(mask: u32, predicate: u32) -> u32;
    fn __cuda_std_match_any_u32(mask: u32, value: u32) -> u32;
    fn __cuda_std_match_all_u32(mask: u32, value: u32) -> u32;
    fn __cuda_std_match_any_u64(mask: u32, value: u64) -> u32;
    fn __cuda_std_match_all_u64(mask: u32, value: u64) -> u32;
    fn __cuda_std_reduce_add(mask: u32, value: u32) -> u32;
    fn __cuda_std_reduce_min(mask: u32, value: u32) -> u32;
    fn __cuda_std_reduce_max(mask: u32, value: u32) -> u32;
    fn __cuda_std_reduce_and(mask: u32, value: u32) -> u32;
    fn __cuda_std_reduce_or(mask: u32, value: u32) -> u32;
    fn __cuda_std_reduce_xor(mask: u32, value: u32) -> u32;
}

#[inline(always)]
pub fn lane_id() -> u32 {
    let lane;
    // SAFETY: reads a special register.
    unsafe { asm!("mov.u32 {}, %laneid;", out(reg32) lane, options(pure, nomem, nostack, preserves_flags)) }
    lane
}

#[inline(always)]
pub fn activemask() -> u32 {
    // SAFETY: reads which lanes are here.
    unsafe { __cuda_std_activemask() }
}

#[inline(always)]
pub unsafe fn sync_warp(mask: u32) {
    __cuda_std_sync_warp(mask);
}

#[inline(always)]
pub unsafe fn shuffle(mode: ShuffleMode, mask: u32, value: u32, lane: u32, control: u32) -> u32 {
    match mode {
        ShuffleMode::Idx => __cuda_std_shuffle_idx(mask, value, lane, control),
        ShuffleMode::Xor => __cuda_std_shuffle_xor(mask, value, lane, control),
        ShuffleMode::Up => __cuda_std_shuffle_up(mask, value, lane, control),
        ShuffleMode::Down => __cuda_std_shuffle_down(mask, value, lane, control),
    }
}

#[inline(always)]
pub unsafe fn vote_all(mask: u32, predicate: bool) -> bool {
    __cuda_std_vote_all(mask, u32::from(predicate)) != 0
}

#[inline(always)]
pub unsafe fn vote_any(mask: u32, predicate: bool) -> bool {
    __cuda_std_vote_any(mask, u32::from(predicate)) != 0
}

#[inline(always)]
pub unsafe fn vote_ballot(mask: u32, predicate: bool) -> u32 {
    __cuda_std_vote_ballot(mask, u32::from(predicate))
}

macro_rules! matching {
    ($($any:ident, $all:ident, $ty:ty: $intrinsic_any:ident, $intrinsic_all:ident;)*) => { $(
        #[inline(always)]
        pub unsafe fn $any(mask: u32, value: $ty) -> u32 {
            $intrinsic_any(mask, value)
        }

        // The calling lane is in the mask, so the lanes found are none exactly when they do not agree.
        #[inline(always)]
        pub unsafe fn $all(mask: u32, value: $ty) -> (u32, bool) {
            let lanes = $intrinsic_all(mask, value);
            (lanes, lanes != 0)
        }
    )* };
}
matching! {
    match_any_u32, match_all_u32, u32: __cuda_std_match_any_u32, __cuda_std_match_all_u32;
    match_any_u64, match_all_u64, u64: __cuda_std_match_any_u64, __cuda_std_match_all_u64;
}

macro_rules! reduce {
    ($($name:ident = $intrinsic:ident;)*) => { $(
        #[inline(always)]
        pub unsafe fn $name(mask: u32, value: u32) -> u32 {
            $intrinsic(mask, value)
        }
    )* };
}
reduce! {
    reduce_add = __cuda_std_reduce_add;
    reduce_min = __cuda_std_reduce_min;
    reduce_max = __cuda_std_reduce_max;
    reduce_and = __cuda_std_reduce_and;
    reduce_or = __cuda_std_reduce_or;
    reduce_xor = __cuda_std_reduce_xor;
}
