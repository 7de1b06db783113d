//! The scheduler over a runner that computes nothing and holds the scheduler to its contract: all short sequences of what may happen, and
//! single rules.

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::rc::Rc;
use std::time::Duration;

use spinkv::RowsByReach;
use spinkv::memory::{RequestPlan, RowPlan};
use spinkv::pipeline::StageTimes;

use super::*;
use crate::config::ModelConfig;

const VOCAB: usize = 64;
const LAYERS: usize = 2;
const END: u32 = 1;
const PAGE_TOKENS: usize = 4;

/// Tokens are a hash of all before them; memory is pages. Panics on whatever a scheduler must not do.
struct Fake {
    config: ModelConfig,
    pages: usize,
    requests: HashMap<RequestId, Held>,
    next: u64,
    prompts: u64,
    /// Fails the next decode step.
    error: Rc<Cell<Option<Error>>>,
    /// Sizes of the decode steps.
    steps: Vec<usize>,
    /// Whether the host has no memory for another request.
    no_more: bool,
    /// Requests that it has tables for, parked ones among them.
    places: usize,
}

struct Held {
    max_tokens: usize,
    history: Vec<u32>,
    parked: bool,
}

impl Held {
    /// A parked request keeps one page, or what it has if that is less.
    fn pages(&self) -> usize {
        if self.parked { pages(self.max_tokens).min(1) } else { pages(self.max_tokens) }
    }
}

struct FakePrompt {
    request: RequestId,
    tokens: Vec<u32>,
    layer: usize,
    number: u64,
}

fn pages(tokens: usize) -> usize {
    tokens.div_ceil(PAGE_TOKENS)
}

/// The token after `history`: sometimes the end token.
fn next_token(history: &[u32]) -> u32 {
    let hash =
        history.iter().fold(17u32, |hash, token| (hash ^ token).wrapping_mul(0x0100_0193).rotate_left(7));
    let token = hash % 97;
    if token < 8 { END } else { 2 + token % (VOCAB as u32 - 2) }
}

fn logits(history: &[u32]) -> Vec<f32> {
    let mut logits = vec![0.0; VOCAB];
    logits[next_token(history) as usize] = 9.0;
    logits
}

/// What a job generates alone.
fn alone(job: &Job) -> Vec<u32> {
    let mut history = job.prompt.clone();
    for _ in 0..job.max_tokens {
        let token = next_token(&history);
        history.push(token);
        if token == END && !job.ignore_eos {
            break;
        }
    }
    history.split_off(job.prompt.len())
}

impl Fake {
    fn new(pages: usize) -> Self {
        let mut config = ModelConfig::preset("qwen3-14b").expect("a preset");
        config.vocab_size = VOCAB;
        config.eos_token_ids = vec![END];
        config.max_position_embeddings = 64;
        Self {
            config,
            pages,
            requests: HashMap::new(),
            next: 0,
            prompts: 0,
            error: Rc::default(),
            steps: Vec::new(),
            no_more: false,
            places: usize::MAX,
        }
    }

    fn used(&self) -> usize {
        self.requests.values().map(Held::pages).sum()
    }

    fn shortage(&self, max_tokens: usize, free: usize) -> Error {
        let needed = pages(max_tokens);
        let total = self.pages;
        Error::Kv(spinkv::Error::OutOfGpuPages {
            max_tokens,
            needed,
            rows: 1,
            steady: 0,
            mandatory: needed,
            free,
            total,
        })
    }
}

impl Runner for Fake {
    type Prompt = FakePrompt;

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn check(&self, max_tokens: usize) -> Result<()> {
        if pages(max_tokens) > self.pages { Err(self.shortage(max_tokens, self.pages)) } else { Ok(()) }
    }

    fn places(&self) -> usize {
        self.places
    }

    fn admit(&mut self, max_tokens: usize) -> Result<RequestId> {
        assert!(self.requests.len() < self.places, "nobody is offered a place that there is not");
        let free = self.pages - self.used();
        if pages(max_tokens) > free {
            return Err(self.shortage(max_tokens, free));
        }
        if self.no_more {
            let what = "slabs".to_owned();
            return Err(Error::Kv(spinkv::Error::OutOfHostMemory { what, needed: 1, free: 0, limit: 1 }));
        }
        let id = RequestId(self.next);
        self.next += 1;
        self.requests.insert(id, Held { max_tokens, history: Vec::new(), parked: false });
        Ok(id)
    }

    fn release(&mut self, request: RequestId) {
        self.requests.remove(&request).expect("a request is released once");
    }

    fn park(&mut self, request: RequestId) -> Result<()> {
        let held = self.requests.get_mut(&request).expect("an admitted request");
        assert!(!held.parked && !held.history.is_empty(), "who generates may be parked");
        held.parked = true;
        Ok(())
    }

    fn resume(&mut self, request: RequestId) -> Result<()> {
        let held = &self.requests[&request];
        assert!(held.parked);
        let (max_tokens, more) = (held.max_tokens, pages(held.max_tokens) - held.pages());
        let free = self.pages - self.used();
        if more > free {
            return Err(self.shortage(max_tokens, free));
        }
        self.requests.get_mut(&request).expect("looked up above").parked = false;
        Ok(())
    }

    fn plan(&self, request: RequestId) -> Result<RequestPlan> {
        let max_tokens = self.requests[&request].max_tokens;
        let pages = pages(max_tokens);
        let row = RowPlan {
            steady_pages: pages.min(1),
            mandatory_pages: pages.saturating_sub(1),
            buffering_pages: 0,
            host_slabs: 0,
        };
        let by_reach = RowsByReach { selected: 1, ..RowsByReach::default() };
        Ok(RequestPlan { max_tokens, rows: 1, row, by_reach, selectable_pages: row.slots() })
    }

    fn begin_prompt(&mut self, request: RequestId, tokens: &[u32]) -> Result<FakePrompt> {
        self.prompts += 1;
        Ok(FakePrompt { request, tokens: tokens.to_vec(), layer: 0, number: self.prompts })
    }

    fn prompt_layer(
        &mut self,
        prompt: &mut FakePrompt,
        _: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<Option<Vec<f32>>> {
        assert_eq!(prompt.number, self.prompts, "one prompt is under way at a time");
        let held = self.requests.get_mut(&prompt.request).expect("an admitted request");
        assert!(held.history.is_empty() && prompt.layer < LAYERS && prompt.tokens.len() <= held.max_tokens);
        prompt.layer += 1;
        if prompt.layer < LAYERS {
            return Ok(None);
        }
        held.history.clone_from(&prompt.tokens);
        Ok(Some(logits(&held.history)))
    }

    fn decode(&mut self, batch: &[DecodeToken]) -> Result<Vec<f32>> {
        if let Some(error) = self.error.take() {
            return Err(error);
        }
        self.steps.push(batch.len());
        let distinct: HashSet<_> = batch.iter().map(|part| part.request).collect();
        assert_eq!(distinct.len(), batch.len(), "each request once");
        let mut all = Vec::new();
        for DecodeToken { request, token } in batch {
            let held = self.requests.get_mut(request).expect("an admitted request");
            assert!(!held.history.is_empty() && !held.parked, "its prompt is through, and it is not parked");
            held.history.push(*token);
            assert!(held.history.len() <= held.max_tokens, "within what was admitted");
            all.extend(logits(&held.history));
        }
        Ok(all)
    }

    fn counters(&mut self) -> Result<Counters> {
        Ok(Counters::default())
    }

    fn usage(&self) -> MemoryUsage {
        MemoryUsage::default()
    }

    fn stage_times(&self) -> Option<(StageTimes, StageTimes)> {
        None
    }
}

/// A scheduler and what it told.
struct Bench {
    scheduler: Scheduler<Fake>,
    jobs: BTreeMap<JobId, Job>,
    cancelled: HashSet<JobId>,
    tokens: BTreeMap<JobId, Vec<u32>>,
    started: Vec<JobId>,
    ended: BTreeMap<JobId, std::result::Result<Reason, String>>,
    now: Instant,
}

impl Bench {
    fn new(pages: usize, options: SchedulerOptions) -> Self {
        Self {
            scheduler: Scheduler::new(Fake::new(pages), None, options),
            jobs: BTreeMap::new(),
            cancelled: HashSet::new(),
            tokens: BTreeMap::new(),
            started: Vec::new(),
            ended: BTreeMap::new(),
            now: Instant::now(),
        }
    }

    /// Tokens come back by their scores.
    fn submit(&mut self, prompt: usize, max_tokens: usize, priority: i32) -> JobId {
        let seed = self.jobs.len() as u32 + 2;
        let prompt = (0..prompt as u32).map(|i| 2 + (i * 7 + seed * 13) % 60).collect();
        let job = Job { prompt, max_tokens, priority, logprobs: Some(0), ..Job::default() };
        self.submit_job(job)
    }

    fn submit_job(&mut self, job: Job) -> JobId {
        let id = self.scheduler.submit(job.clone()).expect("a job that can run");
        self.jobs.insert(id, job);
        id
    }

    fn cancel(&mut self, id: JobId) {
        self.scheduler.cancel(id);
        self.cancelled.insert(id);
    }

    fn step(&mut self) {
        for Output { job, event } in self.scheduler.step(self.now) {
            assert!(!self.ended.contains_key(&job), "nothing comes after the end of {job:?}");
            let mut take = |piece: Piece| {
                self.tokens.entry(job).or_default().extend(piece.tokens.iter().map(|token| token.id));
            };
            match event {
                Event::Started { .. } => self.started.push(job),
                Event::Token(piece) => take(piece),
                Event::Finished(finished) => {
                    take(finished.rest.clone());
                    if finished.reason == Reason::EndToken {
                        // The end token has no text, and so no score.
                        self.tokens.entry(job).or_default().push(END);
                    }
                    let found = self.tokens.get(&job).map_or(0, Vec::len);
                    if self.jobs[&job].logprobs.is_some() {
                        assert_eq!(finished.generated_tokens, found, "{finished:?}");
                    }
                    self.ended.insert(job, Ok(finished.reason));
                }
                Event::Failed(error) => {
                    self.ended.insert(job, Err(error.to_string()));
                }
            }
        }
        let fake = &self.scheduler.runner;
        assert!(fake.used() <= fake.pages);
        let load = self.scheduler.load();
        assert!(load.prompts + load.decoding <= self.scheduler.options.max_batch);
        assert_eq!(
            fake.requests.len(),
            load.prompts + load.decoding + load.parked,
            "who runs or is parked holds memory, and nobody else"
        );
    }

    /// Goes on until nothing is left to do, and checks everything.
    fn finish(&mut self) {
        let most: usize = self.jobs.values().map(|job| job.max_tokens + LAYERS + 1).sum();
        let mut steps = 0;
        while !self.scheduler.is_idle() {
            self.step();
            steps += 1;
            assert!(steps <= most + 2, "no job gets on: {:?}", self.scheduler.load());
        }
        assert!(self.scheduler.runner.requests.is_empty(), "all memory is free");
        for (id, job) in &self.jobs {
            let (tokens, expected) = (self.tokens.get(id).cloned().unwrap_or_default(), alone(job));
            match self.ended.get(id).expect("every job ends") {
                Ok(Reason::EndToken) => assert_eq!((&tokens, expected.last()), (&expected, Some(&END))),
                Ok(Reason::Length) => assert_eq!(tokens, expected),
                Ok(Reason::Cancelled) => {
                    assert!(self.cancelled.contains(id));
                    assert_eq!(tokens, expected[..tokens.len()]);
                }
                other => panic!("{id:?} ended by {other:?}"),
            }
        }
    }
}

/// All sequences of five: jobs that are small, large and urgent, one that fills the machine, cancels of the oldest and the newest, and steps.
#[test]
fn all_short_sequences_end_well() {
    const DEPTH: u32 = 5;
    const CHOICES: usize = 7;
    let options = |max_batch, prompt_layers, patience, turn| SchedulerOptions {
        max_batch,
        max_queue: 9,
        prompt_layers,
        patience,
        preempt: true,
        turn,
    };
    for (options, places) in [
        (options(8, 1, 1, None), usize::MAX),
        (options(2, 3, 4, None), 2),
        (options(8, 1, 2, Some(1)), usize::MAX),
        (options(2, 3, 1, Some(2)), 3),
    ] {
        for sequence in 0..CHOICES.pow(DEPTH) {
            let mut bench = Bench::new(6, options);
            bench.scheduler.runner.places = places;
            let mut rest = sequence;
            for _ in 0..DEPTH {
                let running = |bench: &Bench| -> Vec<JobId> {
                    bench.jobs.keys().filter(|id| !bench.ended.contains_key(id)).copied().collect()
                };
                match rest % CHOICES {
                    0 => drop(bench.submit(3, 4, 0)),
                    1 => drop(bench.submit(9, 7, 0)),
                    2 => drop(bench.submit(5, 3, 1)),
                    3 => drop(bench.submit(20, 5, -1)),
                    4 => running(&bench).first().into_iter().for_each(|id| bench.cancel(*id)),
                    5 => running(&bench).last().into_iter().for_each(|id| bench.cancel(*id)),
                    _ => bench.step(),
                }
                rest /= CHOICES;
            }
            bench.finish();
        }
    }
}

fn usual() -> SchedulerOptions {
    SchedulerOptions {
        max_batch: 8,
        max_queue: 64,
        prompt_layers: 1,
        patience: 3,
        preempt: false,
        turn: None,
    }
}

/// A job that never chooses an end token.
fn lasting(prompt: usize, max_tokens: usize) -> Job {
    let prompt = (0..prompt as u32).map(|i| 2 + i % 60).collect();
    Job { prompt, max_tokens, ignore_eos: true, logprobs: Some(0), ..Job::default() }
}

#[test]
fn what_can_never_run_is_refused_at_once() {
    let mut scheduler = Scheduler::new(Fake::new(6), None, SchedulerOptions { max_queue: 1, ..usual() });
    let mut refused = |job: Job| scheduler.submit(job).expect_err("a refusal");
    assert!(matches!(refused(lasting(0, 4)), Error::EmptyPrompt));
    assert!(matches!(refused(lasting(4, 0)), Error::NothingToGenerate));
    assert!(matches!(refused(lasting(65, 1)), Error::PromptTooLong { tokens: 65, limit: 64 }));
    let job = Job { prompt: vec![3, 64], ..lasting(1, 1) };
    assert!(matches!(refused(job), Error::TokenOutOfVocabulary { id: 64, .. }));
    let sampling = crate::sampling::SamplingParams { top_p: 0.0, ..Default::default() };
    assert!(matches!(
        refused(Job { sampling, ..lasting(4, 4) }),
        Error::InvalidSampling { name: "top_p", .. }
    ));
    // 24 tokens fit: the last one is never passed through the model.
    let error = refused(lasting(20, 6));
    assert!(matches!(error, Error::Kv(spinkv::Error::OutOfGpuPages { needed: 7, .. })), "{error}");
    assert!(scheduler.submit(lasting(20, 5)).is_ok());
    assert!(matches!(scheduler.submit(lasting(1, 1)), Err(Error::QueueFull { limit: 1 })));
}

#[test]
fn a_step_of_all_runs_between_two_layers_of_a_prompt() {
    let mut bench = Bench::new(64, usual());
    bench.submit_job(lasting(4, 20));
    for _ in 0..LAYERS {
        bench.step();
    }
    assert!(bench.scheduler.runner.steps.is_empty(), "the prompt is through and nothing is decoded");
    bench.submit_job(lasting(9, 9));
    for layer in 0..LAYERS {
        bench.step();
        assert_eq!(bench.scheduler.runner.steps.len(), layer + 1, "one step before each layer");
    }
    bench.step();
    assert_eq!(bench.scheduler.runner.steps, [1, 1, 2]);
    bench.finish();
}

/// A job as large as the machine is not overtaken for ever by small ones, which never end to come; nor is one of low priority.
#[test]
fn nobody_starves() {
    for (large, priority) in [(lasting(20, 5), 0), (lasting(3, 4), -5)] {
        let mut bench = Bench::new(6, usual());
        let crowd = |bench: &mut Bench| {
            bench.submit_job(lasting(3, 4));
        };
        (0..4).for_each(|_| crowd(&mut bench));
        bench.step();
        let id = bench.submit_job(Job { priority, ..large });
        let mut steps = 0;
        while !bench.started.contains(&id) {
            crowd(&mut bench);
            bench.step();
            steps += 1;
            assert!(steps < 60, "it starves");
        }
        let later = bench.started.iter().filter(|started| **started > id).count();
        assert!(later <= usual().patience, "overtaken {later} times");
        bench.finish();
    }
}

#[test]
fn the_urgent_go_first_and_small_ones_use_what_is_free() {
    let mut bench = Bench::new(6, SchedulerOptions { patience: 9, ..usual() });
    let running = bench.submit_job(lasting(10, 7)); // 4 pages
    bench.step();
    let large = bench.submit_job(lasting(9, 7)); // 4 pages
    let urgent = bench.submit_job(Job { priority: 3, ..lasting(9, 7) });
    let small = bench.submit_job(lasting(3, 2)); // 1 page
    for _ in 0..4 {
        bench.step();
    }
    assert_eq!(bench.started, [running, small], "both large ones wait");
    bench.finish();
    assert_eq!(bench.started, [running, small, urgent, large]);
}

/// Who is urgent takes the cache of who is not, as much as it needs; who was parked goes on with the tokens that it has alone.
#[test]
fn the_urgent_park_others_which_go_on_later() {
    let mut bench = Bench::new(9, SchedulerOptions { preempt: true, ..usual() });
    let [first, second, third] = [0, -1, 0].map(|priority| {
        let id = bench.submit_job(Job { priority, ..lasting(5, 8) }); // 3 pages each
        (0..LAYERS).for_each(|_| bench.step());
        id
    });
    let parked = |bench: &Bench| bench.scheduler.parked.iter().map(|active| active.id).collect::<Vec<_>>();
    let urgent = bench.submit_job(Job { priority: 1, ..lasting(6, 7) }); // 3 pages
    bench.step();
    assert_eq!(parked(&bench), [second, third], "the lowest first, then who came last: each gives 2 pages");
    assert_eq!(bench.started, [first, second, third, urgent]);
    // Nobody of their own priority goes before them, though there is room; who needs more than all could give parks nobody.
    let equal = bench.submit_job(lasting(1, 1));
    let greedy = bench.submit_job(Job { priority: 2, ..lasting(30, 7) });
    bench.step();
    assert_eq!((parked(&bench), bench.started.len()), (vec![second, third], 4));
    bench.cancel(second);
    // The first one ends, and what is free is too little for the greedy one.
    bench.step();
    assert!(bench.ended.contains_key(&first));
    assert_eq!((parked(&bench).len(), bench.started.len()), (0, 4), "who is parked goes on");
    bench.finish();
    assert_eq!(bench.started[4..], [equal, greedy]);
    assert_eq!(bench.ended[&third], Ok(Reason::Length));
    assert_eq!(bench.scheduler.preemptions(), 2);
}

/// A stream of urgent jobs does not keep a parked one from going on for ever.
#[test]
fn who_is_parked_does_not_starve() {
    for turn in [None, Some(1), Some(2), Some(8)] {
        let mut bench = Bench::new(4, SchedulerOptions { preempt: true, turn, ..usual() });
        let id = bench.submit_job(Job { priority: -1, ..lasting(9, 8) });
        let mut steps = 0;
        while !bench.ended.contains_key(&id) {
            bench.submit_job(lasting(9, 3));
            bench.step();
            steps += 1;
            let most = if turn.is_none() { 60 } else { 100 };
            assert!(steps < most, "it starves with turns of {turn:?}: {:?}", bench.scheduler.load());
        }
        bench.finish();
    }
}

#[test]
fn nobody_is_parked_for_an_equal() {
    let mut bench = Bench::new(6, SchedulerOptions { preempt: true, ..usual() });
    bench.submit_job(lasting(9, 9)); // 5 pages
    bench.submit_job(lasting(9, 9));
    bench.finish();
    assert_eq!((bench.started.len(), bench.scheduler.preemptions()), (2, 0));
}

/// Three of which no two have room beside what parked ones keep: nobody waits for another's end.
#[test]
fn equals_have_memory_in_turn() {
    let turn = |turn| {
        let mut bench = Bench::new(7, SchedulerOptions { preempt: true, turn, patience: 9, ..usual() });
        let ids = [9, 10, 11].map(|prompt| bench.submit_job(lasting(prompt, 8))); // 4 to 5 pages
        let mut first_tokens = [None; 3];
        let (mut longest, mut alone, mut running) = (0, 0, None);
        for step in 0.. {
            if bench.scheduler.is_idle() {
                break;
            }
            bench.step();
            for (id, first) in ids.iter().zip(&mut first_tokens) {
                if bench.tokens.contains_key(id) {
                    first.get_or_insert(step);
                }
            }
            let now = bench.scheduler.batch.first().map(|active| active.id);
            alone = if now.is_some() && now == running { alone + 1 } else { 0 };
            (longest, running) = (alone.max(longest), now);
        }
        bench.finish();
        (first_tokens.map(Option::unwrap), longest, bench.scheduler.preemptions())
    };
    let (first, _, preemptions) = turn(None);
    assert!(
        first[1] >= first[0] + 8 && first[2] >= first[1] + 8 && preemptions == 0,
        "one after another: {first:?}"
    );
    let (first, longest, preemptions) = turn(Some(2));
    assert!(first[2] <= 3 * (LAYERS + 2), "each has its first token soon: {first:?}");
    assert!(longest <= 5 && preemptions >= 6, "{longest} steps on end, {preemptions} turns");
}

/// One that waits for a place has no use for another's memory, and does not keep those that are parked from their turns.
#[test]
fn nobody_is_parked_for_a_place() {
    let options = SchedulerOptions { preempt: true, turn: Some(1), max_batch: 3, ..usual() };
    let mut bench = Bench::new(7, options);
    bench.scheduler.runner.places = 3;
    let ids = [(); 4].map(|()| bench.submit_job(lasting(9, 20))); // 7 pages
    let mut before = bench.tokens.clone();
    let (mut longest, mut still) = (0, [0; 3]);
    for _ in 0..60 {
        bench.step();
        for (id, still) in ids.iter().zip(&mut still).filter(|(id, _)| before.contains_key(id)) {
            let more = bench.tokens[id] != before[id] || bench.ended.contains_key(id);
            *still = if more { 0 } else { *still + 1 };
            longest = longest.max(*still);
        }
        before = bench.tokens.clone();
    }
    assert!(longest <= 8, "{longest} steps without a token");
    bench.finish();

    let mut bench = Bench::new(64, options);
    bench.scheduler.runner.places = 3;
    for _ in 0..4 {
        bench.submit_job(lasting(9, 20));
    }
    bench.finish();
    assert_eq!(bench.scheduler.preemptions(), 0, "there is room for all but the one that waits");
}

/// A parked job takes no more of others than it lacks.
#[test]
fn a_turn_costs_what_is_missing() {
    let options = SchedulerOptions { preempt: true, turn: Some(1), max_batch: 1, ..usual() };
    let mut bench = Bench::new(64, options);
    let large = bench.submit_job(lasting(30, 30));
    (0..LAYERS + 2).for_each(|_| bench.step());
    let small = bench.submit_job(lasting(1, 40));
    let mut steps = 0;
    while !bench.ended.contains_key(&large) {
        bench.step();
        steps += 1;
    }
    assert!(steps < 75 && !bench.ended.contains_key(&small), "both go on in turn: {steps}");
    bench.finish();
}

/// Without the memory of the host nothing is won by parking.
#[test]
fn who_was_parked_for_nothing_goes_on_at_once() {
    let mut bench = Bench::new(6, SchedulerOptions { preempt: true, max_batch: 1, ..usual() });
    let id = bench.submit_job(Job { priority: -1, ..lasting(9, 9) });
    (0..LAYERS).for_each(|_| bench.step());
    bench.scheduler.runner.no_more = true;
    let urgent = bench.submit_job(lasting(1, 1));
    bench.step();
    assert_eq!(bench.scheduler.load(), Load { waiting: 1, prompts: 0, decoding: 1, parked: 0 });
    (0..3).for_each(|_| bench.step());
    assert_eq!(bench.scheduler.preemptions(), 1, "it is not tried at every step");
    bench.scheduler.runner.no_more = false;
    bench.finish();
    assert!(bench.ended.contains_key(&id) && bench.ended.contains_key(&urgent));
}

/// Where a stop text ends a job is the text's matter; that it ends it, and frees what it held, the scheduler's.
#[test]
fn a_stop_text_ends_its_job() {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/needle-tiny");
    let tokenizer = Tokenizer::open(dir).expect("the tokenizer is bundled");
    let job = lasting(3, 12);
    let whole = tokenizer.decode(&alone(&job)).unwrap();
    let stop: String = whole.chars().skip(4).take(2).collect();
    let mut scheduler = Scheduler::new(Fake::new(64), Some(tokenizer), usual());
    scheduler.submit(Job { stop: vec![String::new(), stop.clone()], ..job }).unwrap();
    let (mut text, mut reason) = (String::new(), None);
    while !scheduler.is_idle() {
        for output in scheduler.step(Instant::now()) {
            match output.event {
                Event::Token(piece) => text += &piece.text,
                Event::Finished(finished) => {
                    text += &finished.rest.text;
                    reason = Some((finished.reason, finished.generated_tokens < 12));
                }
                _ => {}
            }
        }
    }
    assert_eq!(
        (reason, text.as_str()),
        (Some((Reason::StopText, true)), &whole[..whole.find(&stop).unwrap()])
    );
    assert!(scheduler.runner.requests.is_empty());
}

#[test]
fn deadlines_end_jobs_in_every_state() {
    let mut bench = Bench::new(7, SchedulerOptions { max_batch: 2, ..usual() });
    let deadline = Some(bench.now + Duration::from_secs(5));
    let decoding = bench.submit_job(Job { deadline, ..lasting(3, 9) });
    let unhurried = bench.submit_job(Job { deadline: None, ..lasting(3, 3) });
    (0..LAYERS + 1).for_each(|_| bench.step());
    let waiting = bench.submit_job(Job { deadline, ..lasting(3, 9) });
    assert_eq!(bench.scheduler.load(), Load { waiting: 1, prompts: 1, decoding: 1, parked: 0 });
    bench.now += Duration::from_secs(5);
    bench.step();
    for id in [decoding, waiting] {
        assert_eq!(bench.ended.get(&id), Some(&Ok(Reason::Deadline)), "{id:?}");
    }
    while !bench.scheduler.is_idle() {
        bench.step();
    }
    assert_eq!(bench.ended.get(&unhurried), Some(&Ok(Reason::Length)));
    assert!(bench.scheduler.runner.requests.is_empty());
}

/// Who is at fault for a failed step ends; who is not goes on and gets its own tokens.
#[test]
fn a_failed_step_takes_no_more_jobs_than_it_must() {
    let two = |error: Error| {
        let mut bench = Bench::new(64, usual());
        let ids = [bench.submit_job(lasting(3, 9)), bench.submit_job(lasting(5, 9))];
        (0..2 * LAYERS).for_each(|_| bench.step());
        bench.scheduler.runner.error.set(Some(error));
        while !bench.scheduler.is_idle() {
            bench.step();
        }
        assert!(bench.scheduler.runner.requests.is_empty());
        let whole = ids.map(|id| bench.tokens[&id] == alone(&bench.jobs[&id]));
        (ids.map(|id| bench.ended[&id].clone()), whole)
    };
    let fault = spinkv::Error::StepFault { request: RequestId(0), layer: 1, kv_head: 2, fault: 3 };
    let (ended, whole) = two(Error::Kv(fault));
    assert!(ended[0].as_ref().is_err_and(|error| error.contains("fault 3")), "{ended:?}");
    assert_eq!((&ended[1], whole[1]), (&Ok(Reason::Length), true));
    let refused = spinkv::Error::AllocationFailed { what: "slabs".to_owned(), bytes: 7 };
    let (ended, whole) = two(Error::Kv(refused));
    assert_eq!((&ended[0], whole[0]), (&Ok(Reason::Length), true), "the last to come makes room");
    assert!(ended[1].is_err());
    let (ended, _) = two(Error::UnsupportedByBackend { backend: "fake", what: "go on" });
    assert!(ended.iter().all(|end| end.as_ref().is_err_and(|error| error.contains("go on"))), "{ended:?}");
}

/// What others want of a step, scores for instance, changes nothing for who draws at random.
#[test]
fn draws_belong_to_their_job() {
    let drawn = |seed, logprobs| Job {
        sampling: crate::sampling::SamplingParams { temperature: 3.0, seed, ..Default::default() },
        logprobs,
        ..lasting(4, 12)
    };
    let run = |jobs: &[Job]| {
        let mut bench = Bench::new(64, usual());
        let id = bench.submit_job(jobs[0].clone());
        for job in &jobs[1..] {
            bench.submit_job(job.clone());
        }
        while !bench.scheduler.is_idle() {
            bench.step();
        }
        bench.tokens[&id].clone()
    };
    let scored = drawn(7, Some(2));
    let tokens = run(std::slice::from_ref(&scored));
    assert_eq!(tokens.len(), 12);
    assert_eq!(tokens, run(&[scored.clone(), drawn(7, None), drawn(8, None), lasting(9, 3)]));
    assert_ne!(tokens, run(&[drawn(9, Some(2))]));
}
