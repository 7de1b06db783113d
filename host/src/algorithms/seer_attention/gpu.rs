//! The method on NVIDIA GPUs: its gate's two projections as kernels, then the tree's own `score` and `select`.

use half::bf16;

use super::SeerAttention;
use crate::backend::cuda::driver::{DeviceBuffer, Result as DriverResult, Stream};
use crate::backend::cuda::kernels::{
    GateKeys, GateKeysStep, GateQueries, GateWeights, Kernels, Score, SelectPartitions,
};
use crate::backend::cuda::operators::{GpuIndex, GpuSelect, PromptIndex, SelectStage, StepIndex};
pub(super) use crate::backend::cuda::operators::{LoadIndex, LoadSelect, OperatorSizes};
use crate::gates::{GATE_EPS, Gates, LayerGate};
use crate::memory::Word;
use crate::pipeline::GroupMerge;
use crate::{Error, Result};

pub(super) fn index<'a>(method: &'a SeerAttention, sizes: &OperatorSizes) -> Result<Option<LoadIndex<'a>>> {
    check(sizes)?;
    Ok(Some(Box::new(|stream: &Stream| {
        let part = |layer: &'a LayerGate| (&*layer.key, layer.key_norm.as_deref());
        Ok(Box::new(Index(Projection::load(&method.gates, part, stream)?)))
    })))
}

pub(super) fn select<'a>(method: &'a SeerAttention, sizes: &OperatorSizes) -> Result<Option<LoadSelect<'a>>> {
    check(sizes)?;
    Ok(Some(Box::new(|stream: &Stream| {
        let part = |layer: &'a LayerGate| (&*layer.query, layer.query_norm.as_deref());
        let projection = Projection::load(&method.gates, part, stream)?;
        let shape = method.gates.shape();
        let (group, head_words) = (shape.group() as u32, (shape.head_dim / 8) as u32);
        Ok(Box::new(Select { projection, group, head_words, least: method.threshold }))
    })))
}

/// Refuses what the kernels do not turn: angles stay below 2^20, and frequencies are at most 1 or so.
fn check(sizes: &OperatorSizes) -> Result<()> {
    if sizes.max_tokens <= 1 << 20 {
        return Ok(());
    }
    let what = format!("gates of contexts of {} tokens: at most {}", sizes.max_tokens, 1 << 20);
    Err(Error::UnsupportedOnGpu { what })
}

/// One projection of all layers and KV heads.
#[derive(Debug)]
struct Projection {
    weights: DeviceBuffer<Word>,
    norm: Option<DeviceBuffer<f32>>,
    rank: u32,
    frequencies: DeviceBuffer<f32>,
    magnitude: f32,
    gate_frequencies: DeviceBuffer<f32>,
    gate_magnitude: f32,
}

impl Projection {
    /// Uploads the weights that `part` takes of a layer, `[kv_heads, rank, inputs]`, and its norm.
    fn load<'a>(
        gates: &'a Gates,
        part: impl Fn(&'a LayerGate) -> (&'a [f32], Option<&'a [f32]>),
        stream: &Stream,
    ) -> DriverResult<Self> {
        let (rank, kv_heads) = (gates.rank(), gates.shape().kv_heads);
        let mut weights = Vec::new();
        let mut norms = Vec::new();
        for layer in gates.layers() {
            let (of_layer, norm) = part(layer);
            let of_head = of_layer.len() / kv_heads;
            of_layer.chunks_exact(of_head).for_each(|head| weights.extend(words(head, rank)));
            norms.extend(norm.into_iter().flatten());
        }
        let (model, gate) = (gates.model_rotary(), gates.gate_rotary());
        Ok(Self {
            weights: DeviceBuffer::from_slice(stream, &weights)?,
            norm: (!norms.is_empty()).then(|| DeviceBuffer::from_slice(stream, &norms)).transpose()?,
            rank: rank as u32,
            frequencies: DeviceBuffer::from_slice(stream, model.frequencies())?,
            magnitude: model.magnitude(),
            gate_frequencies: DeviceBuffer::from_slice(stream, gate.frequencies())?,
            gate_magnitude: gate.magnitude(),
        })
    }

    fn weights(&self) -> GateWeights<'_> {
        GateWeights {
            weights: &self.weights,
            rank: self.rank,
            norm: self.norm.as_ref(),
            eps: GATE_EPS,
            frequencies: &self.frequencies,
            magnitude: self.magnitude,
            gate_frequencies: &self.gate_frequencies,
            gate_magnitude: self.gate_magnitude,
        }
    }

    fn bytes(&self) -> u64 {
        let norm = self.norm.as_ref().map_or(0, DeviceBuffer::bytes);
        self.weights.bytes() + norm + self.frequencies.bytes() + self.gate_frequencies.bytes()
    }
}

/// The weights of a head, `[rank, inputs]`, as kernels read them: `[inputs / 8, rank]` words of eight inputs to one output.
fn words(head: &[f32], rank: usize) -> impl Iterator<Item = Word> {
    let inputs = head.len() / rank;
    (0..inputs / 8).flat_map(move |word| {
        (0..rank).map(move |output| {
            let eight: [bf16; 8] =
                std::array::from_fn(|at| bf16::from_f32(head[output * inputs + 8 * word + at]));
            bytemuck::cast(eight)
        })
    })
}

#[derive(Debug)]
struct Index(Projection);

impl GpuIndex for Index {
    unsafe fn prompt(&self, kernels: &Kernels, stream: &Stream, stage: &PromptIndex<'_>) -> DriverResult<()> {
        // SAFETY: the caller's part.
        unsafe { GateKeys { gate: self.0.weights(), stage: *stage }.launch(kernels, stream) }
    }

    unsafe fn step(&self, kernels: &Kernels, stream: &Stream, stage: &StepIndex<'_>) -> DriverResult<()> {
        // SAFETY: the caller's part.
        unsafe { GateKeysStep { gate: self.0.weights(), stage: *stage }.launch(kernels, stream) }
    }

    fn bytes(&self) -> u64 {
        self.0.bytes()
    }
}

#[derive(Debug)]
struct Select {
    projection: Projection,
    group: u32,
    head_words: u32,
    least: Option<f32>,
}

impl GpuSelect for Select {
    /// A gate query.
    fn scratch_words(&self) -> usize {
        self.projection.rank as usize / 8
    }

    unsafe fn select(&self, kernels: &Kernels, stream: &Stream, stage: &SelectStage<'_>) -> DriverResult<()> {
        let (SelectStage { score, select, scratch, .. }, rank) = (*stage, self.projection.rank);
        let query = GateQueries {
            gate: self.projection.weights(),
            entries: score.entries,
            queries: score.queries,
            layer: score.layer,
            request_rows: score.request_rows,
            kv_heads: score.kv_heads,
            group: self.group,
            head_words: self.head_words,
            gate_queries: scratch,
        };
        // One gate query of a row: nothing to merge.
        let score = Score { queries: scratch, group: 1, scale: 1.0 / (rank as f32).sqrt(), ..score };
        let select = SelectPartitions { group: 1, merge: GroupMerge::Max, least: self.least, ..select };
        // SAFETY: the caller's part; each launch reads what the one before has written.
        unsafe {
            query.launch(kernels, stream)?;
            score.launch(kernels, stream)?;
            select.launch(kernels, stream)
        }
    }

    fn bytes(&self) -> u64 {
        self.projection.bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_lie_as_words_of_eight_inputs_to_one_output() {
        // Two outputs of 16 inputs.
        let head: Vec<f32> = (0..32).map(|i| i as f32).collect();
        let words: Vec<[bf16; 8]> = words(&head, 2).map(bytemuck::cast).collect();
        let firsts: Vec<f32> = words.iter().map(|word| word[0].to_f32()).collect();
        assert_eq!(firsts, [0.0, 16.0, 8.0, 24.0]);
        assert_eq!(words[3][7].to_f32(), 31.0);
    }
}
