//! Who gets memory next: those that wait, and those that gave theirs to others.

use spinkv::pipeline::RequestId;

use super::{Active, Scheduler};
use crate::error::Error;
use crate::runner::Runner;
use crate::sampling::Sampler;
use crate::serve::job::{Event, Job, JobId};
use crate::serve::text::TextFilter;
use crate::tokenizer::Tokenizer;

impl<R: Runner> Scheduler<R> {
    /// Finds memory for one of those that wait.
    ///
    /// Those that are parked go before all that wait with their priority or a lower one, the last one first: together with the others that are parked it had
    /// its memory before, so alone it always finds it again.
    pub(super) fn admit(&mut self) -> Option<(Active, R::Prompt)> {
        if !std::mem::take(&mut self.offer) || !self.resume() {
            return None;
        }
        let order = self.queue.order();
        for (id, holds_up) in order {
            let waiting = self.queue.iter().find(|waiting| waiting.id == id).expect("a job that waits");
            let (priority, tokens) = (waiting.job.priority, context(&waiting.job));
            let after = self.parked.last().is_some_and(|parked| priority <= parked.job.priority);
            match if after { None } else { self.find_room(tokens, priority) } {
                Some(Ok(request)) => {
                    let job = self.queue.admit(id);
                    self.parked.iter_mut().for_each(|parked| parked.overtaken += 1);
                    // Others may find room beside it.
                    self.offer = true;
                    if let Some(admitted) = self.begin(id, job, request) {
                        return Some(admitted);
                    }
                }
                // What is wrong with it is nobody else's, or it is alone and nobody's end will give it more.
                Some(Err(error)) => {
                    self.queue.remove(id);
                    self.tell(id, Event::Failed(error));
                }
                None if holds_up => break,
                None => {}
            }
        }
        // What nobody of those can use, those that are parked can; they may be parked again.
        while self.batch.len() < self.options.max_batch && self.resume_last() {
            self.offer = true;
        }
        None
    }

    /// Lets parked jobs go on that go before all who wait. False if one of them has no room, and all must wait for it.
    fn resume(&mut self) -> bool {
        while let Some(parked) = self.parked.last() {
            let waiting = self.queue.iter().map(|waiting| waiting.job.priority).max();
            let higher = waiting.is_some_and(|priority| priority > parked.job.priority);
            if higher && parked.overtaken < self.options.patience {
                return true;
            }
            if self.batch.len() >= self.options.max_batch || !self.resume_last() {
                return false;
            }
        }
        true
    }

    /// Lets the job that was parked last go on, if it has room. One that has none although nobody else runs ends.
    fn resume_last(&mut self) -> bool {
        let Some(parked) = self.parked.pop() else { return false };
        match self.runner.resume(parked.request) {
            Ok(()) => self.batch.push(parked),
            Err(error) if is_shortage(&error) && !self.batch.is_empty() => {
                self.parked.push(parked);
                return false;
            }
            Err(error) => self.fail(parked, error),
        }
        true
    }

    /// Memory for a job, of others of a lower priority if need be; `None` if it must wait.
    fn find_room(&mut self, tokens: usize, priority: i32) -> Option<Result<RequestId, Error>> {
        let parked = self.parked.len();
        if self.batch.len() >= self.options.max_batch && !self.preempt(priority, 0) {
            return None;
        }
        let mut outcome = self.runner.admit(tokens);
        if let Err(Error::Kv(spinkv::Error::OutOfGpuPages { needed, free, .. })) = outcome
            && self.preempt(priority, needed - free)
        {
            outcome = self.runner.admit(tokens);
        }
        // Who was parked for nothing goes on.
        while outcome.is_err() && self.parked.len() > parked && self.resume_last() {}
        match outcome {
            Err(error) if is_shortage(&error) && !(self.batch.is_empty() && self.parked.is_empty()) => None,
            outcome => Some(outcome),
        }
    }

    /// Parks as many jobs of a priority below `priority` as give `pages` pages, at least one: the lowest first, of equals who came last. Parks none if
    /// all of them would not be enough.
    fn preempt(&mut self, priority: i32, pages: usize) -> bool {
        let patience = self.options.patience;
        let may_go = |active: &&Active| active.job.priority < priority && active.overtaken < patience;
        let pages_of = |active: &Active| {
            self.runner.plan(active.request).map_or(0, |plan| plan.cache_pages() - plan.buffering_pages())
        };
        let mut victims: Vec<_> = self.batch.iter().filter(may_go).collect();
        victims.sort_by_key(|active| (active.job.priority, std::cmp::Reverse(active.id)));
        let (mut given, mut ids) = (0, Vec::new());
        for active in victims {
            if given >= pages && !ids.is_empty() {
                break;
            }
            given += pages_of(active);
            ids.push(active.id);
        }
        if !self.options.preempt || given < pages || ids.is_empty() {
            return false;
        }
        let mut parked = false;
        for id in ids {
            let place = self.batch.iter().position(|active| active.id == id).expect("it generates");
            // A backend that does not park says so before anything changes.
            if self.runner.park(self.batch[place].request).is_err() {
                break;
            }
            parked = true;
            self.preemptions += 1;
            let active = self.batch.remove(place);
            self.parked.push(active);
        }
        parked
    }

    fn begin(&mut self, id: JobId, job: Job, request: RequestId) -> Option<(Active, R::Prompt)> {
        let begun = self.runner.begin_prompt(request, &job.prompt);
        let sampler = Sampler::new(job.sampling.clone());
        match begun.and_then(|prompt| Ok((prompt, sampler?))) {
            Ok((prompt, sampler)) => {
                let stream = self.tokenizer.as_ref().map(Tokenizer::stream);
                let text = TextFilter::new(stream, job.stop.clone());
                let cached = self.runner.cached_tokens(&prompt);
                self.tell(id, Event::Started { cached_tokens: cached });
                Some((
                    Active { id, job, request, sampler, text, cached, token: 0, generated: 0, overtaken: 0 },
                    prompt,
                ))
            }
            Err(error) => {
                self.runner.release(request);
                self.tell(id, Event::Failed(error));
                None
            }
        }
    }
}

/// Tokens of a job's longest context. The last token is never passed through the model.
pub(super) fn context(job: &Job) -> usize {
    job.prompt.len() + job.max_tokens - 1
}

/// Whether a request was refused for want of what others hold.
fn is_shortage(error: &Error) -> bool {
    matches!(
        error,
        Error::Kv(
            spinkv::Error::OutOfGpuPages { .. }
                | spinkv::Error::OutOfGpuMemory { .. }
                | spinkv::Error::OutOfHostMemory { .. }
                | spinkv::Error::AllocationFailed { .. }
                | spinkv::Error::BatchTooLarge { .. }
        )
    )
}
