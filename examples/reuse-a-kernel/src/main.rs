//! One kernel of SpinKV in a program of its own: the exact top-k of rows, by [`TopK`], its checked launch.
//!
//! ```sh
//! cargo run --release            # in this folder; a stable Rust and a C linker, no CUDA toolkit and no device toolchain
//! ```
//!
//! This crate is no member of SpinKV's workspace and has a lock file of its own, as yours has. What it takes from there:
//!
//! - `spinkv` with the feature `cuda`: the driver layer, and [`Kernels`], which loads the committed PTX that suits the GPU.
//! - `spinkv-kernels`: layouts and launch shapes, `abi`.
//! - `.cargo/config.toml` and the folder `.cuda/lib64`, which stand in for a CUDA toolkit at build time.
//!
//! It fills rows with random scores, lets the GPU select, compares each row with a sort on the CPU, and prints both times. Exit
//! code 0: all rows are right. 1: one is not, or a call failed. 2: there is no driver or no GPU that the kernels run on. 64: wrong
//! options.

use std::num::NonZeroU32;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use clap::builder::RangedU64ValueParser;
use spinkv::backend::cuda::driver::{Context, Device, DeviceBuffer, DriverError, Event, Stream};
use spinkv::backend::cuda::kernels::{Kernels, TopK};
use spinkv::memory::Word;
use spinkv_kernels::abi::select;

/// Selects the greatest scores of random rows on the GPU, checks them against a sort on the CPU, and times both.
#[derive(Parser)]
#[command(max_term_width = 110)]
struct Arguments {
    /// Rows of a launch.
    #[arg(long, default_value_t = 32, value_parser = RangedU64ValueParser::<u32>::new().range(1..=4096))]
    rows: u32,
    /// Scores of a row, a line of the table each. Rows that shared memory has no room for keep their keys in GPU memory.
    #[arg(long, value_delimiter = ',', default_values_t = [2048, 16_384, 131_072])]
    #[arg(value_parser = RangedU64ValueParser::<u32>::new().range(1..=1 << 20))]
    scores: Vec<u32>,
    /// Ids wanted of a row.
    #[arg(short, default_value = "256")]
    k: NonZeroU32,
    /// Launches that are timed together.
    #[arg(long, default_value = "20")]
    launches: NonZeroU32,
}

/// What keeps the program from its table.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Driver(#[from] DriverError),
    #[error("row {row} of {scores} scores: the GPU selected {found} ids, and not those of the sort")]
    OtherIds { row: usize, scores: u32, found: u32 },
}

impl Failure {
    /// 2 where kernels cannot run at all, else 1.
    fn exit_code(&self) -> u8 {
        use DriverError::{NoDevice, NoDriver, UnsupportedDevice};
        match self {
            Self::Driver(NoDriver { .. } | NoDevice { .. } | UnsupportedDevice { .. }) => 2,
            _ => 1,
        }
    }
}

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // --help comes this way too. If it cannot be printed there is nobody to tell.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 64 } else { 0 });
        }
    };
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("reuse-a-kernel: {failure}");
            ExitCode::from(failure.exit_code())
        }
    }
}

fn run(arguments: &Arguments) -> Result<(), Failure> {
    let context = Device::open(0)?;
    let gpu = Gpu { stream: Stream::new(&context)?, kernels: Kernels::load(&context)?, context };
    let device = gpu.context.device();
    println!("{}, driver {}, kernels for {}", device.name, gpu.context.driver_version(), device.ptx_arch()?);
    println!("top_k: {} rows, {} ids of each\n", arguments.rows, arguments.k);
    println!("{:>8}  {:>20}  {:>10}  {:>14}", "scores", "shared memory", "GPU us", "CPU sort us");
    for &scores in &arguments.scores {
        let rows = Rows::random(arguments.rows, scores, arguments.k.get());
        let resident = gpu.kernels.resident(rows.stride);
        let (selection, gpu_us) = gpu.top_k(&rows, resident, arguments.launches)?;
        let start = Instant::now();
        let expected = rows.sorted();
        let cpu_us = start.elapsed().as_secs_f64() * 1e6;
        selection.check(&rows, &expected)?;
        let shared = format!("{} B a block", select::shared_bytes(resident));
        println!("{scores:>8}  {shared:>20}  {gpu_us:>10.1}  {cpu_us:>14.1}");
    }
    println!(
        "\nAll rows are as the sort has them. GPU: mean of {} launches on the same scores.",
        arguments.launches
    );
    Ok(())
}

/// What a launch needs.
struct Gpu {
    kernels: Kernels,
    stream: Stream,
    context: Context,
}

impl Gpu {
    /// The selection, and the time of a launch in us.
    fn top_k(
        &self,
        rows: &Rows,
        resident: u32,
        launches: NonZeroU32,
    ) -> Result<(Selection, f64), DriverError> {
        let stream = &self.stream;
        let ids = DeviceBuffer::zeroed(stream, rows.rows * rows.k as usize)?;
        let selected = DeviceBuffer::zeroed(stream, rows.rows)?;
        // Scratch of rows that shared memory has no room for: a key of 4 bytes for each score.
        let words = if resident < rows.stride { rows.scores.len() * 4 / size_of::<Word>() } else { 0 };
        let launch = TopK {
            scores: &DeviceBuffer::from_slice(stream, &rows.scores)?,
            counts: &DeviceBuffer::from_slice(stream, &vec![rows.count; rows.rows])?,
            k: &DeviceBuffer::from_slice(stream, &vec![rows.k; rows.rows])?,
            stride: rows.stride,
            resident,
            keys: &DeviceBuffer::uninit(&self.context, words)?,
            capacity: rows.k,
            ids: &ids,
            selected: &selected,
        };
        let (start, end) = (Event::new(&self.context)?, Event::new(&self.context)?);
        // The first launch of a kernel also loads it.
        for timed in [1, launches.get()] {
            start.record(stream)?;
            for _ in 0..timed {
                // SAFETY: no count is above the stride; these buffers are used on this stream alone, in its order.
                unsafe { launch.launch(&self.kernels, stream)? };
            }
            end.record(stream)?;
        }
        end.synchronize()?;
        let us = f64::from(start.elapsed_ms(&end)?) * 1e3 / f64::from(launches.get());
        Ok((Selection { ids: ids.to_vec(stream)?, selected: selected.to_vec(stream)? }, us))
    }
}

/// Rows to select from.
struct Rows {
    rows: usize,
    /// Scores of a row.
    count: u32,
    /// Room for them: a multiple of 4, since the kernel reads words of 4.
    stride: u32,
    /// Ids wanted of a row.
    k: u32,
    /// `[rows, stride]`.
    scores: Vec<f32>,
}

impl Rows {
    /// Scores of 16 random bits, so that long rows have equal ones: of these the lower ids count.
    fn random(rows: u32, count: u32, k: u32) -> Self {
        let stride = count.next_multiple_of(4);
        let mut state = u64::from(count);
        let scores = (0..rows as usize * stride as usize).map(|_| {
            // SplitMix64.
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            (mixed >> 48) as f32 / 32_768.0 - 1.0
        });
        Self { rows: rows as usize, count, stride, k: k.min(count), scores: scores.collect() }
    }

    /// Of each row the ids of the `k` greatest scores, ascending.
    fn sorted(&self) -> Vec<Vec<u32>> {
        let of_row = |scores: &[f32]| {
            let score = |id: u32| scores[id as usize];
            let mut ids: Vec<u32> = (0..self.count).collect();
            ids.sort_unstable_by(|&a, &b| score(b).total_cmp(&score(a)).then(a.cmp(&b)));
            ids.truncate(self.k as usize);
            ids.sort_unstable();
            ids
        };
        self.scores.chunks_exact(self.stride as usize).map(of_row).collect()
    }
}

/// What the GPU found.
struct Selection {
    /// `[rows, k]`.
    ids: Vec<u32>,
    /// `[rows]`: how many of them were written.
    selected: Vec<u32>,
}

impl Selection {
    fn check(&self, rows: &Rows, expected: &[Vec<u32>]) -> Result<(), Failure> {
        let found = self.ids.chunks_exact(rows.k as usize).zip(&self.selected);
        for (row, ((ids, &found), expected)) in found.zip(expected).enumerate() {
            if found != rows.k || ids != expected {
                return Err(Failure::OtherIds { row, scores: rows.count, found });
            }
        }
        Ok(())
    }
}
