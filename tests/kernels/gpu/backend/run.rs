use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::sync::Arc;

use half::bf16;
use libtest_mimic::Failed;
use spinkv::backend::cpu::{
    self, gate_key, gate_query, key_bounds, least_cosine, mean_key, score_partitions_beside, top_k_beside,
};
use spinkv::backend::cuda::driver::{DeviceBuffer, DriverError};
use spinkv::backend::cuda::{CudaBackend, CudaLimits};
use spinkv::gates::Gates;
use spinkv::memory::{HostLayout, KvDtype, MemoryUsage, PageLayout, Word};
use spinkv::pipeline::{
    Counters, GroupMerge, Index, Method, PartitionScore, Pipeline, Place, Reach, RequestId, Select,
};
use spinkv::{Error, KvConfig, KvShape};
use spinkv_tests::small::rotary;
use spinkv_tests::{Sequence, Style, dense_reference};

use super::super::{Machine, Outcome, ensure};

/// How far outputs may be from f64: the norm of the difference over that of the reference.
const TOLERANCE: f64 = 5e-3;

/// The same where keys are rebuilt: turned back, and as coefficients and bases, they were rounded to bf16, each some tenths of a percent.
const REBUILT: f64 = 2e-2;

/// What went wrong in a run.
#[derive(Debug)]
pub enum Wrong {
    /// A call was refused.
    Refused(Error),
    /// An output is not what it should be.
    Output(String),
}

impl From<Error> for Wrong {
    fn from(error: Error) -> Self {
        Self::Refused(error)
    }
}

impl From<DriverError> for Wrong {
    fn from(error: DriverError) -> Self {
        Self::Refused(error.into())
    }
}

impl From<Wrong> for Failed {
    fn from(wrong: Wrong) -> Self {
        match wrong {
            Wrong::Refused(error) => error.into(),
            Wrong::Output(what) => what.into(),
        }
    }
}

/// A sequence whose numbers bf16 has.
pub fn sequence(shape: KvShape, style: Style, tokens: usize, seed: u64) -> Sequence {
    let mut sequence = Sequence::new(shape, style, tokens.max(1), seed);
    for tensor in sequence.queries.iter_mut().chain(&mut sequence.keys).chain(&mut sequence.values).flatten()
    {
        *tensor = bf16::from_f32(*tensor).to_f32();
    }
    sequence
}

/// A sequence whose keys, before they are turned, lie in a space of `directions` dimensions but for the rounding of bf16.
pub fn in_directions(shape: KvShape, directions: usize, tokens: usize, seed: u64) -> Sequence {
    let mut sequence = sequence(shape, Style::Random, tokens, seed);
    let (width, rotary) = (shape.kv_heads * shape.head_dim, rotary(shape.head_dim));
    for (layer, keys) in sequence.keys.iter_mut().enumerate() {
        let basis = Sequence::new(shape, Style::Random, directions, 1000 + layer as u64).keys.swap_remove(0);
        let weight = (1.0 / directions as f32).sqrt();
        for (token, keys) in keys.chunks_exact_mut(width).enumerate() {
            let mut plain = vec![0.0; width];
            for (at, direction) in basis.chunks_exact(width).enumerate() {
                plain.iter_mut().zip(direction).for_each(|(sum, of)| *sum += weight * keys[at] * of);
            }
            plain.chunks_exact_mut(shape.head_dim).for_each(|head| rotary.turn(token, head));
            keys.iter_mut().zip(plain).for_each(|(key, plain)| *key = bf16::from_f32(plain).to_f32());
        }
    }
    sequence
}

/// A pipeline over the cuda backend; every output is compared.
pub struct Run<'a> {
    machine: &'a Machine,
    pub(super) pipeline: Pipeline<CudaBackend>,
    pub(super) sequences: HashMap<RequestId, Sequence>,
    /// Those that the method selects by, if it does by any.
    gates: Option<Arc<Gates>>,
    /// Where host pages are coded: the sequences with all full pages as their codes say, and the lengths of their prompts.
    coded: HashMap<RequestId, (Sequence, usize)>,
}

impl<'a> Run<'a> {
    pub fn new(
        machine: &'a Machine,
        shape: KvShape,
        page_tokens: usize,
        method: Arc<dyn Method>,
        limits: &CudaLimits,
    ) -> Result<Self, Wrong> {
        let layout = PageLayout::new(page_tokens, shape.head_dim, KvDtype::Bf16)?;
        Self::with_pages(machine, shape, layout.into(), method, limits)
    }

    /// The same with other pages on the host.
    pub fn with_pages(
        machine: &'a Machine,
        shape: KvShape,
        pages: HostLayout,
        method: Arc<dyn Method>,
        limits: &CudaLimits,
    ) -> Result<Self, Wrong> {
        let config = KvConfig::new(shape, pages, method)?;
        let backend = CudaBackend::new(&machine.context, config, limits)?;
        let pipeline = Pipeline::new(backend).with_buffering(limits.buffering);
        Ok(Self { machine, pipeline, sequences: HashMap::new(), gates: None, coded: HashMap::new() })
    }

    /// The same for a method that selects by `gates`.
    pub fn with_gates(self, gates: Arc<Gates>) -> Self {
        Self { gates: Some(gates), ..self }
    }

    /// A request whose prompt passes through all layers, in chunks of queries.
    pub fn start(&mut self, sequence: Sequence, prompt: usize) -> Result<RequestId, Wrong> {
        self.start_beside(sequence, prompt, &[])
    }

    /// The same with a step of `others` behind each layer of the prompt.
    pub fn start_beside(
        &mut self,
        sequence: Sequence,
        prompt: usize,
        others: &[RequestId],
    ) -> Result<RequestId, Wrong> {
        let request = self.pipeline.admit(sequence.tokens)?;
        if prompt > 0 {
            for layer in 0..sequence.shape.layers {
                self.prompt_layer(request, &sequence, layer, prompt, prompt)?;
                let ended = self.finished(others);
                let batch: Vec<_> = others.iter().filter(|other| !ended.contains(other)).copied().collect();
                if !batch.is_empty() {
                    self.step(&batch)?;
                }
            }
        }
        let pages = self.pipeline.config().host_layout();
        if pages.code().is_some() {
            self.coded.insert(request, (rounded(&sequence, &pages), prompt));
        }
        self.sequences.insert(request, sequence);
        self.check_always(request, prompt)?;
        Ok(request)
    }

    /// A request that is released in the middle of its prompt; whether it was admitted.
    pub fn cancel_in_prompt(&mut self, sequence: Sequence, prompt: usize) -> Result<bool, Wrong> {
        let request = match self.pipeline.admit(sequence.tokens) {
            Err(Error::OutOfGpuPages { .. } | Error::OutOfHostMemory { .. }) => return Ok(false),
            other => other?,
        };
        self.prompt_layer(request, &sequence, 0, prompt, prompt)?;
        self.prompt_layer(request, &sequence, 1, prompt, prompt / 2)?;
        self.pipeline.release(request);
        Ok(true)
    }

    /// `attended` of the `prompt` queries pass through a layer.
    fn prompt_layer(
        &mut self,
        request: RequestId,
        sequence: &Sequence,
        layer: usize,
        prompt: usize,
        attended: usize,
    ) -> Result<(), Wrong> {
        let keys = upload(self.machine, sequence.keys(layer, 0..prompt))?;
        let values = upload(self.machine, sequence.values(layer, 0..prompt))?;
        let expected = dense_reference(
            &sequence.shape,
            0,
            sequence.queries(layer, 0..attended),
            sequence.keys(layer, 0..prompt),
            sequence.values(layer, 0..prompt),
        );
        let stream = self.pipeline.backend().stream().clone();
        let mut prefill = self.pipeline.prefill(request, layer, prompt, &keys, &values)?;
        let width = sequence.shape.query_heads * sequence.shape.head_dim;
        let chunk = (prompt / 3 + 5).min(prompt);
        for first in (0..attended).step_by(chunk) {
            let tokens = first..attended.min(first + chunk);
            let queries = upload(self.machine, sequence.queries(layer, tokens.clone()))?;
            let mut out = poisoned(self.machine, queries.len())?;
            prefill.attend(tokens.len(), &queries, &mut out)?;
            let found = download(&stream, &out)?;
            let expected = &expected[tokens.start * width..tokens.end * width];
            close(&found, expected, TOLERANCE).map_err(|off| {
                Wrong::Output(format!("prompt of {prompt}, layer {layer}, {tokens:?}: {off}"))
            })?;
        }
        Ok(())
    }

    /// The next token of each request through all layers, layer by layer.
    pub fn step(&mut self, batch: &[RequestId]) -> Result<(), Wrong> {
        let KvShape { layers, kv_heads, query_heads, head_dim } = *self.pipeline.config().shape();
        for layer in 0..layers {
            let (mut queries, mut keys, mut values, mut tokens) = (vec![], vec![], vec![], vec![]);
            for request in batch {
                let (sequence, token) = (&self.sequences[request], self.pipeline.tokens(*request)?);
                queries.extend(sequence.queries(layer, token..token + 1));
                keys.extend(sequence.keys(layer, token..token + 1));
                values.extend(sequence.values(layer, token..token + 1));
                tokens.push(token);
            }
            let [queries, keys, values] = [queries, keys, values].map(|tensor| upload(self.machine, &tensor));
            let queries = queries?;
            let mut out = poisoned(self.machine, queries.len())?;
            self.pipeline.decode(layer, batch, &queries, &keys?, &values?, &mut out)?;
            let found = download(self.pipeline.backend().stream(), &out)?;
            let width = query_heads * head_dim;
            for (index, (request, token)) in batch.iter().zip(tokens).enumerate() {
                let off = |off| Wrong::Output(format!("{request:?}, layer {layer}, token {token}: {off}"));
                let found = &found[index * width..][..width];
                if self.pipeline.config().clusters() && !self.pipeline.backend().is_resident([*request]) {
                    let rows =
                        (0..kv_heads).map(|head| self.over_clusters(*request, layer, index, head, token));
                    close(found, &rows.collect::<Result<Vec<_>, Wrong>>()?.concat(), TOLERANCE)
                        .map_err(off)?;
                    continue;
                }
                let seen = (0..kv_heads)
                    .map(|kv_head| self.seen(*request, layer, index, kv_head, token))
                    .collect::<Result<Vec<_>, Wrong>>()?;
                let expected = self.read(*request, token + 1).attention(layer, token, &seen);
                let rebuilt = self.pipeline.config().low_rank().is_some();
                let tolerance = if rebuilt { REBUILT } else { TOLERANCE };
                close(found, &expected, tolerance).map_err(off)?;
            }
        }
        Ok(())
    }

    /// The sequence as it is read at a length: pages that are full as the host's codes say, if they are coded.
    fn read(&self, request: RequestId, tokens: usize) -> Cow<'_, Sequence> {
        let sequence = &self.sequences[&request];
        let Some((coded, _)) = self.coded.get(&request) else { return Cow::Borrowed(sequence) };
        let (config, mut read) = (self.pipeline.config(), coded.clone());
        let page_tokens = config.layout().page_tokens();
        let full = tokens / page_tokens * page_tokens * config.shape().kv_heads * config.shape().head_dim;
        for (to, from) in [(&mut read.keys, &sequence.keys), (&mut read.values, &sequence.values)] {
            to.iter_mut().zip(from).for_each(|(to, from)| to[full..].copy_from_slice(&from[full..]));
        }
        Cow::Owned(read)
    }

    /// The tokens that a row attended to in the layer that ran last: all but the partitions that were not selected.
    fn seen(
        &self,
        request: RequestId,
        layer: usize,
        index: usize,
        kv_head: usize,
        token: usize,
    ) -> Result<Vec<usize>, Wrong> {
        let (config, backend) = (self.pipeline.config(), self.pipeline.backend());
        let zones = config.zones(token + 1);
        let reach = config.reach(Place { layer, kv_head });
        let selected = match config.method().select() {
            _ if reach == Reach::Steady => Vec::new(),
            _ if reach == Reach::Everything => zones.retrievable.clone().collect(),
            Select::Everything => zones.retrievable.clone().collect(),
            Select::Nothing => Vec::new(),
            _ if backend.is_resident([request]) => zones.retrievable.clone().collect(),
            _ => {
                let ids = backend.selected(index, kv_head)?;
                let count = config.retrievable_partitions(token + 1).len();
                let budget = config.method().select().budget().expect("top-k has one");
                let always = backend.always(request, layer, kv_head)?;
                let limit = budget.partitions(token + 1, config.partition_tokens()) + always.len();
                let limit = limit.min(count);
                if ids.len() != limit {
                    return Err(Wrong::Output(format!("{ids:?} were selected, of {count} at most {limit}")));
                }
                if let Some(id) = always.iter().find(|id| !ids.contains(id)) {
                    return Err(Wrong::Output(format!("{ids:?} were selected, without {id}")));
                }
                self.check_selection(request, layer, kv_head, token, [&ids, &always])?;
                // A page that a token is on is read as a whole.
                let (tokens, page) = (config.partition_tokens(), config.layout().page_tokens());
                let first = |id: &u32| *id as usize * tokens / page * page;
                let end = |id: &u32| ((*id as usize + 1) * tokens).next_multiple_of(page);
                let read: BTreeSet<usize> = ids.iter().flat_map(|id| first(id)..end(id)).collect();
                read.into_iter().collect()
            }
        };
        let steady = (0..zones.retrievable.start).chain(zones.retrievable.end..token + 1);
        Ok(steady.chain(selected).collect())
    }

    /// The summaries of a row's `partitions` as the kernels of Index write them: the CPU's, rounded to bf16.
    fn summaries(
        &self,
        request: RequestId,
        layer: usize,
        kv_head: usize,
        partitions: Range<u32>,
    ) -> Vec<f32> {
        let config = self.pipeline.config();
        let mut summary = vec![0.0; config.summary_width()];
        let summarise = |id: u32| {
            let keys = self.keys(request, layer, kv_head, id);
            match (config.method().index(), &self.gates) {
                (_, Some(gates)) => {
                    let first = id as usize * config.partition_tokens();
                    gate_key(gates, Place { layer, kv_head }, first, &keys, &mut summary);
                }
                (Index::KeyBounds, None) => key_bounds(&keys, &mut summary),
                _ => mean_key(&keys, &mut summary),
            }
            summary.iter().map(|element| bf16::from_f32(*element).to_f32()).collect::<Vec<_>>()
        };
        partitions.flat_map(summarise).collect()
    }

    /// The keys of a partition of a row.
    fn keys(&self, request: RequestId, layer: usize, kv_head: usize, id: u32) -> Vec<f32> {
        let (config, mut sequence) = (self.pipeline.config(), &self.sequences[&request]);
        let KvShape { head_dim, .. } = *config.shape();
        let first = id as usize * config.partition_tokens();
        // What leaves the steady zone with a prompt is summarised as it came, and later out of its pages.
        if let Some((coded, prompt)) = self.coded.get(&request)
            && !config.retrievable_partitions(*prompt).contains(&id)
        {
            sequence = coded;
        }
        let of_token =
            |token: usize| &sequence.keys(layer, token..token + 1)[kv_head * head_dim..][..head_dim];
        (first..first + config.partition_tokens()).flat_map(of_token).copied().collect()
    }

    /// What every step of a request reads, after its prompt: of each row those that the CPU finds, but for partitions whose cosines
    /// differ by less than rounding can tell.
    fn check_always(&self, request: RequestId, prompt: usize) -> Result<(), Wrong> {
        let (config, backend) = (self.pipeline.config(), self.pipeline.backend());
        if config.clusters() {
            return Ok(());
        }
        let KvShape { layers, kv_heads, head_dim, .. } = *config.shape();
        let partitions = config.retrievable_partitions(prompt);
        let wanted = config.method().always().partitions().min(partitions.len());
        let wanted = if backend.is_resident([request]) { 0 } else { wanted };
        for (layer, kv_head) in (0..layers).flat_map(|layer| (0..kv_heads).map(move |head| (layer, head))) {
            let always = backend.always(request, layer, kv_head)?;
            let cosine = |id: u32| least_cosine(&self.keys(request, layer, kv_head, id), head_dim);
            let (mut taken, mut left) = (f32::NEG_INFINITY, f32::INFINITY);
            for id in partitions.clone() {
                if always.contains(&id) {
                    taken = taken.max(cosine(id));
                } else {
                    left = left.min(cosine(id));
                }
            }
            let stray = always.iter().any(|id| !partitions.contains(id));
            if always.len() != wanted || stray || wanted > 0 && taken > left + 1e-5 {
                return Err(Wrong::Output(format!(
                    "{request:?}, layer {layer}, KV head {kv_head}: {always:?} of {partitions:?} are outliers, {wanted} are wanted; \
                     the greatest cosine is {taken}, {left} was left"
                )));
            }
        }
        Ok(())
    }

    /// A selection against the CPU's Select from the same queries and summaries: beside those that are `always` read the same ids, but
    /// for partitions whose scores differ by less than rounding can tell.
    fn check_selection(
        &self,
        request: RequestId,
        layer: usize,
        kv_head: usize,
        token: usize,
        [ids, always]: [&[u32]; 2],
    ) -> Result<(), Wrong> {
        let (config, sequence) = (self.pipeline.config(), &self.sequences[&request]);
        let KvShape { kv_heads, query_heads, head_dim, .. } = *config.shape();
        let (group, partitions) = (query_heads / kv_heads, config.retrievable_partitions(token + 1));
        let queries = sequence.queries(layer, token..token + 1);
        let queries = &queries[kv_head * group * head_dim..][..group * head_dim];
        let summaries = self.summaries(request, layer, kv_head, partitions.clone());
        let mut scores = vec![0.0; partitions.len()];
        let marked = |at: u32| always.contains(&(at + partitions.start));
        let score = match (config.method().select(), &self.gates) {
            (Select::TopK { score, merge, .. }, _) => {
                score_partitions_beside(score, queries, &summaries, head_dim, merge, &marked, &mut scores);
                Some(score)
            }
            (_, Some(gates)) => {
                let (mut query, mut logits) = (vec![0.0; gates.rank()], scores.clone());
                gate_query(gates, Place { layer, kv_head }, token, queries, &mut query);
                let query: Vec<f32> = query.iter().map(|x| bf16::from_f32(*x).to_f32()).collect();
                cpu::score(&query, &summaries, gates.rank(), GroupMerge::Max, &mut scores, &mut logits);
                None
            }
            _ => return Ok(()),
        };
        let mut expected = Vec::new();
        top_k_beside(&scores, ids.len() - always.len(), &marked, &mut expected);
        let of = |id: u32| scores[(id - partitions.start) as usize];
        let best = expected.iter().filter(|at| !marked(**at));
        let least = best.map(|at| scores[*at as usize]).fold(f32::INFINITY, f32::min);
        let expected: Vec<u32> = expected.iter().map(|id| id + partitions.start).collect();
        let room = match score {
            Some(PartitionScore::DotProduct) => 5e-4 * least,
            // An element of a gate key or query may be rounded the other way.
            None => 2e-2 * least,
            // What is summed up may cancel.
            Some(PartitionScore::Bound) => {
                1e-5 * scores.iter().fold(0.0, |most: f32, score| most.max(score.abs()))
            }
        };
        let near = |id: &u32| (of(*id) - least).abs() <= room;
        let missed = expected.iter().filter(|id| !ids.contains(id) && !near(id));
        let extra = ids.iter().filter(|id| !expected.contains(id) && !near(id));
        match missed.chain(extra).next() {
            None => Ok(()),
            Some(id) => Err(Wrong::Output(format!(
                "{request:?}, layer {layer}, KV head {kv_head}, token {token}: {ids:?} were selected, {expected:?} by the CPU; \
                 partition {id} scores {}, the least {least}",
                of(*id)
            ))),
        }
    }

    /// Those of a batch that hold as many tokens as they may.
    pub fn finished(&self, batch: &[RequestId]) -> Vec<RequestId> {
        let full = |request: &&RequestId| {
            self.pipeline.tokens(**request).is_ok_and(|tokens| tokens == self.sequences[*request].tokens)
        };
        batch.iter().filter(full).copied().collect()
    }

    pub fn release(&mut self, request: RequestId) {
        self.pipeline.release(request);
        self.coded.remove(&request);
        self.sequences.remove(&request);
    }

    pub fn audit(&mut self, request: RequestId) -> Result<usize, Wrong> {
        Ok(self.pipeline.backend_mut().audit(request)?)
    }

    pub fn empty_caches(&mut self) -> Outcome {
        Ok(self.pipeline.backend_mut().empty_caches()?)
    }

    pub fn counters(&self) -> Counters {
        self.pipeline.counters()
    }

    /// Nothing is held on either tier.
    pub fn ensure_empty(&self) -> Outcome {
        let (backend, usage) = (self.pipeline.backend(), self.pipeline.usage());
        ensure(usage == MemoryUsage::default(), format!("{usage:?} is still held"))?;
        ensure(backend.is_empty(), "pages, segments, slabs or places are still held")
    }
}

/// The sequence with all its full pages as a host page says.
fn rounded(sequence: &Sequence, pages: &HostLayout) -> Sequence {
    let (mut sequence, layout) = (sequence.clone(), pages.page());
    let KvShape { layers, kv_heads, head_dim, .. } = sequence.shape;
    let tokens = layout.page_tokens();
    let mut page = vec![0; layout.page_words()];
    for (layer, kv_head, first) in (0..layers).flat_map(|layer| {
        let full = (0..sequence.tokens / tokens).map(move |page| page * tokens);
        (0..kv_heads).flat_map(move |head| full.clone().map(move |first| (layer, head, first)))
    }) {
        let at = |token: usize| ((first + token) * kv_heads + kv_head) * head_dim;
        let (keys, values) = (&mut sequence.keys[layer], &mut sequence.values[layer]);
        for token in 0..tokens {
            layout.write_token(
                &mut page,
                token,
                &keys[at(token)..][..head_dim],
                &values[at(token)..][..head_dim],
            );
        }
        pages.round(&mut page);
        for token in 0..tokens {
            layout.read_key(&page, token, &mut keys[at(token)..][..head_dim]);
            layout.read_value(&page, token, &mut values[at(token)..][..head_dim]);
        }
    }
    sequence
}

fn upload(machine: &Machine, elements: &[f32]) -> Result<DeviceBuffer<Word>, DriverError> {
    let elements: Vec<bf16> = elements.iter().map(|element| bf16::from_f32(*element)).collect();
    let words: Vec<Word> = bytemuck::pod_collect_to_vec(&elements);
    DeviceBuffer::from_slice(&machine.stream, &words)
}

/// NaNs.
fn poisoned(machine: &Machine, words: usize) -> Result<DeviceBuffer<Word>, DriverError> {
    DeviceBuffer::from_slice(&machine.stream, &vec![Word::MAX; words])
}

fn download(
    stream: &spinkv::backend::cuda::driver::Stream,
    tensor: &DeviceBuffer<Word>,
) -> Result<Vec<f32>, DriverError> {
    let words = tensor.to_vec(stream)?;
    let elements: &[bf16] = bytemuck::cast_slice(&words);
    Ok(elements.iter().map(|element| element.to_f32()).collect())
}

fn close(found: &[f32], expected: &[f64], tolerance: f64) -> Result<(), String> {
    let (mut off, mut norm) = (0.0, 0.0);
    for (found, expected) in found.iter().zip(expected) {
        off += (f64::from(*found) - expected).powi(2);
        norm += expected.powi(2);
    }
    let off = (off / norm).sqrt();
    // A NaN is never close.
    if off <= tolerance { Ok(()) } else { Err(format!("off by {off:e} of the norm")) }
}
