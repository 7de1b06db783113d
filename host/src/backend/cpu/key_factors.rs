use std::ops::Range;

use super::low_rank::{LowRankError, project, rebuild, whole_basis};
use super::row::{NewTokens, Row, Tokens};
use crate::backend::{StepEntry, StepKind};
use crate::memory::{Allocator, PagePool, Word};
use crate::paging::SEGMENT_KEYS;
use crate::pipeline::{LowRank, Place};
use crate::{Error, KvConfig, KvShape, Result};

/// A request's keys in [low rank](LowRank): what those of pages that left the steady zone are rebuilt from.
#[derive(Debug)]
pub(super) struct KeyFactors {
    /// `[layers, kv_heads, rank, head_dim]`.
    bases: Box<[f32]>,
    /// One block for each segment of the directory: `[layers, 512 * page_tokens, rank]`.
    coefficients: Vec<Box<[f32]>>,
}

impl KeyFactors {
    /// Of a request without tokens, if keys are kept so. Without a prompt its bases are of axes.
    ///
    /// # Errors
    /// [`Error::AllocationFailed`].
    pub fn new(config: &KvConfig, allocator: &Allocator) -> Result<Option<Self>> {
        let Some(LowRank { rank, .. }) = config.low_rank() else { return Ok(None) };
        let KvShape { kv_heads, head_dim, .. } = *config.shape();
        let mut bases = allocator.zeroed(config.basis_elements(), "bases of keys")?;
        let axes = whole_basis(&[], kv_heads, head_dim, *rank).expect("a configuration's rank");
        bases.chunks_exact_mut(axes.len()).for_each(|basis| basis.copy_from_slice(&axes));
        Ok(Some(Self { bases, coefficients: Vec::new() }))
    }

    /// Room for the tokens of `segments` segments.
    ///
    /// # Errors
    /// [`Error::AllocationFailed`]; what there is then stays.
    pub fn extend(&mut self, config: &KvConfig, segments: usize, allocator: &Allocator) -> Result<()> {
        while self.coefficients.len() < segments {
            let block = allocator.zeroed(config.coefficient_elements(), "coefficients of keys")?;
            self.coefficients.push(block);
        }
        Ok(())
    }

    /// Gives up what is beyond `segments` segments.
    pub fn truncate(&mut self, segments: usize) {
        self.coefficients.truncate(segments);
    }

    /// Bytes of coefficients and of bases.
    pub fn bytes(&self) -> [u64; 2] {
        let coefficients = self.coefficients.iter().map(|block| size_of_val(&**block) as u64).sum();
        [coefficients, size_of_val(&*self.bases) as u64]
    }

    /// Index of one layer's `rows`, after their summaries: a prompt gets its basis; the pages that leave the steady zone with this step get
    /// their coefficients, and where they are on the GPU rebuilt keys. `keys` are the entry's new ones, `[new, kv_heads, head_dim]`.
    ///
    /// # Errors
    /// [`Error::KeyNotFinite`] of a prompt.
    pub fn index(
        &mut self,
        config: &KvConfig,
        pool: &mut PagePool,
        layer: usize,
        entry: &StepEntry,
        rows: &[Row],
        keys: &[f32],
    ) -> Result<()> {
        let LowRank { rank, rotary } = config.low_rank().expect("keys are kept so");
        let KvShape { kv_heads, head_dim, .. } = *config.shape();
        let (layout, width) = (config.layout(), kv_heads * head_dim);
        let page_tokens = layout.page_tokens();
        // A token's keys, as pages store them, and turned back.
        let plain = |token: usize, pool: &PagePool, out: &mut [f32]| {
            for (head, out) in out.chunks_exact_mut(head_dim).enumerate() {
                // Of no new token there is nothing to start from.
                let data = &keys[(head * head_dim).min(keys.len())..];
                let keys = NewTokens { data, stride: width, head_dim };
                let of_row = Tokens { pool, layout, before: entry.before, keys };
                of_row.key(rows[head].steady(), token, out);
                rotary.turn_back(token, out);
            }
        };
        let gather = |tokens: Range<usize>, pool: &PagePool| {
            let mut all = vec![0.0; tokens.len() * width];
            tokens.zip(all.chunks_exact_mut(width)).for_each(|(token, out)| plain(token, pool, out));
            all
        };
        let tokens = config.leaving_tokens(entry.before, entry.after());
        let left = (tokens.start / page_tokens) as u32..(tokens.end / page_tokens) as u32;
        if entry.kind == StepKind::Prompt {
            let all = gather(0..entry.after(), pool);
            let basis = whole_basis(&all, kv_heads, head_dim, *rank).map_err(|error| match error {
                LowRankError::NotFinite { token, .. } => {
                    Error::KeyNotFinite { request: entry.request, layer, token }
                }
                other => unreachable!("a configuration's rank, whole tokens: {other}"),
            })?;
            self.bases[layer * basis.len()..][..basis.len()].copy_from_slice(&basis);
            self.store(config, layer, tokens.start, &all[tokens.start * width..tokens.end * width]);
        } else {
            self.store(config, layer, tokens.start, &gather(tokens.clone(), pool));
        }
        for (key, (head, row)) in left.flat_map(|key| rows.iter().enumerate().map(move |row| (key, row))) {
            if let Some(page) = row.steady().lookup(key) {
                self.rebuild(config, Place { layer, kv_head: head }, key, pool.page_mut(page));
            }
        }
        Ok(())
    }

    /// Stores the coefficients of the tokens from `first` on, whose keys are `plain`, `[tokens, kv_heads, head_dim]`.
    fn store(&mut self, config: &KvConfig, layer: usize, first: usize, plain: &[f32]) {
        let KvShape { kv_heads, head_dim, layers, .. } = *config.shape();
        let (width, basis) = (kv_heads * head_dim, self.bases.len() / layers);
        let (basis, rank) = (&self.bases[layer * basis..][..basis], basis / width);
        let in_segment = SEGMENT_KEYS * config.layout().page_tokens();
        let (mut first, mut rest) = (first, plain);
        while !rest.is_empty() {
            let at = first % in_segment;
            let (now, later) = rest.split_at(((in_segment - at) * width).min(rest.len()));
            let tokens = now.len() / width;
            let of_layer = &mut self.coefficients[first / in_segment][layer * in_segment * rank..];
            project(now, basis, kv_heads, head_dim, &mut of_layer[at * rank..][..tokens * rank]);
            (first, rest) = (first + tokens, later);
        }
    }

    /// Writes the keys of page `key` of a row into `page`, whose values stay.
    pub fn rebuild(&self, config: &KvConfig, place: Place, key: u32, page: &mut [Word]) {
        let LowRank { rank, rotary } = config.low_rank().expect("keys are kept so");
        let KvShape { kv_heads, head_dim, .. } = *config.shape();
        let page_tokens = config.layout().page_tokens();
        let of_head = rank * head_dim;
        let basis = &self.bases[(place.layer * kv_heads + place.kv_head) * of_head..][..of_head];
        let (segment, in_segment) = (key as usize / SEGMENT_KEYS, key as usize % SEGMENT_KEYS);
        let first = (place.layer * SEGMENT_KEYS + in_segment) * page_tokens * rank;
        let coefficients = &self.coefficients[segment][first..][..page_tokens * rank];
        let mut rebuilt = vec![0.0; head_dim];
        for (token, coefficients) in coefficients.chunks_exact(*rank).enumerate() {
            rebuild(coefficients, basis, &mut rebuilt);
            rotary.turn(key as usize * page_tokens + token, &mut rebuilt);
            config.layout().write_key(page, token, &rebuilt);
        }
    }
}
