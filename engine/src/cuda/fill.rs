//! Prompts for measurements: a full KV memory without the price of a prompt, and what Index takes of one.

use spinkv::backend::cuda::kernels::Positions;
use spinkv::pipeline::RequestId;
use spinkv_kernels::abi::WORD_ELEMENTS;

use super::CudaModel;
use crate::error::Result;

impl CudaModel {
    /// Fills a request's KV memory as a prompt of `tokens` does, but for what it computes: every layer's keys and values are projected from the embeddings, and
    /// only the last token's query attends. So they are no model's, and as many bytes, in the same places, at a small part of the time.
    ///
    /// # Errors
    /// Those of [`begin_prompt`](Self::begin_prompt) and [`prompt_layer`](Self::prompt_layer).
    pub fn fill(&mut self, request: RequestId, tokens: &[u32]) -> Result<()> {
        self.begin_prompt(request, tokens)?;
        let (count, sizes, parts) = (tokens.len(), *self.weights.sizes(), &self.parts);
        for (index, layer) in self.weights.layers.iter().enumerate() {
            let kv = parts.prompt_kv[index % 2].part(&sizes, count)?;
            let mut attention = self.pipeline.prefill(request, index, count, &kv.keys, &kv.values)?;
            if count > 1 {
                attention.skip(count - 1)?;
            }
            let mut of_chunk = 0;
            for first in (0..count).step_by(parts.chunk_tokens) {
                of_chunk = parts.chunk_tokens.min(count - first);
                let residual =
                    parts.prompt_residual.part(first * sizes.hidden..(first + of_chunk) * sizes.hidden)?;
                let positions = Positions::From(first as u32);
                parts.project(&sizes, layer, &residual, of_chunk, &parts.chunk, positions, first, &kv)?;
            }
            let row = sizes.queries / WORD_ELEMENTS;
            let last = (of_chunk - 1) * row..of_chunk * row;
            let queries = parts.chunk.queries.part(last.clone())?;
            attention.attend(1, &queries, &mut parts.chunk.attended.part(last)?)?;
        }
        Ok(self.pipeline.backend_mut().finish_prompt()?)
    }

    /// Runs the last layer's Index of the last prompt, of `tokens` tokens, `times` times more, with nothing beside it: the time of each, in milliseconds.
    ///
    /// # Errors
    /// Those of [`CudaBackend::time_prompt_index`](spinkv::backend::cuda::CudaBackend::time_prompt_index).
    pub fn time_index(&mut self, tokens: usize, times: usize) -> Result<Vec<f64>> {
        let last = self.weights.layers.len() - 1;
        let kv = self.parts.prompt_kv[last % 2].part(self.weights.sizes(), tokens)?;
        Ok(self.pipeline.backend_mut().time_prompt_index(last, &kv.keys, &kv.values, times)?)
    }
}
