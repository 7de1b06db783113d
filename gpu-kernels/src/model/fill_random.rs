use cuda_std::bf16;
use cuda_std::prelude::*;

use crate::abi::fill_random::CENTRE;

/// Fills a buffer with bf16 numbers of a nearly normal distribution around 0: each the sum of four uniform ones, so none is beyond 3.47
/// standard deviations. The numbers depend on the seed and their place alone, not on the launch.
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `out` | `[words]`, 8 numbers each | |
/// | `words` | | |
/// | `seed_low`, `seed_high` | | the halves of a 64-bit seed; sequences of different seeds have nothing to do with each other |
/// | `scale` | | [`scale`](crate::abi::fill_random::scale) of the standard deviation |
///
/// # Mapping
/// A thread has a word at a time, and on by the launch's threads. A word's bits are four blocks of Philox (Salmon et al., "Parallel
/// Random Numbers: As Easy as 1, 2, 3", 2011), 4x32 with 10 rounds, whose key is the seed and whose counter is the word's
/// place and the block's number.
///
/// # Launch
/// 1 to [`MAX_BLOCKS`](crate::abi::fill_random::MAX_BLOCKS) blocks of [`BLOCK`](crate::abi::fill_random::BLOCK) threads; no
/// shared memory.
///
/// # Safety
/// The view has `words` words.
#[kernel]
pub unsafe fn fill_random(out: GlobalMut<U32x4>, words: u32, seed_low: u32, seed_high: u32, scale: f32) {
    let stride = thread::grid_dim_x() * thread::block_dim_x();
    let mut word = thread::block_idx_x() * thread::block_dim_x() + thread::thread_idx_x();
    while word < words {
        let key = [seed_low, seed_high];
        let value = U32x4 {
            x: pair(philox([word, 0, 0, 0], key), scale),
            y: pair(philox([word, 1, 0, 0], key), scale),
            z: pair(philox([word, 2, 0, 0], key), scale),
            w: pair(philox([word, 3, 0, 0], key), scale),
        };
        out.store(word as usize, value);
        // Saturates instead of wrapping: a buffer may be nearly 2^32 words long.
        word = word.saturating_add(stride);
    }
}

/// Two numbers of one block's 128 bits.
#[inline(always)]
fn pair(bits: [u32; 4], scale: f32) -> u32 {
    bf16::pack(number(bits[0], bits[1], scale), number(bits[2], bits[3], scale))
}

/// The centred sum of the four halves.
#[inline(always)]
fn number(a: u32, b: u32, scale: f32) -> f32 {
    let sum = (a & 0xffff) + (a >> 16) + (b & 0xffff) + (b >> 16);
    (sum as i32 - CENTRE) as f32 * scale
}

/// Philox4x32-10.
#[inline(always)]
fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let ([mut c0, mut c1, mut c2, mut c3], [mut k0, mut k1]) = (counter, key);
    let mut round = 0;
    while round < 10 {
        let (product0, product1) = (0xd251_1f53 * u64::from(c0), 0xcd9e_8d57 * u64::from(c2));
        let (high0, low0) = ((product0 >> 32) as u32, product0 as u32);
        let (high1, low1) = ((product1 >> 32) as u32, product1 as u32);
        (c0, c1, c2, c3) = (high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0);
        k0 = k0.wrapping_add(0x9e37_79b9);
        k1 = k1.wrapping_add(0xbb67_ae85);
        round += 1;
    }
    [c0, c1, c2, c3]
}
