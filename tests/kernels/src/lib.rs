//! Random inputs of the kernels, and what must come out. The emulator's tests and the GPU's tests run the same cases.

pub mod attend;
pub mod cluster;
pub mod drift;
pub mod emulated;
pub mod estimate;
pub mod fill_random;
pub mod gate;
pub mod gather;
pub mod index;
pub mod linear;
pub mod low_rank;
pub mod model;
pub mod offload;
pub mod outliers;
pub mod prefill;
pub mod resolve;
pub mod score;
pub mod select;
pub mod top_k;
pub mod write_back;

use rand::Rng;
use spinkv_kernels::abi::Entry;

/// What outputs hold before a launch: a pattern that no kernel writes.
pub const POISON: u128 = 0xdead_beef_dead_beef_dead_beef_dead_beef;

/// A page or key id that no list uses: reading through it would leave every buffer.
pub const WILD: u32 = u32::MAX;

/// One of a few, such as sizes, small ones and odd ones included.
fn pick<T: Copy>(rng: &mut impl Rng, of: &[T]) -> T {
    of[rng.random_range(0..of.len())]
}

/// An entry that only fills the batch: without tokens, and nothing may follow its other numbers.
fn wild_entry() -> Entry {
    Entry { tokens: 0, ..bytemuck::cast([WILD; size_of::<Entry>() / 4]) }
}

/// Entries as the kernels read them.
pub fn entry_words(entries: &[Entry]) -> Vec<u128> {
    bytemuck::pod_collect_to_vec(entries)
}
