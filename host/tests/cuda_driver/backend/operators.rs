//! Methods with operators of their own under the backend: loaded once, launched in their places, given what they need.

use std::sync::Mutex;

use spinkv::Rotary;
use spinkv::algorithms::SeerAttention;
use spinkv::backend::cuda::driver::{
    Function, LaunchShape, Module, Result as DriverResult, Stream, launch_with,
};
use spinkv::backend::cuda::kernels::Kernels;
use spinkv::backend::cuda::operators::{
    GpuIndex, GpuSelect, LoadIndex, LoadSelect, OperatorSizes, PromptIndex, SelectStage, StepIndex,
};
use spinkv::gates::{Gates, LayerGate};
use spinkv::partition::PartitionKind;
use spinkv::pipeline::{Candidates, GroupMerge, Index, Partition, PartitionScore, Pick, Select, Summarize};

use super::*;
use crate::PTX;

/// A method of chunks of 8 tokens whose operators are its own, or not.
#[derive(Debug)]
struct Own {
    own_index: bool,
    own_select: bool,
    /// Elements of its own summaries.
    width: usize,
    /// Whether its own operators have a GPU face.
    on_gpu: bool,
    /// What the backend said that it is made for.
    sizes: Mutex<Vec<OperatorSizes>>,
}

impl Own {
    fn new(own_index: bool, own_select: bool) -> Self {
        Self { own_index, own_select, width: 64, on_gpu: true, sizes: Mutex::default() }
    }

    fn shared(self) -> Arc<dyn Method> {
        Arc::new(self)
    }
}

impl Method for Own {
    fn name(&self) -> &str {
        "own"
    }
    fn partition(&self) -> PartitionKind {
        PartitionKind::Chunk { tokens: 8 }
    }
    fn index(&self) -> Index<'_> {
        if self.own_index { Index::Custom(self) } else { Index::MeanKey }
    }
    fn select(&self) -> Select<'_> {
        let budget = Budget::Tokens(24);
        if self.own_select {
            Select::Custom { picker: self, budget }
        } else {
            Select::TopK { score: PartitionScore::DotProduct, merge: GroupMerge::Max, budget }
        }
    }
    fn steady(&self) -> SteadyZone {
        STEADY
    }
}

impl Summarize for Own {
    fn width(&self, _: usize) -> usize {
        self.width
    }
    fn summarize(&self, _: &Partition<'_>, _: &mut [f32]) {
        unreachable!("not on the CPU");
    }
    fn on_gpu<'a>(&'a self, sizes: &OperatorSizes) -> Result<Option<LoadIndex<'a>>, Error> {
        self.sizes.lock().unwrap().push(*sizes);
        Ok(self.on_gpu.then(|| -> LoadIndex<'a> { Box::new(|stream| Ok(Box::new(Launcher::load(stream)?))) }))
    }
}

impl Pick for Own {
    fn pick(&self, _: &Candidates<'_>, _: &mut Vec<u32>) {
        unreachable!("not on the CPU");
    }
    fn on_gpu<'a>(&'a self, sizes: &OperatorSizes) -> Result<Option<LoadSelect<'a>>, Error> {
        if sizes.max_tokens == 13 {
            return Err(Error::UnsupportedOnGpu { what: "13 tokens".to_owned() });
        }
        Ok(self
            .on_gpu
            .then(|| -> LoadSelect<'a> { Box::new(|stream| Ok(Box::new(Launcher::load(stream)?))) }))
    }
}

/// Launches the stand-in's `scale`: with 1 in a prompt's Index, 2 in a step's, and in Select with the words of scratch.
#[derive(Debug)]
struct Launcher(Function);

const SCRATCH: usize = 3;

impl Launcher {
    fn load(stream: &Stream) -> DriverResult<Self> {
        Ok(Self(Module::from_ptx(stream.context(), PTX)?.function("scale")?))
    }

    fn launch(
        &self,
        stream: &Stream,
        on: &DeviceBuffer<Word>,
        number: usize,
        factor: f32,
    ) -> DriverResult<()> {
        let arguments = [on.into(), (number as u32).into(), factor.into()];
        // SAFETY: the stand-in's kernels touch nothing.
        unsafe { launch_with(&self.0, &LaunchShape::linear(1, 32), stream, arguments) }
    }
}

impl GpuIndex for Launcher {
    unsafe fn prompt(&self, _: &Kernels, stream: &Stream, stage: &PromptIndex<'_>) -> DriverResult<()> {
        stage.rows.check()?;
        self.launch(stream, stage.keys, stage.partitions as usize, 1.0)
    }
    unsafe fn step(&self, _: &Kernels, stream: &Stream, stage: &StepIndex<'_>) -> DriverResult<()> {
        stage.rows.check()?;
        self.launch(stream, stage.pool, stage.rows.first_row as usize, 2.0)
    }
    fn bytes(&self) -> u64 {
        100
    }
}

impl GpuSelect for Launcher {
    fn scratch_words(&self) -> usize {
        SCRATCH
    }
    unsafe fn select(&self, _: &Kernels, stream: &Stream, stage: &SelectStage<'_>) -> DriverResult<()> {
        self.launch(stream, stage.score.queries, stage.scratch.len(), stage.score.head_words as f32)
    }
    fn bytes(&self) -> u64 {
        11
    }
}

#[test]
fn operators_that_run_on_the_cpu_alone_are_refused_by_name() {
    let driver = driver();
    let (context, _) = driver.open();
    for (own_index, own_select, part) in [(true, true, "its own Index"), (false, true, "its own Select")] {
        let method = || Own { on_gpu: false, ..Own::new(own_index, own_select) }.shared();
        let config = || config(8, 64, KvDtype::Bf16, method());
        for refused in [
            CudaBackend::check(&config(), &limits(1)).unwrap_err(),
            CudaBackend::new(&context, config(), &limits(1)).unwrap_err(),
        ] {
            let named = |what: &str| what.contains("method own") && what.contains(part);
            assert!(matches!(&refused, Error::UnsupportedOnGpu { what } if named(what)), "{refused}");
        }
    }
    let check = |method: Arc<dyn Method>, limits: &CudaLimits| {
        CudaBackend::check(&config(8, 64, KvDtype::Bf16, method), limits)
    };
    let odd = check(Own { width: 20, ..Own::new(true, true) }.shared(), &limits(1)).unwrap_err();
    assert!(matches!(&odd, Error::UnsupportedOnGpu { what } if what.contains("20 elements")), "{odd}");
    let ruled = check(per_row(Own::new(false, true).shared()), &limits(1)).unwrap_err();
    assert!(
        matches!(&ruled, Error::UnsupportedOnGpu { what } if what.contains("whose Select is its own")),
        "{ruled}"
    );
    assert_eq!(check(per_row(Own::new(true, false).shared()), &limits(1)), Ok(()));
    let own = check(Own::new(true, true).shared(), &CudaLimits { max_tokens: 13, ..limits(1) }).unwrap_err();
    assert_eq!(
        own,
        Error::UnsupportedOnGpu { what: "13 tokens".to_owned() },
        "what an operator refuses itself"
    );
    assert_eq!(driver.log(), [""; 0], "before anything is allocated");
}

#[test]
fn own_operators_are_launched_in_their_places() {
    let driver = driver();
    for (own_index, own_select, step, prompt) in [
        (true, true, ["scale", "append", "scale"].as_slice(), ["scale", "store_prompt", "scale"].as_slice()),
        (false, true, &["chunk_mean_step", "append", "scale"], &["chunk_mean", "store_prompt", "scale"]),
        (true, false, &["scale", "append", "score", "select"], &["scale", "store_prompt", "score", "select"]),
    ] {
        let mut run = Run::new(&driver, Own::new(own_index, own_select).shared(), &limits(3));
        let requests = [run.pipeline.admit(200).unwrap(), run.pipeline.admit(200).unwrap()];
        driver.log();
        for (layer, entries) in [(0, Some("entries 2".to_owned())), (1, None)] {
            run.decode(layer, &requests).unwrap();
            let log = driver.log();
            let rest = ["resolve", "gather", "attend_64"];
            let expected: Vec<_> =
                entries.into_iter().chain([step, &rest].concat().into_iter().map(str::to_owned)).collect();
            assert_eq!(launches(&log), expected);
            if own_select {
                // Of two entries of two KV heads; summaries of 64 elements are 8 words.
                assert_eq!(
                    parameters(&log, "scale")[1..],
                    [(2 * 2 * SCRATCH).to_string(), "8.00".to_owned()]
                );
            }
            let first = log.iter().find(|line| line.starts_with("launch scale")).unwrap();
            assert_eq!(own_index, first.ends_with(&format!(" {} 2.00", 2 * layer)), "{first}");
        }

        let request = run.pipeline.admit(120).unwrap();
        let [keys, values] = [(); 2].map(|()| run.tensor(100, 2));
        let (queries, mut out) = (run.tensor(100, 4), run.tensor(100, 4));
        for layer in 0..LAYERS {
            let mut layer = run.pipeline.prefill(request, layer, 100, &keys, &values).unwrap();
            driver.log();
            layer.attend(100, &queries, &mut out).unwrap();
            let log = driver.log();
            let all: Vec<_> =
                launches(&log).into_iter().filter(|line| !line.starts_with("entries")).collect();
            assert_eq!(all[1..], [prompt, &["resolve", "gather"]].concat(), "behind attention");
            if own_index {
                // 100 tokens less 8 of the sinks' chunk and the last 12, which begin in chunk 11: 10 chunks.
                let first = log.iter().find(|line| line.starts_with("launch scale")).unwrap();
                assert!(first.ends_with(&format!(": {:#x} 10 1.00", keys.address())), "{first}");
            }
            if own_select {
                assert_eq!(parameters(&log, "scale")[1], (2 * SCRATCH).to_string(), "a batch of one");
            }
        }
    }
}

#[test]
fn own_operators_are_loaded_once_for_the_backends_sizes() {
    let driver = driver();
    let (context, _) = driver.open();
    let method = Arc::new(Own { width: 24, ..Own::new(true, true) });
    driver.log();
    let backend =
        CudaBackend::new(&context, config(8, 64, KvDtype::Bf16, method.clone()), &limits(3)).unwrap();
    let loads = driver.log().iter().filter(|line| line.starts_with("load")).count();
    assert_eq!(loads, 3, "the tree's kernels, and a module of each");
    let sizes = *method.sizes.lock().unwrap().last().unwrap();
    assert_eq!((sizes.shape, sizes.requests, sizes.max_tokens), (*backend.config().shape(), 3, 200));
    assert_eq!((sizes.page_tokens, sizes.partition_tokens, sizes.summary_width), (8, 8, 24));
    // 25 chunks less the sinks' and the two that 12 tokens lie in.
    assert_eq!((sizes.stride, sizes.capacity), (24, 3));
    let allocated = backend.allocated();
    assert_eq!(allocated.operators, 111);
    // A segment a request, 2 x 2 rows of 512 chunks of 3 words.
    assert_eq!(allocated.summaries, 3 * 4 * 512 * 3 * 16);
    let CudaBytes { pages, tables, summaries, key_factors, lists, operators } = allocated;
    assert_eq!(allocated.total(), pages + tables + summaries + key_factors + lists + operators);
}

/// Gates of 16 elements over blocks of 16 tokens, two pages.
fn seer() -> SeerAttention {
    let shape = KvShape::new(LAYERS, 4, 2, 64).unwrap();
    let layer = LayerGate {
        query: vec![0.5; 2 * 16 * 128],
        key: vec![0.5; 2 * 16 * 192],
        query_norm: Some(vec![1.0; 16]),
        key_norm: None,
    };
    let rotary = |head_dim: usize| Rotary::new(vec![0.5; head_dim / 2], 1.0);
    let gates = Gates::new(shape, 16, rotary(64), rotary(16), vec![layer; LAYERS]).unwrap();
    SeerAttention::new(Arc::new(gates), Budget::Tokens(48), STEADY).with_block(16).unwrap()
}

#[test]
fn a_gate_scores_with_one_query_a_row() {
    let driver = driver();
    for (method, least) in [(seer(), "-inf"), (seer().with_threshold(0.5).unwrap(), "-0.69")] {
        let mut run = Run::new(&driver, Arc::new(method), &limits(2));
        let request = run.pipeline.admit(200).unwrap();
        driver.log();
        run.decode(1, &[request]).unwrap_err();
        run.decode(0, &[request]).unwrap();
        let log = driver.log();
        let all =
            ["gate_key_step", "append", "gate_query", "score", "select", "resolve", "gather", "attend_64"];
        assert_eq!(launches(&log)[1..], all);
        let [query, score, select] = ["gate_query", "score", "select"].map(|kernel| parameters(&log, kernel));
        assert_eq!(score[3], query[15], "gate queries are what is scored");
        // KV heads, group, words of a gate key, bounds; a factor of 1 / 4.
        assert_eq!((&score[4..8], &*score[11]), (["2", "1", "2", "0"].map(str::to_owned).as_slice(), "0.25"));
        // Group, tiles of the softmax, the greatest, the logarithm of the threshold.
        assert_eq!((&*select[4], &*select[6], &*select[7], &*select[8]), ("1", "1", "0", least));
        let key = parameters(&log, "gate_key_step");
        assert_eq!(
            (&*key[10], &*key[14], &*key[16], &*query[11]),
            ("256", "16", "0", "1"),
            "norms of queries alone"
        );

        let [keys, values] = [(); 2].map(|()| run.tensor(100, 2));
        let (queries, mut out) = (run.tensor(100, 4), run.tensor(100, 4));
        let other = run.pipeline.admit(120).unwrap();
        let mut layer = run.pipeline.prefill(other, 0, 100, &keys, &values).unwrap();
        driver.log();
        layer.attend(100, &queries, &mut out).unwrap();
        let log = driver.log();
        let all: Vec<_> = launches(&log).into_iter().filter(|line| !line.starts_with("entries")).collect();
        assert_eq!(
            all[1..],
            ["gate_key", "store_prompt", "gate_query", "score", "select", "resolve", "gather"]
        );
        let operators = run.pipeline.backend().allocated().operators;
        let weights = LAYERS * 2 * 16 * (128 + 192) * 2;
        let numbers = LAYERS * 16 + 2 * (32 + 8);
        assert_eq!(operators as usize, weights + 4 * numbers);
    }
}
