//! From logits to the next token.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::error::{Error, Result};

/// How the next token is drawn. The parts apply in this order:
///
/// 1. **temperature** divides the logits; 0 takes the most likely token and ignores all that follows;
/// 2. **top-k** keeps the `k` most likely tokens;
/// 3. **top-p** keeps the smallest set of the most likely tokens whose share of what top-k left reaches `p`;
/// 4. **min-p** keeps the tokens at least `min_p` times as likely as the most likely one;
/// 5. one token is drawn from what is left, by its share.
///
/// Where tokens are equally likely, lower ids count as more likely. So `top_k: Some(1)` equals temperature 0.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// Divisor of the logits; 0 is greedy. At least 0.
    pub temperature: f32,
    /// Most tokens to draw from; `None` is no limit. At least 1.
    pub top_k: Option<usize>,
    /// Share of the probability to draw from; 1 is all of it. Greater than 0, at most 1.
    pub top_p: f32,
    /// Least probability to draw from, relative to the most likely token; 0 is no limit. 0 to 1.
    pub min_p: f32,
    /// Start of the random numbers. One seed gives the same numbers on every platform.
    pub seed: u64,
}

impl Default for SamplingParams {
    /// The model's own distribution: temperature 1, nothing cut off, seed 0.
    fn default() -> Self {
        Self { temperature: 1.0, top_k: None, top_p: 1.0, min_p: 0.0, seed: 0 }
    }
}

impl SamplingParams {
    /// Always the most likely token.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Checks each field's range.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidSampling`] for the first field out of its range.
    pub fn validate(&self) -> Result<()> {
        let check = |holds: bool, name, value: f64, allowed| {
            if holds { Ok(()) } else { Err(Error::InvalidSampling { name, value, allowed }) }
        };
        let Self { temperature, top_k, top_p, min_p, seed: _ } = *self;
        check(
            temperature.is_finite() && temperature >= 0.0,
            "temperature",
            temperature.into(),
            "finite numbers from 0",
        )?;
        check(top_k != Some(0), "top_k", 0.0, "1 or more, or none for no limit")?;
        check(top_p > 0.0 && top_p <= 1.0, "top_p", top_p.into(), "greater than 0, at most 1")?;
        check((0.0..=1.0).contains(&min_p), "min_p", min_p.into(), "0 to 1")
    }
}

/// Draws tokens for one request.
///
/// Each draw takes one random number, however many tokens were left to choose from; a greedy one takes none.
#[derive(Clone, Debug)]
pub struct Sampler {
    params: SamplingParams,
    rng: ChaCha8Rng,
    /// Kept between calls for its memory.
    candidates: Vec<Candidate>,
}

#[derive(Clone, Copy, Debug)]
struct Candidate {
    id: u32,
    logit: f32,
    /// Probability relative to the most likely token's.
    weight: f64,
}

impl Candidate {
    /// Likeliest first, then by id. Compares logits, since distant ones share the weight 0.
    fn order(&self, other: &Self) -> std::cmp::Ordering {
        other.logit.total_cmp(&self.logit).then(self.id.cmp(&other.id))
    }
}

impl Sampler {
    /// A sampler at the start of its random numbers.
    ///
    /// # Errors
    ///
    /// As [`SamplingParams::validate`].
    pub fn new(params: SamplingParams) -> Result<Self> {
        params.validate()?;
        let rng = ChaCha8Rng::seed_from_u64(params.seed);
        Ok(Self { params, rng, candidates: Vec::new() })
    }

    /// The next token's id, from one logit per id. Ids whose logit is NaN or infinite are never chosen; so
    /// negative infinity masks a token.
    ///
    /// # Errors
    ///
    /// [`Error::NoFiniteLogit`] if no id can be chosen.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32> {
        let (best_id, best) = argmax(logits).ok_or(Error::NoFiniteLogit { len: logits.len() })?;
        if self.params.temperature == 0.0 {
            return Ok(best_id);
        }
        self.candidates.clear();
        // Adding zero makes -0 equal to 0 for `Candidate::order`.
        self.candidates.extend(
            (0..).zip(logits).filter(|(_, logit)| logit.is_finite()).map(|(id, &logit)| Candidate {
                id,
                logit: logit + 0.0,
                weight: 0.0,
            }),
        );
        if let Some(k) = self.params.top_k {
            self.keep_top_k(k);
        }
        // After top-k, since temperature keeps the order and exponentials of a whole vocabulary are slow.
        self.weigh(best);
        if self.params.top_p < 1.0 {
            self.keep_top_p(self.params.top_p.into());
        }
        if self.params.min_p > 0.0 {
            let least = f64::from(self.params.min_p);
            self.candidates.retain(|candidate| candidate.weight >= least);
        }
        Ok(self.draw())
    }

    /// How the next token is drawn, for a kernel that draws it as [`sample`](Self::sample) does: it takes the same random number.
    #[cfg(all(feature = "cuda", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
    pub fn next_draw(&mut self) -> spinkv_kernels::abi::model::sample::SampleParams {
        let SamplingParams { temperature, top_k, top_p, min_p, seed: _ } = self.params;
        let top_k = top_k.map_or(0, |k| u32::try_from(k).unwrap_or(u32::MAX));
        let draw = if temperature == 0.0 { 0 } else { self.rng.next_u64() >> 11 };
        spinkv_kernels::abi::model::sample::SampleParams { temperature, top_k, top_p, min_p, draw, unused: 0 }
    }

    /// Weighs in f64, so that a large vocabulary's tail adds up. The best one weighs 1, whatever the
    /// temperature.
    fn weigh(&mut self, best: f32) {
        let (best, temperature) = (f64::from(best), f64::from(self.params.temperature));
        for candidate in &mut self.candidates {
            candidate.weight = ((f64::from(candidate.logit) - best) / temperature).exp();
        }
    }

    fn keep_top_k(&mut self, k: usize) {
        if k < self.candidates.len() {
            self.candidates.select_nth_unstable_by(k - 1, Candidate::order);
            self.candidates.truncate(k);
            // The selection leaves an order of its own, which must not leak into the draw.
            self.candidates.sort_unstable_by(Candidate::order);
        }
    }

    fn keep_top_p(&mut self, p: f64) {
        let total: f64 = self.candidates.iter().map(|candidate| candidate.weight).sum();
        // Sorting a whole vocabulary is slow. All tokens below this bound together weigh less than the share
        // that may be cut off, so the kept set lies above it.
        let bound = (1.0 - p) * total / self.candidates.len() as f64;
        self.candidates.retain(|candidate| candidate.weight >= bound);
        self.candidates.sort_unstable_by(Candidate::order);
        let mut sum = 0.0;
        let reached = self.candidates.iter().position(|candidate| {
            sum += candidate.weight;
            sum >= p * total
        });
        if let Some(last) = reached {
            self.candidates.truncate(last + 1);
        }
    }

    fn draw(&mut self) -> u32 {
        let total: f64 = self.candidates.iter().map(|candidate| candidate.weight).sum();
        // 53 random bits in [0, 1). Spelt out, since `rand` may change its distributions between versions.
        let unit = (self.rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let mut rest = unit * total;
        let mut chosen = 0;
        for candidate in self.candidates.iter().filter(|candidate| candidate.weight > 0.0) {
            chosen = candidate.id;
            if rest < candidate.weight {
                break;
            }
            rest -= candidate.weight;
        }
        // Rounding can use up the loop; the last candidate is then the nearest.
        chosen
    }
}

/// The largest finite logit and its lowest id.
fn argmax(logits: &[f32]) -> Option<(u32, f32)> {
    let mut best: Option<(u32, f32)> = None;
    for (id, &logit) in (0..).zip(logits) {
        if logit.is_finite() && best.is_none_or(|(_, most)| logit > most) {
            best = Some((id, logit));
        }
    }
    best
}

#[cfg(test)]
mod tests;
