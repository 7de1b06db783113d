use cuda_std::prelude::*;
use cuda_std::shared;

use super::members;
use crate::abi::WARP;
use crate::abi::cluster::NO_TOKEN;
use crate::abi::cluster::update::{CLUSTERS, LISTED};

/// The tokens of each page: after the last pass, where tokens are assigned to the clusters of all spans.
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `assigned`, `tokens`, `head_words` | as for [`cluster_update`](super::cluster_update()) | clusters of tokens, of all spans |
/// | `clusters` | a multiple of 8 | of a row: spans * centroids of a span |
/// | `page_tokens`, `firsts` | | as for [`cluster_pages`](super::cluster_pages()) |
/// | `members` | `[kv_heads, member_pages, page_tokens]` | tokens of each page of this run, ascending in a cluster, then [`NO_TOKEN`] |
/// | `member_pages` | at least the pages of a row; [`max_pages`](crate::abi::cluster::max_pages) | |
///
/// # Mapping
/// As `cluster_update`, but for reading the clusters of all of the row's tokens.
///
/// # Launch
/// As `cluster_update`.
///
/// # Safety
/// The views have the shapes above, `firsts` are those of `cluster_pages` for the sizes of these clusters.
#[kernel(collectives(barrier = 2, vote = 5))]
pub unsafe fn cluster_list(
    assigned: Global<U32x4>,
    tokens: u32,
    head_words: u32,
    clusters: u32,
    page_tokens: u32,
    firsts: Global<u32>,
    members: GlobalMut<u32>,
    member_pages: u32,
) {
    let (warp, lane) = (thread::thread_idx_x() / WARP, warp::lane_id());
    let place = thread::block_idx_x() * CLUSTERS + warp;
    let (head, cluster) = (place / clusters, place % clusters);
    let list = shared::dynamic::<u32>((warp * LISTED) as usize * 4, LISTED as usize);
    let assigned = assigned.rows(tokens.div_ceil(4) as usize).row(head as usize);
    let first = firsts.load(place as usize) * page_tokens;
    let members = members.rows((member_pages * page_tokens) as usize).row(head as usize);

    let size = members::walk(assigned, [0, tokens], cluster, head_words, list, |before, count| {
        let mut at = lane;
        while at < count {
            members.store((first + before + at) as usize, list.load(at as usize));
            at += WARP;
        }
    });
    let mut at = size + lane;
    while at < size.next_multiple_of(page_tokens) {
        members.store((first + at) as usize, NO_TOKEN);
        at += WARP;
    }
}
