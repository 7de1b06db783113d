//! A prompt and some steps, on either backend.

use half::bf16;
use spinkv::backend::cpu::CpuBackend;
use spinkv::backend::cuda::driver::{Context, DeviceBuffer, Graph};
use spinkv::backend::cuda::{CudaBackend, CudaLimits, StepTensors};
use spinkv::memory::{KvDtype, MemoryLimits, PageLayout, Word};
use spinkv::pipeline::{Pipeline, RequestId};
use spinkv::{Error, KvConfig, Result};

use crate::data::Sequence;
use crate::method::Farthest;

/// Tokens of the prompt; the rest is generated.
pub const PROMPT: usize = 700;

/// What the steps gave.
pub struct Outputs {
    /// By step and layer, `[query_heads, head_dim]`.
    pub attention: Vec<Vec<Vec<f32>>>,
    /// By step and row, the chunks that were read.
    pub selected: Vec<Vec<Vec<u32>>>,
}

fn config(sequence: &Sequence, method: Farthest) -> Result<KvConfig> {
    let layout = PageLayout::new(16, sequence.shape.head_dim, KvDtype::Bf16)?;
    KvConfig::new(sequence.shape, layout, std::sync::Arc::new(method))
}

/// On the CPU backend.
pub fn on_cpu(sequence: &Sequence, method: Farthest, tokens: usize) -> Result<Outputs> {
    let backend = CpuBackend::new(config(sequence, method)?, MemoryLimits::default());
    let mut pipeline = Pipeline::new(backend);
    let request = pipeline.admit(tokens)?;
    let part = |tensor: &[Vec<f32>], layer, tokens| sequence.part(tensor, layer, tokens);
    for layer in 0..sequence.shape.layers {
        let (keys, values) =
            (part(&sequence.keys, layer, 0..PROMPT), part(&sequence.values, layer, 0..PROMPT));
        let queries = part(&sequence.queries, layer, 0..PROMPT);
        let mut out = vec![0.0; queries.len()];
        pipeline.prefill(request, layer, PROMPT, &keys, &values)?.attend(PROMPT, &queries, &mut out)?;
    }
    let mut outputs = Outputs { attention: Vec::new(), selected: Vec::new() };
    for token in PROMPT..tokens {
        let (mut attention, mut selected) = (Vec::new(), Vec::new());
        for layer in 0..sequence.shape.layers {
            let [queries, keys, values] = [&sequence.queries, &sequence.keys, &sequence.values]
                .map(|tensor| part(tensor, layer, token..token + 1));
            let mut out = vec![f32::NAN; queries.len()];
            pipeline.decode(layer, &[request], &queries, &keys, &values, &mut out)?;
            attention.push(out);
            selected.extend((0..sequence.shape.kv_heads).map(|kv_head| {
                pipeline.backend().selected(request, layer, kv_head).expect("an admitted request").to_vec()
            }));
        }
        outputs.attention.push(attention);
        outputs.selected.push(selected);
    }
    Ok(outputs)
}

/// On a GPU: each step is one replay of a graph of all layers, with the method's own kernel inside.
pub fn on_gpu(context: &Context, sequence: &Sequence, method: Farthest, tokens: usize) -> Result<Outputs> {
    let limits =
        CudaLimits { requests: 1, max_tokens: tokens, buffering: 5.0, gpu_pages: None, host_bytes: None };
    let mut pipeline = Pipeline::new(CudaBackend::new(context, config(sequence, method)?, &limits)?);
    let (stream, shape) = (pipeline.backend().stream().clone(), sequence.shape);
    let request = pipeline.admit(tokens)?;
    let upload = |tensor: &[Vec<f32>], layer, tokens| -> Result<DeviceBuffer<Word>> {
        Ok(DeviceBuffer::from_slice(&stream, &words(&sequence.part(tensor, layer, tokens)))?)
    };
    for layer in 0..shape.layers {
        let keys = upload(&sequence.keys, layer, 0..PROMPT)?;
        let values = upload(&sequence.values, layer, 0..PROMPT)?;
        let queries = upload(&sequence.queries, layer, 0..PROMPT)?;
        let mut out = DeviceBuffer::zeroed(&stream, queries.len())?;
        pipeline.prefill(request, layer, PROMPT, &keys, &values)?.attend(PROMPT, &queries, &mut out)?;
        // The buffers of this loop are dropped, which waits for all work.
    }

    let buffers = |heads: usize| -> Result<Vec<DeviceBuffer<Word>>> {
        (0..shape.layers).map(|_| Ok(DeviceBuffer::zeroed(&stream, heads * shape.head_dim / 8)?)).collect()
    };
    let (queries, out) = (buffers(shape.query_heads)?, buffers(shape.query_heads)?);
    let (keys, values) = (buffers(shape.kv_heads)?, buffers(shape.kv_heads)?);
    let backend = pipeline.backend();
    let resident = backend.is_resident([request]);
    let mut failed = Ok(());
    let graph = Graph::capture(&stream, |_| {
        failed = (0..shape.layers).try_for_each(|layer| {
            let tensors = StepTensors {
                queries: &queries[layer],
                keys: &keys[layer],
                values: &values[layer],
                out: &out[layer],
            };
            // SAFETY: a step begins before each replay; the tensors are used on this stream alone.
            unsafe { backend.launch_layer(layer, 1, resident, &tensors) }
        });
        Ok(())
    })?;
    failed?;

    let mut outputs = Outputs { attention: Vec::new(), selected: Vec::new() };
    for token in PROMPT..tokens {
        for layer in 0..shape.layers {
            for (buffer, tensor) in
                [(&queries, &sequence.queries), (&keys, &sequence.keys), (&values, &sequence.values)]
            {
                buffer[layer].write(&stream, 0, &words(&sequence.part(tensor, layer, token..token + 1)))?;
            }
        }
        step(&mut pipeline, request, &graph)?;
        let read = |buffer: &DeviceBuffer<Word>| -> Result<Vec<f32>> {
            let elements = buffer.to_vec(&stream)?;
            Ok(bytemuck::cast_slice::<Word, u16>(&elements)
                .iter()
                .map(|bits| bf16::from_bits(*bits).to_f32())
                .collect())
        };
        outputs.attention.push(out.iter().map(read).collect::<Result<_>>()?);
        // Of the last layer alone: layers share the list.
        outputs.selected.push(
            (0..shape.kv_heads).map(|head| pipeline.backend().selected(0, head)).collect::<Result<_>>()?,
        );
    }
    Ok(outputs)
}

fn step(pipeline: &mut Pipeline<CudaBackend>, request: RequestId, graph: &Graph) -> Result<()> {
    pipeline.decode_at_once(
        &[request],
        |backend, step| backend.begin_step(step, 1),
        |backend| {
            // SAFETY: buffers and kernels are those that were captured; the step has begun.
            unsafe { graph.launch(backend.stream()) }.map_err(Error::from)
        },
    )
}

/// bf16, eight elements a word.
fn words(elements: &[f32]) -> Vec<Word> {
    let bits: Vec<u16> = elements.iter().map(|element| bf16::from_f32(*element).to_bits()).collect();
    bytemuck::pod_collect_to_vec(&bits)
}
