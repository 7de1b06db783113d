//! Sines and cosines for rotary embeddings.
//!
//! The special function unit's are exact only near 0. These take fused arithmetic alone, so emulator and device give the same bits.

use core::f32::consts::FRAC_2_PI;

use cuda_std::math::fma;

/// pi / 2 as a sum, the greater part first. What it leaves out is below 2e-15, of 2^20 quadrants 2e-9.
const FRAC_PI_2: [f32; 2] = [core::f32::consts::FRAC_PI_2, -4.371_139e-8];

/// The sine and the cosine of an angle of 0 to 2^20, each within 2e-7.
///
/// Cody and Waite's reduction: with n the nearest number of quadrants, `angle - n * FRAC_PI_2[0]` is exact when rounded once, since it is a
/// multiple of the angle's last place (or of the constant's) and below 1; n itself is off by at most a tenth, which the polynomials
/// have room for.
#[inline(always)]
pub fn sin_cos(angle: f32) -> (f32, f32) {
    // Of numbers from 2^23 to 2^24 the last place is 1, so that the sum is rounded to a whole number, whose low bits are its own.
    const WHOLE: f32 = 12_582_912.0;
    let shifted = fma(angle, FRAC_2_PI, WHOLE);
    let quadrants = shifted - WHOLE;
    let x = fma(-quadrants, FRAC_PI_2[0], angle);
    let x = fma(-quadrants, FRAC_PI_2[1], x);

    // Taylor's, to x^9 and x^10: beyond lies less than 2e-8 for x below 0.95.
    let square = x * x;
    let series = fma(square, 1.0 / 362_880.0, -1.0 / 5_040.0);
    let series = fma(square, fma(square, series, 1.0 / 120.0), -1.0 / 6.0);
    let sine = fma(x * square, series, x);
    let series = fma(square, -1.0 / 3_628_800.0, 1.0 / 40_320.0);
    let series = fma(square, fma(square, series, -1.0 / 720.0), 1.0 / 24.0);
    let cosine = fma(square, fma(square, series, -0.5), 1.0);

    let quadrant = shifted.to_bits();
    let (sine, cosine) = if quadrant & 1 == 0 { (sine, cosine) } else { (cosine, sine) };
    // The sine is negative in quadrants 2 and 3, the cosine in 1 and 2: flips the sign bit.
    let sine = sine.to_bits() ^ (quadrant & 2) << 30;
    let cosine = cosine.to_bits() ^ ((quadrant + 1) & 2) << 30;
    (f32::from_bits(sine), f32::from_bits(cosine))
}
