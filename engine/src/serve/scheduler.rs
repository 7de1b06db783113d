mod admission;

use std::ops::ControlFlow;
use std::time::Instant;

use spinkv::memory::{MemoryUsage, PrefixUsage};
use spinkv::pipeline::{Counters, RequestId};

use super::job::{Event, Finished, Job, JobId, Output, Piece, Reason};
use super::queue::Queue;
use super::text::{TextFilter, score};
use crate::error::{Error, Result};
use crate::generate::new_tokens;
use crate::model::DecodeToken;
use crate::runner::Runner;
use crate::sampling::Sampler;
use crate::tokenizer::Tokenizer;
use admission::context;

/// How a [`Scheduler`] shares out a runner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SchedulerOptions {
    /// The most jobs that have memory at a time, at least 1.
    pub max_batch: usize,
    /// The most jobs that wait.
    pub max_queue: usize,
    /// Layers of a prompt that run between two decode steps, at least 1: more serve new jobs sooner, and stall running ones longer.
    pub prompt_layers: usize,
    /// How often a waiting job may be overtaken before it goes before all others, and a running one be parked or left so for others.
    pub patience: usize,
    /// Whether jobs of a lower priority are parked when there is no room for one of a higher: they go on later, without computing anything
    /// again.
    pub preempt: bool,
    /// How many tokens a job generates before others of its priority may have its memory in turn, with [`preempt`](Self::preempt): those that wait, and those that
    /// gave theirs. `None` if nobody gives way to an equal.
    pub turn: Option<usize>,
}

impl Default for SchedulerOptions {
    fn default() -> Self {
        Self { max_batch: 16, max_queue: 256, prompt_layers: 1, patience: 16, preempt: true, turn: None }
    }
}

/// Jobs in every state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Jobs that wait for memory.
    pub waiting: usize,
    /// Jobs whose prompt is under way: 0 or 1.
    pub prompts: usize,
    /// Jobs that generate.
    pub decoding: usize,
    /// Jobs that gave their memory to others.
    pub parked: usize,
}

/// Continuous batching over a [`Runner`]: jobs come and go between any two steps.
///
/// It has no thread and no clock: [`step`](Self::step) does one unit of work and returns what happened, so the same calls give the same
/// results. A job gets the tokens that it would get alone, whoever else is there: rows share nothing, samplers and text belong to their job, and
/// what others leave a cache cannot change a result, but for how a GPU rounds sums that it takes in another order.
///
/// A job is charged its longest context before its prompt begins, so no step can run out of memory that was promised. One prompt is under way at
/// a time, since its activations are large; the others wait without memory.
#[derive(Debug)]
pub struct Scheduler<R: Runner> {
    runner: R,
    tokenizer: Option<Tokenizer>,
    options: SchedulerOptions,
    next_id: u64,
    queue: Queue,
    prompt: Option<(Active, R::Prompt)>,
    batch: Vec<Active>,
    /// Jobs that gave their memory to others, the last of them at the end.
    parked: Vec<Active>,
    preemptions: u64,
    /// Whether somebody came or went since the queue was last offered memory.
    offer: bool,
    outputs: Vec<Output>,
}

/// A job with memory.
#[derive(Debug)]
struct Active {
    id: JobId,
    job: Job,
    request: RequestId,
    sampler: Sampler,
    text: TextFilter,
    /// Tokens of the prompt whose pages were there.
    cached: usize,
    /// The newest token; meaningless while the prompt is under way.
    token: u32,
    generated: usize,
    /// Those of them before it last got its memory.
    before_turn: usize,
    /// Jobs that were admitted while it was parked.
    overtaken: usize,
}

impl Active {
    /// Tokens since it last got its memory.
    fn turn(&self) -> usize {
        self.generated - self.before_turn
    }

    /// Whether it has had its turn, if jobs have memory in turns of so many tokens.
    fn had_turn(&self, turn: Option<usize>) -> bool {
        turn.is_some_and(|turn| self.turn() >= turn)
    }
}

impl<R: Runner> Scheduler<R> {
    /// A scheduler without jobs. Without a tokenizer there are tokens and no text.
    pub fn new(runner: R, tokenizer: Option<Tokenizer>, options: SchedulerOptions) -> Self {
        Self {
            runner,
            tokenizer,
            queue: Queue::new(options.patience),
            options: SchedulerOptions {
                max_batch: options.max_batch.max(1),
                prompt_layers: options.prompt_layers.max(1),
                ..options
            },
            next_id: 0,
            prompt: None,
            batch: Vec::new(),
            parked: Vec::new(),
            preemptions: 0,
            offer: false,
            outputs: Vec::new(),
        }
    }

    /// Takes a job in. What could never run is refused at once.
    ///
    /// # Errors
    /// [`Error::QueueFull`]; [`Error::EmptyPrompt`], [`Error::PromptTooLong`], [`Error::NothingToGenerate`], [`Error::TokenOutOfVocabulary`],
    /// [`Error::InvalidSampling`]; and those of [`Runner::check`] for more than an empty machine has.
    pub fn submit(&mut self, mut job: Job) -> Result<JobId> {
        let limit = self.options.max_queue;
        let config = self.runner.config();
        if job.max_tokens == 0 {
            return Err(Error::NothingToGenerate);
        }
        job.max_tokens = new_tokens(job.prompt.len(), job.max_tokens, config.max_position_embeddings)?;
        let vocab_size = config.vocab_size;
        if let Some(id) = job.prompt.iter().copied().find(|id| *id as usize >= vocab_size) {
            return Err(Error::TokenOutOfVocabulary { id, vocab_size });
        }
        job.sampling.validate()?;
        // An empty text is everywhere.
        job.stop.retain(|stop| !stop.is_empty());
        self.runner.check(context(&job))?;
        if self.queue.len() >= limit {
            return Err(Error::QueueFull { limit });
        }
        let id = JobId(self.next_id);
        self.next_id += 1;
        self.queue.push(id, job);
        self.offer = true;
        Ok(id)
    }

    /// Ends a job, whatever its state, and frees what it held. Its [`Finished`] comes with the next step. A job that is over, or was never there, is
    /// ignored.
    pub fn cancel(&mut self, id: JobId) {
        self.give_up(id, Reason::Cancelled);
    }

    /// Whether there is nothing to do, and nothing to tell.
    pub fn is_idle(&self) -> bool {
        let nobody = self.queue.is_empty() && self.prompt.is_none() && self.batch.is_empty();
        nobody && self.parked.is_empty() && self.outputs.is_empty()
    }

    /// How many jobs there are.
    pub fn load(&self) -> Load {
        Load {
            waiting: self.queue.len(),
            prompts: usize::from(self.prompt.is_some()),
            decoding: self.batch.len(),
            parked: self.parked.len(),
        }
    }

    /// How often jobs were parked for others.
    pub fn preemptions(&self) -> u64 {
        self.preemptions
    }

    /// The runner's memory in use.
    pub fn usage(&self) -> MemoryUsage {
        self.runner.usage()
    }

    /// What is kept of prompts for others; `None` where they share no pages.
    pub fn prefixes(&self) -> Option<PrefixUsage> {
        self.runner.prefixes()
    }

    /// What happened to pages so far.
    ///
    /// # Errors
    /// Those of [`Runner::counters`].
    pub fn counters(&mut self) -> Result<Counters> {
        self.runner.counters()
    }

    /// The runner.
    pub fn runner(&self) -> &R {
        &self.runner
    }

    /// One unit of work: jobs whose deadline passed are given up; a decode step for all that generate; then some layers of a prompt.
    /// Returns what happened since the last step, each job's events in order.
    pub fn step(&mut self, now: Instant) -> Vec<Output> {
        self.expire(now);
        self.decode();
        if let Some(turn) = self.options.turn {
            // Others may have its memory from now on.
            self.offer |= self.batch.iter().any(|active| active.turn() == turn);
        }
        for _ in 0..self.options.prompt_layers {
            if !self.prompt_layer() {
                break;
            }
        }
        std::mem::take(&mut self.outputs)
    }

    fn expire(&mut self, now: Instant) {
        let waiting = self.queue.iter().map(|waiting| (waiting.id, waiting.job.deadline));
        let active = self.prompt.iter().map(|(active, _)| active).chain(&self.batch).chain(&self.parked);
        let all = waiting.chain(active.map(|active| (active.id, active.job.deadline)));
        let late: Vec<_> = all.filter(|(_, at)| at.is_some_and(|at| at <= now)).map(|(id, _)| id).collect();
        late.into_iter().for_each(|id| self.give_up(id, Reason::Deadline));
    }

    fn give_up(&mut self, id: JobId, reason: Reason) {
        if let Some(job) = self.queue.remove(id) {
            // Those behind it may be next.
            self.offer = true;
            let finished = Finished {
                reason,
                rest: Piece::default(),
                prompt_tokens: job.prompt.len(),
                cached_tokens: 0,
                generated_tokens: 0,
            };
            return self.tell(id, Event::Finished(finished));
        }
        if self.prompt.as_ref().is_some_and(|(active, _)| active.id == id) {
            // The prompt is dropped before its request is released.
            let active = self.prompt.take().map(|(active, _)| active);
            return active.into_iter().for_each(|active| self.finish(active, reason, Piece::default()));
        }
        let place = |actives: &[Active]| actives.iter().position(|active| active.id == id);
        let active = match (place(&self.batch), place(&self.parked)) {
            (Some(place), _) => self.batch.remove(place),
            (None, Some(place)) => self.parked.remove(place),
            (None, None) => return,
        };
        self.finish(active, reason, Piece::default());
    }

    /// A decode step for all that generate.
    fn decode(&mut self) {
        if self.batch.is_empty() {
            return;
        }
        let part = |active: &Active| DecodeToken { request: active.request, token: active.token };
        let parts: Vec<_> = self.batch.iter().map(part).collect();
        let scored = self.batch.iter().any(|active| active.job.logprobs.is_some());
        let mut samplers: Vec<_> = self.batch.iter_mut().map(|active| &mut active.sampler).collect();
        let drawn = match self.runner.next_tokens(&parts, &mut samplers, scored) {
            Ok(drawn) => drawn,
            Err(error) => return self.decode_failed(error),
        };
        let vocab_size = self.runner.config().vocab_size;
        for (index, mut active) in std::mem::take(&mut self.batch).into_iter().enumerate() {
            let logits = if scored { &drawn.logits[index * vocab_size..][..vocab_size] } else { &[] };
            let token = drawn.tokens[index].ok_or(Error::NoFiniteLogit { len: vocab_size });
            match token.and_then(|token| self.take_token(&mut active, token, logits)) {
                Ok(None) => self.batch.push(active),
                Ok(Some((reason, rest))) => self.finish(active, reason, rest),
                Err(error) => self.fail(active, error),
            }
        }
    }

    /// Who is at fault for a step that did not happen; at least one job ends, so it is not tried for ever.
    fn decode_failed(&mut self, error: Error) {
        let at_fault = match &error {
            // One request's alone; the others' step was not begun.
            Error::Kv(spinkv::Error::StepFault { request, .. } | spinkv::Error::RequestFailed(request)) => {
                self.batch.iter().position(|active| active.request == *request)
            }
            // Nothing has changed. The last to come makes room.
            Error::Kv(spinkv::Error::AllocationFailed { .. }) => {
                let last = |at: &usize| (-i64::from(self.batch[*at].job.priority), self.batch[*at].id);
                (0..self.batch.len()).max_by_key(last)
            }
            _ => None,
        };
        if let Some(place) = at_fault {
            let active = self.batch.remove(place);
            return self.fail(active, error);
        }
        let message = error.to_string();
        let mut error = Some(error);
        for active in std::mem::take(&mut self.batch) {
            let error = error.take().unwrap_or_else(|| Error::BatchFailed { message: message.clone() });
            self.fail(active, error);
        }
    }

    /// One layer of a prompt: of the one under way, or of the next that memory is found for. Whether there was one.
    fn prompt_layer(&mut self) -> bool {
        let Some((mut active, mut prompt)) = self.prompt.take().or_else(|| self.admit()) else {
            return false;
        };
        let outcome = self.runner.prompt_layer(&mut prompt, &mut |_, _| ControlFlow::Continue(()));
        match outcome {
            Ok(None) => self.prompt = Some((active, prompt)),
            Ok(Some(logits)) => {
                drop(prompt);
                let token = active.sampler.sample(&logits);
                match token.and_then(|token| self.take_token(&mut active, token, &logits)) {
                    Ok(None) => self.batch.push(active),
                    Ok(Some((reason, rest))) => self.finish(active, reason, rest),
                    Err(error) => self.fail(active, error),
                }
            }
            Err(error) => {
                drop(prompt);
                self.fail(active, error);
            }
        }
        true
    }

    /// What a job's next token leads to: the end of it and the rest of its text, or nothing.
    fn take_token(
        &mut self,
        active: &mut Active,
        token: u32,
        logits: &[f32],
    ) -> Result<Option<(Reason, Piece)>> {
        active.token = token;
        active.generated += 1;
        let at_end = !active.job.ignore_eos && self.runner.config().eos_token_ids.contains(&token);
        let (mut piece, mut reason) = (Piece::default(), at_end.then_some(Reason::EndToken));
        if !at_end {
            let scored = active.job.logprobs.map(|top| score(logits, token, top));
            let (certain, stopped) = active.text.push(token, scored)?;
            piece = certain;
            let full = active.generated == active.job.max_tokens;
            reason = if stopped { Some(Reason::StopText) } else { full.then_some(Reason::Length) };
        }
        let mut rest = Piece::default();
        if matches!(reason, Some(Reason::EndToken | Reason::Length)) {
            let (last, stopped) = active.text.finish()?;
            rest = last;
            reason = if stopped { Some(Reason::StopText) } else { reason };
        }
        self.tell(active.id, Event::Token(piece));
        Ok(reason.map(|reason| (reason, rest)))
    }

    fn finish(&mut self, active: Active, reason: Reason, rest: Piece) {
        self.release(active.request);
        let (prompt_tokens, cached_tokens) = (active.job.prompt.len(), active.cached);
        let generated_tokens = active.generated;
        let finished = Finished { reason, rest, prompt_tokens, cached_tokens, generated_tokens };
        self.tell(active.id, Event::Finished(finished));
    }

    fn fail(&mut self, active: Active, error: Error) {
        self.release(active.request);
        self.tell(active.id, Event::Failed(error));
    }

    fn release(&mut self, request: RequestId) {
        self.runner.release(request);
        self.offer = true;
    }

    fn tell(&mut self, job: JobId, event: Event) {
        self.outputs.push(Output { job, event });
    }
}

#[cfg(test)]
mod tests;
