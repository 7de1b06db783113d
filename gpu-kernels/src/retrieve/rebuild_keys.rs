use cuda_std::copy::{copy_async, wait_all};
use cuda_std::math::fma;
use cuda_std::mma::mma_m16n8k16_bf16;
use cuda_std::prelude::*;
use cuda_std::{bf16, shared};

use super::lists::Lists;
use crate::abi::low_rank::rebuild_keys::{BLOCK, STEP_WORDS, TILE, list_start, stride};
use crate::abi::{Entry, PageCopy, SEGMENT_KEYS, WARP};
use crate::model::sin_cos;
use crate::unroll::unrolled;

/// Keys of missed pages out of their coefficients and a basis: one layer of a decode step, heads of 64. Of a page that
/// [`resolve`](super::resolve()) gives a slot it writes the half that holds the keys; the values are another kernel's.
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `copies`, `keys`, `counts` | `[lists, capacity]` [`PageCopy`], `[lists, capacity]`, `[lists]` | missed pages and their page keys, as [`resolve`](super::resolve()) leaves them; a list a row of the batch |
/// | `lists` | `batch * kv_heads` | |
/// | `capacity` | | |
/// | `entries` | `[batch]` [`Entry`], in words | the requests of the step: `directory`, `basis` |
/// | `kv_heads`, `layer`, `layers` | | |
/// | `directories` | see [`Entry::directory`] | segment numbers |
/// | `coefficients` | `[segments, layers, 512 * page_tokens, rank_words]` words | bf16: a segment holds those of its page keys' tokens |
/// | `rank_words` | a multiple of 4 | rank / 8 |
/// | `bases` | `[bases, layers, kv_heads, head_dim, rank_words]` words | bf16, by [`Entry::basis`] |
/// | `frequencies` | `[head_dim / 2]` | in radians a position |
/// | `factor` | | of sines and cosines |
/// | `page_tokens` | at least 1 | |
/// | `pool` | `[pages, 2, page_tokens, head_dim / 2]` pairs of bf16 | GPU pages: keys, then values |
///
/// A token's position is its page key times `page_tokens`, and its place in the page. Products are exact, sums in f32; they are turned as
/// [`rotate`](crate::model::rotate()) turns heads, and rounded once.
///
/// # Mapping
/// Every block has as many pages as any other, of all lists put end to end. Of the pages of one list it copies the head's basis to shared memory
/// once; a warp takes 16 tokens at a time. A product's 16 dimensions are those that a lane has in half a word of both factors, so that
/// coefficients come from memory, and the basis from shared memory, in whole words. A lane's sums are of both elements that turn together.
///
/// # Launch
/// Any number of blocks of [`BLOCK`] threads,
/// [`shared_bytes`](crate::abi::low_rank::rebuild_keys::shared_bytes) of shared memory.
///
/// # Safety
/// The views have the shapes above; lists are of pages within the pool, none named twice, whose keys' segments are in the directories; what is
/// counted in words is below 2^32 within a segment, a basis and the pool.
#[kernel(collectives(barrier = 4, shuffle = 5, mma = 16))]
pub unsafe fn rebuild_keys_64(
    copies: Global<PageCopy>,
    keys: Global<u32>,
    counts: Global<u32>,
    lists: u32,
    capacity: u32,
    entries: Global<U32x4>,
    kv_heads: u32,
    layer: u32,
    layers: u32,
    directories: Global<u32>,
    coefficients: Global<U32x4>,
    rank_words: u32,
    bases: Global<U32x4>,
    frequencies: Global<f32>,
    factor: f32,
    page_tokens: u32,
    pool: GlobalMut<u32>,
) {
    let table = Table { entries, kv_heads, layer, layers, directories, coefficients, rank_words, bases };
    let turn = Frequencies::<4>::load(frequencies, factor);
    rebuild::<4>(copies, keys, counts, lists, capacity, &table, &turn, page_tokens, pool);
}

/// [`rebuild_keys_64`] for heads of 128.
///
/// # Launch
/// As there.
///
/// # Safety
/// As there.
#[kernel(collectives(barrier = 4, shuffle = 5, mma = 32))]
pub unsafe fn rebuild_keys_128(
    copies: Global<PageCopy>,
    keys: Global<u32>,
    counts: Global<u32>,
    lists: u32,
    capacity: u32,
    entries: Global<U32x4>,
    kv_heads: u32,
    layer: u32,
    layers: u32,
    directories: Global<u32>,
    coefficients: Global<U32x4>,
    rank_words: u32,
    bases: Global<U32x4>,
    frequencies: Global<f32>,
    factor: f32,
    page_tokens: u32,
    pool: GlobalMut<u32>,
) {
    let table = Table { entries, kv_heads, layer, layers, directories, coefficients, rank_words, bases };
    let turn = Frequencies::<8>::load(frequencies, factor);
    rebuild::<8>(copies, keys, counts, lists, capacity, &table, &turn, page_tokens, pool);
}

/// Where coefficients and bases are: the parameters that say so.
#[derive(Clone, Copy)]
struct Table {
    entries: Global<U32x4>,
    kv_heads: u32,
    layer: u32,
    layers: u32,
    directories: Global<u32>,
    coefficients: Global<U32x4>,
    rank_words: u32,
    bases: Global<U32x4>,
}

impl Table {
    /// The basis of head `head` of an entry's request, `[head_dim, rank_words]`.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    unsafe fn basis(&self, entry: &Entry, head: u32, head_dim: u32) -> Global<U32x4> {
        let width = (head_dim * self.rank_words) as usize;
        let head = (entry.basis as usize * self.layers as usize + self.layer as usize)
            * self.kv_heads as usize
            + head as usize;
        self.bases.rows(width).row(head)
    }

    /// The coefficients of a token of page `key`, `[rank_words]`.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    unsafe fn coefficients(&self, entry: &Entry, key: u32, token: u32, page_tokens: u32) -> Global<U32x4> {
        let segment = self.directories.load((entry.directory + key / SEGMENT_KEYS) as usize);
        let segment = segment as usize * self.layers as usize + self.layer as usize;
        let tokens = SEGMENT_KEYS as usize * page_tokens as usize;
        let of_segment = self.coefficients.rows(tokens * self.rank_words as usize).row(segment);
        of_segment.rows(self.rank_words as usize).row((key % SEGMENT_KEYS * page_tokens + token) as usize)
    }
}

/// What a lane turns its sums by: of each eight of `EIGHTS` of a half the two elements that it has.
struct Frequencies<const EIGHTS: usize> {
    of: [[f32; 2]; EIGHTS],
    factor: f32,
}

impl<const EIGHTS: usize> Frequencies<EIGHTS> {
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    unsafe fn load(frequencies: Global<f32>, factor: f32) -> Self {
        let mut of = [[0.0; 2]; EIGHTS];
        let first = 2 * (warp::lane_id() % 4) as usize;
        unrolled!(eight < EIGHTS, {
            of[eight] = [frequencies.load(8 * eight + first), frequencies.load(8 * eight + first + 1)];
        });
        Self { of, factor }
    }

    /// Two pairs of elements of eight `eight`, of the low half and the high one, at `position`.
    #[inline(always)]
    fn turn(&self, eight: usize, position: u32, low: [f32; 2], high: [f32; 2]) -> (u32, u32) {
        let (mut a, mut b) = ([0.0; 2], [0.0; 2]);
        let mut at = 0;
        while at < 2 {
            let (sine, cosine) = sin_cos(position as f32 * self.of[eight][at]);
            let (sine, cosine) = (sine * self.factor, cosine * self.factor);
            a[at] = fma(low[at], cosine, -(high[at] * sine));
            b[at] = fma(high[at], cosine, low[at] * sine);
            at += 1;
        }
        (bf16::pack(a[0], a[1]), bf16::pack(b[0], b[1]))
    }
}

/// The body, for heads of `16 * EIGHTS`.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "the kernels' parameters, in their names")]
unsafe fn rebuild<const EIGHTS: usize>(
    copies: Global<PageCopy>,
    keys: Global<u32>,
    counts: Global<u32>,
    lists: u32,
    capacity: u32,
    table: &Table,
    turn: &Frequencies<EIGHTS>,
    page_tokens: u32,
    pool: GlobalMut<u32>,
) {
    let head_dim = 16 * EIGHTS as u32;
    let (rank_words, stride) = (table.rank_words, stride(table.rank_words));
    let basis = shared::dynamic::<U32x4>(0, (head_dim * stride) as usize);
    let at = list_start(head_dim, rank_words) as usize;
    let lists_of_all = Lists::new(copies, counts, lists, capacity, BLOCK, at);

    let (thread, lane) = (thread::thread_idx_x(), warp::lane_id());
    let (group, quarter) = (lane / 4, lane % 4);
    let (all, block, blocks) = (lists_of_all.all(), thread::block_idx_x(), thread::grid_dim_x());
    let share = |block: u32| all / blocks * block + (all % blocks).min(block);
    let (mut first, end) = (share(block), share(block + 1));
    // The pages of a list at a time: all threads of the block go the same way.
    while first < end {
        let list = lists_of_all.list_of(first);
        let start = lists_of_all.start(list);
        let pages = end.min(lists_of_all.start(list + 1)) - first;
        let entry = Entry::load(table.entries, list / table.kv_heads);
        let source = table.basis(&entry, list % table.kv_heads, head_dim);
        let mut word = thread;
        while word < head_dim * rank_words {
            let to = word / rank_words * stride + word % rank_words;
            copy_async(basis, to as usize, source, word as usize);
            word += BLOCK;
        }
        wait_all();
        thread::sync_threads();

        let tokens = pages * page_tokens;
        let of_list = |view: u32| (list * capacity + (first - start) + view) as usize;
        let mut tile = thread / WARP * TILE;
        while tile < tokens {
            // Rows beyond the last are the last again, and not stored.
            let token = |row: u32| {
                let token = (tile + row).min(tokens - 1);
                (token / page_tokens, token % page_tokens)
            };
            let rows = [token(group), token(group + 8)];
            let row_keys = [keys.load(of_list(rows[0].0)), keys.load(of_list(rows[1].0))];
            let of_rows = [
                table.coefficients(&entry, row_keys[0], rows[0].1, page_tokens),
                table.coefficients(&entry, row_keys[1], rows[1].1, page_tokens),
            ];
            let mut sums = [[[0.0_f32; 4]; EIGHTS]; 2];
            let load = |word: u32| {
                let at = (word + quarter) as usize;
                [
                    of_rows[0].load_with(at, LoadCache::ReadOnly).to_array(),
                    of_rows[1].load_with(at, LoadCache::ReadOnly).to_array(),
                ]
            };
            let mut ahead = load(0);
            let mut word = 0;
            while word < rank_words {
                let [upper, lower] = ahead;
                let next = word + STEP_WORDS;
                ahead = load(if next < rank_words { next } else { word });
                unrolled!(half < 2, {
                    unrolled!(eight < EIGHTS, {
                        let channel = half as u32 * head_dim / 2 + 8 * eight as u32 + group;
                        let [x, y, z, w] =
                            basis.load((channel * stride + word + quarter) as usize).to_array();
                        let sum = &mut sums[half][eight];
                        *sum = mma_m16n8k16_bf16([upper[0], lower[0], upper[1], lower[1]], [x, y], *sum);
                        *sum = mma_m16n8k16_bf16([upper[2], lower[2], upper[3], lower[3]], [z, w], *sum);
                    });
                });
                word = next;
            }
            unrolled!(row < 2, {
                if tile + group + 8 * (row as u32) < tokens {
                    let (page, token) = rows[row];
                    let device_page = copies.load(of_list(page)).device_page;
                    let position = row_keys[row] * page_tokens + token;
                    let key = pool.rows((head_dim / 2) as usize);
                    let key = key.row(device_page as usize * 2 * page_tokens as usize + token as usize);
                    unrolled!(eight < EIGHTS, {
                        let of = |half: usize| [sums[half][eight][2 * row], sums[half][eight][2 * row + 1]];
                        let (low, high) = turn.turn(eight, position, of(0), of(1));
                        let at = 4 * eight + quarter as usize;
                        key.store(at, low);
                        key.store(at + 4 * EIGHTS, high);
                    });
                }
            });
            tile += BLOCK / WARP * TILE;
        }
        // Nobody reads the basis any more when the next is copied.
        thread::sync_threads();
        first += pages;
    }
}
