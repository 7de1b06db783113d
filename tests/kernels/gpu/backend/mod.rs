//! The cuda backend under the pipeline, as the CPU's is tested: every output against attention by its definition over what was
//! selected, in f64; requests that come, grow, are cancelled and go, with every cached page compared with its host page.

mod clusters;
mod run;

use std::sync::Arc;

use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinkv::algorithms::{
    Dense, HeadRule, LowRankKeys, PerRow, Quest, RetroInfer, RowRules, SeerAttention, ShadowKv, StreamingLlm,
    TokenTopK,
};
use spinkv::backend::cuda::CudaLimits;
use spinkv::gates::{Gates, LayerGate};
use spinkv::memory::{HostLayout, KvDtype, PageLayout, RequestPlan};
use spinkv::partition::PartitionMap;
use spinkv::pipeline::{Budget, GroupMerge, LowRank, Method, RequestId, SteadyZone};
use spinkv::{Error, KvConfig, KvShape, Rotary};
use spinkv_tests::small::rotary;
use spinkv_tests::{Sequence, Style};

use super::{Machine, Outcome, Test, ensure, test};
use run::{Run, sequence};

/// A short window, so that little context is steady.
const STEADY: SteadyZone = SteadyZone { sinks: 4, window: 12 };

/// Selects 3 chunks of 8.
const SPARSE: ShadowKv = ShadowKv { budget: Budget::Tokens(24), steady: STEADY, outliers: 0 };

pub fn tests() -> Vec<Test> {
    vec![
        test("backend::outputs_are_attention_over_what_was_selected", outputs),
        test("backend::prompts_of_every_length_near_a_border", borders),
        test("backend::emptied_caches_change_no_output", emptied),
        test("backend::keys_in_low_rank_are_rebuilt", low_rank),
        test("backend::coded_pages_are_read_as_their_codes_say", coded),
        test("backend::gates_select_as_on_the_cpu", gates),
        test("backend::clusters_are_those_of_the_definition", clusters),
        test("backend::clusters_beside_rows_with_rules_of_their_own", ruled_clusters),
        test("backend::parked_requests_go_on", parked),
        test("backend::requests_without_a_cache_are_parked_as_a_whole", parked_wholes),
        test("backend::soak_1000_steps", soak),
        test("backend::what_does_not_fit_is_refused_and_costs_nothing", refusals),
    ]
}

fn shape(group: usize, head_dim: usize) -> KvShape {
    KvShape::new(2, 2 * group, 2, head_dim).expect("a valid shape")
}

fn limits(requests: usize, max_tokens: usize) -> CudaLimits {
    CudaLimits { requests, max_tokens, buffering: 2.0, gpu_pages: None, host_bytes: None }
}

/// The methods that suit a page size. Another one joins these tests with a line.
fn methods(page_tokens: usize) -> Vec<Arc<dyn Method>> {
    let (budget, half) = (Budget::Tokens(24), Budget::Fraction(0.5));
    let quest = |budget, chunk, merge| Arc::new(Quest { chunk, merge, ..Quest::new(budget, STEADY) });
    let all: Vec<Arc<dyn Method>> = vec![
        Arc::new(Dense { steady: STEADY }),
        Arc::new(StreamingLlm { steady: STEADY }),
        Arc::new(SPARSE),
        Arc::new(ShadowKv { budget: half, ..SPARSE }),
        Arc::new(ShadowKv { outliers: 6, ..SPARSE }),
        quest(budget, 16, GroupMerge::Max),
        quest(Budget::Tokens(64), 16, GroupMerge::Sum),
        quest(half, 32, GroupMerge::Mean),
        Arc::new(TokenTopK { budget, steady: STEADY }),
        Arc::new(PerRow::new(
            Arc::new(SPARSE),
            RowRules { dense_layers: 1, steady_heads: vec![HeadRule { layer: None, kv_head: 1 }] },
        )),
    ];
    let suits =
        |method: &Arc<dyn Method>| PartitionMap::new(method.partition(), page_tokens, method.name()).is_ok();
    all.into_iter().filter(suits).collect()
}

/// A ragged batch of each method, page size and head width through prompts and 120 generated tokens.
fn outputs(machine: &Machine) -> Outcome {
    for (number, (group, head_dim, page_tokens)) in
        [(5, 128, 8), (4, 64, 8), (1, 64, 16), (8, 128, 32)].into_iter().enumerate()
    {
        let shape = shape(group, head_dim);
        for method in methods(page_tokens) {
            let seed = machine.seed + number as u64;
            let mut run = Run::new(machine, shape, page_tokens, method, &limits(4, 700))?;
            let requests: Vec<_> =
                [(0, Style::Random), (9, Style::Peaked), (300, Style::Random), (513, Style::Uniform)]
                    .into_iter()
                    .enumerate()
                    .map(|(index, (prompt, style))| {
                        run.start(sequence(shape, style, prompt + 130, seed + index as u64), prompt)
                    })
                    .collect::<Result<_, _>>()?;
            for _ in 0..120 {
                run.step(&requests)?;
            }
            for request in requests {
                run.audit(request)?;
                run.release(request);
            }
            run.ensure_empty()?;
        }
    }
    Ok(())
}

/// The same where the host has a byte an element, with caches that are emptied at times: all pages are read as their codes say once they are full.
fn coded(machine: &Machine) -> Outcome {
    for (number, (group, head_dim, page_tokens, format)) in
        [(5, 128, 8, "fp8"), (4, 64, 16, "int8"), (8, 128, 32, "fp8")].into_iter().enumerate()
    {
        let shape = shape(group, head_dim);
        let layout = PageLayout::new(page_tokens, head_dim, KvDtype::Bf16)?;
        let pages = HostLayout::new(layout, format.parse()?)?;
        for method in methods(page_tokens) {
            let selects = method.select().budget().is_some();
            let mut run = Run::with_pages(machine, shape, pages, method, &limits(3, 400))?;
            let requests: Vec<_> = [0, 90, 257]
                .into_iter()
                .map(|prompt| {
                    let seed = machine.seed + number as u64 + prompt as u64;
                    run.start(sequence(shape, Style::Random, prompt + 80, seed), prompt)
                })
                .collect::<Result<_, _>>()?;
            for step in 0..75 {
                if step % 10 == 7 {
                    run.empty_caches()?;
                }
                run.step(&requests)?;
            }
            let mut audited = 0;
            for request in requests {
                audited += run.audit(request)?;
                run.release(request);
            }
            ensure(!selects || audited > 0 && run.counters().misses > 0, "caches that nothing came into")?;
            run.ensure_empty()?;
        }
    }
    Ok(())
}

/// Around the borders of pages, of chunks, of the window and of sinks, window and chunk together.
fn borders(machine: &Machine) -> Outcome {
    let shape = shape(2, 64);
    for prompt in
        [1, 7, 8, 9, 11, 12, 13, 19, 20, 21, 23, 24, 25, 27, 28, 29, 32, 33, 43, 44, 45, 127, 128, 129]
    {
        for method in methods(8) {
            let mut run = Run::new(machine, shape, 8, method, &limits(2, 200))?;
            let request =
                run.start(sequence(shape, Style::Random, prompt + 40, machine.seed + prompt as u64), prompt)?;
            for _ in 0..40 {
                run.step(&[request])?;
            }
            run.audit(request)?;
        }
    }
    // Too short to fill a page.
    let mut run = Run::new(machine, shape, 8, Arc::new(SPARSE), &limits(1, 5))?;
    let request = run.start(sequence(shape, Style::Random, 5, machine.seed), 2)?;
    for _ in 0..3 {
        run.step(&[request])?;
    }
    Ok(())
}

/// Clusters of prompts and of generated tokens, through several runs that leave the steady zone; everything against its definition.
fn clusters(machine: &Machine) -> Outcome {
    for (number, (group, head_dim, page_tokens, estimated)) in
        [(5, 128, 8, 0.232), (4, 64, 16, 0.0), (16, 64, 8, 1.0), (1, 128, 32, 0.5)].into_iter().enumerate()
    {
        let method =
            RetroInfer { estimated, update: 128, ..RetroInfer::new(Budget::Tokens(4 * page_tokens), STEADY) };
        let seed = machine.seed + 10 * number as u64;
        over_clusters(machine, shape(group, head_dim), page_tokens, Arc::new(method), seed)?;
    }
    Ok(())
}

/// The same where a layer reads everything and a head of the other the steady zone alone, neither of which estimates anything.
fn ruled_clusters(machine: &Machine) -> Outcome {
    for (number, (group, head_dim, page_tokens)) in [(5, 128, 8), (4, 64, 16)].into_iter().enumerate() {
        let method = RetroInfer { update: 128, ..RetroInfer::new(Budget::Tokens(4 * page_tokens), STEADY) };
        let rules = RowRules { dense_layers: 1, steady_heads: vec![HeadRule { layer: None, kv_head: 1 }] };
        let method = PerRow::new(Arc::new(method), rules);
        let seed = machine.seed + 10 * number as u64;
        over_clusters(machine, shape(group, head_dim), page_tokens, Arc::new(method), seed)?;
    }
    Ok(())
}

/// A ragged batch over clusters, through prompts and several runs that leave the steady zone.
fn over_clusters(
    machine: &Machine,
    shape: KvShape,
    page_tokens: usize,
    method: Arc<dyn Method>,
    seed: u64,
) -> Outcome {
    let mut run = Run::new(machine, shape, page_tokens, method, &limits(4, 900))?;
    let requests: Vec<_> =
        [(0, Style::Random), (130, Style::Peaked), (144, Style::Random), (700, Style::Peaked)]
            .into_iter()
            .enumerate()
            .map(|(index, (prompt, style))| {
                run.start(sequence(shape, style, prompt + 180, seed + index as u64), prompt)
            })
            .collect::<Result<_, _>>()?;
    for _ in 0..170 {
        run.step(&requests)?;
    }
    let mut audited = 0;
    for request in requests {
        audited += run.audit(request)?;
        run.release(request);
    }
    ensure(audited > 0, "caches that hold something")?;
    run.ensure_empty()
}

/// Caches that are emptied before each step: every output as ever, and hits are what came from the steady zone in the very step alone.
fn emptied(machine: &Machine) -> Outcome {
    let shape = shape(4, 64);
    for method in methods(8) {
        let selects = method.select().budget().is_some();
        let mut run = Run::new(machine, shape, 8, method, &limits(3, 600))?;
        let requests: Vec<_> = [9, 300, 470]
            .into_iter()
            .map(|prompt| {
                let seed = machine.seed + prompt as u64;
                run.start(sequence(shape, Style::Random, prompt + 60, seed), prompt)
            })
            .collect::<Result<_, _>>()?;
        for step in 0..60 {
            run.empty_caches()?;
            if step % 20 == 7 {
                for request in &requests {
                    let compared = run.audit(*request)?;
                    ensure(compared == 0, format!("{compared} pages in caches that were emptied"))?;
                }
            }
            run.step(&requests)?;
        }
        for request in requests {
            run.audit(request)?;
            run.release(request);
        }
        let counters = run.counters();
        ensure(
            !selects || counters.misses > 0 && counters.hits <= counters.adopted_pages,
            format!("of caches that are always empty: {counters:?}"),
        )?;
        run.ensure_empty()?;
    }
    Ok(())
}

/// Blocks by a learned gate: a method whose Index and Select are its own, against the CPU's.
fn gates(machine: &Machine) -> Outcome {
    for (number, (group, head_dim, page_tokens, block, rank, norms)) in
        [(5, 128, 16, 64, 128, true), (4, 64, 8, 16, 64, false), (1, 64, 32, 32, 16, true)]
            .into_iter()
            .enumerate()
    {
        let shape = shape(group, head_dim);
        let gates = random_gates(shape, rank, norms, machine.seed + number as u64);
        let method =
            SeerAttention::new(gates.clone(), Budget::Tokens(3 * block), STEADY).with_block(block)?;
        let run = Run::new(machine, shape, page_tokens, Arc::new(method), &limits(3, 900))?;
        let mut run = run.with_gates(gates);
        let requests: Vec<_> = [0, 9, 700]
            .into_iter()
            .map(|prompt| {
                let seed = machine.seed + prompt as u64;
                run.start(sequence(shape, Style::Random, prompt + 200, seed), prompt)
            })
            .collect::<Result<_, _>>()?;
        for _ in 0..180 {
            run.step(&requests)?;
        }
        for request in requests {
            run.audit(request)?;
            run.release(request);
        }
        run.ensure_empty()?;
    }
    Ok(())
}

/// Random gates whose weights bf16 has.
fn random_gates(shape: KvShape, rank: usize, norms: bool, seed: u64) -> Arc<Gates> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut weights = |elements: usize, width: f32| -> Vec<f32> {
        (0..elements).map(|_| half::bf16::from_f32(rng.random_range(-width..width)).to_f32()).collect()
    };
    let layers = (0..shape.layers).map(|_| LayerGate {
        query: weights(shape.kv_heads * rank * shape.group() * shape.head_dim, 0.2),
        key: weights(shape.kv_heads * rank * 3 * shape.head_dim, 0.2),
        query_norm: norms.then(|| weights(rank, 2.0)),
        key_norm: norms.then(|| weights(rank, 2.0)),
    });
    let layers = layers.collect();
    let rotary = |head_dim: usize| {
        let frequencies = (0..head_dim / 2).map(|i| 1e6_f32.powf(-2.0 * i as f32 / head_dim as f32));
        Rotary::new(frequencies.collect(), 1.0)
    };
    Arc::new(Gates::new(shape, rank, rotary(shape.head_dim), rotary(rank), layers).expect("valid gates"))
}

/// Keys that are rebuilt: at full rank, whatever the prompt, and in a rank that holds those of the sequence.
fn low_rank(machine: &Machine) -> Outcome {
    let rows = RowRules { dense_layers: 1, steady_heads: vec![HeadRule { layer: Some(1), kv_head: 1 }] };
    let methods: [Arc<dyn Method>; 4] = [
        Arc::new(SPARSE),
        Arc::new(ShadowKv { outliers: 6, budget: Budget::Fraction(0.5), ..SPARSE }),
        Arc::new(PerRow::new(Arc::new(SPARSE), rows)),
        Arc::new(Quest { chunk: 16, ..Quest::new(Budget::Tokens(64), STEADY) }),
    ];
    for (number, (group, head_dim, page_tokens, rank, directions)) in
        [(4, 64, 8, 128, 128), (5, 128, 8, 32, 24), (1, 64, 8, 64, 40)].into_iter().enumerate()
    {
        let shape = shape(group, head_dim);
        let low_rank = LowRank { rank, rotary: rotary(head_dim) };
        for method in &methods {
            let seed = machine.seed + number as u64;
            let method = Arc::new(LowRankKeys::new(method.clone(), low_rank.clone()));
            let mut run = Run::new(machine, shape, page_tokens, method, &limits(4, 900))?;
            // What a short prompt leaves out of its basis, only the full rank has.
            let prompts: &[usize] = if directions == 128 { &[0, 9, 300, 513] } else { &[100, 300, 513, 600] };
            let requests: Vec<_> = prompts
                .iter()
                .enumerate()
                .map(|(index, prompt)| {
                    let own = run::in_directions(shape, directions, prompt + 160, seed + index as u64);
                    run.start(own, *prompt)
                })
                .collect::<Result<_, _>>()?;
            for _ in 0..150 {
                run.step(&requests)?;
            }
            ensure(run.counters().misses > 0, "nothing was rebuilt")?;
            for request in requests {
                run.audit(request)?;
                run.release(request);
            }
            run.ensure_empty()?;
        }
    }
    Ok(())
}

/// Requests are parked and go on while others run in the room that they leave: every output as ever, caches as the tables say.
fn parked(machine: &Machine) -> Outcome {
    let shape = shape(4, 64);
    let rows = RowRules { dense_layers: 1, steady_heads: vec![HeadRule { layer: Some(1), kv_head: 1 }] };
    let ruled: Arc<dyn Method> = Arc::new(PerRow::new(Arc::new(SPARSE), rows));
    for method in [Arc::new(SPARSE) as Arc<dyn Method>, Arc::new(ShadowKv { outliers: 6, ..SPARSE }), ruled] {
        let config = KvConfig::new(shape, PageLayout::new(8, 64, KvDtype::Bf16)?, method.clone())?;
        let plan = RequestPlan::new(&config, 420, 0.0)?;
        // The steady zones of three, and the caches of two and a half.
        let pages = 3 * shape.rows() * config.max_steady_pages() + plan.cache_pages() * 5 / 2;
        let limits = CudaLimits { gpu_pages: Some(pages), buffering: 5.0, ..limits(4, 420) };
        let mut run = Run::new(machine, shape, 8, method, &limits)?;
        let own = |seed| sequence(shape, Style::Random, 420, machine.seed + seed);
        let [first, second] = two(&mut run, own)?;
        for round in 0..4 {
            for _ in 0..6 {
                run.step(&[first, second])?;
            }
            give_way(&mut run, first, second, own(10 + round))?;
        }
        run.step(&[first, second])?;
        ensure(run.audit(second)? > 0, "it fetches what it reads")?;
        run.pipeline.park(first)?;
        run.release(first);
        run.release(second);
        run.ensure_empty()?;
    }
    Ok(())
}

/// Two requests, beside which a third finds no room.
fn two(run: &mut Run<'_>, own: impl Fn(u64) -> Sequence) -> Result<[RequestId; 2], libtest_mimic::Failed> {
    let both = [run.start(own(1), 300)?, run.start(own(2), 200)?];
    let full = run.start(own(3), 250);
    ensure(matches!(full, Err(run::Wrong::Refused(Error::OutOfGpuPages { .. }))), "a third finds no room")?;
    Ok(both)
}

/// The second of two requests is parked while a third runs in the room that it leaves, and goes on when that has ended.
fn give_way(run: &mut Run<'_>, first: RequestId, second: RequestId, third: Sequence) -> Outcome {
    run.pipeline.park(second)?;
    ensure(run.audit(second)? == 0, "a parked request has no pages that others could have")?;
    let third = run.start(third, 250)?;
    for _ in 0..8 {
        run.step(&[third, first])?;
    }
    let short = run.pipeline.resume(second);
    ensure(matches!(short, Err(Error::OutOfGpuPages { .. })), "no room to go on beside two")?;
    run.audit(second)?;
    run.release(third);
    run.pipeline.resume(second)?;
    for request in [first, second] {
        run.audit(request)?;
    }
    Ok(())
}

/// The same of requests that have no cache: all of it goes to the host and comes back, onto other pages.
fn parked_wholes(machine: &Machine) -> Outcome {
    for (number, (group, head_dim, page_tokens)) in [(4, 64, 8), (5, 128, 16)].into_iter().enumerate() {
        let shape = shape(group, head_dim);
        let everything = Quest { chunk: 16, ..Quest::new(Budget::Tokens(4096), STEADY) };
        for method in [Arc::new(Dense { steady: STEADY }) as Arc<dyn Method>, Arc::new(everything)] {
            let layout = PageLayout::new(page_tokens, head_dim, KvDtype::Bf16)?;
            let config = KvConfig::new(shape, layout, method.clone())?;
            let plan = RequestPlan::new(&config, 420, 0.0)?;
            let limits = CudaLimits { gpu_pages: Some(plan.gpu_pages() * 5 / 2), ..limits(4, 420) };
            let mut run = Run::new(machine, shape, page_tokens, method, &limits)?;
            let own = |seed| sequence(shape, Style::Random, 420, machine.seed + 100 * number as u64 + seed);
            let [first, second] = two(&mut run, own)?;
            for round in 0..6 {
                // The newest page is complete when it is parked, or holds any number of tokens.
                for _ in 0..5 + round % 4 {
                    run.step(&[first, second])?;
                }
                give_way(&mut run, first, second, own(10 + round))?;
            }
            run.step(&[first, second])?;
            run.pipeline.park(first)?;
            run.release(first);
            run.release(second);
            // The last page is never complete: the host has no place for it.
            let longest = 16 * page_tokens + page_tokens - 1;
            let last =
                run.start(sequence(shape, Style::Random, longest, machine.seed), longest - page_tokens)?;
            for _ in 0..page_tokens {
                run.pipeline.park(last)?;
                run.pipeline.resume(last)?;
                run.step(&[last])?;
            }
            run.release(last);
            run.ensure_empty()?;
        }
    }
    Ok(())
}

/// Requests come and go at random for 1,000 steps, in the middle of prompts, too, with room for less than what they want.
fn soak(machine: &Machine) -> Outcome {
    let shape = shape(5, 64);
    let mut rng = ChaCha8Rng::seed_from_u64(machine.seed);
    // The steady and mandatory pages of four, and little more.
    let limits = CudaLimits { gpu_pages: Some(160), buffering: 5.0, ..limits(6, 900) };
    let mut run = Run::new(machine, shape, 8, Arc::new(SPARSE), &limits)?;
    let (mut requests, mut refused, mut cancelled, mut audited) = (Vec::new(), 0, 0, 0);
    for step in 0..1000 {
        if rng.random_bool(0.15) && requests.len() < 6 {
            let prompt = rng.random_range(0..500);
            let max_tokens = prompt + rng.random_range(1..300);
            let own = sequence(shape, Style::Random, max_tokens, rng.random());
            if rng.random_bool(0.3) {
                cancelled += usize::from(run.cancel_in_prompt(own, prompt.max(1))?);
            } else {
                // Others go on between the prompt's layers.
                let others: Vec<_> = requests.iter().filter(|_| rng.random_bool(0.4)).copied().collect();
                match run.start_beside(own, prompt, &others) {
                    Ok(request) => requests.push(request),
                    Err(run::Wrong::Refused(Error::OutOfGpuPages { .. } | Error::OutOfHostMemory { .. })) => {
                        refused += 1;
                    }
                    Err(other) => return Err(other.into()),
                }
            }
        }
        let gone = run.finished(&requests);
        requests.retain(|request| {
            !gone.contains(request) && !rng.random_bool(0.01) || {
                run.release(*request);
                false
            }
        });
        let batch: Vec<_> = requests.iter().filter(|_| rng.random_bool(0.8)).copied().collect();
        if !batch.is_empty() {
            run.step(&batch)?;
        }
        if step % 25 == 0
            && let Some(request) = requests.choose(&mut rng)
        {
            audited += run.audit(*request)?;
        }
    }
    requests.into_iter().for_each(|request| run.release(request));
    run.ensure_empty()?;
    let counters = run.counters();
    ensure(
        refused > 0 && cancelled > 0 && audited > 500 && counters.misses > 1000 && counters.shrunk_pages > 0,
        format!(
            "{refused} refused, {cancelled} cancelled, {audited} audited, {counters:?}: not the mix that was meant"
        ),
    )
}

fn refusals(machine: &Machine) -> Outcome {
    let shape = shape(5, 64);
    let limits = CudaLimits { gpu_pages: Some(120), ..limits(3, 400) };
    let mut run = Run::new(machine, shape, 8, Arc::new(SPARSE), &limits)?;
    let first = run.start(sequence(shape, Style::Random, 200, 1), 150)?;
    let refused = |outcome: Result<_, run::Wrong>| match outcome {
        Err(run::Wrong::Refused(error)) => Ok(error),
        other => Err(format!("not refused: {:?}", other.is_ok())),
    };
    let long = refused(run.start(sequence(shape, Style::Random, 401, 2), 10))?;
    ensure(matches!(long, Error::ContextTooLong { max_tokens: 401, limit: 400 }), format!("{long}"))?;
    let mut held = vec![first];
    let full = loop {
        match run.start(sequence(shape, Style::Random, 300, 3), 100) {
            Ok(request) => held.push(request),
            other => break refused(other)?,
        }
    };
    ensure(matches!(full, Error::OutOfGpuPages { .. } | Error::BatchTooLarge { .. }), format!("{full}"))?;
    // Who was there goes on as before.
    for _ in 0..20 {
        run.step(&held)?;
    }
    held.into_iter().for_each(|request| run.release(request));
    run.ensure_empty()
}
