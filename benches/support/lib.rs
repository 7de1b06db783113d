//! Seeded inputs for the benches. Never zeros: those are faster than anything real.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// `len` numbers between -1 and 1, always the same for a seed.
pub fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// `steps` selections of `count` of `0..keys`, ascending, of which each keeps about `overlap` of the one before.
pub fn drifting_selections(keys: u32, count: usize, overlap: f64, steps: usize, seed: u64) -> Vec<Vec<u32>> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut current: Vec<u32> = Vec::new();
    let mut selections = Vec::with_capacity(steps);
    for _ in 0..steps {
        current.retain(|_| rng.random_bool(overlap));
        while current.len() < count {
            let key = rng.random_range(0..keys);
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
