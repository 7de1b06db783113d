//! Rotary position embedding of heads' words.

use cuda_std::math::fma;
use cuda_std::{Global, U32x4};

use super::elements::{eight_at, word_of_eight};
use super::sin_cos::sin_cos;

/// By how much eight elements of a half turn.
#[derive(Clone, Copy)]
pub struct Turn {
    sines: [f32; 8],
    cosines: [f32; 8],
}

impl Turn {
    /// The turn at `position` of word `word` of the first half, with what sines and cosines are multiplied by.
    ///
    /// # Safety
    /// There are such frequencies.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    pub unsafe fn new(position: u32, frequencies: Global<U32x4>, word: usize, factor: f32) -> Self {
        let frequencies = eight_at(frequencies, word);
        let (mut sines, mut cosines) = ([0.0; 8], [0.0; 8]);
        let mut at = 0;
        while at < sines.len() {
            let (sine, cosine) = sin_cos(position as f32 * frequencies[at]);
            (sines[at], cosines[at]) = (sine * factor, cosine * factor);
            at += 1;
        }
        Self { sines, cosines }
    }

    /// Turns eight pairs of elements, a half's and the other's.
    #[inline(always)]
    pub fn apply(&self, x: [f32; 8], y: [f32; 8]) -> (U32x4, U32x4) {
        let (mut a, mut b) = ([0.0; 8], [0.0; 8]);
        let mut at = 0;
        while at < a.len() {
            let (sine, cosine) = (self.sines[at], self.cosines[at]);
            a[at] = fma(x[at], cosine, -(y[at] * sine));
            b[at] = fma(y[at], cosine, x[at] * sine);
            at += 1;
        }
        (word_of_eight(a), word_of_eight(b))
    }

    /// Turns eight pairs back.
    #[inline(always)]
    pub fn undo(&self, x: [f32; 8], y: [f32; 8]) -> (U32x4, U32x4) {
        Self { sines: self.sines.map(|sine| -sine), cosines: self.cosines }.apply(x, y)
    }
}
