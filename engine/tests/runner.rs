//! Prompts layer by layer, with steps of others between the layers, and batches: what a request gets is what it would get alone, bit for bit.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::LazyLock;

use spinkv::algorithms::{self, MethodOptions};
use spinkv::backend::cpu::CpuBackend;
use spinkv::memory::{KvDtype, MemoryLimits, PageLayout};
use spinkv::pipeline::{Budget, Pipeline, RequestId, SteadyZone};
use spinkv::{KvConfig, KvShape};
use spinkv_engine::Error;
use spinkv_engine::config::ModelConfig;
use spinkv_engine::model::{DecodeToken, Model};
use spinkv_engine::runner::{CpuRunner, Runner};

static MODEL: LazyLock<Model> = LazyLock::new(|| {
    let dir = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tiny-llama31-random"));
    let config = ModelConfig::open(&dir).expect("the configuration is bundled");
    Model::open(&dir, config, |_, _| {}).expect("the model is bundled")
});

/// A small budget, so that most of a prompt is selected from.
fn runner(limits: MemoryLimits) -> CpuRunner<'static> {
    let config = MODEL.config();
    let shape = KvShape::new(config.layers, config.query_heads, config.kv_heads, config.head_dim).unwrap();
    let layout = PageLayout::new(8, config.head_dim, KvDtype::Bf16).unwrap();
    let options = MethodOptions {
        budget: Budget::Tokens(32),
        steady: SteadyZone { sinks: 4, window: 8 },
        ..MethodOptions::default()
    };
    let kv = KvConfig::new(shape, layout, algorithms::by_name("shadowkv", &options).unwrap()).unwrap();
    CpuRunner::new(&MODEL, Pipeline::new(CpuBackend::new(kv, limits)))
}

fn prompt(tokens: usize, seed: u32) -> Vec<u32> {
    (0..tokens as u32).map(|i| (i * 2_654_435 + seed * 40_503) % 4000 + 10).collect()
}

fn go(_: usize, _: usize) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// The logits of a prompt and of `steps` further tokens, alone.
fn alone(tokens: &[u32], steps: usize) -> Vec<Vec<f32>> {
    let mut runner = runner(MemoryLimits::default());
    let request = runner.admit(tokens.len() + steps).unwrap();
    let mut all = vec![runner.prefill(request, tokens, &mut go).unwrap()];
    for _ in 0..steps {
        let token = best(all.last().expect("the prompt's"));
        all.push(runner.decode(&[DecodeToken { request, token }]).unwrap());
    }
    all
}

fn best(logits: &[f32]) -> u32 {
    (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).expect("logits") as u32
}

struct Going {
    request: RequestId,
    expected: Vec<Vec<f32>>,
    done: usize,
}

/// One step of all that go; each one's logits are those it has alone.
fn step(runner: &mut CpuRunner<'_>, going: &mut [Going]) {
    let part = |one: &Going| DecodeToken { request: one.request, token: best(&one.expected[one.done]) };
    let batch: Vec<_> = going.iter().map(part).collect();
    let logits = runner.decode(&batch).unwrap();
    let vocab_size = MODEL.config().vocab_size;
    for (index, (one, found)) in going.iter_mut().zip(logits.chunks_exact(vocab_size)).enumerate() {
        one.done += 1;
        let expected = &one.expected[one.done];
        assert!(found == expected, "request {index} of {}, step {}", batch.len(), one.done);
    }
}

#[test]
fn steps_of_others_between_a_prompts_layers_change_nothing() {
    let lengths = [150, 40, 611, 9, 90];
    let mut runner = runner(MemoryLimits::default());
    let mut going: Vec<Going> = Vec::new();
    for (number, length) in lengths.into_iter().enumerate() {
        let tokens = prompt(length, number as u32);
        let expected = alone(&tokens, 40);
        let request = runner.admit(length + 40).unwrap();
        let mut prompt = runner.begin_prompt(request, &tokens).unwrap();
        let logits = loop {
            if let Some(logits) = runner.prompt_layer(&mut prompt, &mut go).unwrap() {
                break logits;
            }
            step(&mut runner, &mut going);
        };
        assert!(logits == expected[0], "the prompt of {length} tokens");
        going.push(Going { request, expected, done: 0 });
    }
    for _ in 0..10 {
        step(&mut runner, &mut going);
    }
    going.iter().for_each(|one| runner.release(one.request));
    assert_eq!(runner.usage(), runner_usage_of_none());
}

fn runner_usage_of_none() -> spinkv::memory::MemoryUsage {
    runner(MemoryLimits::default()).usage()
}

#[test]
fn a_prompt_that_is_dropped_between_two_layers_leaves_nothing() {
    let mut runner = runner(MemoryLimits::default());
    let (tokens, others) = (prompt(200, 1), prompt(77, 2));
    for layers in 0..MODEL.config().layers {
        let request = runner.admit(210).unwrap();
        let mut dropped = runner.begin_prompt(request, &tokens).unwrap();
        for _ in 0..layers {
            assert!(runner.prompt_layer(&mut dropped, &mut go).unwrap().is_none());
        }
        drop(dropped);
        runner.release(request);
        assert_eq!(runner.usage(), runner_usage_of_none(), "after {layers} layers");
        let request = runner.admit(80).unwrap();
        assert!(runner.prefill(request, &others, &mut go).unwrap() == alone(&others, 0)[0]);
        runner.release(request);
    }
}

#[test]
fn what_no_waiting_helps_is_told_beforehand() {
    let needed = runner(MemoryLimits::default()).admit(400).map(|_| ()).and_then(|()| {
        let mut roomy = runner(MemoryLimits::default());
        let request = roomy.admit(400)?;
        Ok(roomy.plan(request)?.least_gpu_pages())
    });
    let needed = needed.unwrap();
    let with = |pages| runner(MemoryLimits { gpu_pages: Some(pages), ..MemoryLimits::default() });
    assert!(with(needed).check(400).is_ok());
    let refused = with(needed - 1).check(400).unwrap_err();
    assert!(matches!(refused, Error::Kv(spinkv::Error::OutOfGpuPages { .. })), "{refused}");
    // Room that others take is not missing for good.
    let mut shared = with(needed);
    shared.admit(400).unwrap();
    assert!(shared.admit(400).is_err());
    assert!(shared.check(400).is_ok());
    let empty = with(needed).begin_prompt(RequestId(0), &[]).map(|_| ()).unwrap_err();
    assert!(matches!(empty, Error::EmptyPrompt), "{empty}");
}
