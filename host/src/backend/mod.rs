//! Where the stages run.
//!
//! A [`Backend`] owns the KV of all admitted requests on both tiers, and the tables. The
//! [`Pipeline`](crate::pipeline::Pipeline) calls its stages in order and keeps no data of its own, so a backend
//! whose tables live on a GPU takes every decision of a step there.

pub mod cpu;
#[cfg(all(feature = "cuda", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
pub mod cuda;

use crate::memory::{MemoryUsage, PrefixUsage, RequestPlan};
use crate::pipeline::{Counters, RequestId};
use crate::{Error, KvConfig, Result};

/// One layer of a step, for every request that takes part.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// The layer.
    pub layer: usize,
    /// The requests, each at most once; tensors hold their tokens in this order.
    pub entries: &'a [StepEntry],
}

/// What a step does for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepKind {
    /// Takes in tokens of the prompt; what its last query selects warms the cache.
    Prompt,
    /// Generates from one token.
    Decode,
}

/// One request's part in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepEntry {
    /// The request.
    pub request: RequestId,
    /// What the step does for it.
    pub kind: StepKind,
    /// Tokens that it holds before the step.
    pub before: usize,
    /// Tokens that it gains.
    pub new: usize,
    /// Queries that it has in the step's query tensor: those of its last `queries` new tokens, at least 1.
    pub queries: usize,
}

impl StepEntry {
    /// Tokens that it holds after the step.
    pub fn after(&self) -> usize {
        self.before + self.new
    }
}

/// A run of a prompt's queries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PromptChunk {
    /// The position of the first query.
    pub first: usize,
    /// Queries of the chunk.
    pub tokens: usize,
    /// Tokens of the whole prompt.
    pub context: usize,
}

/// The stages of a step, and the memory that they work on.
///
/// The caller keeps the order prepare, index, offload, select, retrieve, attend within a layer, checks the lengths of
/// all tensors and names only admitted requests. Layouts are those of the [crate].
pub trait Backend {
    /// Activations in the memory that the backend computes in: `[f32]` on the CPU.
    type Tensor: ?Sized;

    /// What the backend was made for.
    fn config(&self) -> &KvConfig;

    /// Elements of a tensor.
    fn elements(tensor: &Self::Tensor) -> usize;

    /// Admits a request and sets its pages aside. Buffering, its own and that of others, is shared out anew: see
    /// [`share_out`](crate::memory::share_out).
    ///
    /// # Errors
    /// [`Error::OutOfGpuPages`], [`Error::OutOfGpuMemory`], [`Error::OutOfHostMemory`], [`Error::AllocationFailed`];
    /// nothing is then changed.
    fn admit(&mut self, request: RequestId, plan: RequestPlan) -> Result<()>;

    /// What an admitted request may hold, with the buffering that it has now.
    fn plan(&self, request: RequestId) -> Option<&RequestPlan>;

    /// Makes room for the tokens of a step, before its first stage: segments, summaries and host slabs grow with
    /// the context.
    ///
    /// # Errors
    /// [`Error::AllocationFailed`]; nothing is then changed, and the step may be tried again.
    fn prepare(&mut self, step: &Step<'_>) -> Result<()>;

    /// Frees what a request holds; what a transfer still touches, when that is complete.
    fn release(&mut self, request: RequestId);

    /// Takes a request's cache away for others, between two steps: what is left is on the host, and in steady pages, tables and summaries. One without a cache
    /// leaves the GPU's pages as a whole.
    ///
    /// # Errors
    /// [`Error::ParkingUnsupported`] of a backend that does not do it, or of a request without a cache whose host pages are not what the GPU has; nothing is then
    /// changed.
    fn park(&mut self, request: RequestId) -> Result<()> {
        let _ = request;
        Err(Error::ParkingUnsupported)
    }

    /// Gives a parked request a cache again, an empty one, or all its pages. Buffering is shared out anew.
    ///
    /// # Errors
    /// As for [`admit`](Self::admit); it is then still parked.
    fn resume(&mut self, request: RequestId) -> Result<()> {
        let _ = request;
        Err(Error::ParkingUnsupported)
    }

    /// Tokens of the blocks in which prompts share host pages; `None` where they share none.
    fn prefix_block(&self) -> Option<usize> {
        None
    }

    /// Gives an admitted request, before its first layer, the host pages that are there of the beginning of `prompt`, as
    /// [`PrefixCache::share`](crate::memory::PrefixCache::share) finds them, and returns their tokens. The request is charged as if it shared nothing.
    ///
    /// # Errors
    /// Backend failures; nothing is then changed.
    fn share_prefix(&mut self, request: RequestId, prompt: &[u32], unit: usize) -> Result<usize> {
        let _ = (request, prompt, unit);
        Ok(0)
    }

    /// Completes the keys and values of a layer of a prompt, `[tokens, kv_heads, head_dim]`, where prompts share pages: the first `prefix` tokens'
    /// are read from the request's host pages, the others are rounded to what pages store, so that it makes no difference whose are read.
    ///
    /// # Errors
    /// Backend failures.
    fn fill_prefix(
        &mut self,
        request: RequestId,
        layer: usize,
        prefix: usize,
        keys: &mut Self::Tensor,
        values: &mut Self::Tensor,
    ) -> Result<()> {
        let _ = (request, layer, prefix, keys, values);
        Ok(())
    }

    /// Keeps the host pages of a prompt that has passed through all layers for others, as far as they are complete.
    fn keep_prefix(&mut self, request: RequestId, prompt: &[u32]) {
        let _ = (request, prompt);
    }

    /// What is kept of prompts; `None` where they share no pages.
    fn prefixes(&self) -> Option<PrefixUsage> {
        None
    }

    /// Summarises the partitions that leave the steady zone in this step. Their keys are in steady pages or
    /// among the new `keys`, and count as pages store them; so do the values that clusters have means of.
    ///
    /// # Errors
    /// Backend failures; the step's requests are then unusable.
    fn index(&mut self, step: &Step<'_>, keys: &Self::Tensor, values: &Self::Tensor) -> Result<()>;

    /// Stores the new keys and values: pages that fill up go to the host, pages of partitions that left the
    /// steady zone go to the cache, the rest stay steady.
    ///
    /// # Errors
    /// As for [`index`](Self::index).
    fn offload(&mut self, step: &Step<'_>, keys: &Self::Tensor, values: &Self::Tensor) -> Result<()>;

    /// Picks each row's partitions for the entry's last query.
    ///
    /// # Errors
    /// [`Error::InvalidSelection`] from a method's own Select; else as for [`index`](Self::index).
    fn select(&mut self, step: &Step<'_>, queries: &Self::Tensor) -> Result<()>;

    /// Makes the selected pages resident and lists each row's pages for attention.
    ///
    /// # Errors
    /// As for [`index`](Self::index).
    fn retrieve(&mut self, step: &Step<'_>) -> Result<()>;

    /// Attention of the entries' queries, one each, over the pages listed by [`retrieve`](Self::retrieve), in ascending
    /// token order.
    ///
    /// # Errors
    /// As for [`index`](Self::index).
    fn attend(&mut self, step: &Step<'_>, queries: &Self::Tensor, out: &mut Self::Tensor) -> Result<()>;

    /// Dense causal attention of a run of a prompt's queries over its unrounded keys and values,
    /// `[context, kv_heads, head_dim]`.
    ///
    /// # Errors
    /// As for [`index`](Self::index).
    fn attend_prompt(
        &mut self,
        chunk: &PromptChunk,
        queries: &Self::Tensor,
        keys: &Self::Tensor,
        values: &Self::Tensor,
        out: &mut Self::Tensor,
    ) -> Result<()>;

    /// What happened to pages so far.
    fn counters(&self) -> Counters;

    /// Bytes in use now.
    fn usage(&self) -> MemoryUsage;
}

/// The backends of this crate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackendKind {
    /// The reference, on the CPU.
    Cpu,
    /// NVIDIA GPUs.
    #[cfg(all(feature = "cuda", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
    Cuda,
}

impl BackendKind {
    /// The backend of a name, as users give it. Whether the machine has what it needs is another question.
    ///
    /// # Errors
    /// [`Error::BackendNotBuilt`] for one that this build lacks, [`Error::UnknownBackend`] for any other.
    pub fn by_name(name: &str) -> Result<Self> {
        match name {
            "cpu" => Ok(Self::Cpu),
            #[cfg(all(
                feature = "cuda",
                target_os = "linux",
                any(target_arch = "x86_64", target_arch = "aarch64")
            ))]
            "cuda" => Ok(Self::Cuda),
            #[cfg(not(all(
                feature = "cuda",
                target_os = "linux",
                any(target_arch = "x86_64", target_arch = "aarch64")
            )))]
            "cuda" => Err(Error::BackendNotBuilt { backend: name.to_owned(), built: vec!["cpu"] }),
            _ => Err(Error::UnknownBackend { backend: name.to_owned(), known: vec!["cpu", "cuda"] }),
        }
    }
}
