use std::ops::Range;
use std::sync::Arc;

use spinkv::backend::cuda::Bus;
use spinkv::backend::cuda::driver::{DeviceBuffer, Event, Priority, Stream};
use spinkv::memory::Word;

use super::WeightSizes;
use super::activations::{Activations, KeysValues};
use super::model::CudaModel;
use super::parts::Parts;
use super::pass::StepPass;
use super::product::{BlasUse, Products};
use crate::error::Result;

/// Whether a step's Retrieve is overlapped with its compute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Overlap {
    /// None: Attention waits for all pages of its layer.
    Off,
    /// Attention begins with the pages that are there, while the others come.
    #[default]
    Attention,
    /// A batch is taken through the step as two halves, each on a stream of its own, whose copies take turns: while one half's pages come the other computes. Both read all weights, so it
    /// is for large batches whose pages take longer than the weights. Smaller ones, those whose requests are resident, and all of a model over several GPUs
    /// are taken as one.
    Halves,
}

/// What the second half of a batch has of its own. The rest are parts of what the whole batch has.
#[derive(Debug)]
pub(super) struct SecondHalf {
    stream: Arc<Stream>,
    products: Arc<Products>,
    ids: DeviceBuffer<u32>,
    likeliest: DeviceBuffer<u32>,
    greatest: DeviceBuffer<u64>,
    arrivals: DeviceBuffer<u32>,
    begins: Event,
    done: Event,
    /// Where both halves' copies go.
    bus: Stream,
    /// Of either half: when its copies are known, and when they are made.
    copies: [[Event; 2]; 2],
}

impl SecondHalf {
    fn new(parts: &Parts, sizes: &WeightSizes, requests: usize, blas: BlasUse) -> Result<Self> {
        let context = parts.stream.context();
        let stream = Arc::new(Stream::new(context)?);
        let event = || Event::untimed(context);
        Ok(Self {
            products: Arc::new(Products::new(stream.clone(), parts.kernels.clone(), sizes, blas)?),
            ids: DeviceBuffer::zeroed(&stream, requests)?,
            likeliest: DeviceBuffer::zeroed(&stream, requests)?,
            greatest: DeviceBuffer::zeroed(&stream, requests)?,
            arrivals: DeviceBuffer::zeroed(&stream, requests)?,
            begins: event()?,
            done: event()?,
            bus: Stream::with_priority(context, Priority::High)?,
            copies: [[event()?, event()?], [event()?, event()?]],
            stream,
        })
    }

    /// Bytes.
    pub fn bytes(&self) -> u64 {
        self.products.bytes()
    }
}

impl CudaModel {
    /// From now on steps overlap Retrieve as `overlap` says. Results are those of the step as a whole: exactly where both multiply by the same kernels (up
    /// to 16 requests, and without cuBLASLt), else up to the rounding of products of other sizes.
    ///
    /// # Errors
    /// Out of GPU memory.
    pub fn set_overlap(&mut self, overlap: Overlap) -> Result<()> {
        if overlap == self.overlap {
            return Ok(());
        }
        self.parts.stream.synchronize()?;
        self.graphs.clear();
        let requests = self.pipeline.backend().capacity();
        let make = || SecondHalf::new(&self.parts, self.weights.sizes(), requests, self.blas);
        // Sums with other ranks are of one order.
        let in_halves = overlap == Overlap::Halves && self.parts.rank.is_none();
        self.second = in_halves.then(make).transpose()?;
        self.pipeline.backend_mut().attend_beside_copies(overlap != Overlap::Off);
        self.overlap = overlap;
        Ok(())
    }

    /// Whether steps of a batch that is not resident are taken as two halves.
    pub fn has_halves(&self, batch: usize) -> bool {
        self.half_of(batch, false).is_some()
    }

    /// How many requests of a step's batch its first half has; `None` where steps are taken as one.
    pub(super) fn half_of(&self, batch: usize, resident: bool) -> Option<usize> {
        self.second.as_ref().filter(|_| !resident)?;
        self.pipeline.backend().half_of(batch)
    }

    /// Enqueues the launches of a step as two halves, the first of `half` requests.
    pub(super) fn launch_halves(&self, batch: usize, half: usize, rehearsed: bool) -> Result<()> {
        let second = self.second.as_ref().expect("who has halves has a second one");
        let (whole, sizes) = (&self.parts, self.weights.sizes());
        second.begins.record(&whole.stream)?;
        second.stream.wait(&second.begins)?;
        second.ids.copy_from(&second.stream, 0, &whole.ids, half, batch - half)?;
        let [first, rest] = [0..half, half..batch];
        let parts = [whole.half(sizes, first.clone(), None)?, whole.half(sizes, rest.clone(), Some(second))?];
        let halves = [(first, &parts[0]), (rest, &parts[1])];
        let passes =
            halves.each_ref().map(|(requests, parts)| StepPass::begin(self, parts, requests.clone()));
        let [first, rest] = passes;
        let passes = [first?, rest?];
        let backend = self.pipeline.backend();
        for layer in 0..self.weights.layers.len() {
            for (number, ((requests, parts), pass)) in halves.iter().zip(&passes).enumerate() {
                pass.project(layer)?;
                if !rehearsed {
                    let [ready, fetched] = &second.copies[number];
                    let bus = Bus { stream: &second.bus, ready, fetched };
                    // SAFETY: the step begins before the graph is launched; the halves part its requests, and each has its own tensors and stream.
                    unsafe {
                        backend.launch_half(layer, requests.clone(), &parts.stream, &pass.tensors(), &bus)
                    }?;
                }
                pass.finish(layer)?;
            }
        }
        passes.iter().try_for_each(StepPass::end)?;
        whole.likeliest.copy_from(&second.stream, half, &second.likeliest, 0, batch - half)?;
        second.done.record(&second.stream)?;
        Ok(whole.stream.wait(&second.done)?)
    }
}

impl Parts {
    /// Those of some of a step's requests; the same memory, but for what a second half has of its own. Of prompts there is nothing.
    fn half(&self, sizes: &WeightSizes, requests: Range<usize>, own: Option<&SecondHalf>) -> Result<Self> {
        let floats = |buffer: &DeviceBuffer<f32>, width: usize| {
            buffer.part(requests.start * width..requests.end * width)
        };
        let (count, none) = (requests.len(), 0..0);
        let (ids, likeliest, greatest, arrivals) = match own {
            Some(own) => (&own.ids, &own.likeliest, &own.greatest, &own.arrivals),
            None => (&self.ids, &self.likeliest, &self.greatest, &self.arrivals),
        };
        let nothing = || self.step_kv.of(sizes, none.clone());
        Ok(Self {
            stream: own.map_or(&self.stream, |own| &own.stream).clone(),
            products: own.map_or(&self.products, |own| &own.products).clone(),
            rank: None,
            kernels: self.kernels.clone(),
            frequencies: self.frequencies.part(0..self.frequencies.len())?,
            magnitude: self.magnitude,
            eps: self.eps,
            query_heads: self.query_heads,
            kv_heads: self.kv_heads,
            ids: ids.part(0..count)?,
            residual: floats(&self.residual, sizes.hidden)?,
            logits: floats(&self.logits, sizes.vocab)?,
            draws: self.draws.part(none.clone())?,
            likeliest: likeliest.part(0..count)?,
            greatest: greatest.part(0..count)?,
            arrivals: arrivals.part(0..count)?,
            step: self.step.of(sizes, requests.clone())?,
            step_kv: self.step_kv.of(sizes, requests.clone())?,
            prompt_ids: self.prompt_ids.part(none.clone())?,
            prompt_residual: self.prompt_residual.part(none.clone())?,
            chunk: self.chunk.of(sizes, none.clone())?,
            chunk_tokens: 0,
            prompt_kv: [nothing()?, nothing()?],
            began: Event::untimed(self.stream.context())?,
            layer_done: [Event::untimed(self.stream.context())?, Event::untimed(self.stream.context())?],
        })
    }
}

/// Words of `tokens` tokens of a width in elements.
pub(super) fn words(
    buffer: &DeviceBuffer<Word>,
    tokens: &Range<usize>,
    width: usize,
) -> Result<DeviceBuffer<Word>> {
    let words = width / spinkv_kernels::abi::WORD_ELEMENTS;
    let range = tokens.start * words..tokens.end * words;
    // What is not there has no parts.
    Ok(buffer.part(if buffer.is_empty() { 0..0 } else { range })?)
}

impl Activations {
    /// Those of some tokens; the same memory.
    fn of(&self, sizes: &WeightSizes, tokens: Range<usize>) -> Result<Self> {
        Ok(Self {
            normed: words(&self.normed, &tokens, sizes.hidden)?,
            projected: words(&self.projected, &tokens, sizes.qkv()[0])?,
            queries: words(&self.queries, &tokens, sizes.queries)?,
            attended: words(&self.attended, &tokens, sizes.queries)?,
            gate_up: words(&self.gate_up, &tokens, 2 * sizes.mlp)?,
            activated: words(&self.activated, &tokens, sizes.mlp)?,
        })
    }
}

impl KeysValues {
    fn of(&self, sizes: &WeightSizes, tokens: Range<usize>) -> Result<Self> {
        Ok(Self {
            keys: words(&self.keys, &tokens, sizes.keys)?,
            values: words(&self.values, &tokens, sizes.keys)?,
        })
    }
}
