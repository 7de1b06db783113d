use std::fmt;
use std::ops::Range;
use std::str::FromStr;
use std::sync::Arc;

use super::{Budget, SteadyZone};
#[cfg(all(feature = "cuda", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
use crate::backend::cuda::operators::{LoadIndex, LoadSelect, OperatorSizes};
use crate::partition::PartitionKind;
use crate::{KvShape, Rotary};

/// A sparse-attention method: its Index and its Select. Offload, Retrieve and Attention are shared by all.
///
/// Most methods only name operators that the backends have, and then run on each of them:
///
/// ```
/// use spinkv::partition::PartitionKind;
/// use spinkv::pipeline::{Budget, GroupMerge, Index, Method, PartitionScore, Select};
///
/// /// Mean keys of 16 tokens, scored by the sum over the query heads.
/// #[derive(Debug)]
/// struct Means;
///
/// impl Method for Means {
///     fn name(&self) -> &str {
///         "means"
///     }
///     fn partition(&self) -> PartitionKind {
///         PartitionKind::Chunk { tokens: 16 }
///     }
///     fn index(&self) -> Index<'_> {
///         Index::MeanKey
///     }
///     fn select(&self) -> Select<'_> {
///         let (score, merge) = (PartitionScore::DotProduct, GroupMerge::Sum);
///         Select::TopK { score, merge, budget: Budget::Tokens(512) }
///     }
/// }
/// ```
///
/// A method that needs something else brings it as [`Index::Custom`] or [`Select::Custom`].
pub trait Method: fmt::Debug + Send + Sync {
    /// The name that users choose it by.
    fn name(&self) -> &str;

    /// How it cuts the context.
    fn partition(&self) -> PartitionKind;

    /// What a partition becomes when it leaves the steady zone.
    fn index(&self) -> Index<'_>;

    /// Which partitions a query reads.
    fn select(&self) -> Select<'_>;

    /// The tokens that every query reads.
    fn steady(&self) -> SteadyZone {
        SteadyZone::default()
    }

    /// The partitions that every query reads beside those that it picks.
    fn always(&self) -> Always {
        Always::Nothing
    }

    /// How many of the partitions that a query does not pick it *estimates*, as a share of the row's partitions: the best of them, by
    /// score. An estimated partition takes part in attention as one token whose key is its mean key, whose value is its mean value, and which counts as
    /// often as it has tokens; nothing of it is fetched. From 0, which is none, to 1, which is all; of [clusters](Index::Clusters) alone.
    fn estimated(&self) -> f32 {
        0.0
    }

    /// Where the keys of pages that leave the steady zone are kept.
    fn keys(&self) -> KeyStore {
        KeyStore::Full
    }

    /// How far the queries of a row reach, where not all rows do as [`select`](Self::select) says; the same at all times.
    fn reach(&self, _place: Place) -> Reach {
        Reach::Selected
    }

    /// What it is of the KV heads `heads` alone, which are numbered from 0 then: of a GPU's [shard](crate::Shard). `None`, as by default, if all
    /// rows do alike.
    ///
    /// # Errors
    /// Heads that it cannot be of.
    fn of_heads(&self, _heads: Range<usize>) -> crate::Result<Option<Arc<dyn Method>>> {
        Ok(None)
    }

    /// Refuses models that it does not fit.
    ///
    /// # Errors
    /// [`Error::InvalidMethod`](crate::Error::InvalidMethod), by default none.
    fn check(&self, _shape: &KvShape) -> crate::Result<()> {
        Ok(())
    }
}

/// Where the keys of pages that leave the steady zone are kept; their values are always on the host.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum KeyStore {
    /// On the host, as they are.
    #[default]
    Full,
    /// On the GPU in low rank: only values go over the bus, and keys of pages that are fetched are rebuilt.
    LowRank(LowRank),
}

/// Keys in low rank (ShadowKV, arXiv 2410.21465): of each layer an orthonormal basis of `rank` vectors for the keys of all KV heads side by
/// side, as they are before their rotary embedding, and the coefficients of each token. A key is rebuilt by its coefficients and its head's
/// part of the basis, and turned to its position.
///
/// The basis is the best one for the prompt's keys, all of them; where those have fewer dimensions than the rank, it is filled up with axes.
/// Tokens that are generated later get coefficients in the same basis when they leave the steady zone, so what of their keys lies outside of it
/// is lost; the published code never fetches them at all. Pages that leave the steady zone have their keys replaced by the rebuilt ones
/// then, so what a step reads does not depend on which pages were evicted. Keys in the steady zone, and those that summaries are made of, are
/// as they came.
#[derive(Clone, Debug, PartialEq)]
pub struct LowRank {
    /// Vectors of a layer's basis: from 1 to the KV heads times the head width, with which nothing is lost but rounding.
    pub rank: usize,
    /// How keys are turned.
    pub rotary: Arc<Rotary>,
}

/// How far the queries of a row reach.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Reach {
    /// What the method selects.
    #[default]
    Selected,
    /// All partitions, whatever the budget: a layer or a head that must be dense.
    Everything,
    /// The steady zone alone: a head that needs no more.
    Steady,
}

/// How a partition's keys become its summary.
#[derive(Clone, Copy, Debug)]
pub enum Index<'a> {
    /// No summaries.
    Nothing,
    /// The mean of the partition's rotated keys, `head_dim` wide (ShadowKV's landmark).
    MeanKey,
    /// Of each channel of the partition's rotated keys the least, then of each the greatest: `[2, head_dim]` (Quest's page
    /// metadata).
    KeyBounds,
    /// Tokens with like keys are put together, in the partitions of [`PartitionKind::Cluster`], by k-means as RetroInfer has it: see
    /// [`cluster`](crate::backend::cpu::cluster()). The summary is the mean key; beside it there are the mean value and the number of tokens.
    Clusters,
    /// The method's own operator.
    Custom(&'a dyn Summarize),
}

impl Index<'_> {
    /// Elements of a summary; 0 without an Index.
    pub fn width(&self, head_dim: usize) -> usize {
        match self {
            Self::Nothing => 0,
            Self::MeanKey | Self::Clusters => head_dim,
            Self::KeyBounds => 2 * head_dim,
            Self::Custom(operator) => operator.width(head_dim),
        }
    }
}

/// Partitions that every step reads, whatever its queries: chosen once for each row, when the prompt is indexed, of those that the
/// prompt indexes. Generated partitions never become such ones.
///
/// They are read beside the steady zone and beside the budget's best of the other partitions: they do not count in the budget, but
/// they do in the [mandatory pages](crate::memory::RowPlan::mandatory_pages). They keep their summaries, but the softmax of the scores is
/// over the others alone. Unlike the steady zone they lie in the cache, so each is fetched once and then touched by
/// every step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Always {
    /// None.
    Nothing,
    /// Those whose mean key stands least for their keys (ShadowKV, arXiv 2410.21465): the `partitions` with the least cosine between
    /// any of their keys and the mean of them, ties to the lower id. A prompt that indexes no more than that has all of them read.
    Outliers {
        /// How many of each row.
        partitions: usize,
    },
}

impl Always {
    /// The most partitions of a row that every step reads.
    pub fn partitions(&self) -> usize {
        match *self {
            Self::Nothing => 0,
            Self::Outliers { partitions } => partitions,
        }
    }
}

/// A method's own Index.
pub trait Summarize: fmt::Debug + Send + Sync {
    /// Elements of a summary.
    fn width(&self, head_dim: usize) -> usize;

    /// Writes the summary of a partition.
    fn summarize(&self, partition: &Partition<'_>, summary: &mut [f32]);

    /// The same on NVIDIA GPUs, for a backend of these sizes; `None`, as by default, for an operator that runs on the CPU alone, which the cuda
    /// backend refuses. See [`operators`](crate::backend::cuda::operators).
    ///
    /// # Errors
    /// Sizes that its kernels do not have, as [`Error::UnsupportedOnGpu`](crate::Error::UnsupportedOnGpu).
    #[cfg(all(feature = "cuda", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
    fn on_gpu<'a>(&'a self, _sizes: &OperatorSizes) -> crate::Result<Option<LoadIndex<'a>>> {
        Ok(None)
    }
}

/// Which of a request's rows something belongs to; methods with weights have others for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The layer.
    pub layer: usize,
    /// The KV head within it.
    pub kv_head: usize,
}

/// What a [`Summarize`] works from: one partition of one row.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Partition<'a> {
    /// The row.
    pub place: Place,
    /// The position of the first token in the sequence.
    pub first_token: usize,
    /// Elements of one key.
    pub head_dim: usize,
    /// Rotated keys, `[tokens, head_dim]`, as pages store them.
    pub keys: &'a [f32],
}

/// How a query picks partitions.
#[derive(Clone, Copy, Debug)]
pub enum Select<'a> {
    /// None: only the steady zone is read.
    Nothing,
    /// All of them.
    Everything,
    /// The best ones by summary: each query head scores all partitions, the heads of a GQA group are merged, and the largest values
    /// win, ties to the lower id.
    TopK {
        /// What a query head makes of a summary.
        score: PartitionScore,
        /// How the group's heads become one score.
        merge: GroupMerge,
        /// How many tokens are selected, besides those that are [always](Method::always) read.
        budget: Budget,
    },
    /// The method's own operator.
    Custom {
        /// Picks the partitions.
        picker: &'a dyn Pick,
        /// The most tokens that it picks.
        budget: Budget,
    },
}

impl Select<'_> {
    /// The budget, where there is one.
    pub fn budget(&self) -> Option<Budget> {
        match self {
            Self::TopK { budget, .. } | Self::Custom { budget, .. } => Some(*budget),
            Self::Nothing | Self::Everything => None,
        }
    }
}

/// How a query head scores a partition by its summary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PartitionScore {
    /// The softmax, over all of the row's partitions that can be selected, of the dot products with the summaries divided by
    /// sqrt(head_dim). Reads summaries of `head_dim` elements.
    DotProduct,
    /// The greatest dot product that a key within the summary's bounds could have: the sum over the channels of
    /// `max(q * least, q * greatest)` (Quest, arXiv 2406.10774). It is merged as it is, with neither scale nor softmax. Reads summaries
    /// of `[2, head_dim]` elements.
    Bound,
}

impl PartitionScore {
    /// Elements of the summaries that it reads.
    pub fn summary_width(self, head_dim: usize) -> usize {
        match self {
            Self::DotProduct => head_dim,
            Self::Bound => 2 * head_dim,
        }
    }
}

/// How the scores of the query heads that share a KV head become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupMerge {
    /// The largest (ShadowKV).
    Max,
    /// The sum (RetroInfer).
    Sum,
    /// The mean: orders as the sum does, but stays between the heads' scores.
    Mean,
}

impl FromStr for GroupMerge {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.to_lowercase().as_str() {
            "max" => Ok(Self::Max),
            "sum" => Ok(Self::Sum),
            "mean" => Ok(Self::Mean),
            _ => Err("expected max, sum or mean".to_owned()),
        }
    }
}

/// A method's own Select.
pub trait Pick: fmt::Debug + Send + Sync {
    /// Appends to `ids` the partitions to read, of at least one candidate: ascending, each once, within `candidates.ids()`, and at most
    /// `candidates.limit` of them.
    fn pick(&self, candidates: &Candidates<'_>, ids: &mut Vec<u32>);

    /// The same on NVIDIA GPUs, for a backend of these sizes; `None`, as by default, for an operator that runs on the CPU alone, which the cuda
    /// backend refuses. See [`operators`](crate::backend::cuda::operators).
    ///
    /// # Errors
    /// Sizes that its kernels do not have, as [`Error::UnsupportedOnGpu`](crate::Error::UnsupportedOnGpu).
    #[cfg(all(feature = "cuda", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
    fn on_gpu<'a>(&'a self, _sizes: &OperatorSizes) -> crate::Result<Option<LoadSelect<'a>>> {
        Ok(None)
    }
}

/// What a [`Pick`] chooses from: one row and the queries that read it.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Candidates<'a> {
    /// The row.
    pub place: Place,
    /// Rotated queries of the group, `[group, head_dim]`.
    pub queries: &'a [f32],
    /// Their position in the sequence: that of its last token.
    pub position: usize,
    /// Elements of one query.
    pub head_dim: usize,
    /// Summaries, `[partitions, width]`; empty without an Index.
    pub summaries: &'a [f32],
    /// The id of the first partition; the others follow it.
    pub first: u32,
    /// Partitions to choose from.
    pub count: usize,
    /// The most that may be chosen.
    pub limit: usize,
}

impl Candidates<'_> {
    /// The ids that may be chosen.
    pub fn ids(&self) -> Range<u32> {
        self.first..self.first + self.count as u32
    }
}
