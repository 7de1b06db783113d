use std::time::Instant;

use crate::error::Error;
use crate::sampling::SamplingParams;

/// The name of a job. Never used twice by one scheduler; later jobs have larger ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobId(pub u64);

/// One generation that somebody asks for.
#[derive(Clone, Debug)]
pub struct Job {
    /// The prompt's tokens, at least 1.
    pub prompt: Vec<u32>,
    /// The most tokens to generate, at least 1; fewer if the model's context ends before.
    pub max_tokens: usize,
    /// How tokens are drawn.
    pub sampling: SamplingParams,
    /// Texts of which the first one to appear ends the generation; it is not part of the text.
    pub stop: Vec<String>,
    /// Whether to go on past the model's end tokens.
    pub ignore_eos: bool,
    /// Whether each token comes with its log-probability, and with those of how many of the likeliest.
    pub logprobs: Option<usize>,
    /// Higher ones go first.
    pub priority: i32,
    /// When to give up.
    pub deadline: Option<Instant>,
}

impl Default for Job {
    /// No prompt yet; 16 tokens, greedily, as any other.
    fn default() -> Self {
        Self {
            prompt: Vec::new(),
            max_tokens: 16,
            sampling: SamplingParams::greedy(),
            stop: Vec::new(),
            ignore_eos: false,
            logprobs: None,
            priority: 0,
            deadline: None,
        }
    }
}

/// What a scheduler tells of a job.
#[derive(Debug)]
pub struct Output {
    /// The job.
    pub job: JobId,
    /// What there is to tell.
    pub event: Event,
}

/// What happens to a job: [`Started`](Self::Started) once, then a [`Token`](Self::Token) each, and in the end one of the others.
#[derive(Debug)]
pub enum Event {
    /// It has memory, and its prompt begins: so many of its tokens need not be computed, since their pages are there.
    Started {
        /// These tokens, from the first on.
        cached_tokens: usize,
    },
    /// One more token was generated.
    Token(Piece),
    /// It is over.
    Finished(Finished),
    /// It went wrong.
    Failed(Error),
}

impl Event {
    /// Whether nothing comes after it.
    pub fn is_last(&self) -> bool {
        matches!(self, Self::Finished(_) | Self::Failed(_))
    }
}

/// What is certain of a job's text since the last piece.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Piece {
    /// The text; empty while a character or what may become a stop text is incomplete.
    pub text: String,
    /// The tokens that begin in it, if log-probabilities are wanted.
    pub tokens: Vec<ScoredToken>,
}

/// A generated token with its log-probability.
#[derive(Clone, Debug, PartialEq)]
pub struct ScoredToken {
    /// The token.
    pub id: u32,
    /// Natural logarithm of its probability in the model's own distribution, before temperature and cuts.
    pub logprob: f32,
    /// The likeliest tokens and theirs, likeliest first; of equals, the lower id.
    pub top: Vec<(u32, f32)>,
    /// Where its text begins, in characters from the beginning of the generated text.
    pub text_offset: usize,
}

/// How a job ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    /// Why.
    pub reason: Reason,
    /// The last of the text.
    pub rest: Piece,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Those of them that were not computed, since their pages were there.
    pub cached_tokens: usize,
    /// Tokens that were generated, an end token included.
    pub generated_tokens: usize,
}

/// Why a job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reason {
    /// The model chose an end token.
    EndToken,
    /// A stop text appeared.
    StopText,
    /// The number of tokens asked for, or the model's context, is reached.
    Length,
    /// It was cancelled.
    Cancelled,
    /// Its deadline passed.
    Deadline,
}
