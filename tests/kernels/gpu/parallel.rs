//! Models over two GPUs, where the machine has two and NCCL: sums over ranks, shards of weights, and the same text as on one.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::thread;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinkv::algorithms::{Dense, ShadowKv};
use spinkv::backend::cuda::CudaLimits;
use spinkv::backend::cuda::driver::{Context, Device, DeviceBuffer, Graph, Stream};
use spinkv::backend::cuda::nccl::{Communicator, Nccl, NcclError};
use spinkv::memory::{KvDtype, PageLayout, Word};
use spinkv::pipeline::{Budget, Method, SteadyZone};
use spinkv::{KvConfig, KvShape, Shard};
use spinkv_engine::config::ModelConfig;
use spinkv_engine::cuda::{
    BlasUse, CudaOptions, DeviceWeights, GpuGroup, TensorParallel, WeightSource, parallel,
};
use spinkv_engine::model::DecodeToken;
use spinkv_engine::runner::Runner;
use spinkv_tests::checkpoints::{Bundled, dir, max_difference};

use super::{Machine, Outcome, Test, ensure, test};

/// As for one GPU: how far logits may be from those of f32.
const TOLERANCE: f32 = 0.4;

/// Where the two best logits are further apart than this, both give the same token.
const MARGIN: f32 = 0.5;

type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

pub fn tests() -> Vec<Test> {
    vec![
        test("parallel::random_shards_are_the_whole_models", random_shards),
        test("parallel::sums_over_ranks", sums),
        test("parallel::two_gpus_give_what_one_gives", |_| same_tokens(BlasUse::IfPresent)),
        test("parallel::two_gpus_without_cublaslt", |_| same_tokens(BlasUse::Never)),
        test("parallel::needles_are_found", |_| needles()),
        test("parallel::a_rank_that_stays_away_is_not_waited_for", stays_away),
    ]
}

/// The contexts of two GPUs and NCCL, or `None` where there is only one or no NCCL, which is said.
fn two() -> Fallible<Option<(Vec<Context>, Nccl)>> {
    let devices = Device::all()?;
    if devices.len() < 2 {
        println!("SKIPPED: this machine has 1 GPU, and 2 are needed");
        return Ok(None);
    }
    let nccl = match Nccl::load() {
        Err(missing @ NcclError::Missing { .. }) => {
            println!("SKIPPED: {missing}");
            return Ok(None);
        }
        loaded => loaded?,
    };
    let contexts = devices.into_iter().take(2).map(Context::new).collect::<Result<_, _>>()?;
    Ok(Some((contexts, nccl)))
}

/// One GPU has the shards of both ranks, which are parts of the whole.
fn random_shards(machine: &Machine) -> Outcome {
    let config = ModelConfig::preset("qwen3-14b")?.with_layers(1)?;
    let (stream, kernels) = (&machine.stream, &machine.kernels);
    let whole = DeviceWeights::random(stream, kernels, &config, 3)?;
    let words = |buffer: &DeviceBuffer<Word>| buffer.to_vec(stream);
    let (qkv, output) = (words(&whole.layers[0].qkv)?, words(&whole.layers[0].output)?);
    let (hidden, queries, keys) = (5120 / 8, 5120, 1024);
    for shard in Shard::all(2) {
        let part = DeviceWeights::random_shard(stream, kernels, &config, shard, 3)?;
        let rows = |first: usize, rows: usize| {
            let first = first + shard.rank() * rows / 2;
            &qkv[first * hidden..(first + rows / 2) * hidden]
        };
        let expected = [rows(0, queries), rows(queries, keys), rows(queries + keys, keys)].concat();
        ensure(words(&part.layers[0].qkv)? == expected, format!("{shard:?}: query, key and value heads"))?;
        let half = queries / 8 / 2;
        let columns = |row: &[Word]| row[shard.rank() * half..(shard.rank() + 1) * half].to_vec();
        let expected: Vec<Word> = output.chunks(queries / 8).flat_map(columns).collect();
        ensure(words(&part.layers[0].output)? == expected, format!("{shard:?}: output columns"))?;
        ensure(words(&part.embedding)? == words(&whole.embedding)?, "the embedding is everywhere")?;
    }
    Ok(())
}

/// Sums of random lengths, in a stream and in a captured graph, are the sums, and the same bits on both GPUs.
fn sums(machine: &Machine) -> Outcome {
    let Some((contexts, nccl)) = two()? else { return Ok(()) };
    println!("NCCL {}", nccl.version()?);
    let communicators = nccl.communicators(&contexts)?;
    let mut rng = ChaCha8Rng::seed_from_u64(machine.seed);
    for len in [1, 7, 5120, 4 * 5120, 16 * 5120, 3000 * 5120] {
        let own: Vec<Vec<f32>> =
            (0..2).map(|_| (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()).collect();
        let results = on_both(&communicators, |communicator, stream| {
            let buffer = DeviceBuffer::from_slice(stream, &own[communicator.rank()])?;
            communicator.all_reduce_sum(stream, &buffer, len)?;
            let once = buffer.to_vec(stream)?;
            let mut failed = None;
            let graph = Graph::capture(stream, |stream| {
                failed = communicator.all_reduce_sum(stream, &buffer, len).err();
                Ok(())
            });
            if let Some(failed) = failed {
                return Err(failed);
            }
            let graph = graph?;
            // SAFETY: the buffer is there, and both ranks launch it as often.
            unsafe {
                graph.launch(stream)?;
                graph.launch(stream)?;
            }
            Ok((once, buffer.to_vec(stream)?))
        })?;
        let expected: Vec<f32> = own[0].iter().zip(&own[1]).map(|(a, b)| a + b).collect();
        let four: Vec<f32> = expected.iter().map(|sum| 4.0 * sum).collect();
        for (once, thrice) in results {
            ensure(once == expected, format!("a sum of {len}"))?;
            ensure(thrice == four, format!("a graph's sum of {len}, twice more"))?;
        }
    }
    Ok(())
}

/// Runs `work` for both ranks, each on a thread and a stream of its own.
fn on_both<T: Send>(
    communicators: &[Communicator],
    work: impl Fn(&Communicator, &Stream) -> Result<T, NcclError> + Sync,
) -> Result<Vec<T>, NcclError> {
    thread::scope(|scope| {
        let run = |communicator: &Communicator| work(communicator, &Stream::new(communicator.context())?);
        let ranks: Vec<_> =
            communicators.iter().map(|communicator| scope.spawn(move || run(communicator))).collect();
        ranks.into_iter().map(|rank| rank.join().expect("it does not panic")).collect()
    })
}

/// The bundled model over so many GPUs.
fn bundled(
    gpus: usize,
    method: impl Method + 'static,
    (requests, max_tokens): (usize, usize),
    blas: BlasUse,
) -> Fallible<TensorParallel> {
    let config = ModelConfig::open(dir("needle-tiny"))?;
    let shape = KvShape::new(config.layers, config.query_heads, config.kv_heads, config.head_dim)?;
    let layout = PageLayout::new(8, config.head_dim, KvDtype::Bf16)?;
    let kv = parallel::shards(&KvConfig::new(shape, layout, Arc::new(method))?, gpus)?;
    let group = Arc::new(GpuGroup::open(gpus)?);
    let weights = group.weights(&config, &WeightSource::Checkpoint(dir("needle-tiny")), |_, _| {})?;
    let limits = CudaLimits { requests, max_tokens, buffering: 5.0, gpu_pages: None, host_bytes: None };
    Ok(TensorParallel::new(&group, config, weights, kv, &CudaOptions { limits, blas })?)
}

fn go(_: usize, _: usize) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// The lowest id of the greatest logit, and how far the next one is behind it.
fn best(logits: &[f32]) -> (u32, f32) {
    let greatest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let id = logits.iter().position(|logit| *logit == greatest).unwrap_or(usize::MAX);
    let others = logits.iter().enumerate().filter(|(other, _)| *other != id);
    let next = others.map(|(_, logit)| *logit).fold(f32::NEG_INFINITY, f32::max);
    (id as u32, greatest - next)
}

/// One GPU and two along the same tokens: logits near each other and near those of f32, and the same greedy tokens where one is sure.
fn same_tokens(blas: BlasUse) -> Outcome {
    if two()?.is_none() {
        return Ok(());
    }
    let reference = Bundled::open("needle-tiny");
    let steady = SteadyZone { sinks: 4, window: 32 };
    let (mut apart, mut off, mut decided) = (0.0_f32, 0.0_f32, 0);
    let mut compare =
        |one: &mut TensorParallel, two: &mut TensorParallel, names: &[&str], dense: bool| -> Outcome {
            for name in names {
                let (ids, expected) = (reference.input_ids(name), reference.logits(name));
                let begin = |model: &mut TensorParallel| -> Result<_, spinkv_engine::Error> {
                    let request = model.admit(ids.len() + 16)?;
                    Ok((request, model.prefill(request, &ids, &mut go)?))
                };
                let ((first, mut of_one), (second, mut of_two)) = (begin(one)?, begin(two)?);
                let last = expected.positions.iter().position(|position| *position == ids.len() - 1);
                if let Some(row) = last {
                    let expected = &expected.values[row * of_two.len()..][..of_two.len()];
                    off = off.max(max_difference(&of_two, expected));
                }
                for (step, token) in reference.greedy_ids(name).iter().enumerate().take(15) {
                    apart = apart.max(max_difference(&of_one, &of_two));
                    let ((best_of_one, margin), (best_of_two, _)) = (best(&of_one), best(&of_two));
                    if margin > MARGIN {
                        decided += 1;
                        ensure(
                            best_of_one == best_of_two,
                            format!("{name}, step {step}: {best_of_one} on one GPU, {best_of_two} on two"),
                        )?;
                    }
                    of_one = one.decode(&[DecodeToken { request: first, token: *token }])?;
                    of_two = two.decode(&[DecodeToken { request: second, token: *token }])?;
                }
                one.release(first);
                two.release(second);
            }
            if !dense {
                let counters = two.counters()?;
                println!("shadowkv on two GPUs: {counters:?}");
                ensure(counters.misses > 0 && counters.hits > counters.misses, format!("{counters:?}"))?;
            }
            Ok(())
        };
    let (mut one, mut two) =
        (bundled(1, Dense::default(), (2, 17_000), blas)?, bundled(2, Dense::default(), (2, 17_000), blas)?);
    println!("{}; products by {}", two.group().description(), two.products());
    compare(&mut one, &mut two, &["short_0", "short_1", "short_2", "needle_4k_0", "needle_16k_0"], true)?;
    drop((one, two));
    let sparse = || ShadowKv { budget: Budget::Tokens(512), steady, outliers: 8 };
    let (mut one, mut two) =
        (bundled(1, sparse(), (2, 17_000), blas)?, bundled(2, sparse(), (2, 17_000), blas)?);
    compare(&mut one, &mut two, &["needle_4k_0", "needle_4k_1", "needle_16k_0"], false)?;
    println!(
        "needle-tiny: {decided} greedy tokens equal, logits within {apart:.3} of one GPU's and {off:.3} of f32"
    );
    ensure(decided >= 40, format!("only {decided} steps were decided"))?;
    ensure(off <= TOLERANCE && apart <= TOLERANCE, format!("logits are off by {off} and {apart}"))
}

/// 20 needles of 4K in one batch, more than our own kernels multiply, by ShadowKV on two GPUs: rows of a request live and move on both.
fn needles() -> Outcome {
    if two()?.is_none() {
        return Ok(());
    }
    let reference = Bundled::open("needle-tiny");
    let sparse = ShadowKv { budget: Budget::Tokens(1024), steady: SteadyZone::default(), outliers: 0 };
    let mut model = bundled(2, sparse, (20, 4200), BlasUse::IfPresent)?;
    let names = reference.prompts.iter().map(|prompt| prompt.name.as_str());
    let names: Vec<_> = names.filter(|name| name.contains("needle_4k_")).cycle().take(20).collect();
    let mut parts = Vec::new();
    for name in &names {
        let ids = reference.input_ids(name);
        let request = model.admit(ids.len() + 12)?;
        let (token, _) = best(&model.prefill(request, &ids, &mut go)?);
        parts.push((DecodeToken { request, token }, vec![token]));
    }
    for _ in 1..12 {
        let batch: Vec<_> = parts.iter().map(|(part, _)| *part).collect();
        let logits = model.decode(&batch)?;
        for ((part, ids), logits) in parts.iter_mut().zip(logits.chunks(model.config().vocab_size)) {
            part.token = best(logits).0;
            ids.push(part.token);
        }
    }
    for ((part, ids), name) in parts.iter().zip(&names) {
        model.release(part.request);
        let (mut stream, mut text) = (reference.tokenizer.stream(), String::new());
        for id in ids {
            text.extend(stream.push(*id)?);
        }
        text.extend(stream.finish()?);
        let expected = &reference.prompt(name).answer;
        ensure(text.contains(expected), format!("{name}: {text:?}, not {expected}"))?;
    }
    let empty = model.on_ranks(|_, model| Ok(model.pipeline().backend().is_empty()))?;
    ensure(empty == [true, true], "something is still held")
}

/// A sum that one rank never comes to, in a stream and in a graph: aborting ends the wait of the other.
fn stays_away(_: &Machine) -> Outcome {
    const LEN: usize = 5120;
    let Some((contexts, nccl)) = two()? else { return Ok(()) };
    for in_graph in [false, true] {
        let communicators = nccl.communicators(&contexts)?;
        on_both(&communicators, |communicator, stream| {
            let buffer = DeviceBuffer::from_slice(stream, &[1.0_f32; LEN])?;
            let sum = |stream: &Stream| communicator.all_reduce_sum(stream, &buffer, LEN);
            // The host may wait for the other rank in the first one, and while it captures.
            sum(stream)?;
            stream.synchronize()?;
            let mut captured = Ok(());
            let graph = Graph::capture(stream, |stream| {
                captured = sum(stream);
                Ok(())
            });
            captured?;
            let graph = graph?;
            if communicator.rank() == 1 {
                return Ok(());
            }
            if in_graph {
                // SAFETY: the buffer outlives the wait below.
                unsafe { graph.launch(stream) }?;
            } else {
                sum(stream)?;
            }
            thread::sleep(std::time::Duration::from_millis(50));
            assert!(!stream.is_idle()?, "the sum waits for the other rank");
            drop(graph);
            communicator.abort();
            stream.synchronize()?;
            Ok(())
        })?;
        communicators[1].abort();
    }
    Ok(())
}
