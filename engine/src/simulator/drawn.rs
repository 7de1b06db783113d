use rayon::prelude::*;

use super::calibrate::bisect;
use super::generator::Layer;
use super::noise::Noise;
use super::{Locality, Policy, Replay, Trace, TraceRow, replay};

/// Selections with the locality of the calibrated preset, of partitions and in numbers of one's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Draw {
    /// Tokens that can be selected at the first step.
    pub context: usize,
    /// Tokens of a partition, which is what is drawn.
    pub partition_tokens: usize,
    /// Partitions that a row's step selects by their scores.
    pub count: usize,
    /// Partitions of each row that every step selects besides: fewer, where the scores select them, too.
    pub fixed: usize,
    /// Steps, of one token each.
    pub steps: usize,
    /// Layers.
    pub layers: usize,
    /// KV heads of a layer.
    pub heads: usize,
}

impl Draw {
    /// The pace at which the bucketed LRU has this hit ratio in caches of `slots` partitions, counted from step `warm_up` on, as far as there is one: popularity
    /// alone makes some pages hit at any pace.
    pub fn pace_for(&self, hit_ratio: f64, slots: usize, warm_up: usize, seed: u64) -> f32 {
        const TRIALS: usize = 9;
        // A few rows say enough of a layer's.
        let sample = Self { layers: 2, heads: 2, ..*self };
        let slots = slots.max(self.count + self.fixed);
        let found = |log: f32| {
            let trace = Trace::draw(&sample, log.exp(), seed);
            let mut sum = Replay::default();
            let replays =
                trace.rows.par_iter().map(|row| replay(row, Policy::Bucketed64, slots, warm_up, seed));
            replays.collect::<Vec<_>>().iter().for_each(|one| sum.add(one));
            sum.hit_ratio()
        };
        bisect(-5.0, 4.0, TRIALS, |log| found(log) > hit_ratio).exp()
    }
}

impl Trace {
    /// Draws the selections that `seed` stands for, always the same, at this pace: 1 is the calibrated one. A page of the trace is a partition.
    pub fn draw(draw: &Draw, pace: f32, seed: u64) -> Self {
        let layer = |layer: u32| draw_layer(draw, pace, seed, layer);
        let rows: Vec<_> = (0..draw.layers as u32).into_par_iter().map(layer).collect();
        Self {
            name: "drawn".to_owned(),
            page_tokens: draw.partition_tokens as u32,
            context: draw.context as u32,
            rows: rows.into_iter().flatten().collect(),
        }
    }
}

fn draw_layer(draw: &Draw, pace: f32, seed: u64, layer: u32) -> Vec<TraceRow> {
    let Draw { context, partition_tokens, count, fixed, steps, heads, .. } = *draw;
    let localities = vec![Locality::CALIBRATED.at_pace(pace); heads];
    let mut scores = Layer::new(seed, layer, context, partition_tokens, steps, &localities);
    let mut noise = Noise::new(&[seed, u64::from(layer), u64::MAX - 1]);
    let (first, keys) = (scores.partitions(), (context + steps) / partition_tokens);
    let always: Vec<Vec<u32>> = (0..heads).map(|_| distinct(fixed.min(first), first, &mut noise)).collect();
    let mut rows: Vec<_> = (0..heads as u32).map(|head| TraceRow::new(layer, head, keys as u32)).collect();
    let (counts, mut selected) = (vec![count; heads], vec![Vec::new(); heads]);
    for _ in 0..steps {
        selected.iter_mut().for_each(Vec::clear);
        scores.step(&counts, &mut selected);
        for ((row, ids), always) in rows.iter_mut().zip(&mut selected).zip(&always) {
            ids.extend(always);
            ids.sort_unstable();
            ids.dedup();
            row.push(ids);
        }
    }
    rows
}

/// `count` different numbers below `below`.
fn distinct(count: usize, below: usize, noise: &mut Noise) -> Vec<u32> {
    let mut all: Vec<u32> = (0..below as u32).collect();
    for place in 0..count {
        let other = place + noise.below(below - place);
        all.swap(place, other);
    }
    all.truncate(count);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    const DRAW: Draw =
        Draw { context: 8192, partition_tokens: 8, count: 64, fixed: 6, steps: 80, layers: 2, heads: 2 };

    fn hit_ratio(trace: &Trace, slots: usize) -> f64 {
        let mut sum = Replay::default();
        trace.rows.iter().for_each(|row| sum.add(&replay(row, Policy::Bucketed64, slots, 30, 0)));
        sum.hit_ratio()
    }

    #[test]
    fn every_step_has_its_number_and_what_is_fixed() {
        let trace = Trace::draw(&DRAW, 1.0, 3);
        assert_eq!((trace.rows.len(), trace.steps()), (4, 80));
        for row in &trace.rows {
            let common = row.selections().fold(row.step(0).to_vec(), |mut common, ids| {
                assert!((64..=70).contains(&ids.len()), "{}", ids.len());
                common.retain(|id| ids.binary_search(id).is_ok());
                common
            });
            assert!(common.len() >= 6, "{common:?}");
        }
        assert_eq!(trace, Trace::draw(&DRAW, 1.0, 3));
        assert_ne!(trace, Trace::draw(&DRAW, 1.0, 4));
    }

    #[test]
    fn a_pace_is_found_for_a_hit_ratio() {
        for wanted in [0.7, 0.9] {
            let pace = DRAW.pace_for(wanted, 140, 30, 3);
            let found = hit_ratio(&Trace::draw(&DRAW, pace, 3), 140);
            assert!((found - wanted).abs() < 0.03, "{found} where {wanted} was wanted, at pace {pace}");
        }
    }
}
