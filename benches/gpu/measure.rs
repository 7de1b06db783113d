use std::error::Error;
use std::path::Path;
use std::sync::Arc;

use spinkv::backend::cuda::driver::{Context, Device, DeviceBuffer, Graph, Result, Stream};
use spinkv::backend::cuda::kernels::Kernels;
use spinkv_benches::report::{Counts, Row};
use spinkv_benches::sampling::{Name, Sampler};

use crate::aside::Aside;
use crate::cuda_events::CudaEvents;

/// Untimed launches before Criterion's own: module load, clocks, address translations.
const WARM_UP: usize = 2;

/// More than twice the L2. Launches that move as much, over all their input sets, have pushed what they read out of it since they read
/// it; others find it overwritten.
const COLD_BYTES: usize = 128 << 20;

/// What a row needs: the driver, and Criterion's files.
type Outcome<T> = std::result::Result<T, Box<dyn Error>>;

/// Reads what launches counted on the device.
type ReadCounts<'a> = dyn Fn(&Stream) -> Result<Counts> + 'a;

/// What a row says of its sizes; text alone is one.
#[derive(Clone, Default)]
pub struct Shape<'a> {
    text: String,
    context_tokens: Option<u32>,
    flops: Option<u64>,
    counts: Option<&'a ReadCounts<'a>>,
}

impl<'a> Shape<'a> {
    pub fn new(text: impl Into<String>) -> Self {
        Self { text: text.into(), ..Self::default() }
    }

    /// Tokens of a request.
    pub fn context(self, tokens: u32) -> Self {
        Self { context_tokens: Some(tokens), ..self }
    }

    /// Floating-point operations of a launch that they bound.
    pub fn flops(self, flops: u64) -> Self {
        Self { flops: Some(flops), ..self }
    }

    /// How to read, after the row was timed, what its launches counted on the device.
    pub fn counted(self, counts: &'a ReadCounts<'a>) -> Self {
        Self { counts: Some(counts), ..self }
    }
}

impl<T: Into<String>> From<T> for Shape<'_> {
    fn from(text: T) -> Self {
        Self::new(text)
    }
}

/// The GPU, and what was measured on it.
pub struct Bench {
    pub context: Context,
    pub stream: Arc<Stream>,
    pub kernels: Kernels,
    pub arena_bytes: usize,
    /// The group's first word.
    group: String,
    events: CudaEvents,
    sampler: Sampler<CudaEvents>,
    aside: Aside,
    /// To be written over, which leaves nothing else in the L2.
    cold: DeviceBuffer<u8>,
    rows: Vec<Row>,
}

impl Bench {
    /// Opens the first GPU; Criterion's files are in `folder`.
    pub fn open(repeats: usize, arena_bytes: usize, folder: &Path) -> Outcome<Self> {
        let context = Device::open(0)?;
        let stream = Arc::new(Stream::new(&context)?);
        let kernels = Kernels::load(&context)?;
        let events = CudaEvents::new(stream.clone());
        let sampler = Sampler::new(events.clone(), repeats, folder)?;
        let aside = Aside::new(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        let cold = DeviceBuffer::zeroed(&stream, COLD_BYTES)?;
        let (group, rows) = (String::new(), Vec::new());
        Ok(Self { context, stream, kernels, arena_bytes, group, events, sampler, aside, cold, rows })
    }

    pub fn into_rows(self) -> Vec<Row> {
        self.rows
    }

    /// Prints a heading, whose part before the colon names the group.
    pub fn group(&mut self, title: &str) {
        title.split(':').next().unwrap_or_default().clone_into(&mut self.group);
        println!("\n{title}\n{}", Row::heading());
    }

    /// Times `launch`, which is given the number of the round so that it can rotate its inputs, prints the row and
    /// returns its GB/s.
    pub fn row<'a>(
        &mut self,
        what: &'static str,
        shape: impl Into<Shape<'a>>,
        bytes: u64,
        ceiling: Option<f64>,
        launch: impl FnMut(usize) -> Result<()>,
    ) -> Outcome<f64> {
        self.sample(what, shape.into(), bytes, ceiling, 1, |_| Ok(()), launch)
    }

    /// Times short launches: `launch` is captured for each of `sets` sets of inputs into one graph, whose replay is timed and divided
    /// by their number; `reset` runs untimed before each replay.
    #[allow(clippy::too_many_arguments, reason = "a row's columns, and the two closures")]
    pub fn graph_row<'a>(
        &mut self,
        what: &'static str,
        shape: impl Into<Shape<'a>>,
        bytes: u64,
        ceiling: Option<f64>,
        sets: usize,
        reset: impl FnMut(&Stream) -> Result<()>,
        mut launch: impl FnMut(&Stream, usize) -> Result<()>,
    ) -> Outcome<f64> {
        let stream = self.stream.clone();
        let graph = Graph::capture(&stream, |stream| (0..sets).try_for_each(|set| launch(stream, set)))?;
        self.sample(what, shape.into(), bytes, ceiling, sets, reset, |_| {
            // SAFETY: what `launch` names outlives this call, and its launches were allowed one by one.
            unsafe { graph.launch(&stream) }
        })
    }

    /// Samples `launch`, each time after `reset` and with a cold L2, prints and keeps the row, and returns its GB/s. One call of
    /// `launch` is the work of `sets` launches.
    #[allow(clippy::too_many_arguments, reason = "a row's columns, and the two closures")]
    fn sample(
        &mut self,
        what: &'static str,
        shape: Shape<'_>,
        bytes: u64,
        ceiling: Option<f64>,
        sets: usize,
        mut reset: impl FnMut(&Stream) -> Result<()>,
        mut launch: impl FnMut(usize) -> Result<()>,
    ) -> Outcome<f64> {
        let Self { stream, events, sampler, aside, cold, .. } = self;
        // The lines that this leaves in the L2 are written back when others replace them, which would slow a launch that is bound
        // by the device's memory; one of few bytes is not.
        let flush = bytes * (sets as u64) < COLD_BYTES as u64;
        let mut before = |stream: &Stream| {
            reset(stream)?;
            if flush { cold.fill_bytes(stream, 0..cold.len(), 0x5a) } else { Ok(()) }
        };
        for round in 0..WARM_UP {
            before(stream)?;
            launch(round)?;
        }
        let mut rounds = WARM_UP..;
        let once = || {
            let round = rounds.next().expect("there is always a next number");
            events.time(&mut before, |_| launch(round)) / sets as f64
        };
        let name = Name { group: &self.group, what, shape: &shape.text };
        let sampled = aside.run(|| sampler.sample(name, bytes, once))?;
        events.take_failure()?;
        let mut row = Row::new(what, &shape.text, bytes, ceiling, sampled?);
        row.context_tokens = shape.context_tokens;
        if let Some(flops) = shape.flops {
            row = row.with_flops(flops);
        }
        if let Some(counts) = shape.counts {
            let Counts { hits, misses } = counts(stream)?;
            (row.hits, row.misses) = (hits, Some(misses));
        }
        println!("{row}");
        let gb_per_s = row.gb_per_s;
        self.rows.push(row);
        Ok(gb_per_s)
    }
}
