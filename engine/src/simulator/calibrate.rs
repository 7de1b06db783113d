use rayon::prelude::*;

use super::generator::single_row;
use super::{Locality, Policy, Replay, TraceRow, replay};

/// Miss ratios that a trace is to have, for caches of 1, 2 and 4 times a step's selection under LRU.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Checkpoints {
    /// With room for one step's pages.
    pub one: f64,
    /// With room for twice as many.
    pub two: f64,
    /// With room for four times as many.
    pub four: f64,
}

impl Checkpoints {
    /// HiSparse on a LongBench-v2 trace: k = 2048 tokens, each layer alone (LMSYS blog, 10 April 2026). At 2 it also
    /// gives FIFO 17.2 %, random 16.1 % and Bélády 8.2 %, which nothing is fitted to.
    pub const HISPARSE: Self = Self { one: 0.30, two: 0.134, four: 0.067 };
}

/// The setting that the checkpoints are for: 4096 partitions of 8 tokens, of which a step selects 256.
const CONTEXT: usize = 32_768;
const PAGE_TOKENS: usize = 8;
const COUNT: usize = 256;

/// Finds `flicker`, `fast` and `drift` with which traces of `seed` reach `target`, all else being as in `start`.
///
/// Three nested bisections: `flicker` moves the first checkpoint most, `fast` the second, `drift` the third, and
/// each is monotone while those within are solved anew. `rows` rows of `steps` steps are generated for each of some
/// hundred trials; after each of the outermost trials `progress` hears how many of how many are done.
pub fn calibrate(
    start: Locality,
    target: Checkpoints,
    seed: u64,
    (rows, steps): (usize, usize),
    mut progress: impl FnMut(usize, usize),
) -> Locality {
    const TRIALS: usize = 8;
    let with_flicker = |locality: Locality| {
        let flicker = bisect(0.0, 1.0, TRIALS, |flicker| {
            checkpoints(Locality { flicker, ..locality }, seed, rows, steps).one < target.one
        });
        Locality { flicker, ..locality }
    };
    // What a process keeps of itself counts by how far it is from 1.
    let with_fast = |locality: Locality| {
        let forgets = bisect(0.02, 0.6, TRIALS, |forgets| {
            let trial = with_flicker(Locality { fast: 1.0 - forgets, ..locality });
            checkpoints(trial, seed, rows, steps).two < target.two
        });
        with_flicker(Locality { fast: 1.0 - forgets, ..locality })
    };
    let mut done = 0;
    let drift = bisect(0.0, 2.0, TRIALS, |drift| {
        let trial = with_fast(Locality { drift, ..start });
        done += 1;
        progress(done, TRIALS);
        checkpoints(trial, seed, rows, steps).four > target.four
    });
    with_fast(Locality { drift, ..start })
}

/// The checkpoints that traces of this locality have.
pub fn checkpoints(locality: Locality, seed: u64, rows: usize, steps: usize) -> Checkpoints {
    let generated: Vec<TraceRow> = (0..rows as u64)
        .into_par_iter()
        .map(|row| single_row(seed + row, locality, (CONTEXT, PAGE_TOKENS), COUNT, steps))
        .collect();
    let misses = |times: usize| {
        let replays =
            generated.par_iter().map(|row| replay(row, Policy::Lru, times * COUNT, steps / 4, seed));
        let sum = replays.reduce(Replay::default, |mut sum, one| {
            sum.add(&one);
            sum
        });
        1.0 - sum.hit_ratio()
    };
    Checkpoints { one: misses(1), two: misses(2), four: misses(4) }
}

/// The place between `low` and `high` up to which `is_low` holds, to within `2^-trials` of their distance.
pub(super) fn bisect(mut low: f32, mut high: f32, trials: usize, mut is_low: impl FnMut(f32) -> bool) -> f32 {
    for _ in 0..trials {
        let middle = (low + high) / 2.0;
        if is_low(middle) {
            low = middle;
        } else {
            high = middle;
        }
    }
    (low + high) / 2.0
}
