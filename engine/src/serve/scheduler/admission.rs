//! Who gets memory next: those that wait, and those that gave theirs to others.

use std::cmp::Reverse;

use spinkv::pipeline::RequestId;

use super::{Active, Scheduler, SchedulerOptions};
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
    /// its memory before, so alone it always finds it again. Where jobs have it in turn, those that wait go before those of their priority that had it, and of
    /// these who is parked longest is first.
    pub(super) fn admit(&mut self) -> Option<(Active, R::Prompt)> {
        if !std::mem::take(&mut self.offer) || !self.resume() {
            return None;
        }
        let (order, mut held_up) = (self.queue.order(), false);
        for (id, holds_up) in order {
            let waiting = self.queue.iter().find(|waiting| waiting.id == id).expect("a job that waits");
            let (priority, tokens) = (waiting.job.priority, context(&waiting.job));
            let after = self.next_parked().is_some_and(|place| !self.goes_before(priority, place));
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
                None if holds_up => {
                    held_up = true;
                    break;
                }
                None => {}
            }
        }
        // What nobody of those can use, those that are parked can; they may be parked again.
        while self.batch.len() < self.options.max_batch && self.resume_next() {
            self.offer = true;
        }
        if !held_up {
            self.take_turn();
        }
        None
    }

    /// The place of the parked job that goes on first.
    fn next_parked(&self) -> Option<usize> {
        let priority = |place: &usize| self.parked[*place].job.priority;
        match self.options.turn {
            // Of equals the first.
            Some(_) => (0..self.parked.len()).min_by_key(|place| Reverse(priority(place))),
            None => self.parked.len().checked_sub(1),
        }
    }

    /// Whether a job of this priority that waits goes before the one that is parked in `place`, unless that was overtaken too often.
    fn goes_before(&self, priority: i32, place: usize) -> bool {
        let parked = self.parked[place].job.priority;
        priority > parked || self.options.turn.is_some() && priority == parked
    }

    /// Lets parked jobs go on that go before all who wait. False if one of them has no room, and all must wait for it.
    fn resume(&mut self) -> bool {
        while let Some(place) = self.next_parked() {
            let waiting = self.queue.iter().map(|waiting| waiting.job.priority).max();
            let is_passed = waiting.is_some_and(|priority| self.goes_before(priority, place));
            if is_passed && self.parked[place].overtaken < self.options.patience {
                return true;
            }
            let goes_on = self.batch.len() < self.options.max_batch && self.resume_next();
            if !goes_on && !self.take_turn() {
                return false;
            }
        }
        true
    }

    /// Lets the next parked job go on, if it has room.
    fn resume_next(&mut self) -> bool {
        let Some(place) = self.next_parked() else { return false };
        let (nobody_runs, last) = (self.batch.is_empty(), self.parked.len() - 1);
        // Where nobody runs, the last one finds its memory again.
        self.resume_at(place, nobody_runs && place == last) || nobody_runs && self.resume_at(last, true)
    }

    /// Lets a parked job go on, if it has room. If it is `alone`, with nobody whose end would give it more, it ends otherwise.
    fn resume_at(&mut self, place: usize, alone: bool) -> bool {
        match self.runner.resume(self.parked[place].request) {
            Ok(()) => self.goes_on(place),
            Err(error) if !alone && is_shortage(&error) => return false,
            Err(error) => {
                let parked = self.parked.remove(place);
                self.fail(parked, error);
            }
        }
        true
    }

    /// A parked job has its memory again.
    fn goes_on(&mut self, place: usize) {
        let mut active = self.parked.remove(place);
        active.before_turn = active.generated;
        self.batch.push(active);
    }

    /// Those that were parked last, all but `kept`, go on: it was for nothing.
    fn undo_parking(&mut self, kept: usize) {
        while self.parked.len() > kept && self.resume_at(self.parked.len() - 1, self.batch.is_empty()) {}
    }

    /// Lets the next parked job go on in the place of others, who have had their turn.
    fn take_turn(&mut self) -> bool {
        let Some(place) = self.next_parked().filter(|_| self.options.turn.is_some()) else { return false };
        let (priority, request) = (self.parked[place].job.priority, self.parked[place].request);
        let parked = self.parked.len();
        loop {
            let missing = if self.batch.len() >= self.options.max_batch {
                0
            } else {
                match self.runner.resume(request) {
                    Ok(()) => {
                        self.goes_on(place);
                        self.offer = true;
                        return true;
                    }
                    Err(Error::Kv(spinkv::Error::OutOfGpuPages { needed, free, .. })) => needed - free,
                    Err(_) => break,
                }
            };
            if !self.preempt(priority, missing) {
                break;
            }
        }
        self.undo_parking(parked);
        false
    }

    /// Memory for a job, of others of a lower priority if need be; `None` if it must wait.
    fn find_room(&mut self, tokens: usize, priority: i32) -> Option<Result<RequestId, Error>> {
        let parked = self.parked.len();
        // Who is parked keeps its place: only an end gives one.
        let is_full = self.batch.len() + parked >= self.runner.places();
        if is_full || self.batch.len() >= self.options.max_batch && !self.preempt(priority, 0) {
            return None;
        }
        let mut outcome = self.runner.admit(tokens);
        if let Err(Error::Kv(spinkv::Error::OutOfGpuPages { needed, free, .. })) = outcome
            && self.preempt(priority, needed - free)
        {
            outcome = self.runner.admit(tokens);
        }
        if outcome.is_err() {
            self.undo_parking(parked);
        }
        match outcome {
            Err(error) if is_shortage(&error) && !(self.batch.is_empty() && self.parked.is_empty()) => None,
            outcome => Some(outcome),
        }
    }

    /// Parks as many jobs of a priority below `priority`, or of that one which have had their turn, as give `pages` pages, at least one: the lowest first, of equals whose
    /// turn is longest, and of these who came last. Parks none if all of them would not be enough.
    fn preempt(&mut self, priority: i32, pages: usize) -> bool {
        let SchedulerOptions { patience, turn, .. } = self.options;
        let may_go = |active: &&Active| {
            active.job.priority < priority && active.overtaken < patience
                || active.job.priority <= priority && active.had_turn(turn)
        };
        let pages_of = |active: &Active| self.runner.parked_pages(active.request).unwrap_or(0);
        let mut victims: Vec<_> = self.batch.iter().filter(may_go).collect();
        let tokens = |active: &Active| if turn.is_some() { active.turn() } else { 0 };
        victims.sort_by_key(|active| (active.job.priority, Reverse(tokens(active)), Reverse(active.id)));
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
            let mut active = self.batch.remove(place);
            // Who has had a turn waits anew.
            if active.had_turn(turn) {
                active.overtaken = 0;
            }
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
                    Active {
                        id,
                        job,
                        request,
                        sampler,
                        text,
                        cached,
                        token: 0,
                        generated: 0,
                        before_turn: 0,
                        overtaken: 0,
                    },
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
