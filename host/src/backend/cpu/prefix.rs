//! Prompts that begin with pages of others.

use rayon::prelude::*;

use super::row::Row;
use crate::memory::{HostArena, KvDtype, PageLayout};

/// Elements that a thread rounds at a time.
const ROUNDED: usize = 1 << 14;

/// Puts the keys and values of the first `prefix` tokens of a layer, `[tokens, kv_heads, head_dim]`, in their places, out of the host pages of
/// `rows`, one a KV head, and rounds the others to what pages store.
pub(super) fn fill(
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
