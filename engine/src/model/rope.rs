use std::f64::consts::TAU;

use crate::config::{Llama3Scaling, RopeConfig};

/// Rotary position embedding, half-split: element `i` of a head turns with element `i + head_dim / 2`.
#[derive(Debug)]
pub(super) struct Rope {
    /// `[head_dim / 2]`.
    frequencies: Vec<f32>,
}

/// Cosines and sines of a run of positions, each `[positions, head_dim / 2]`.
#[derive(Debug)]
pub(super) struct Rotations {
    cosines: Vec<f32>,
    sines: Vec<f32>,
    half: usize,
}

impl Rope {
    pub fn new(config: &RopeConfig, head_dim: usize) -> Self {
        let frequency = |i: usize| {
            let plain = config.theta.powf(-2.0 * i as f64 / head_dim as f64);
            config.scaling.map_or(plain, |scaling| llama3(plain, &scaling)) as f32
        };
        Self { frequencies: (0..head_dim / 2).map(frequency).collect() }
    }

    /// The rotations of `positions`.
    pub fn rotations(&self, positions: impl ExactSizeIterator<Item = usize>) -> Rotations {
        let half = self.frequencies.len();
        let mut cosines = Vec::with_capacity(positions.len() * half);
        let mut sines = Vec::with_capacity(positions.len() * half);
        for position in positions {
            for frequency in &self.frequencies {
                // The angle is rounded to f32 as PyTorch does: at 32K tokens that moves it by up to 0.002, and
                // weights were trained with it.
                let (sine, cosine) = f64::from(position as f32 * frequency).sin_cos();
                cosines.push(cosine as f32);
                sines.push(sine as f32);
            }
        }
        Rotations { cosines, sines, half }
    }
}

impl Rotations {
    /// Turns `heads` heads for each position, from position `first` on: `x` is `[positions, heads, head_dim]`.
    pub fn apply(&self, first: usize, heads: usize, x: &mut [f32]) {
        let half = self.half;
        for (offset, token) in x.chunks_exact_mut(heads * 2 * half).enumerate() {
            let range = (first + offset) * half..(first + offset + 1) * half;
            let (cosines, sines) = (&self.cosines[range.clone()], &self.sines[range]);
            for head in token.chunks_exact_mut(2 * half) {
                let (a, b) = head.split_at_mut(half);
                for (((a, b), cosine), sine) in a.iter_mut().zip(b).zip(cosines).zip(sines) {
                    (*a, *b) = (*a * cosine - *b * sine, *b * cosine + *a * sine);
                }
            }
        }
    }
}

/// The "llama3" stretch: high frequencies stay, low ones are divided by the factor, those between are blended by
/// how often they turn within the original context.
fn llama3(frequency: f64, scaling: &Llama3Scaling) -> f64 {
    let turns = scaling.original_max_position_embeddings as f64 * frequency / TAU;
    let (low, high) = (scaling.low_freq_factor, scaling.high_freq_factor);
    let smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0);
    (1.0 - smooth) * frequency / scaling.factor + smooth * frequency
}
