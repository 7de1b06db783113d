use std::ops::Range;

use spinkv::backend::cuda::StepTensors;
use spinkv::backend::cuda::driver::DeviceBuffer;
use spinkv::backend::cuda::kernels::{Argmax, Positions, RmsNorm};
use spinkv::memory::Word;
use spinkv_kernels::abi::{Entry, WORD_ELEMENTS};

use super::activations::KeysValues;
use super::model::CudaModel;
use super::parts::Parts;
use crate::error::Result;

/// What a decode step computes about its stages, of all of a batch or of a half, with `parts` for as many requests and on their stream.
#[derive(Debug)]
pub(super) struct StepPass<'a> {
    model: &'a CudaModel,
    parts: &'a Parts,
    batch: usize,
    entries: DeviceBuffer<Entry>,
    kv: KeysValues,
    queries: DeviceBuffer<Word>,
    attended: DeviceBuffer<Word>,
}

impl<'a> StepPass<'a> {
    /// Async: the requests' tokens embedded.
    pub fn begin(model: &'a CudaModel, parts: &'a Parts, requests: Range<usize>) -> Result<Self> {
        let (batch, sizes) = (requests.len(), *model.weights.sizes());
        let words = 0..batch * sizes.queries / WORD_ELEMENTS;
        let pass = Self {
            model,
            parts,
            batch,
            entries: model.pipeline.backend().entries_in(requests)?,
            kv: parts.step_kv.part(&sizes, batch)?,
            queries: parts.step.queries.part(words.clone())?,
            attended: parts.step.attended.part(words)?,
        };
        parts.embed(&model.weights, &parts.ids, batch, &parts.residual)?;
        Ok(pass)
    }

    /// Async: a layer's queries, keys and values.
    pub fn project(&self, layer: usize) -> Result<()> {
        let (Self { parts, batch, .. }, weights) = (self, &self.model.weights);
        let (positions, layer) = (Positions::Entries(&self.entries), &weights.layers[layer]);
        parts.project(weights.sizes(), layer, &parts.residual, *batch, &parts.step, positions, 0, &self.kv)
    }

    /// What the layer's stages work on.
    pub fn tensors(&self) -> StepTensors<'_> {
        let KeysValues { keys, values } = &self.kv;
        StepTensors { queries: &self.queries, keys, values, out: &self.attended }
    }

    /// Async: a layer's output and MLP.
    pub fn finish(&self, layer: usize) -> Result<()> {
        let (Self { parts, batch, .. }, weights) = (self, &self.model.weights);
        parts.finish(weights.sizes(), &weights.layers[layer], &parts.residual, *batch, &parts.step)
    }

    /// Async: logits and the likeliest tokens.
    pub fn end(&self) -> Result<()> {
        let (Self { parts, batch, .. }, weights) = (self, &self.model.weights);
        let (tokens, vocab) = (*batch as u32, weights.sizes().vocab as u32);
        let (residual, eps, normed) = (&parts.residual, parts.eps, &parts.step.normed);
        let norm = RmsNorm { residual, weight: &weights.final_norm, first_token: 0, tokens, eps, normed };
        // SAFETY: all of it is used on this stream alone.
        unsafe { norm.launch(&parts.kernels, &parts.stream) }?;
        parts.head(weights, *batch)?;
        let argmax = Argmax {
            logits: &parts.logits,
            batch: tokens,
            vocab,
            stride: vocab,
            greatest: &parts.greatest,
            arrivals: &parts.arrivals,
            ids: &parts.likeliest,
        };
        // SAFETY: as above; the scratch is 0 between launches.
        Ok(unsafe { argmax.launch(&parts.kernels, &parts.stream) }?)
    }
}
