use std::ops::ControlFlow;
use std::time::Instant;

use super::CudaMachine;
use crate::bench::{Listen, PrefillOptions, PrefillRow, median};
use crate::cuda::{CudaModel, parallel};
use crate::error::Result;
use crate::eval::MethodChoice;

/// Times that Index is run with nothing beside it.
const INDEX_RUNS: usize = 9;

impl CudaMachine {
    /// Prompts on the GPU, with and without what is kept of them in turn; Index by itself with events, behind them.
    ///
    /// # Errors
    /// What no method could do anything about. What a method or its memory refuses is in its row.
    pub fn prefill(&mut self, options: &PrefillOptions, listen: Listen<'_>) -> Result<Vec<PrefillRow>> {
        let (mut rows, of) = (Vec::new(), options.contexts.len() * options.methods.len());
        for context in options.contexts.iter().copied() {
            for method in &options.methods {
                listen(&format!("{method}, {context} tokens"), rows.len(), of);
                let measured = self.prefill_of(options, method, context);
                rows.push(
                    measured.unwrap_or_else(|error| PrefillRow::skipped(method, context, error.to_string())),
                );
            }
        }
        Ok(rows)
    }

    fn prefill_of(
        &mut self,
        options: &PrefillOptions,
        method: &MethodChoice,
        context: usize,
    ) -> Result<PrefillRow> {
        let config = &self.config;
        let shape =
            spinkv::KvShape::new(config.layers, config.query_heads, config.kv_heads, config.head_dim)?;
        let kv = options.kv(shape, config.rotary(), method)?;
        let ids = self.prompts.prompt(0, context);
        let model = self.model(parallel::shards(&kv, self.gpus.gpus())?, 1, context + 1, 0.0)?;
        let mut times = model.on_ranks(|_, model| timed(model, &ids, options.rounds))?;
        self.weights = Some(model.into_weights()?);
        let Times { whole, dense, layer_ms, index_ms } = times.swap_remove(0);
        let index_ms = if kv.summary_width() == 0 { 0.0 } else { median(index_ms) };
        Ok(PrefillRow::new(method, context, (median(whole), median(dense)), (median(layer_ms), index_ms)))
    }
}

/// Milliseconds of prompts, kept and not, of their layers, and of Index.
#[derive(Default)]
struct Times {
    whole: Vec<f64>,
    dense: Vec<f64>,
    layer_ms: Vec<f64>,
    index_ms: Vec<f64>,
}

/// Times `rounds` prompts of each kind.
fn timed(model: &mut CudaModel, ids: &[u32], rounds: usize) -> Result<Times> {
    let (context, layers) = (ids.len(), model.config().layers);
    let mut times = Times::default();
    let mut request = None;
    // The last one is kept, and Index has its keys.
    for round in 0..2 * (rounds + 1) {
        let keep = round % 2 == 1;
        if let Some(before) = request.take() {
            model.pipeline_mut().release(before);
        }
        model.pipeline_mut().backend_mut().keep_prompts(keep);
        let admitted = model.pipeline_mut().admit(context + 1)?;
        request = Some(admitted);
        let (start, mut done) = (Instant::now(), Vec::with_capacity(layers));
        model.prefill(admitted, ids, |_, _| {
            done.push(start.elapsed().as_secs_f64() * 1e3);
            ControlFlow::Continue(())
        })?;
        let ms = start.elapsed().as_secs_f64() * 1e3;
        if round < 2 {
            continue;
        }
        if keep {
            times.whole.push(ms);
            continue;
        }
        times.dense.push(ms);
        // The first one has the embedding before it, the last one lacks most of its queries.
        let inner = done.windows(2).map(|ends| ends[1] - ends[0]);
        let inner: Vec<f64> = inner.take(layers.saturating_sub(2)).collect();
        times.layer_ms.extend(if inner.is_empty() { vec![ms / layers as f64] } else { inner });
    }
    times.index_ms = model.time_index(context, INDEX_RUNS)?;
    Ok(times)
}
