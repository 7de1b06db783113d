use std::fmt;

use serde::Serialize;
use spinkv::memory::HostFormat;

use super::report::{by_name, cache_label, parts, table};
use super::{Caching, Facts, How, Point};

/// The hit ratio of a cache of one size.
#[derive(Clone, Debug, Serialize)]
pub struct CurvePoint {
    /// What is kept.
    pub cache: Caching,
    /// How the host keeps pages.
    #[serde(serialize_with = "by_name")]
    pub host_kv: HostFormat,
    /// Buffering pages for each mandatory page.
    pub buffering: f64,
    /// Slots of a row's cache.
    pub slots: usize,
    /// Hits among selected pages.
    pub hit_ratio: f64,
    /// How it came to be.
    pub how: How,
    /// Bytes from the host for each generated token of a request.
    pub fetched_bytes_per_token: f64,
}

/// One part of the design after the other.
#[derive(Clone, Debug, Serialize)]
pub struct Gain {
    /// What was added.
    pub step: Caching,
    /// How the host keeps pages.
    #[serde(serialize_with = "by_name")]
    pub host_kv: HostFormat,
    /// A step with it, milliseconds.
    pub step_ms: f64,
    /// How much faster than the one before.
    pub speedup: f64,
    /// How much faster than the first.
    pub speedup_of_all: f64,
    /// Hits among selected pages.
    pub hit_ratio: f64,
}

/// What `spinkv bench ablation` prints.
#[derive(Clone, Debug, Serialize)]
pub struct AblationReport {
    /// Of what, on what.
    pub facts: Facts,
    /// Steps before the timed ones.
    pub warm_up: usize,
    /// Timed steps.
    pub steps: usize,
    /// No cache, what the step before selected, the bucketed LRU at the largest size, the same with Attention beside the copies and then with halves of the batch
    /// in alternation, the same with host pages in other formats, and all of it resident, each over the one before.
    pub gains: Vec<Gain>,
    /// Hit ratio over cache size.
    pub curve: Vec<CurvePoint>,
    /// All that was measured.
    pub points: Vec<Point>,
}

impl AblationReport {
    /// What the points of one batch, context, method and budget come to.
    pub fn new(facts: Facts, (warm_up, steps): (usize, usize), points: Vec<Point>) -> Self {
        let mut gains: Vec<Gain> = Vec::new();
        // Dense attention's pages are always full.
        let sparse = points.iter().find(|point| !point.cache.is_dense());
        let host = sparse.map_or(HostFormat::Full, |point| point.host_kv);
        let serving = [Caching::BucketedLru, Caching::InHalves];
        let caches = [Caching::NoCache, Caching::PreviousStep, Caching::Serial].into_iter().chain(serving);
        let mut stages: Vec<_> = caches.map(|cache| (cache, host)).collect();
        for point in points.iter().filter(|point| serving.contains(&point.cache)) {
            let stage = (point.cache, point.host_kv);
            if !stages.contains(&stage) {
                stages.push(stage);
            }
        }
        stages.push((Caching::Resident, host));
        for (cache, host_kv) in stages {
            let largest = |a: &&Point, b: &&Point| a.buffering.total_cmp(&b.buffering);
            let of_stage = |point: &&Point| point.cache == cache && point.host_kv == host_kv;
            let found = points.iter().filter(of_stage).filter(|point| point.step_ms.is_some());
            let Some(point) = found.max_by(largest) else { continue };
            let Some(step_ms) = point.step_ms else { continue };
            let over = |other: Option<&Gain>| other.map_or(1.0, |other| other.step_ms / step_ms);
            let (speedup, speedup_of_all) = (over(gains.last()), over(gains.first()));
            let hit_ratio = point.hit_ratio.unwrap_or(0.0);
            gains.push(Gain { step: cache, host_kv, step_ms, speedup, speedup_of_all, hit_ratio });
        }
        let on_curve = points.iter().filter(|point| !point.cache.is_dense() && point.skipped.is_none());
        let curve = on_curve.map(|point| CurvePoint {
            cache: point.cache,
            host_kv: point.host_kv,
            buffering: point.buffering,
            slots: point.slots,
            hit_ratio: point.hit_ratio.unwrap_or(0.0),
            how: point.how,
            fetched_bytes_per_token: point.fetched_bytes_per_step / point.batch.max(1) as f64,
        });
        let curve = curve.collect();
        Self { facts, warm_up, steps, gains, curve, points }
    }
}

impl fmt::Display for AblationReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { facts, warm_up, steps, gains, points, .. } = self;
        writeln!(f, "{facts}\n{steps} steps behind {warm_up}; ~ is a bound or replayed, not measured\n")?;
        writeln!(f, "  {:<18} {:>9} {:>9} {:>9} {:>6}", "with", "step, ms", "x before", "x first", "hit")?;
        for Gain { step, host_kv, step_ms, speedup, speedup_of_all, hit_ratio } in gains {
            let step = cache_label(*step, *host_kv);
            writeln!(f, "  {step:<18} {step_ms:>9.3} {speedup:>9.2} {speedup_of_all:>9.2} {hit_ratio:>6.3}")?;
        }
        writeln!(f)?;
        table(points, f)?;
        writeln!(f, "\nmilliseconds of a step by part")?;
        parts(points, f)
    }
}
