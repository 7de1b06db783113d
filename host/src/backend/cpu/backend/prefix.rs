//! Prompts that begin with pages of others.

use rayon::prelude::*;

use super::super::row::{Row, Tiers};
use super::CpuBackend;
use crate::memory::{HostArena, KvDtype, PageLayout, PrefixCache};
use crate::pipeline::RequestId;
use crate::{Error, Result};

/// Elements that a thread rounds at a time.
const ROUNDED: usize = 1 << 14;

impl CpuBackend {
    /// Keeps host pages of prompts for others that begin alike: at most `limit_bytes` bytes of them, or what requests leave of the host memory.
    /// Requests take them back when they need the room.
    ///
    /// # Errors
    /// Those of [`PrefixCache::new`].
    pub fn with_prefixes(mut self, limit_bytes: Option<u64>) -> Result<Self> {
        self.tiers.prefixes = Some(PrefixCache::new(&self.config, limit_bytes)?);
        Ok(self)
    }

    /// Forgets all that is kept of prompts. What requests share stays theirs.
    pub fn clear_prefixes(&mut self) {
        let Tiers { prefixes, arena, .. } = &mut self.tiers;
        while prefixes.as_mut().is_some_and(|prefixes| prefixes.evict(arena)) {}
    }

    /// Host slabs that requests, transfers and cached prefixes hold.
    pub fn used_slabs(&self) -> usize {
        self.tiers.arena.used_slabs()
    }

    /// A request that has just come takes the slabs of what is there of its prompt.
    pub(super) fn share_blocks(&mut self, id: RequestId, prompt: &[u32], unit: usize) -> Result<usize> {
        let Self { tiers: Tiers { prefixes, arena, .. }, requests, .. } = self;
        let Some(prefixes) = prefixes else { return Ok(0) };
        let request = requests.get_mut(&id).ok_or(Error::UnknownRequest(id))?;
        let shared = prefixes.share(prompt, unit, arena);
        for (row, state) in request.rows.iter_mut().enumerate() {
            state.host_mut().share(shared.slabs.iter().map(|block| block[row]));
        }
        request.prefix = shared.tokens;
        Ok(shared.tokens)
    }

    /// The keys and values of a layer, of which the first `prefix` tokens' come from host pages.
    pub(super) fn load_prefix(
        &self,
        id: RequestId,
        layer: usize,
        prefix: usize,
        keys: &mut [f32],
        values: &mut [f32],
    ) -> Result<()> {
        if self.tiers.prefixes.is_some() {
            let request = self.requests.get(&id).ok_or(Error::UnknownRequest(id))?;
            let kv_heads = self.config.shape().kv_heads;
            let rows = &request.rows[layer * kv_heads..][..kv_heads];
            fill(self.config.layout(), &self.tiers.arena, rows, prefix, keys, values);
        }
        Ok(())
    }

    /// Keeps a prompt's blocks, as far as they are complete.
    pub(super) fn keep_blocks(&mut self, id: RequestId, prompt: &[u32]) {
        let Self { tiers: Tiers { prefixes: Some(prefixes), arena, .. }, requests, .. } = self else {
            return;
        };
        let Some(request) = requests.get(&id) else { return };
        // Pages that a transfer still writes are nobody else's yet, nor are those behind them.
        let published = request.rows.iter().map(|row| row.host().published_slabs()).min().unwrap_or(0);
        let tokens = prompt.len().min(published * prefixes.block_tokens());
        let slabs = |block: usize| request.rows.iter().map(|row| row.host().slabs()[block]).collect();
        prefixes.keep(&prompt[..tokens], slabs, arena);
    }
}

/// Puts the keys and values of the first `prefix` tokens of a layer, `[tokens, kv_heads, head_dim]`, in their places, out of the host pages of
/// `rows`, one a KV head, and rounds the others to what pages store.
fn fill(
    layout: &PageLayout,
    arena: &HostArena,
    rows: &[Row],
    prefix: usize,
    keys: &mut [f32],
    values: &mut [f32],
) {
    let (page_tokens, head_dim) = (layout.page_tokens(), layout.head_dim());
    let width = rows.len() * head_dim;
    let ((keys, new_keys), (values, new_values)) =
        (keys.split_at_mut(prefix * width), values.split_at_mut(prefix * width));
    let page_width = page_tokens * width;
    let pages = keys.par_chunks_mut(page_width).zip(values.par_chunks_mut(page_width));
    pages.enumerate().for_each(|(key, (keys, values))| {
        let (mut page, mut of_page) = (vec![0; layout.page_words()], vec![0.0; page_tokens * head_dim]);
        for (kv_head, row) in rows.iter().enumerate() {
            let host = row.host().published(key as u32).expect("a prefix is complete on the host");
            arena.load(host, &mut page);
            let mut put = |to: &mut [f32], read: fn(&PageLayout, &[_], &mut [f32])| {
                read(layout, &page, &mut of_page);
                for (to, from) in to.chunks_exact_mut(width).zip(of_page.chunks_exact(head_dim)) {
                    to[kv_head * head_dim..][..head_dim].copy_from_slice(from);
                }
            };
            put(keys, PageLayout::read_keys);
            put(values, PageLayout::read_values);
        }
    });
    let dtype = layout.dtype();
    if dtype != KvDtype::F32 {
        let new = new_keys.par_chunks_mut(ROUNDED).chain(new_values.par_chunks_mut(ROUNDED));
        new.for_each(|part| part.iter_mut().for_each(|element| *element = dtype.round(*element)));
    }
}
