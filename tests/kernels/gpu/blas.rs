//! Products of cuBLASLt against f64, where the machine has it.

use half::bf16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinkv::backend::cuda::blas::{BlasError, BlasLt, Product, ProductOut};
use spinkv::backend::cuda::driver::{DeviceBuffer, Graph};
use spinkv::memory::Word;

use super::{Machine, Outcome, Test, test};

pub fn tests() -> Vec<Test> {
    vec![test("blas::random_shapes", random_shapes), test("blas::captured", captured)]
}

/// Random operands, with tokens around the product that are no part of it.
struct Case {
    tokens: usize,
    n: usize,
    k: usize,
    x_first_token: usize,
    out_first_token: usize,
    x: Vec<bf16>,
    weights: Vec<bf16>,
    /// `[out_first_token + tokens + 1, n]`; small whole numbers, exact in bf16.
    old: Vec<f32>,
}

impl Case {
    fn random(seed: u64) -> Self {
        let rng = &mut ChaCha8Rng::seed_from_u64(seed);
        let tokens = [1, 2, 3, 5, 7, 13, 31, 33, 64, 65, 127, 130][rng.random_range(0..12)];
        let (n, k) = (8 * rng.random_range(1..64), 8 * rng.random_range(1..128));
        let (x_first_token, out_first_token) = (rng.random_range(0..3), rng.random_range(0..3));
        let mut numbers =
            |len: usize| (0..len).map(|_| bf16::from_f32(rng.random_range(-1.0..1.0))).collect::<Vec<_>>();
        let (x, weights) = (numbers((x_first_token + tokens + 1) * k), numbers(n * k));
        let old = (0..(out_first_token + tokens + 1) * n).map(|_| rng.random_range(-8..8) as f32).collect();
        Self { tokens, n, k, x_first_token, out_first_token, x, weights, old }
    }

    /// The product's output `[tokens, n]`, and the sum of its terms' magnitudes, which bounds what rounding may do.
    fn reference(&self) -> Vec<(f64, f64)> {
        let x = &self.x[self.x_first_token * self.k..][..self.tokens * self.k];
        let dot = |x: &[bf16], row: &[bf16]| {
            let terms = x.iter().zip(row).map(|(x, weight)| x.to_f64() * weight.to_f64());
            terms.fold((0.0, 0.0), |(sum, size): (f64, f64), term| (sum + term, size + term.abs()))
        };
        let rows = x.chunks(self.k).flat_map(|x| self.weights.chunks(self.k).map(move |row| dot(x, row)));
        rows.collect()
    }

    /// Compares all of the output's buffer; `base` is what the product was added to, `rounding` the output's relative one.
    fn check(&self, what: &str, out: &[f32], adds: bool, rounding: f64) -> Outcome {
        let product = self.out_first_token * self.n..(self.out_first_token + self.tokens) * self.n;
        let reference = self.reference();
        for (at, (&found, &old)) in out.iter().zip(&self.old).enumerate() {
            let (expected, tolerance) = if product.contains(&at) {
                let (sum, size) = reference[at - product.start];
                let expected = if adds { sum + f64::from(old) } else { sum };
                // Terms in f32, in any order, of at most 1024.
                (expected, size * 1024.0 * f64::from(f32::EPSILON) / 2.0 + expected.abs() * rounding)
            } else {
                (f64::from(old), 0.0)
            };
            if found.is_nan() || (f64::from(found) - expected).abs() > tolerance {
                let (token, output) = (at / self.n, at % self.n);
                let Self { tokens, n, k, .. } = self;
                return Err(format!(
                    "{what} [{tokens}, {n}, k {k}]: token {token}, output {output} is {found}, not {expected} by {tolerance}"
                )
                .into());
            }
        }
        Ok(())
    }
}

/// cuBLASLt, or `None` where it is not installed, which is said.
fn load(machine: &Machine, test: &str) -> Result<Option<BlasLt>, BlasError> {
    match BlasLt::load(&machine.context) {
        Ok(blas) => {
            println!("{} version {}", blas.path().display(), blas.version());
            Ok(Some(blas))
        }
        Err(missing @ BlasError::Missing { .. }) => {
            println!("SKIPPED: {test}, since there is {missing}");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn random_shapes(machine: &Machine) -> Outcome {
    let Some(blas) = load(machine, "blas::random_shapes")? else { return Ok(()) };
    machine.on_seeds(|seed| {
        let (stream, case) = (&machine.stream, Case::random(seed));
        let words = |elements: &[bf16]| {
            DeviceBuffer::<Word>::from_slice(stream, &bytemuck::pod_collect_to_vec(elements))
        };
        let old: Vec<_> = case.old.iter().map(|&old| bf16::from_f32(old)).collect();
        let (x, weights, rounded) = (words(&case.x)?, words(&case.weights)?, words(&old)?);
        let (full, sum) =
            (DeviceBuffer::from_slice(stream, &case.old)?, DeviceBuffer::from_slice(stream, &case.old)?);
        for out in [ProductOut::Bf16(&rounded), ProductOut::F32(&full), ProductOut::AddF32(&sum)] {
            let Case { tokens, n, k, x_first_token, out_first_token, .. } = case;
            let (x, weights) = (&x, &weights);
            blas.product(stream, &Product { tokens, n, k, x, x_first_token, weights, out, out_first_token })?;
        }
        let rounded = rounded.to_vec(stream)?;
        let rounded: Vec<_> =
            bytemuck::cast_slice::<Word, bf16>(&rounded).iter().map(|element| element.to_f32()).collect();
        case.check("bf16", &rounded, false, 1.0 / 256.0)?;
        case.check("f32", &full.to_vec(stream)?, false, f64::from(f32::EPSILON))?;
        case.check("added", &sum.to_vec(stream)?, true, f64::from(f32::EPSILON))
    })
}

/// A product may stand in a graph, which gives the bits that a launch gives.
fn captured(machine: &Machine) -> Outcome {
    let Some(blas) = load(machine, "blas::captured")? else { return Ok(()) };
    let (stream, case) = (&machine.stream, Case::random(machine.seed));
    let words =
        |elements: &[bf16]| DeviceBuffer::<Word>::from_slice(stream, &bytemuck::pod_collect_to_vec(elements));
    let (x, weights) = (words(&case.x)?, words(&case.weights)?);
    let out = DeviceBuffer::from_slice(stream, &case.old)?;
    let Case { tokens, n, k, x_first_token, out_first_token, .. } = case;
    let product = Product {
        tokens,
        n,
        k,
        x: &x,
        x_first_token,
        weights: &weights,
        out: ProductOut::F32(&out),
        out_first_token,
    };
    blas.product(stream, &product)?;
    let launched = out.to_vec(stream)?;
    case.check("launched", &launched, false, f64::from(f32::EPSILON))?;
    let mut refused = Ok(());
    let graph = Graph::capture(stream, |stream| {
        refused = blas.product(stream, &product);
        Ok(())
    })?;
    refused?;
    out.write(stream, 0, &case.old)?;
    // SAFETY: all that the graph touches is alive, and nothing else uses it.
    unsafe { graph.launch(stream)? };
    let replayed = out.to_vec(stream)?;
    if replayed.iter().map(|out| out.to_bits()).ne(launched.iter().map(|out| out.to_bits())) {
        return Err("a graph's product differs from a launched one".into());
    }
    Ok(())
}
