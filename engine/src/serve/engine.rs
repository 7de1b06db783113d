use std::collections::HashMap;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use spinkv::memory::{MemoryUsage, PrefixUsage};
use spinkv::pipeline::Counters;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;

use super::job::{Event, Job, JobId, Output};
use super::metrics::Metrics;
use super::scheduler::{Load, Scheduler};
use crate::error::{Error, Result};
use crate::runner::Runner;

/// How often the status is brought up to date while the same jobs are there.
const STATUS_INTERVAL: Duration = Duration::from_millis(200);

/// What the engine is at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Phase {
    /// The model is loaded.
    #[default]
    Loading,
    /// Requests are taken.
    Ready,
    /// No more requests are taken; those that are there come to their end.
    Draining,
    /// It is over, by an error if there is one.
    Stopped(Option<String>),
}

/// What the engine last said of itself.
#[derive(Clone, Debug, Default)]
pub struct Status {
    /// What it is at.
    pub phase: Phase,
    /// How many jobs there are.
    pub load: Load,
    /// How often jobs were parked for others.
    pub preemptions: u64,
    /// Bytes in use.
    pub usage: MemoryUsage,
    /// What happened to pages.
    pub counters: Counters,
    /// What is kept of prompts for others; `None` where they share no pages.
    pub prefixes: Option<PrefixUsage>,
    /// Bytes of a host page: what moves of a page.
    pub page_bytes: usize,
}

/// The engine's side of the channel: it owns a [`Scheduler`] and runs on a thread of its own.
#[derive(Debug)]
pub struct Engine {
    commands: Receiver<Command>,
    shared: Arc<Shared>,
}

/// A way to the engine, for as many as want one.
#[derive(Clone, Debug)]
pub struct EngineHandle {
    commands: Sender<Command>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    status: Mutex<Status>,
    metrics: Mutex<Metrics>,
}

impl Shared {
    fn status(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn metrics(&self) -> MutexGuard<'_, Metrics> {
        self.metrics.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
enum Command {
    Submit {
        job: Box<Job>,
        events: UnboundedSender<Event>,
        accepted: oneshot::Sender<Result<JobId>>,
    },
    Cancel(JobId),
    /// End once there is nothing to do.
    Drain,
    /// End now: who is there is cancelled.
    Stop,
}

/// A job under way. Dropping it before its end cancels it.
#[derive(Debug)]
pub struct Submission {
    id: JobId,
    events: UnboundedReceiver<Event>,
    commands: Sender<Command>,
    over: bool,
}

impl Submission {
    /// The job.
    pub fn id(&self) -> JobId {
        self.id
    }

    /// What happens next; `None` after the end. An engine that is gone ends it by a failure.
    pub async fn next(&mut self) -> Option<Event> {
        if self.over {
            return None;
        }
        let event = self.events.recv().await.unwrap_or(Event::Failed(Error::EngineStopped));
        self.over = event.is_last();
        Some(event)
    }
}

impl Drop for Submission {
    fn drop(&mut self) {
        if !self.over {
            // An engine that is gone has nothing to cancel.
            let _ = self.commands.send(Command::Cancel(self.id));
        }
    }
}

impl EngineHandle {
    /// Submits a job.
    ///
    /// # Errors
    /// Those of [`Scheduler::submit`]; [`Error::EngineStopped`] if it is over.
    pub async fn submit(&self, job: Job) -> Result<Submission> {
        let ((events, receiver), (accepted, answer)) = (unbounded_channel(), oneshot::channel());
        let command = Command::Submit { job: Box::new(job), events, accepted };
        self.commands.send(command).map_err(|_| Error::EngineStopped)?;
        let id = answer.await.map_err(|_| Error::EngineStopped)??;
        Ok(Submission { id, events: receiver, commands: self.commands.clone(), over: false })
    }

    /// Takes no more jobs, and ends once those that are there are over.
    pub fn drain(&self) {
        let mut status = self.shared.status();
        if matches!(status.phase, Phase::Loading | Phase::Ready) {
            status.phase = Phase::Draining;
        }
        let _ = self.commands.send(Command::Drain);
    }

    /// Ends now: jobs that are there are cancelled.
    pub fn stop(&self) {
        let _ = self.commands.send(Command::Stop);
    }

    /// What the engine last said of itself.
    pub fn status(&self) -> Status {
        self.shared.status().clone()
    }

    /// What it counts, in Prometheus' text format.
    pub fn metrics(&self) -> String {
        let (metrics, status) = (self.shared.metrics().clone(), self.status());
        metrics.render(&status)
    }
}

/// A job as the engine sees it.
struct Listener {
    events: UnboundedSender<Event>,
    submitted: Instant,
    last_token: Option<Instant>,
    prompt_tokens: usize,
}

impl Engine {
    /// An engine and a way to it.
    pub fn new() -> (Self, EngineHandle) {
        let (sender, commands) = channel();
        let shared = Arc::new(Shared::default());
        (Self { commands, shared: Arc::clone(&shared) }, EngineHandle { commands: sender, shared })
    }

    /// Runs `scheduler` until it is told to end, or nobody can tell it anything any more. Blocks; give it a thread.
    pub fn run<R: Runner>(self, mut scheduler: Scheduler<R>, page_bytes: usize) {
        let ending = Ending(&self.shared);
        {
            let mut status = self.shared.status();
            status.page_bytes = page_bytes;
            if status.phase == Phase::Loading {
                status.phase = Phase::Ready;
            }
        }
        let mut listeners: HashMap<JobId, Listener> = HashMap::new();
        let (mut draining, mut published) = (false, None::<(Instant, Load)>);
        loop {
            let idle = scheduler.is_idle();
            let stale =
                |(at, load): (Instant, Load)| at.elapsed() >= STATUS_INTERVAL || load != scheduler.load();
            if idle || published.is_none_or(stale) {
                self.publish(&mut scheduler);
                published = Some((Instant::now(), scheduler.load()));
            }
            if idle && draining {
                break;
            }
            // Without work the thread sleeps until somebody has some.
            let mut next = if idle {
                match self.commands.recv() {
                    Ok(command) => Some(command),
                    Err(_) => break,
                }
            } else {
                None
            };
            loop {
                let command = match next.take() {
                    Some(command) => command,
                    None => match self.commands.try_recv() {
                        Ok(command) => command,
                        Err(TryRecvError::Empty) => break,
                        Err(TryRecvError::Disconnected) => {
                            draining = true;
                            break;
                        }
                    },
                };
                match command {
                    Command::Submit { job, events, accepted } => {
                        self.submit(&mut scheduler, &mut listeners, *job, events, accepted, draining);
                    }
                    Command::Cancel(id) => scheduler.cancel(id),
                    Command::Drain => draining = true,
                    Command::Stop => {
                        draining = true;
                        listeners.keys().for_each(|id| scheduler.cancel(*id));
                    }
                }
            }
            let begin = Instant::now();
            let outputs = scheduler.step(begin);
            if !idle {
                self.shared.metrics().step.observe(begin.elapsed());
            }
            for output in outputs {
                self.tell(&mut scheduler, &mut listeners, output);
            }
        }
        drop(ending);
    }

    fn submit<R: Runner>(
        &self,
        scheduler: &mut Scheduler<R>,
        listeners: &mut HashMap<JobId, Listener>,
        job: Job,
        events: UnboundedSender<Event>,
        accepted: oneshot::Sender<Result<JobId>>,
        draining: bool,
    ) {
        let prompt_tokens = job.prompt.len();
        let outcome = if draining { Err(Error::EngineStopped) } else { scheduler.submit(job) };
        let mut metrics = self.shared.metrics();
        let id = outcome.as_ref().ok().copied();
        match id {
            Some(id) => {
                metrics.accepted += 1;
                let listener =
                    Listener { events, submitted: Instant::now(), last_token: None, prompt_tokens };
                listeners.insert(id, listener);
            }
            None => metrics.refused += 1,
        }
        if let (Err(_), Some(id)) = (accepted.send(outcome), id) {
            // Nobody waits for it any more.
            scheduler.cancel(id);
        }
    }

    fn tell<R: Runner>(
        &self,
        scheduler: &mut Scheduler<R>,
        listeners: &mut HashMap<JobId, Listener>,
        Output { job, event }: Output,
    ) {
        let Some(listener) = listeners.get_mut(&job) else { return };
        let (now, waited) = (Instant::now(), listener.submitted.elapsed());
        {
            let mut metrics = self.shared.metrics();
            match &event {
                Event::Started { cached_tokens } => {
                    metrics.queue_time.observe(waited);
                    metrics.prompt_tokens += listener.prompt_tokens as u64;
                    metrics.cached_tokens += *cached_tokens as u64;
                }
                Event::Token(_) => {
                    metrics.generated_tokens += 1;
                    match listener.last_token.replace(now) {
                        Some(last) => metrics.per_token.observe(now - last),
                        None => metrics.first_token.observe(waited),
                    }
                }
                Event::Finished(finished) => {
                    *metrics.finished.entry(finished.reason).or_default() += 1;
                    metrics.whole.observe(waited);
                    tracing::info!(
                        job = job.0,
                        reason = super::metrics::reason_name(finished.reason),
                        prompt_tokens = finished.prompt_tokens,
                        cached_tokens = finished.cached_tokens,
                        generated_tokens = finished.generated_tokens,
                        seconds = waited.as_secs_f64(),
                        "finished"
                    );
                }
                Event::Failed(error) => {
                    metrics.failed += 1;
                    tracing::error!(job = job.0, %error, "failed");
                }
            }
        }
        let last = event.is_last();
        let heard = listener.events.send(event).is_ok();
        if last {
            listeners.remove(&job);
        } else if !heard {
            scheduler.cancel(job);
        }
    }

    fn publish<R: Runner>(&self, scheduler: &mut Scheduler<R>) {
        let (load, usage, counters) = (scheduler.load(), scheduler.usage(), scheduler.counters());
        let mut status = self.shared.status();
        (status.load, status.usage, status.preemptions) = (load, usage, scheduler.preemptions());
        status.prefixes = scheduler.prefixes();
        if let Ok(counters) = counters {
            status.counters = counters;
        }
    }

    /// Says that there will be no engine, and why: whoever asks hears of it.
    pub fn abandon(self, error: &Error) {
        self.shared.status().phase = Phase::Stopped(Some(error.to_string()));
    }
}

/// Says that the engine is over, however it ends.
struct Ending<'a>(&'a Shared);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        let why = std::thread::panicking().then(|| "the engine panicked".to_owned());
        self.0.status().phase = Phase::Stopped(why);
    }
}
