//! Arithmetic of a softmax.

use core::f32::consts::{LN_2, LOG2_E, SQRT_2};

use cuda_std::math::exp2_approx;

/// e to the power of `x`: the exponential unit's, within a few units in the last place for `x` near 0.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    exp2_approx(x * LOG2_E)
}

/// What to subtract before an exponential whose greatest argument is `greatest`. Where that is negative infinity nothing is, so that
/// the sum becomes 0 and not NaN.
#[inline(always)]
pub fn shift_of(greatest: f32) -> f32 {
    if greatest == f32::NEG_INFINITY { 0.0 } else { greatest }
}

/// The least whole number that is not below `x`. Numbers beyond 2^22, infinities and NaN stay what they are.
#[inline(always)]
pub fn ceil(x: f32) -> f32 {
    // Between 2^23 and 2^24 there are whole numbers only; this is in their middle.
    const WHOLE: f32 = 12_582_912.0;
    if x.abs() >= 4_194_304.0 {
        return x;
    }
    let near = x + WHOLE - WHOLE;
    if near < x { near + 1.0 } else { near }
}

/// The natural logarithm of a normal number, infinity or NaN, within 2 units in the last place; of anything smaller negative infinity.
#[inline(always)]
pub fn ln(x: f32) -> f32 {
    if x < f32::MIN_POSITIVE {
        return f32::NEG_INFINITY;
    }
    if !x.is_finite() {
        return x;
    }
    // x = mantissa * 2^exponent, the mantissa in [1/sqrt 2, sqrt 2).
    let above = f32::from_bits(x.to_bits() & 0x007f_ffff | 1.0_f32.to_bits());
    let halved = above >= SQRT_2;
    let mantissa = if halved { 0.5 * above } else { above };
    let exponent = (x.to_bits() >> 23) as i32 - 127 + i32::from(halved);
    // ln m = 2 artanh((m - 1) / (m + 1)), whose argument is below 0.172.
    let f = (mantissa - 1.0) / (mantissa + 1.0);
    let square = f * f;
    let series = 1.0 + square * (1.0 / 3.0 + square * (0.2 + square * (1.0 / 7.0 + square * (1.0 / 9.0))));
    exponent as f32 * LN_2 + 2.0 * f * series
}
