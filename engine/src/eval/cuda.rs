//! Evaluations on a GPU.

use std::ops::ControlFlow;

use spinkv::KvConfig;
use spinkv::backend::cuda::driver::Context;
use spinkv::backend::cuda::{CudaBackend, CudaLimits};

use super::{Cell, Evaluation, Journal, Measured, MeasuredRunner, Progress, Reference, Task, measure};
use crate::config::ModelConfig;
use crate::cuda::{BlasUse, CudaModel, CudaOptions, DeviceWeights};
use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;

/// The most memory that dense attention's distributions of a context's prompts may take. Beyond it there is no divergence.
const REFERENCE_BYTES: usize = 2 << 30;

impl MeasuredRunner for CudaModel {}

/// Refuses, before there is a GPU, what the GPU's backend cannot run.
///
/// # Errors
/// Those of [`CudaBackend::check`].
pub fn check(evaluation: &Evaluation) -> Result<()> {
    let dense = evaluation.options.tasks.contains(&Task::Perplexity);
    for context in evaluation.options.contexts.iter().copied() {
        let cells = evaluation.cells.iter().filter(|cell| cell.context == context).map(|cell| &cell.kv);
        for kv in cells.chain(dense.then_some(&evaluation.dense)) {
            CudaBackend::check(kv, &limits(evaluation, context))?;
        }
    }
    Ok(())
}

/// Measures on a GPU what the journal lacks: cell by cell, each with memory of its own, which all its prompts use one after the other.
/// Prompts pass through the model anew for every cell. `listen` hears of every result, and may break off.
///
/// # Errors
/// [`Error::Cancelled`] if `listen` broke off, and what the GPU, a prompt, a method or the journal's file refuses. Results so far are in
/// the journal.
pub fn run(
    evaluation: &Evaluation,
    (context, config, weights): (&Context, &ModelConfig, DeviceWeights),
    blas: BlasUse,
    tokenizer: &Tokenizer,
    journal: &mut Journal,
    mut listen: impl FnMut(Progress) -> ControlFlow<()>,
) -> Result<()> {
    let options = &evaluation.options;
    let missing = |cell: &Cell, journal: &Journal| -> Vec<usize> {
        let missing = |prompt: &usize| journal.get(&evaluation.key(cell, *prompt, "cuda")).is_none();
        (0..options.prompts).filter(missing).collect()
    };
    let of = evaluation.cells.len() * options.prompts;
    let todo: u64 =
        evaluation.cells.iter().map(|cell| (missing(cell, journal).len() * cell.context) as u64).sum();
    let left: usize = evaluation.cells.iter().map(|cell| missing(cell, journal).len()).sum();
    let mut progress = Progress { done: 0, total: todo, results: of - left, of };
    if listen(progress).is_break() {
        return Err(Error::Cancelled);
    }
    let mut weights = Some(weights);
    let model_of = |kv: &KvConfig, tokens: usize, weights: &mut Option<DeviceWeights>| {
        let weights = weights.take().expect("handed back by the last cell");
        let options = CudaOptions { limits: limits(evaluation, tokens), blas };
        CudaModel::new(context, config.clone(), weights, kv.clone(), &options)
    };
    let mut references: Option<(usize, Vec<Option<Reference>>)> = None;
    for cell in &evaluation.cells {
        let prompts = missing(cell, journal);
        if prompts.is_empty() {
            continue;
        }
        let tokens = cell.context;
        let question = |prompt| evaluation.question(tokenizer, cell.task, cell.context, prompt);
        let max_tokens = Evaluation::max_tokens(tokens);
        if cell.task == Task::Perplexity && references.as_ref().is_none_or(|(of, _)| *of != tokens) {
            let mut dense = model_of(&evaluation.dense, tokens, &mut weights)?;
            let one = options.scored_tokens * config.vocab_size * size_of::<f32>();
            let keep = one.saturating_mul(options.prompts) <= REFERENCE_BYTES;
            let mut all = Vec::with_capacity(options.prompts);
            for prompt in 0..options.prompts {
                let (_, reference) = measure(&mut dense, tokenizer, &question(prompt)?, max_tokens, None)?;
                all.push(Some(if keep { reference } else { reference.without_probabilities() }));
            }
            references = Some((tokens, all));
            weights = Some(dense.into_weights()?);
        }
        let mut model = model_of(&cell.kv, tokens, &mut weights)?;
        for prompt in prompts {
            let reference = match (&references, cell.task) {
                (Some((_, all)), Task::Perplexity) => all[prompt].as_ref(),
                _ => None,
            };
            let (measured, _): (Measured, _) =
                measure(&mut model, tokenizer, &question(prompt)?, max_tokens, reference)?;
            journal.add(evaluation.key(cell, prompt, "cuda"), measured)?;
            progress.done += tokens as u64;
            progress.results += 1;
            if listen(progress).is_break() {
                return Err(Error::Cancelled);
            }
        }
        weights = Some(model.into_weights()?);
    }
    Ok(())
}

fn limits(evaluation: &Evaluation, context: usize) -> CudaLimits {
    CudaLimits {
        requests: 1,
        max_tokens: Evaluation::max_tokens(context),
        buffering: evaluation.options.buffering,
        gpu_pages: None,
        host_bytes: None,
    }
}
