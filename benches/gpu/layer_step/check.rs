//! Refuses to time a step that is wrong.

use std::error::Error;

use half::bf16;
use spinkv_kernels::abi::WORD_ELEMENTS;

use super::layer::{Layer, tail};
use super::{GROUP, HEAD_WORDS, KV_HEADS, PAGE_TOKENS, ROWS, SELECTED, SETS, SINK_PAGES};
use crate::attend::check_head;

impl Layer {
    /// Steps once on each set: the selection must be the one that the caches were filled for, pages and copies as many as planned, and
    /// of some rows the attention of a head that of f64.
    pub fn check(&self, ids: &[u32], misses: usize) -> Result<(), Box<dyn Error>> {
        let stream = &self.stream;
        self.reset(stream)?;
        for set in 0..SETS {
            // SAFETY: tables, lists and pages agree with each other, and the tables were reset.
            unsafe { self.step(set).launch(&self.kernels, stream)? };
            let lists = &self.sets[set];
            if lists.ids.to_vec(stream)? != ids {
                return Err(format!("set {set}: another selection than the caches were filled for").into());
            }
            for (what, counts, expected) in [
                ("ids", &lists.id_counts, SELECTED),
                ("pages", &lists.page_counts, SELECTED),
                ("copies", &lists.copy_counts, misses),
                ("faults", &lists.faults, 0),
            ] {
                let counts = counts.to_vec(stream)?;
                if counts.iter().any(|count| *count as usize != expected) {
                    return Err(format!("set {set}: {what} {counts:?}, {expected} were planned").into());
                }
            }
            self.check_attention(ids).map_err(|wrong| format!("set {set}, {wrong}"))?;
        }
        Ok(())
    }

    /// A head of some rows, those of requests with a page that leaves among them.
    fn check_attention(&self, ids: &[u32]) -> Result<(), Box<dyn Error>> {
        let outputs = self.outputs.to_vec(&self.stream)?;
        let outputs: &[[bf16; WORD_ELEMENTS]] = bytemuck::cast_slice(&outputs);
        for row in (0..ROWS).step_by(13) {
            let entry = &self.host_entries[row / KV_HEADS];
            let pages = (0..SINK_PAGES)
                .chain(ids[row * SELECTED..][..SELECTED].iter().map(|id| *id as usize))
                .flat_map(|key| key * PAGE_TOKENS..(key + 1) * PAGE_TOKENS);
            let tokens = pages.chain(tail(entry)).map(|token| {
                if token + 1 == entry.tokens as usize {
                    // The new one, which is nowhere before.
                    let new = row * HEAD_WORDS..(row + 1) * HEAD_WORDS;
                    let (key, value) = (&self.host_keys[new.clone()], &self.host_values[new]);
                    return (key.as_flattened(), value.as_flattened());
                }
                let (key, at) = (token / PAGE_TOKENS, token % PAGE_TOKENS * HEAD_WORDS);
                (self.page_words(row, key, at), self.page_words(row, key, PAGE_TOKENS * HEAD_WORDS + at))
            });
            let head = row * GROUP + row % GROUP;
            let words = head * HEAD_WORDS..(head + 1) * HEAD_WORDS;
            let (query, found) = (&self.host_queries[words.clone()], &outputs[words]);
            check_head(query.as_flattened(), tokens, found.as_flattened())
                .map_err(|wrong| format!("row {row}: attention is {wrong}"))?;
        }
        Ok(())
    }
}
