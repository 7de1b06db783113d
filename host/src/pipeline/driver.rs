use std::collections::HashMap;
use std::fmt;
use std::time::Instant;

use super::{Counters, Stage, StageTimes};
use crate::backend::{Backend, PromptChunk, Step, StepEntry, StepKind};
use crate::memory::{MemoryUsage, PrefixUsage, RequestPlan};
use crate::{Error, KvConfig, Result};

/// The name of an admitted request. Never used twice by one pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// Buffering pages for each mandatory page, unless told otherwise. The hit ratio is close to saturated from
/// about 4 on (Spin, section on the KV manager); Spin's default is 5.
pub const DEFAULT_BUFFERING: f64 = 5.0;

/// The driver of the five stages over a backend.
///
/// A request is admitted, its prompt goes through [`prefill`](Self::prefill) layer by layer, then every
/// generated token through [`decode`](Self::decode) layer by layer, and in the end it is released; releasing
/// earlier cancels it. The driver checks what it is given before any state changes, so a refused call costs
/// nothing.
#[derive(Debug)]
pub struct Pipeline<B> {
    backend: B,
    buffering: f64,
    requests: HashMap<RequestId, Request>,
    next_id: u64,
    decode_times: StageTimes,
    prefill_times: StageTimes,
}

/// What a step takes through all layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tokens {
    kind: StepKind,
    count: usize,
}

impl Tokens {
    const DECODED: Self = Self { kind: StepKind::Decode, count: 1 };

    fn prompt(count: usize) -> Self {
        Self { kind: StepKind::Prompt, count }
    }
}

impl fmt::Display for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            StepKind::Prompt => write!(f, "a prompt of {} tokens", self.count),
            StepKind::Decode => f.write_str("a decode step"),
        }
    }
}

#[derive(Debug)]
struct Request {
    max_tokens: usize,
    /// Tokens that have passed through every layer.
    tokens: usize,
    next_layer: usize,
    /// What the layers before `next_layer` were given; the others must be given the same.
    step: Tokens,
    failed: bool,
    parked: bool,
    /// The prompt, from [`Pipeline::share_prefix`] to its last layer.
    prompt: Vec<u32>,
    /// Tokens of it that others have computed.
    prefix: usize,
}

impl<B: Backend> Pipeline<B> {
    /// A pipeline over `backend`.
    pub fn new(backend: B) -> Self {
        Self {
            backend,
            buffering: DEFAULT_BUFFERING,
            requests: HashMap::new(),
            next_id: 0,
            decode_times: StageTimes::default(),
            prefill_times: StageTimes::default(),
        }
    }

    /// Sets the buffering pages wanted for each mandatory page; holds for requests admitted from now on.
    pub fn with_buffering(mut self, buffering: f64) -> Self {
        self.buffering = buffering;
        self
    }

    /// The plan of a request of up to `max_tokens` tokens in an empty machine.
    ///
    /// # Errors
    /// Those of [`RequestPlan::new`].
    pub fn plan(&self, max_tokens: usize) -> Result<RequestPlan> {
        RequestPlan::new(self.backend.config(), max_tokens, self.buffering)
    }

    /// Admits a request of up to `max_tokens` tokens, prompt and generated ones together, and gives it what it
    /// needs on both tiers. Where memory is short, the requests that run give buffering for it.
    ///
    /// # Errors
    /// Those of [`plan`](Self::plan); [`Error::OutOfGpuPages`], [`Error::OutOfGpuMemory`], [`Error::OutOfHostMemory`] or
    /// [`Error::AllocationFailed`] if not even its mandatory pages fit beside those of the requests that run; they
    /// lose nothing.
    pub fn admit(&mut self, max_tokens: usize) -> Result<RequestId> {
        // A refused request takes a name along, so that pipelines that are asked the same name their requests alike.
        let id = RequestId(self.next_id);
        self.next_id += 1;
        let plan = self.plan(max_tokens)?;
        self.backend.admit(id, plan)?;
        let state = Request {
            max_tokens,
            tokens: 0,
            next_layer: 0,
            step: Tokens::DECODED,
            failed: false,
            parked: false,
            prompt: Vec::new(),
            prefix: 0,
        };
        self.requests.insert(id, state);
        Ok(id)
    }

    /// Parks a request between two steps: its cache, or all its pages if it has none, goes to others, and its context stays, on the host and in the steady zone, so that
    /// it can go on without computing anything again. Results do not change by it (a GPU's up to rounding), only the hits of the steps after it.
    ///
    /// # Errors
    /// [`Error::UnknownRequest`], [`Error::RequestFailed`], [`Error::RequestParked`]; [`Error::LayerOrder`] in the middle of a step;
    /// [`Error::ParkingUnsupported`] of a backend that does not do it, or not of a request without a cache, whose host pages are not the GPU's. Nothing is then changed.
    pub fn park(&mut self, request: RequestId) -> Result<()> {
        // As for a decode step, but that its context may be full.
        let state = self.requests.get_mut(&request).ok_or(Error::UnknownRequest(request))?;
        if state.failed {
            return Err(Error::RequestFailed(request));
        }
        if state.parked {
            return Err(Error::RequestParked(request));
        }
        if state.next_layer != 0 {
            return Err(Error::LayerOrder { request, expected: state.next_layer, found: 0 });
        }
        self.backend.park(request)?;
        state.parked = true;
        Ok(())
    }

    /// Gives a parked request a cache again. Where memory is short, the requests that run give buffering for it.
    ///
    /// # Errors
    /// [`Error::UnknownRequest`], [`Error::RequestNotParked`]; [`Error::OutOfGpuPages`], [`Error::OutOfGpuMemory`] or
    /// [`Error::AllocationFailed`] if not even its mandatory pages fit: it is then still parked.
    pub fn resume(&mut self, request: RequestId) -> Result<()> {
        let state = self.requests.get_mut(&request).ok_or(Error::UnknownRequest(request))?;
        if !state.parked {
            return Err(Error::RequestNotParked(request));
        }
        self.backend.resume(request)?;
        state.parked = false;
        Ok(())
    }

    /// Ends a request, whatever its state, and frees what it held. An unknown request is ignored.
    pub fn release(&mut self, request: RequestId) {
        if self.requests.remove(&request).is_some() {
            self.backend.release(request);
        }
    }

    /// Tells a request that has no tokens yet its prompt, and gives it the host pages that others have computed of the prompt's beginning.
    /// Returns how many tokens that are: a multiple of `unit`, fewer than the prompt has, and 0 where the backend does not
    /// [share](Backend::prefix_block). In each layer [`fill_prefix`](Self::fill_prefix) then gives their keys and values, and
    /// [`prefill`](Self::prefill) takes the queries behind them. Once the prompt is through, its pages are kept for others.
    ///
    /// Only what prompts computed is shared, densely and from their first token on. What a decode step computes depends on what it selected, and
    /// stays the request's own.
    ///
    /// # Errors
    /// [`Error::UnknownRequest`], [`Error::RequestFailed`], [`Error::RequestParked`], [`Error::LayerOrder`]; [`Error::PrefillNotEmpty`] after the
    /// first token, [`Error::PrefixTaken`] for another prompt than before, [`Error::EmptyRequest`] for no tokens, [`Error::ContextFull`]
    /// for more than the admitted length. Nothing is then changed.
    ///
    /// # Panics
    /// If `unit` is 0.
    pub fn share_prefix(&mut self, request: RequestId, prompt: &[u32], unit: usize) -> Result<usize> {
        if prompt.is_empty() {
            return Err(Error::EmptyRequest);
        }
        let held = self.check(request, 0, Tokens::prompt(prompt.len()))?;
        if held > 0 {
            return Err(Error::PrefillNotEmpty { request, held });
        }
        let state = self.requests.get_mut(&request).expect("checked above");
        if !state.prompt.is_empty() {
            return if state.prompt == prompt { Ok(state.prefix) } else { Err(Error::PrefixTaken(request)) };
        }
        state.prefix = self.backend.share_prefix(request, prompt, unit)?;
        state.prompt = prompt.to_vec();
        Ok(state.prefix)
    }

    /// Completes the keys and values of the next layer of a prompt of `tokens` tokens, `[tokens, kv_heads, head_dim]`, of which those behind the
    /// [shared](Self::share_prefix) prefix are given; see [`Backend::fill_prefix`].
    ///
    /// # Errors
    /// Those of [`prefill`](Self::prefill); nothing is then changed. Backend failures.
    pub fn fill_prefix(
        &mut self,
        request: RequestId,
        layer: usize,
        tokens: usize,
        keys: &mut B::Tensor,
        values: &mut B::Tensor,
    ) -> Result<()> {
        let prefix = self.check_prompt(request, layer, tokens, keys, values)?;
        self.backend.fill_prefix(request, layer, prefix, keys, values)
    }

    /// Begins one layer of a prompt of `tokens` tokens: `keys` and `values` are `[tokens, kv_heads,
    /// head_dim]`, unrounded. The queries follow through [`PrefillLayer::attend`], from the first token on that is not
    /// [shared](Self::share_prefix).
    ///
    /// # Errors
    /// [`Error::PrefillNotEmpty`] after the first token, [`Error::ContextFull`] beyond the admitted length,
    /// [`Error::LayerOrder`], [`Error::StepMismatch`] for another length than in the layers before or than that of the prompt that was told,
    /// [`Error::TensorLength`], [`Error::EmptyRequest`] for no tokens, [`Error::UnknownRequest`],
    /// [`Error::RequestFailed`]; nothing is then changed.
    pub fn prefill<'a>(
        &'a mut self,
        request: RequestId,
        layer: usize,
        tokens: usize,
        keys: &'a B::Tensor,
        values: &'a B::Tensor,
    ) -> Result<PrefillLayer<'a, B>> {
        let attended = self.check_prompt(request, layer, tokens, keys, values)?;
        Ok(PrefillLayer { pipeline: self, request, layer, tokens, keys, values, attended })
    }

    /// One layer of a decode step for a batch of distinct requests, one new token each: `queries` and `out`
    /// are `[batch, query_heads, head_dim]`, `keys` and `values` `[batch, kv_heads, head_dim]`. An empty batch is no step.
    ///
    /// # Errors
    /// [`Error::UnknownRequest`], [`Error::DuplicateRequest`], [`Error::RequestFailed`], [`Error::ContextFull`],
    /// [`Error::LayerOrder`], [`Error::StepMismatch`], [`Error::TensorLength`] and [`Error::AllocationFailed`] before anything
    /// changed. An error out of a stage ([`Error::InvalidSelection`]) fails the batch's requests: they can only be released.
    pub fn decode(
        &mut self,
        layer: usize,
        batch: &[RequestId],
        queries: &B::Tensor,
        keys: &B::Tensor,
        values: &B::Tensor,
        out: &mut B::Tensor,
    ) -> Result<()> {
        let entries = self.decode_entries(layer, batch)?;
        self.check_length("queries", queries, batch.len() * self.config().shape().query_heads)?;
        self.check_length("keys", keys, batch.len() * self.config().shape().kv_heads)?;
        self.check_length("values", values, batch.len() * self.config().shape().kv_heads)?;
        self.check_length("outputs", out, batch.len() * self.config().shape().query_heads)?;

        if entries.is_empty() {
            return Ok(());
        }
        let step = Step { layer, entries: &entries };
        self.backend.prepare(&step)?;
        let stages = (|| {
            let (backend, times) = (&mut self.backend, &mut self.decode_times);
            timed(times, Stage::Index, || backend.index(&step, keys, values))?;
            timed(times, Stage::Offload, || backend.offload(&step, keys, values))?;
            timed(times, Stage::Select, || backend.select(&step, queries))?;
            timed(times, Stage::Retrieve, || backend.retrieve(&step))?;
            timed(times, Stage::Attention, || backend.attend(&step, queries, out))
        })();
        self.finish_layer(Tokens::DECODED, &entries, stages)
    }

    /// A decode step through all layers at once, for a backend and a model that run it as one, a graph for instance: `begin` and `run` are
    /// called once, after all checks, with the step at layer 0. `begin` prepares the backend and may still refuse the step; `run` computes all
    /// layers.
    ///
    /// # Errors
    /// [`Error::UnknownRequest`], [`Error::DuplicateRequest`], [`Error::RequestFailed`], [`Error::ContextFull`] and
    /// [`Error::LayerOrder`] for a request in the middle of a step, and those of `begin`, before anything changed; those of `run`, which fail the
    /// batch's requests: they can only be released.
    pub fn decode_at_once<E: From<Error>>(
        &mut self,
        batch: &[RequestId],
        begin: impl FnOnce(&mut B, &Step<'_>) -> std::result::Result<(), E>,
        run: impl FnOnce(&mut B) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let entries = self.decode_entries(0, batch)?;
        begin(&mut self.backend, &Step { layer: 0, entries: &entries })?;
        let outcome = run(&mut self.backend);
        for entry in &entries {
            let state = self.requests.get_mut(&entry.request).expect("checked above");
            match outcome {
                Ok(()) => state.tokens += entry.new,
                Err(_) => state.failed = true,
            }
        }
        outcome
    }

    /// The entries of a layer of a decode step for distinct requests that can take it.
    fn decode_entries(&self, layer: usize, batch: &[RequestId]) -> Result<Vec<StepEntry>> {
        let mut entries = Vec::with_capacity(batch.len());
        for (index, request) in batch.iter().enumerate() {
            if batch[..index].contains(request) {
                return Err(Error::DuplicateRequest(*request));
            }
            let before = self.check(*request, layer, Tokens::DECODED)?;
            entries.push(StepEntry { request: *request, kind: StepKind::Decode, before, new: 1, queries: 1 });
        }
        Ok(entries)
    }

    /// Tokens that a request holds in every layer.
    ///
    /// # Errors
    /// [`Error::UnknownRequest`].
    pub fn tokens(&self, request: RequestId) -> Result<usize> {
        self.requests.get(&request).map(|state| state.tokens).ok_or(Error::UnknownRequest(request))
    }

    /// What an admitted request may hold; its buffering may be less than was wanted, and changes as others come
    /// and go.
    ///
    /// # Errors
    /// [`Error::UnknownRequest`].
    pub fn admitted(&self, request: RequestId) -> Result<&RequestPlan> {
        self.backend.plan(request).ok_or(Error::UnknownRequest(request))
    }

    /// What the pipeline was made for.
    pub fn config(&self) -> &KvConfig {
        self.backend.config()
    }

    /// The backend.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// The backend, to tend to its memory between steps.
    pub fn backend_mut(&mut self) -> &mut B {
        &mut self.backend
    }

    /// What happened to pages so far.
    pub fn counters(&self) -> Counters {
        self.backend.counters()
    }

    /// Bytes in use now.
    pub fn usage(&self) -> MemoryUsage {
        self.backend.usage()
    }

    /// What is kept of prompts for others; `None` where they share no pages.
    pub fn prefixes(&self) -> Option<PrefixUsage> {
        self.backend.prefixes()
    }

    /// Time in the stages of decode steps; over a backend that enqueues them, the time that enqueueing takes.
    pub fn decode_times(&self) -> &StageTimes {
        &self.decode_times
    }

    /// Time in the stages of prompts; as for [`decode_times`](Self::decode_times).
    pub fn prefill_times(&self) -> &StageTimes {
        &self.prefill_times
    }

    /// Checks that `request` can take `step` through `layer`, and returns the tokens that it holds.
    fn check(&self, request: RequestId, layer: usize, step: Tokens) -> Result<usize> {
        let state = self.requests.get(&request).ok_or(Error::UnknownRequest(request))?;
        if state.failed {
            return Err(Error::RequestFailed(request));
        }
        if state.parked {
            return Err(Error::RequestParked(request));
        }
        if layer != state.next_layer {
            return Err(Error::LayerOrder { request, expected: state.next_layer, found: layer });
        }
        let (tokens, limit) = (step.count, state.max_tokens);
        if tokens > limit - state.tokens {
            return Err(Error::ContextFull { request, tokens, held: state.tokens, limit });
        }
        if layer > 0 && step != state.step {
            let (expected, found) = (state.step.to_string(), step.to_string());
            return Err(Error::StepMismatch { request, expected, found });
        }
        Ok(state.tokens)
    }

    /// Checks a layer of a prompt, and returns the tokens of its shared prefix.
    fn check_prompt(
        &self,
        request: RequestId,
        layer: usize,
        tokens: usize,
        keys: &B::Tensor,
        values: &B::Tensor,
    ) -> Result<usize> {
        if tokens == 0 {
            return Err(Error::EmptyRequest);
        }
        let held = self.check(request, layer, Tokens::prompt(tokens))?;
        if held > 0 {
            return Err(Error::PrefillNotEmpty { request, held });
        }
        let state = &self.requests[&request];
        if !state.prompt.is_empty() && state.prompt.len() != tokens {
            let [expected, found] =
                [state.prompt.len(), tokens].map(|count| Tokens::prompt(count).to_string());
            return Err(Error::StepMismatch { request, expected, found });
        }
        self.check_length("keys", keys, tokens * self.config().shape().kv_heads)?;
        self.check_length("values", values, tokens * self.config().shape().kv_heads)?;
        Ok(state.prefix)
    }

    fn check_length(&self, what: &'static str, tensor: &B::Tensor, vectors: usize) -> Result<()> {
        let (expected, found) = (vectors * self.config().shape().head_dim, B::elements(tensor));
        if expected == found { Ok(()) } else { Err(Error::TensorLength { what, expected, found }) }
    }

    /// Moves the requests on to the next layer or, after the last one, to the next token; or marks them as
    /// failed if a stage was.
    fn finish_layer(&mut self, step: Tokens, entries: &[StepEntry], stages: Result<()>) -> Result<()> {
        let layers = self.config().shape().layers;
        for entry in entries {
            let state = self.requests.get_mut(&entry.request).expect("checked above");
            state.step = step;
            if stages.is_err() {
                state.failed = true;
            } else if state.next_layer + 1 == layers {
                state.next_layer = 0;
                state.tokens += entry.new;
                if !state.prompt.is_empty() {
                    self.backend.keep_prefix(entry.request, &std::mem::take(&mut state.prompt));
                }
            } else {
                state.next_layer += 1;
            }
        }
        stages
    }
}

/// One layer of a prompt, between its keys and its last query. Dropping it earlier leaves the request as it
/// was.
#[derive(Debug)]
pub struct PrefillLayer<'a, B: Backend> {
    pipeline: &'a mut Pipeline<B>,
    request: RequestId,
    layer: usize,
    tokens: usize,
    keys: &'a B::Tensor,
    values: &'a B::Tensor,
    attended: usize,
}

impl<B: Backend> PrefillLayer<'_, B> {
    /// Passes over the next `tokens` queries, whose outputs nobody needs. The prompt's last query must be
    /// attended.
    ///
    /// # Errors
    /// [`Error::PromptQueries`] if the prompt has not more than `tokens` queries left.
    pub fn skip(&mut self, tokens: usize) -> Result<()> {
        let left = self.tokens - self.attended;
        if tokens >= left {
            return Err(Error::PromptQueries { request: self.request, found: tokens, left: left - 1 });
        }
        self.attended += tokens;
        Ok(())
    }

    /// Dense causal attention of the next `tokens` queries, `[tokens, query_heads, head_dim]`, over the
    /// unrounded keys and values up to each one's own.
    ///
    /// With the prompt's last query the layer is complete: its partitions are indexed, its pages go to the
    /// host, and the cache is warmed by what that query selects.
    ///
    /// # Errors
    /// [`Error::TensorLength`], [`Error::PromptQueries`] if the prompt has fewer queries left, or
    /// [`Error::AllocationFailed`] for its last query; nothing is then changed. An error out of a stage fails the request.
    pub fn attend(&mut self, tokens: usize, queries: &B::Tensor, out: &mut B::Tensor) -> Result<()> {
        let Self { pipeline, request, layer, keys, values, .. } = self;
        let left = self.tokens - self.attended;
        if tokens > left {
            return Err(Error::PromptQueries { request: *request, found: tokens, left });
        }
        pipeline.check_length("queries", queries, tokens * pipeline.config().shape().query_heads)?;
        pipeline.check_length("outputs", out, tokens * pipeline.config().shape().query_heads)?;

        let chunk = PromptChunk { first: self.attended, tokens, context: self.tokens };
        let last = tokens > 0 && tokens == left;
        let entries = [StepEntry {
            request: *request,
            kind: StepKind::Prompt,
            before: 0,
            new: self.tokens,
            queries: tokens,
        }];
        let step = Step { layer: *layer, entries: &entries };
        if last {
            pipeline.backend.prepare(&step)?;
        }
        let stages = (|| {
            let (backend, times) = (&mut pipeline.backend, &mut pipeline.prefill_times);
            timed(times, Stage::Attention, || backend.attend_prompt(&chunk, queries, keys, values, out))?;
            if last {
                timed(times, Stage::Index, || backend.index(&step, keys, values))?;
                timed(times, Stage::Offload, || backend.offload(&step, keys, values))?;
                timed(times, Stage::Select, || backend.select(&step, queries))?;
                timed(times, Stage::Retrieve, || backend.retrieve(&step))?;
            }
            Ok(())
        })();
        self.attended += tokens;
        if last || stages.is_err() {
            pipeline.finish_layer(Tokens::prompt(self.tokens), &entries, stages)
        } else {
            Ok(())
        }
    }
}

fn timed<T>(times: &mut StageTimes, stage: Stage, run: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let value = run();
    times.add(stage, start.elapsed());
    value
}
