//! Over the stand-in driver, whose copies copy and whose kernels do nothing: what is asked for, and in which order.

use spinkv::backend::cuda::driver::Device;
use spinkv::pipeline::{Budget, SteadyZone};

use super::{CudaMachine, WeightSource};
use crate::bench::cpu::traced;
use crate::bench::{
    BatchSize, Caching, DecodeOptions, How, Listen, Machine, PrefillOptions, Prompts, Selections, decode,
};
use crate::config::ModelConfig;
use crate::cuda::stand_in::{StandInNccl, driver};
use crate::cuda::{BlasUse, CudaModel, GpuGroup};
use crate::eval::MethodChoice;
use crate::pages::PageOptions;

/// Two layers of a tenth of a model.
fn config() -> ModelConfig {
    let mut config = ModelConfig::preset("llama-3.1-8b").unwrap().with_layers(2).unwrap();
    (config.vocab_size, config.hidden_size, config.intermediate_size) = (40, 24, 56);
    (config.query_heads, config.kv_heads, config.head_dim) = (4, 2, 64);
    config
}

fn machine() -> CudaMachine {
    let prompts = Prompts::random(40, 1);
    let gpu = GpuGroup::single(Device::open(0).unwrap());
    CudaMachine::new(gpu, config(), WeightSource::Random(1), BlasUse::Never, prompts)
}

fn methods(names: &[&str]) -> Vec<MethodChoice> {
    names.iter().map(|name| name.parse().unwrap()).collect()
}

fn options() -> DecodeOptions {
    DecodeOptions {
        methods: methods(&["shadowkv", "quest"]),
        budgets: vec![Budget::Tokens(128)],
        batches: vec![BatchSize::Fixed(3)],
        contexts: vec![640],
        bufferings: vec![1.0],
        caches: Caching::ALL.to_vec(),
        warm_up: 2,
        steps: 3,
        selections: Selections::Drawn { hit_ratio: None },
        kv_bytes: None,
        steady: SteadyZone::default(),
        pages: PageOptions::default(),
        coded: vec!["fp8".parse().unwrap()],
        gates: None,
        seed: 5,
    }
}

fn nobody<'a>() -> Listen<'a> {
    Box::leak(Box::new(|_: &str, _, _| {}))
}

#[test]
fn every_cache_is_run_or_replayed_and_none_is_refused() {
    let _driver = driver();
    let points = decode(&mut machine(), &options(), 2, nobody()).unwrap();
    let found: Vec<_> = points.iter().map(|point| (&*point.method, point.cache, point.how)).collect();
    use Caching::{
        Belady, BucketedLru, DenseHbm, DenseStreamed, ExactLru, NoCache, PreviousStep, Resident, Serial,
    };
    let mut expected = vec![("dense", DenseHbm, How::Measured), ("dense", DenseStreamed, How::Bound)];
    for method in ["shadowkv", "quest"] {
        expected.extend([
            (method, NoCache, How::Measured),
            (method, PreviousStep, How::Measured),
            (method, Serial, How::Measured),
            (method, BucketedLru, How::Measured),
            (method, ExactLru, How::Replayed),
            (method, Belady, How::Replayed),
            (method, Resident, How::Measured),
            // With host pages in FP8.
            (method, BucketedLru, How::Measured),
        ]);
    }
    assert_eq!(found, expected, "{:?}", points.iter().find_map(|point| point.skipped.as_ref()));
    // 1.5 ms between any two events.
    for point in points.iter().filter(|point| point.how == How::Measured) {
        assert_eq!(point.step_ms, Some(1.5), "{point:?}");
        assert_eq!(point.tokens_per_s, Some(2000.0));
        let stages = point.stages_ms.unwrap();
        // Of each of the two layers a part, and the head.
        assert_eq!((stages.projections, stages.mlp, stages.head), (3.0, 3.0, 1.5));
        assert_eq!(stages.select, if point.cache == DenseHbm { 0.0 } else { 3.0 });
        assert!(point.memory.kv_pages > 0 && point.memory.total > point.memory.kv_pages);
    }
    // Nothing misses where kernels do nothing, so nothing is set beside a floor.
    assert!(points.iter().all(|point| point.over_sum.is_none()));
    let hits = |cache| points.iter().find(|point| point.cache == cache).unwrap().hits;
    assert!(hits(ExactLru) <= hits(Belady) && hits(ExactLru) > 0);
}

#[test]
fn a_captured_step_selects_what_was_drawn_for_it() {
    let _driver = driver();
    check_selections(machine());
}

#[test]
fn each_of_two_gpus_selects_what_was_drawn_for_its_heads() {
    let driver = driver();
    check_selections(over_two(driver.nccl()));
}

/// Runs captured steps of all methods, whose Select the drawn ids replace.
fn check_selections(mut machine: CudaMachine) {
    let options = options();
    let groups = options.groups(&config(), 2).unwrap();
    for group in groups.iter().filter(|group| group.caches.contains(&Caching::BucketedLru)) {
        let drawn = traced(group, &options, None).unwrap();
        let (model, methods) = machine.made(group, Some(&drawn), &options).unwrap();
        let (whole, kv) = &drawn;
        let heads = kv.shape().kv_heads / methods.len();
        let check = |rank: usize, model: &mut CudaModel| {
            let method = methods[rank].as_ref().unwrap();
            let batch = machine.fill(model, group, &options, Some(method)).unwrap();
            for step in [0, 4] {
                let backend = model.pipeline().backend();
                method.begin_on_gpu(backend.stream(), step).unwrap();
                // The stand-in copies while it captures, and not in replays.
                model.profile(&mut batch.clone(), 0).unwrap();
                for (request, kv_head) in [(0, 0), (1, heads - 1), (2, 0)] {
                    let selected = model.pipeline().backend().selected(request, kv_head).unwrap();
                    let drawn: Vec<u32> =
                        whole.drawn().ids(request, 1, rank * heads + kv_head, step).collect();
                    assert_eq!(selected, drawn, "{} request {request}, step {step}", group.method);
                    let (first, last) = (drawn[0], drawn[drawn.len() - 1]);
                    assert!(kv.retrievable_partitions(640).contains(&first) && last < 640 / 8);
                }
            }
            Ok(())
        };
        model.on_ranks(check).unwrap();
        machine.weights = Some(model.into_weights().unwrap());
    }
}

#[test]
fn two_gpus_measure_together() {
    let driver = driver();
    let nccl = driver.nccl();
    let options = DecodeOptions { methods: methods(&["shadowkv"]), coded: Vec::new(), ..options() };
    let mut alone = machine();
    alone.config.intermediate_size = 64;
    let one = decode(&mut alone, &options, 2, nobody()).unwrap();
    let mut machine = over_two(nccl);
    let two = decode(&mut machine, &options, 2, nobody()).unwrap();
    assert!(machine.device().starts_with("2 x Stand-in by NCCL 2.27.5"), "{}", machine.device());
    assert_eq!(one.len(), two.len());
    for (one, two) in one.iter().zip(&two) {
        assert_eq!((one.cache, one.how, &one.skipped), (two.cache, two.how, &two.skipped));
        if one.how == How::Measured {
            assert_eq!(one.step_ms, two.step_ms);
            assert_eq!(one.memory.host_pages, two.memory.host_pages);
            assert!(two.memory.weights > one.memory.weights, "embedding and head are on both");
        }
    }
    let prefill = PrefillOptions {
        methods: methods(&["quest"]),
        budget: Budget::Tokens(128),
        contexts: vec![640],
        rounds: 1,
        steady: SteadyZone::default(),
        pages: PageOptions::default(),
        gates: None,
    };
    let rows = machine.prefill(&prefill, nobody()).unwrap();
    assert!(rows[0].prompt_ms > 0.0 && rows[0].skipped.is_none());
}

fn over_two(nccl: &StandInNccl) -> CudaMachine {
    let contexts = [0, 1].map(|ordinal| Device::open(ordinal).unwrap()).to_vec();
    let gpus = GpuGroup::tied(contexts, &nccl.load()).unwrap();
    // A half of 56 is no multiple of 8.
    let config = ModelConfig { intermediate_size: 64, ..config() };
    CudaMachine::new(gpus, config, WeightSource::Random(1), BlasUse::Never, Prompts::random(40, 1))
}

#[test]
fn prompts_are_timed_with_index_and_without() {
    let _driver = driver();
    let options = PrefillOptions {
        methods: methods(&["shadowkv", "quest", "streaming-llm"]),
        budget: Budget::Tokens(128),
        contexts: vec![640],
        rounds: 2,
        steady: SteadyZone::default(),
        pages: PageOptions::default(),
        gates: None,
    };
    let rows = machine().prefill(&options, nobody()).unwrap();
    let index: Vec<_> = rows.iter().map(|row| (&*row.method, row.index_layer_ms, &row.skipped)).collect();
    assert_eq!(index, [("shadowkv", 1.5, &None), ("quest", 1.5, &None), ("streaming-llm", 0.0, &None)]);
    assert!(rows.iter().all(|row| row.prompt_ms > 0.0 && row.dense_layer_ms > 0.0 && row.tokens_per_s > 0.0));
}

#[test]
fn what_memory_has_no_room_for_is_said_and_the_next_one_runs() {
    let _driver = driver();
    let options = DecodeOptions {
        caches: vec![Caching::DenseHbm, Caching::BucketedLru],
        methods: methods(&["shadowkv"]),
        // Of the smaller one the stand-in has no room either: 256 MiB at once.
        batches: vec![BatchSize::Fixed(1024), BatchSize::Fixed(2)],
        ..options()
    };
    let mut machine = machine();
    let points = decode(&mut machine, &options, 2, nobody()).unwrap();
    assert_eq!(points.len(), 6);
    assert!(points[..3].iter().any(|point| point.how == How::Skipped), "{:?}", &points[..3]);
    assert!(points[3..].iter().all(|point| point.how == How::Measured), "{:?}", &points[3..]);
    assert_eq!(Machine::config(&machine).layers, 2);
}
