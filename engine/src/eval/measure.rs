use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use spinkv::pipeline::RequestId;

use super::haystack::ANSWER_TOKENS;
use super::{Answer, Question};
use crate::error::Result;
use crate::model::DecodeToken;
use crate::runner::Runner;
use crate::sampling::{Sampler, SamplingParams};
use crate::tokenizer::Tokenizer;

/// A runner that may also know what steps read.
pub trait MeasuredRunner: Runner {
    /// What was added up since the last call; `None` where nobody watches.
    fn take_recall(&mut self) -> Option<Recall> {
        None
    }
}

/// Shares of the true attention mass, added up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Recall {
    /// Sum of the query heads' shares.
    pub share: f64,
    /// Query heads, over all layers and steps.
    pub heads: u64,
    /// Sum of the tokens that rows read.
    pub read_tokens: u64,
    /// Rows, over all steps.
    pub rows: u64,
    /// Time that it took to work this out.
    #[serde(skip)]
    pub time: Duration,
}

/// Log-probabilities of dense attention after a prompt: what text is scored against.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reference {
    /// `[steps, vocab_size]`; empty where there was no room for them.
    log_probabilities: Vec<f32>,
    /// Sum over the steps.
    nats: f64,
}

impl Reference {
    /// Forgets all but the loss.
    pub fn without_probabilities(mut self) -> Self {
        self.log_probabilities = Vec::new();
        self
    }
}

/// What one prompt said of one cell.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Decode steps after it.
    pub steps: u64,
    /// What was answered to a needle's question.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer: Option<Answered>,
    /// The loss of held-out text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<TextLoss>,
    /// What the steps read of the attention mass.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recall: Option<Recall>,
    /// Selected pages that were on the GPU.
    pub hits: u64,
    /// Selected pages that decode steps fetched.
    pub misses: u64,
    /// Pages that warmed the cache at the end of the prompt.
    pub warm_pages: u64,
    /// What it took.
    pub seconds: Seconds,
}

/// An answer, and the right one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Answered {
    /// Whether the digits are right, all seven.
    pub right: bool,
    /// The right digits.
    pub expected: String,
    /// The text that was generated.
    pub found: String,
    /// The noun that was asked for.
    pub noun: String,
    /// How far into the prompt its line is, from 0 to 1.
    pub depth: f64,
    /// Lines with a code.
    pub needles: usize,
}

/// The loss of text that follows a prompt, in nats; sums over the steps.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TextLoss {
    /// Of this method.
    pub nats: f64,
    /// Of dense attention over the same pages.
    pub dense_nats: f64,
    /// Kullback-Leibler divergence from dense attention's distributions; `None` where those were not kept.
    pub divergence: Option<f64>,
}

/// Wall-clock time, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Seconds {
    /// Of the prompt; on the CPU, of its Index and Offload alone where the prompt is a stored one.
    pub prompt: f64,
    /// Of the steps, without the recall.
    pub decode: f64,
}

/// Measures `question` on `runner`, whose memory has room for one request of `max_tokens` tokens. Text is scored against
/// `reference`, or becomes the reference.
///
/// # Errors
/// What the runner refuses; nothing stays admitted.
pub fn measure(
    runner: &mut impl MeasuredRunner,
    tokenizer: &Tokenizer,
    question: &Question,
    max_tokens: usize,
    reference: Option<&Reference>,
) -> Result<(Measured, Reference)> {
    let before = runner.counters()?;
    runner.take_recall();
    let request = runner.admit(max_tokens)?;
    let outcome = measure_admitted(runner, request, tokenizer, question, reference);
    let after = runner.counters();
    runner.release(request);
    let (mut measured, own) = outcome?;
    let after = after?;
    measured.hits = after.hits - before.hits;
    measured.misses = after.misses - before.misses;
    measured.warm_pages = after.warm_pages - before.warm_pages;
    measured.recall = runner.take_recall();
    if let Some(recall) = measured.recall {
        measured.seconds.decode -= recall.time.as_secs_f64();
    }
    Ok((measured, own))
}

fn measure_admitted(
    runner: &mut impl MeasuredRunner,
    request: RequestId,
    tokenizer: &Tokenizer,
    question: &Question,
    reference: Option<&Reference>,
) -> Result<(Measured, Reference)> {
    let start = Instant::now();
    let logits =
        runner.prefill(request, &question.prompt, &mut |_, _| std::ops::ControlFlow::Continue(()))?;
    let prompt = start.elapsed().as_secs_f64();
    let start = Instant::now();
    let (mut answer, mut text, mut own) = (None, None, Reference::default());
    let steps = match &question.answer {
        Answer::Code { digits, noun, depth, needles } => {
            let (found, steps) = answer_greedily(runner, request, tokenizer, &logits, digits.len())?;
            answer = Some(Answered {
                right: leading_digits(&found) == *digits,
                expected: digits.clone(),
                found,
                noun: noun.clone(),
                depth: *depth,
                needles: *needles,
            });
            steps
        }
        Answer::Text(tokens) => {
            let mut divergence =
                reference.is_none_or(|dense| !dense.log_probabilities.is_empty()).then_some(0.0);
            for (step, pair) in tokens.windows(2).enumerate() {
                let logits = runner.decode(&[DecodeToken { request, token: pair[0] }])?;
                let found = log_softmax(&logits);
                own.nats -= f64::from(found[pair[1] as usize]);
                if let (Some(sum), Some(dense)) = (&mut divergence, reference) {
                    *sum +=
                        divergence_of(&dense.log_probabilities[step * found.len()..][..found.len()], &found);
                }
                if reference.is_none() {
                    own.log_probabilities.extend(found);
                }
            }
            let dense_nats = reference.map_or(own.nats, |dense| dense.nats);
            text = Some(TextLoss { nats: own.nats, dense_nats, divergence });
            tokens.len() as u64 - 1
        }
    };
    let seconds = Seconds { prompt, decode: start.elapsed().as_secs_f64() };
    let prompt_tokens = question.prompt.len();
    let measured = Measured {
        prompt_tokens,
        steps,
        answer,
        text,
        recall: None,
        hits: 0,
        misses: 0,
        warm_pages: 0,
        seconds,
    };
    Ok((measured, own))
}

/// The text after a prompt, until it has so many digits, and the steps that it took.
fn answer_greedily(
    runner: &mut impl Runner,
    request: RequestId,
    tokenizer: &Tokenizer,
    logits: &[f32],
    digits: usize,
) -> Result<(String, u64)> {
    let mut sampler = Sampler::new(SamplingParams::greedy())?;
    let mut tokens = vec![sampler.sample(logits)?];
    loop {
        let text = tokenizer.decode(&tokens)?;
        let found = text.chars().filter(char::is_ascii_digit).count();
        if found >= digits || tokens.len() == ANSWER_TOKENS {
            return Ok((text, tokens.len() as u64 - 1));
        }
        let token = *tokens.last().expect("one was sampled");
        tokens.push(runner.next_token(DecodeToken { request, token }, &mut sampler)?);
    }
}

/// The digits that a text begins with, after white space.
fn leading_digits(text: &str) -> &str {
    let text = text.trim_start();
    &text[..text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len())]
}

/// Summed in f64: a vocabulary is large, and differences between methods are small.
fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - highest).exp()).sum();
    let shift = f64::from(highest) + sum.ln();
    logits.iter().map(|logit| (f64::from(*logit) - shift) as f32).collect()
}

/// `sum of p (ln p - ln q)`, from log-probabilities.
fn divergence_of(p: &[f32], q: &[f32]) -> f64 {
    let terms = p.iter().zip(q).map(|(p, q)| f64::from(*p).exp() * (f64::from(*p) - f64::from(*q)));
    terms.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_digits_that_a_text_begins_with_are_the_answer() {
        assert_eq!(leading_digits(" 4071982.\n"), "4071982");
        assert_eq!(leading_digits("40719825"), "40719825", "one digit too many is another number");
        assert_eq!(leading_digits(" the 4071982"), "");
        assert_eq!(leading_digits(""), "");
    }

    /// By hand: p = (1/2, 1/2), q = (1/4, 3/4).
    #[test]
    fn divergence_is_that_of_kullback_and_leibler() {
        let p = log_softmax(&[1.0, 1.0]);
        let q = log_softmax(&[0.0, 3f32.ln()]);
        assert!((f64::from(q[0]) - 0.25f64.ln()).abs() < 1e-6);
        let expected = 0.5 * (2f64.ln() + (2.0f64 / 3.0).ln());
        assert!((divergence_of(&p, &q) - expected).abs() < 1e-6);
        assert_eq!(divergence_of(&p, &p), 0.0);
    }
}
