//! One prompt in, one text out.

use std::fmt;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use serde::Serialize;
use spinkv::algorithms::{self, MethodOptions};
use spinkv::backend::cpu::CpuBackend;
use spinkv::memory::{KvDtype, MemoryLimits, MemoryUsage, PageLayout, RequestPlan};
use spinkv::pipeline::{Budget, Counters, DEFAULT_BUFFERING, Pipeline, StageTimes};
use spinkv::{KvConfig, KvShape};

use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::memory::PeakBound;
use crate::model::{DecodeToken, Model, Wanted};
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
    /// Tokens of a KV page.
    pub page_tokens: usize,
    /// How KV pages store their elements.
    pub kv_dtype: KvDtype,
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
            page_tokens: 8,
            kv_dtype: KvDtype::Bf16,
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
    /// The page layout.
    pub layout: PageLayout,
    /// What happened to pages.
    pub counters: Counters,
    /// Bytes in use at the end.
    pub usage: MemoryUsage,
    /// Time in the stages of decode steps.
    pub decode_stages: StageTimes,
    /// Time in the stages of the prompt.
    pub prefill_stages: StageTimes,
    /// The bound of the resident memory.
    pub peak_bound: PeakBound,
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
        let shape = KvShape::new(config.layers, config.query_heads, config.kv_heads, config.head_dim)?;
        let layout = PageLayout::new(options.page_tokens, config.head_dim, options.kv_dtype)?;
        let method = algorithms::by_name(&options.method, &options.method_options)?;
        let kv = KvConfig::new(shape, layout, method)?;
        let sampler = Sampler::new(options.sampling.clone())?;
        if options.max_tokens == 0 {
            return Err(Error::NothingToGenerate);
        }
        if prompt.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        let limit = config.max_position_embeddings;
        // Encoding takes time and memory in proportion; a text that cannot fit is not encoded.
        let tokens = tokenizer.least_tokens(prompt);
        if tokens > limit {
            return Err(Error::PromptTooLong { tokens, limit });
        }
        let prompt = tokenizer.encode(prompt)?;
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

    /// The last token is never passed through the model.
    fn max_context(&self) -> usize {
        self.prompt.len() + self.max_new - 1
    }
}

/// Generates from a prompt that was prepared for this model and tokenizer; `listen` hears of progress and text as
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
    let mut pipeline = prepared.pipeline(&mut listen)?;
    let request = pipeline.admit(prepared.max_context())?;
    let plan = *pipeline.admitted(request)?;
    let max_context = prepared.max_context();
    let Prepared { prompt, max_new, kv, reserve_host_bytes, mut sampler, ignore_eos, trace, .. } = prepared;
    let mut recorder = trace.map(|name| Recorder::new(&pipeline, &name, prompt.len(), max_context));

    let (mut text, mut tokens, mut stream) = (String::new(), Vec::new(), tokenizer.stream());
    let mut prefill_time = None;
    let outcome = (|| {
        let progress = |done, total| listen(Event::Prefill { done, total });
        let hidden = model.prefill(&mut pipeline, request, &prompt, Wanted::Last, progress)?;
        let mut logits = model.logits(&hidden);
        let mut say = |piece: Option<String>| match piece {
            Some(piece) => {
                text.push_str(&piece);
                listen(Event::Text(&piece))
            }
            None => ControlFlow::Continue(()),
        };
        let finish = loop {
            let token = sampler.sample(&logits)?;
            prefill_time.get_or_insert_with(|| start.elapsed());
            tokens.push(token);
            if !ignore_eos && model.config().eos_token_ids.contains(&token) {
                break Finish::Stop;
            }
            if say(stream.push(token)?).is_break() {
                break Finish::Cancelled;
            }
            if tokens.len() == max_new {
                break Finish::Length;
            }
            let hidden = model.decode(&mut pipeline, &[DecodeToken { request, token }])?;
            logits = model.logits(&hidden);
            if let Some(recorder) = &mut recorder {
                recorder.step(&pipeline, request);
            }
        };
        if finish != Finish::Cancelled {
            let _ = say(stream.finish()?);
        }
        Ok(finish)
    })();
    let finish = match outcome {
        Err(Error::Cancelled) => Finish::Cancelled,
        other => other?,
    };
    let total_time = start.elapsed();
    let prefill_time = prefill_time.unwrap_or(total_time);
    let (counters, usage) = (pipeline.counters(), pipeline.usage());
    let (decode_stages, prefill_stages) = (*pipeline.decode_times(), *pipeline.prefill_times());
    pipeline.release(request);
    Ok(Generation {
        text,
        tokens,
        finish,
        prompt_tokens: prompt.len(),
        prefill_time,
        decode_time: total_time - prefill_time,
        budget: kv.method().select().budget(),
        peak_bound: PeakBound::new(model, &kv, &plan, prompt.len(), reserve_host_bytes),
        plan,
        layout: *kv.layout(),
        counters,
        usage,
        decode_stages,
        prefill_stages,
        trace: recorder.map(Recorder::finish),
    })
}

/// How many tokens may be generated after a prompt: what was asked for, as far as positions go.
fn new_tokens(prompt: usize, wanted: usize, max_positions: usize) -> Result<usize> {
    if prompt == 0 {
        return Err(Error::EmptyPrompt);
    }
    if prompt > max_positions {
        return Err(Error::PromptTooLong { tokens: prompt, limit: max_positions });
    }
    // The last token takes no position: nothing is computed from it.
    Ok(wanted.min(max_positions - prompt + 1))
}
