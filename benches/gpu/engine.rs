//! The engine on layers of Qwen3-14B with random weights: prompts with and without what is kept of them, and decode steps as graphs, by
//! parts. Times are of the host's clock for prompts and of CUDA events for steps.

use std::error::Error;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

use spinkv::algorithms::{Dense, ShadowKv};
use spinkv::backend::cuda::CudaLimits;
use spinkv::memory::{KvDtype, PageLayout};
use spinkv::pipeline::{Budget, Method, SteadyZone};
use spinkv::{KvConfig, KvShape};
use spinkv_engine::config::ModelConfig;
use spinkv_engine::cuda::{BlasUse, CudaModel, CudaOptions, DeviceWeights};
use spinkv_engine::model::DecodeToken;

use crate::measure::Bench;

/// Layers that are run: a step's time grows with their number, the head's share apart.
const LAYERS: usize = 4;
/// Tokens of a prompt.
const CONTEXT: usize = 32_768;
/// Prompts that are timed, after one that is not.
const PROMPTS: usize = 3;
/// Steps that are timed in each way.
const STEPS: usize = 24;

pub fn run(bench: &mut Bench) -> Result<(), Box<dyn Error>> {
    println!("\nengine: {LAYERS} layers of Qwen3-14B, random weights, pages of 8");
    let steady = SteadyZone::default();
    let sparse = |tokens| Arc::new(ShadowKv { budget: Budget::Tokens(tokens), steady, outliers: 0 });
    prompts(bench, sparse(2048), BlasUse::IfPresent)?;
    prompts(bench, sparse(2048), BlasUse::Never)?;
    // Of 2,000 tokens every step selects all that a budget of 2,048 allows: both are the same graph.
    steps(bench, "dense", Arc::new(Dense { steady }), 1, 2000)?;
    steps(bench, "shadowkv 2048, fits", sparse(2048), 1, 2000)?;
    for requests in [1, 8, 16] {
        steps(bench, "dense, resident", Arc::new(Dense { steady }), requests, CONTEXT)?;
        steps(bench, "shadowkv 2048", sparse(2048), requests, CONTEXT)?;
        steps(bench, "shadowkv 512", sparse(512), requests, CONTEXT)?;
    }
    Ok(())
}

fn model(
    bench: &Bench,
    method: Arc<dyn Method>,
    requests: usize,
    max_tokens: usize,
    blas: BlasUse,
) -> Result<CudaModel, Box<dyn Error>> {
    let config = ModelConfig::preset("qwen3-14b")?.with_layers(LAYERS)?;
    let weights = DeviceWeights::random(&bench.stream, &bench.kernels, &config, 7)?;
    let shape = KvShape::new(config.layers, config.query_heads, config.kv_heads, config.head_dim)?;
    let kv = KvConfig::new(shape, PageLayout::new(8, config.head_dim, KvDtype::Bf16)?, method)?;
    let limits = CudaLimits { requests, max_tokens, buffering: 5.0, gpu_pages: None, host_bytes: None };
    Ok(CudaModel::new(&bench.context, config, weights, kv, &CudaOptions { limits, blas })?)
}

fn prompt(tokens: usize, seed: usize) -> Vec<u32> {
    (0..tokens).map(|token| ((token + 1) * (2 * seed + 7919) % 151_000) as u32).collect()
}

/// What Index, Offload and the warm start add to a prompt, under whose layers they run.
fn prompts(bench: &Bench, method: Arc<dyn Method>, blas: BlasUse) -> Result<(), Box<dyn Error>> {
    let mut model = model(bench, method, 1, CONTEXT + 1, blas)?;
    let ids = prompt(CONTEXT, 0);
    let (mut kept, mut passed) = (Vec::new(), Vec::new());
    for round in 0..2 * (PROMPTS + 1) {
        let keep = round % 2 == 0;
        model.pipeline_mut().backend_mut().keep_prompts(keep);
        let request = model.pipeline_mut().admit(CONTEXT + 1)?;
        let start = Instant::now();
        model.prefill(request, &ids, |_, _| ControlFlow::Continue(()))?;
        let ms = start.elapsed().as_secs_f64() * 1e3;
        if round > 1 {
            if keep { kept.push(ms) } else { passed.push(ms) }
        }
        model.pipeline_mut().release(request);
    }
    let median = |times: &mut Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    let (kept, passed) = (median(&mut kept), median(&mut passed));
    println!(
        "prompt of {CONTEXT} tokens, {}: {kept:.1} ms, of which kept {:.1} ms = {:.1} %; {:.0} tokens/s through {LAYERS} layers and the head",
        model.products(),
        kept - passed,
        (kept / passed - 1.0) * 100.0,
        CONTEXT as f64 / kept * 1e3
    );
    Ok(())
}

/// Greedy steps of a batch of requests of `context` tokens.
fn steps(
    bench: &Bench,
    name: &str,
    method: Arc<dyn Method>,
    requests: usize,
    context: usize,
) -> Result<(), Box<dyn Error>> {
    let max_tokens = context + 4 * STEPS + 8;
    let mut model = model(bench, method, requests, max_tokens, BlasUse::IfPresent)?;
    let mut batch = Vec::new();
    for seed in 0..requests {
        let request = model.pipeline_mut().admit(max_tokens)?;
        model.prefill(request, &prompt(context, seed), |_, _| ControlFlow::Continue(()))?;
        batch.push(DecodeToken { request, token: seed as u32 });
    }
    model.profile(&mut batch, 4)?;
    model.pipeline_mut().backend_mut().settle()?;
    let before = model.pipeline().counters();
    let profile = model.profile(&mut batch, STEPS)?;
    model.pipeline_mut().backend_mut().settle()?;
    let after = model.pipeline().counters();
    let start = Instant::now();
    for _ in 0..STEPS {
        let ids = model.decode_greedy(&batch)?;
        batch.iter_mut().zip(ids).for_each(|(part, id)| part.token = id);
    }
    let wall = start.elapsed().as_secs_f64() * 1e3 / STEPS as f64;
    let (hits, misses) = (after.hits - before.hits, after.misses - before.misses);
    let ratio = if hits + misses > 0 {
        format!("{:.3}", hits as f64 / (hits + misses) as f64)
    } else {
        "-".to_owned()
    };
    let parts: Vec<String> = profile
        .parts
        .iter()
        .map(|(part, ms)| format!("{} {ms:.3}", format!("{part:?}").to_lowercase()))
        .collect();
    println!(
        "{name:20} batch {requests:2}, {context:5} tokens: graph {:.3} ms, host {wall:.3} ms, hit ratio {ratio}; {} = {:.3} ms, {:+.1} %",
        profile.graph_ms,
        parts.join(" + "),
        profile.total_ms(),
        (profile.total_ms() / profile.graph_ms - 1.0) * 100.0
    );
    Ok(())
}
