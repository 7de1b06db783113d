//! Prompts that begin with pages of others: what a request gets does not depend on what was there, not by a bit.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::LazyLock;

use spinkv::algorithms::{self, MethodOptions, OwnOptions};
use spinkv::backend::cpu::CpuBackend;
use spinkv::memory::{KvDtype, MemoryLimits, PageLayout, RequestPlan};
use spinkv::pipeline::{Budget, DEFAULT_BUFFERING, Pipeline, RequestId, SteadyZone};
use spinkv::{KvConfig, KvShape};
use spinkv_engine::Error;
use spinkv_engine::config::ModelConfig;
use spinkv_engine::model::{DecodeToken, Model, Wanted};
use spinkv_engine::runner::{CpuRunner, Runner};

static MODEL: LazyLock<Model> = LazyLock::new(|| {
    let dir = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tiny-llama31-random"));
    let config = ModelConfig::open(&dir).expect("the configuration is bundled");
    Model::open(&dir, config, |_, _| {}).expect("the model is bundled")
});

/// Tokens of a block at pages of 8.
const BLOCK: usize = 128;
const STEPS: usize = 5;

/// A small budget, so that most of a prompt is selected from.
fn kv(method: &str, own: &[&str], page_tokens: usize, dtype: KvDtype) -> KvConfig {
    kv_of(method, own, page_tokens, dtype, 8)
}

fn kv_of(method: &str, own: &[&str], page_tokens: usize, dtype: KvDtype, window: usize) -> KvConfig {
    let config = MODEL.config();
    let shape = KvShape::new(config.layers, config.query_heads, config.kv_heads, config.head_dim).unwrap();
    let layout = PageLayout::new(page_tokens, config.head_dim, dtype).unwrap();
    let mut options = OwnOptions::default();
    own.iter().for_each(|option| options.add(option).unwrap());
    let options = MethodOptions {
        budget: Budget::Tokens(32),
        steady: SteadyZone { sinks: 4, window },
        own: options,
        ..MethodOptions::default()
    };
    KvConfig::new(shape, layout, algorithms::by_name(method, &options).unwrap()).unwrap()
}

fn usual() -> KvConfig {
    kv("shadowkv", &["outliers=2"], 8, KvDtype::Bf16)
}

fn pipeline(kv: KvConfig, limits: MemoryLimits) -> Pipeline<CpuBackend> {
    Pipeline::new(CpuBackend::new(kv, limits).with_prefixes(None).unwrap())
}

fn runner(kv: KvConfig) -> CpuRunner<'static> {
    CpuRunner::new(&MODEL, pipeline(kv, MemoryLimits::default()))
}

fn prompt(tokens: usize, seed: u32) -> Vec<u32> {
    (0..tokens as u32).map(|i| (i * 2_654_435 + seed * 40_503) % 4000 + 10).collect()
}

/// The first `shared` tokens of `base`, and others up to `tokens`.
fn behind(base: &[u32], shared: usize, tokens: usize, seed: u32) -> Vec<u32> {
    let other = prompt(tokens - shared, seed);
    base[..shared].iter().chain(&other).copied().collect()
}

fn go(_: usize, _: usize) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn best(logits: &[f32]) -> u32 {
    (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).expect("logits") as u32
}

fn decode(runner: &mut CpuRunner<'_>, request: RequestId, all: &mut Vec<Vec<f32>>) {
    let token = best(all.last().expect("the prompt's"));
    all.push(runner.decode(&[DecodeToken { request, token }]).unwrap());
}

/// Cached tokens, and the logits of a prompt and of further tokens.
fn answer(runner: &mut CpuRunner<'_>, tokens: &[u32]) -> (usize, Vec<Vec<f32>>) {
    let request = runner.admit(tokens.len() + STEPS).unwrap();
    let mut prompt = runner.begin_prompt(request, tokens).unwrap();
    let cached = runner.cached_tokens(&prompt);
    let mut all = Vec::new();
    while all.is_empty() {
        all.extend(runner.prompt_layer(&mut prompt, &mut go).unwrap());
    }
    (0..STEPS).for_each(|_| decode(runner, request, &mut all));
    runner.release(request);
    (cached, all)
}

/// In an empty memory.
fn alone(kv: KvConfig, tokens: &[u32]) -> Vec<Vec<f32>> {
    let (cached, all) = answer(&mut runner(kv), tokens);
    assert_eq!(cached, 0);
    all
}

#[test]
fn what_was_there_changes_no_bit_and_less_is_computed() {
    let base = prompt(5 * BLOCK + 40, 1);
    let prompts = [
        (behind(&base, 0, 300, 2), 0, "nothing in common"),
        (behind(&base, BLOCK - 1, 300, 3), 0, "a token less than a block"),
        (behind(&base, BLOCK + 50, 300, 4), BLOCK, "apart within the second block"),
        (behind(&base, BLOCK, BLOCK + 1, 5), BLOCK, "one token behind a block"),
        (behind(&base, 4 * BLOCK, 5 * BLOCK, 6), 4 * BLOCK, "many blocks"),
        (base.clone(), 5 * BLOCK, "the same once more"),
        (
            base[..4 * BLOCK].to_vec(),
            3 * BLOCK,
            "whole blocks: the last token is computed, with all of its block",
        ),
        (behind(&base, base.len(), base.len() + 300, 7), 5 * BLOCK, "longer than what was there"),
    ];
    for (name, own, dtype) in [
        ("shadowkv", &["outliers=2"][..], KvDtype::Bf16),
        ("quest", &[], KvDtype::F32),
        ("streaming-llm", &[], KvDtype::Bf16),
        ("dense", &[], KvDtype::Bf16),
    ] {
        let mut runner = runner(kv(name, own, 8, dtype));
        answer(&mut runner, &base);
        for (tokens, cached, what) in &prompts {
            let (found, all) = answer(&mut runner, tokens);
            assert_eq!(found, *cached, "{name}: {what}");
            assert!(all == alone(kv(name, own, 8, dtype), tokens), "{name}: {what}");
        }
    }
}

/// Against a memory that shares nothing: prompts read keys and values as pages have them instead of unrounded.
#[test]
fn sharing_costs_no_more_than_the_rounding_of_pages() {
    let base = prompt(3 * BLOCK + 40, 1);
    for (dtype, bound) in [(KvDtype::F32, 1e-4), (KvDtype::Bf16, 0.03)] {
        let dense = || kv("dense", &[], 8, dtype);
        let mut plain =
            CpuRunner::new(&MODEL, Pipeline::new(CpuBackend::new(dense(), MemoryLimits::default())));
        let (cached, expected) = answer(&mut plain, &base);
        assert_eq!((cached, plain.prefixes()), (0, None));
        let mut sharing = runner(dense());
        answer(&mut sharing, &base);
        let (cached, found) = answer(&mut sharing, &base);
        assert_eq!(cached, 3 * BLOCK);
        let size = |row: &[f32]| row.iter().map(|logit| f64::from(*logit).powi(2)).sum::<f64>().sqrt();
        let apart: Vec<f32> = found[0].iter().zip(&expected[0]).map(|(one, other)| one - other).collect();
        let error = size(&apart) / size(&expected[0]);
        println!("{dtype:?}: {error:.1e}");
        assert!(error < bound, "{error}");
    }
}

#[test]
fn blocks_of_other_pages_are_shared_as_well() {
    for page_tokens in [2, 64] {
        let block = 16 * page_tokens;
        let kv = || kv("dense", &[], page_tokens, KvDtype::Bf16);
        let base = prompt(block.max(BLOCK) + 300, 1);
        let mut runner = runner(kv());
        answer(&mut runner, &base);
        // Where blocks are small, chunks are several of them.
        let unit = block.max(BLOCK);
        let (cached, all) = answer(&mut runner, &base);
        assert_eq!(cached, (base.len() - 1) / unit * unit);
        assert!(all == alone(kv(), &base), "pages of {page_tokens}");
    }
}

#[test]
fn sharers_between_whose_layers_others_come_and_go_get_what_they_get_alone() {
    let base = prompt(3 * BLOCK + 9, 1);
    let [one, two, three] = [10, 11, 12].map(|seed| behind(&base, 2 * BLOCK + 60, 3 * BLOCK + 70, seed));
    let mut runner = runner(usual());
    answer(&mut runner, &base);
    let begin = |runner: &mut CpuRunner<'_>, tokens: &[u32]| {
        let request = runner.admit(tokens.len() + STEPS).unwrap();
        let prompt = runner.begin_prompt(request, tokens).unwrap();
        assert_eq!(runner.cached_tokens(&prompt), 2 * BLOCK);
        (request, prompt)
    };
    let (first, mut first_prompt) = begin(&mut runner, &one);
    let (second, mut second_prompt) = begin(&mut runner, &two);
    let (third, mut third_prompt) = begin(&mut runner, &three);
    let layers = MODEL.config().layers;
    let (mut of_one, mut of_three) = (Vec::new(), Vec::new());
    for layer in 0..layers {
        of_one.extend(runner.prompt_layer(&mut first_prompt, &mut go).unwrap());
        if layer == 1 {
            // What it shares stays the others'.
            runner.release(second);
        } else if layer == 0 {
            assert!(runner.prompt_layer(&mut second_prompt, &mut go).unwrap().is_none());
        }
        of_three.extend(runner.prompt_layer(&mut third_prompt, &mut go).unwrap());
    }
    runner.park(first).unwrap();
    decode(&mut runner, third, &mut of_three);
    runner.resume(first).unwrap();
    for _ in 1..STEPS {
        decode(&mut runner, first, &mut of_one);
        decode(&mut runner, third, &mut of_three);
    }
    decode(&mut runner, first, &mut of_one);
    assert!(of_one == alone(usual(), &one) && of_three == alone(usual(), &three));
    [first, third].into_iter().for_each(|request| runner.release(request));
    // Both were kept beside the first: two blocks in common, one each.
    assert_eq!(runner.prefixes().unwrap().blocks, 5);
}

#[test]
fn requests_take_back_what_is_kept_and_nothing_that_is_in_use() {
    let kv = usual();
    let slabs = |tokens: usize| RequestPlan::new(&kv, tokens, DEFAULT_BUFFERING).unwrap().host_slabs();
    let (long, short) = (3 * BLOCK + 40, BLOCK + 100);
    // A long and a short request fill the host, and leave nothing for blocks of others.
    let room = slabs(long + STEPS) + slabs(short + STEPS);
    let host_bytes = room as u64 * kv.host_layout().slab_bytes();
    let limits = MemoryLimits { host_bytes: Some(host_bytes), ..MemoryLimits::default() };
    let mut runner = CpuRunner::new(&MODEL, pipeline(kv.clone(), limits));
    let base = prompt(long, 1);
    answer(&mut runner, &base);
    let tokens = behind(&base, 2 * BLOCK + 5, long, 2);
    let request = runner.admit(long + STEPS).unwrap();
    let mut prompt_of_request = runner.begin_prompt(request, &tokens).unwrap();
    assert_eq!(runner.cached_tokens(&prompt_of_request), 2 * BLOCK);
    let mut all = Vec::new();
    for seed in 3..9 {
        // Each finds room between two layers of the other, and is kept until the next comes.
        let (cached, found) = answer(&mut runner, &prompt(short, seed));
        assert!(cached == 0 && found == alone(kv.clone(), &prompt(short, seed)), "{seed}");
        if all.is_empty() {
            all.extend(runner.prompt_layer(&mut prompt_of_request, &mut go).unwrap());
        } else {
            decode(&mut runner, request, &mut all);
        }
    }
    while all.len() <= STEPS {
        decode(&mut runner, request, &mut all);
    }
    assert!(all == alone(kv.clone(), &tokens));
    let usage = runner.prefixes().unwrap();
    assert!(usage.evicted_blocks >= 5 && runner.usage().host.pages <= host_bytes, "{usage:?}");
    // What could never run is still told apart from what could.
    assert!(runner.check(2 * long).is_err() && runner.admit(long + STEPS).is_err());
    runner.release(request);
    runner.admit(long + STEPS).unwrap();
}

#[test]
fn all_of_it_comes_free() {
    let mut pipeline = pipeline(usual(), MemoryLimits::default());
    let base = prompt(2 * BLOCK + 50, 1);
    let mut requests = Vec::new();
    for _ in 0..3 {
        let request = pipeline.admit(base.len() + STEPS).unwrap();
        MODEL.prefill(&mut pipeline, request, &base, Wanted::Last, go).unwrap();
        requests.push(request);
    }
    let rows = pipeline.config().shape().rows();
    // Two blocks that all share, and each one's third slab.
    assert_eq!(pipeline.backend().used_slabs(), rows * (2 + 3));
    pipeline.backend_mut().clear_prefixes();
    assert_eq!(pipeline.backend().used_slabs(), rows * (2 + 3), "those that they share are theirs");
    pipeline.release(requests[0]);
    assert_eq!(pipeline.backend().used_slabs(), rows * (2 + 2));
    pipeline.release(requests[1]);
    pipeline.release(requests[2]);
    assert_eq!(pipeline.backend().used_slabs(), 0);
    assert_eq!(pipeline.usage(), Default::default());
}

/// Pages that a transfer still writes are nobody else's.
#[test]
fn what_is_not_complete_on_the_host_is_not_shared() {
    // Nothing is selected, so nobody waits for a page.
    let steady = kv_of("dense", &[], 8, KvDtype::Bf16, 4 * BLOCK);
    let backend = CpuBackend::new(steady, MemoryLimits::default()).with_late_transfers(7);
    let mut pipeline = Pipeline::new(backend.with_prefixes(None).unwrap());
    let base = prompt(3 * BLOCK + 50, 1);
    let begin = |pipeline: &mut Pipeline<CpuBackend>| {
        let request = pipeline.admit(base.len()).unwrap();
        (request, pipeline.share_prefix(request, &base, 1).unwrap())
    };
    let (request, shared) = begin(&mut pipeline);
    assert_eq!(shared, 0);
    MODEL.prefill(&mut pipeline, request, &base, Wanted::Last, go).unwrap();
    let backend = pipeline.backend();
    let complete = |layer, kv_head| backend.published_pages(request, layer, kv_head).unwrap();
    let shape = pipeline.config().shape();
    let rows = (0..shape.layers).flat_map(|layer| (0..shape.kv_heads).map(move |kv_head| (layer, kv_head)));
    assert!(rows.map(|(layer, kv_head)| complete(layer, kv_head)).min().unwrap() < 16);
    assert_eq!(pipeline.prefixes().unwrap().blocks, 0);
    let (other, shared) = begin(&mut pipeline);
    assert_eq!(shared, 0);
    [request, other].into_iter().for_each(|request| pipeline.release(request));
    while pipeline.backend_mut().complete_transfers(100) > 0 {}
    assert_eq!(pipeline.backend().used_slabs(), 0);
}

#[test]
fn a_prompt_is_told_once_and_before_all_else() {
    let mut pipeline = pipeline(usual(), MemoryLimits::default());
    let base = prompt(2 * BLOCK, 1);
    let request = pipeline.admit(base.len() + 1).unwrap();
    let longer = prompt(base.len() + 2, 1);
    let mut refused = |tokens: &[u32], message: &str| {
        let error = pipeline.share_prefix(request, tokens, 1).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    };
    refused(&[], "0 tokens");
    refused(&longer, "258 new tokens");
    pipeline.share_prefix(request, &base, 1).unwrap();
    assert_eq!(pipeline.share_prefix(request, &base, 1).unwrap(), 0, "the same prompt");
    let error = pipeline.share_prefix(request, &longer[1..], 1).unwrap_err();
    assert_eq!(error, spinkv::Error::PrefixTaken(request));
    let other = MODEL.prefill(&mut pipeline, request, &base[1..], Wanted::All, go).unwrap_err().to_string();
    assert!(other.contains("a prompt of 256 tokens") && other.contains("255"), "{other}");
    MODEL.prefill(&mut pipeline, request, &base, Wanted::Last, go).unwrap();
    let error = pipeline.share_prefix(request, &base[..1], 1).unwrap_err();
    assert!(matches!(error, spinkv::Error::PrefillNotEmpty { held: 256, .. }), "{error}");
}

/// A layer that the system refuses memory for leaves a request what it shares, and can be tried again.
#[test]
fn a_refused_layer_takes_nothing_away() {
    let base = prompt(3 * BLOCK, 1);
    let tokens = behind(&base, 2 * BLOCK, 2 * BLOCK + 50, 2);
    let mut runner = runner(usual());
    answer(&mut runner, &base);
    let request = runner.admit(tokens.len() + STEPS).unwrap();
    let mut begun = runner.begin_prompt(request, &tokens).unwrap();
    assert_eq!(runner.cached_tokens(&begun), 2 * BLOCK);
    // Takes the tables that the first one left.
    let other = runner.admit(2 * BLOCK).unwrap();
    runner.prefill(other, &prompt(2 * BLOCK, 3), &mut go).unwrap();
    let (usage, prefixes) = (runner.usage(), runner.prefixes());
    let allocator = runner.cpu_pipeline().expect("on the CPU").backend().allocator().clone();
    allocator.refuse_after(0);
    let error = runner.prompt_layer(&mut begun, &mut go).map(|_| ()).unwrap_err();
    allocator.refuse_after(u64::MAX);
    assert!(matches!(error, Error::Kv(spinkv::Error::AllocationFailed { .. })), "{error}");
    assert_eq!((runner.usage(), runner.prefixes()), (usage, prefixes));
    let mut all = Vec::new();
    while all.is_empty() {
        all.extend(runner.prompt_layer(&mut begun, &mut go).unwrap());
    }
    (0..STEPS).for_each(|_| decode(&mut runner, request, &mut all));
    assert!(all == alone(usual(), &tokens));
}
