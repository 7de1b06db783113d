//! A sparse-attention method from outside SpinKV, on both backends. `docs/custom-method.md` walks through it.
//!
//! ```sh
//! cargo run --release                      # on the CPU backend
//! cargo run --release -- --backend cuda    # on a GPU, each step one captured graph; compared with the CPU
//! ```
//!
//! [`method`] is the method and its CPU face, [`gpu`] its GPU face; the kernels are a crate of their own, in `kernels`, with the PTX that
//! `build-kernels` made of them. [`run`] takes a prompt and some steps through either backend, and here they are looked at: with a share of 1 and a
//! budget for everything the method must be dense attention. Exit code 0: it is. 1: it is not, or a call failed. 2: there is no driver or no GPU that
//! the kernels run on. 64: wrong options.

mod data;
mod gpu;
mod method;
mod run;

use std::process::ExitCode;

use clap::Parser;
use spinkv::backend::cuda::driver::{Device, DriverError};
use spinkv::pipeline::Budget;
use spinkv::{Error, KvShape};

use data::{Sequence, apart};
use method::Farthest;
use run::{Outputs, PROMPT};

/// Takes a random prompt and some steps through a method of its own, and compares it with dense attention.
#[derive(Parser)]
#[command(max_term_width = 110)]
struct Arguments {
    /// Where: cpu or cuda.
    #[arg(long, default_value = "cpu", value_parser = ["cpu", "cuda"])]
    backend: String,
    /// The part of the softmax that a step's chunks have between them, above 0 and up to 1.
    #[arg(long, default_value_t = 0.9)]
    share: f32,
    /// The most tokens that a step selects.
    #[arg(long, default_value_t = 512)]
    budget: usize,
    /// Steps behind the prompt.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=2000))]
    steps: u64,
}

/// What keeps the program from its result.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    SpinKv(#[from] Error),
    #[error(transparent)]
    Driver(#[from] DriverError),
    #[error("{what} is {off} off, more than {limit}")]
    Apart { what: &'static str, off: f32, limit: f32 },
    #[error("a share of {0}: above 0 and up to 1")]
    Share(f32),
}

impl Failure {
    /// 2 where kernels cannot run at all, else 1.
    fn exit_code(&self) -> u8 {
        use DriverError::{NoDevice, NoDriver, UnsupportedDevice};
        match self {
            Self::Driver(NoDriver { .. } | NoDevice { .. } | UnsupportedDevice { .. }) => 2,
            Self::Share(_) => 64,
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
            eprintln!("custom-method: {failure}");
            ExitCode::from(failure.exit_code())
        }
    }
}

fn run(arguments: &Arguments) -> Result<(), Failure> {
    if !(arguments.share > 0.0 && arguments.share <= 1.0) {
        return Err(Failure::Share(arguments.share));
    }
    let context = (arguments.backend == "cuda").then(|| Device::open(0)).transpose()?;
    let tokens = PROMPT + arguments.steps as usize;
    let sequence = Sequence::random(KvShape::new(2, 8, 2, 64)?, tokens, 7);
    let on_backend = |method| match &context {
        Some(context) => run::on_gpu(context, &sequence, method, tokens),
        None => run::on_cpu(&sequence, method, tokens),
    };

    let all = Farthest { share: 1.0, budget: Budget::Fraction(1.0) };
    let off = from_dense(&sequence, &on_backend(all)?);
    // A GPU's outputs are bf16.
    let limit = if context.is_some() { 2e-2 } else { 1e-5 };
    if off > limit {
        return Err(Failure::Apart { what: "the method at full budget, from dense attention,", off, limit });
    }
    println!("share 1, budget for all: within {off:.1e} of dense attention");

    let method = Farthest { share: arguments.share, budget: Budget::Tokens(arguments.budget) };
    let outputs = on_backend(method)?;
    let rows = outputs.selected.iter().flatten();
    let (rows, chunks) = rows.fold((0, 0), |(rows, chunks), ids| (rows + 1, chunks + ids.len()));
    println!(
        "share {}, budget {}: {:.1} of {} chunks a row, within {:.1e} of dense attention",
        arguments.share,
        arguments.budget,
        chunks as f64 / f64::from(rows),
        (tokens - 32) / 16 - 1,
        from_dense(&sequence, &outputs)
    );
    if context.is_some() {
        let on_cpu = run::on_cpu(&sequence, method, tokens)?;
        let off = worst(&outputs, &on_cpu);
        if off > limit {
            return Err(Failure::Apart { what: "the GPU, from the CPU,", off, limit });
        }
        println!("the same on the CPU: within {off:.1e}");
    }
    Ok(())
}

fn from_dense(sequence: &Sequence, outputs: &Outputs) -> f32 {
    let steps = outputs.attention.iter().enumerate();
    steps
        .flat_map(|(step, layers)| layers.iter().enumerate().map(move |(layer, out)| (step, layer, out)))
        .map(|(step, layer, out)| apart(out, &sequence.dense(layer, PROMPT + step)))
        .fold(0.0, f32::max)
}

fn worst(a: &Outputs, b: &Outputs) -> f32 {
    let layers = |outputs: &Outputs| outputs.attention.iter().flatten().cloned().collect::<Vec<_>>();
    layers(a).iter().zip(layers(b)).map(|(a, b)| apart(a, &b)).fold(0.0, f32::max)
}
