use std::ops::Range;
use std::sync::Arc;

use spinkv::KvShape;
#[cfg(all(feature = "cuda", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
use spinkv::backend::cuda::{
    driver::{Result as DriverResult, Stream},
    kernels::{Drift, Kernels},
    operators::{GpuSelect, LoadSelect, OperatorSizes, SelectStage},
};
use spinkv::partition::PartitionKind;
use spinkv::pipeline::{Budget, Candidates, Index, KeyStore, Method, Pick, Place, Reach, Select, SteadyZone};
use spinkv_kernels::abi::drift::{DriftRow, PACE};

use super::BenchError;
use super::scored;
use crate::error::Result;

/// A method whose selections drift: its Index, its scores and its top-k run as ever, and then partitions that change from step to step as those of text do
/// take the place of theirs, by [`DriftRow::partition`]. They depend on a row and the length of its context alone, so it serves requests of all lengths that
/// come and go, where [`Traced`](super::Traced) serves one batch.
///
/// What a method [always](Method::always) reads is in its budget here, not beside it.
#[derive(Debug)]
pub struct Drifting {
    inner: Arc<dyn Method>,
    budget: Budget,
    kv_heads: usize,
}

impl Drifting {
    /// `method` for a model of `shape`; itself if it does not choose what it reads.
    ///
    /// # Errors
    /// [`BenchError::DrawnClusters`].
    pub fn of(method: Arc<dyn Method>, shape: &KvShape) -> Result<Arc<dyn Method>> {
        if matches!(method.partition(), PartitionKind::Cluster { .. }) {
            return Err(BenchError::DrawnClusters { method: method.name().to_owned() }.into());
        }
        match method.select().budget() {
            Some(budget) => Ok(Arc::new(Self { inner: method, budget, kv_heads: shape.kv_heads })),
            None => Ok(method),
        }
    }
}

impl Method for Drifting {
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

    fn of_heads(&self, heads: Range<usize>) -> spinkv::Result<Option<Arc<dyn Method>>> {
        let inner = self.inner.of_heads(heads.clone())?.unwrap_or_else(|| self.inner.clone());
        Ok(Some(Arc::new(Self { inner, budget: self.budget, kv_heads: heads.len() })))
    }

    fn check(&self, shape: &KvShape) -> spinkv::Result<()> {
        self.inner.check(shape)
    }
}

impl Pick for Drifting {
    fn pick(&self, candidates: &Candidates<'_>, ids: &mut Vec<u32>) {
        scored::score(&*self.inner, candidates);
        let Place { layer, kv_head } = candidates.place;
        let (partitions, count) = (candidates.count as u32, candidates.limit.min(candidates.count) as u32);
        let (row, tokens) = ((layer * self.kv_heads + kv_head) as u32, candidates.position as u32 + 1);
        let drawn = DriftRow { row, tokens, partitions, count, pace: PACE };
        let of = |at| if count < partitions { drawn.partition(at) } else { at };
        ids.extend((0..count).map(|at| candidates.first + of(at)));
    }

    #[cfg(all(feature = "cuda", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
    fn on_gpu<'a>(&'a self, sizes: &OperatorSizes) -> spinkv::Result<Option<LoadSelect<'a>>> {
        Ok(scored::scored(&*self.inner, sizes)?.map(|load| -> LoadSelect<'a> {
            Box::new(move |stream: &Stream| {
                let select: Box<dyn GpuSelect> = Box::new(DriftSelect(load(stream)?));
                Ok(select)
            })
        }))
    }
}

/// A method's Select, and ids that drift over its.
#[cfg(all(feature = "cuda", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
#[derive(Debug)]
struct DriftSelect(scored::ScoredSelect);

#[cfg(all(feature = "cuda", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
impl GpuSelect for DriftSelect {
    fn scratch_words(&self) -> usize {
        self.0.scratch_words()
    }

    unsafe fn select(&self, kernels: &Kernels, stream: &Stream, stage: &SelectStage<'_>) -> DriverResult<()> {
        // SAFETY: the caller's part; the ids are written anew behind those that wrote them.
        unsafe {
            self.0.launch(kernels, stream, stage)?;
            Drift::of(&stage.select, stage.score.layer, PACE).launch(kernels, stream)
        }
    }

    fn bytes(&self) -> u64 {
        self.0.bytes()
    }
}

#[cfg(test)]
mod tests {
    use spinkv::backend::cpu::CpuBackend;
    use spinkv::memory::{KvDtype, MemoryLimits, PageLayout};
    use spinkv::pipeline::{Budget, Pipeline, SteadyZone};
    use spinkv::{KvConfig, algorithms};

    use super::*;

    fn shadowkv() -> Arc<dyn Method> {
        let steady = SteadyZone { sinks: 4, window: 12 };
        Arc::new(algorithms::ShadowKv { budget: Budget::Tokens(64), steady, outliers: 0 })
    }

    /// Steps of a request of random tensors select what drifts, and nothing else of them changes.
    #[test]
    fn what_drifts_is_selected() {
        let shape = KvShape::new(2, 4, 2, 16).unwrap();
        let method = Drifting::of(shadowkv(), &shape).unwrap();
        assert_eq!(method.name(), "shadowkv");
        let layout = PageLayout::new(8, 16, KvDtype::Bf16).unwrap();
        let kv = KvConfig::new(shape, layout, method).unwrap();
        let mut pipeline = Pipeline::new(CpuBackend::new(kv, MemoryLimits::default()));
        let request = pipeline.admit(700).unwrap();
        let numbers = |count: usize, of: usize| -> Vec<f32> {
            (0..count).map(|at| ((at * 31 + of * 7) % 101) as f32 / 50.0 - 1.0).collect()
        };
        for layer in 0..2 {
            let (keys, values) = (numbers(600 * 32, layer), numbers(600 * 32, layer + 5));
            let mut out = vec![0.0; 600 * 64];
            let mut prompt = pipeline.prefill(request, layer, 600, &keys, &values).unwrap();
            prompt.attend(600, &numbers(600 * 64, layer + 9), &mut out).unwrap();
        }
        let mut seen = Vec::new();
        for step in 0..40 {
            for layer in 0..2 {
                let mut out = vec![0.0; 64];
                let tensor = |of: usize, count| numbers(count, step * 3 + of);
                pipeline
                    .decode(layer, &[request], &tensor(1, 64), &tensor(2, 32), &tensor(3, 32), &mut out)
                    .unwrap();
            }
            let tokens = 601 + step as u32;
            let partitions = pipeline.config().retrievable_partitions(tokens as usize);
            let row = DriftRow { row: 3, tokens, partitions: partitions.len() as u32, count: 8, pace: PACE };
            let expected: Vec<u32> = (0..8).map(|at| partitions.start + row.partition(at)).collect();
            assert_eq!(pipeline.backend().selected(request, 1, 1), Some(&expected[..]));
            seen.push(expected);
        }
        seen.dedup();
        assert!((10..40).contains(&seen.len()), "{} different selections in 40 steps", seen.len());
        let counters = pipeline.counters();
        assert!(counters.hits > counters.misses && counters.misses > 0, "{counters:?}");
    }

    #[test]
    fn clusters_are_refused_and_who_does_not_choose_is_left_alone() {
        let shape = KvShape::new(2, 4, 2, 16).unwrap();
        let clusters = algorithms::RetroInfer::new(Budget::Tokens(64), SteadyZone::default());
        let refused = Drifting::of(Arc::new(clusters), &shape).unwrap_err();
        assert!(refused.to_string().contains("retroinfer cannot be drawn"), "{refused}");
        let dense: Arc<dyn Method> = Arc::new(algorithms::Dense::default());
        let left = Drifting::of(Arc::clone(&dense), &shape).unwrap();
        assert!(Arc::ptr_eq(&dense, &left));
    }
}
