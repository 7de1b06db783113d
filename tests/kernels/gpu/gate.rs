//! Learned gates against their CPU reference: gate keys of prompts and of decode steps, gate queries.

use std::error::Error;

use spinkv::backend::cuda::driver::{DeviceBuffer, Stream};
use spinkv::backend::cuda::kernels::{GateKeys, GateKeysStep, GateQueries, GateWeights};
use spinkv::backend::cuda::operators::{PromptIndex, StepIndex, SummaryRows};
use spinkv::gates::GATE_EPS;
use spinkv::memory::Word;
use spinkv_kernel_tests::gate::{GateCase, GateKeyCase, GateQueryCase};

use super::{Machine, Outcome, Test, test};

pub fn tests() -> Vec<Test> {
    vec![
        test("gate_key::random_shapes", |machine| {
            machine.on_seeds(|seed| keys(machine, &GateKeyCase::random(seed)))
        }),
        test("gate_key::long_prompts", |machine| keys(machine, &GateKeyCase::large(machine.seed))),
        test("gate_query::random_shapes", |machine| {
            machine.on_seeds(|seed| queries(machine, &GateQueryCase::random(seed)))
        }),
    ]
}

/// A projection on the GPU.
struct Projection {
    weights: DeviceBuffer<Word>,
    norm: Option<DeviceBuffer<f32>>,
    frequencies: DeviceBuffer<f32>,
    gate_frequencies: DeviceBuffer<f32>,
}

impl Projection {
    fn new(stream: &Stream, case: &GateCase, of_keys: bool) -> Result<Self, Box<dyn Error>> {
        let (weights, norm) = case.projection(of_keys);
        let frequencies = |rotary: &spinkv::Rotary| DeviceBuffer::from_slice(stream, rotary.frequencies());
        Ok(Self {
            weights: DeviceBuffer::from_slice(stream, &weights)?,
            norm: norm.map(|norm| DeviceBuffer::from_slice(stream, &norm)).transpose()?,
            frequencies: frequencies(case.gates.model_rotary())?,
            gate_frequencies: frequencies(case.gates.gate_rotary())?,
        })
    }

    fn weights<'a>(&'a self, case: &GateCase) -> GateWeights<'a> {
        GateWeights {
            weights: &self.weights,
            rank: case.gates.rank() as u32,
            norm: self.norm.as_ref(),
            eps: GATE_EPS,
            frequencies: &self.frequencies,
            magnitude: case.gates.model_rotary().magnitude(),
            gate_frequencies: &self.gate_frequencies,
            gate_magnitude: case.gates.gate_rotary().magnitude(),
        }
    }
}

fn keys(machine: &Machine, case: &GateKeyCase) -> Outcome {
    let Machine { stream, kernels, .. } = machine;
    let projection = Projection::new(stream, &case.gate, true)?;
    let entries = DeviceBuffer::from_slice(stream, &case.entries)?;
    let directories = DeviceBuffer::from_slice(stream, &case.directories)?;
    let (first_row, request_rows) = case.rows();
    let gate = projection.weights(&case.gate);
    let rows = |summaries| SummaryRows {
        entries: &entries,
        directories: &directories,
        first_row: first_row as u32,
        request_rows: request_rows as u32,
        kv_heads: case.gate.gates.shape().kv_heads as u32,
        head_words: case.gate.head_words() as u32,
        partition_tokens: case.chunk_tokens as u32,
        segment_partitions: case.segment_partitions as u32,
        summary_words: case.gate.rank_words() as u32,
        summaries,
    };
    let [of_prompts, of_step] = [(); 2].map(|()| DeviceBuffer::<Word>::from_slice(stream, &case.summaries()));
    let (of_prompts, of_step) = (of_prompts?, of_step?);
    // A batch may be so short that it has no key at all.
    let keys = if case.keys.is_empty() { &[0][..] } else { &case.keys };
    let prompts = PromptIndex {
        rows: rows(&of_prompts),
        keys: &DeviceBuffer::from_slice(stream, keys)?,
        first_token: &DeviceBuffer::from_slice(stream, &case.first_token)?,
        first_partition: &DeviceBuffer::from_slice(stream, &case.first_chunk)?,
        partitions: case.chunks() as u32,
    };
    let steady = if case.steady.is_empty() { &[0][..] } else { &case.steady };
    let step = StepIndex {
        rows: rows(&of_step),
        steady: &DeviceBuffer::from_slice(stream, steady)?,
        pool: &DeviceBuffer::from_slice(stream, &case.pool)?,
        page_tokens: case.page_tokens as u32,
    };
    // SAFETY: the case's tables name keys, pages and segments that exist, each place once; nothing else uses the buffers.
    unsafe {
        GateKeys { gate, stage: prompts }.launch(kernels, stream)?;
        GateKeysStep { gate, stage: step }.launch(kernels, stream)?;
    }
    let found = of_prompts.to_vec(stream)?;
    case.check(&found)?;
    if of_step.to_vec(stream)? == found {
        Ok(())
    } else {
        Err("a step gives other bits than the prompt".into())
    }
}

fn queries(machine: &Machine, case: &GateQueryCase) -> Outcome {
    let Machine { stream, kernels, .. } = machine;
    let projection = Projection::new(stream, &case.gate, false)?;
    let gate_queries = DeviceBuffer::<Word>::from_slice(stream, &case.gate_queries())?;
    let shape = case.gate.gates.shape();
    let launch = GateQueries {
        gate: projection.weights(&case.gate),
        entries: &DeviceBuffer::from_slice(stream, &case.entries)?,
        queries: &DeviceBuffer::from_slice(stream, &case.queries)?,
        layer: case.gate.layer as u32,
        request_rows: shape.rows() as u32,
        kv_heads: shape.kv_heads as u32,
        group: shape.group() as u32,
        head_words: case.gate.head_words() as u32,
        gate_queries: &gate_queries,
    };
    // SAFETY: nothing else uses the buffers.
    unsafe { launch.launch(kernels, stream)? };
    Ok(case.check(&gate_queries.to_vec(stream)?)?)
}
