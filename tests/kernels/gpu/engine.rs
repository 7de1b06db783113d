//! Whole models on the GPU: the bundled ones against what transformers computed in f32, needles, requests that come and go between
//! graphs, and the memory that all of it takes.

use std::ops::ControlFlow;
use std::sync::Arc;

use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinkv::algorithms::{Dense, Quest, ShadowKv};
use spinkv::backend::cuda::CudaLimits;
use spinkv::memory::{KvDtype, PageLayout};
use spinkv::pipeline::{Budget, Method, RequestId, SteadyZone};
use spinkv::{KvConfig, KvShape};
use spinkv_engine::bench::Traced;
use spinkv_engine::config::ModelConfig;
use spinkv_engine::cuda::{BlasUse, CudaModel, CudaOptions, DeviceWeights, GpuReport, Overlap};
use spinkv_engine::model::DecodeToken;
use spinkv_engine::sampling::{Sampler, SamplingParams};
use spinkv_tests::checkpoints::{Bundled, dir, max_difference};

use super::{Machine, Outcome, Test, ensure, test};

/// How far logits may be from those of f32: activations and K and V are bf16.
const TOLERANCE: f32 = 0.4;

/// Where the reference's two best logits are further apart than this, the greedy token must be the reference's.
const MARGIN: f32 = 1.0;

pub fn tests() -> Vec<Test> {
    vec![
        test("engine::logits_are_those_of_transformers", |machine| logits(machine, BlasUse::IfPresent)),
        test("engine::logits_without_cublaslt", |machine| logits(machine, BlasUse::Never)),
        test("engine::needles_are_found", needles),
        test("engine::steps_of_others_run_between_a_prompts_layers", between_layers),
        test("engine::prompts_share_pages", prefixes),
        test("engine::tokens_are_drawn_as_on_the_cpu", draws),
        test("engine::attention_beside_copies_is_attention_after_them", beside_copies),
        test("engine::halves_are_the_step_as_a_whole", halves),
        test("engine::drawn_selections_are_what_steps_read", drawn),
        test("engine::soak_of_1000_steps", soak),
        test("engine::memory_is_what_the_driver_says", memory),
    ]
}

fn model(
    machine: &Machine,
    config: ModelConfig,
    weights: DeviceWeights,
    method: Arc<dyn Method>,
    limits: CudaLimits,
    blas: BlasUse,
) -> Result<CudaModel, Box<dyn std::error::Error>> {
    let shape = KvShape::new(config.layers, config.query_heads, config.kv_heads, config.head_dim)?;
    let layout = PageLayout::new(8, config.head_dim, KvDtype::Bf16)?;
    let kv = KvConfig::new(shape, layout, method)?;
    Ok(CudaModel::new(&machine.context, config, weights, kv, &CudaOptions { limits, blas })?)
}

fn bundled(
    machine: &Machine,
    name: &str,
    method: impl Method + 'static,
    limits: CudaLimits,
    blas: BlasUse,
) -> Result<CudaModel, Box<dyn std::error::Error>> {
    let config = ModelConfig::open(dir(name))?;
    let weights = DeviceWeights::open(&machine.stream, dir(name), &config, |_, _| {})?;
    model(machine, config, weights, Arc::new(method), limits, blas)
}

fn limits(requests: usize, max_tokens: usize) -> CudaLimits {
    CudaLimits { requests, max_tokens, buffering: 5.0, gpu_pages: None, host_bytes: None }
}

fn go(_: usize, _: usize) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// The lowest id of the greatest logit.
fn best(logits: &[f32]) -> u32 {
    let greatest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    logits.iter().position(|logit| *logit == greatest).map_or(u32::MAX, |id| id as u32)
}

/// Prompts' last logits, those of every position passed through decode steps, and the greedy tokens along the reference's.
fn logits(machine: &Machine, blas: BlasUse) -> Outcome {
    // Random weights are rarely sure of anything.
    for (name, long, least) in [
        ("needle-tiny", ["needle_4k_0", "needle_16k_0"], 40),
        ("tiny-llama31-random", ["long_0", "long_1"], 1),
    ] {
        let reference = Bundled::open(name);
        let mut model = bundled(machine, name, Dense::default(), limits(2, 17_000), blas)?;
        let (mut worst, mut decided) = (0.0_f32, 0);
        for prompt in ["short_0", "short_1", "short_2"].into_iter().chain(long) {
            let (ids, expected) = (reference.input_ids(prompt), reference.logits(prompt));
            let vocab = model.config().vocab_size;
            let at = |position: usize| {
                let row = expected.positions.iter().position(|known| *known == position)?;
                Some(&expected.values[row * vocab..][..vocab])
            };
            let request = model.pipeline_mut().admit(ids.len() + 16)?;
            let mut found = model.prefill(request, &ids, go)?;
            if let Some(expected) = at(ids.len() - 1) {
                worst = worst.max(max_difference(&found, expected));
            }
            let margins = &reference.prompt(prompt).greedy_margins;
            for (step, (token, margin)) in reference.greedy_ids(prompt).iter().zip(margins).enumerate() {
                if *margin > MARGIN {
                    decided += 1;
                    let own = best(&found);
                    ensure(
                        own == *token,
                        format!("{name} {prompt}, step {step}: {own}, the reference has {token}"),
                    )?;
                }
                if step < 15 {
                    found = model.decode(&[DecodeToken { request, token: *token }])?;
                }
            }
            model.pipeline_mut().release(request);
            if prompt.starts_with("short") {
                let request = model.pipeline_mut().admit(ids.len())?;
                model.prefill(request, &ids[..1], go)?;
                for (position, token) in ids.iter().enumerate().skip(1) {
                    let found = model.decode(&[DecodeToken { request, token: *token }])?;
                    if let Some(expected) = at(position) {
                        worst = worst.max(max_difference(&found, expected));
                    }
                }
                model.pipeline_mut().release(request);
            }
        }
        println!("{name}: logits within {worst:.3}, {decided} greedy tokens equal; {}", model.products());
        ensure(worst <= TOLERANCE, format!("{name}: logits are off by {worst}"))?;
        ensure(decided >= least, format!("{name}: only {decided} steps were decided"))?;
        ensure(model.pipeline().backend().is_empty(), "something is still held")?;
    }
    Ok(())
}

/// Attention that begins while pages come, beside attention that waits for all of them: the same bits, with few misses, with some, and with nothing else.
fn beside_copies(machine: &Machine) -> Outcome {
    const REQUESTS: usize = 24;
    let reference = Bundled::open("needle-tiny");
    let ids = reference.input_ids("needle_4k_0");
    let open = |overlap| -> Result<_, Box<dyn std::error::Error>> {
        let config = ModelConfig::open(dir("needle-tiny"))?;
        let weights = DeviceWeights::open(&machine.stream, dir("needle-tiny"), &config, |_, _| {})?;
        let method = ShadowKv { budget: Budget::Tokens(512), steady: SteadyZone::default(), outliers: 4 };
        let limits = limits(REQUESTS, 2200);
        let mut model = model(machine, config, weights, Arc::new(method), limits, BlasUse::IfPresent)?;
        model.set_overlap(overlap)?;
        let mut batch = Vec::new();
        for number in 0..REQUESTS {
            let request = model.pipeline_mut().admit(2200)?;
            let prompt = &ids[number * 31..][..(2000 - 85 * number).max(20)];
            let logits = model.prefill(request, prompt, go)?;
            batch.push(DecodeToken { request, token: best(&logits) });
        }
        Ok((model, batch))
    };
    let ((mut after, mut of_after), (mut beside, mut of_beside)) =
        (open(Overlap::Off)?, open(Overlap::Attention)?);
    let vocab = after.config().vocab_size;
    for step in 0..120 {
        if step % 3 == 2 {
            after.pipeline_mut().backend_mut().empty_caches()?;
            beside.pipeline_mut().backend_mut().empty_caches()?;
        }
        let count = [REQUESTS, 1, 9, 16][step % 4];
        let expected = after.decode(&of_after[..count])?;
        let found = beside.decode(&of_beside[..count])?;
        let off = max_difference(&found, &expected);
        ensure(off == 0.0, format!("step {step}: logits are off by {off}"))?;
        for (number, logits) in expected.chunks_exact(vocab).enumerate() {
            let token = best(logits);
            (of_after[number].token, of_beside[number].token) = (token, token);
        }
    }
    for (model, batch) in [(&mut after, of_after), (&mut beside, of_beside)] {
        model.pipeline_mut().backend_mut().settle()?;
        ensure(model.pipeline().counters().misses > 10_000, "little was fetched")?;
        for part in batch {
            model.pipeline_mut().backend_mut().audit(part.request)?;
        }
    }
    Ok(())
}

/// A batch of 40 ragged requests as two halves, of 32 and 8, beside two steps of as many: the same bits, whatever runs at once, as many pages read, and every
/// cached page.
fn halves(machine: &Machine) -> Outcome {
    const REQUESTS: usize = 40;
    let reference = Bundled::open("needle-tiny");
    let ids = reference.input_ids("needle_4k_0");
    let methods: [Arc<dyn Method>; 2] = [
        Arc::new(ShadowKv { budget: Budget::Tokens(128), steady: SteadyZone::default(), outliers: 4 }),
        Arc::new(Quest::new(Budget::Tokens(128), SteadyZone::default())),
    ];
    for method in methods {
        let open = || {
            let config = ModelConfig::open(dir("needle-tiny"))?;
            let weights = DeviceWeights::open(&machine.stream, dir("needle-tiny"), &config, |_, _| {})?;
            model(machine, config, weights, method.clone(), limits(REQUESTS, 700), BlasUse::Never)
        };
        let (mut whole, mut parted) = (open()?, open()?);
        ensure(parted.pipeline().backend().half_of(REQUESTS) == Some(32), "32 and 8")?;
        parted.set_overlap(Overlap::Halves)?;
        let (mut of_whole, mut of_parted) = (Vec::new(), Vec::new());
        for (model, batch) in [(&mut whole, &mut of_whole), (&mut parted, &mut of_parted)] {
            for number in 0..REQUESTS {
                let request = model.pipeline_mut().admit(700)?;
                // The last ones have no more than the steady zone.
                let prompt = &ids[number * 31..][..(620 - 15 * number).max(20)];
                let logits = model.prefill(request, prompt, go)?;
                batch.push(DecodeToken { request, token: best(&logits) });
            }
        }
        let vocab = whole.config().vocab_size;
        for step in 0..48 {
            // At last, batches whose second half is shorter: attention then splits its rows otherwise.
            let count = if step < 40 { [REQUESTS, 20][step % 5 / 4] } else { [37, 33][step % 2] };
            let mut expected = whole.decode(&of_whole[..count.min(32)])?;
            if count > 32 {
                expected.extend(whole.decode(&of_whole[32..count])?);
            }
            let found = parted.decode(&of_parted[..count])?;
            let off = max_difference(&found, &expected);
            let allowed = if step < 40 { 0.0 } else { TOLERANCE };
            ensure(off <= allowed, format!("{}, step {step}: logits are off by {off}", method.name()))?;
            for (number, logits) in expected.chunks_exact(vocab).enumerate() {
                let token = best(logits);
                (of_whole[number].token, of_parted[number].token) = (token, token);
            }
        }
        let mut read = [0, 0];
        for ((model, batch), read) in
            [(&mut whole, &of_whole), (&mut parted, &of_parted)].into_iter().zip(&mut read)
        {
            model.pipeline_mut().backend_mut().settle()?;
            let counters = model.pipeline().counters();
            *read = counters.hits + counters.misses;
            ensure(counters.misses > 0, "nothing was fetched")?;
            for part in batch {
                model.pipeline_mut().backend_mut().audit(part.request)?;
                model.pipeline_mut().release(part.request);
            }
            ensure(model.pipeline().backend().is_empty(), "something is still held")?;
        }
        ensure(read[0] == read[1], format!("{} pages were read, {} in halves", read[0], read[1]))?;
    }
    Ok(())
}

/// A seed gives the same tokens from the sampler on the CPU and from the kernel, and a greedy one takes no random number.
fn draws(machine: &Machine) -> Outcome {
    let reference = Bundled::open("needle-tiny");
    let mut model = bundled(machine, "needle-tiny", Dense::default(), limits(1, 4300), BlasUse::IfPresent)?;
    let ids = reference.input_ids("needle_4k_0");
    let mut differing = 0;
    for (number, (temperature, top_k, top_p, min_p)) in
        [(0.0, None, 1.0, 0.0), (0.8, None, 1.0, 0.0), (1.0, Some(20), 0.9, 0.0), (1.2, None, 0.95, 0.02)]
            .into_iter()
            .enumerate()
    {
        let params = SamplingParams { temperature, top_k, top_p, min_p, seed: machine.seed + number as u64 };
        let (mut on_cpu, mut on_gpu) = (Sampler::new(params.clone())?, Sampler::new(params)?);
        let request = model.pipeline_mut().admit(ids.len() + 101)?;
        let mut token = best(&model.prefill(request, &ids, go)?);
        for _ in 0..100 {
            let next = model.decode_sampled(&[DecodeToken { request, token }], &[on_gpu.next_draw()])?[0];
            let expected = on_cpu.sample(&model.logits(1)?)?;
            // The kernel's weights are not f64: a draw that lies on a border may fall to the neighbour.
            differing += usize::from(next != expected);
            token = expected;
        }
        model.pipeline_mut().release(request);
    }
    ensure(differing <= 2, format!("{differing} of 400 tokens differ"))
}

/// All 14 with dense attention; those of 4K with 1,024 tokens by ShadowKV, in one batch of 20: more than our own kernels multiply.
fn needles(machine: &Machine) -> Outcome {
    let reference = Bundled::open("needle-tiny");
    let all: Vec<_> = reference.prompts.iter().filter(|prompt| !prompt.answer.is_empty()).collect();
    ensure(all.len() == 14, format!("{} needles", all.len()))?;
    let mut dense = bundled(machine, "needle-tiny", Dense::default(), limits(1, 32_768), BlasUse::IfPresent)?;
    for prompt in &all {
        let answers = generate(&mut dense, &reference, &[&prompt.name], 12)?;
        ensure(
            answers[0].contains(&prompt.answer),
            format!("{}: {:?}, not {}", prompt.name, answers[0], prompt.answer),
        )?;
    }
    drop(dense);
    let sparse = ShadowKv { budget: Budget::Tokens(1024), steady: SteadyZone::default(), outliers: 0 };
    let mut sparse = bundled(machine, "needle-tiny", sparse, limits(20, 4200), BlasUse::IfPresent)?;
    let of_4k = all.iter().map(|prompt| prompt.name.as_str()).filter(|name| name.contains("_4k_"));
    let names: Vec<_> = of_4k.cycle().take(20).collect();
    let answers = generate(&mut sparse, &reference, &names, 12)?;
    for (name, answer) in names.iter().zip(&answers) {
        let expected = &reference.prompt(name).answer;
        ensure(answer.contains(expected), format!("shadowkv, {name}: {answer:?}, not {expected}"))?;
    }
    sparse.pipeline_mut().backend_mut().settle()?;
    let counters = sparse.pipeline().counters();
    println!("shadowkv, {} needles in a batch: {counters:?}", names.len());
    ensure(counters.misses > 0 && counters.hits > counters.misses, format!("{counters:?}"))
}

/// A request generates between the layers of another's prompt, and both find their needles; a prompt that another one has replaced cannot go on.
fn between_layers(machine: &Machine) -> Outcome {
    let reference = Bundled::open("needle-tiny");
    let sparse = ShadowKv { budget: Budget::Tokens(1024), steady: SteadyZone::default(), outliers: 0 };
    let mut model = bundled(machine, "needle-tiny", sparse, limits(3, 4200), BlasUse::IfPresent)?;
    let names = ["needle_4k_0", "needle_4k_1", "needle_4k_2"];
    let (mut parts, mut between): (Vec<(DecodeToken, Vec<u32>)>, usize) = (Vec::new(), 0);
    let step = |model: &mut CudaModel, parts: &mut Vec<(DecodeToken, Vec<u32>)>| {
        let batch: Vec<_> = parts.iter().map(|(part, _)| *part).collect();
        for ((part, ids), next) in parts.iter_mut().zip(model.decode_greedy(&batch)?) {
            part.token = next;
            ids.push(next);
        }
        Ok::<_, Box<dyn std::error::Error>>(())
    };
    for name in names {
        let ids = reference.input_ids(name);
        let request = model.pipeline_mut().admit(ids.len() + 24)?;
        let mut replaced = model.begin_prompt(request, &ids[..9])?;
        let mut prompt = model.begin_prompt(request, &ids)?;
        let refused = model.prompt_layer(&mut replaced, go);
        ensure(
            matches!(refused, Err(spinkv_engine::Error::PromptReplaced { .. })),
            format!("a replaced prompt: {:?}", refused.map(|_| ())),
        )?;
        let logits = loop {
            if let Some(logits) = model.prompt_layer(&mut prompt, go)? {
                break logits;
            }
            if !parts.is_empty() {
                step(&mut model, &mut parts)?;
                between += 1;
            }
        };
        let token = best(&logits);
        parts.push((DecodeToken { request, token }, vec![token]));
    }
    for _ in 0..9 {
        step(&mut model, &mut parts)?;
    }
    for ((part, ids), name) in parts.iter().zip(names) {
        model.pipeline_mut().release(part.request);
        let expected = &reference.greedy_ids(name)[..8];
        ensure(ids[..8] == *expected, format!("{name}: {:?}, not {expected:?}", &ids[..8]))?;
    }
    ensure(between == 6, format!("{between} steps between layers"))?;
    ensure(model.pipeline().backend().is_empty(), "something is held")
}

/// What was there already is not computed, and what a request gets is what it gets without, up to the order of sums: products of other numbers of tokens
/// are summed otherwise.
fn prefixes(machine: &Machine) -> Outcome {
    let reference = Bundled::open("needle-tiny");
    let sparse =
        ShadowKv { budget: Budget::Tokens(256), steady: SteadyZone { sinks: 4, window: 64 }, outliers: 8 };
    let ids = reference.input_ids("needle_4k_0");
    // The question, behind half of the context.
    let half: Vec<u32> = ids[..ids.len() / 2].iter().chain(&ids[ids.len() - 40..]).copied().collect();
    let mut runs = Vec::new();
    for sharing in [false, true] {
        let mut model = bundled(machine, "needle-tiny", sparse, limits(3, 4200), BlasUse::IfPresent)?;
        if sharing {
            model.pipeline_mut().backend_mut().share_prefixes(None)?;
        }
        let mut answers = Vec::new();
        for (prompt, cached) in
            [(&ids, 0), (&half, ids.len() / 2 / 128 * 128), (&ids, (ids.len() - 1) / 128 * 128)]
        {
            let request = model.pipeline_mut().admit(prompt.len() + 9)?;
            let mut begun = model.begin_prompt(request, prompt)?;
            let (found, expected) = (begun.cached_tokens(), if sharing { cached } else { 0 });
            ensure(found == expected, format!("{found} tokens are cached, not {expected}"))?;
            let logits = loop {
                if let Some(logits) = model.prompt_layer(&mut begun, go)? {
                    break logits;
                }
            };
            let mut tokens = vec![best(&logits)];
            for _ in 0..8 {
                let token = tokens[tokens.len() - 1];
                tokens.extend(model.decode_greedy(&[DecodeToken { request, token }])?);
            }
            answers.push((logits, tokens));
            model.pipeline_mut().release(request);
        }
        model.pipeline_mut().backend_mut().clear_prefixes();
        ensure(model.pipeline().backend().is_empty(), "something is held")?;
        runs.push(answers);
    }
    for (index, ((logits, tokens), (shared, of_shared))) in runs[0].iter().zip(&runs[1]).enumerate() {
        let apart = max_difference(logits, shared);
        ensure(apart < TOLERANCE, format!("prompt {index}: logits {apart} apart"))?;
        ensure(tokens == of_shared, format!("prompt {index}: {of_shared:?}, not {tokens:?}"))?;
    }
    Ok(())
}

/// The text of `tokens` greedy tokens after each of the named prompts, in one batch.
fn generate(
    model: &mut CudaModel,
    reference: &Bundled,
    names: &[&str],
    tokens: usize,
) -> Result<Vec<String>, Box<dyn std::error::Error>> {
    let mut parts = Vec::new();
    for name in names {
        let ids = reference.input_ids(name);
        let request = model.pipeline_mut().admit(ids.len() + tokens)?;
        let token = best(&model.prefill(request, &ids, go)?);
        parts.push((DecodeToken { request, token }, vec![token]));
    }
    for _ in 1..tokens {
        let batch: Vec<_> = parts.iter().map(|(part, _)| *part).collect();
        for ((part, ids), next) in parts.iter_mut().zip(model.decode_greedy(&batch)?) {
            part.token = next;
            ids.push(next);
        }
    }
    let texts = parts.iter().map(|(part, ids)| {
        model.pipeline_mut().release(part.request);
        let mut stream = reference.tokenizer.stream();
        let mut text = String::new();
        for id in ids {
            text.extend(stream.push(*id)?);
        }
        text.extend(stream.finish()?);
        Ok(text)
    });
    texts.collect()
}

/// Requests come, are cancelled in their prompts, and go, with room for less than they want; cached pages are compared with the host's.
fn soak(machine: &Machine) -> Outcome {
    let sparse =
        ShadowKv { budget: Budget::Tokens(128), steady: SteadyZone { sinks: 4, window: 32 }, outliers: 0 };
    let limits = CudaLimits { gpu_pages: Some(2400), ..limits(6, 2600) };
    let mut model = bundled(machine, "needle-tiny", sparse, limits, BlasUse::IfPresent)?;
    let free = machine.context.memory()?.free_bytes;
    let mut rng = ChaCha8Rng::seed_from_u64(machine.seed);
    let mut requests: Vec<(DecodeToken, usize)> = Vec::new();
    let (mut came, mut cancelled, mut refused, mut audited) = (0, 0, 0, 0);
    for step in 0..1000 {
        if rng.random_bool(0.1) && requests.len() < 6 {
            let ids: Vec<u32> = (0..rng.random_range(1..2000)).map(|_| rng.random_range(3..4096)).collect();
            let max_tokens = ids.len() + rng.random_range(1..400);
            match model.pipeline_mut().admit(max_tokens) {
                Ok(request) => {
                    let stops = rng.random_bool(0.2);
                    let outcome = model.prefill(request, &ids, |done, _| {
                        if stops && done == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
                    });
                    match outcome {
                        Ok(logits) => {
                            came += 1;
                            requests.push((DecodeToken { request, token: best(&logits) }, max_tokens));
                        }
                        Err(spinkv_engine::Error::Cancelled) => {
                            cancelled += 1;
                            model.pipeline_mut().release(request);
                        }
                        Err(other) => return Err(other.into()),
                    }
                }
                Err(spinkv::Error::OutOfGpuPages { .. } | spinkv::Error::OutOfHostMemory { .. }) => {
                    refused += 1
                }
                Err(other) => return Err(other.into()),
            }
        }
        let full = |request: RequestId, max_tokens: usize, model: &CudaModel| {
            model.pipeline().tokens(request).is_ok_and(|tokens| tokens == max_tokens)
        };
        for index in (0..requests.len()).rev() {
            let (part, max_tokens) = requests[index];
            if full(part.request, max_tokens, &model) || rng.random_bool(0.005) {
                model.pipeline_mut().release(part.request);
                requests.remove(index);
            }
        }
        let chosen: Vec<usize> = (0..requests.len()).filter(|_| rng.random_bool(0.85)).collect();
        if !chosen.is_empty() {
            let batch: Vec<_> = chosen.iter().map(|index| requests[*index].0).collect();
            for (index, token) in chosen.iter().zip(model.decode_greedy(&batch)?) {
                requests[*index].0.token = token;
            }
        }
        if step % 20 == 0
            && let Some((part, _)) = requests.choose(&mut rng)
        {
            audited += model.pipeline_mut().backend_mut().audit(part.request)?;
        }
    }
    for (part, _) in requests {
        model.pipeline_mut().release(part.request);
    }
    model.pipeline_mut().backend_mut().settle()?;
    let counters = model.pipeline().counters();
    println!("{came} came, {cancelled} cancelled, {refused} refused, {audited} pages audited, {counters:?}");
    ensure(model.pipeline().backend().is_empty(), "something is still held")?;
    // Graphs of the sizes that came, and the driver's own.
    let lost = free.saturating_sub(machine.context.memory()?.free_bytes);
    ensure(lost < 256 << 20, format!("{lost} bytes of GPU memory are lost"))?;
    ensure(
        came > 20 && cancelled > 3 && audited > 1000 && counters.misses > 1000,
        "not the mix that was meant",
    )
}

/// Steps of a captured graph select what was drawn for them, whoever else would have been selected; and nothing misses that stands still.
fn drawn(machine: &Machine) -> Outcome {
    const CONTEXT: usize = 1500;
    let config = ModelConfig::open(dir("needle-tiny"))?;
    let steady = SteadyZone { sinks: 4, window: 32 };
    let shape = KvShape::new(config.layers, config.query_heads, config.kv_heads, config.head_dim)?;
    let layout = PageLayout::new(8, config.head_dim, KvDtype::Bf16)?;
    let shadow = ShadowKv { budget: Budget::Tokens(128), steady, outliers: 3 };
    for method in [Arc::new(shadow) as Arc<dyn Method>, Arc::new(Quest::new(Budget::Tokens(128), steady))] {
        let kv = KvConfig::new(shape, layout, method.clone())?;
        let traced = Arc::new(Traced::new(&kv, method, CONTEXT, 20, None, machine.seed)?);
        let weights = DeviceWeights::open(&machine.stream, dir("needle-tiny"), &config, |_, _| {})?;
        let limits = limits(3, CONTEXT + 64);
        let mut model = model(machine, config.clone(), weights, traced.clone(), limits, BlasUse::IfPresent)?;
        let mut batch = Vec::new();
        for seed in 0..3 {
            let request = model.pipeline_mut().admit(CONTEXT + 64)?;
            let ids: Vec<u32> = (0..CONTEXT as u32).map(|at| 3 + (at * 7 + seed * 31) % 4000).collect();
            model.fill(request, &ids)?;
            batch.push(DecodeToken { request, token: 5 });
        }
        for step in 0..20 {
            traced.begin_on_gpu(model.pipeline().backend().stream(), step)?;
            model.decode_greedy(&batch)?;
            for (request, kv_head) in [(0, 0), (1, shape.kv_heads - 1), (2, 0)] {
                let found = model.pipeline().backend().selected(request, kv_head)?;
                let expected: Vec<u32> =
                    traced.drawn().ids(request, shape.layers - 1, kv_head, step).collect();
                ensure(found == expected, format!("step {step}: {found:?}, drawn {expected:?}"))?;
            }
        }
        for part in &batch {
            model.pipeline_mut().backend_mut().audit(part.request)?;
        }
        let before = model.pipeline().counters();
        for _ in 0..5 {
            model.decode_greedy(&batch)?;
        }
        model.pipeline_mut().backend_mut().settle()?;
        let after = model.pipeline().counters();
        ensure(
            before.misses > 0 && after.misses == before.misses && after.hits > before.hits,
            format!("selections that stand still: {before:?}, then {after:?}"),
        )?;
        model.pipeline_mut().backend_mut().empty_caches()?;
        model.decode_greedy(&batch)?;
        model.pipeline_mut().backend_mut().settle()?;
        let emptied = model.pipeline().counters();
        let hits = emptied.hits - after.hits;
        ensure(
            emptied.misses > after.misses && hits <= emptied.adopted_pages - after.adopted_pages,
            format!("a step over empty caches: {after:?}, then {emptied:?}"),
        )?;
    }
    Ok(())
}

/// Four layers of Qwen3-14B.
fn memory(machine: &Machine) -> Outcome {
    let config = ModelConfig::preset("qwen3-14b")?.with_layers(4)?;
    let before = machine.context.memory()?;
    let weights = DeviceWeights::random(&machine.stream, &machine.kernels, &config, 1)?;
    let sparse = ShadowKv { budget: Budget::Tokens(2048), steady: SteadyZone::default(), outliers: 0 };
    let mut model = model(machine, config, weights, Arc::new(sparse), limits(4, 32_768), BlasUse::IfPresent)?;
    let ids: Vec<u32> = (0..9000).map(|id| id * 7 % 150_000).collect();
    let request = model.pipeline_mut().admit(9100)?;
    let logits = model.prefill(request, &ids, go)?;
    ensure(logits.iter().all(|logit| logit.is_finite()), "logits that are no numbers")?;
    model.decode(&[DecodeToken { request, token: best(&logits) }])?;
    let report = model.memory()?;
    let GpuReport { in_use, .. } = report;
    let total = report.total();
    println!("{report:?}: {total} of {in_use}, {} before", before.total_bytes - before.free_bytes);
    let off = total.abs_diff(in_use) as f64 / in_use as f64;
    ensure(
        off <= 0.02,
        format!("the kinds add up to {total} bytes, the driver says {in_use}: off by {off:.3}"),
    )
}
