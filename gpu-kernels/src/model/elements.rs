//! Words and their elements.

use cuda_std::view::LoadCache;
use cuda_std::{Global, U32x4, bf16};

/// The four numbers of a word of f32.
#[inline(always)]
pub fn quad_of(word: U32x4) -> [f32; 4] {
    [f32::from_bits(word.x), f32::from_bits(word.y), f32::from_bits(word.z), f32::from_bits(word.w)]
}

/// A word of f32.
#[inline(always)]
pub fn word_of_quad([x, y, z, w]: [f32; 4]) -> U32x4 {
    U32x4 { x: x.to_bits(), y: y.to_bits(), z: z.to_bits(), w: w.to_bits() }
}

/// The four numbers of half a word of bf16.
#[inline(always)]
pub fn quad_of_half(half: u64) -> [f32; 4] {
    let ((x, y), (z, w)) = (bf16::unpack(half as u32), bf16::unpack((half >> 32) as u32));
    [x, y, z, w]
}

/// Half a word of bf16, rounded.
#[inline(always)]
pub fn half_of_quad([x, y, z, w]: [f32; 4]) -> u64 {
    u64::from(bf16::pack(z, w)) << 32 | u64::from(bf16::pack(x, y))
}

/// The eight numbers of a word of bf16.
#[inline(always)]
pub fn eight_of(word: U32x4) -> [f32; 8] {
    let ((a, b), (c, d)) = (bf16::unpack(word.x), bf16::unpack(word.y));
    let ((e, f), (g, h)) = (bf16::unpack(word.z), bf16::unpack(word.w));
    [a, b, c, d, e, f, g, h]
}

/// A word of bf16, rounded.
#[inline(always)]
pub fn word_of_eight([a, b, c, d, e, f, g, h]: [f32; 8]) -> U32x4 {
    U32x4 { x: bf16::pack(a, b), y: bf16::pack(c, d), z: bf16::pack(e, f), w: bf16::pack(g, h) }
}

/// Eight numbers of f32, which are two words.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn eight_at(numbers: Global<U32x4>, at: usize) -> [f32; 8] {
    let [a, b, c, d] = quad_of(numbers.load_with(2 * at, LoadCache::ReadOnly));
    let [e, f, g, h] = quad_of(numbers.load_with(2 * at + 1, LoadCache::ReadOnly));
    [a, b, c, d, e, f, g, h]
}
