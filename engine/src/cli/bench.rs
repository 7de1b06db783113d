//! `spinkv bench`.

mod decode;
mod prefill;
#[cfg(feature = "serve")]
mod serve;
mod subject;

use clap::{Args, Subcommand};
use spinkv_engine::Result;
use spinkv_engine::bench::Selections;

/// Measure what serving costs: prompts, decode steps, and what each part of the design is worth.
///
/// On a GPU with random weights of a published shape, or a checkpoint on either backend. Results go to standard output, as tables or with --json as one
/// object; how far it has come to standard error.
#[derive(Debug, Args)]
pub(crate) struct BenchArguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Time dense prompts, and the Index of each method beside one of their layers.
    ///
    /// Index is what a method does to a prompt: mean keys, bounds, gates, clusters. On a GPU it runs on a stream of its own, under the next layer; it is
    /// timed by itself, and by how much longer the whole prompt takes with it, Offload and the warm start.
    Prefill(prefill::PrefillArguments),
    /// Time decode steps over batches, contexts, methods, budgets and what is kept on the GPU between steps.
    ///
    /// All caches are measured in one process: dense attention with everything in HBM and with everything streamed from the host; a method without a
    /// cache, with what the step before selected, with the bucketed LRU that serves, with all it ever selects resident; and by replaying what was
    /// selected, an exact LRU and Belady's choice, which knows the future.
    Decode(decode::DecodeArguments),
    /// One batch, context, method and budget, part after part of the design, and hit ratio over cache size.
    ///
    /// No cache, what the step before selected, the bucketed LRU in growing sizes, everything resident; an exact LRU and Belady's choice in the same sizes.
    Ablation(decode::AblationArguments),
    /// Put a load on a server: requests that arrive at a rate, whatever becomes of those before them, and what their answers take.
    ///
    /// Any endpoint of OpenAI's API with --url; without it, a server of its own on a free port, with the flags of `spinkv serve` behind --. Arrivals are a
    /// Poisson process that does not wait for answers: times count from when a request should arrive, so a server that falls behind cannot hide it.
    #[cfg(feature = "serve")]
    Serve(Box<serve::LoadArguments>),
}

/// Runs `spinkv bench`.
pub(crate) fn run(arguments: &BenchArguments) -> Result<()> {
    match &arguments.what {
        What::Prefill(arguments) => prefill::run(arguments),
        What::Decode(arguments) => decode::run(arguments),
        What::Ablation(arguments) => decode::run_ablation(arguments),
        #[cfg(feature = "serve")]
        What::Serve(arguments) => serve::run(arguments),
    }
}

/// Tokens, as 4096 or 4k.
fn tokens(text: &str) -> std::result::Result<usize, String> {
    spinkv_engine::bench::tokens(text).ok_or_else(|| "tokens, such as 4096 or 4k".to_owned())
}

fn gib(text: &str) -> std::result::Result<f64, String> {
    match text.parse() {
        Ok(gib) if gib > 0.0 && gib <= 4096.0 => Ok(gib),
        _ => Err("more than 0 GiB, at most 4096".to_owned()),
    }
}

/// Buffering pages for each mandatory page.
fn buffering(text: &str) -> std::result::Result<f64, String> {
    match text.parse() {
        Ok(buffering) if (0.0..=1000.0).contains(&buffering) => Ok(buffering),
        _ => Err("a ratio from 0 to 1000".to_owned()),
    }
}

fn share(text: &str) -> std::result::Result<f64, String> {
    match text.parse() {
        Ok(share) if share > 0.0 && share < 1.0 => Ok(share),
        _ => Err("a hit ratio above 0 and below 1, such as 0.9".to_owned()),
    }
}

/// What figures of such selections are to be read with.
fn notes(selections: Selections, random_weights: bool) -> Vec<String> {
    match selections {
        Selections::Model if random_weights => {
            vec![
                "with random weights a step's selection says nothing of models: neither do hit ratios"
                    .to_owned(),
            ]
        }
        Selections::Model => Vec::new(),
        Selections::Drawn { hit_ratio } => {
            let pace = hit_ratio
                .map_or("at the pace calibrated to published miss ratios".to_owned(), |ratio| {
                    format!("at the pace that gives the largest cache hits of {ratio}")
                });
            vec![format!(
                "scores and top-k run; what they select is replaced by selections drawn before the steps, {pace}; on a GPU by two copies a layer, which are in Select's time"
            )]
        }
    }
}
