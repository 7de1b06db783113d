//! The kernels that cluster a run of tokens (RetroInfer, arXiv 2505.02922), and what they share.
//!
//! A run is cut into *spans*, equal parts of about 8,192 tokens, in each of which k-means iterates by itself (the paper's segments; here a segment
//! is one of the tables). Every span starts with as many centroids; the last pass has all of them for every token. A cluster's
//! pages follow each other, and are its own; each page is a partition.

use super::WARP;

/// Tokens of a span, about.
pub const SPAN_TOKENS: u32 = 8192;

/// Tokens of a cluster, on average.
pub const CLUSTER_TOKENS: u32 = 16;

/// Centroids of a span are a multiple of it.
pub const CENTROID_UNIT: u32 = 8;

/// Iterations before the last pass.
pub const ITERATIONS: u32 = 9;

/// The most tokens of a run: so that the products that place spans stay below 2^32.
pub const MAX_TOKENS: u32 = 1 << 22;

/// The most spans of a run, for the same reason.
pub const MAX_SPANS: u32 = 512;

/// What the list of members has where a cluster's last page has no token.
pub const NO_TOKEN: u32 = u32::MAX;

/// Spans of a run of `tokens` tokens: `max(round(tokens / 8192), 1)`.
pub const fn spans(tokens: u32) -> u32 {
    let spans = (tokens + SPAN_TOKENS / 2) / SPAN_TOKENS;
    if spans == 0 { 1 } else { spans }
}

/// Centroids of each of `spans` spans: a sixteenth of its tokens, rounded to a multiple of [`CENTROID_UNIT`], at least one unit.
pub const fn span_centroids(tokens: u32, spans: u32) -> u32 {
    let unit = CLUSTER_TOKENS * CENTROID_UNIT * spans;
    let units = (tokens + unit / 2) / unit;
    if units == 0 { CENTROID_UNIT } else { units * CENTROID_UNIT }
}

/// The most clusters that [`spans`] and [`span_centroids`] make of runs of up to `tokens` tokens.
pub const fn max_clusters(tokens: u32) -> u32 {
    tokens / CLUSTER_TOKENS + CENTROID_UNIT * spans(tokens)
}

/// The first token of span `span`, below [`MAX_SPANS`]; of one beyond the last, the end of the run.
pub const fn span_start(tokens: u32, spans: u32, span: u32) -> u32 {
    span * tokens / spans
}

/// The token of a span of `len` tokens that its centroid `centroid` of `centroids` starts as: evenly spaced, from half a stride on.
pub const fn start_token(len: u32, centroids: u32, centroid: u32) -> u32 {
    ((2 * centroid as u64 + 1) * len as u64 / (2 * centroids as u64)) as u32
}

/// The most pages of `clusters` clusters of `tokens` tokens.
pub const fn max_pages(tokens: u32, clusters: u32, page_tokens: u32) -> u32 {
    ((tokens as u64 + clusters as u64 * (page_tokens as u64 - 1)) / page_tokens as u64) as u32
}

/// The launch of `cluster_sums`.
pub mod sums {
    /// Threads of a block.
    pub const BLOCK: u32 = 128;

    /// Tokens that a thread adds up.
    pub const PART_TOKENS: u32 = 512;

    /// Parts of a run.
    pub const fn parts(tokens: u32) -> u32 {
        tokens.div_ceil(PART_TOKENS)
    }

    /// Blocks for rows of `width` words (KV heads x words of a key).
    pub const fn grid(tokens: u32, width: u32) -> u64 {
        parts(tokens) as u64 * width.div_ceil(BLOCK) as u64
    }
}

/// The launch of `cluster_start`.
pub mod start {
    /// Threads of a block.
    pub const BLOCK: u32 = 256;

    /// Centroids of a block.
    pub const CENTROIDS: u32 = 64;

    /// Shared memory of a block, in bytes: a partial sum, four channels, of each thread, and the mean.
    pub const SHARED_BYTES: u32 = (BLOCK + MEAN_WORDS) * 16;

    /// Words that a mean has at most: a head of 128 in f32.
    pub const MEAN_WORDS: u32 = 32;

    /// Blocks of `kv_heads` rows of `centroids`.
    pub const fn grid(kv_heads: u32, centroids: u32) -> u64 {
        kv_heads as u64 * centroids.div_ceil(CENTROIDS) as u64
    }
}

/// The launches of `cluster_assign_64` and `cluster_assign_128`.
pub mod assign {
    /// Threads of a block.
    pub const BLOCK: u32 = 128;

    /// Tokens of a block.
    pub const TOKENS: u32 = 128;

    /// Centroids that a block multiplies with at a time.
    pub const CENTROIDS: u32 = 64;

    /// Stages of the ring of centroids; one less is in flight. The block's tokens pass through two of them first.
    pub const STAGES: u32 = 4;

    /// Tiles of a span.
    pub const fn tiles(tokens: u32, spans: u32) -> u32 {
        tokens.div_ceil(spans).div_ceil(TOKENS)
    }

    /// Blocks of a launch.
    pub const fn grid(kv_heads: u32, tokens: u32, spans: u32) -> u64 {
        kv_heads as u64 * spans as u64 * tiles(tokens, spans) as u64
    }

    /// Shared memory of a block, in bytes: the ring, then the biases of its centroids.
    pub const fn shared_bytes(head_words: u32) -> u32 {
        STAGES * CENTROIDS * (head_words * 16 + 4)
    }
}

/// The launches of `cluster_update` and `cluster_list`: a warp a cluster.
pub mod update {
    use super::WARP;

    /// Threads of a block.
    pub const BLOCK: u32 = 256;

    /// Clusters of a block: those of a row are a multiple of it.
    pub const CLUSTERS: u32 = BLOCK / WARP;

    /// Members that a warp lists at a time: up to 31 that are left from before, and those among 128 tokens.
    pub const LISTED: u32 = 160;

    /// Shared memory of a block, in bytes: a list a warp.
    pub const SHARED_BYTES: u32 = CLUSTERS * LISTED * 4;

    /// Blocks of a launch.
    pub const fn grid(kv_heads: u32, centroids: u32) -> u64 {
        kv_heads as u64 * (centroids / CLUSTERS) as u64
    }
}

/// The launch of `cluster_pages`: a block a row.
pub mod pages {
    use super::WARP;

    /// Threads of a block.
    pub const BLOCK: u32 = 256;

    /// Shared memory of a block, in bytes.
    pub const SHARED_BYTES: u32 = 4 * 2 * (BLOCK / WARP);
}

/// The launch of `cluster_means`.
pub mod means {
    use super::WARP;

    /// Threads of a block.
    pub const BLOCK: u32 = 256;

    /// The most tokens of a page: two a lane.
    pub const MAX_PAGE_TOKENS: u32 = 2 * WARP;

    /// Blocks for pages of all KV heads: a warp each, but no more than a GPU has in flight.
    pub const fn grid(pages: u32) -> u32 {
        let blocks = pages.div_ceil(BLOCK / WARP);
        if blocks > 2048 { 2048 } else { blocks }
    }
}

/// The launch of `gather_run`.
pub mod gather_run {
    /// Threads of a block.
    pub const BLOCK: u32 = 256;

    /// The most words of a launch, keys and values together: threads advance by the launch's, in 32 bits.
    pub const MAX_WORDS: u32 = u32::MAX / 2;

    /// Blocks for so many words.
    pub const fn grid(words: u32) -> u32 {
        let blocks = words.div_ceil(BLOCK);
        if blocks > 1024 { 1024 } else { blocks }
    }
}

/// The launch of `cluster_store`.
pub mod store {
    use super::WARP;

    /// Threads of a block.
    pub const BLOCK: u32 = 256;

    /// The most blocks: threads are counted in 32 bits.
    pub const MAX_BLOCKS: u32 = u32::MAX / BLOCK;

    /// The most pages of a launch, over all KV heads: a warp advances by the launch's warps, in 32 bits.
    pub const MAX_PAGES: u32 = u32::MAX - MAX_BLOCKS * (BLOCK / WARP);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_and_centroids_are_the_papers() {
        for (tokens, spans_of, centroids) in
            [(256, 1, 16), (1024, 1, 64), (4030, 1, 248), (32_700, 4, 512), (131_004, 16, 512)]
        {
            assert_eq!((spans(tokens), span_centroids(tokens, spans_of)), (spans_of, centroids), "{tokens}");
        }
    }

    #[test]
    fn no_shorter_run_has_more_clusters() {
        let mut most = 0;
        for tokens in (1..200_000).step_by(7) {
            let spans = spans(tokens);
            most = most.max(spans * span_centroids(tokens, spans));
            assert!(most <= max_clusters(tokens), "{tokens}");
        }
    }

    #[test]
    fn spans_cover_a_run_and_start_tokens_are_evenly_spaced() {
        for (tokens, of) in [(MAX_TOKENS, MAX_SPANS), (32_700, 4), (77, 5)] {
            assert_eq!((span_start(tokens, of, 0), span_start(tokens, of, of)), (0, tokens));
        }
        for (len, centroids) in [(8192, 512), (8175, 512), (13, 8), (1024, 64), (4_000_000, 262_144)] {
            let exact = |at: u32| (2 * u64::from(at) + 1) * u64::from(len) / (2 * u64::from(centroids));
            for at in (0..centroids).chain([centroids - 1]) {
                assert_eq!(
                    u64::from(start_token(len, centroids, at)),
                    exact(at),
                    "{at} of {centroids}, {len}"
                );
            }
        }
    }
}
