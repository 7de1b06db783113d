//! What the kernels of learned gates share: heads are turned back, projected, normed and turned again.

use cuda_std::math::{fma, rsqrt_approx};
use cuda_std::warp::warp_sum;
use cuda_std::{Global, GlobalMut, Shared, U32x4, shared_layout, thread, view::LoadCache, warp};

use crate::abi::gate::{BLOCK, MAX_INPUTS, MAX_RANK, POOLED, SHARED_BYTES};
use crate::abi::{WARP, WORD_ELEMENTS};
use crate::model::elements::{eight_of, quad_of, word_of_eight};
use crate::model::sin_cos;
use crate::unroll::unrolled;

/// Words of weights that a thread has in flight.
const LOADS: usize = 4;

shared_layout! {
    /// What the threads of a block hand to each other.
    pub(crate) struct Scratch {
        // [token groups, 3, head_dim]
        pooled: [f32; 3072],
        // [inputs / 4]
        inputs: [U32x4; 512],
        // [parts, rank]
        partial: [f32; 256],
        outputs: [f32; 256],
        // [warps]
        sums: [f32; 8],
    }
}

const _: () = assert!(Scratch::BYTES == SHARED_BYTES as usize, "as the host has it");
const _: () =
    assert!(3072 == POOLED && 512 * 4 == MAX_INPUTS && 256 == BLOCK && 256 == MAX_RANK && 8 == BLOCK / WARP);

/// How keys and queries are turned back: by `frequencies`, `[head_dim / 2]` f32, and `shrink`, which is 1 / their magnitude.
#[derive(Clone, Copy)]
pub(crate) struct TurnBack {
    pub frequencies: Global<f32>,
    pub shrink: f32,
}

impl TurnBack {
    /// Elements `pair` and `pair + head_dim / 2` of a head at `position`, as they were before.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    pub unsafe fn pair(self, frequency: f32, position: u32, a: f32, b: f32) -> (f32, f32) {
        let (sine, cosine) = sin_cos(position as f32 * frequency);
        let (sine, cosine) = (sine * self.shrink, cosine * self.shrink);
        (fma(a, cosine, b * sine), fma(b, cosine, -(a * sine)))
    }
}

/// The gate of one row.
#[derive(Clone, Copy)]
pub(crate) struct Gate {
    /// `[input words, rank]` words of bf16: of the eight inputs of a word to one output.
    pub weights: Global<U32x4>,
    pub input_words: u32,
    pub rank: u32,
    /// `[layers, rank]`, if `norms`.
    pub norm: Global<f32>,
    pub layer: u32,
    pub norms: bool,
    pub eps: f32,
    /// `[rank / 2]`.
    pub frequencies: Global<f32>,
    pub magnitude: f32,
}

impl Gate {
    /// Projects the block's [`inputs`](Scratch::inputs), which all its threads have written, and writes the result at `position` to `to`,
    /// `[rank / 8]` words of bf16. All threads are here; the scratch may be written again behind it.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    pub unsafe fn apply(self, position: u32, to: GlobalMut<U32x4>) {
        let thread = thread::thread_idx_x();
        let (inputs, partial, outputs) = (Scratch::inputs(), Scratch::partial(), Scratch::outputs());
        let (sums, parts) = (Scratch::sums(), BLOCK / self.rank);
        let (output, part) = (thread % self.rank, thread / self.rank);
        thread::sync_threads();
        if part < parts {
            partial.store(thread as usize, self.share(inputs, output, part, parts));
        }
        thread::sync_threads();
        let mut value = 0.0;
        if thread < self.rank {
            let mut part = 0;
            while part < parts {
                value += partial.load((part * self.rank + thread) as usize);
                part += 1;
            }
        }
        if self.norms {
            let sum = warp_sum(value * value);
            if warp::lane_id() == 0 {
                sums.store((thread / WARP) as usize, sum);
            }
            thread::sync_threads();
            let (mut all, mut of_warp) = (0.0, 0);
            while of_warp < BLOCK / WARP {
                all += sums.load(of_warp as usize);
                of_warp += 1;
            }
            if thread < self.rank {
                value *= rsqrt_approx(all / self.rank as f32 + self.eps)
                    * self.norm.load((self.layer * self.rank + thread) as usize);
            }
        }
        if thread < self.rank {
            outputs.store(thread as usize, value);
        }
        thread::sync_threads();
        let half = self.rank / 2 / WORD_ELEMENTS as u32;
        if thread < half {
            self.turn(outputs, position, thread, half, to);
        }
    }

    /// The part of an output that every `parts`-th word of the inputs makes, from word `part` on.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    unsafe fn share(self, inputs: Shared<U32x4>, output: u32, part: u32, parts: u32) -> f32 {
        let load = |word: u32| {
            let place = (word * self.rank + output) as usize;
            if word < self.input_words {
                self.weights.load_with(place, LoadCache::ReadOnly)
            } else {
                U32x4::default()
            }
        };
        let (mut sum, mut word) = (0.0, part);
        while word < self.input_words {
            let mut words = [U32x4::default(); LOADS];
            unrolled!(next < LOADS, {
                words[next] = load(word + next as u32 * parts);
            });
            unrolled!(next < LOADS, {
                let at = word + next as u32 * parts;
                if at < self.input_words {
                    sum = product(sum, words[next], inputs, at);
                }
            });
            word += LOADS as u32 * parts;
        }
        sum
    }

    /// Turns eight elements of each half to `position`.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    unsafe fn turn(self, outputs: Shared<f32>, position: u32, word: u32, half: u32, to: GlobalMut<U32x4>) {
        let (mut a, mut b) = ([0.0; WORD_ELEMENTS], [0.0; WORD_ELEMENTS]);
        unrolled!(at < WORD_ELEMENTS, {
            let low = word as usize * WORD_ELEMENTS + at;
            let (x, y) = (outputs.load(low), outputs.load(low + self.rank as usize / 2));
            let (sine, cosine) = sin_cos(position as f32 * self.frequencies.load(low));
            let (sine, cosine) = (sine * self.magnitude, cosine * self.magnitude);
            (a[at], b[at]) = (fma(x, cosine, -(y * sine)), fma(y, cosine, x * sine));
        });
        to.store(word as usize, word_of_eight(a));
        to.store((word + half) as usize, word_of_eight(b));
    }
}

/// `sum` and the products of a word of weights with the inputs of word `at`.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
unsafe fn product(sum: f32, weights: U32x4, inputs: Shared<U32x4>, at: u32) -> f32 {
    let [a, b, c, d, e, f, g, h] = eight_of(weights);
    let [x, y, z, w] = quad_of(inputs.load(2 * at as usize));
    let sum = fma(d, w, fma(c, z, fma(b, y, fma(a, x, sum))));
    let [x, y, z, w] = quad_of(inputs.load(2 * at as usize + 1));
    fma(h, w, fma(g, z, fma(f, y, fma(e, x, sum))))
}
