use serde::Serialize;

use super::{Cell, Evaluation, Journal, Measured, Seconds, Task};

/// All results of an evaluation, each cell's over its prompts.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// The engine's version.
    pub version: &'static str,
    /// The checkpoint, as it was named.
    pub model: String,
    /// Fingerprint of the checkpoint.
    pub model_fingerprint: String,
    /// Fingerprint of the text and the nouns that prompts are made from.
    pub text_fingerprint: String,
    /// Where it ran.
    pub backend: String,
    /// Seed of the prompts.
    pub seed: u64,
    /// Prompts of each task and context.
    pub prompts: usize,
    /// Tokens of held-out text that are scored after each prompt.
    pub scored_tokens: usize,
    /// First tokens that every step reads.
    pub sinks: usize,
    /// Newest tokens that every step reads.
    pub window: usize,
    /// Tokens of a KV page.
    pub page_tokens: usize,
    /// Bytes of a KV page.
    pub page_bytes: usize,
    /// How KV pages store their elements.
    pub kv_dtype: &'static str,
    /// What the host holds of a page.
    pub host_kv: String,
    /// Cache pages beyond the mandatory ones, as a multiple of them.
    pub buffering: f64,
    /// By task, context, method and budget.
    pub cells: Vec<CellReport>,
}

/// One cell over its prompts. What does not apply is `None`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CellReport {
    /// The task.
    pub task: Task,
    /// Tokens of the context.
    pub context: usize,
    /// The method with its options.
    pub method: String,
    /// Its budget: `None` for a method without one.
    pub budget: Option<String>,
    /// Prompts that were measured.
    pub prompts: usize,
    /// Tokens of those prompts.
    pub prompt_tokens: usize,
    /// Decode steps after them.
    pub steps: u64,
    /// Prompts that were answered right.
    pub right: Option<usize>,
    /// The share of them.
    pub exact_match: Option<f64>,
    /// Where that share lies with 95 % confidence (Wilson).
    pub exact_match_interval: Option<[f64; 2]>,
    /// The numbers of the prompts that were answered wrong.
    pub wrong: Option<Vec<usize>>,
    /// Nats a token.
    pub nats: Option<f64>,
    /// Nats a token beyond dense attention's; the mean over the prompts.
    pub nats_over_dense: Option<f64>,
    /// Standard error of that mean; `None` for a single prompt.
    pub nats_over_dense_error: Option<f64>,
    /// Kullback-Leibler divergence from dense attention, nats a token.
    pub divergence: Option<f64>,
    /// Share of the true attention mass that was read: the mean over query heads, layers and steps.
    pub recall: Option<f64>,
    /// Tokens that a row read in a step.
    pub read_tokens: Option<f64>,
    /// Selected pages that were on the GPU.
    pub hits: u64,
    /// Selected pages that decode steps fetched.
    pub misses: u64,
    /// Hits among selected pages; `None` where nothing was selected.
    pub hit_ratio: Option<f64>,
    /// Bytes that a decode step fetched, over all layers and KV heads.
    pub fetched_bytes_per_token: f64,
    /// Bytes that warmed the cache at the end of a prompt.
    pub warm_bytes_per_prompt: f64,
    /// What it took, all prompts together.
    pub seconds: Seconds,
}

impl Report {
    /// What the journal knows of the evaluation's cells.
    pub fn new(evaluation: &Evaluation, model: String, backend: &str, journal: &Journal) -> Self {
        let options = evaluation.options();
        let page_bytes = evaluation.dense.layout().page_bytes();
        let cells = evaluation.cells().iter().map(|cell| {
            let results = (0..options.prompts)
                .filter_map(|prompt| Some((prompt, journal.get(&evaluation.key(cell, prompt, backend))?)));
            CellReport::new(cell, cell.kv.host_layout().page_bytes(), &results.collect::<Vec<_>>())
        });
        Self {
            version: env!("CARGO_PKG_VERSION"),
            model,
            model_fingerprint: evaluation.model.clone(),
            text_fingerprint: evaluation.haystack.fingerprint().to_owned(),
            backend: backend.to_owned(),
            seed: options.seed,
            prompts: options.prompts,
            scored_tokens: options.scored_tokens,
            sinks: options.steady.sinks,
            window: options.steady.window,
            page_tokens: options.pages.tokens,
            page_bytes,
            kv_dtype: options.pages.dtype_name(),
            host_kv: options.pages.host.to_string(),
            buffering: options.buffering,
            cells: cells.collect(),
        }
    }

    /// As JSON, over lines.
    pub fn json(&self) -> String {
        serde_json::to_string_pretty(self).expect("a report is plain data")
    }
}

impl CellReport {
    fn new(cell: &Cell, host_page_bytes: usize, results: &[(usize, &Measured)]) -> Self {
        let sum = |of: fn(&Measured) -> u64| results.iter().map(|(_, one)| of(one)).sum::<u64>();
        let seconds = |of: fn(&Measured) -> f64| results.iter().map(|(_, one)| of(one)).sum::<f64>();
        let (prompts, steps) = (results.len(), sum(|one| one.steps));
        let per = |total: f64, count: u64| total / count.max(1) as f64;
        let (hits, misses) = (sum(|one| one.hits), sum(|one| one.misses));

        let answers = results.iter().filter_map(|(number, one)| Some((*number, one.answer.as_ref()?.right)));
        let answers: Vec<_> = answers.collect();
        let asked = !answers.is_empty();
        let right = answers.iter().filter(|(_, right)| *right).count();
        let wrong = answers.iter().filter(|(_, right)| !right).map(|(number, _)| *number).collect();

        let losses = results.iter().filter_map(|(_, one)| Some((one.text.as_ref()?, one.steps)));
        let losses: Vec<_> = losses.collect();
        let scored = losses.iter().map(|(_, steps)| steps).sum::<u64>();
        let over: Vec<f64> =
            losses.iter().map(|(loss, steps)| per(loss.nats - loss.dense_nats, *steps)).collect();
        let divergence: Option<f64> = losses.iter().map(|(loss, _)| loss.divergence).sum();
        let has_text = !losses.is_empty();

        let recalls: Vec<_> = results.iter().filter_map(|(_, one)| one.recall).collect();
        let heads: u64 = recalls.iter().map(|recall| recall.heads).sum();
        let rows: u64 = recalls.iter().map(|recall| recall.rows).sum();
        Self {
            task: cell.task,
            context: cell.context,
            method: cell.method.label().to_owned(),
            budget: cell.budget.map(|budget| budget.to_string()),
            prompts,
            prompt_tokens: results.iter().map(|(_, one)| one.prompt_tokens).sum(),
            steps,
            right: asked.then_some(right),
            exact_match: asked.then(|| right as f64 / answers.len() as f64),
            exact_match_interval: asked.then(|| wilson(right, answers.len())),
            wrong: asked.then_some(wrong),
            nats: has_text.then(|| per(losses.iter().map(|(loss, _)| loss.nats).sum(), scored)),
            nats_over_dense: has_text.then(|| mean(&over)),
            nats_over_dense_error: (over.len() > 1).then(|| standard_error(&over)),
            divergence: divergence.filter(|_| has_text).map(|divergence| per(divergence, scored)),
            recall: (heads > 0).then(|| per(recalls.iter().map(|recall| recall.share).sum(), heads)),
            read_tokens: (rows > 0)
                .then(|| per(recalls.iter().map(|recall| recall.read_tokens).sum::<u64>() as f64, rows)),
            hits,
            misses,
            hit_ratio: (hits + misses > 0).then(|| per(hits as f64, hits + misses)),
            fetched_bytes_per_token: per(misses as f64 * host_page_bytes as f64, steps),
            warm_bytes_per_prompt: per(
                sum(|one| one.warm_pages) as f64 * host_page_bytes as f64,
                prompts as u64,
            ),
            seconds: Seconds {
                prompt: seconds(|one| one.seconds.prompt),
                decode: seconds(|one| one.seconds.decode),
            },
        }
    }

    /// The budget as tables have it: tokens, a percentage, or `-` for a method without one.
    pub fn budget_name(&self) -> &str {
        self.budget.as_deref().map_or("-", |budget| budget.strip_suffix(" tokens").unwrap_or(budget))
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Of the mean of independent values.
fn standard_error(values: &[f64]) -> f64 {
    let (mean, count) = (mean(values), values.len() as f64);
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (squares / (count - 1.0) / count).sqrt()
}

/// Wilson's interval of a proportion, at 95 %.
fn wilson(right: usize, of: usize) -> [f64; 2] {
    const Z: f64 = 1.959_964;
    let (n, p) = (of as f64, right as f64 / of as f64);
    let middle = p + Z * Z / (2.0 * n);
    let half = Z * (p * (1.0 - p) / n + Z * Z / (4.0 * n * n)).sqrt();
    let scale = 1.0 + Z * Z / n;
    [((middle - half) / scale).max(0.0), ((middle + half) / scale).min(1.0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of the textbook formula: 8 of 10 lie in 0.490 to 0.943, 16 of 16 above 0.806.
    #[test]
    fn intervals_are_wilsons() {
        let [low, high] = wilson(8, 10);
        assert!((low - 0.490).abs() < 1e-3 && (high - 0.943).abs() < 1e-3, "{low} {high}");
        let [low, high] = wilson(16, 16);
        assert!((low - 0.806).abs() < 1e-3 && (high - 1.0).abs() < 1e-9, "{low} {high}");
        assert!(wilson(0, 16)[0].abs() < 1e-9);
    }

    #[test]
    fn the_standard_error_is_that_of_the_mean() {
        // Variance 1 of three values, over 3.
        assert!((standard_error(&[1.0, 2.0, 3.0]) - (1.0f64 / 3.0).sqrt()).abs() < 1e-12);
    }
}
