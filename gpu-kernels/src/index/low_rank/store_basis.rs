use cuda_std::prelude::*;

use crate::abi::low_rank::store_basis::BLOCK;
use crate::model::elements::word_of_eight;

/// Rounds a basis to bf16, in the two layouts that it is read in.
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `vectors` | `[rank, width]` | |
/// | `rank` | a multiple of 8 | |
/// | `width` | a multiple of 8 | KV heads * head dim |
/// | `rows` | `[rank, width / 8]` words | written: the weights of the product that gives keys their coefficients |
/// | `place` | | among the bases |
/// | `bases` | `[bases, width, rank / 8]` words | written at `place`: `[kv_heads, head_dim, rank]`, as [`rebuild_keys_128`](crate::retrieve::rebuild_keys_128()) reads it |
///
/// # Launch
/// [`grid`](crate::abi::low_rank::store_basis::grid) of `rank * width / 8` blocks of [`BLOCK`] threads, each of which has a word of both; no shared
/// memory.
///
/// # Safety
/// The views have the shapes above.
#[kernel]
pub unsafe fn store_basis(
    vectors: Global<f32>,
    rank: u32,
    width: u32,
    rows: GlobalMut<U32x4>,
    place: u32,
    bases: GlobalMut<U32x4>,
) {
    let thread = thread::block_idx_x() * BLOCK + thread::thread_idx_x();
    if thread >= rank * (width / 8) {
        return;
    }
    rows.store(thread as usize, eight(vectors, 8 * thread, 1));
    // Neighbours have neighbouring channels, so that what they read lies on end.
    let (channel, word) = (thread % width, thread / width);
    let bases = bases.rows((width * (rank / 8)) as usize).row(place as usize);
    bases.store((channel * (rank / 8) + word) as usize, eight(vectors, 8 * word * width + channel, width));
}

/// Eight numbers from `first` on, `apart` from each other, rounded.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
unsafe fn eight(numbers: Global<f32>, first: u32, apart: u32) -> U32x4 {
    let mut elements = [0.0; 8];
    let mut at = 0;
    while at < 8 {
        elements[at] = numbers.load((first + at as u32 * apart) as usize);
        at += 1;
    }
    word_of_eight(elements)
}
