use cuda_std::prelude::*;

use super::super::operator::{self, Mean};
use super::centroid::f32_words;
use crate::abi::cluster::sums::{BLOCK, PART_TOKENS};

/// Sums of the keys of a run, of [`PART_TOKENS`] tokens each: the mean's, which [`cluster_start`](super::cluster_start()) adds up.
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `keys` | `[first + tokens or more, width]` words | bf16 keys of all KV heads |
/// | `first` | | the run's first token in `keys` |
/// | `tokens` | at least 1 | of the run |
/// | `width` | at least 1 | KV heads x words of a key |
/// | `sums` | `[parts, width, 2]` words of f32 | [`parts`](crate::abi::cluster::sums::parts) |
///
/// Sums are in f32 and in token order.
///
/// # Mapping
/// A thread has a word (8 channels) of all heads' words, and walks a part, 8 tokens in flight; the lanes of a warp read 512 bytes on end.
///
/// # Launch
/// [`grid`](crate::abi::cluster::sums::grid) blocks of [`BLOCK`] threads; no shared memory.
///
/// # Safety
/// The views have the shapes above; nothing writes `keys` until the launch has ended.
#[kernel]
pub unsafe fn cluster_sums(keys: Global<U32x4>, first: u32, tokens: u32, width: u32, sums: GlobalMut<U32x4>) {
    let blocks = width.div_ceil(BLOCK);
    let (part, word) =
        (thread::block_idx_x() / blocks, thread::block_idx_x() % blocks * BLOCK + thread::thread_idx_x());
    if word >= width {
        return;
    }
    let start = part * PART_TOKENS;
    let keys = keys.rows(width as usize);
    let kept = operator::walk::<Mean>(PART_TOKENS.min(tokens - start), |next| {
        keys.row((first + start + next) as usize).load_with(word as usize, LoadCache::ReadOnlyOnce)
    });
    let sums = sums.rows(2 * width as usize).row(part as usize);
    let [low, high] = f32_words(kept.sums);
    sums.store(2 * word as usize, low);
    sums.store(2 * word as usize + 1, high);
}
