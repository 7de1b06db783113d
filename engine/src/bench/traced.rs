use std::ops::Range;
use std::sync::Arc;
#[cfg(all(feature = "cuda", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

#[cfg(all(feature = "cuda", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
use spinkv::backend::cuda::operators::{LoadSelect, OperatorSizes};
use spinkv::partition::PartitionKind;
use spinkv::pipeline::{Budget, Candidates, Index, KeyStore, Method, Pick, Place, Reach, Select, SteadyZone};
use spinkv::{KvConfig, KvShape};

use super::drawn::WantedHits;
use super::{BenchError, DrawnSelections, scored};
use crate::error::Result;

#[cfg(all(feature = "cuda", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod gpu;
#[cfg(all(feature = "cuda", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
use gpu::Staged;

/// A method whose selections are drawn: its Index, its scores and its top-k run as ever, and then the drawn ids take the place of theirs.
///
/// What a step selects follows from its number, which [`begin`](Self::begin) says. On the CPU all requests select the same, since a Select there does not know whose it is.
#[derive(Debug)]
pub struct Traced {
    inner: Arc<dyn Method>,
    /// What the method selects and always reads together: the drawn ids hold both.
    budget: Budget,
    drawn: DrawnSelections,
    step: AtomicUsize,
    #[cfg(all(feature = "cuda", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
    staged: OnceLock<Arc<Staged>>,
}

impl Traced {
    /// The method of `kv` with `steps` drawn steps behind a context of `context` tokens.
    ///
    /// # Errors
    /// [`BenchError::DrawnClusters`] and [`BenchError::DrawnWithoutChoice`].
    pub fn new(
        kv: &KvConfig,
        method: Arc<dyn Method>,
        context: usize,
        steps: usize,
        wanted: Option<WantedHits>,
        seed: u64,
    ) -> Result<Self> {
        let name = || method.name().to_owned();
        if kv.clusters() {
            return Err(BenchError::DrawnClusters { method: name() }.into());
        }
        let Some(budget) = method.select().budget() else {
            return Err(BenchError::DrawnWithoutChoice { method: name() }.into());
        };
        let (tokens, fixed) = (kv.partition_tokens(), method.always().partitions());
        let count = budget.partitions(context, tokens);
        let drawn = DrawnSelections::new(kv, context, (count, fixed), steps, wanted, seed);
        Ok(Self {
            inner: method,
            budget: Budget::Tokens((count + fixed) * tokens),
            drawn,
            step: AtomicUsize::new(0),
            #[cfg(all(
                feature = "cuda",
                target_os = "linux",
                any(target_arch = "x86_64", target_arch = "aarch64")
            ))]
            staged: OnceLock::new(),
        })
    }

    /// What it is of the KV heads `heads` alone, to be loaded and begun by itself.
    ///
    /// # Errors
    /// Those of [`Method::of_heads`].
    pub fn of_heads(&self, heads: Range<usize>) -> Result<Self> {
        Ok(Self {
            inner: self.inner.of_heads(heads.clone())?.unwrap_or_else(|| self.inner.clone()),
            budget: self.budget,
            drawn: self.drawn.from_head(heads.start),
            step: AtomicUsize::new(0),
            #[cfg(all(
                feature = "cuda",
                target_os = "linux",
                any(target_arch = "x86_64", target_arch = "aarch64")
            ))]
            staged: OnceLock::new(),
        })
    }

    /// The selections.
    pub fn drawn(&self) -> &DrawnSelections {
        &self.drawn
    }

    /// From now on steps select what was drawn for step `step`.
    ///
    /// # Panics
    /// Beyond the steps that were drawn.
    pub fn begin(&self, step: usize) {
        assert!(step < self.drawn.steps(), "step {step} of {} drawn ones", self.drawn.steps());
        self.step.store(step, Ordering::Relaxed);
    }
}

impl Method for Traced {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn partition(&self) -> PartitionKind {
        self.inner.partition()
    }

    fn index(&self) -> Index<'_> {
        self.inner.index()
    }

    fn select(&self) -> Select<'_> {
        Select::Custom { picker: self, budget: self.budget }
    }

    fn steady(&self) -> SteadyZone {
        self.inner.steady()
    }

    fn keys(&self) -> KeyStore {
        self.inner.keys()
    }

    fn reach(&self, place: Place) -> Reach {
        self.inner.reach(place)
    }

    fn check(&self, shape: &KvShape) -> spinkv::Result<()> {
        self.inner.check(shape)
    }
}

impl Pick for Traced {
    fn pick(&self, candidates: &Candidates<'_>, ids: &mut Vec<u32>) {
        scored::score(&*self.inner, candidates);
        let Place { layer, kv_head } = candidates.place;
        ids.extend(self.drawn.ids(0, layer, kv_head, self.step.load(Ordering::Relaxed)));
    }

    #[cfg(all(feature = "cuda", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
    fn on_gpu<'a>(&'a self, sizes: &OperatorSizes) -> spinkv::Result<Option<LoadSelect<'a>>> {
        gpu::load(self, *sizes)
    }
}
