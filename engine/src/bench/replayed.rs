use rayon::prelude::*;

use super::{Caching, How, Point};
use crate::simulator::{Policy, Replay, TraceRow, replay};

/// Replays rows under the policy of a caching in caches of `slots` pages.
pub(super) fn replay_rows(
    rows: &[TraceRow],
    policy: Policy,
    slots: usize,
    warm_up: usize,
    seed: u64,
) -> Replay {
    let replays: Vec<Replay> =
        rows.par_iter().map(|row| replay(row, policy, slots.max(row.mandatory()), warm_up, seed)).collect();
    let mut sum = Replay::default();
    replays.iter().for_each(|one| sum.add(one));
    sum
}

/// The policy that a caching is replayed under, if it is not run.
pub(super) fn policy_of(caching: Caching) -> Option<Policy> {
    match caching {
        Caching::ExactLru => Some(Policy::Lru),
        Caching::Belady => Some(Policy::Belady),
        _ => None,
    }
}

/// Gives replayed points the times between the measured ones of the same requests that fetch nothing and everything, by the bytes that they fetch.
pub(super) fn interpolate(points: &mut [Point]) {
    let measured: Vec<Point> = points.iter().filter(|point| point.how == How::Measured).cloned().collect();
    let replayed = points.iter_mut().filter(|point| point.how == How::Replayed && point.step_ms.is_none());
    for point in replayed {
        let of = |caching| {
            measured.iter().filter(|other| is_same(other, point)).find(|other| other.cache == caching)
        };
        let (Some(none), Some(all)) = (of(Caching::Resident), of(Caching::NoCache)) else { continue };
        let (Some(least), Some(most)) = (none.step_ms, all.step_ms) else { continue };
        let bytes = all.fetched_bytes_per_step - none.fetched_bytes_per_step;
        if bytes > 0.0 {
            let share = (point.fetched_bytes_per_step - none.fetched_bytes_per_step) / bytes;
            point.step_ms = Some(least + share * (most - least));
        }
    }
}

/// Whether two points differ in what is kept between steps alone.
fn is_same(a: &Point, b: &Point) -> bool {
    (&a.method, &a.budget, a.context, a.batch) == (&b.method, &b.budget, b.context, b.batch)
}

/// Sets the measured steps that fetch something beside what they cannot be shorter than: the step that fetches nothing, and the bytes at the bus's speed, one
/// after the other or at once. The bus is as fast as the copy engine was in the same process; without that there is nothing to set them beside.
pub(super) fn set_beside_floors(points: &mut [Point]) {
    let streamed = points.iter().filter(|point| point.how == How::Bound);
    let bus = streamed.filter_map(|point| point.pcie_gb_per_s).fold(0.0, f64::max);
    let is_resident = |point: &&Point| point.cache == Caching::Resident && point.how == How::Measured;
    let resident: Vec<Point> = points.iter().filter(is_resident).cloned().collect();
    for point in points.iter_mut().filter(|point| point.how == How::Measured && point.misses > 0) {
        let Some(alone) = resident.iter().find(|other| is_same(other, point)) else { continue };
        if let (Some(step_ms), Some(alone_ms), true) = (point.step_ms, alone.step_ms, bus > 0.0) {
            let bus_ms = point.fetched_bytes_per_step / bus / 1e6;
            point.over_sum = Some(step_ms / (alone_ms + bus_ms));
            point.over_max = Some(step_ms / alone_ms.max(bus_ms));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::MemoryByUse;

    fn point(cache: Caching, how: How, step_ms: Option<f64>, bytes: f64) -> Point {
        Point {
            method: "m".to_owned(),
            budget: None,
            context: 1000,
            batch: 4,
            cache,
            host_kv: spinkv::memory::HostFormat::Full,
            buffering: 1.0,
            slots: 10,
            how,
            skipped: None,
            step_ms,
            host_ms: None,
            tokens_per_s: None,
            tokens_per_s_all_layers: None,
            stages_ms: None,
            hits: 1,
            misses: u64::from(bytes > 0.0),
            adopted: 0,
            hit_ratio: None,
            fetched_bytes_per_step: bytes,
            pcie_gb_per_s: None,
            over_sum: None,
            over_max: None,
            memory: MemoryByUse::default(),
            request_bytes: 0,
        }
    }

    #[test]
    fn replayed_steps_lie_between_the_measured_ones_by_their_bytes() {
        let mut points = vec![
            point(Caching::NoCache, How::Measured, Some(12.0), 8e6),
            point(Caching::Belady, How::Replayed, None, 2e6),
            point(Caching::Resident, How::Measured, Some(4.0), 0.0),
        ];
        interpolate(&mut points);
        assert_eq!(points[1].step_ms, Some(6.0));
        // Of another batch there is nothing to go by.
        points[1].step_ms = None;
        points[1].batch = 5;
        interpolate(&mut points);
        assert_eq!(points[1].step_ms, None);
    }

    #[test]
    fn steps_are_set_beside_the_resident_one_and_the_bus() {
        let mut points = vec![
            point(Caching::BucketedLru, How::Measured, Some(6.0), 100e6),
            point(Caching::Resident, How::Measured, Some(3.0), 0.0),
            // 50 GB/s: 100 MB take 2 ms.
            Point {
                method: "dense".to_owned(),
                ..point(Caching::DenseStreamed, How::Bound, Some(20.0), 1e9)
            }
            .finish(2, 4),
        ];
        set_beside_floors(&mut points);
        assert_eq!((points[0].over_sum, points[0].over_max), (Some(6.0 / 5.0), Some(6.0 / 3.0)));
        assert_eq!((points[1].over_sum, points[2].over_sum), (None, None));
        // Twice the layers, twice the time.
        assert_eq!((points[2].tokens_per_s, points[2].tokens_per_s_all_layers), (Some(200.0), Some(100.0)));
    }
}
