use std::collections::HashMap;
use std::sync::Arc;

use spinkv::backend::cpu::CpuBackend;
use spinkv::memory::{HostFormat, HostLayout, KvDtype, MemoryLimits, PageLayout};
use spinkv::pipeline::{DEFAULT_BUFFERING, Method, Pipeline, RequestId};
use spinkv::{KvConfig, KvShape, Result};

use crate::Sequence;

/// Outputs by layer, each `[tokens, query_heads, head_dim]`.
pub type Layers = Vec<Vec<f32>>;

/// What a pipeline is made of.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The attention shape.
    pub shape: KvShape,
    /// Tokens of a page.
    pub page_tokens: usize,
    /// How pages store elements.
    pub dtype: KvDtype,
    /// What the host holds of a page.
    pub format: HostFormat,
    /// The method.
    pub method: Arc<dyn Method>,
    /// Limits of both tiers.
    pub limits: MemoryLimits,
    /// Buffering pages for each mandatory one.
    pub buffering: f64,
}

impl Setup {
    /// Pages of `page_tokens` exact floats, no limits, default buffering.
    pub fn new(shape: KvShape, page_tokens: usize, method: impl Method + 'static) -> Self {
        Self {
            shape,
            page_tokens,
            dtype: KvDtype::F32,
            format: HostFormat::Full,
            method: Arc::new(method),
            limits: MemoryLimits::default(),
            buffering: DEFAULT_BUFFERING,
        }
    }

    /// A run without requests.
    ///
    /// # Panics
    /// If the parts do not fit together.
    pub fn start(&self) -> Run {
        let Self { shape, page_tokens, dtype, format, ref method, limits, buffering } = *self;
        let layout = PageLayout::new(page_tokens, shape.head_dim, dtype).expect("a valid layout");
        let pages = HostLayout::new(layout, format).expect("a layout with such codes");
        let config = KvConfig::new(shape, pages, method.clone()).expect("parts that fit together");
        let pipeline = Pipeline::new(CpuBackend::new(config, limits)).with_buffering(buffering);
        Run { pipeline, sequences: HashMap::new() }
    }
}

/// A pipeline and the sequences of its requests; takes each request on from the token that it is at.
///
/// Outputs are filled with NaNs before each call, so an element that was not written shows.
#[derive(Debug)]
pub struct Run {
    /// The pipeline.
    pub pipeline: Pipeline<CpuBackend>,
    sequences: HashMap<RequestId, Sequence>,
}

impl Run {
    /// Admits a request that may hold all of `sequence`.
    ///
    /// # Errors
    /// Those of [`Pipeline::admit`].
    pub fn admit(&mut self, sequence: &Sequence) -> Result<RequestId> {
        let request = self.pipeline.admit(sequence.tokens)?;
        self.sequences.insert(request, sequence.clone());
        Ok(request)
    }

    /// Admits a request and takes its first `prompt` tokens through all layers, as one chunk of queries; no
    /// prompt at all leaves it empty.
    ///
    /// # Panics
    /// If a call is refused.
    pub fn start(&mut self, sequence: &Sequence, prompt: usize) -> RequestId {
        let request = self.admit(sequence).expect("room for the request");
        if prompt > 0 {
            self.prompt(request, prompt, prompt).expect("a prompt");
        }
        request
    }

    /// Takes the first `tokens` tokens through all layers, `chunk` queries at a time.
    ///
    /// # Errors
    /// Those of [`Pipeline::prefill`] and of its layers.
    pub fn prompt(&mut self, request: RequestId, tokens: usize, chunk: usize) -> Result<Layers> {
        (0..self.pipeline.config().shape().layers)
            .map(|layer| self.prompt_layer(request, layer, tokens, chunk))
            .collect()
    }

    /// Takes the first `tokens` tokens through one layer, `chunk` queries at a time.
    ///
    /// # Errors
    /// Those of [`Pipeline::prefill`] and of its layers.
    pub fn prompt_layer(
        &mut self,
        request: RequestId,
        layer: usize,
        tokens: usize,
        chunk: usize,
    ) -> Result<Vec<f32>> {
        let sequence = &self.sequences[&request];
        let (keys, values) = (sequence.keys(layer, 0..tokens), sequence.values(layer, 0..tokens));
        let mut prefill = self.pipeline.prefill(request, layer, tokens, keys, values)?;
        let mut outputs = Vec::new();
        for first in (0..tokens).step_by(chunk) {
            let end = tokens.min(first + chunk);
            let queries = sequence.queries(layer, first..end);
            let mut out = vec![f32::NAN; queries.len()];
            prefill.attend(end - first, queries, &mut out)?;
            outputs.extend(out);
        }
        Ok(outputs)
    }

    /// Takes the next token of each request through all layers; outputs in the order of `batch`.
    ///
    /// # Errors
    /// Those of [`Pipeline::decode`].
    pub fn step(&mut self, batch: &[RequestId]) -> Result<Vec<Layers>> {
        let mut outputs = vec![Vec::new(); batch.len()];
        for layer in 0..self.pipeline.config().shape().layers {
            for (output, out) in outputs.iter_mut().zip(self.step_layer(batch, layer)?) {
                output.push(out);
            }
        }
        Ok(outputs)
    }

    /// Takes the next token of each request through one layer.
    ///
    /// # Errors
    /// Those of [`Pipeline::decode`].
    pub fn step_layer(&mut self, batch: &[RequestId], layer: usize) -> Result<Layers> {
        let (mut queries, mut keys, mut values) = (Vec::new(), Vec::new(), Vec::new());
        for request in batch {
            let (sequence, token) = (&self.sequences[request], self.pipeline.tokens(*request)?);
            queries.extend(sequence.queries(layer, token..token + 1));
            keys.extend(sequence.keys(layer, token..token + 1));
            values.extend(sequence.values(layer, token..token + 1));
        }
        let mut out = vec![f32::NAN; queries.len()];
        self.pipeline.decode(layer, batch, &queries, &keys, &values, &mut out)?;
        let width = self.pipeline.config().shape().query_heads * self.pipeline.config().shape().head_dim;
        Ok(out.chunks(width).map(<[f32]>::to_vec).collect())
    }

    /// Takes one request through `steps` tokens, alone; outputs by step.
    ///
    /// # Panics
    /// If a step is refused.
    pub fn generate(&mut self, request: RequestId, steps: usize) -> Vec<Layers> {
        (0..steps).map(|_| self.step(&[request]).expect("a step").remove(0)).collect()
    }

    /// The partitions that each row selected in its last step, `[layers, kv_heads]`.
    ///
    /// # Panics
    /// If the request is not admitted.
    pub fn selected(&self, request: RequestId) -> Vec<Vec<u32>> {
        self.rows()
            .map(|(layer, kv_head)| {
                let ids = self.pipeline.backend().selected(request, layer, kv_head);
                ids.expect("an admitted request").to_vec()
            })
            .collect()
    }

    /// Compares every cached page of a request with its host page, and returns how many there are.
    ///
    /// # Panics
    /// If one differs.
    pub fn audit(&self, request: RequestId) -> usize {
        let mut pages = 0;
        for (layer, kv_head) in self.rows() {
            let audit = self.pipeline.backend().audit(request, layer, kv_head);
            for (key, same) in audit.expect("an admitted request") {
                assert!(same, "{request:?}, layer {layer}, KV head {kv_head}: page {key} is stale");
                pages += 1;
            }
        }
        pages
    }

    fn rows(&self) -> impl Iterator<Item = (usize, usize)> {
        let KvShape { layers, kv_heads, .. } = *self.pipeline.config().shape();
        (0..layers).flat_map(move |layer| (0..kv_heads).map(move |kv_head| (layer, kv_head)))
    }
}
