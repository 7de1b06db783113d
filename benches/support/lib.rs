//! What the benches share: seeded inputs, never zeros, since those are faster than anything real; and all that the GPU's
//! bench does without a GPU.

pub mod report;
pub mod roofline;
pub mod sampling;
pub mod units;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// `len` numbers between -1 and 1, always the same for a seed.
pub fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// Selections that change a little from step to step.
#[derive(Clone, Copy, Debug)]
pub struct Walk {
    /// Ids are below this number.
    pub keys: u32,
    /// Ids of a step.
    pub count: usize,
    /// How many of the step before a step keeps, as a part of them.
    pub overlap: f64,
    /// How many of the others were selected within the last [`RECENT`](Self::RECENT) steps; what is left comes from
    /// anywhere.
    pub again: f64,
}

impl Walk {
    /// Steps that `again` looks back.
    pub const RECENT: usize = 16;

    /// `steps` selections, each ascending.
    pub fn selections(&self, steps: usize, seed: u64) -> Vec<Vec<u32>> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut current: Vec<u32> = Vec::new();
        let mut selections: Vec<Vec<u32>> = Vec::with_capacity(steps);
        for step in 0..steps {
            let recent = &selections[step.saturating_sub(Self::RECENT)..];
            current.retain(|_| rng.random_bool(self.overlap));
            while current.len() < self.count {
                let key = match recent.len() {
                    0 => rng.random_range(0..self.keys),
                    _ if !rng.random_bool(self.again) => rng.random_range(0..self.keys),
                    steps => recent[rng.random_range(0..steps)][rng.random_range(0..self.count)],
                };
                if !current.contains(&key) {
                    current.push(key);
                }
            }
            let mut selection = current.clone();
            selection.sort_unstable();
            selections.push(selection);
        }
        selections
    }
}
