//! Commands and what they print.

pub(crate) mod bench;
mod demo;
pub(crate) mod devices;
pub(crate) mod eval;
pub(crate) mod generate;
#[cfg(all(feature = "cuda", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod generate_cuda;
pub(crate) mod metadata;
mod output;
mod pages;
mod report;
#[cfg(feature = "serve")]
pub(crate) mod serve;
pub(crate) mod simulate;

use std::io::Write;

use clap::{Parser, Subcommand};
use spinkv::Shard;
use spinkv::backend::BackendKind;
use spinkv_engine::config::ModelConfig;
use spinkv_engine::{Error, Result};

/// Writes to standard error. If that is closed nobody listens, which is no reason to fail.
pub(crate) fn say(text: &str) {
    let _ = std::io::stderr().lock().write_all(text.as_bytes());
}

/// Refuses GPUs that cannot share a model out, before anything is loaded.
fn check_gpus(backend: BackendKind, gpus: usize, config: &ModelConfig) -> Result<()> {
    if backend == BackendKind::Cpu && gpus != 1 {
        return Err(Error::UnsupportedByBackend {
            backend: "cpu",
            what: "use GPUs: --gpus is for --backend cuda",
        });
    }
    Shard::all(gpus).try_for_each(|shard| config.shard(shard).map(|_| ()))
}

/// Long-context LLMs with sparse attention over hierarchical KV memory.
///
/// The full KV cache stays in host memory; the GPU keeps summaries, a small cache of pages and compact tables, and
/// each step fetches only the pages it misses. The cpu backend runs the same pipeline without a GPU.
#[derive(Debug, Parser)]
#[command(name = "spinkv", version, max_term_width = 110)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Answer one prompt, and say what it took.
    Generate(Box<generate::GenerateArguments>),
    /// Measure the accuracy of methods beside dense attention, over budgets and contexts.
    ///
    /// Facts hidden in long text that must be found (needle), and the loss of held-out text after long prompts (perplexity). The
    /// prompts follow from the seed: the same command asks the same on any machine. Beside accuracy: what share of the true attention
    /// mass is read, hit ratio and bytes moved.
    Eval(Box<eval::EvalArguments>),
    Bench(Box<bench::BenchArguments>),
    #[cfg(feature = "serve")]
    Serve(Box<serve::ServeArguments>),
    /// Replay what steps select through caches of any policy and size, and model what the misses cost.
    ///
    /// Traces are generated, or read from files that `spinkv generate --record-trace` and --save write. They run
    /// through the cache that backends use. Sizes are multiples of what one step selects: 1 holds nothing else, 6 is
    /// what `spinkv generate` gives a request by default. The policy belady knows the future: no other misses less in
    /// the same memory.
    Simulate(simulate::SimulateArguments),
    /// Work out what tables, summaries and pages take, by formula.
    Metadata(Box<metadata::MetadataArguments>),
    /// List this machine's GPUs, or say why there are none.
    ///
    /// The exit code is 0 if there is a GPU and 2 if there is none.
    Devices(devices::DevicesArguments),
}
