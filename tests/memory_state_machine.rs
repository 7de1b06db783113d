//! Random traffics of requests over a memory that is too small, with transfers that complete late and out of order,
//! requests that end in the middle of them, and allocations that the system refuses. Whatever happens, the tables
//! hold together and every output is what the request gets alone.

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex};

use proptest::prelude::*;
use spinkv::Error;
use spinkv::algorithms::Dense;
use spinkv::backend::cpu::CpuBackend;
use spinkv::memory::{MemoryLimits, MemoryUsage, SUMMARY_ELEMENT_BYTES, footprint};
use spinkv::pipeline::{Pipeline, RequestId};
use spinkv_tests::small::{SPARSE, STEADY, alone, sequence, setups, shape};
use spinkv_tests::{Layers, Run, Sequence, Setup};

/// What is done.
#[derive(Clone, Debug)]
enum Act {
    /// Admits a request for one of the sequences.
    Admit(usize),
    /// Takes a request without tokens through a prompt: how long, in quarters of the sequence.
    Prompt(prop::sample::Index, usize),
    /// Takes some requests through a step.
    Step(Vec<prop::sample::Index>),
    /// Takes a request through the first layer of a prompt or a step only, and ends it there.
    Break(prop::sample::Index),
    /// Parks a request that is not, and lets one that is go on if there is room.
    Park(prop::sample::Index),
    /// Ends a request.
    Release(prop::sample::Index),
    /// Completes some transfers.
    Complete(usize),
    /// Has the system refuse all but the first allocations of the next call, which is then made again.
    Refuse(u64),
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let one = || any::<prop::sample::Index>();
    let act = prop_oneof![
        3 => (0usize..LENGTHS.len()).prop_map(Act::Admit),
        3 => (one(), 1usize..=3).prop_map(|(request, quarters)| Act::Prompt(request, quarters)),
        8 => prop::collection::vec(one(), 1..4).prop_map(Act::Step),
        1 => one().prop_map(Act::Break),
        1 => one().prop_map(Act::Release),
        2 => one().prop_map(Act::Park),
        3 => (1usize..6).prop_map(Act::Complete),
        2 => (0u64..4).prop_map(Act::Refuse),
    ];
    prop::collection::vec(act, 1..80)
}

/// Tokens of the sequences. A request of one token shares the pools with one that crosses a segment's border where
/// pages hold one token.
const LENGTHS: [usize; 5] = [1, 40, 90, 130, 680];

fn all_setups() -> Vec<Setup> {
    let mut all = setups();
    all.push(Setup::new(shape(), 1, SPARSE));
    all.push(Setup::new(shape(), 1, Dense { steady: STEADY }));
    // Pages are rounded in place while transfers come and go.
    for (page_tokens, format) in [(8, "fp8"), (4, "int8")] {
        let format = format.parse().expect("a format of host pages");
        all.push(Setup { format, ..Setup::new(shape(), page_tokens, SPARSE) });
    }
    all
}

static SEQUENCES: LazyLock<Vec<Sequence>> =
    LazyLock::new(|| LENGTHS.iter().zip(1..).map(|(tokens, seed)| sequence(*tokens, seed)).collect());

/// Setup, sequence and prompt to what a request gets alone.
type Expected = HashMap<(usize, usize, usize), (Layers, Vec<Layers>)>;

static EXPECTED: LazyLock<Mutex<Expected>> = LazyLock::new(Mutex::default);

/// What a request gets alone: the prompt's outputs, and those of the steps after it.
fn expected<T>(key: (usize, usize, usize), read: impl FnOnce(&(Layers, Vec<Layers>)) -> T) -> T {
    let mut all = EXPECTED.lock().unwrap();
    let (setup, sequence, prompt) = key;
    let compute = || {
        let (setup, sequence) = (&all_setups()[setup], &SEQUENCES[sequence]);
        if prompt > 0 {
            return alone(setup, sequence, prompt);
        }
        let mut run = Setup { limits: MemoryLimits::default(), ..setup.clone() }.start();
        let id = run.admit(sequence).unwrap();
        (Vec::new(), run.generate(id, sequence.tokens))
    };
    read(all.entry(key).or_insert_with(compute))
}

struct Live {
    id: RequestId,
    sequence: usize,
    prompt: usize,
    parked: bool,
}

struct Machine {
    setup: usize,
    run: Run,
    live: Vec<Live>,
}

/// What a refused call must leave as it was.
fn state(machine: &Machine) -> impl PartialEq + std::fmt::Debug + use<> {
    let pipeline = &machine.run.pipeline;
    let requests: Vec<_> = machine
        .live
        .iter()
        .map(|live| (live.id, pipeline.tokens(live.id).unwrap(), machine.run.selected(live.id)))
        .collect();
    let MemoryUsage { mut gpu, mut host } = pipeline.usage();
    // Waiting for what ended requests left behind is no loss to anybody.
    (gpu.in_flight_pages, host.pages) = (0, 0);
    (requests, gpu, host.page_tables, pipeline.counters())
}

impl Machine {
    fn new(setup: usize, limits: MemoryLimits, buffering: f64, late: Option<u64>) -> Self {
        let mut run = Setup { limits, buffering, ..all_setups().swap_remove(setup) }.start();
        let mut backend = CpuBackend::new(run.pipeline.config().clone(), limits);
        if let Some(seed) = late {
            backend = backend.with_late_transfers(seed);
        }
        run.pipeline = Pipeline::new(backend).with_buffering(buffering);
        Self { setup, run, live: Vec::new() }
    }

    /// Makes a call, first under a system that refuses allocations if `refuse` says so.
    fn call<T>(
        &mut self,
        refuse: Option<u64>,
        mut call: impl FnMut(&mut Self) -> Result<T, Error>,
    ) -> Result<T, Error> {
        if let Some(grants) = refuse {
            let before = state(self);
            self.run.pipeline.backend().allocator().refuse_after(grants);
            let outcome = call(self);
            self.run.pipeline.backend().allocator().refuse_after(u64::MAX);
            match outcome {
                Err(Error::AllocationFailed { .. }) => {
                    self.run.pipeline.backend().check_tables();
                    assert_eq!(state(self), before, "a refused call changed something");
                }
                other => return other,
            }
        }
        call(self)
    }

    fn act(&mut self, act: &Act, refuse: Option<u64>) {
        match act {
            Act::Refuse(_) => unreachable!("goes with the next act"),
            Act::Admit(_) if self.live.len() == 6 => {}
            Act::Admit(sequence) => {
                let admit = |machine: &mut Self| machine.run.admit(&SEQUENCES[*sequence]);
                let before = state(self);
                match self.call(refuse, admit) {
                    Ok(id) => self.live.push(Live { id, sequence: *sequence, prompt: 0, parked: false }),
                    Err(
                        Error::OutOfGpuPages { .. }
                        | Error::OutOfGpuMemory { .. }
                        | Error::OutOfHostMemory { .. },
                    ) => {
                        assert_eq!(state(self), before);
                    }
                    Err(other) => panic!("{other}"),
                }
            }
            Act::Prompt(index, quarters) => {
                let Some(at) = self.pick(index, |machine, live| !live.parked && machine.tokens(live) == 0)
                else {
                    return;
                };
                let (id, sequence) = (self.live[at].id, self.live[at].sequence);
                let prompt = (LENGTHS[sequence] * quarters / 4).max(1);
                // Layer by layer, since a refused layer can be tried again.
                for layer in 0..shape().layers {
                    let outputs = self
                        .call(refuse, |machine| machine.run.prompt_layer(id, layer, prompt, prompt))
                        .unwrap();
                    expected((self.setup, sequence, prompt), |(layers, _)| {
                        assert_eq!(outputs, layers[layer])
                    });
                    self.run.pipeline.backend().check_tables();
                }
                self.live[at].prompt = prompt;
            }
            Act::Step(indices) => {
                let mut batch: Vec<usize> = Vec::new();
                for index in indices {
                    let free = |machine: &Self, live: &Live| {
                        !live.parked && machine.tokens(live) < LENGTHS[live.sequence]
                    };
                    batch.extend(self.pick(index, free).filter(|at| !batch.contains(at)));
                }
                let ids: Vec<_> = batch.iter().map(|at| self.live[*at].id).collect();
                for layer in 0..shape().layers {
                    let steps: Vec<_> = batch.iter().map(|at| self.tokens(&self.live[*at])).collect();
                    let outputs = self.call(refuse, |machine| machine.run.step_layer(&ids, layer)).unwrap();
                    for ((at, tokens), output) in batch.iter().zip(steps).zip(outputs) {
                        let Live { sequence, prompt, .. } = self.live[*at];
                        let key = (self.setup, sequence, prompt);
                        expected(key, |(_, steps)| assert_eq!(output, steps[tokens - prompt][layer]));
                    }
                }
            }
            Act::Break(index) => {
                let Some(at) = self.pick(index, |machine, live| {
                    !live.parked && machine.tokens(live) < LENGTHS[live.sequence]
                }) else {
                    return;
                };
                let id = self.live[at].id;
                if self.tokens(&self.live[at]) == 0 {
                    let prompt = LENGTHS[self.live[at].sequence];
                    self.call(refuse, |machine| machine.run.prompt_layer(id, 0, prompt, prompt)).unwrap();
                } else {
                    self.call(refuse, |machine| machine.run.step_layer(&[id], 0)).unwrap();
                }
                self.live.swap_remove(at);
                self.run.pipeline.release(id);
            }
            Act::Park(index) => {
                let Some(at) = self.pick(index, |_, _| true) else { return };
                let Live { id, parked, .. } = self.live[at];
                if !parked {
                    self.run.pipeline.park(id).unwrap();
                    self.live[at].parked = true;
                    if self.tokens(&self.live[at]) < LENGTHS[self.live[at].sequence] {
                        let refused = self.run.step_layer(&[id], 0);
                        assert!(matches!(refused, Err(Error::RequestParked(parked)) if parked == id));
                    }
                } else {
                    let before = state(self);
                    match self.call(refuse, |machine| machine.run.pipeline.resume(id)) {
                        Ok(()) => self.live[at].parked = false,
                        Err(Error::OutOfGpuPages { .. } | Error::OutOfGpuMemory { .. }) => {
                            assert_eq!(state(self), before);
                        }
                        Err(other) => panic!("{other}"),
                    }
                }
            }
            Act::Release(index) => {
                if let Some(at) = self.pick(index, |_, _| true) {
                    let id = self.live.swap_remove(at).id;
                    self.run.pipeline.release(id);
                }
            }
            Act::Complete(count) => {
                self.run.pipeline.backend_mut().complete_transfers(*count);
            }
        }
        self.run.pipeline.backend().check_tables();
    }

    fn tokens(&self, live: &Live) -> usize {
        self.run.pipeline.tokens(live.id).unwrap()
    }

    fn pick(&self, index: &prop::sample::Index, fits: impl Fn(&Self, &Live) -> bool) -> Option<usize> {
        let fit: Vec<_> = (0..self.live.len()).filter(|at| fits(self, &self.live[*at])).collect();
        (!fit.is_empty()).then(|| fit[index.index(fit.len())])
    }

    fn end(mut self) {
        for live in std::mem::take(&mut self.live) {
            self.run.pipeline.release(live.id);
            self.run.pipeline.backend().check_tables();
        }
        self.run.pipeline.backend_mut().complete_transfers(usize::MAX);
        let census = self.run.pipeline.backend().page_census();
        assert_eq!((census.used, census.in_flight), (0, 0), "pages were lost");
        assert_eq!(self.run.pipeline.usage(), MemoryUsage::default());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    /// Invariants I1, I6, I10, I12 and I14 and the conservation of pages, slabs and segments, after every act.
    #[test]
    fn tables_hold_together_whatever_happens(
        setup in 0usize..7,
        // Room for the largest request's least, and this much more.
        (more_pages, more_bytes) in (0usize..700, prop::option::of(0u64..200_000)),
        buffering in prop_oneof![Just(0.0), Just(0.5), Just(5.0)],
        late in prop::option::of(any::<u64>()),
        acts in acts(),
    ) {
        let start = all_setups().swap_remove(setup).start();
        let plan = start.pipeline.plan(680).unwrap();
        let config = start.pipeline.config();
        let least = footprint(config, &plan, 680, SUMMARY_ELEMENT_BYTES).gpu;
        let limits = MemoryLimits {
            gpu_pages: Some(plan.least_gpu_pages() + more_pages),
            gpu_bytes: more_bytes.map(|more| least.total() + plan.prompt_bytes(config) + more),
            host_bytes: plan.limits(config).host_bytes.map(|bytes| bytes + bytes / 2),
        };
        let mut machine = Machine::new(setup, limits, buffering, late);
        let mut refuse = None;
        for act in &acts {
            if let Act::Refuse(grants) = act {
                refuse = Some(*grants);
            } else {
                machine.act(act, refuse.take());
            }
        }
        machine.end();
    }
}
