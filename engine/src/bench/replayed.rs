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
        let same = |other: &&Point| {
            (&other.method, &other.budget, other.context, other.batch)
                == (&point.method, &point.budget, point.context, point.batch)
        };
        let of = |caching| measured.iter().filter(same).find(|other| other.cache == caching);
        let (Some(none), Some(all)) = (of(Caching::Resident), of(Caching::NoCache)) else { continue };
        let (Some(least), Some(most)) = (none.step_ms, all.step_ms) else { continue };
        let bytes = all.fetched_bytes_per_step - none.fetched_bytes_per_step;
        if bytes > 0.0 {
            let share = (point.fetched_bytes_per_step - none.fetched_bytes_per_step) / bytes;
            point.step_ms = Some(least + share * (most - least));
        }
    }
}
