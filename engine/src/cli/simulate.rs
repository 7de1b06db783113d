use std::fmt::Write;
use std::path::{Path, PathBuf};

use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use spinkv_engine::simulator::plot::{Quantity, Reference, plot};
use spinkv_engine::simulator::{
    Batch, Checkpoints, Experiment, Locality, Outcome, Outcomes, Policy, Preset, StepModel, StepTime, Trace,
    TraceSize, calibrate, checkpoints,
};
use spinkv_engine::{Error, Result};

use super::output::Output;

#[derive(Debug, Args)]
#[command(after_help = "Presets:
  calibrated   pages of 8 tokens, 256 a step; misses 30, 13.4, 6.7 % at 1x, 2x, 4x, as measured
  shadowkv     chunks of 8 tokens, 256 a step
  retroinfer   clusters of 16 tokens on average, each on pages of its own, 1.8 % a step
  seer         blocks of 64 tokens, a threshold: each head and step selects its own number
  quest        pages of 16 tokens, 128 a step
  uniform      adversary: no locality
  cyclic       adversary: LRU's worst case at 2x
  phase        adversary: another working set every 100 steps
  hot-head     adversary: one head of each layer selects 4 times as much

Examples:
  spinkv simulate
  spinkv simulate --preset shadowkv,seer --policy lru,bucketed-64,bucketed-4 --plot plots
  spinkv simulate --preset calibrated --csv > calibrated.csv
  spinkv generate --record-trace needle.trace && spinkv simulate --trace needle.trace --warm-up 0")]
pub(crate) struct SimulateArguments {
    /// Traces to generate
    #[arg(long, value_name = "NAMES", value_delimiter = ',', help_heading = "Traces")]
    preset: Vec<Preset>,

    /// Files of traces to read [default: none; the preset calibrated if nothing is named]
    #[arg(long, value_name = "FILES", value_delimiter = ',', help_heading = "Traces")]
    trace: Vec<PathBuf>,

    /// Tokens of a generated trace's context at the first step
    #[arg(long, default_value_t = 32_768, value_name = "TOKENS", help_heading = "Traces",
          value_parser = clap::value_parser!(u32).range(1024..=1 << 20))]
    context: u32,

    /// Steps of a generated trace
    #[arg(long, default_value_t = 500, value_name = "STEPS", help_heading = "Traces",
          value_parser = clap::value_parser!(u32).range(1..=100_000))]
    steps: u32,

    /// Layers of a generated trace; the first quarter has less locality
    #[arg(long, default_value_t = 4, value_name = "LAYERS", help_heading = "Traces",
          value_parser = clap::value_parser!(u32).range(1..=128))]
    layers: u32,

    /// KV heads of a layer of a generated trace
    #[arg(long, default_value_t = 2, value_name = "HEADS", help_heading = "Traces",
          value_parser = clap::value_parser!(u32).range(1..=128))]
    heads: u32,

    /// Seed of generated traces, and of policies that draw
    #[arg(long, default_value_t = 0, value_name = "SEED", help_heading = "Traces")]
    seed: u64,

    /// Also write each trace to DIR/NAME.trace
    #[arg(long, value_name = "DIR", help_heading = "Traces")]
    save: Option<PathBuf>,

    /// Policies: belady, lru, bucketed-64, bucketed-16, bucketed-4, random, fifo, previous-step
    #[arg(
        long,
        value_name = "NAMES",
        value_delimiter = ',',
        default_value = "belady,lru,bucketed-64,random,fifo,previous-step",
        help_heading = "Caches"
    )]
    policy: Vec<Policy>,

    /// Slots of a row, in pages of its largest step; at least 1
    #[arg(
        long,
        value_name = "RATIOS",
        value_delimiter = ',',
        default_value = "1,1.5,2,3,4,5,6,8",
        value_parser = ratio,
        help_heading = "Caches"
    )]
    size: Vec<f64>,

    /// Steps before counting begins, while caches fill
    #[arg(long, default_value_t = 100, value_name = "STEPS", help_heading = "Caches")]
    warm_up: usize,

    /// GPU memory for caches and summaries of all requests, in GiB: the modelled batch is what fits
    #[arg(long, default_value_t = 16.0, value_name = "GIB", value_parser = gib, help_heading = "Model")]
    kv_gib: f64,

    /// Model this many requests a step, whatever memory they take
    #[arg(long, value_name = "REQUESTS", help_heading = "Model",
          value_parser = clap::value_parser!(u32).range(1..=4096))]
    batch: Option<u32>,

    /// Draw hit ratio, transfers and throughput of each trace to DIR, as SVG
    #[arg(long, value_name = "DIR")]
    plot: Option<PathBuf>,

    /// Print one JSON object instead of tables
    #[arg(long, conflicts_with = "csv")]
    json: bool,

    /// Print one line of CSV for each trace, policy and size
    #[arg(long)]
    csv: bool,

    /// Instead: find the parameters of the preset calibrated anew. Takes minutes
    #[arg(long)]
    calibrate: bool,
}

fn ratio(text: &str) -> std::result::Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| "a number such as 2 or 1.5".to_owned())?;
    let allowed = (1.0..=1000.0).contains(&value);
    if allowed { Ok(value) } else { Err("a step's own pages need a slot each: from 1 to 1000".to_owned()) }
}

fn gib(text: &str) -> std::result::Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| "a number such as 16".to_owned())?;
    if value > 0.0 && value <= 1e6 { Ok(value) } else { Err("more than 0 GiB, at most 1000000".to_owned()) }
}

/// Runs `spinkv simulate`.
pub(crate) fn run(arguments: &SimulateArguments) -> Result<()> {
    if arguments.calibrate {
        return run_calibration(arguments.seed);
    }
    let traces = arguments.traces()?;
    if let Some(directory) = &arguments.save {
        create(directory)?;
        for trace in &traces {
            trace.save(&directory.join(format!("{}.trace", trace.name)))?;
        }
    }
    let mut sizes = arguments.size.clone();
    sizes.sort_by(f64::total_cmp);
    sizes.dedup();
    let mut policies = arguments.policy.clone();
    policies.sort();
    policies.dedup();
    let experiment = Experiment {
        policies,
        sizes,
        warm_up: arguments.warm_up,
        seed: arguments.seed,
        batch: arguments.batch.map_or(Batch::Fits(arguments.kv_gib * f64::from(1 << 30)), Batch::Fixed),
    };
    let bar = progress_bar("replaying", experiment.replays(&traces));
    let outcomes = experiment.run(&traces, || bar.inc(1));
    bar.finish_and_clear();
    let report = Report::new(&experiment, &traces, outcomes);

    if let Some(directory) = &arguments.plot {
        create(directory)?;
        report.plot(directory)?;
    }
    let mut output = Output::default();
    let text = if arguments.json {
        serde_json::to_string_pretty(&report).expect("a report is plain data") + "\n"
    } else if arguments.csv {
        report.csv()
    } else {
        report.tables()
    };
    let _ = output.write(&text);
    output.finish()
}

impl SimulateArguments {
    fn traces(&self) -> Result<Vec<Trace>> {
        let mut presets = self.preset.clone();
        if presets.is_empty() && self.trace.is_empty() {
            presets.push(Preset::Calibrated);
        }
        // Files first: what cannot be read is said before minutes are spent.
        let files: Vec<_> =
            self.trace.iter().map(|path| Trace::load(path)).collect::<std::result::Result<_, _>>()?;
        let size = TraceSize {
            context: self.context as usize,
            steps: self.steps as usize,
            layers: self.layers as usize,
            heads: self.heads as usize,
        };
        let bar = progress_bar("generating", presets.len());
        let mut traces = Vec::new();
        for preset in presets {
            traces.push(Trace::generate(preset, size, self.seed));
            bar.inc(1);
        }
        bar.finish_and_clear();
        traces.extend(files);
        Ok(traces)
    }
}

fn create(directory: &Path) -> Result<()> {
    std::fs::create_dir_all(directory).map_err(|source| Error::Io { path: directory.to_owned(), source })
}

/// A bar on standard error, if that is a terminal.
fn progress_bar(message: &'static str, length: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} [{bar:40}] {pos}/{len} {elapsed} (left: {eta})")
        .expect("the template is valid")
        .progress_chars("=> ");
    let bar = ProgressBar::with_draw_target(Some(length as u64), ProgressDrawTarget::stderr());
    bar.with_style(style).with_message(message)
}

fn run_calibration(seed: u64) -> Result<()> {
    const ROWS: usize = 4;
    const STEPS: usize = 500;
    let bar = progress_bar("calibrating", 0);
    let found = calibrate(Locality::CALIBRATED, Checkpoints::HISPARSE, seed, (ROWS, STEPS), |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    });
    bar.finish_and_clear();
    let mut output = Output::default();
    let of = |locality| checkpoints(locality, seed, ROWS, STEPS);
    let _ = output.write(&format!(
        "found    {found:?}\nbuilt in {:?}\ntarget   {:?}\nfound    {:?}\nbuilt in {:?}\n",
        Locality::CALIBRATED,
        Checkpoints::HISPARSE,
        of(found),
        of(Locality::CALIBRATED),
    ));
    output.finish()
}

/// What is known of a trace before it is replayed.
#[derive(Debug, Serialize)]
struct TraceFacts {
    name: String,
    rows: usize,
    steps: usize,
    context: u32,
    page_tokens: u32,
    /// Pages of a step, on average.
    selected: f64,
    /// Share of a step's pages that the step before selected as well.
    overlap: f64,
    /// The modelled step of requests that are all in GPU memory.
    dense: StepTime,
    dense_tokens_per_s: f64,
}

#[derive(Debug, Serialize)]
struct Report {
    traces: Vec<TraceFacts>,
    model: StepModel,
    /// GPU memory that the modelled batch fits; none if the batch is fixed.
    kv_gib: Option<f64>,
    warm_up: usize,
    outcomes: Vec<Outcome>,
    probes: u64,
    seconds: f64,
    probes_per_s: f64,
}

impl Report {
    fn new(experiment: &Experiment, traces: &[Trace], found: Outcomes) -> Self {
        let facts = |trace: &Trace| {
            let dense = experiment.dense(trace.page_tokens, trace.context);
            let steps: usize = trace.rows.iter().map(|row| row.steps()).sum();
            TraceFacts {
                name: trace.name.clone(),
                rows: trace.rows.len(),
                steps: trace.steps(),
                context: trace.context,
                page_tokens: trace.page_tokens,
                selected: trace.probes() as f64 / steps.max(1) as f64,
                overlap: trace.overlap(),
                dense,
                dense_tokens_per_s: dense.serial(),
            }
        };
        Self {
            traces: traces.iter().map(facts).collect(),
            model: StepModel::qwen3_14b(traces.first().map_or(8, |trace| trace.page_tokens)),
            kv_gib: match experiment.batch {
                Batch::Fits(bytes) => Some(bytes / f64::from(1 << 30)),
                Batch::Fixed(_) => None,
            },
            warm_up: experiment.warm_up,
            probes_per_s: found.probes as f64 / found.seconds,
            probes: found.probes,
            seconds: found.seconds,
            outcomes: found.outcomes,
        }
    }

    /// The outcomes of each trace, in order.
    fn by_trace(&self) -> impl Iterator<Item = (&TraceFacts, &[Outcome])> {
        let each = self.outcomes.len() / self.traces.len().max(1);
        self.traces.iter().zip(self.outcomes.chunks(each.max(1)))
    }

    fn csv(&self) -> String {
        let mut text =
            "trace,policy,size,slots_per_row,probes,misses,hit_ratio,pcie_bytes_per_step,batch,compute_s,\
                        transfer_s,tokens_per_s,tokens_per_s_overlapped\n"
                .to_owned();
        for (trace, outcomes) in self.by_trace() {
            for one in outcomes {
                let _ = writeln!(
                    text,
                    "{},{},{},{},{},{},{:.6},{:.0},{},{:.6},{:.6},{:.1},{:.1}",
                    one.trace.replace(',', ";"),
                    one.policy,
                    one.size,
                    one.replay.slots as f64 / trace.rows.max(1) as f64,
                    one.replay.probes,
                    one.replay.misses,
                    one.hit_ratio,
                    one.pcie_bytes_per_step,
                    one.step.batch,
                    one.step.compute_s,
                    one.step.transfer_s,
                    one.tokens_per_s,
                    one.tokens_per_s_overlapped,
                );
            }
        }
        text
    }

    fn tables(&self) -> String {
        let mut text = String::new();
        for (trace, outcomes) in self.by_trace() {
            let _ = writeln!(
                text,
                "{}: {} rows x {} steps at {} tokens, {:.0} pages of {} tokens a step, {:.0}% of them again in the next",
                trace.name,
                trace.rows,
                trace.steps,
                trace.context,
                trace.selected,
                trace.page_tokens,
                100.0 * trace.overlap,
            );
            table(&mut text, "hit ratio, %", outcomes, |one| format!("{:.1}", 100.0 * one.hit_ratio));
            table(&mut text, "fetched, MiB a step and request", outcomes, |one| {
                format!("{:.1}", one.pcie_bytes_per_step / f64::from(1 << 20))
            });
            table(&mut text, "modelled tokens/s without and with overlap", outcomes, |one| {
                format!("{:.0} {:.0}", one.tokens_per_s, one.tokens_per_s_overlapped)
            });
            let mut batches = outcomes.to_vec();
            batches.dedup_by_key(|one| one.size);
            let same_policy = batches.iter().take_while(|one| one.policy == outcomes[0].policy);
            let _ = write!(text, "  {:<16}", "batch");
            same_policy.for_each(|one| {
                let _ = write!(text, "{:>11}", one.step.batch);
            });
            let _ = writeln!(
                text,
                "\n  dense, all in GPU memory: {:.0} tokens/s with a batch of {}\n",
                trace.dense_tokens_per_s, trace.dense.batch
            );
        }
        let StepModel { model, weights_s, hbm, pcie, .. } = self.model;
        let _ = writeln!(
            text,
            "model: {model}; weights {:.1} ms, HBM {:.2} TB/s, PCIe {:.0} GB/s; bandwidths alone, no launch gaps\n\
             {:.1} million probes in {:.2} s, {:.1} million/s",
            1e3 * weights_s,
            hbm / 1e12,
            pcie / 1e9,
            self.probes as f64 / 1e6,
            self.seconds,
            self.probes_per_s / 1e6,
        );
        text
    }

    fn plot(&self, directory: &Path) -> Result<()> {
        for (trace, outcomes) in self.by_trace() {
            for quantity in Quantity::ALL {
                let path = directory.join(format!("{}-{}.svg", trace.name, quantity.name()));
                let title = match quantity {
                    Quantity::HitRatio => format!("Hit ratio over cache size: {}", trace.name),
                    Quantity::Transfers => format!("Bytes over PCIe per step: {}", trace.name),
                    Quantity::Throughput => format!("Modelled throughput: {}", trace.name),
                };
                let mut subtitle = format!(
                    "{} tokens of context, {:.0} pages of {} tokens selected per row and step",
                    trace.context, trace.selected, trace.page_tokens
                );
                if quantity == Quantity::Throughput {
                    let batch = outcomes.iter().map(|one| one.step.batch);
                    let (least, most) = (batch.clone().min().unwrap_or(0), batch.max().unwrap_or(0));
                    subtitle = format!(
                        "{}, {}; full: transfers overlapped, dashed: not",
                        self.model.model,
                        match self.kv_gib {
                            Some(gib) => format!("{gib} GiB of KV: batch {most} to {least} as caches grow"),
                            None => format!("batch {most}"),
                        },
                    );
                }
                let dense = Reference {
                    label: format!("dense, batch {}", trace.dense.batch),
                    value: trace.dense_tokens_per_s,
                };
                let reference = Some(&dense).filter(|_| quantity == Quantity::Throughput);
                plot(&path, quantity, (&title, &subtitle), outcomes, reference)
                    .map_err(|reason| Error::Plot { path: path.clone(), reason })?;
            }
        }
        Ok(())
    }
}

/// Policies down, sizes across.
fn table(text: &mut String, title: &str, outcomes: &[Outcome], cell: impl Fn(&Outcome) -> String) {
    let _ = writeln!(text, "  {title}");
    let mut policy = None;
    let sizes = outcomes.iter().take_while(|one| one.policy == outcomes[0].policy);
    let _ = write!(text, "  {:<16}", "");
    sizes.for_each(|one| {
        let _ = write!(text, "{:>11}", format!("{}x", one.size));
    });
    for one in outcomes {
        if policy != Some(one.policy) {
            policy = Some(one.policy);
            let _ = write!(text, "\n  {:<16}", one.policy);
        }
        let _ = write!(text, "{:>11}", cell(one));
    }
    text.push('\n');
}
