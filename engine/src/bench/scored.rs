//! A method's scores and top-k for measurements whose selections come from elsewhere: they run as ever, and their result is not used.

use std::hint::black_box;

use spinkv::backend::cpu::{score_partitions, top_k};
use spinkv::pipeline::{Candidates, Method, Select};

#[cfg(all(feature = "cuda", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(super) use gpu::{ScoredSelect, scored};

/// Scores and picks on the CPU as `method` does.
pub(super) fn score(method: &dyn Method, candidates: &Candidates<'_>) {
    let mut own = Vec::new();
    match method.select() {
        Select::TopK { score, merge, budget } => {
            let mut scores = vec![0.0; candidates.count];
            let Candidates { queries, summaries, head_dim, .. } = *candidates;
            score_partitions(score, queries, summaries, head_dim, merge, &mut scores);
            let tokens = method.partition().tokens(1);
            top_k(&scores, budget.partitions(candidates.position + 1, tokens), &mut own);
        }
        Select::Custom { picker, .. } => picker.pick(candidates, &mut own),
        Select::Nothing | Select::Everything => {}
    }
    black_box(own);
}

#[cfg(all(feature = "cuda", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod gpu {
    use spinkv::backend::cuda::driver::{Result as DriverResult, Stream};
    use spinkv::backend::cuda::kernels::{Kernels, Score, SelectPartitions};
    use spinkv::backend::cuda::operators::{GpuSelect, LoadSelect, OperatorSizes, SelectStage};
    use spinkv::pipeline::{GroupMerge, Method, PartitionScore, Select};

    /// A method's Select on a GPU.
    #[derive(Debug)]
    pub(crate) struct ScoredSelect {
        /// The method's own.
        own: Option<Box<dyn GpuSelect>>,
        /// Else how the launches in the tree score.
        kind: Option<(PartitionScore, GroupMerge)>,
    }

    /// Loads a [`ScoredSelect`].
    pub(crate) type LoadScored<'a> = Box<dyn FnOnce(&Stream) -> spinkv::Result<ScoredSelect> + 'a>;

    /// The Select of `method`; `None` if it has none, or none for a GPU.
    pub(crate) fn scored<'a>(
        method: &'a dyn Method,
        sizes: &OperatorSizes,
    ) -> spinkv::Result<Option<LoadScored<'a>>> {
        let (own, kind): (Option<LoadSelect<'a>>, _) = match method.select() {
            Select::Custom { picker, .. } => match picker.on_gpu(sizes)? {
                Some(load) => (Some(load), None),
                None => return Ok(None),
            },
            Select::TopK { score, merge, .. } => (None, Some((score, merge))),
            Select::Nothing | Select::Everything => return Ok(None),
        };
        Ok(Some(Box::new(move |stream: &Stream| {
            Ok(ScoredSelect { own: own.map(|load| load(stream)).transpose()?, kind })
        })))
    }

    impl ScoredSelect {
        /// As [`GpuSelect::scratch_words`].
        pub(crate) fn scratch_words(&self) -> usize {
            self.own.as_ref().map_or(0, |own| own.scratch_words())
        }

        /// As [`GpuSelect::bytes`].
        pub(crate) fn bytes(&self) -> u64 {
            self.own.as_ref().map_or(0, |own| own.bytes())
        }

        /// As [`GpuSelect::select`].
        ///
        /// # Safety
        /// As there.
        pub(crate) unsafe fn launch(
            &self,
            kernels: &Kernels,
            stream: &Stream,
            stage: &SelectStage<'_>,
        ) -> DriverResult<()> {
            let SelectStage { score, select, .. } = *stage;
            // SAFETY: the caller's part; bounds are merged as they are, as the backend does it.
            unsafe {
                match (&self.own, self.kind) {
                    (Some(own), _) => own.select(kernels, stream, stage),
                    (None, Some((PartitionScore::Bound, merge))) => {
                        let head_words = score.head_words / 2;
                        Score { bounds: true, head_words, scale: 1.0, ..score }.launch(kernels, stream)?;
                        SelectPartitions { statistics: None, merge, ..select }.launch(kernels, stream)
                    }
                    (None, kind) => {
                        score.launch(kernels, stream)?;
                        let merge = kind.map_or(select.merge, |(_, merge)| merge);
                        SelectPartitions { merge, ..select }.launch(kernels, stream)
                    }
                }
            }
        }
    }
}
