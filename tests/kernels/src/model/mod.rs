//! Cases of a model's elementwise kernels. References are plain f64.

mod argmax;
mod emulated;
mod rotate;
mod rows;
mod sample;

pub use argmax::ArgmaxCase;
pub use rotate::{RotateCase, Rotated};
pub use rows::{EmbedCase, RmsNormCase, SwigluCase};
pub use sample::SampleCase;

use half::bf16;
use rand::Rng;

use super::POISON;

/// A number of f32 outputs that no kernel writes.
const POISON_F32: f32 = f32::from_bits(POISON as u32);

/// bf16 numbers of some spread, in their bits.
fn halves(rng: &mut impl Rng, count: usize) -> Vec<u16> {
    (0..count).map(|_| bf16::from_f32(number(rng)).to_bits()).collect()
}

/// f32 numbers of some spread.
fn floats(rng: &mut impl Rng, count: usize) -> Vec<f32> {
    (0..count).map(|_| number(rng)).collect()
}

/// Mostly of about 1, some far from it.
fn number(rng: &mut impl Rng) -> f32 {
    let number = rng.random_range(-2.0..2.0_f32);
    match rng.random_range(0..16) {
        0 => number * 40.0,
        1 => number * 1e-3,
        2 => 0.0,
        _ => number,
    }
}

/// The number that bf16 bits stand for.
fn of_bits(bits: u16) -> f64 {
    bf16::from_bits(bits).to_f64()
}

/// bf16 as kernels and launchers take them.
fn to_words(halves: &[u16]) -> Vec<u128> {
    bytemuck::pod_collect_to_vec(halves)
}

/// Whether a bf16 is `expected`, rounded once, but for the `slack` of arithmetic in f32.
fn compare(place: &str, found: u16, expected: f64, slack: f64) -> Result<(), String> {
    // Half a unit in the last of 8 bits.
    let allowed = expected.abs() / 256.0 + slack;
    if (of_bits(found) - expected).abs() <= allowed {
        return Ok(());
    }
    Err(format!("{place}: {} where {expected} was expected", of_bits(found)))
}

/// Whether nothing was written.
fn untouched(place: &str, halves: &[u16]) -> Result<(), String> {
    let poison = to_halves(&[POISON]);
    if halves.chunks(poison.len()).all(|word| word == poison) {
        return Ok(());
    }
    Err(format!("{place} was written"))
}

/// The bf16 of some words.
fn to_halves(words: &[u128]) -> Vec<u16> {
    bytemuck::cast_slice(words).to_vec()
}
