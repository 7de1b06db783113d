//! Arithmetic that Rust's operators don't give: fused, or approximate and fast.
//!
//! rustc never fuses `a * b + c`, so [`fma`] is written where it is meant. The approximate functions are the
//! special function unit's; the emulator computes with that unit's tables, which were recovered from an H200.

use crate::face;

/// `a * b + c`, rounded once. A NaN result is the GPU's (0x7fffffff) unless the compiler computes it.
///
/// PTX: `fma.rn.f32`.
#[inline(always)]
pub fn fma(a: f32, b: f32, c: f32) -> f32 {
    face::fma(a, b, c)
}

/// The greater: a number where the other is NaN, +0 of the two zeroes. `f32::max` leaves both open.
///
/// PTX: `max.f32`.
#[inline(always)]
pub fn max(a: f32, b: f32) -> f32 {
    face::max(a, b)
}

/// The lesser: a number where the other is NaN, -0 of the two zeroes. `f32::min` leaves both open.
///
/// PTX: `min.f32`.
#[inline(always)]
pub fn min(a: f32, b: f32) -> f32 {
    face::min(a, b)
}

/// 2 to the power of `x`, within 2 units in the last place; subnormals count as 0.
///
/// PTX: `ex2.approx.ftz.f32`.
#[inline(always)]
pub fn exp2_approx(x: f32) -> f32 {
    face::exp2_approx(x)
}

/// 1 / `x`, within 1 unit in the last place; subnormals count as 0.
///
/// PTX: `rcp.approx.ftz.f32`.
#[inline(always)]
pub fn reciprocal_approx(x: f32) -> f32 {
    face::reciprocal_approx(x)
}

/// 1 / sqrt(`x`), within 2 units in the last place; subnormals count as 0.
///
/// PTX: `rsqrt.approx.ftz.f32`.
#[inline(always)]
pub fn rsqrt_approx(x: f32) -> f32 {
    face::rsqrt_approx(x)
}
