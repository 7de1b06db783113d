//! Random inputs of the kernels, and what must come out. The emulator's tests and the GPU's tests run the same cases.

pub mod chunk_mean;
pub mod emulated;
pub mod gather;

use rand::Rng;

/// What outputs hold before a launch: a pattern that no kernel writes.
pub const POISON: u128 = 0xdead_beef_dead_beef_dead_beef_dead_beef;

/// A page or key id that no list uses: reading through it would leave every buffer.
pub const WILD: u32 = u32::MAX;

/// One of a few sizes, small ones and odd ones included.
fn pick(rng: &mut impl Rng, sizes: &[usize]) -> usize {
    sizes[rng.random_range(0..sizes.len())]
}
