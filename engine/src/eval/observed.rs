use std::collections::HashMap;
use std::time::Instant;

use spinkv::backend::cpu::CpuBackend;
use spinkv::backend::cpu::math::dot;
use spinkv::backend::{Backend, PromptChunk, Step};
use spinkv::memory::{MemoryUsage, RequestPlan};
use spinkv::pipeline::{Counters, RequestId};
use spinkv::{KvConfig, Result};

use super::Recall;

/// The CPU backend, and beside it each request's keys, from which every decode step's true attention follows:
///
/// ```text
/// recall = sum over pages read of exp(q . k / sqrt(head_dim)) / the same sum over all tokens
/// ```
///
/// for each query head; added up over heads, layers, requests and steps. What is read is taken from the pages themselves, so it does not
/// matter how a method orders tokens on them. Estimates of what was not read count as not read.
#[derive(Debug)]
pub struct Observed {
    inner: CpuBackend,
    /// All keys of each request's layers, `[tokens, kv_heads, head_dim]`, as pages store them.
    keys: HashMap<RequestId, Vec<Vec<f32>>>,
    recall: Option<Recall>,
}

impl Observed {
    /// Watches `inner`, or, without `recall`, only passes on to it.
    pub fn new(inner: CpuBackend, recall: bool) -> Self {
        Self { inner, keys: HashMap::new(), recall: recall.then(Recall::default) }
    }

    /// What was added up since the last call; `None` if it is not watched.
    pub fn take_recall(&mut self) -> Option<Recall> {
        self.recall.as_mut().map(std::mem::take)
    }

    fn observe(&mut self, step: &Step<'_>, queries: &[f32]) {
        let start = Instant::now();
        let Self { inner, keys, recall: Some(recall) } = self else { return };
        let shape = *inner.config().shape();
        let layout = *inner.config().layout();
        let (head_dim, group, stride) = (shape.head_dim, shape.group(), shape.kv_heads * shape.head_dim);
        let scale = 1.0 / (head_dim as f32).sqrt();
        let mut page_keys = vec![0.0; layout.page_tokens() * head_dim];
        for (entry, queries) in step.entries.iter().zip(queries.chunks_exact(shape.query_heads * head_dim)) {
            let all = &keys[&entry.request][step.layer];
            for (kv_head, queries) in queries.chunks_exact(group * head_dim).enumerate() {
                let of_all = || all[kv_head * head_dim..].chunks(stride).map(|token| &token[..head_dim]);
                let mut read = Vec::new();
                for (page, tokens) in inner.read_pages(entry.request, step.layer, kv_head) {
                    let page_keys = &mut page_keys[..tokens * head_dim];
                    layout.read_keys(page, page_keys);
                    read.extend_from_slice(page_keys);
                }
                recall.read_tokens += (read.len() / head_dim) as u64;
                recall.rows += 1;
                for query in queries.chunks_exact(head_dim) {
                    let logits: Vec<f32> = of_all().map(|key| dot(query, key) * scale).collect();
                    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    let weight = |logit: f32| f64::from(logit - highest).exp();
                    let total: f64 = logits.iter().map(|logit| weight(*logit)).sum();
                    let read = read.chunks_exact(head_dim).map(|key| weight(dot(query, key) * scale));
                    recall.share += read.sum::<f64>() / total;
                    recall.heads += 1;
                }
            }
        }
        recall.time += start.elapsed();
    }
}

impl Backend for Observed {
    type Tensor = [f32];

    fn config(&self) -> &KvConfig {
        self.inner.config()
    }

    fn elements(tensor: &[f32]) -> usize {
        CpuBackend::elements(tensor)
    }

    fn admit(&mut self, request: RequestId, plan: RequestPlan) -> Result<()> {
        self.inner.admit(request, plan)?;
        self.keys.insert(request, vec![Vec::new(); self.config().shape().layers]);
        Ok(())
    }

    fn plan(&self, request: RequestId) -> Option<&RequestPlan> {
        self.inner.plan(request)
    }

    fn prepare(&mut self, step: &Step<'_>) -> Result<()> {
        self.inner.prepare(step)
    }

    fn release(&mut self, request: RequestId) {
        self.keys.remove(&request);
        self.inner.release(request);
    }

    fn index(&mut self, step: &Step<'_>, keys: &[f32], values: &[f32]) -> Result<()> {
        self.inner.index(step, keys, values)
    }

    fn offload(&mut self, step: &Step<'_>, keys: &[f32], values: &[f32]) -> Result<()> {
        self.inner.offload(step, keys, values)?;
        if self.recall.is_some() {
            let (shape, dtype) = (*self.config().shape(), self.config().layout().dtype());
            let mut first = 0;
            for entry in step.entries {
                let new = entry.new * shape.kv_heads * shape.head_dim;
                let layers = self.keys.get_mut(&entry.request).expect("an admitted request");
                layers[step.layer].extend(keys[first..][..new].iter().map(|element| dtype.round(*element)));
                first += new;
            }
        }
        Ok(())
    }

    fn select(&mut self, step: &Step<'_>, queries: &[f32]) -> Result<()> {
        self.inner.select(step, queries)
    }

    fn retrieve(&mut self, step: &Step<'_>) -> Result<()> {
        self.inner.retrieve(step)
    }

    fn attend(&mut self, step: &Step<'_>, queries: &[f32], out: &mut [f32]) -> Result<()> {
        self.inner.attend(step, queries, out)?;
        self.observe(step, queries);
        Ok(())
    }

    fn attend_prompt(
        &mut self,
        chunk: &PromptChunk,
        queries: &[f32],
        keys: &[f32],
        values: &[f32],
        out: &mut [f32],
    ) -> Result<()> {
        self.inner.attend_prompt(chunk, queries, keys, values, out)
    }

    fn counters(&self) -> Counters {
        self.inner.counters()
    }

    fn usage(&self) -> MemoryUsage {
        self.inner.usage()
    }
}
