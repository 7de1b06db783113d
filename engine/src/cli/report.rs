use std::fmt;
use std::path::Path;

use indicatif::{HumanBytes, HumanCount};
use serde::Serialize;
use spinkv::pipeline::{Stage, StageTimes};
use spinkv_engine::generate::{Finish, GenerateOptions, Generation};
use spinkv_engine::memory::{PeakBound, peak_resident_bytes};

use super::demo::Question;

/// What a generation did and what it took. Bytes, unless a name says otherwise.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    model: String,
    method: String,
    /// Only for methods that select.
    budget: Option<String>,
    text: String,
    tokens: Vec<u32>,
    finish: Finish,
    /// The answer that the bundled question expects.
    #[serde(skip_serializing_if = "Option::is_none")]
    expected: Option<String>,
    prompt_tokens: usize,
    generated_tokens: usize,
    prefill_seconds: f64,
    decode_seconds: f64,
    prefill_tokens_per_second: f64,
    /// Of the tokens after the first; `None` if there were none.
    decode_tokens_per_second: Option<f64>,
    /// Index, Offload, Select and Retrieve once a layer, Attention for all queries.
    #[serde(skip_serializing_if = "Option::is_none")]
    prefill_stage_ms: Option<StageMs>,
    /// All decode steps together.
    #[serde(skip_serializing_if = "Option::is_none")]
    decode_stage_ms: Option<StageMs>,
    cache: Cache,
    pages: Pages,
    memory: Memory,
    /// The GPU, if it ran on one.
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<Device>,
}

/// The GPU that a generation ran on, and its memory by what for, in bytes.
#[derive(Debug, Serialize)]
pub(super) struct Device {
    pub name: String,
    /// Who makes the products of many tokens.
    pub products: String,
    /// In use before: the driver's context, kernels, other processes.
    pub before: u64,
    pub weights: u64,
    pub activations: u64,
    pub prompt: u64,
    pub kv_pages: u64,
    pub kv_tables: u64,
    pub kv_summaries: u64,
    pub kv_lists: u64,
    /// In use, as the driver says.
    pub in_use: u64,
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, products, before, weights, activations, prompt, in_use, .. } = self;
        let kv = self.kv_pages + self.kv_tables + self.kv_summaries + self.kv_lists;
        let [before, weights, activations, prompt, kv, in_use] =
            [before, weights, activations, prompt, &kv, in_use].map(|bytes| HumanBytes(*bytes));
        writeln!(f, "{name}, products by {products}")?;
        write!(
            f,
            "              {in_use} in use: {before} before, weights {weights}, activations {activations}, prompt {prompt}, KV {kv}"
        )
    }
}

/// Milliseconds by stage.
#[derive(Debug, Serialize)]
struct StageMs {
    index: f64,
    offload: f64,
    select: f64,
    retrieve: f64,
    attention: f64,
}

impl StageMs {
    fn new(times: &StageTimes) -> Self {
        let ms = |stage| times.get(stage).as_secs_f64() * 1e3;
        Self {
            index: ms(Stage::Index),
            offload: ms(Stage::Offload),
            select: ms(Stage::Select),
            retrieve: ms(Stage::Retrieve),
            attention: ms(Stage::Attention),
        }
    }
}

/// The GPU cache, per row (layer x KV head).
#[derive(Debug, Serialize)]
struct Cache {
    rows: usize,
    page_tokens: usize,
    page_bytes: u64,
    mandatory_pages_per_row: usize,
    buffering_pages_per_row: usize,
    steady_pages_per_row: usize,
    hits: u64,
    misses: u64,
    hit_ratio: Option<f64>,
}

/// Pages that moved, in pages and bytes.
#[derive(Debug, Serialize)]
struct Pages {
    fetched: Moved,
    warm_start: Moved,
    evicted: Moved,
    adopted: Moved,
    offloaded: Moved,
}

#[derive(Debug, Serialize)]
struct Moved {
    pages: u64,
    bytes: u64,
}

#[derive(Debug, Serialize)]
struct Memory {
    gpu_pages: u64,
    gpu_tables: u64,
    gpu_summaries: u64,
    gpu_key_factors: u64,
    host_pages: u64,
    host_tables: u64,
    /// `None` where the system does not tell.
    peak_resident: Option<u64>,
    /// Only on the CPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    peak_bound: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    peak_bound_parts: Option<PeakBound>,
}

impl Report {
    pub fn new(
        model: String,
        options: &GenerateOptions,
        generation: &Generation,
        question: Option<&Question>,
        device: Option<Device>,
    ) -> Self {
        let Generation { plan, layout, counters, usage, .. } = generation;
        let (page_bytes, host_page_bytes) = (layout.page().page_bytes() as u64, layout.page_bytes() as u64);
        let moved = |pages| Moved { pages, bytes: pages * host_page_bytes };
        let stayed = |pages| Moved { pages, bytes: pages * page_bytes };
        let (prefill, decode) = (generation.prefill_time.as_secs_f64(), generation.decode_time.as_secs_f64());
        let later_tokens = generation.tokens.len().saturating_sub(1);
        Self {
            model,
            method: options.method.clone(),
            budget: generation.budget.map(|budget| budget.to_string()),
            text: generation.text.clone(),
            tokens: generation.tokens.clone(),
            finish: generation.finish,
            expected: question.map(|question| question.answer.clone()),
            prompt_tokens: generation.prompt_tokens,
            generated_tokens: generation.tokens.len(),
            prefill_seconds: prefill,
            decode_seconds: decode,
            prefill_tokens_per_second: generation.prompt_tokens as f64 / prefill,
            decode_tokens_per_second: (later_tokens > 0).then(|| later_tokens as f64 / decode),
            prefill_stage_ms: generation.stages.map(|(_, prefill)| StageMs::new(&prefill)),
            decode_stage_ms: generation.stages.map(|(decode, _)| StageMs::new(&decode)),
            cache: Cache {
                rows: plan.rows,
                page_tokens: layout.page().page_tokens(),
                page_bytes,
                mandatory_pages_per_row: plan.row.mandatory_pages,
                buffering_pages_per_row: plan.row.buffering_pages,
                steady_pages_per_row: plan.row.steady_pages,
                hits: counters.hits,
                misses: counters.misses,
                hit_ratio: counters.hit_ratio(),
            },
            pages: Pages {
                fetched: moved(counters.misses),
                warm_start: moved(counters.warm_pages),
                evicted: stayed(counters.evicted_pages),
                adopted: stayed(counters.adopted_pages),
                offloaded: moved(counters.offloaded_pages),
            },
            memory: Memory {
                gpu_pages: usage.gpu.pages(),
                gpu_tables: usage.gpu.tables(),
                gpu_summaries: usage.gpu.summaries,
                gpu_key_factors: usage.gpu.key_factors(),
                host_pages: usage.host.pages,
                host_tables: usage.host.tables(),
                peak_resident: peak_resident_bytes(),
                peak_bound: generation.peak_bound.as_ref().map(PeakBound::total),
                peak_bound_parts: generation.peak_bound,
            },
            device,
        }
    }

    pub fn json(&self) -> String {
        serde_json::to_string_pretty(self).expect("a report is plain data")
    }
}

/// What the bundled question is, before it is asked.
pub(super) fn introduction(model: &Path, question: &Question) -> String {
    format!(
        "{}: {} characters of documentation with {} secret codes in them, then\n\
         \"what is the secret code for {}?\" (answer: {})\n\n",
        model.display(),
        HumanCount(question.text.chars().count() as u64),
        question.n_needles,
        question.key,
        question.answer,
    )
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = |name: &str, text: String| writeln!(f, "  {name:<11} {text}");
        let budget = self.budget.as_ref().map(|budget| format!(", budget {budget}")).unwrap_or_default();
        line("method", format!("{}{budget}", self.method))?;
        if let Some(expected) = &self.expected {
            let verdict = if self.text.contains(expected.as_str()) { "found" } else { "missed" };
            line("answer", format!("{expected}, {verdict}"))?;
        }
        line(
            "prompt",
            format!(
                "{} tokens in {:.2} s, {:.0} tokens/s",
                HumanCount(self.prompt_tokens as u64),
                self.prefill_seconds,
                self.prefill_tokens_per_second
            ),
        )?;
        let speed = self.decode_tokens_per_second;
        line(
            "generated",
            format!(
                "{} tokens in {:.2} s, {} ({})",
                self.generated_tokens,
                self.decode_seconds,
                speed.map_or("-".to_owned(), |speed| format!("{speed:.0} tokens/s")),
                self.finish
            ),
        )?;
        if let Some(stages) = &self.decode_stage_ms {
            line(
                "stages",
                format!(
                    "index {:.1}, offload {:.1}, select {:.1}, retrieve {:.1}, attention {:.1} ms in all decode steps",
                    stages.index, stages.offload, stages.select, stages.retrieve, stages.attention
                ),
            )?;
        }
        let cache = &self.cache;
        line(
            "cache",
            format!(
                "hit ratio {}: {} hits, {} misses; {} rows x (mandatory {} + buffering {} + steady {} pages)",
                cache.hit_ratio.map_or("-".to_owned(), |ratio| format!("{:.1}%", ratio * 100.0)),
                HumanCount(cache.hits),
                HumanCount(cache.misses),
                cache.rows,
                cache.mandatory_pages_per_row,
                cache.buffering_pages_per_row,
                cache.steady_pages_per_row,
            ),
        )?;
        let moved = |moved: &Moved| format!("{} ({})", HumanCount(moved.pages), HumanBytes(moved.bytes));
        line(
            "pages",
            format!(
                "of {}: fetched {}, before that to warm the cache {}, evicted {}",
                HumanBytes(cache.page_bytes),
                moved(&self.pages.fetched),
                moved(&self.pages.warm_start),
                moved(&self.pages.evicted),
            ),
        )?;
        line(
            "",
            format!(
                "written to the host {}, taken over from the window {}",
                moved(&self.pages.offloaded),
                moved(&self.pages.adopted),
            ),
        )?;
        let memory = &self.memory;
        line(
            "gpu",
            format!(
                "pages {}, tables {}, summaries {}{}",
                HumanBytes(memory.gpu_pages),
                HumanBytes(memory.gpu_tables),
                HumanBytes(memory.gpu_summaries),
                match memory.gpu_key_factors {
                    0 => String::new(),
                    bytes => format!(", keys in low rank {}", HumanBytes(bytes)),
                }
            ),
        )?;
        line(
            "host",
            format!("pages {}, tables {}", HumanBytes(memory.host_pages), HumanBytes(memory.host_tables)),
        )?;
        if let Some(device) = &self.device {
            line("device", device.to_string())?;
        }
        let peak = memory.peak_resident.map_or("-".to_owned(), |peak| HumanBytes(peak).to_string());
        let bound = memory.peak_bound.map_or(String::new(), |bound| format!(", bound {}", HumanBytes(bound)));
        line("memory", format!("peak {peak}{bound}"))
    }
}
