use clap::Args;
use spinkv::backend::BackendKind;
use spinkv::pipeline::Budget;
use spinkv_engine::Result;
use spinkv_engine::bench::{BenchError, CpuMachine, PrefillOptions, PrefillReport};
use spinkv_engine::eval::MethodChoice;
use spinkv_engine::model::Model;

use super::super::output::Output;
use super::subject::{Shown, SubjectArguments, cpu};
use super::tokens;

#[derive(Debug, Args)]
#[command(after_help = "Columns:
  prompt       from nothing in the KV memory to the first token's logits, what is kept of the prompt included
  dense layer  projections, causal attention and MLP of one layer, with nothing beside them
  index        the method's Index of one layer, with nothing beside it, and its share of the dense layer
  kept         what Index, Offload and the warm start add to the whole prompt, and their share of it

Examples:
  spinkv bench prefill                       # the bundled model on the CPU, 4096 tokens
  spinkv bench prefill --backend cuda --random-weights qwen3-14b --layers 8 --contexts 32k
  spinkv bench prefill --methods shadowkv,shadowkv:outliers=0,quest:chunk=32 --json > prefill.json")]
pub(super) struct PrefillArguments {
    /// Methods, as for `spinkv generate --method`; options of a method's own follow as NAME:OPTION=VALUE
    #[arg(
        long,
        value_name = "NAMES",
        value_delimiter = ',',
        default_value = "shadowkv,shadowkv:outliers=0,quest,seer-attention,retroinfer",
        help_heading = "What to measure"
    )]
    methods: Vec<String>,

    /// Tokens of the prompts: 4096 or 4k
    #[arg(long, value_name = "TOKENS", value_delimiter = ',', default_value = "4k", value_parser = tokens,
          help_heading = "What to measure")]
    contexts: Vec<usize>,

    /// The methods' budget, by which some choose how much Index does: as for `spinkv generate --budget`
    #[arg(long, value_name = "BUDGET", default_value = "2048", help_heading = "What to measure")]
    budget: String,

    /// Prompts of each kind that are timed, after one that is not; figures are medians
    #[arg(long, value_name = "PROMPTS", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000),
          help_heading = "What to measure")]
    rounds: u32,

    #[command(flatten)]
    subject: SubjectArguments,
}

/// Runs `spinkv bench prefill`.
pub(super) fn run(arguments: &PrefillArguments) -> Result<()> {
    let named = arguments.methods.iter().filter(|name| !name.trim().is_empty());
    let methods = named.map(|name| name.parse()).collect::<Result<Vec<MethodChoice>>>()?;
    if methods.is_empty() {
        return Err(BenchError::Nothing { what: "method" }.into());
    }
    let subject = arguments.subject.subject(&methods)?;
    let budget: Budget = arguments.budget.parse()?;
    let options = PrefillOptions {
        methods,
        budget,
        contexts: arguments.contexts.clone(),
        rounds: arguments.rounds as usize,
        steady: subject.steady,
        pages: subject.pages,
        gates: subject.gates.clone(),
    };
    // What no model could run is refused before one is loaded.
    for method in &options.methods {
        method.build(options.budget, options.steady, options.gates.clone(), subject.config.rotary())?;
    }
    let limit = subject.config.max_position_embeddings - 1;
    if let Some(context) = options.contexts.iter().copied().find(|context| *context > limit) {
        return Err(BenchError::Context { context, least: 1, limit }.into());
    }
    let shown = Shown::new();
    let mut facts = subject.facts.clone();
    let prompts = match subject.backend {
        BackendKind::Cpu => {
            facts.device = cpu();
            let model = Model::open(&subject.directory, subject.config.clone(), |_, _| {})?;
            let mut machine = CpuMachine::new(&model, &subject.prompts);
            machine.prefill(&options, &mut |message, done, of| shown.hear(message, done, of))?
        }
        #[cfg(all(
            feature = "cuda",
            target_os = "linux",
            any(target_arch = "x86_64", target_arch = "aarch64")
        ))]
        BackendKind::Cuda => {
            let mut machine = arguments.subject.on_gpu(&subject)?;
            let rows = machine.prefill(&options, &mut |message, done, of| shown.hear(message, done, of))?;
            facts.device = machine.device();
            rows
        }
    };
    shown.finish();
    let report = PrefillReport { facts, budget: budget.to_string(), rounds: options.rounds, prompts };
    let mut output = Output::default();
    let json = || serde_json::to_string_pretty(&report).expect("a report is plain data") + "\n";
    let _ = output.write(&if arguments.subject.json { json() } else { format!("{report}\n") });
    output.finish()
}
