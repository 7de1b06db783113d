//! From tokens to certain text, cut off before a stop text.

use std::collections::VecDeque;

use super::job::{Piece, ScoredToken};
use crate::error::Result;
use crate::tokenizer::TextStream;

/// Holds back what may still become a stop text, and the scores of tokens until their text is certain.
#[derive(Debug)]
pub(super) struct TextFilter {
    /// `None` without a tokenizer: there are tokens and no text.
    stream: Option<TextStream>,
    stops: Vec<String>,
    /// What is not certain yet.
    held: String,
    /// Characters that were released.
    released: usize,
    /// Tokens that were not released, each with the character that it begins at.
    tokens: VecDeque<ScoredToken>,
}

impl TextFilter {
    pub fn new(stream: Option<TextStream>, stops: Vec<String>) -> Self {
        Self { stream, stops, held: String::new(), released: 0, tokens: VecDeque::new() }
    }

    /// Takes the next token and returns what is certain now, and whether a stop text appeared: the text then ends before it.
    pub fn push(&mut self, id: u32, score: Option<ScoredToken>) -> Result<(Piece, bool)> {
        let begin = self.released + self.held.chars().count();
        self.tokens.extend(score.map(|score| ScoredToken { text_offset: begin, ..score }));
        if let Some(text) = self.stream.as_mut().map_or(Ok(None), |stream| stream.push(id))? {
            self.held.push_str(&text);
        }
        Ok(self.cut())
    }

    /// The rest, once there are no more tokens. A stop text that only the end completes counts.
    pub fn finish(&mut self) -> Result<(Piece, bool)> {
        if let Some(text) = self.stream.as_mut().map_or(Ok(None), TextStream::finish)? {
            self.held.push_str(&text);
        }
        let (mut piece, stopped) = self.cut();
        if !stopped {
            let rest = self.release(self.held.len());
            piece.text.push_str(&rest.text);
            piece.tokens.extend(rest.tokens);
        }
        Ok((piece, stopped))
    }

    fn cut(&mut self) -> (Piece, bool) {
        let stop = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min();
        if let Some(begin) = stop {
            self.held.truncate(begin);
            let end = self.released + self.held.chars().count();
            self.tokens.retain(|token| token.text_offset < end);
            return (self.release(begin), true);
        }
        let begun = |at: &usize| self.stops.iter().any(|stop| stop.starts_with(&self.held[*at..]));
        let certain = self.held.char_indices().map(|(at, _)| at).find(begun).unwrap_or(self.held.len());
        (self.release(certain), false)
    }

    /// The first `bytes` bytes of what is held, and the tokens that begin there.
    fn release(&mut self, bytes: usize) -> Piece {
        let rest = self.held.split_off(bytes);
        let text = std::mem::replace(&mut self.held, rest);
        self.released += text.chars().count();
        let all = self.held.is_empty();
        let count = self.tokens.iter().take_while(|token| all || token.text_offset < self.released).count();
        Piece { text, tokens: self.tokens.drain(..count).collect() }
    }
}

/// The log-probability of `id`, and of the `top` likeliest tokens, from one logit per id. Logits that are no finite numbers have no share.
pub(super) fn score(logits: &[f32], id: u32, top: usize) -> ScoredToken {
    let most = logits.iter().copied().filter(|logit| logit.is_finite()).fold(f32::NEG_INFINITY, f32::max);
    let share = |logit: f32| f64::from(logit) - f64::from(most);
    let sum: f64 = logits.iter().filter(|logit| logit.is_finite()).map(|logit| share(*logit).exp()).sum();
    let logprob = |logit: f32| (share(logit) - sum.ln()) as f32;
    let mut ids: Vec<u32> = (0..logits.len() as u32).filter(|id| logits[*id as usize].is_finite()).collect();
    let order = |a: &u32, b: &u32| {
        let (first, second) = (logits[*a as usize] + 0.0, logits[*b as usize] + 0.0);
        second.total_cmp(&first).then(a.cmp(b))
    };
    let top = top.min(ids.len());
    if top > 0 && top < ids.len() {
        ids.select_nth_unstable_by(top - 1, order);
    }
    ids.truncate(top);
    ids.sort_unstable_by(order);
    ScoredToken {
        id,
        logprob: logprob(logits[id as usize]),
        top: ids.into_iter().map(|id| (id, logprob(logits[id as usize]))).collect(),
        text_offset: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Passes `pieces` through a filter as if they were the tokens' texts.
    fn filtered(stops: &[&str], pieces: &[&str]) -> (Vec<String>, bool, Vec<u32>) {
        let stops = stops.iter().map(|stop| (*stop).to_owned()).collect();
        let mut filter = TextFilter::new(None, stops);
        let (mut out, mut ids) = (Vec::new(), Vec::new());
        for (id, text) in (0..).zip(pieces) {
            let begin = filter.released + filter.held.chars().count();
            let score = ScoredToken { id, logprob: 0.0, top: Vec::new(), text_offset: begin };
            filter.tokens.push_back(score);
            filter.held.push_str(text);
            let (piece, stopped) = filter.cut();
            out.push(piece.text);
            ids.extend(piece.tokens.iter().map(|token| token.id));
            if stopped {
                return (out, true, ids);
            }
        }
        let (piece, stopped) = filter.finish().unwrap();
        out.push(piece.text);
        ids.extend(piece.tokens.iter().map(|token| token.id));
        (out, stopped, ids)
    }

    #[test]
    fn a_stop_text_over_several_tokens_ends_the_text_before_it() {
        let (out, stopped, ids) = filtered(&["END"], &["one E", "N", "x E", "N", "D two"]);
        assert_eq!(out, ["one ", "", "ENx ", "", ""]);
        assert!(stopped);
        assert_eq!(ids, [0, 1, 2], "of the tokens, those that begin before it");
    }

    #[test]
    fn what_did_not_become_a_stop_text_comes_in_the_end() {
        let (out, stopped, ids) = filtered(&["\n\n", "abc"], &["x\n", "ab", "é", "ab"]);
        assert_eq!(out, ["x", "\n", "abé", "", "ab"]);
        assert!(!stopped);
        assert_eq!(ids, [0, 1, 2, 3]);
        assert_eq!(filtered(&[], &["a", "", "b"]).0, ["a", "", "b", ""]);
    }

    #[test]
    fn the_first_stop_text_counts_whichever_is_listed_first() {
        assert_eq!(filtered(&["later", "so"], &["not so much later"]).0, ["not "]);
        assert_eq!(filtered(&["aab"], &["aa", "ab", "c"]).0, ["", "a"], "a prefix that begins again");
    }

    /// Whatever the cuts, the pieces joined are the text up to the first stop text.
    #[test]
    fn cuts_do_not_matter() {
        let text = "aabaabbabbaabaaa";
        for bits in 0..1u32 << (text.len() - 1) {
            let mut pieces = vec![String::new()];
            for (at, char) in text.chars().enumerate() {
                pieces.last_mut().expect("one").push(char);
                if bits >> at & 1 == 1 {
                    pieces.push(String::new());
                }
            }
            let pieces: Vec<_> = pieces.iter().map(String::as_str).collect();
            for stops in [&["bba"][..], &["baaa", "abb"], &["bab", "zz"], &["none"]] {
                let end = stops.iter().filter_map(|stop| text.find(stop)).min();
                let (out, stopped, _) = filtered(stops, &pieces);
                assert_eq!(out.concat(), text[..end.unwrap_or(text.len())], "{stops:?} {pieces:?}");
                assert_eq!(stopped, end.is_some());
            }
        }
    }

    #[test]
    fn scores_are_logarithms_of_shares() {
        let scored = score(&[0.0, 2.0, f32::NEG_INFINITY, 2.0, 1.0, f32::NAN], 4, 3);
        let sum = 1.0 + 2.0 * 2f64.exp() + 1f64.exp();
        let of = |logit: f64| (logit - sum.ln()) as f32;
        assert!((scored.logprob - of(1.0)).abs() < 1e-6);
        assert_eq!(scored.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, 3, 4]);
        assert!((scored.top[0].1 - of(2.0)).abs() < 1e-6);
        assert_eq!(score(&[1e30, 0.0], 1, 9).top.len(), 2, "no more than there are");
        assert!(score(&[5.0, 5.0], 0, 0).top.is_empty());
    }
}
