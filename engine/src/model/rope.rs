use std::f64::consts::TAU;

use spinkv::Rotary;

use crate::config::{Llama3Scaling, RopeConfig, RopeScaling, YarnScaling};

/// Rotary position embedding, half-split: element `i` of a head turns with element `i + head_dim / 2`.
#[derive(Debug)]
pub(crate) struct Rope {
    rotary: Rotary,
}

/// Cosines and sines of a run of positions, times the magnitude, each `[positions, head_dim / 2]`.
#[derive(Debug)]
pub(crate) struct Rotations {
    cosines: Vec<f32>,
    sines: Vec<f32>,
    half: usize,
}

impl Rope {
    pub fn new(config: &RopeConfig, head_dim: usize) -> Self {
        let plain = (0..head_dim / 2).map(|i| config.theta.powf(-2.0 * i as f64 / head_dim as f64));
        let (frequencies, magnitude): (Vec<_>, f64) = match &config.scaling {
            None => (plain.collect(), 1.0),
            Some(RopeScaling::Llama3(scaling)) => (plain.map(|plain| llama3(plain, scaling)).collect(), 1.0),
            Some(RopeScaling::Yarn(scaling)) => {
                let ramp = YarnRamp::new(scaling, config.theta, head_dim);
                let stretched = |(i, plain)| ramp.stretch(i, plain, scaling.factor);
                (plain.enumerate().map(stretched).collect(), scaling.attention_factor)
            }
        };
        let frequencies = frequencies.into_iter().map(|frequency| frequency as f32).collect();
        Self { rotary: Rotary::new(frequencies, magnitude as f32) }
    }

    /// Frequencies and magnitude.
    pub fn rotary(&self) -> &Rotary {
        &self.rotary
    }

    /// The rotations of `positions`.
    pub fn rotations(&self, positions: impl ExactSizeIterator<Item = usize>) -> Rotations {
        let (half, magnitude) = (self.rotary.frequencies().len(), self.rotary.magnitude());
        let mut cosines = Vec::with_capacity(positions.len() * half);
        let mut sines = Vec::with_capacity(positions.len() * half);
        for position in positions {
            for (cosine, sine) in self.rotary.angles(position) {
                cosines.push(cosine * magnitude);
                sines.push(sine * magnitude);
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

/// Between which pairs of dimensions YaRN goes over from plain frequencies to divided ones.
struct YarnRamp {
    low: f64,
    high: f64,
}

impl YarnRamp {
    fn new(scaling: &YarnScaling, theta: f64, head_dim: usize) -> Self {
        let context = scaling.original_max_position_embeddings as f64;
        // The pair, counted in fractions, that turns this often within the original context.
        let pair_of = |turns: f64| head_dim as f64 * (context / (turns * TAU)).ln() / (2.0 * theta.ln());
        let (mut low, mut high) = (pair_of(scaling.beta_fast), pair_of(scaling.beta_slow));
        if scaling.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        // `head_dim - 1`, although the pairs end at half of that: so it was published, and so models use it.
        (low, high) = (low.max(0.0), high.min(head_dim as f64 - 1.0));
        if low == high {
            high += 0.001;
        }
        Self { low, high }
    }

    /// Pair `i`'s frequency.
    fn stretch(&self, i: usize, plain: f64, factor: f64) -> f64 {
        let divided = ((i as f64 - self.low) / (self.high - self.low)).clamp(0.0, 1.0);
        plain / factor * divided + plain * (1.0 - divided)
    }
}

#[cfg(test)]
mod tests;
