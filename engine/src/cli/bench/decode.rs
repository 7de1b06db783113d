use std::path::{Path, PathBuf};

use clap::Args;
use spinkv::backend::BackendKind;
use spinkv::memory::HostFormat;
use spinkv::pipeline::{Budget, DEFAULT_BUFFERING};
use spinkv_engine::bench::{
    AblationReport, BatchSize, Caching, CpuMachine, DecodeOptions, DecodeReport, Facts, Point, Selections,
    decode, plot,
};
use spinkv_engine::eval::MethodChoice;
use spinkv_engine::model::Model;
use spinkv_engine::{Error, Result};

use super::super::output::Output;
use super::subject::{Shown, SubjectArguments, cpu};
use super::{buffering, gib, notes, share, tokens};

/// How steps are taken, for both benches of them.
#[derive(Debug, Args)]
struct StepArguments {
    /// Steps before those that are timed, while caches fill
    #[arg(long, value_name = "STEPS", default_value_t = 64, value_parser = clap::value_parser!(u32).range(..=100_000),
          help_heading = "Steps")]
    warm_up: u32,

    /// Steps that are timed; on a GPU as many with an event behind each part, as many without, and as many by the host's clock
    #[arg(long, value_name = "STEPS", default_value_t = 24, value_parser = clap::value_parser!(u32).range(1..=100_000),
          help_heading = "Steps")]
    steps: u32,

    /// Who says what steps select: model, or calibrated: scores and top-k run, and selections drawn with the locality of real text replace their
    /// result [default: calibrated for random weights, else model]
    #[arg(long, value_name = "WHO", value_parser = ["model", "calibrated"], help_heading = "Steps")]
    selections: Option<String>,

    /// Draw selections at the pace at which the cache of the largest --buffering has this hit ratio, such as 0.9
    #[arg(long, value_name = "RATIO", value_parser = share, help_heading = "Steps")]
    hit_ratio: Option<f64>,

    /// Measure the serving cache with the host's pages in these formats, too; not for clusters and keys in low rank
    #[arg(long, value_name = "FORMATS", value_delimiter = ',', value_parser = ["fp8", "int8"], help_heading = "Memory")]
    coded: Vec<String>,

    #[command(flatten)]
    subject: SubjectArguments,
}

#[derive(Debug, Args)]
#[command(after_help = "Caches:
  dense-hbm       dense attention, all KV in HBM
  dense-streamed  dense attention, all KV from the host in every step. On a GPU a bound: the copy engine beside the resident step
  no-cache        the method; every step fetches all that it selects
  previous-step   keeps what the step before selected
  serial          keeps --buffering times as much besides; Attention waits for all pages of its layer. On a GPU
  bucketed-lru    the same, which is what serves: on a GPU Attention begins with the pages that are there
  in-halves       the same, two halves of the batch in alternation: one computes while the other's pages come.
                  On a GPU, of batches of 32 and more
  exact-lru       the same size, exact; replayed from what was selected
  belady          the same size and the future known: nobody misses less; replayed
  resident        nothing misses: the least that a step of the method can take

x sum and x max are a step over what it cannot be shorter than: the resident step and the fetched bytes at the speed of dense-streamed, one after the
other or at once; they need both of these caches.
Replayed caches have hits and bytes; their times lie between the measured resident and no-cache steps, by the bytes fetched.

Examples:
  spinkv bench decode --contexts 1k --batches 1,2        # the bundled model on the CPU
  spinkv bench decode --backend cuda --random-weights qwen3-14b --layers 8 --batches 1,8,16 --contexts 16k,32k --budgets 512,2048
  spinkv bench decode --backend cuda --random-weights qwen3-14b --layers 8 --hit-ratio 0.9 --caches bucketed-lru,resident
  spinkv bench decode --backend cuda --random-weights qwen3-14b --layers 8 --contexts 32k --kv-gib 16 --batches fit")]
pub(super) struct DecodeArguments {
    /// Methods, as for `spinkv generate --method`; options of a method's own follow as NAME:OPTION=VALUE
    #[arg(
        long,
        value_name = "NAMES",
        value_delimiter = ',',
        default_value = "shadowkv",
        help_heading = "What to measure"
    )]
    methods: Vec<String>,

    /// Budgets, for methods that have one: as for `spinkv generate --budget`
    #[arg(
        long,
        value_name = "BUDGETS",
        value_delimiter = ',',
        default_value = "512",
        help_heading = "What to measure"
    )]
    budgets: Vec<String>,

    /// Requests of a step; fit for as many as --kv-gib holds
    #[arg(
        long,
        value_name = "REQUESTS",
        value_delimiter = ',',
        default_value = "1",
        help_heading = "What to measure"
    )]
    batches: Vec<BatchSize>,

    /// Tokens of each request before the first step: 4096 or 4k
    #[arg(long, value_name = "TOKENS", value_delimiter = ',', default_value = "4k", value_parser = tokens,
          help_heading = "What to measure")]
    contexts: Vec<usize>,

    /// Cache pages beyond those that one step needs, as multiples of them
    #[arg(long, value_name = "RATIOS", value_delimiter = ',', default_values_t = [DEFAULT_BUFFERING], value_parser = buffering,
          help_heading = "What to measure")]
    buffering: Vec<f64>,

    /// What is kept between steps; see below
    #[arg(
        long,
        value_name = "NAMES",
        value_delimiter = ',',
        default_value = "dense-hbm,dense-streamed,no-cache,previous-step,bucketed-lru,exact-lru,belady,resident",
        help_heading = "What to measure"
    )]
    caches: Vec<Caching>,

    /// KV memory of the whole model on the GPU, in GiB: caches, summaries, tables, steady zones, K and V of two layers of the longest prompt. Points
    /// beyond it are skipped
    #[arg(long, value_name = "GIB", value_parser = gib, help_heading = "What to measure")]
    kv_gib: Option<f64>,

    /// Draw tokens a second over the batch to FILE, as SVG
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,

    #[command(flatten)]
    steps: StepArguments,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  spinkv bench ablation --context 1k --budget 128      # the bundled model on the CPU
  spinkv bench ablation --backend cuda --random-weights qwen3-14b --layers 8 --context 32k --batch 8 --json > ablation.json")]
pub(super) struct AblationArguments {
    /// The method, as for `spinkv generate --method`; options of its own follow as NAME:OPTION=VALUE
    #[arg(long, value_name = "NAME", default_value = "shadowkv", help_heading = "What to measure")]
    method: String,

    /// Its budget: as for `spinkv generate --budget`
    #[arg(long, value_name = "BUDGET", default_value = "512", help_heading = "What to measure")]
    budget: String,

    /// Requests of a step
    #[arg(long, value_name = "REQUESTS", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024),
          help_heading = "What to measure")]
    batch: u32,

    /// Tokens of each request before the first step: 4096 or 4k
    #[arg(long, value_name = "TOKENS", default_value = "4k", value_parser = tokens, help_heading = "What to measure")]
    context: usize,

    /// Sizes of the cache: pages beyond those that one step needs, as multiples of them; the largest one is the serving one
    #[arg(long, value_name = "RATIOS", value_delimiter = ',', default_value = "0.5,1,2,3,5", value_parser = buffering,
          help_heading = "What to measure")]
    buffering: Vec<f64>,

    /// Draw hit ratio and time over cache size to FILE, as SVG
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,

    #[command(flatten)]
    steps: StepArguments,
}

/// Runs `spinkv bench decode`.
pub(super) fn run(arguments: &DecodeArguments) -> Result<()> {
    let methods = methods(&arguments.methods)?;
    let kv_bytes = arguments.kv_gib.map(|gib| (gib * f64::from(1 << 30)) as u64);
    let mut caches = arguments.caches.clone();
    caches.sort_unstable();
    caches.dedup();
    if !arguments.steps.subject.is_on_gpu() && caches.iter().any(|caching| caching.is_of_gpu()) {
        return Err(Error::UnsupportedByBackend { backend: "cpu", what: "overlap Retrieve with anything" });
    }
    let steps = &arguments.steps;
    let (facts, options, points) = steps.measure(methods, &arguments.budgets, |options| DecodeOptions {
        batches: arguments.batches.clone(),
        contexts: arguments.contexts.clone(),
        bufferings: arguments.buffering.clone(),
        caches,
        kv_bytes,
        ..options
    })?;
    let report = DecodeReport { facts, warm_up: options.warm_up, steps: options.steps, kv_bytes, points };
    // Figures that cannot be written cost no results.
    print(steps.subject.json, &report)?;
    drawn(arguments.plot.as_deref(), |path| plot::throughput(path, &report))
}

/// Draws to a file, if one is given.
fn drawn(path: Option<&Path>, draw: impl FnOnce(&Path) -> std::result::Result<(), String>) -> Result<()> {
    let Some(path) = path else { return Ok(()) };
    draw(path).map_err(|reason| Error::Plot { path: path.to_owned(), reason })
}

/// Runs `spinkv bench ablation`.
pub(super) fn run_ablation(arguments: &AblationArguments) -> Result<()> {
    let methods = methods(std::slice::from_ref(&arguments.method))?;
    let (steps, on_gpu) = (&arguments.steps, arguments.steps.subject.is_on_gpu());
    let budgets = std::slice::from_ref(&arguments.budget);
    let (facts, options, points) = steps.measure(methods, budgets, |options| DecodeOptions {
        batches: vec![BatchSize::Fixed(arguments.batch as usize)],
        contexts: vec![arguments.context],
        bufferings: arguments.buffering.clone(),
        caches: Caching::ALL.into_iter().filter(|caching| on_gpu || !caching.is_of_gpu()).collect(),
        ..options
    })?;
    let report = AblationReport::new(facts, (options.warm_up, options.steps), points);
    // Figures that cannot be written cost no results.
    print(steps.subject.json, &report)?;
    drawn(arguments.plot.as_deref(), |path| plot::ablation(path, &report))
}

fn methods(names: &[String]) -> Result<Vec<MethodChoice>> {
    names.iter().filter(|name| !name.trim().is_empty()).map(|name| name.parse()).collect()
}

fn print<T: serde::Serialize + std::fmt::Display>(json: bool, report: &T) -> Result<()> {
    let mut output = Output::default();
    let as_json = || serde_json::to_string_pretty(report).expect("a report is plain data") + "\n";
    let _ = output.write(&if json { as_json() } else { report.to_string() });
    output.finish()
}

impl StepArguments {
    /// Measures what `with` makes of the options that both benches have in common.
    fn measure(
        &self,
        methods: Vec<MethodChoice>,
        budgets: &[String],
        with: impl FnOnce(DecodeOptions) -> DecodeOptions,
    ) -> Result<(Facts, DecodeOptions, Vec<Point>)> {
        let subject = self.subject.subject(&methods)?;
        let budgets = budgets.iter().filter(|budget| !budget.trim().is_empty());
        let selections = match (self.selections.as_deref(), self.hit_ratio) {
            (Some("model"), _) => Selections::Model,
            (None, None) if !self.subject.is_random() => Selections::Model,
            (_, hit_ratio) => Selections::Drawn { hit_ratio },
        };
        let mut names = self.coded.clone();
        names.sort_unstable();
        names.dedup();
        let coded = names.iter().map(|name| name.parse::<HostFormat>()).collect::<spinkv::Result<_>>()?;
        let options = with(DecodeOptions {
            methods,
            budgets: budgets.map(|budget| budget.parse::<Budget>()).collect::<spinkv::Result<_>>()?,
            batches: Vec::new(),
            contexts: Vec::new(),
            bufferings: Vec::new(),
            caches: Vec::new(),
            warm_up: self.warm_up as usize,
            steps: self.steps as usize,
            selections,
            kv_bytes: None,
            steady: subject.steady,
            pages: subject.pages,
            coded,
            gates: subject.gates.clone(),
            seed: self.subject.seed,
        });
        // What cannot run is refused before a model is loaded.
        options.check(&subject.config)?;
        let shown = Shown::new();
        let mut listen = |message: &str, done, of| shown.hear(message, done, of);
        let mut facts = subject.facts.clone();
        facts.notes = notes(selections, subject.facts.random_weights);
        let all_layers = facts.all_layers;
        let points = match subject.backend {
            BackendKind::Cpu => {
                facts.device = cpu();
                let model = Model::open(&subject.directory, subject.config.clone(), |_, _| {})?;
                let mut machine = CpuMachine::new(&model, &subject.prompts);
                decode(&mut machine, &options, all_layers, &mut listen)?
            }
            #[cfg(all(
                feature = "cuda",
                target_os = "linux",
                any(target_arch = "x86_64", target_arch = "aarch64")
            ))]
            BackendKind::Cuda => {
                let mut machine = self.subject.on_gpu(&subject)?;
                let points = decode(&mut machine, &options, all_layers, &mut listen)?;
                facts.device = machine.device();
                if self.subject.is_random() {
                    facts.notes.push(
                        "contexts are projected from embeddings, without a prompt's attention: as many bytes in the same places"
                            .to_owned(),
                    );
                }
                points
            }
        };
        shown.finish();
        Ok((facts, options, points))
    }
}
