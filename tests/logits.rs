//! Both bundled models against the outputs that transformers computed in float32.

use std::ops::ControlFlow;
use std::sync::Arc;

use spinkv::KvConfig;
use spinkv::algorithms::Dense;
use spinkv::backend::cpu::CpuBackend;
use spinkv::memory::{KvDtype, MemoryLimits, PageLayout};
use spinkv::pipeline::{Pipeline, RequestId};
use spinkv_engine::model::{DecodeToken, Model, Wanted};
use spinkv_tests::checkpoints::{Bundled, max_difference};

/// Prompts attend to unrounded K and V, so this holds for any page dtype.
const F32_TOLERANCE: f32 = 1e-3;
/// Decode steps that read bf16 pages.
const BF16_TOLERANCE: f32 = 0.15;

fn pipeline(model: &Model, dtype: KvDtype) -> Pipeline<CpuBackend> {
    let (shape, method) = (model.shape(), Arc::new(Dense::default()));
    let layout = PageLayout::new(8, shape.head_dim, dtype).unwrap();
    let config = KvConfig::new(shape, layout, method).unwrap();
    Pipeline::new(CpuBackend::new(config, MemoryLimits::default()))
}

/// The final hidden states of a prompt, `[tokens, hidden]`.
fn prefill(model: &Model, pipeline: &mut Pipeline<CpuBackend>, request: RequestId, ids: &[u32]) -> Vec<f32> {
    model.prefill(pipeline, request, ids, Wanted::All, |_, _| ControlFlow::Continue(())).unwrap()
}

fn decode(model: &Model, pipeline: &mut Pipeline<CpuBackend>, request: RequestId, token: u32) -> Vec<f32> {
    model.logits(&model.decode(pipeline, &[DecodeToken { request, token }]).unwrap())
}

/// The worst difference of a prompt's logits at all positions that the reference has.
fn prompt_difference(bundled: &Bundled, name: &str) -> f32 {
    let model = &bundled.model;
    let (ids, reference) = (bundled.input_ids(name), bundled.logits(name));
    let mut pipeline = pipeline(model, KvDtype::Bf16);
    let request = pipeline.admit(ids.len()).unwrap();
    let hidden = prefill(model, &mut pipeline, request, &ids);
    let width = model.config().hidden_size;
    let rows = reference.positions.iter().flat_map(|position| &hidden[position * width..][..width]);
    let difference = max_difference(&model.logits(&rows.copied().collect::<Vec<_>>()), &reference.values);
    println!("{name}: {} tokens, logits within {difference:.1e}", ids.len());
    difference
}

#[test]
fn prompt_logits_of_qwen3_match_transformers() {
    let bundled = Bundled::open("needle-tiny");
    for name in ["short_0", "short_1", "short_2", "needle_4k_0", "needle_4k_5", "needle_16k_0"] {
        let difference = prompt_difference(&bundled, name);
        assert!(difference < F32_TOLERANCE, "{name}: {difference}");
    }
}

/// The second long prompt passes the 8,192 tokens up to which llama3 scaling changes nothing.
#[test]
fn prompt_logits_of_llama31_match_transformers() {
    let bundled = Bundled::open("tiny-llama31-random");
    for name in ["short_0", "short_1", "short_2", "long_0", "long_1"] {
        let difference = prompt_difference(&bundled, name);
        assert!(difference < F32_TOLERANCE, "{name}: {difference}");
    }
}

#[test]
#[ignore = "slow: 32K tokens"]
fn prompt_logits_at_32k_match_transformers() {
    let difference = prompt_difference(&Bundled::open("needle-tiny"), "needle_32k_0");
    assert!(difference < F32_TOLERANCE, "{difference}");
}

/// All tokens but the first pass through decode steps, so all context is read from pages.
#[test]
fn decode_logits_match_transformers_from_f32_and_bf16_pages() {
    for name in ["needle-tiny", "tiny-llama31-random"] {
        let bundled = Bundled::open(name);
        for (dtype, tolerance) in [(KvDtype::F32, F32_TOLERANCE), (KvDtype::Bf16, BF16_TOLERANCE)] {
            for prompt in ["short_0", "short_1", "short_2"] {
                let (ids, reference) = (bundled.input_ids(prompt), bundled.logits(prompt));
                let mut pipeline = pipeline(&bundled.model, dtype);
                let request = pipeline.admit(ids.len()).unwrap();
                prefill(&bundled.model, &mut pipeline, request, &ids[..1]);
                let mut worst: f32 = 0.0;
                for (position, token) in ids.iter().enumerate().skip(1) {
                    let logits = decode(&bundled.model, &mut pipeline, request, *token);
                    if let Some(row) = reference.positions.iter().position(|known| *known == position) {
                        let expected = &reference.values[row * logits.len()..][..logits.len()];
                        worst = worst.max(max_difference(&logits, expected));
                    }
                }
                println!("{name} {prompt}, {dtype:?} pages: logits within {worst:.1e}");
                assert!(worst < tolerance, "{name} {prompt} {dtype:?}: {worst}");
            }
        }
    }
}

/// The end of a long prompt passes through decode steps, which read thousands of retrieved pages.
#[test]
fn decode_logits_after_a_long_context_match_transformers() {
    let bundled = Bundled::open("needle-tiny");
    let (ids, reference) = (bundled.input_ids("needle_4k_1"), bundled.logits("needle_4k_1"));
    let (prompt, rest) = ids.split_at(ids.len() - 32);
    for (dtype, tolerance) in [(KvDtype::F32, F32_TOLERANCE), (KvDtype::Bf16, BF16_TOLERANCE)] {
        let mut pipeline = pipeline(&bundled.model, dtype);
        let request = pipeline.admit(ids.len()).unwrap();
        prefill(&bundled.model, &mut pipeline, request, prompt);
        let logits = rest.iter().map(|token| decode(&bundled.model, &mut pipeline, request, *token)).last();
        let difference = max_difference(&logits.unwrap(), &reference.values);
        println!(
            "{} tokens, the last 32 decoded, {dtype:?} pages: logits within {difference:.1e}",
            ids.len()
        );
        assert!(difference < tolerance, "{dtype:?}: {difference}");
        assert!(pipeline.counters().hits > 32 * 8 * 400, "too few pages were retrieved");
    }
}

/// A prompt whose last position alone is wanted gives the same hidden state and the same KV.
#[test]
fn skipping_the_outputs_that_nobody_wants_changes_nothing() {
    let bundled = Bundled::open("needle-tiny");
    let model = &bundled.model;
    let ids = &bundled.input_ids("needle_4k_2")[..1300];
    let outcomes = [Wanted::All, Wanted::Last].map(|wanted| {
        let mut pipeline = pipeline(model, KvDtype::Bf16);
        let request = pipeline.admit(ids.len() + 1).unwrap();
        let go_on = |_, _| ControlFlow::Continue(());
        let hidden = model.prefill(&mut pipeline, request, ids, wanted, go_on).unwrap();
        let last = hidden[hidden.len() - model.config().hidden_size..].to_vec();
        (last, decode(model, &mut pipeline, request, 17))
    });
    assert!(outcomes[0] == outcomes[1]);
}

/// The reference's own tokens are fed back, past its end token as well, so that one near-tie does not hide
/// the steps after it; a step is decidable if the reference's margin exceeds what rounding can move.
#[test]
fn greedy_tokens_match_transformers_where_they_are_decidable() {
    let cases = [
        ("needle-tiny", vec!["short_0", "short_1", "short_2", "needle_4k_0", "needle_4k_3"]),
        ("tiny-llama31-random", vec!["short_0", "short_1", "short_2", "long_0"]),
    ];
    for (name, prompts) in cases {
        let bundled = Bundled::open(name);
        for (dtype, decidable) in [(KvDtype::F32, 2.0 * F32_TOLERANCE), (KvDtype::Bf16, 2.0 * BF16_TOLERANCE)]
        {
            let mut compared = 0;
            for prompt in &prompts {
                let (ids, expected) = (bundled.input_ids(prompt), bundled.greedy_ids(prompt));
                let margins = &bundled.prompt(prompt).greedy_margins;
                let mut pipeline = pipeline(&bundled.model, dtype);
                let request = pipeline.admit(ids.len() + expected.len()).unwrap();
                let hidden = prefill(&bundled.model, &mut pipeline, request, &ids);
                let last = &hidden[hidden.len() - bundled.model.config().hidden_size..];
                let mut logits = bundled.model.logits(last);
                for (step, (token, margin)) in expected.iter().zip(margins).enumerate() {
                    if *margin > decidable {
                        assert_eq!(argmax(&logits), *token, "{name} {prompt} {dtype:?}, step {step}");
                        compared += 1;
                    }
                    logits = decode(&bundled.model, &mut pipeline, request, *token);
                }
            }
            println!("{name}, {dtype:?} pages: {compared} of {} greedy tokens decidable", prompts.len() * 16);
            assert!(compared >= prompts.len() * 4, "{name} {dtype:?}: only {compared} steps were decidable");
        }
    }
}

fn argmax(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1).then(b.0.cmp(&a.0)));
    best.expect("there are logits").0 as u32
}

/// Requests of different lengths, decoded as one batch, give what each gives alone.
#[test]
fn a_ragged_batch_decodes_like_single_requests() {
    let bundled = Bundled::open("needle-tiny");
    let model = &bundled.model;
    let prompts = ["short_0", "short_1", "short_2"].map(|name| bundled.input_ids(name));
    let tokens = [11, 500, 7];
    let alone: Vec<Vec<f32>> = prompts
        .iter()
        .zip(tokens)
        .map(|(ids, token)| {
            let mut pipeline = pipeline(model, KvDtype::Bf16);
            let request = pipeline.admit(ids.len() + 1).unwrap();
            prefill(model, &mut pipeline, request, ids);
            decode(model, &mut pipeline, request, token)
        })
        .collect();

    let mut pipeline = pipeline(model, KvDtype::Bf16);
    let batch: Vec<DecodeToken> = prompts
        .iter()
        .zip(tokens)
        .map(|(ids, token)| {
            let request = pipeline.admit(ids.len() + 1).unwrap();
            prefill(model, &mut pipeline, request, ids);
            DecodeToken { request, token }
        })
        .collect();
    let together = model.logits(&model.decode(&mut pipeline, &batch).unwrap());
    for (alone, together) in alone.iter().zip(together.chunks_exact(model.config().vocab_size)) {
        // Matrix products of other sizes round differently.
        assert!(max_difference(alone, together) < F32_TOLERANCE);
    }
}
