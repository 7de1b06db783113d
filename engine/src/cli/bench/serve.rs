use std::cell::RefCell;
use std::ffi::OsString;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use spinkv_engine::bench::load::{
    Client, Exchange, Lengths, LoadError, LoadPoint, LoadReport, Plan, PlanOptions, RunOptions, Scrape, Slo,
    Texts,
};
use spinkv_engine::bench::{Prompts, load, plot};
use spinkv_engine::tokenizer::Tokenizer;
use spinkv_engine::{Error, Result};

use super::super::output::Output;
use super::super::serve::OwnServer;
use super::subject::Shown;
use super::tokens;

#[derive(Debug, Args)]
#[command(after_help = "Columns:
  rate         sessions that arrive a second; inf: all at once
  batch        requests that decode at a time, in the mean over the run: from the first text of each to its last
  in flight    requests that are there at a time, waiting ones included
  good/s       requests a second that kept to all of --slo-ttft, --slo-tpot and --slo-e2e
  TTFT         from when a request should arrive to its first text
  TPOT         from there to the last text, over the tokens behind the first one; a figure for each request
  ITL          from one piece of text to the next, of all requests together
  E2E          from when a request should arrive to its end

Examples:
  spinkv bench serve --lengths 1k:16 --requests 8 --rates 1,2,inf         # the bundled model on the CPU, in a server of its own
  spinkv bench serve --lengths longbench-v2 --scale 0.25 --rates 0.5,1,2 -- --backend cuda --model DIR --max-batch 32
  spinkv bench serve --url http://127.0.0.1:8000 --tokenizer DIR --turns 4 --question 200 --lengths 8k:256 --rates 0.2
  spinkv bench serve --url http://other:8000 --tokenizer DIR --name other --rates 1,2 --json > other.json
  spinkv bench serve --rates 1,2 --beside other.json --plot both.svg -- --model DIR
  spinkv bench serve --from one.json --from other.json --plot both.svg")]
pub(super) struct LoadArguments {
    /// An endpoint of OpenAI's API, such as http://127.0.0.1:8000; no TLS [default: a server of its own]
    #[arg(long, value_name = "URL", help_heading = "Server")]
    url: Option<String>,

    /// The model's name there [default: the only one that it has]
    #[arg(long, value_name = "NAME", requires = "url", help_heading = "Server")]
    model: Option<String>,

    /// The endpoint's key; prefer the variable, since others can see flags
    #[arg(
        long,
        value_name = "KEY",
        env = "SPINKV_BENCH_API_KEY",
        hide_env_values = true,
        requires = "url",
        help_heading = "Server"
    )]
    api_key: Option<String>,

    /// Flags of `spinkv serve`, for the server of its own
    #[arg(last = true, value_name = "FLAGS", conflicts_with = "url")]
    server: Vec<OsString>,

    /// How long requests are: longbench-v2, longgenbench, or tokens of all prompts and answers, such as 4k:128
    #[arg(long, value_name = "LENGTHS", default_value = "1k:32", help_heading = "Load")]
    lengths: String,

    /// That many times as long, prompts and answers
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0, help_heading = "Load")]
    scale: f64,

    /// Sessions that arrive a second, one measurement for each rate; inf: all at once
    #[arg(long, value_name = "RATES", value_delimiter = ',', default_value = "1", value_parser = rate, help_heading = "Load")]
    rates: Vec<Rate>,

    /// Sessions at each rate; requests, if they have one turn
    #[arg(long, value_name = "COUNT", default_value_t = 16, help_heading = "Load")]
    requests: usize,

    /// Requests of a session; each has all that was said before, and a new question
    #[arg(long, value_name = "COUNT", default_value_t = 1, help_heading = "Load")]
    turns: usize,

    /// Tokens of a later turn's question
    #[arg(long, value_name = "TOKENS", default_value = "64", value_parser = tokens, help_heading = "Load")]
    question: usize,

    /// Seconds between an answer and the session's next question
    #[arg(long, value_name = "SECONDS", default_value_t = 0.0, value_parser = seconds, help_heading = "Load")]
    think: f64,

    /// Seconds for each rate; what is not over by then is cut off, and counted so
    #[arg(long, value_name = "SECONDS", value_parser = seconds, help_heading = "Load")]
    time_limit: Option<f64>,

    /// Seconds for a request, from when it should arrive
    #[arg(long, value_name = "SECONDS", value_parser = seconds, help_heading = "Load")]
    request_timeout: Option<f64>,

    /// Directory with a tokenizer.json, and a haystack.txt if there is one, for prompts [default: the own server's; else ids below --vocab]
    #[arg(long, value_name = "DIR", help_heading = "Prompts")]
    tokenizer: Option<PathBuf>,

    /// Prompts as text rather than as token ids, for endpoints that take no ids
    #[arg(long, help_heading = "Prompts")]
    text: bool,

    /// Random ids below this one, where there is no tokenizer
    #[arg(long, value_name = "IDS", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(2..), help_heading = "Prompts")]
    vocab: u32,

    /// Let answers end where the model ends them; not every endpoint knows the field that is sent otherwise, ignore_eos
    #[arg(long, help_heading = "Prompts")]
    stop_at_eos: bool,

    /// Seed of lengths, arrivals and prompts
    #[arg(long, default_value_t = 0, value_name = "SEED", help_heading = "Prompts")]
    seed: u64,

    /// Milliseconds to the first token, for good requests
    #[arg(long, value_name = "MS", value_parser = milliseconds, help_heading = "Good requests")]
    slo_ttft: Option<f64>,

    /// Milliseconds for each further token
    #[arg(long, value_name = "MS", value_parser = milliseconds, help_heading = "Good requests")]
    slo_tpot: Option<f64>,

    /// Milliseconds to the end
    #[arg(long, value_name = "MS", value_parser = milliseconds, help_heading = "Good requests")]
    slo_e2e: Option<f64>,

    /// What reports and plots call it
    #[arg(long, value_name = "NAME", default_value = "spinkv", help_heading = "Report")]
    name: String,

    /// Print one JSON object instead of tables
    #[arg(long, help_heading = "Report")]
    json: bool,

    /// Draw throughput, TTFT, TPOT and batch over the rate, as SVG
    #[arg(long, value_name = "FILE", help_heading = "Report")]
    plot: Option<PathBuf>,

    /// An earlier --json to draw beside it; may be given more than once
    #[arg(long, value_name = "FILE", requires = "plot", help_heading = "Report")]
    beside: Vec<PathBuf>,

    /// Measure nothing: draw what earlier runs printed with --json, those of one --name as one; may be given more than once
    #[arg(long, value_name = "FILE", requires = "plot", conflicts_with_all = ["url", "server", "beside", "json"], help_heading = "Report")]
    from: Vec<PathBuf>,
}

/// Sessions a second; none: all at once.
#[derive(Clone, Copy, Debug)]
struct Rate(Option<f64>);

fn rate(text: &str) -> std::result::Result<Rate, String> {
    if text == "inf" {
        return Ok(Rate(None));
    }
    match text.parse() {
        Ok(rate) if (1e-6..=1e6).contains(&rate) => Ok(Rate(Some(rate))),
        _ => Err("sessions a second from 0.000001 to 1000000, or inf".to_owned()),
    }
}

fn seconds(text: &str) -> std::result::Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.0..=1e6).contains(&seconds) => Ok(seconds),
        _ => Err("seconds from 0 to 1000000".to_owned()),
    }
}

fn milliseconds(text: &str) -> std::result::Result<f64, String> {
    match text.parse() {
        Ok(ms) if ms > 0.0 && ms <= 1e9 => Ok(ms),
        _ => Err("milliseconds above 0".to_owned()),
    }
}

/// Runs `spinkv bench serve`.
pub(super) fn run(arguments: &LoadArguments) -> Result<()> {
    if let (false, Some(path)) = (arguments.from.is_empty(), &arguments.plot) {
        let reports = arguments.from.iter().map(earlier).collect::<Result<Vec<_>>>()?;
        return drawn(path, &LoadReport::joined(reports));
    }
    let plans = arguments.plans()?;
    let beside = arguments.beside.iter().map(earlier).collect::<Result<Vec<_>>>()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|source| Error::Io { path: "the client's threads".into(), source })?;
    let report = runtime.block_on(arguments.measure(&plans))?;
    if let Some(path) = &arguments.plot {
        let mut reports = vec![report.clone()];
        reports.extend(beside);
        drawn(path, &reports)?;
    }
    let mut output = Output::default();
    let json = || serde_json::to_string_pretty(&report).expect("a report is plain data") + "\n";
    let _ = output.write(&if arguments.json { json() } else { report.to_string() });
    output.finish()
}

fn drawn(path: &Path, reports: &[LoadReport]) -> Result<()> {
    plot::load(path, reports).map_err(|reason| Error::Plot { path: path.to_owned(), reason })
}

/// An earlier report.
fn earlier(path: &PathBuf) -> Result<LoadReport> {
    let text = std::fs::read(path).map_err(|source| Error::Io { path: path.clone(), source })?;
    serde_json::from_slice(&text).map_err(|source| Error::Json { path: path.clone(), source })
}

/// What prompts are made of.
enum Tokens {
    /// A checkpoint's tokenizer, and its text if there is one.
    Of(PathBuf),
    /// Random ids below this one, each of which has its number as text.
    Numbered(usize),
    /// Random ids below this one, of whose text nothing is known.
    Ids(usize),
}

impl LoadArguments {
    fn plan_options(&self) -> Result<PlanOptions> {
        let lengths: Lengths = self.lengths.parse()?;
        Ok(PlanOptions {
            lengths,
            scale: self.scale,
            sessions: self.requests,
            turns: self.turns,
            question: self.question,
            think: Duration::from_secs_f64(self.think),
            seed: self.seed,
        })
    }

    /// A plan for each rate.
    fn plans(&self) -> Result<Vec<(Option<f64>, Plan)>> {
        let options = self.plan_options()?;
        self.rates.iter().map(|Rate(rate)| Ok((*rate, Plan::draw(&options, *rate)?))).collect()
    }

    async fn measure(&self, plans: &[(Option<f64>, Plan)]) -> Result<LoadReport> {
        let Some(url) = &self.url else {
            let own = OwnServer::start(&self.server).await?;
            let longest = self.plan_options()?.longest();
            if longest > own.context {
                return Err(LoadError::TooLong { tokens: longest, limit: own.context }.into());
            }
            let client = Client::new(&own.url, own.key.as_deref())?;
            let tokens = match self.tokenizer.as_deref().or(own.source.directory()) {
                Some(directory) => Tokens::Of(directory.to_owned()),
                None => Tokens::Numbered(own.vocab_size),
            };
            let report = self.load(&client, own.model.clone(), tokens, plans).await;
            own.stop().await?;
            return report;
        };
        let client = Client::new(url, self.api_key.as_deref())?;
        let model = match &self.model {
            Some(model) => model.clone(),
            None => {
                let fault =
                    |fault: load::Fault| LoadError::NoAnswer { url: url.clone(), fault: fault.to_string() };
                match &mut *client.models().await.map_err(fault)? {
                    [only] => std::mem::take(only),
                    models => {
                        return Err(LoadError::Models { url: url.clone(), models: models.to_vec() }.into());
                    }
                }
            }
        };
        let tokens = self.tokenizer.clone().map_or(Tokens::Ids(self.vocab as usize), Tokens::Of);
        self.load(&client, model, tokens, plans).await
    }

    async fn load(
        &self,
        client: &Client,
        model: String,
        tokens: Tokens,
        plans: &[(Option<f64>, Plan)],
    ) -> Result<LoadReport> {
        let (prompts, tokenizer) = match tokens {
            Tokens::Of(directory) => {
                let tokenizer = Tokenizer::open(&directory)?;
                (Prompts::open(&directory, tokenizer.vocab_size(), self.seed)?, Some(tokenizer))
            }
            Tokens::Numbered(count) => (Prompts::random(count, self.seed), Some(Tokenizer::numbered(count)?)),
            Tokens::Ids(count) => (Prompts::random(count, self.seed), None),
        };
        let random = prompts.are_random();
        let texts = Texts::new(prompts, tokenizer, self.text)?;
        texts.check_turns(self.turns)?;
        let texts = Arc::new(texts);
        let limit = |seconds: Option<f64>| seconds.map(Duration::from_secs_f64);
        let mut options = RunOptions {
            model: model.clone(),
            ignore_eos: !self.stop_at_eos,
            request_timeout: limit(self.request_timeout),
            time_limit: limit(self.time_limit),
            first_prompt: 0,
        };
        first_answer(client, &texts, &options).await?;
        let slo = Slo { ttft_ms: self.slo_ttft, tpot_ms: self.slo_tpot, e2e_ms: self.slo_e2e };
        let mut points = Vec::new();
        let shown = Shown::new();
        for (rate, plan) in plans {
            let before = scrape(client).await;
            let at = rate.map_or("all at once".to_owned(), |rate| format!("{rate} a second"));
            let (of, done) = (plan.requests(), RefCell::new(0));
            let mut heard = |_: &load::Record| {
                let done = &mut *done.borrow_mut();
                *done += 1;
                // A log needs no line for each.
                if std::io::stderr().is_terminal() || *done * 10 / of > (*done - 1) * 10 / of {
                    shown.hear(&at, *done - 1, of);
                }
            };
            let records = load::run(client, plan, &texts, &options, &mut heard).await?;
            options.first_prompt += plan.sessions.len();
            // A server that is idle brings its counters up to date within a fifth of a second.
            tokio::time::sleep(Duration::from_millis(300)).await;
            let mut point = LoadPoint::of(*rate, of, &records, &slo, None);
            if let (Some(before), Some(after)) = (before, scrape(client).await) {
                point.server = Some(before.until(&after, point.seconds));
            }
            points.push(point);
        }
        shown.finish();
        let mut notes = Vec::new();
        if self.lengths.starts_with("long") {
            notes.push(
                "lengths are drawn between the published ends, with the published mean: no data set"
                    .to_owned(),
            );
        }
        if random {
            notes.push("prompts are random tokens: hit ratios say nothing of texts".to_owned());
        }
        if points.iter().any(|point| point.tokens_by_chunk) {
            notes.push("the endpoint counts no tokens: each piece of text counts as one".to_owned());
        }
        Ok(LoadReport {
            name: self.name.clone(),
            url: client.base().to_owned(),
            model,
            lengths: self.lengths.clone(),
            scale: self.scale,
            sessions: self.requests,
            turns: self.turns,
            seed: self.seed,
            slo,
            notes,
            points,
        })
    }
}

/// Asks once, before any load and outside of all figures: what an endpoint refuses it would refuse a thousand times.
async fn first_answer(client: &Client, texts: &Texts, options: &RunOptions) -> Result<()> {
    let body = texts.body(options, usize::MAX / 2, 16, 4)?;
    let mut exchange = Exchange::default();
    let answered = client.complete(body, &mut exchange).await;
    let url = client.base().to_owned();
    Ok(answered.map_err(|fault| LoadError::NoAnswer { url, fault: fault.to_string() })?)
}

async fn scrape(client: &Client) -> Option<Scrape> {
    Scrape::parse(&client.get("/metrics").await.ok()?)
}
