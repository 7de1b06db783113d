//! Cases of `sample`.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinkv_kernels::abi::model::sample::{DRAW_BITS, SampleParams};

use crate::pick;
use crate::top_k::scores;

/// How far a draw may be from a border of a token's share, in shares of all, for its neighbour to be right as well.
const ROUNDING: f64 = 1e-5;

/// A launch of `sample`.
#[derive(Debug)]
pub struct SampleCase {
    /// `[batch, stride]`: beyond the vocabulary the greatest number there is.
    pub logits: Vec<f32>,
    /// `[batch]`.
    pub params: Vec<SampleParams>,
    /// Logits of a row.
    pub vocab: usize,
    /// A multiple of 4.
    pub stride: usize,
}

impl SampleCase {
    /// The case of a seed.
    pub fn random(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let vocab = pick(&mut rng, &[1, 3, 4, 5, 130, 1027, 4096, 5001]);
        Self::sized(&mut rng, vocab)
    }

    /// Rows of Qwen3's vocabulary.
    pub fn large(seed: u64) -> Self {
        Self::sized(&mut ChaCha8Rng::seed_from_u64(seed), 151_936)
    }

    /// Many weights that differ and are drawn from along their order: shows whether sums are exact.
    pub fn even(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let logits = (0..4096).map(|_| rng.random_range(-2.0..2.0)).collect();
        let draw = rng.random::<u64>() >> (64 - DRAW_BITS);
        let params = SampleParams { temperature: 1.0, top_p: 0.98, draw, ..SampleParams::default() };
        Self { logits, params: vec![params], vocab: 4096, stride: 4096 }
    }

    fn sized(rng: &mut impl Rng, vocab: usize) -> Self {
        let (batch, stride) = (rng.random_range(1..3), (vocab + rng.random_range(0..9)).next_multiple_of(4));
        let (mut logits, mut params) = (Vec::new(), Vec::new());
        for _ in 0..batch {
            let any = rng.random::<u64>() >> (64 - DRAW_BITS);
            let spread = pick(rng, &[1.0, 1.0, 4.0, 0.0]);
            let row = scores(rng, vocab).into_iter().map(|score| score * spread);
            logits.extend(row);
            logits.extend(std::iter::repeat_n(f32::MAX, stride - vocab));
            params.push(SampleParams {
                temperature: pick(rng, &[0.0, 0.2, 0.6, 1.0, 1.0, 3.0]),
                top_k: pick(rng, &[0, 0, 1, 2, 20, 300, vocab as u32, u32::MAX]),
                top_p: pick(rng, &[1.0, 1.0, 0.95, 0.5, 0.01]),
                min_p: pick(rng, &[0.0, 0.0, 0.05, 0.3, 1.0]),
                draw: pick(rng, &[0, (1 << DRAW_BITS) - 1, any, any]),
                unused: 0,
            });
        }
        Self { logits, params, vocab, stride }
    }

    /// Rows.
    pub fn batch(&self) -> usize {
        self.params.len()
    }

    /// Whether each id is one that the engine's sampler may draw.
    ///
    /// # Errors
    /// The first row that differs.
    pub fn check(&self, ids: &[u32]) -> Result<(), String> {
        for (row, found) in ids.iter().enumerate() {
            let logits = &self.logits[row * self.stride..][..self.vocab];
            check_row(logits, &self.params[row], *found)
                .map_err(|wrong| format!("row {row}, {:?}: {wrong}", self.params[row]))?;
        }
        Ok(())
    }
}

/// The steps of the engine's sampler, in f64.
fn check_row(logits: &[f32], params: &SampleParams, found: u32) -> Result<(), String> {
    let expect = |expected: u32| {
        if found == expected { Ok(()) } else { Err(format!("id {found} where {expected} was expected")) }
    };
    let finite = (0..).zip(logits).filter(|(_, logit)| logit.is_finite());
    let mut left: Vec<(u32, f32)> = finite.map(|(id, logit)| (id, logit + 0.0)).collect();
    let mut ordered = left.clone();
    ordered.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let Some(&(best_id, best)) = ordered.first() else { return expect(u32::MAX) };
    if params.temperature == 0.0 {
        return expect(best_id);
    }
    let weight = |logit: f32| ((f64::from(logit) - f64::from(best)) / f64::from(params.temperature)).exp();
    let sum = |left: &[(u32, f32)]| left.iter().map(|(_, logit)| weight(*logit)).sum::<f64>();
    let mut doubtful = false;
    if params.top_k != 0 && (params.top_k as usize) < left.len() {
        ordered.truncate(params.top_k as usize);
        left.clone_from(&ordered);
    }
    if params.top_p < 1.0 {
        let total = sum(&ordered);
        let (mut reached, target) = (0.0, f64::from(params.top_p) * total);
        let last = ordered.iter().position(|(_, logit)| {
            reached += weight(*logit);
            doubtful |= (reached - target).abs() < ROUNDING * total;
            reached >= target
        });
        ordered.truncate(last.map_or(ordered.len(), |last| last + 1));
        left = ordered;
    }
    let least = f64::from(params.min_p);
    if least > 0.0 {
        doubtful |= left.iter().any(|(id, logit)| {
            let weight = weight(*logit);
            *id != best_id && *logit != best && (weight - least).abs() < ROUNDING * least
        });
        left.retain(|(_, logit)| weight(*logit) >= least);
    }
    if doubtful {
        // The set itself is in doubt, by one token.
        return if logits[found as usize].is_finite() { Ok(()) } else { Err(format!("id {found}")) };
    }
    let total = sum(&left);
    let point = params.draw as f64 / (1_u64 << DRAW_BITS) as f64 * total;
    let mut start = 0.0;
    for (id, logit) in left {
        let end = start + weight(logit);
        if id == found {
            let near = start - ROUNDING * total <= point && point <= end + ROUNDING * total;
            return if near { Ok(()) } else { Err(format!("id {id} of {start}..{end}, drawn {point}")) };
        }
        start = end;
    }
    Err(format!("id {found} was cut off"))
}
