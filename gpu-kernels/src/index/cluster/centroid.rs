//! A word's eight channels, and what becomes of a centroid.
//!
//! A head's words lie in lanes side by side, so a warp has as many heads at a time as fit; `lanes` is a head's words, a power of two.

use cuda_std::prelude::*;
use cuda_std::warp::{FULL_MASK, WARP_SIZE, warp_shuffle_xor};
use cuda_std::{U32x4, bf16};

/// The channels of a word.
pub type Channels = [f32; 8];

/// Channels of a word of bf16.
#[inline(always)]
pub fn channels(word: U32x4) -> Channels {
    let (a, b) = bf16::unpack(word.x);
    let (c, d) = bf16::unpack(word.y);
    let (e, f) = bf16::unpack(word.z);
    let (g, h) = bf16::unpack(word.w);
    [a, b, c, d, e, f, g, h]
}

/// The word of bf16, rounded to nearest even.
#[inline(always)]
pub fn rounded([a, b, c, d, e, f, g, h]: Channels) -> U32x4 {
    U32x4 { x: bf16::pack(a, b), y: bf16::pack(c, d), z: bf16::pack(e, f), w: bf16::pack(g, h) }
}

/// Channels as two words of f32.
#[inline(always)]
pub fn f32_words(channels: Channels) -> [U32x4; 2] {
    let [a, b, c, d, e, f, g, h] = channels.map(f32::to_bits);
    [U32x4 { x: a, y: b, z: c, w: d }, U32x4 { x: e, y: f, z: g, w: h }]
}

/// Channels of two words of f32.
#[inline(always)]
pub fn of_f32_words(low: U32x4, high: U32x4) -> Channels {
    [low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w].map(f32::from_bits)
}

/// The inner product of heads that lie in `lanes` lanes, in all of those: of a lane's channels in order, then in halves of the distance.
///
/// # Safety
/// All lanes of the warp are here.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn product(left: Channels, right: Channels, lanes: u32) -> f32 {
    let mut sum = 0.0;
    let mut at = 0;
    while at < 8 {
        sum += left[at] * right[at];
        at += 1;
    }
    let mut distance = lanes / 2;
    while distance > 0 {
        sum += warp_shuffle_xor(FULL_MASK, sum, distance, WARP_SIZE);
        distance /= 2;
    }
    sum
}

/// This lane's channels of the mean of a row, `[2 * lanes]` words.
///
/// # Safety
/// `means` has the row.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn mean_of(means: Global<U32x4>, head: u32, lanes: u32) -> Channels {
    let word = 2 * (warp::lane_id() % lanes) as usize;
    let mean = means.rows(2 * lanes as usize).row(head as usize);
    of_f32_words(mean.load(word), mean.load(word + 1))
}

/// Centroids of all rows, and what products of keys with them begin with.
#[derive(Clone, Copy)]
pub struct Centroids {
    /// `[kv_heads, centroids, lanes]` bf16.
    pub words: GlobalMut<U32x4>,
    /// `[kv_heads, centroids]`: less the product with the mean.
    pub biases: GlobalMut<f32>,
    /// Words of a head.
    pub lanes: u32,
}

impl Centroids {
    /// Rounds and stores this lane's word of centroid `place` of all rows, where it is `valid`.
    ///
    /// # Safety
    /// All lanes of the warp are here, those of a head with one place.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    pub unsafe fn store(self, place: u32, centroid: Channels, mean: Channels, valid: bool) {
        let word = rounded(centroid);
        let bias = -product(channels(word), mean, self.lanes);
        if valid {
            let own = warp::lane_id() % self.lanes;
            self.words.rows(self.lanes as usize).row(place as usize).store(own as usize, word);
            if own == 0 {
                self.biases.store(place as usize, bias);
            }
        }
    }
}
