//! The scheduler over the model itself: random arrivals, cancels and limits, and every job gets the tokens that it gets alone.

#![cfg(feature = "serve")]

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{LazyLock, Mutex};
use std::time::Instant;

use proptest::prelude::*;
use spinkv::algorithms::{self, MethodOptions};
use spinkv::backend::cpu::CpuBackend;
use spinkv::memory::{KvDtype, MemoryLimits, MemoryUsage, PageLayout, SLAB_PAGES};
use spinkv::pipeline::{Budget, Pipeline, SteadyZone};
use spinkv::{KvConfig, KvShape};
use spinkv_engine::config::ModelConfig;
use spinkv_engine::model::Model;
use spinkv_engine::runner::{CpuRunner, Runner};
use spinkv_engine::sampling::SamplingParams;
use spinkv_engine::serve::{Event, Job, JobId, Reason, Scheduler, SchedulerOptions};

static MODEL: LazyLock<Model> = LazyLock::new(|| {
    let dir = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tiny-llama31-random"));
    let config = ModelConfig::open(&dir).expect("the configuration is bundled");
    Model::open(&dir, config, |_, _| {}).expect("the model is bundled")
});

fn slab_bytes() -> u64 {
    PageLayout::new(8, MODEL.config().head_dim, KvDtype::Bf16).unwrap().page_bytes() as u64
        * SLAB_PAGES as u64
}

fn runner(limits: MemoryLimits, late: Option<u64>) -> CpuRunner<'static> {
    let config = MODEL.config();
    let shape = KvShape::new(config.layers, config.query_heads, config.kv_heads, config.head_dim).unwrap();
    let layout = PageLayout::new(8, config.head_dim, KvDtype::Bf16).unwrap();
    let options = MethodOptions {
        budget: Budget::Tokens(32),
        steady: SteadyZone { sinks: 4, window: 8 },
        ..MethodOptions::default()
    };
    let kv = KvConfig::new(shape, layout, algorithms::by_name("shadowkv", &options).unwrap()).unwrap();
    let backend = CpuBackend::new(kv, limits).with_prefixes(None).unwrap();
    let backend = match late {
        Some(seed) => backend.with_late_transfers(seed),
        None => backend,
    };
    CpuRunner::new(&MODEL, Pipeline::new(backend))
}

/// What is asked for; jobs of the same numbers are the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Ask {
    prompt: usize,
    /// Tokens of it that all others of so many begin with.
    shared: usize,
    tokens: usize,
    seed: u64,
    drawn: bool,
}

impl Ask {
    fn job(self, priority: i32) -> Job {
        let seed = |i: usize| if i < self.shared { 9 } else { self.seed as u32 };
        let token = |i: usize| (i as u32 * 2_654_435 + seed(i) * 40_503) % 4000 + 10;
        let temperature = if self.drawn { 1.5 } else { 0.0 };
        Job {
            prompt: (0..self.prompt).map(token).collect(),
            max_tokens: self.tokens,
            sampling: SamplingParams { temperature, seed: self.seed, ..SamplingParams::default() },
            ignore_eos: true,
            logprobs: Some(1),
            priority,
            ..Job::default()
        }
    }
}

type Tokens = Vec<(u32, f32)>;

/// Runs all jobs to their end: tokens with the bits of their scores, and how each ended.
struct Run {
    scheduler: Scheduler<CpuRunner<'static>>,
    tokens: HashMap<JobId, Tokens>,
    ended: HashMap<JobId, Reason>,
}

impl Run {
    fn new(limits: MemoryLimits, late: Option<u64>, options: SchedulerOptions) -> Self {
        let scheduler = Scheduler::new(runner(limits, late), None, options);
        Self { scheduler, tokens: HashMap::new(), ended: HashMap::new() }
    }

    fn step(&mut self) {
        for output in self.scheduler.step(Instant::now()) {
            match output.event {
                Event::Started { .. } => {}
                Event::Token(piece) => {
                    let tokens = piece.tokens.iter().map(|token| (token.id, token.logprob));
                    self.tokens.entry(output.job).or_default().extend(tokens);
                }
                Event::Finished(finished) => {
                    assert!(self.ended.insert(output.job, finished.reason).is_none(), "one end a job");
                }
                Event::Failed(error) => panic!("{error}"),
            }
        }
    }

    fn finish(&mut self) {
        let mut steps = 0;
        while !self.scheduler.is_idle() {
            self.step();
            steps += 1;
            assert!(steps < 2000, "no job gets on: {:?}", self.scheduler.load());
        }
    }
}

fn alone(ask: Ask) -> Tokens {
    static KNOWN: LazyLock<Mutex<HashMap<Ask, Tokens>>> = LazyLock::new(Mutex::default);
    if let Some(tokens) = KNOWN.lock().unwrap().get(&ask) {
        return tokens.clone();
    }
    let mut run = Run::new(MemoryLimits::default(), None, SchedulerOptions::default());
    let id = run.scheduler.submit(ask.job(0)).unwrap();
    run.finish();
    let tokens = run.tokens.remove(&id).unwrap();
    assert_eq!(tokens.len(), ask.tokens);
    KNOWN.lock().unwrap().insert(ask, tokens.clone());
    tokens
}

#[derive(Clone, Copy, Debug)]
enum Happens {
    Submit(Ask, i32),
    /// Of those that were submitted, whichever.
    Cancel(usize),
    Steps(usize),
}

fn ask() -> impl Strategy<Value = Ask> {
    (
        prop::sample::select(vec![1, 7, 30, 90, 180, 300]),
        prop::sample::select(vec![0, 128, 170, 256]),
        prop::sample::select(vec![1, 3, 9]),
        0..3u64,
        any::<bool>(),
    )
        .prop_map(|(prompt, shared, tokens, seed, drawn)| Ask { prompt, shared, tokens, seed, drawn })
}

fn happens() -> impl Strategy<Value = Happens> {
    prop_oneof![
        4 => (ask(), -1..2i32).prop_map(|(ask, priority)| Happens::Submit(ask, priority)),
        1 => any::<usize>().prop_map(Happens::Cancel),
        3 => (1..5usize).prop_map(Happens::Steps),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_job_gets_what_it_gets_alone(
        events in prop::collection::vec(happens(), 1..24),
        max_batch in 1..6usize,
        prompt_layers in 1..4usize,
        patience in 0..3usize,
        // From the largest job's least to all that anybody wants.
        room in 1.0..3.0f64,
        // Of the host, beyond the largest job's: what is kept of prompts is in the way of the next.
        host_room in prop::option::of(1.0..3.0f64),
        late in prop::option::of(any::<u64>()),
        preempt in any::<bool>(),
        turn in prop::option::of(1..6usize),
    ) {
        let mut roomy = runner(MemoryLimits::default(), None);
        let largest = roomy.admit(308).unwrap();
        let plan = roomy.plan(largest).unwrap();
        let pages = (plan.least_gpu_pages() as f64 * room) as usize;
        let host_slabs = host_room.map(|room| (plan.host_slabs() as f64 * room) as usize);
        let limits = MemoryLimits {
            gpu_pages: Some(pages),
            host_bytes: host_slabs.map(|slabs| slabs as u64 * slab_bytes()),
            ..MemoryLimits::default()
        };
        let mut run = Run::new(limits, late, SchedulerOptions { max_batch, max_queue: 64, prompt_layers, patience, preempt, turn });
        let (mut jobs, mut cancelled) = (Vec::new(), Vec::new());
        for event in events {
            match event {
                Happens::Submit(ask, priority) => jobs.push((run.scheduler.submit(ask.job(priority)).unwrap(), ask)),
                Happens::Cancel(which) if !jobs.is_empty() => {
                    let (id, _) = jobs[which % jobs.len()];
                    run.scheduler.cancel(id);
                    cancelled.push(id);
                }
                Happens::Cancel(_) => {}
                Happens::Steps(steps) => (0..steps).for_each(|_| run.step()),
            }
        }
        run.finish();
        for (id, ask) in jobs {
            let (tokens, expected) = (run.tokens.remove(&id).unwrap_or_default(), alone(ask));
            match run.ended[&id] {
                Reason::Length => prop_assert_eq!(tokens, expected),
                Reason::Cancelled => {
                    prop_assert!(cancelled.contains(&id));
                    prop_assert_eq!(&tokens[..], &expected[..tokens.len()]);
                }
                other => prop_assert!(false, "{:?} ended by {:?}", id, other),
            }
        }
        let mut usage = run.scheduler.usage();
        usage.host.pages -= run.scheduler.prefixes().unwrap().bytes;
        // What late transfers still touch is nobody's any more.
        if late.is_some() {
            usage.gpu.in_flight_pages = 0;
            usage.host.pages = 0;
        }
        prop_assert_eq!(usage, MemoryUsage::default());
    }
}
