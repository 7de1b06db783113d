use std::ops::ControlFlow;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use spinkv::KvConfig;
use spinkv::backend::cpu::CpuBackend;
use spinkv::memory::{MemoryLimits, MemoryUsage, RequestPlan};
use spinkv::pipeline::{Counters, Pipeline, RequestId, StageTimes};

use super::{
    Cell, Evaluation, Journal, MeasuredRunner, Observed, Recall, Reference, StoredPrompt, Task, measure,
};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::model::{DecodeToken, Model, Wanted};
use crate::runner::Runner;
use crate::tokenizer::Tokenizer;

/// How far an evaluation has come. Units are estimates of cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Units done.
    pub done: u64,
    /// All units that are not in the journal already.
    pub total: u64,
    /// Results that are there, those of the journal included.
    pub results: usize,
    /// All results.
    pub of: usize,
}

/// The model and a cell's KV memory on the CPU; with a stored prompt in place of the model's pass over it, or without.
#[derive(Debug)]
pub struct CellRunner<'a> {
    model: &'a Model,
    pipeline: Pipeline<Observed>,
    stored: Option<&'a StoredPrompt>,
}

impl<'a> CellRunner<'a> {
    /// A runner over empty memory without limits. `stored`, if given, is the only prompt that it can be asked for.
    pub fn new(
        model: &'a Model,
        kv: KvConfig,
        buffering: f64,
        recall: bool,
        stored: Option<&'a StoredPrompt>,
    ) -> Self {
        let backend = Observed::new(CpuBackend::new(kv, MemoryLimits::default()), recall);
        Self { model, pipeline: Pipeline::new(backend).with_buffering(buffering), stored }
    }
}

impl Runner for CellRunner<'_> {
    /// The whole prompt: nobody else waits for its layers.
    type Prompt = (RequestId, Vec<u32>);

    fn config(&self) -> &ModelConfig {
        self.model.config()
    }

    fn check(&self, max_tokens: usize) -> Result<()> {
        let plan = self.pipeline.plan(max_tokens)?;
        Ok(plan.check_limits(self.pipeline.config(), &MemoryLimits::default())?)
    }

    fn park(&mut self, request: RequestId) -> Result<()> {
        Ok(self.pipeline.park(request)?)
    }

    fn resume(&mut self, request: RequestId) -> Result<()> {
        Ok(self.pipeline.resume(request)?)
    }

    fn admit(&mut self, max_tokens: usize) -> Result<RequestId> {
        Ok(self.pipeline.admit(max_tokens)?)
    }

    fn release(&mut self, request: RequestId) {
        self.pipeline.release(request);
    }

    fn plan(&self, request: RequestId) -> Result<RequestPlan> {
        Ok(*self.pipeline.admitted(request)?)
    }

    fn begin_prompt(&mut self, request: RequestId, tokens: &[u32]) -> Result<Self::Prompt> {
        Ok((request, tokens.to_vec()))
    }

    fn prompt_layer(
        &mut self,
        (request, tokens): &mut Self::Prompt,
        progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<Option<Vec<f32>>> {
        match self.stored {
            Some(stored) => {
                stored.feed(&mut self.pipeline, *request)?;
                Ok(Some(stored.logits().to_vec()))
            }
            None => {
                let hidden =
                    self.model.prefill(&mut self.pipeline, *request, tokens, Wanted::Last, progress)?;
                Ok(Some(self.model.logits(&hidden)))
            }
        }
    }

    fn decode(&mut self, batch: &[DecodeToken]) -> Result<Vec<f32>> {
        let hidden = self.model.decode(&mut self.pipeline, batch)?;
        Ok(self.model.logits(&hidden))
    }

    fn counters(&mut self) -> Result<Counters> {
        Ok(self.pipeline.counters())
    }

    fn usage(&self) -> MemoryUsage {
        self.pipeline.usage()
    }

    fn stage_times(&self) -> Option<(StageTimes, StageTimes)> {
        Some((*self.pipeline.decode_times(), *self.pipeline.prefill_times()))
    }
}

impl MeasuredRunner for CellRunner<'_> {
    fn take_recall(&mut self) -> Option<Recall> {
        self.pipeline.backend_mut().take_recall()
    }
}

/// A prompt and the cells that have no result for it yet.
struct Job<'a> {
    task: Task,
    context: usize,
    prompt: usize,
    cells: Vec<&'a Cell>,
}

impl Job<'_> {
    /// Cost of the pass over the prompt, in layers of tokens: products grow with the tokens, attention with their square.
    fn prompt_units(&self) -> u64 {
        (self.context + self.context * self.context / 4096) as u64
    }

    /// Cost of a cell: Index and Offload, then its steps.
    fn cell_units(&self, evaluation: &Evaluation) -> u64 {
        (self.context / 8 + (self.context / 256 + 16) * evaluation.steps(self.task)) as u64
    }

    fn units(&self, evaluation: &Evaluation) -> u64 {
        self.prompt_units() + self.cells.len() as u64 * self.cell_units(evaluation)
    }
}

/// Measures on the CPU what the journal lacks. `jobs` prompts are under way at a time, each on its share of rayon's threads; `keep_bytes`
/// is the most memory that stored prompts may take together, and a prompt that is larger passes through the model anew for every cell.
/// `listen` hears of every part that is done, and may break off.
///
/// # Errors
/// [`Error::Cancelled`] if `listen` broke off, and what a prompt, a method or the journal's file refuses. Results so far are in the
/// journal.
pub fn run(
    evaluation: &Evaluation,
    model: &Model,
    tokenizer: &Tokenizer,
    journal: &mut Journal,
    (jobs, keep_bytes): (usize, u64),
    mut listen: impl FnMut(Progress) -> ControlFlow<()> + Send,
) -> Result<()> {
    let work = work(evaluation, journal);
    let of = evaluation.cells.len() * evaluation.options.prompts;
    let missing: usize = work.iter().map(|job| job.cells.len()).sum();
    let total = work.iter().map(|job| job.units(evaluation)).sum();
    let mut progress = Progress { done: 0, total, results: of - missing, of };
    if listen(progress).is_break() {
        return Err(Error::Cancelled);
    }
    let jobs = jobs.clamp(1, work.len().max(1));
    let shared = Mutex::new((journal, &mut listen, &mut progress, None::<Error>));
    let next = AtomicUsize::new(0);
    let worker = || {
        while let Some(job) = work.get(next.fetch_add(1, Ordering::Relaxed)) {
            let mut report = |units: u64, result: Option<(&Cell, super::Measured)>| {
                let mut guard = shared.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                let (journal, listen, progress, failure) = &mut *guard;
                if failure.is_some() {
                    // Another job failed: its error is the one to return.
                    return Err(Error::Cancelled);
                }
                progress.done += units;
                if let Some((cell, measured)) = result {
                    journal.add(evaluation.key(cell, job.prompt, "cpu"), measured)?;
                    progress.results += 1;
                }
                if listen(**progress).is_break() { Err(Error::Cancelled) } else { Ok(()) }
            };
            let fits = StoredPrompt::bytes(&evaluation.dense, job.context) <= keep_bytes / jobs as u64;
            let outcome = run_job(evaluation, model, tokenizer, job, fits, &mut report);
            if let Err(error) = outcome {
                let mut guard = shared.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                guard.3.get_or_insert(error);
                return;
            }
        }
    };
    if jobs == 1 {
        worker();
    } else {
        let threads = rayon::current_num_threads().div_ceil(jobs);
        std::thread::scope(|scope| {
            for _ in 0..jobs {
                scope.spawn(|| match rayon::ThreadPoolBuilder::new().num_threads(threads).build() {
                    Ok(pool) => pool.install(worker),
                    // Fewer threads than wished for: the other jobs take the work, or the shared pool does.
                    Err(_) => worker(),
                });
            }
        });
    }
    let (.., failure) = shared.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    failure.map_or(Ok(()), Err)
}

/// What is to do: shorter contexts first, and one prompt after the other, so that the first results come soon.
fn work<'a>(evaluation: &'a Evaluation, journal: &Journal) -> Vec<Job<'a>> {
    let mut work = Vec::new();
    for context in evaluation.options.contexts.iter().copied() {
        for prompt in 0..evaluation.options.prompts {
            for task in evaluation.options.tasks.iter().copied() {
                let here = |cell: &&Cell| cell.task == task && cell.context == context;
                let missing = |cell: &&Cell| journal.get(&evaluation.key(cell, prompt, "cpu")).is_none();
                let cells: Vec<_> = evaluation.cells.iter().filter(here).filter(missing).collect();
                if !cells.is_empty() {
                    work.push(Job { task, context, prompt, cells });
                }
            }
        }
    }
    work
}

fn run_job(
    evaluation: &Evaluation,
    model: &Model,
    tokenizer: &Tokenizer,
    job: &Job<'_>,
    fits: bool,
    report: &mut impl FnMut(u64, Option<(&Cell, super::Measured)>) -> Result<()>,
) -> Result<()> {
    let question = evaluation.question(tokenizer, job.task, job.context, job.prompt)?;
    let options = &evaluation.options;
    let mut said = 0;
    let mut stored = None;
    if fits {
        let mut failure = None;
        let prompt = StoredPrompt::new(model, &evaluation.dense, &question.prompt, |done, total| {
            let units = job.prompt_units() * done as u64 / total as u64;
            let outcome = report(units - said, None);
            said = units;
            failure = outcome.err();
            if failure.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        match failure {
            Some(failure) => return Err(failure),
            None => stored = Some(prompt?),
        }
    }
    report(job.prompt_units() - said, None)?;
    let stored = stored.as_ref();
    let max_tokens = Evaluation::max_tokens(job.context);
    let runner =
        |kv: &KvConfig, recall| CellRunner::new(model, kv.clone(), options.buffering, recall, stored);
    let mut reference: Option<Reference> = None;
    if job.task == Task::Perplexity {
        let dense = &mut runner(&evaluation.dense, false);
        reference = Some(measure(dense, tokenizer, &question, max_tokens, None)?.1);
    }
    for cell in &job.cells {
        // Memory anew for each cell and prompt: several cells' at a time would be several times as much, and it is quickly made.
        let runner = &mut runner(&cell.kv, options.recall);
        let (measured, _) = measure(runner, tokenizer, &question, max_tokens, reference.as_ref())?;
        report(job.cell_units(evaluation), Some((cell, measured)))?;
    }
    Ok(())
}
