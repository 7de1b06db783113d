use cuda_std::math::rsqrt_approx;
use cuda_std::prelude::*;
use cuda_std::shared;

use super::centroid::{Centroids, mean_of, product};
use super::members;
use crate::abi::WARP;
use crate::abi::cluster::span_start;
use crate::abi::cluster::update::{BLOCK, CLUSTERS, LISTED};

/// Centroids of an iteration: the mean of the centred keys of each cluster's tokens, of length 1.
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `keys`, `first`, `tokens`, `kv_heads`, `head_words`, `spans`, `span_centroids` | | as for [`cluster_start`](super::cluster_start()) |
/// | `means` | `[kv_heads, 2 * head_words]` words of f32 | |
/// | `assigned` | `[kv_heads, tokens / 4, rounded up]` words | clusters of tokens, of their own span, four a word |
/// | `centroids`, `biases` | as for `cluster_start` | replaced, but for those of clusters without a token or a direction |
///
/// Sums are in f32: members in token order are dealt out to `32 / head_words` sums in turn, which are added up at the end. The centroid is
/// the sum times 1 / members, less the mean, times 1 / its length, rounded to bf16.
///
/// # Mapping
/// A warp has a cluster, and a block 8 of the same span. It reads the clusters of the span's tokens, which its processor's L1 has after the
/// first of them, and lists its own; a lane has a word of a key, 8 in flight.
///
/// # Launch
/// [`grid`](crate::abi::cluster::update::grid) blocks of [`BLOCK`] threads,
/// [`SHARED_BYTES`](crate::abi::cluster::update::SHARED_BYTES) of shared memory.
///
/// # Safety
/// The views have the shapes above; nothing writes `keys` until the launch has ended.
#[kernel(collectives(barrier = 2, shuffle = 10, vote = 5))]
pub unsafe fn cluster_update(
    keys: Global<U32x4>,
    first: u32,
    tokens: u32,
    kv_heads: u32,
    head_words: u32,
    spans: u32,
    span_centroids: u32,
    means: Global<U32x4>,
    assigned: Global<U32x4>,
    centroids: GlobalMut<U32x4>,
    biases: GlobalMut<f32>,
) {
    let warp = thread::thread_idx_x() / WARP;
    let (place, row_centroids) = (thread::block_idx_x() * CLUSTERS + warp, spans * span_centroids);
    let (head, cluster) = (place / row_centroids, place % row_centroids);
    let span = cluster / span_centroids;
    let range = [span_start(tokens, spans, span), span_start(tokens, spans, span + 1)];
    let list = shared::dynamic::<u32>((warp * LISTED) as usize * 4, LISTED as usize);
    let width = kv_heads * head_words;
    let keys = keys.slice((first * width) as usize, (tokens * width) as usize);
    let assigned = assigned.rows(tokens.div_ceil(4) as usize).row(head as usize);

    let mut sums = [0.0_f32; 8];
    let members = members::walk(assigned, range, cluster, head_words, list, |_, count| {
        members::add(&mut sums, list, count, keys, [width, head * head_words], head_words);
    });
    let mut centroid = members::of_groups(sums, head_words);
    let mean = mean_of(means, head, head_words);
    let scale = 1.0 / members as f32;
    let mut at = 0;
    while at < 8 {
        centroid[at] = centroid[at] * scale - mean[at];
        at += 1;
    }
    let square = product(centroid, centroid, head_words);
    let length = rsqrt_approx(square);
    let mut at = 0;
    while at < 8 {
        centroid[at] *= length;
        at += 1;
    }
    // Not for a sum of no member, of which the square is no number, nor where members are all as the mean.
    let valid = (f32::MIN_POSITIVE..f32::INFINITY).contains(&square);
    let centroids = Centroids { words: centroids, biases, lanes: head_words };
    // Groups have the same; the first one's lanes write.
    centroids.store(place, centroid, mean, valid && warp::lane_id() < head_words);
}

const _: () = assert!(BLOCK == CLUSTERS * WARP);
