//! One prompt in, one text out.

use std::fmt;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use serde::Serialize;
use spinkv::algorithms::{self, MethodOptions};
use spinkv::backend::cpu::CpuBackend;
use spinkv::memory::{HostLayout, MemoryLimits, MemoryUsage, RequestPlan};
use spinkv::pipeline::{Budget, Counters, DEFAULT_BUFFERING, Pipeline, StageTimes};
use spinkv::{KvConfig, KvShape};

use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::memory::PeakBound;
use crate::model::{DecodeToken, Model};
use crate::pages::PageOptions;
use crate::runner::{CpuRunner, Runner};
use crate::sampling::{Sampler, SamplingParams};
use crate::simulator::{Recorder, Trace};
use crate::tokenizer::Tokenizer;

/// What to generate, with which method, in how much memory.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// The method's name; see [`algorithms::NAMES`].
    pub method: String,
    /// The method's budget and steady zone.
    pub method_options: MethodOptions,
    /// How KV pages are made.
    pub pages: PageOptions,
    /// How much of each tier may be used.
    pub limits: MemoryLimits,
    /// Bytes of host memory to make real beforehand.
    pub reserve_host_bytes: u64,
    /// Cache pages wanted beyond the mandatory ones, as a multiple of them.
    pub buffering: f64,
    /// The most tokens to generate, at least 1; fewer if the model's context ends before.
    pub max_tokens: usize,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Whether to go on past the model's end token.
    pub ignore_eos: bool,
    /// Whether to record which pages the steps select.
    pub record_trace: bool,
}

impl Default for GenerateOptions {
    /// ShadowKV with 1024 tokens on bf16 pages of 8 tokens; 64 tokens, greedily.
    fn default() -> Self {
        Self {
            method: "shadowkv".to_owned(),
            method_options: MethodOptions::default(),
            pages: PageOptions::default(),
            limits: MemoryLimits::default(),
            reserve_host_bytes: 0,
            buffering: DEFAULT_BUFFERING,
            max_tokens: 64,
            sampling: SamplingParams::greedy(),
            ignore_eos: false,
            record_trace: false,
        }
    }
}

/// What a generation tells while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// Host memory that is ready, of what is reserved.
    Reserve {
        /// Bytes that are ready.
        done: usize,
        /// Bytes that will be.
        total: usize,
    },
    /// Parts of the prompt that are done.
    Prefill {
        /// Parts done.
        done: usize,
        /// All parts.
        total: usize,
    },
    /// The next piece of text.
    Text(&'a str),
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// The model chose an end token.
    Stop,
    /// The number of tokens asked for, or the model's context, is reached.
    Length,
    /// The listener broke off.
    Cancelled,
}

impl fmt::Display for Finish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stop => "end token",
            Self::Length => "length",
            Self::Cancelled => "cancelled",
        })
    }
}

/// A finished generation.
#[derive(Clone, Debug)]
pub struct Generation {
    /// The text, without end tokens.
    pub text: String,
    /// The tokens, an end token included.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Time from the first layer to the first token.
    pub prefill_time: Duration,
    /// Time of all further tokens.
    pub decode_time: Duration,
    /// How much a step could select, where the method selects.
    pub budget: Option<Budget>,
    /// What the request was given.
    pub plan: RequestPlan,
    /// The layout of pages on the GPU, and what of them is on the host.
    pub layout: HostLayout,
    /// What happened to pages.
    pub counters: Counters,
    /// Bytes in use at the end.
    pub usage: MemoryUsage,
    /// Time in the stages of decode steps and of the prompt, where they are timed one by one.
    pub stages: Option<(StageTimes, StageTimes)>,
    /// The bound of the resident memory of a CPU generation.
    pub peak_bound: Option<PeakBound>,
    /// What the steps selected, if that was asked for.
    pub trace: Option<Trace>,
}

/// A prompt that can be generated from: encoded, and checked against a model's configuration and the options.
/// Making one costs little, so what cannot run is refused before weights are loaded.
#[derive(Debug)]
pub struct Prepared {
    prompt: Vec<u32>,
    max_new: usize,
    kv: KvConfig,
    limits: MemoryLimits,
    reserve_host_bytes: u64,
    buffering: f64,
    sampler: Sampler,
    ignore_eos: bool,
    /// The name of the trace to record.
    trace: Option<String>,
}

impl Prepared {
    /// Encodes and checks.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`], [`Error::PromptTooLong`], [`Error::NothingToGenerate`],
    /// [`Error::TokenOutOfVocabulary`], invalid sampling parameters, and what the method or the memory refuses
    /// ([`Error::Kv`]).
    pub fn new(
        config: &ModelConfig,
        tokenizer: &Tokenizer,
        prompt: &str,
        options: &GenerateOptions,
    ) -> Result<Self> {
        let (kv, sampler) = Self::check(config, options)?;
        if prompt.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        let limit = config.max_position_embeddings;
        // Encoding takes time and memory in proportion; a text that cannot fit is not encoded.
        let tokens = tokenizer.least_tokens(prompt);
        if tokens > limit {
            return Err(Error::PromptTooLong { tokens, limit });
        }
        Self::of_tokens(config, tokenizer.encode(prompt)?, options, kv, sampler)
    }

    /// The same of a prompt that is tokens already.
    ///
    /// # Errors
    /// As for [`new`](Self::new).
    pub fn from_tokens(config: &ModelConfig, prompt: Vec<u32>, options: &GenerateOptions) -> Result<Self> {
        let (kv, sampler) = Self::check(config, options)?;
        Self::of_tokens(config, prompt, options, kv, sampler)
    }

    /// What can be checked before there is a prompt.
    fn check(config: &ModelConfig, options: &GenerateOptions) -> Result<(KvConfig, Sampler)> {
        let shape = KvShape::new(config.layers, config.query_heads, config.kv_heads, config.head_dim)?;
        let method_options =
            MethodOptions { rotary: Some(config.rotary()), ..options.method_options.clone() };
        let method = algorithms::by_name(&options.method, &method_options)?;
        let kv = KvConfig::new(shape, options.pages.layout(config.head_dim)?, method)?;
        let sampler = Sampler::new(options.sampling.clone())?;
        if options.max_tokens == 0 { Err(Error::NothingToGenerate) } else { Ok((kv, sampler)) }
    }

    fn of_tokens(
        config: &ModelConfig,
        prompt: Vec<u32>,
        options: &GenerateOptions,
        kv: KvConfig,
        sampler: Sampler,
    ) -> Result<Self> {
        let limit = config.max_position_embeddings;
        let max_new = new_tokens(prompt.len(), options.max_tokens, limit)?;
        let vocab_size = config.vocab_size;
        if let Some(id) = prompt.iter().copied().find(|id| *id as usize >= vocab_size) {
            return Err(Error::TokenOutOfVocabulary { id, vocab_size });
        }

        let (limits, buffering, ignore_eos) = (options.limits, options.buffering, options.ignore_eos);
        let trace = options.record_trace.then(|| options.method.clone());
        let reserve_host_bytes = options.reserve_host_bytes;
        limits.check_reserve(reserve_host_bytes)?;
        let prepared =
            Self { prompt, max_new, kv, limits, reserve_host_bytes, buffering, sampler, ignore_eos, trace };
        let plan = RequestPlan::new(&prepared.kv, prepared.max_context(), buffering)?;
        plan.check_limits(&prepared.kv, &limits)?;
        Ok(prepared)
    }

    fn pipeline(
        &self,
        listen: &mut impl FnMut(Event<'_>) -> ControlFlow<()>,
    ) -> Result<Pipeline<CpuBackend>> {
        let mut backend = CpuBackend::new(self.kv.clone(), self.limits);
        if self.reserve_host_bytes > 0 {
            backend = backend.with_reserved_host(self.reserve_host_bytes, &mut |progress| {
                let (done, total) = (progress.ready_bytes as usize, progress.total_bytes as usize);
                // Who breaks off is heard at the first part of the prompt.
                let _ = listen(Event::Reserve { done, total });
            })?;
        }
        Ok(Pipeline::new(backend).with_buffering(self.buffering))
    }

    /// The KV memory that it was checked for.
    pub fn kv(&self) -> &KvConfig {
        &self.kv
    }

    /// How much of each tier may be used, and how many buffering pages are wanted for each mandatory one.
    pub fn memory(&self) -> (MemoryLimits, f64) {
        (self.limits, self.buffering)
    }

    /// Tokens of the longest context. The last token is never passed through the model.
    pub fn max_context(&self) -> usize {
        self.prompt.len() + self.max_new - 1
    }
}

/// Generates on the CPU from a prompt that was prepared for this model and tokenizer; `listen` hears of progress and text as
/// they come, and may break off.
///
/// # Errors
/// [`Error::NoFiniteLogit`], and failures of the memory ([`Error::Kv`]).
pub fn generate(
    model: &Model,
    tokenizer: &Tokenizer,
    prepared: Prepared,
    mut listen: impl FnMut(Event<'_>) -> ControlFlow<()>,
) -> Result<Generation> {
    let start = Instant::now();
    let pipeline = prepared.pipeline(&mut listen)?;
    let bound = |plan: &RequestPlan| {
        PeakBound::new(model, &prepared.kv, plan, prepared.prompt.len(), prepared.reserve_host_bytes)
    };
    let plan = pipeline.plan(prepared.max_context())?;
    let peak_bound = bound(&plan);
    let generation = run(&mut CpuRunner::new(model, pipeline), Some(tokenizer), prepared, listen, start)?;
    Ok(Generation { peak_bound: Some(peak_bound), ..generation })
}

/// Generates from a prompt that was prepared for the runner's model and a tokenizer; `listen` hears of progress and text as they come,
/// and may break off. Without a tokenizer there are tokens and no text.
///
/// # Errors
/// [`Error::NoFiniteLogit`], [`Error::UnsupportedByBackend`] for a trace of what steps select where it is not the CPU's, and failures of
/// the memory ([`Error::Kv`]).
pub fn generate_with(
    runner: &mut impl Runner,
    tokenizer: Option<&Tokenizer>,
    prepared: Prepared,
    listen: impl FnMut(Event<'_>) -> ControlFlow<()>,
) -> Result<Generation> {
    run(runner, tokenizer, prepared, listen, Instant::now())
}

fn run(
    runner: &mut impl Runner,
    tokenizer: Option<&Tokenizer>,
    prepared: Prepared,
    mut listen: impl FnMut(Event<'_>) -> ControlFlow<()>,
    start: Instant,
) -> Result<Generation> {
    let max_context = prepared.max_context();
    let Prepared { prompt, max_new, kv, mut sampler, ignore_eos, trace, .. } = prepared;
    let request = runner.admit(max_context)?;
    let plan = runner.plan(request)?;
    let mut recorder = match (trace, runner.cpu_pipeline()) {
        (Some(name), Some(pipeline)) => Some(Recorder::new(pipeline, &name, prompt.len(), max_context)),
        (Some(_), None) => {
            runner.release(request);
            return Err(Error::UnsupportedByBackend { backend: "cuda", what: "record what steps select" });
        }
        (None, _) => None,
    };

    let (mut text, mut tokens) = (String::new(), Vec::new());
    let mut stream = tokenizer.map(Tokenizer::stream);
    let mut prefill_time = None;
    let outcome = (|| {
        let mut progress = |done, total| listen(Event::Prefill { done, total });
        let logits = runner.prefill(request, &prompt, &mut progress)?;
        let mut token = sampler.sample(&logits)?;
        let mut say = |piece: Option<String>| match piece {
            Some(piece) => {
                text.push_str(&piece);
                listen(Event::Text(&piece))
            }
            None => ControlFlow::Continue(()),
        };
        let finish = loop {
            prefill_time.get_or_insert_with(|| start.elapsed());
            tokens.push(token);
            if !ignore_eos && runner.config().eos_token_ids.contains(&token) {
                break Finish::Stop;
            }
            let piece = stream.as_mut().map_or(Ok(None), |stream| stream.push(token))?;
            if say(piece).is_break() {
                break Finish::Cancelled;
            }
            if tokens.len() == max_new {
                break Finish::Length;
            }
            token = runner.next_token(DecodeToken { request, token }, &mut sampler)?;
            if let (Some(recorder), Some(pipeline)) = (&mut recorder, runner.cpu_pipeline()) {
                recorder.step(pipeline, request);
            }
        };
        if finish != Finish::Cancelled {
            let _ = say(stream.map_or(Ok(None), |mut stream| stream.finish())?);
        }
        Ok(finish)
    })();
    let finish = match outcome {
        Err(Error::Cancelled) => Ok(Finish::Cancelled),
        other => other,
    };
    let total_time = start.elapsed();
    let prefill_time = prefill_time.unwrap_or(total_time);
    let (counters, usage, stages) = (runner.counters(), runner.usage(), runner.stage_times());
    runner.release(request);
    let finish = finish?;
    Ok(Generation {
        text,
        tokens,
        finish,
        prompt_tokens: prompt.len(),
        prefill_time,
        decode_time: total_time - prefill_time,
        budget: kv.method().select().budget(),
        peak_bound: None,
        plan,
        layout: kv.host_layout(),
        counters: counters?,
        usage,
        stages,
        trace: recorder.map(Recorder::finish),
    })
}

/// How many tokens may be generated after a prompt: what was asked for, as far as positions go.
pub(crate) fn new_tokens(prompt: usize, wanted: usize, max_positions: usize) -> Result<usize> {
    if prompt == 0 {
        return Err(Error::EmptyPrompt);
    }
    if prompt > max_positions {
        return Err(Error::PromptTooLong { tokens: prompt, limit: max_positions });
    }
    // The last token takes no position: nothing is computed from it.
    Ok(wanted.min(max_positions - prompt + 1))
}
