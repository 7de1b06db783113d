use std::path::{Path, PathBuf};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use super::fingerprint::Fingerprint;
use super::{EvalError, Task};
use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;

/// The shortest context, in tokens: 8 needles, their question and as much text again.
pub const LEAST_CONTEXT: usize = 512;

/// Tokens of an answer, at most: a space and seven digits.
pub(super) const ANSWER_TOKENS: usize = 8;

const DIGITS: usize = 7;
const LEAST_NEEDLES: usize = 8;
const MOST_NEEDLES: usize = 32;

/// Tokens of a line with a needle, with some to spare.
const NEEDLE_TOKENS: usize = 20;

/// Tokens by which a prompt may fall short of its length.
const SLACK: usize = 4;

/// Held-out text and nouns, to make prompts from.
///
/// Of a text that is shorter than a prompt the end is followed by the beginning again.
#[derive(Clone, Debug)]
pub struct Haystack {
    text: String,
    /// Where lines begin.
    lines: Vec<usize>,
    nouns: Vec<String>,
    fingerprint: String,
    /// What a prompt begins with: `<|bos|>` where that is a token.
    begin: &'static str,
}

/// A prompt, and what is known of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Question {
    /// The prompt.
    pub prompt: Vec<u32>,
    /// What is to follow.
    pub answer: Answer,
}

/// What is to follow a prompt.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// Seven digits.
    Code {
        /// The digits.
        digits: String,
        /// The noun that is asked for.
        noun: String,
        /// How far into the text its line is, from 0 to 1.
        depth: f64,
        /// Lines with a code.
        needles: usize,
    },
    /// The text itself: one token more than steps, since the last is only predicted.
    Text(Vec<u32>),
}

impl Haystack {
    /// Reads `haystack.txt` and `nouns.txt` in `dir`.
    ///
    /// # Errors
    /// [`EvalError::MissingHaystack`]; [`EvalError::HaystackTooSmall`] for less than 4096 bytes of text or less than 32
    /// nouns; [`Error::PromptNotUtf8`].
    pub fn open(dir: &Path, tokenizer: &Tokenizer) -> Result<Self> {
        let ((text_path, text), (nouns_path, nouns)) = (read(dir, "haystack.txt")?, read(dir, "nouns.txt")?);
        let mut names: Vec<String> = Vec::new();
        for noun in nouns.lines().map(str::trim).filter(|noun| !noun.is_empty()) {
            if !names.iter().any(|name| name == noun) {
                names.push(noun.to_owned());
            }
        }
        for (path, what, found, least) in [
            (text_path, "bytes of text", text.len(), 4096),
            (nouns_path, "different nouns", names.len(), MOST_NEEDLES),
        ] {
            if found < least {
                return Err(EvalError::HaystackTooSmall { path, what, found, least }.into());
            }
        }
        let fingerprint = Fingerprint::new().add(text.as_bytes()).add(names.join("\n").as_bytes()).hex();
        let mut text = text.trim_end().to_owned();
        text.push('\n');
        let lines = std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1));
        let lines = lines.filter(|at| *at < text.len()).collect();
        // Where it is no token of its own, the tokenizer puts before a text what the model wants there.
        let marker = tokenizer.encode("<|bos|>")?;
        let begin = if marker.len() == 1 { "<|bos|>" } else { "" };
        Ok(Self { text, lines, nouns: names, fingerprint, begin })
    }

    /// Tells texts and nouns apart.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// A prompt that asks for one of 8 to 32 secret codes in held-out text. Together with the answer's 8 tokens it has `context` tokens
    /// or up to 4 fewer; contexts below 1.4K have room for fewer than 32 codes.
    ///
    /// # Errors
    /// [`EvalError::ContextTooShort`] below [`LEAST_CONTEXT`], [`EvalError::CannotFit`], and what the tokenizer refuses.
    pub fn needle(
        &self,
        tokenizer: &Tokenizer,
        seed: u64,
        context: usize,
        prompt: usize,
    ) -> Result<Question> {
        if context < LEAST_CONTEXT {
            return Err(EvalError::context_too_short(context).into());
        }
        let target = context - ANSWER_TOKENS;
        let rng = &mut stream(seed, Task::Needle, context, prompt);
        let most = MOST_NEEDLES.min(target / 2 / NEEDLE_TOKENS);
        let needles = LEAST_NEEDLES + below(rng, most - LEAST_NEEDLES + 1);
        let mut nouns: Vec<usize> = (0..self.nouns.len()).collect();
        // The first of a shuffle.
        for place in 0..needles {
            let other = place + below(rng, nouns.len() - place);
            nouns.swap(place, other);
        }
        let mut lines: Vec<Needle<'_>> = Vec::with_capacity(needles);
        for noun in &nouns[..needles] {
            let digits = (0..DIGITS).map(|_| char::from(b'0' + below(rng, 10) as u8)).collect();
            lines.push(Needle { noun: &self.nouns[*noun], digits, place: unit(rng) });
        }
        let first = self.lines[below(rng, self.lines.len())];
        let asked = below(rng, needles);

        let text_of = |bytes| self.with_needles(first, bytes, &lines, asked);
        let (ids, text) = fit(tokenizer, target, text_of)?;
        let Needle { noun, digits, .. } = &lines[asked];
        let line = needle_line(noun, digits);
        let at = text.find(&line).expect("the line is in the text");
        let depth = at as f64 / text.len() as f64;
        let answer = Answer::Code { digits: digits.clone(), noun: (*noun).to_owned(), depth, needles };
        Ok(Question { prompt: ids, answer })
    }

    /// A window of held-out text: a prompt of `context - scored` tokens, and the `scored + 1` tokens after it.
    ///
    /// # Errors
    /// [`EvalError::ContextTooShort`] for no room for a prompt, and what the tokenizer refuses.
    pub fn window(
        &self,
        tokenizer: &Tokenizer,
        seed: u64,
        context: usize,
        scored: usize,
        prompt: usize,
    ) -> Result<Question> {
        if context <= scored {
            return Err(EvalError::ContextTooShort { context, least: scored + 1 }.into());
        }
        let rng = &mut stream(seed, Task::Perplexity, context, prompt);
        let first = self.lines[below(rng, self.lines.len())];
        let mut bytes = 4 * (context + 1);
        loop {
            let mut ids = tokenizer.encode(&(self.begin.to_owned() + &self.excerpt(first, bytes)))?;
            // The last tokens of a text that is cut off may be others than in the whole of it.
            if ids.len() > context + 16 {
                let mut text = ids.split_off(context - scored);
                text.truncate(scored + 1);
                return Ok(Question { prompt: ids, answer: Answer::Text(text) });
            }
            bytes += bytes / 4;
        }
    }

    /// Text from byte `first` on, the whole again after its end, of at most `bytes` bytes.
    fn excerpt(&self, first: usize, bytes: usize) -> String {
        let mut excerpt = String::with_capacity(bytes);
        let mut rest = &self.text[first..];
        while excerpt.len() < bytes {
            let room = bytes - excerpt.len();
            if rest.len() > room {
                let mut cut = room;
                while !rest.is_char_boundary(cut) {
                    cut -= 1;
                }
                excerpt.push_str(&rest[..cut]);
                break;
            }
            excerpt.push_str(rest);
            rest = &self.text;
        }
        excerpt
    }

    /// The text of a prompt with `bytes` bytes of held-out text.
    fn with_needles(&self, first: usize, bytes: usize, needles: &[Needle<'_>], asked: usize) -> String {
        let excerpt = self.excerpt(first, bytes);
        let mut lines: Vec<&str> = excerpt.lines().collect();
        if lines.last().is_some_and(|line| line.trim().is_empty()) {
            lines.pop();
        }
        let mut by_line: Vec<Vec<usize>> = vec![Vec::new(); lines.len() + 1];
        for (index, needle) in needles.iter().enumerate() {
            by_line[(needle.place * (lines.len() + 1) as f64) as usize].push(index);
        }
        let mut text = self.begin.to_owned();
        for (line, here) in by_line.iter().enumerate() {
            for index in here {
                text.push_str(&needle_line(needles[*index].noun, &needles[*index].digits));
            }
            if let Some(line) = lines.get(line) {
                text.push_str(line);
                text.push('\n');
            }
        }
        let noun = needles[asked].noun;
        text.push_str(&format!(
            "Question: what is the secret code for {noun}? Answer: The secret code for {noun} is"
        ));
        text
    }
}

/// A secret code.
struct Needle<'a> {
    noun: &'a str,
    digits: String,
    /// Where its line is, from 0 to 1 of all lines.
    place: f64,
}

fn needle_line(noun: &str, digits: &str) -> String {
    format!("The secret code for {noun} is {digits}.\n")
}

/// The text that comes nearest to `target` tokens without exceeding it, of those that `text_of` makes of a number of bytes.
fn fit(
    tokenizer: &Tokenizer,
    target: usize,
    text_of: impl Fn(usize) -> String,
) -> Result<(Vec<u32>, String)> {
    let mut best: Option<(Vec<u32>, String)> = None;
    // Bytes that are too few, and too many.
    let (mut few, mut many) = (0, usize::MAX);
    let mut bytes = 3 * target;
    // Text is nearly as many tokens as its length says, so a few steps are enough.
    for _ in 0..40 {
        let text = text_of(bytes);
        let ids = tokenizer.encode(&text)?;
        let found = ids.len();
        if found <= target {
            few = bytes;
            if best.as_ref().is_none_or(|(best, _)| best.len() < found) {
                best = Some((ids, text));
            }
            if target - found <= SLACK {
                break;
            }
            bytes += (3 * (target - found)).max(1);
        } else {
            many = bytes;
            bytes = bytes.saturating_sub((3 * (found - target)).max(1));
        }
        if bytes <= few || bytes >= many {
            bytes = few + (many - few) / 2;
        }
        if many - few <= 1 {
            break;
        }
    }
    let found = best.as_ref().map_or(0, |(ids, _)| ids.len());
    // One character may be a few tokens, and a needle that moves to the next line may change some.
    best.filter(|_| target - found <= 4 * SLACK).ok_or_else(|| EvalError::CannotFit { target, found }.into())
}

fn read(dir: &Path, name: &str) -> Result<(PathBuf, String)> {
    let path = dir.join(name);
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(source) => return Err(EvalError::MissingHaystack { path, source }.into()),
    };
    match String::from_utf8(bytes) {
        Ok(text) => Ok((path, text)),
        Err(error) => {
            let offset = error.utf8_error().valid_up_to();
            Err(Error::PromptNotUtf8 { source_name: path.display().to_string(), offset })
        }
    }
}

/// The random numbers of a prompt: the same on every machine, and whatever other prompts there are.
fn stream(seed: u64, task: Task, context: usize, prompt: usize) -> ChaCha8Rng {
    let mut key = [0; 32];
    for (bytes, number) in key.chunks_exact_mut(8).zip([seed, task as u64, context as u64, prompt as u64]) {
        bytes.copy_from_slice(&number.to_le_bytes());
    }
    ChaCha8Rng::from_seed(key)
}

/// Evenly from `0..limit`.
fn below(rng: &mut ChaCha8Rng, limit: usize) -> usize {
    ((u128::from(rng.next_u64()) * limit as u128) >> 64) as usize
}

/// Evenly from `0.0..1.0`.
fn unit(rng: &mut ChaCha8Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}
