//! A model's elementwise kernels, at the sizes of Qwen3-14B: a decode step's few tokens, and a prompt's chunk.

use std::error::Error;

use half::bf16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinkv::backend::cuda::driver::{DeviceBuffer, Result as DriverResult, Stream};
use spinkv::backend::cuda::kernels::{Argmax, Embed, HeadNorms, Positions, RmsNorm, Rotate, Sample, Swiglu};
use spinkv::memory::Word;
use spinkv_kernels::abi::model::sample::{DRAW_BITS, SampleParams};
use spinkv_kernels::abi::{WORD_BYTES, WORD_ELEMENTS};

use crate::measure::Bench;

/// Qwen3-14B.
const HIDDEN: usize = 5120;
const QUERY_HEADS: usize = 40;
const KV_HEADS: usize = 8;
const HEAD_DIM: usize = 128;
const MLP: usize = 17_408;
const VOCAB: usize = 151_936;
const EPS: f32 = 1e-6;

/// Tokens of a launch: decode steps of one request and of several, and a prompt.
const TOKENS: [usize; 3] = [1, 16, 8192];
/// Rows of logits.
const BATCHES: [usize; 3] = [1, 16, 64];
/// Bytes that lie at least between two uses of a set: more than twice the L2. Smaller launches find it overwritten.
const APART: usize = 128 << 20;
/// Numbers that inputs repeat.
const BLOCK: usize = 1 << 20;

type Outcome = Result<(), Box<dyn Error>>;

pub fn run(bench: &mut Bench) -> Outcome {
    bench.group("model: Qwen3-14B; ceiling: device to device, read + written");
    let (stream, words) = (bench.stream.clone(), (512 << 20) / WORD_BYTES);
    let (from, to) =
        (DeviceBuffer::<Word>::zeroed(&stream, words)?, DeviceBuffer::<Word>::zeroed(&stream, words)?);
    let bytes = 2 * from.bytes();
    let ceiling = bench.row("copy", "512 MiB", bytes, None, |_| to.copy_from(&stream, 0, &from, 0, words))?;
    drop((from, to));

    let inputs = Inputs::new();
    let embedding = inputs.words(&stream, VOCAB * HIDDEN)?;
    for tokens in TOKENS {
        embed(bench, &inputs, &embedding, tokens, ceiling)?;
    }
    drop(embedding);
    for tokens in TOKENS {
        rms_norm(bench, &inputs, tokens, ceiling)?;
        rotate(bench, &inputs, tokens, ceiling)?;
        swiglu(bench, &inputs, tokens, ceiling)?;
    }
    for batch in BATCHES {
        argmax(bench, &inputs, batch, ceiling)?;
        sample(bench, batch)?;
    }
    Ok(())
}

/// Random numbers, which inputs repeat.
struct Inputs {
    halves: Vec<bf16>,
    floats: Vec<f32>,
}

impl Inputs {
    fn new() -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(14);
        let floats: Vec<f32> = (0..BLOCK).map(|_| rng.random_range(-2.0..2.0)).collect();
        Self { halves: floats.iter().map(|number| bf16::from_f32(*number)).collect(), floats }
    }

    /// `count` bf16.
    fn words(&self, stream: &Stream, count: usize) -> DriverResult<DeviceBuffer<Word>> {
        let words: Vec<Word> = bytemuck::pod_collect_to_vec(&self.halves);
        let words: Vec<Word> = words.into_iter().cycle().take(count / WORD_ELEMENTS).collect();
        DeviceBuffer::from_slice(stream, &words)
    }

    /// `count` f32.
    fn floats(&self, stream: &Stream, count: usize) -> DriverResult<DeviceBuffer<f32>> {
        let floats: Vec<f32> = self.floats.iter().copied().cycle().take(count).collect();
        DeviceBuffer::from_slice(stream, &floats)
    }

    fn half(&self, at: usize) -> f64 {
        self.halves[at % BLOCK].to_f64()
    }

    fn float(&self, at: usize) -> f64 {
        self.floats[at % BLOCK].into()
    }
}

/// Sets of inputs to rotate among.
fn sets(bytes: usize) -> usize {
    (APART.div_ceil(bytes) + 1).min(8)
}

/// Some of each kind of input or output.
fn several<T>(count: usize, make: impl Fn() -> DriverResult<T>) -> DriverResult<Vec<T>> {
    (0..count).map(|_| make()).collect()
}

/// Refuses to time what is wrong: the bf16 at some places of `found`, each rounded once from what is expected.
fn check(
    what: &str,
    stream: &Stream,
    found: &DeviceBuffer<Word>,
    places: impl Iterator<Item = usize>,
    expected: impl Fn(usize) -> f64,
) -> Outcome {
    let found = found.to_vec(stream)?;
    let found: &[bf16] = bytemuck::cast_slice(&found);
    for at in places {
        let (found, expected) = (found[at].to_f64(), expected(at));
        if (found - expected).abs() > expected.abs() / 250.0 + 1e-5 {
            return Err(format!("{what}, element {at}: {found} where {expected} was expected").into());
        }
    }
    Ok(())
}

/// Elements of the first row and of the last.
fn ends(rows: usize, width: usize) -> impl Iterator<Item = usize> {
    (0..width).chain((rows - 1) * width..rows * width)
}

fn embed(
    bench: &mut Bench,
    inputs: &Inputs,
    embedding: &DeviceBuffer<Word>,
    tokens: usize,
    ceiling: f64,
) -> Outcome {
    let (kernels, stream) = (bench.kernels.clone(), bench.stream.clone());
    let bytes = tokens * HIDDEN * (2 + 4);
    let mut rng = ChaCha8Rng::seed_from_u64(tokens as u64);
    let mut lists = Vec::new();
    for _ in 0..sets(bytes) {
        let ids: Vec<u32> = (0..tokens).map(|_| rng.random_range(0..VOCAB as u32)).collect();
        lists.push((DeviceBuffer::from_slice(&stream, &ids)?, ids));
    }
    let residuals = several(lists.len(), || DeviceBuffer::<f32>::zeroed(&stream, tokens * HIDDEN))?;
    let launch = |set: usize| {
        let launch = Embed {
            ids: &lists[set].0,
            tokens: tokens as u32,
            embedding,
            hidden: HIDDEN as u32,
            residual: &residuals[set],
        };
        // SAFETY: nothing else uses the buffers.
        unsafe { launch.launch(&kernels, &stream) }
    };
    launch(0)?;
    for (at, found) in residuals[0].to_vec(&stream)?.into_iter().enumerate() {
        let expected = inputs.half(lists[0].1[at / HIDDEN] as usize * HIDDEN + at % HIDDEN);
        if f64::from(found) != expected {
            return Err(format!("embed, element {at}: {found} where {expected} was expected").into());
        }
    }
    let (shape, sets) = (format!("{tokens} tokens"), lists.len());
    bench.graph_row("embed", shape, bytes as u64, Some(ceiling), sets, |_| Ok(()), |_, set| launch(set))?;
    Ok(())
}

fn rms_norm(bench: &mut Bench, inputs: &Inputs, tokens: usize, ceiling: f64) -> Outcome {
    let (kernels, stream) = (bench.kernels.clone(), bench.stream.clone());
    let bytes = tokens * HIDDEN * (4 + 2) + 4 * HIDDEN;
    let sets = sets(bytes);
    let residuals = several(sets, || inputs.floats(&stream, tokens * HIDDEN))?;
    let weights = several(sets, || inputs.floats(&stream, HIDDEN))?;
    let normed = several(sets, || DeviceBuffer::zeroed(&stream, tokens * HIDDEN / WORD_ELEMENTS))?;
    let launch = |set: usize| {
        let launch = RmsNorm {
            residual: &residuals[set],
            weight: &weights[set],
            first_token: 0,
            tokens: tokens as u32,
            eps: EPS,
            normed: &normed[set],
        };
        // SAFETY: nothing else uses the buffers.
        unsafe { launch.launch(&kernels, &stream) }
    };
    launch(0)?;
    let factor = |row: usize| {
        let squares = (row * HIDDEN..(row + 1) * HIDDEN).map(|at| inputs.float(at).powi(2)).sum::<f64>();
        1.0 / (squares / HIDDEN as f64 + f64::from(EPS)).sqrt()
    };
    let factors = [factor(0), factor(tokens - 1)];
    check("rms_norm", &stream, &normed[0], ends(tokens, HIDDEN), |at| {
        inputs.float(at) * factors[usize::from(at >= HIDDEN)] * inputs.float(at % HIDDEN)
    })?;
    let shape = format!("{tokens} tokens");
    bench.graph_row(
        "rms_norm",
        shape,
        bytes as u64,
        Some(ceiling),
        sets,
        |_| Ok(()),
        |_, set| launch(set),
    )?;
    Ok(())
}

fn rotate(bench: &mut Bench, inputs: &Inputs, tokens: usize, ceiling: f64) -> Outcome {
    const HEADS: usize = QUERY_HEADS + 2 * KV_HEADS;
    const FIRST_POSITION: usize = 100_000;
    let (kernels, stream) = (bench.kernels.clone(), bench.stream.clone());
    let bytes = 2 * tokens * HEADS * HEAD_DIM * 2;
    let sets = sets(bytes);
    let rows = |heads: usize| DeviceBuffer::zeroed(&stream, tokens * heads * HEAD_DIM / WORD_ELEMENTS);
    let projected = several(sets, || inputs.words(&stream, tokens * HEADS * HEAD_DIM))?;
    let outputs = several(sets, || Ok((rows(QUERY_HEADS)?, rows(KV_HEADS)?, rows(KV_HEADS)?)))?;
    let frequency = |at: usize| 1e6_f64.powf(-2.0 * at as f64 / HEAD_DIM as f64) as f32;
    let frequencies: Vec<f32> = (0..HEAD_DIM / 2).map(frequency).collect();
    let on_device = DeviceBuffer::from_slice(&stream, &frequencies)?;
    let weight = inputs.floats(&stream, HEAD_DIM)?;
    let launch = |set: usize| {
        let (queries, keys, values) = &outputs[set];
        let launch = Rotate {
            projected: &projected[set],
            tokens: tokens as u32,
            query_heads: QUERY_HEADS as u32,
            kv_heads: KV_HEADS as u32,
            head_words: (HEAD_DIM / WORD_ELEMENTS) as u32,
            positions: Positions::From(FIRST_POSITION as u32),
            frequencies: &on_device,
            factor: 1.0,
            norms: Some(HeadNorms { queries: &weight, keys: &weight, eps: EPS }),
            queries,
            first_token: 0,
            keys,
            values,
        };
        // SAFETY: nothing else uses the buffers.
        unsafe { launch.launch(&kernels, &stream) }
    };
    launch(0)?;
    let turned = |token: usize, head: usize, element: usize| {
        let first = (token * HEADS + head) * HEAD_DIM;
        let squares = (first..first + HEAD_DIM).map(|at| inputs.half(at).powi(2)).sum::<f64>();
        let root = (squares / HEAD_DIM as f64 + f64::from(EPS)).sqrt();
        let normed = |at: usize| inputs.half(first + at) / root * inputs.float(at);
        let angle = (FIRST_POSITION + token) as f32 * frequencies[element % (HEAD_DIM / 2)];
        let (sine, cosine) = f64::from(angle).sin_cos();
        let sine = if element < HEAD_DIM / 2 { -sine } else { sine };
        normed(element) * cosine + normed((element + HEAD_DIM / 2) % HEAD_DIM) * sine
    };
    let (query_width, kv_width) = (QUERY_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
    let (queries, keys, values) = &outputs[0];
    check("rotate queries", &stream, queries, ends(tokens, query_width), |at| {
        turned(at / query_width, at % query_width / HEAD_DIM, at % HEAD_DIM)
    })?;
    check("rotate keys", &stream, keys, ends(tokens, kv_width), |at| {
        turned(at / kv_width, QUERY_HEADS + at % kv_width / HEAD_DIM, at % HEAD_DIM)
    })?;
    check("rotate values", &stream, values, ends(tokens, kv_width), |at| {
        inputs.half((at / kv_width * HEADS + QUERY_HEADS + KV_HEADS) * HEAD_DIM + at % kv_width)
    })?;
    let shape = format!("{tokens} tokens, norms");
    bench.graph_row("rotate", shape, bytes as u64, Some(ceiling), sets, |_| Ok(()), |_, set| launch(set))?;
    Ok(())
}

fn swiglu(bench: &mut Bench, inputs: &Inputs, tokens: usize, ceiling: f64) -> Outcome {
    let (kernels, stream) = (bench.kernels.clone(), bench.stream.clone());
    let bytes = tokens * MLP * 3 * 2;
    let sets = sets(bytes);
    let gate_up = several(sets, || inputs.words(&stream, tokens * 2 * MLP))?;
    let activated = several(sets, || DeviceBuffer::zeroed(&stream, tokens * MLP / WORD_ELEMENTS))?;
    let launch = |set: usize| {
        let launch = Swiglu {
            gate_up: &gate_up[set],
            tokens: tokens as u32,
            width: MLP as u32,
            activated: &activated[set],
        };
        // SAFETY: nothing else uses the buffers.
        unsafe { launch.launch(&kernels, &stream) }
    };
    launch(0)?;
    check("swiglu", &stream, &activated[0], ends(tokens, MLP), |at| {
        let gate = at / MLP * 2 * MLP + at % MLP;
        let (gate, up) = (inputs.half(gate), inputs.half(gate + MLP));
        gate / (1.0 + (-gate).exp()) * up
    })?;
    let shape = format!("{tokens} tokens");
    bench.graph_row("swiglu", shape, bytes as u64, Some(ceiling), sets, |_| Ok(()), |_, set| launch(set))?;
    Ok(())
}

fn argmax(bench: &mut Bench, inputs: &Inputs, batch: usize, ceiling: f64) -> Outcome {
    let (kernels, stream) = (bench.kernels.clone(), bench.stream.clone());
    let bytes = batch * VOCAB * 4;
    let sets = sets(bytes);
    let logits = several(sets, || inputs.floats(&stream, batch * VOCAB))?;
    let greatest = DeviceBuffer::<u64>::zeroed(&stream, batch)?;
    let arrivals = DeviceBuffer::<u32>::zeroed(&stream, batch)?;
    let ids = DeviceBuffer::<u32>::zeroed(&stream, batch)?;
    let launch = |set: usize| {
        let launch = Argmax {
            logits: &logits[set],
            batch: batch as u32,
            vocab: VOCAB as u32,
            stride: VOCAB as u32,
            greatest: &greatest,
            arrivals: &arrivals,
            ids: &ids,
        };
        // SAFETY: the scratch is 0 at first and after each launch; nothing else uses the buffers.
        unsafe { launch.launch(&kernels, &stream) }
    };
    launch(0)?;
    for (row, found) in ids.to_vec(&stream)?.into_iter().enumerate() {
        let logit = |id: usize| inputs.float(row * VOCAB + id);
        let expected = (1..VOCAB).fold(0, |best, id| if logit(id) > logit(best) { id } else { best });
        if found as usize != expected {
            return Err(format!("argmax, row {row}: id {found} where {expected} was expected").into());
        }
    }
    let shape = format!("{batch} x {VOCAB}");
    bench.graph_row("argmax", shape, bytes as u64, Some(ceiling), sets, |_| Ok(()), |_, set| launch(set))?;
    Ok(())
}

/// Rows are timed with the settings that Qwen3 recommends, with none but the temperature, and with top-p alone.
fn sample(bench: &mut Bench, batch: usize) -> Outcome {
    let (kernels, stream) = (bench.kernels.clone(), bench.stream.clone());
    let bytes = batch * VOCAB * 4;
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    // As logits are: near to normal, a few tokens far ahead of the rest.
    let mut row: Vec<f32> =
        (0..VOCAB).map(|_| 1.5 * (0..4).map(|_| rng.random_range(-2.0..2.0_f32)).sum::<f32>()).collect();
    (0..40).for_each(|at| row[at * 3777] = 12.0 + 0.1 * at as f32);
    let host: Vec<f32> = row.iter().copied().cycle().take(batch * VOCAB).collect();
    let logits = several(sets(bytes), || DeviceBuffer::from_slice(&stream, &host))?;
    let ids = DeviceBuffer::<u32>::zeroed(&stream, batch)?;
    let plain = SampleParams { temperature: 0.6, top_k: 0, top_p: 1.0, min_p: 0.0, draw: 0, unused: 0 };
    for (name, settings) in [
        ("temperature", plain),
        ("top-p", SampleParams { top_p: 0.95, ..plain }),
        ("top-k, top-p", SampleParams { top_k: 20, top_p: 0.95, ..plain }),
    ] {
        let rows: Vec<SampleParams> = (0..batch)
            .map(|_| SampleParams { draw: rng.random::<u64>() >> (64 - DRAW_BITS), ..settings })
            .collect();
        let params = DeviceBuffer::from_slice(&stream, &rows)?;
        let launch = |set: usize| {
            let launch = Sample {
                logits: &logits[set],
                batch: batch as u32,
                vocab: VOCAB as u32,
                stride: VOCAB as u32,
                params: &params,
                ids: &ids,
            };
            // SAFETY: nothing else uses the buffers.
            unsafe { launch.launch(&kernels, &stream) }
        };
        launch(0)?;
        // The GPU's tests hold ids against the reference; here, that a cut leaves the likely ones.
        let cut = settings.top_p < 1.0;
        let found = ids.to_vec(&stream)?;
        if let Some(id) = found.iter().find(|id| **id as usize >= VOCAB || cut && row[**id as usize] < 9.0) {
            return Err(format!("sample, {name}: id {id} was cut off").into());
        }
        let shape = format!("{batch} x {VOCAB}, {name}");
        let launch = |_: &Stream, set: usize| launch(set);
        bench.graph_row("sample", shape, bytes as u64, None, logits.len(), |_| Ok(()), launch)?;
    }
    Ok(())
}
