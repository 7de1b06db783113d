use std::sync::Arc;

use serde::Serialize;
use spinkv::backend::cuda::driver::{Context, Device, Event, Result, Stream};
use spinkv::backend::cuda::kernels::Kernels;

/// Untimed launches before the timed ones: module load, clocks, address translations.
const WARM_UP: usize = 3;

/// One measured line.
#[derive(Debug, Serialize)]
pub struct Row {
    /// Kernel or ceiling.
    pub what: &'static str,
    /// Its sizes.
    pub shape: String,
    /// Bytes that must move.
    pub bytes: u64,
    /// Median.
    pub us: f64,
    /// Fastest and slowest.
    pub range_us: [f64; 2],
    /// 10^9 bytes a second, of the median.
    pub gb_per_s: f64,
    /// Over the ceiling of the group, if it has one.
    pub of_ceiling: Option<f64>,
}

/// The GPU, and what was measured on it.
pub struct Bench {
    pub context: Context,
    pub stream: Arc<Stream>,
    pub kernels: Kernels,
    pub arena_bytes: usize,
    repeats: usize,
    rows: Vec<Row>,
}

impl Bench {
    pub fn open(repeats: usize, arena_bytes: usize) -> Result<Self> {
        let context = Device::open(0)?;
        let stream = Arc::new(Stream::new(&context)?);
        let kernels = Kernels::load(&context)?;
        Ok(Self { context, stream, kernels, arena_bytes, repeats: repeats.max(1), rows: Vec::new() })
    }

    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// Prints a heading.
    pub fn group(&self, title: &str) {
        println!(
            "\n{title}\n{:14} {:38} {:>10} {:>17} {:>9} {:>7}",
            "", "", "us", "range", "GB/s", "ceiling"
        );
    }

    /// Times `launch`, which is given the number of the round so that it can rotate its inputs, prints the row and
    /// returns its GB/s.
    pub fn row(
        &mut self,
        what: &'static str,
        shape: impl Into<String>,
        bytes: u64,
        ceiling: Option<f64>,
        mut launch: impl FnMut(usize) -> Result<()>,
    ) -> Result<f64> {
        let (start, end) = (Event::new(&self.context)?, Event::new(&self.context)?);
        let mut times = Vec::with_capacity(self.repeats);
        for round in 0..WARM_UP + self.repeats {
            start.record(&self.stream)?;
            launch(round)?;
            end.record(&self.stream)?;
            end.synchronize()?;
            if round >= WARM_UP {
                times.push(f64::from(start.elapsed_ms(&end)?) * 1e3);
            }
        }
        times.sort_by(f64::total_cmp);
        let us = times[times.len() / 2];
        let gb_per_s = bytes as f64 / us / 1e3;
        let row = Row {
            what,
            shape: shape.into(),
            bytes,
            us,
            range_us: [times[0], times[times.len() - 1]],
            gb_per_s,
            of_ceiling: ceiling.map(|ceiling| gb_per_s / ceiling),
        };
        let range = format!("{:.1} - {:.1}", row.range_us[0], row.range_us[1]);
        let ratio = row.of_ceiling.map_or(String::new(), |ratio| format!("{ratio:.3}"));
        println!("{what:14} {:38} {us:>10.1} {range:>17} {gb_per_s:>9.2} {ratio:>7}", row.shape);
        self.rows.push(row);
        Ok(gb_per_s)
    }
}
