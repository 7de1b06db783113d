//! The launches of `prefill_wgmma_64` and `prefill_wgmma_128`; query tiles are [`prefill`](super::prefill)'s.

use super::prefill::QUERY_TILE;

/// Threads of a block: two warpgroups.
pub const BLOCK: u32 = 256;

/// Tokens of which a block takes keys and values at a time.
pub const KEY_TILE: u32 = 128;

/// Tiles of keys, and of values, in shared memory: one is multiplied while the next is on its way.
pub const STAGES: u32 = 2;

/// Shared memory of a block: its queries, and the tiles of keys and values.
pub const fn shared_bytes(head_words: u32) -> u32 {
    (QUERY_TILE + 2 * STAGES * KEY_TILE) * head_words * 16
}
