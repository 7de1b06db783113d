//! The whole decode step of one layer, Index to Attention, as one graph, beside its stages alone and what memory and bus need at least.

mod check;
mod layer;
mod stages;

use std::error::Error;

use spinkv::backend::cuda::LayerStep;
use spinkv::backend::cuda::driver::{DeviceBuffer, Result as DriverResult, Stream};
use spinkv::backend::cuda::kernels::{Attend, Gather};
use spinkv::memory::Word;
use spinkv::pipeline::SteadyZone;
use spinkv_kernels::abi::WORD_BYTES;

use crate::measure::{Bench, Shape};
use layer::Layer;

/// Qwen3-14B: 8 KV heads of 128, 5 query heads each.
const KV_HEADS: usize = 8;
const GROUP: usize = 5;
const HEAD_WORDS: usize = 16;
const HEAD_BYTES: usize = HEAD_WORDS * WORD_BYTES;
/// Tokens of a page, which is a partition.
const PAGE_TOKENS: usize = 8;
const PAGE_WORDS: usize = 2 * PAGE_TOKENS * HEAD_WORDS;
const PAGE_BYTES: usize = PAGE_WORDS * WORD_BYTES;
const BATCH: usize = 16;
const ROWS: usize = BATCH * KV_HEADS;
/// Pages of a row: 32K tokens.
const KEYS: usize = 4096;
const STEADY: SteadyZone = SteadyZone { sinks: 4, window: 32 };
const SINK_PAGES: usize = 1;
/// The tail's four pages, and the one that begins or leaves.
const RING_PAGES: usize = 5;
/// Pages that a row selects.
const SELECTED: usize = 256;
/// Its slots: the selection and five times as much.
const SLOTS: usize = 6 * SELECTED;
/// Copies of all that a step reads on the GPU, each used once a replay.
const SETS: usize = 8;
/// Blocks of `gather`.
const GATHER_BLOCKS: u32 = 24;

pub fn run(bench: &mut Bench) -> Result<(), Box<dyn Error>> {
    let least = ROWS * KEYS * PAGE_BYTES;
    if bench.arena_bytes < least {
        let asked = bench.arena_bytes >> 20;
        return Err(format!("--arena-mib is {asked}; layer_step needs at least {}", least >> 20).into());
    }
    let layer = Layer::new(bench)?;
    let ids = layer.selection()?;
    bench.group(
        "layer_step: 16 requests of 32K tokens, 8 KV heads of 128 in groups of 5, pages of 8, 256 of a row selected, 1,536 slots; in one \
         request of eight a page is full, and one leaves the steady zone; ceilings: copies within the device (read + written) and from the \
         host, of the step the sum of the times that both take for what it must move",
    );
    let ceilings = Ceilings::measure(bench, &layer)?;
    for (round, ratio) in [0.95, 0.9, 1.0].into_iter().enumerate() {
        let misses = (SELECTED as f64 * (1.0 - ratio)).round() as usize;
        layer.warm(&ids, misses)?;
        layer.check(&ids, misses)?;
        if round == 0 {
            rows_without_misses(bench, &layer, &ceilings)?;
        }
        rows_with_misses(bench, &layer, &ceilings, ratio, misses)?;
    }
    Ok(())
}

/// GB/s of the machine's own copies.
struct Ceilings {
    device: f64,
    host: f64,
}

impl Ceilings {
    fn measure(bench: &mut Bench, layer: &Layer) -> Result<Self, Box<dyn Error>> {
        let (stream, words) = (bench.stream.clone(), (512 << 20) / WORD_BYTES);
        let (from, to) =
            (DeviceBuffer::<Word>::zeroed(&stream, words)?, DeviceBuffer::<Word>::zeroed(&stream, words)?);
        let bytes = 2 * from.bytes();
        let device = |_: usize| to.copy_from(&stream, 0, &from, 0, words);
        let device = bench.row("copy", "512 MiB", bytes, None, device)?;
        let words = (64 << 20) / WORD_BYTES;
        let host = |_: usize| to.copy_from_arena(&stream, 0, &layer.arena, 0, words);
        let host = bench.row("copy engine", "64 MiB in one run", 64 << 20, None, host)?;
        Ok(Self { device, host })
    }
}

/// One of a step's launches, or all of them.
#[derive(Clone, Copy)]
enum Stage {
    Index,
    Append,
    Score,
    Select,
    Resolve,
    Gather,
    Attend,
    All,
    /// All, attention after the last miss of all rows.
    Serial,
}

impl Stage {
    fn launch(self, layer: &Layer, set: usize, stream: &Stream) -> DriverResult<()> {
        let (step, kernels) = (layer.step(set), &layer.kernels);
        // SAFETY: the layer's tables, lists and pages agree with each other; `check` has launched all of it, so each stage finds what
        // those before it leave; what changes the tables runs once on each set between two resets.
        unsafe {
            match self {
                Self::Index => step.index.map_or(Ok(()), |index| index.launch(kernels, stream)),
                Self::Append => step.append.launch(kernels, stream),
                Self::Score => {
                    step.select.map_or(Ok(()), |select| select.launches().0.launch(kernels, stream))
                }
                Self::Select => {
                    step.select.map_or(Ok(()), |select| select.launches().1.launch(kernels, stream))
                }
                Self::Resolve => step.resolve.launch(kernels, stream),
                Self::Gather => step.gather.launch(kernels, stream),
                Self::Attend => step.attend.launch(kernels, stream),
                Self::All => step.launch(kernels, stream),
                Self::Serial => {
                    let gather = Gather { arrived: None, ..step.gather };
                    let attend = Attend { awaited: None, ..step.attend };
                    LayerStep { gather, attend, ..step }.launch(kernels, stream)
                }
            }
        }
    }
}

/// Times a stage on all sets, each time on restored tables.
fn row(
    bench: &mut Bench,
    layer: &Layer,
    shape: Shape<'_>,
    (what, bytes, ceiling, stage): (&'static str, usize, Option<f64>, Stage),
) -> Result<f64, Box<dyn Error>> {
    let shape = shape.context((KEYS * PAGE_TOKENS) as u32);
    let reset = |stream: &Stream| layer.reset(stream);
    let launch = |stream: &Stream, set| stage.launch(layer, set, stream);
    bench.graph_row(what, shape, bytes as u64, ceiling, SETS, reset, launch)
}

/// The stages that take the same time whatever the cache holds.
fn rows_without_misses(bench: &mut Bench, layer: &Layer, ceilings: &Ceilings) -> Result<(), Box<dyn Error>> {
    // A page that leaves: its keys, and their mean; a token: read and written; a full page: to the host.
    let left = layer.leaving_rows();
    let indexed = left * (PAGE_TOKENS + 1) * HEAD_BYTES;
    let appended = ROWS * 4 * HEAD_BYTES + left * PAGE_BYTES;
    let device = Some(ceilings.device);
    for stage in [
        ("index", indexed, None, Stage::Index),
        ("append", appended, None, Stage::Append),
        ("score", layer.summary_bytes() + layer.logit_bytes(), device, Stage::Score),
        ("select", layer.logit_bytes(), device, Stage::Select),
        ("attend", layer.attended_bytes(), device, Stage::Attend),
    ] {
        row(bench, layer, Shape::new(format!("batch {BATCH}")), stage)?;
    }
    Ok(())
}

/// Retrieve, and the whole step, at a hit ratio. The step's ceiling is its floor: the times that the machine's copies take for what it
/// must move, one after another.
fn rows_with_misses(
    bench: &mut Bench,
    layer: &Layer,
    ceilings: &Ceilings,
    ratio: f64,
    misses: usize,
) -> Result<(), Box<dyn Error>> {
    let missed = ROWS * misses * PAGE_BYTES;
    let us = |bytes: usize, gb_per_s: f64| bytes as f64 / gb_per_s / 1e3;
    let floors @ [summaries, attended, fetched] = [
        us(layer.summary_bytes(), ceilings.device),
        us(layer.attended_bytes(), ceilings.device),
        us(missed, ceilings.host),
    ];
    let floor: f64 = floors.iter().sum();
    let bytes = layer.summary_bytes() + layer.attended_bytes() + missed;
    let at_floor = bytes as f64 / floor / 1e3;

    let counted = |stream: &Stream| layer.counted(stream);
    let shape = Shape::new(format!("batch {BATCH}, hit ratio {ratio}, {misses} misses a row"));
    let shape = shape.counted(&counted);
    row(bench, layer, shape.clone(), ("resolve", 0, None, Stage::Resolve))?;
    row(bench, layer, shape.clone(), ("gather", missed, Some(ceilings.host), Stage::Gather))?;
    row(bench, layer, shape.clone(), ("step, serial", bytes, Some(at_floor), Stage::Serial))?;
    let gb_per_s = row(bench, layer, shape, ("step", bytes, Some(at_floor), Stage::All))?;
    println!(
        "floors: summaries {summaries:.1} us + attention {attended:.1} us + misses {fetched:.1} us = {floor:.1} us; step / floors = {:.2}",
        at_floor / gb_per_s
    );
    Ok(())
}
