//! bf16: the upper half of an `f32`, two to a word.
//!
//! The `half` crate converts in software on the device, so kernels use these.

use crate::face;

/// Rounds two numbers to nearest even and packs them, `low` in the lower half. NaN becomes 0x7fff.
///
/// PTX: `cvt.rn.bf16x2.f32`.
#[inline(always)]
pub fn pack(low: f32, high: f32) -> u32 {
    face::pack_bf16(low, high)
}

/// The two numbers of a word, exactly: lower half, upper half.
///
/// PTX: `shl.b32`, `and.b32`.
#[inline(always)]
pub fn unpack(pair: u32) -> (f32, f32) {
    (f32::from_bits(pair << 16), f32::from_bits(pair & 0xffff_0000))
}

/// Rounds a number to nearest even. NaN becomes 0x7fff.
///
/// PTX: `cvt.rn.bf16.f32`.
#[inline(always)]
pub fn from_f32(value: f32) -> u16 {
    face::from_f32_bf16(value)
}

/// The number, exactly.
///
/// PTX: `shl.b32`.
#[inline(always)]
pub fn to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}
