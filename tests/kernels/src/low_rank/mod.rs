//! Cases of the kernels that find keys in low rank and rebuild them.

mod basis;
mod complete;
mod emulate;
mod matrices;
mod project;
mod rebuild;
mod unrotate;

pub use basis::{Basis, BasisCase};
pub use complete::CompleteCase;
pub use matrices::{FactorCase, GramCase, ProductCase};
pub use project::{ProjectCase, Projected};
pub use rebuild::RebuildCase;
pub use unrotate::UnrotateCase;

use half::bf16;
use rand::Rng;
use spinkv_kernels::abi::WORD_ELEMENTS;

/// About normal.
fn normal(rng: &mut impl Rng) -> f32 {
    (0..4).map(|_| rng.random_range(-0.87..0.87_f32)).sum()
}

/// Small and whole: sums are exact in any order.
fn whole(rng: &mut impl Rng) -> f32 {
    rng.random_range(-3..=3_i8).into()
}

/// Numbers in bf16, eight a word.
fn words_of(numbers: &[f32]) -> Vec<u128> {
    let word = |eight: &[f32]| {
        let elements: [bf16; WORD_ELEMENTS] = std::array::from_fn(|at| bf16::from_f32(eight[at]));
        bytemuck::cast(elements)
    };
    numbers.chunks_exact(WORD_ELEMENTS).map(word).collect()
}

/// The numbers of words.
fn numbers_of(words: &[u128]) -> Vec<f32> {
    let elements: Vec<bf16> = bytemuck::pod_collect_to_vec(words);
    elements.into_iter().map(bf16::to_f32).collect()
}

/// A theta and its frequencies for heads of `head_dim`.
fn frequencies(rng: &mut impl Rng, head_dim: usize) -> Vec<f32> {
    let theta = crate::pick(rng, &[1e4, 5e5, 1e6_f64]);
    (0..head_dim / 2).map(|at| theta.powf(-2.0 * at as f64 / head_dim as f64) as f32).collect()
}

/// A head turned to `position`, or back if `back`, in f64, the angle rounded to f32 as kernels do.
fn turned(head: &[f64], position: u32, back: bool, frequencies: &[f32], factor: f64) -> Vec<f64> {
    let half = head.len() / 2;
    let mut turned = vec![0.0; head.len()];
    for (at, frequency) in frequencies.iter().enumerate() {
        let (sine, cosine) = f64::from(position as f32 * frequency).sin_cos();
        let (sine, cosine) = (if back { -sine } else { sine } * factor, cosine * factor);
        turned[at] = head[at] * cosine - head[at + half] * sine;
        turned[at + half] = head[at + half] * cosine + head[at] * sine;
    }
    turned
}

/// Whether a head in bf16 is that of f64, rounded once.
fn check_head(what: &str, found: &[f32], right: &[f64]) -> Result<(), String> {
    let norm = right.iter().map(|element| element * element).sum::<f64>().sqrt();
    for (at, (found, right)) in found.iter().zip(right).enumerate() {
        let off = (f64::from(*found) - right).abs();
        // Half a last place of bf16, and what f32 has rounded before.
        if off.is_nan() || off > right.abs() / 255.0 + 1e-5 * norm {
            return Err(format!("{what}, element {at}: {found} for {right}"));
        }
    }
    Ok(())
}
