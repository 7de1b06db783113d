use std::iter::Sum;
use std::time::Duration;

/// What happened to pages since the backend was made.
///
/// Hits, misses and what they move count decode steps only; the pages that warm a cache at the end of a
/// prompt are `warm_pages`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Selected pages that were on the GPU.
    pub hits: u64,
    /// Selected pages that were fetched from the host.
    pub misses: u64,
    /// Pages fetched at the end of a prompt.
    pub warm_pages: u64,
    /// Pages that left a cache for another.
    pub evicted_pages: u64,
    /// Pages that left a cache because it shrank.
    pub shrunk_pages: u64,
    /// Pages that went from the steady zone to a cache without being copied.
    pub adopted_pages: u64,
    /// Pages written to the host.
    pub offloaded_pages: u64,
}

impl Counters {
    /// Hits among selected pages, or `None` before anything was selected.
    pub fn hit_ratio(&self) -> Option<f64> {
        let selected = self.hits + self.misses;
        (selected > 0).then(|| self.hits as f64 / selected as f64)
    }

    /// Pages fetched from the host, warm start included.
    pub fn fetched_pages(&self) -> u64 {
        self.misses + self.warm_pages
    }
}

impl Sum for Counters {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |sum, one| Self {
            hits: sum.hits + one.hits,
            misses: sum.misses + one.misses,
            warm_pages: sum.warm_pages + one.warm_pages,
            evicted_pages: sum.evicted_pages + one.evicted_pages,
            shrunk_pages: sum.shrunk_pages + one.shrunk_pages,
            adopted_pages: sum.adopted_pages + one.adopted_pages,
            offloaded_pages: sum.offloaded_pages + one.offloaded_pages,
        })
    }
}

/// A stage of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Keys become summaries.
    Index,
    /// New K and V go to the steady zone, full pages to the host.
    Offload,
    /// Queries and summaries become partition ids.
    Select,
    /// Missing pages come in.
    Retrieve,
    /// Queries and pages become outputs.
    Attention,
}

/// Time spent in each stage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StageTimes([Duration; 5]);

impl StageTimes {
    /// The time of one stage.
    pub fn get(&self, stage: Stage) -> Duration {
        self.0[stage as usize]
    }

    /// Adds to a stage's time.
    pub fn add(&mut self, stage: Stage, time: Duration) {
        self.0[stage as usize] += time;
    }
}
