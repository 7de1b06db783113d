use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::Serialize;
use spinkv::memory::PhysicalPage;
use spinkv::paging::{
    Belady, BucketedLru, EvictionPolicy, Fifo, FlatMap, Future, Lru, PreviousStep, Random, Resolution,
    RowCache, StepClock,
};
use spinkv::partition::SelectedPage;

use super::TraceRow;

/// A policy that a trace can be replayed under.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// The best there can be: the future is known.
    Belady,
    /// Exact least recently used.
    Lru,
    /// Least recently used among 64 ages.
    #[serde(rename = "bucketed-64")]
    Bucketed64,
    /// Least recently used among 16 ages.
    #[serde(rename = "bucketed-16")]
    Bucketed16,
    /// Least recently used among 4 ages.
    #[serde(rename = "bucketed-4")]
    Bucketed4,
    /// Any page may leave.
    Random,
    /// First in, first out.
    Fifo,
    /// Only what the previous step selected.
    PreviousStep,
}

impl Policy {
    /// All policies, the best first.
    pub const ALL: [Self; 8] = [
        Self::Belady,
        Self::Lru,
        Self::Bucketed64,
        Self::Bucketed16,
        Self::Bucketed4,
        Self::Random,
        Self::Fifo,
        Self::PreviousStep,
    ];

    /// The name on the command line and in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Belady => "belady",
            Self::Lru => "lru",
            Self::Bucketed64 => "bucketed-64",
            Self::Bucketed16 => "bucketed-16",
            Self::Bucketed4 => "bucketed-4",
            Self::Fifo => "fifo",
            Self::Random => "random",
            Self::PreviousStep => "previous-step",
        }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Policy {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|policy| policy.name() == name);
        found.ok_or_else(|| format!("known: {}", Self::ALL.map(Self::name).join(", ")))
    }
}

/// What a cache did after its warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Replay {
    /// Selected pages.
    pub probes: u64,
    /// Those that had to be fetched.
    pub misses: u64,
    /// Steps.
    pub steps: u64,
    /// Slots of the cache.
    pub slots: u64,
}

impl Replay {
    /// Hits over probes; 1 if there were none.
    pub fn hit_ratio(&self) -> f64 {
        1.0 - self.misses as f64 / self.probes.max(1) as f64
    }

    /// Adds what another row's cache did.
    pub fn add(&mut self, other: &Self) {
        self.probes += other.probes;
        self.misses += other.misses;
        self.steps += other.steps;
        self.slots += other.slots;
    }
}

/// Replays a row under `policy` in a cache of `slots` slots, at least those of the row's largest step, and counts
/// from step `warm_up` on. `seed` is for policies that draw.
///
/// The cache is the one that backends use, so what is measured is what runs.
///
/// # Panics
/// If there are fewer slots than a step selects.
pub fn replay(row: &TraceRow, policy: Policy, slots: usize, warm_up: usize, seed: u64) -> Replay {
    match policy {
        Policy::Belady => {
            let future = Arc::new(Future::new(row.keys(), row.selections()));
            replay_with(row, Belady::new(future), slots, warm_up)
        }
        Policy::Lru => replay_with(row, Lru::default(), slots, warm_up),
        Policy::Bucketed64 => replay_with(row, BucketedLru::<64>::default(), slots, warm_up),
        Policy::Bucketed16 => replay_with(row, BucketedLru::<16>::default(), slots, warm_up),
        Policy::Bucketed4 => replay_with(row, BucketedLru::<4>::default(), slots, warm_up),
        Policy::Fifo => replay_with(row, Fifo::default(), slots, warm_up),
        Policy::Random => replay_with(row, Random::new(seed), slots, warm_up),
        Policy::PreviousStep => replay_with(row, PreviousStep::default(), slots, warm_up),
    }
}

fn replay_with<P: EvictionPolicy>(row: &TraceRow, policy: P, slots: usize, warm_up: usize) -> Replay {
    let mut map = FlatMap::new(row.keys());
    let mut cache = RowCache::new((0..slots as u32).map(PhysicalPage).collect(), policy);
    let (mut out, mut clock) = (Resolution::default(), StepClock::default());
    let mut pages = Vec::with_capacity(row.mandatory());
    let mut result = Replay { slots: slots as u64, ..Replay::default() };
    for (step, keys) in row.selections().enumerate() {
        pages.clear();
        pages.extend(keys.iter().map(|key| SelectedPage { key: *key, tokens: 1 }));
        clock.tick();
        cache.begin_step(clock);
        cache.resolve(&mut map, &pages, &mut out).expect("a cache has slots for the largest step");
        if step >= warm_up {
            result.probes += keys.len() as u64;
            result.misses += out.copies.len() as u64;
            result.steps += 1;
        }
    }
    result
}
