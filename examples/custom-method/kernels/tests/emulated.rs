//! The kernels' own source under the emulator: bounds, races and lanes, and what comes out against plain Rust.

use cuda_std::U32x4;
use cuda_std::emulator::{Buffer, Launch};
use custom_method_kernels::{BLOCK, entry, farthest_key, farthest_key_step};

const KV_HEADS: usize = 2;
const HEAD_WORDS: usize = 8;
const CHUNK_TOKENS: usize = 16;
const PAGE_TOKENS: usize = 8;
const SEGMENT_CHUNKS: usize = 4;
const LAYERS: usize = 3;
const LAYER: usize = 1;

/// Chunks `first .. first + count` of a request whose keys lie from token `at` on.
struct Request {
    at: usize,
    first: usize,
    count: usize,
}

const REQUESTS: [Request; 3] = [
    Request { at: 0, first: 1, count: 5 },
    Request { at: 0, first: 2, count: 0 },
    Request { at: 100, first: 3, count: 2 },
];

/// bf16 keys, `[200, kv_heads, head_words]` words.
fn keys() -> Vec<[u32; 4]> {
    let mut state = 1_u32;
    let mut bits = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        // Signs and sizes of 0.25 to 2, in the upper halves of f32.
        let sign = state >> 16 & 0x8000;
        sign | 0x3e80 + (state >> 20) % 0x180
    };
    (0..200 * KV_HEADS * HEAD_WORDS).map(|_| [(); 4].map(|()| bits() | bits() << 16)).collect()
}

fn key(keys: &[[u32; 4]], token: usize, head: usize) -> &[[u32; 4]] {
    &keys[(token * KV_HEADS + head) * HEAD_WORDS..][..HEAD_WORDS]
}

fn square(key: &[[u32; 4]]) -> f64 {
    let halves = key.iter().flatten().flat_map(|pair| [pair << 16, pair & 0xffff_0000]);
    halves.map(|bits| f64::from(f32::from_bits(bits)).powi(2)).sum()
}

fn words(words: &[[u32; 4]]) -> Buffer<U32x4> {
    let words: Vec<U32x4> = words.iter().map(|&[x, y, z, w]| U32x4 { x, y, z, w }).collect();
    Buffer::from_slice(&words)
}

/// Entries whose unused numbers would lead out of every buffer.
fn entries() -> Vec<u32> {
    let mut all = Vec::new();
    for (index, request) in REQUESTS.iter().enumerate() {
        let mut numbers = [u32::MAX; entry::NUMBERS];
        numbers[entry::DIRECTORY] = 2 * index as u32;
        numbers[entry::FIRST_STEADY] = (index * LAYERS * KV_HEADS * 24) as u32;
        (numbers[entry::SINK_PAGES], numbers[entry::RING_PAGES]) = (2, 22);
        (numbers[entry::NEW_PARTITION], numbers[entry::NEW_PARTITIONS]) =
            (request.first as u32, request.count as u32);
        // One that only fills the batch.
        numbers[entry::TOKENS] = u32::from(index != 1);
        all.extend(numbers);
    }
    all
}

const DIRECTORIES: [u32; 6] = [3, 0, u32::MAX, u32::MAX, 4, 1];
const POISON: [u32; 4] = [0xdead_beef; 4];
const SUMMARIES: usize = 5 * LAYERS * KV_HEADS * SEGMENT_CHUNKS * HEAD_WORDS;

fn check(keys: &[[u32; 4]], summaries: &Buffer<U32x4>) {
    let mut found: Vec<[u32; 4]> = summaries.to_vec().into_iter().map(|word| word.to_array()).collect();
    for (index, request) in REQUESTS.iter().enumerate() {
        for (chunk, head) in
            (request.first..request.first + request.count).flat_map(|chunk| [(chunk, 0), (chunk, 1)])
        {
            let tokens = (0..CHUNK_TOKENS).map(|token| request.at + chunk * CHUNK_TOKENS + token);
            let greatest = tokens
                .map(|token| key(keys, token, head))
                .reduce(|a, b| if square(b) > square(a) { b } else { a });
            let segment = DIRECTORIES[2 * index + chunk / SEGMENT_CHUNKS] as usize;
            let row = segment * LAYERS * KV_HEADS + LAYER * KV_HEADS + head;
            let at = (row * SEGMENT_CHUNKS + chunk % SEGMENT_CHUNKS) * HEAD_WORDS;
            assert_eq!(
                &found[at..at + HEAD_WORDS],
                greatest.unwrap(),
                "request {index}, chunk {chunk}, KV head {head}"
            );
            found[at..at + HEAD_WORDS].fill(POISON);
        }
    }
    assert!(found.iter().all(|word| *word == POISON), "something else was written");
}

#[test]
fn prompts_are_indexed_by_their_farthest_keys() {
    let keys = keys();
    let first_token: Vec<u32> = REQUESTS.iter().map(|request| request.at as u32).collect();
    let mut first_chunk = vec![0];
    REQUESTS.iter().for_each(|request| first_chunk.push(first_chunk.last().unwrap() + request.count as u32));
    let chunks = *first_chunk.last().unwrap();
    for seed in 0..20 {
        let (all, summaries) = (words(&keys), words(&[POISON; SUMMARIES]));
        let (entries, directories) = (Buffer::from_slice(&entries()), Buffer::from_slice(&DIRECTORIES));
        let (first_token, first_chunk) = (Buffer::from_slice(&first_token), Buffer::from_slice(&first_chunk));
        let launch = Launch::new(chunks * KV_HEADS as u32, BLOCK).seed(seed);
        let outcome = launch.run(|| {
            // SAFETY: the emulator checks every access.
            unsafe {
                farthest_key(
                    all.view(),
                    entries.view(),
                    first_token.view(),
                    first_chunk.view(),
                    directories.view(),
                    (LAYER * KV_HEADS) as u32,
                    (LAYERS * KV_HEADS) as u32,
                    KV_HEADS as u32,
                    HEAD_WORDS as u32,
                    CHUNK_TOKENS as u32,
                    SEGMENT_CHUNKS as u32,
                    summaries.view_mut(),
                );
            }
        });
        outcome.unwrap_or_else(|fault| panic!("seed {seed}: {fault}"));
        check(&keys, &summaries);
    }
}

#[test]
fn steps_index_what_leaves_from_steady_pages() {
    let keys = keys();
    // Pages of each request, KV head and page key, one behind the other; NaN where values lie.
    let mut steady = vec![u32::MAX; REQUESTS.len() * LAYERS * KV_HEADS * 24];
    let mut pool: Vec<[u32; 4]> = Vec::new();
    for (index, request) in REQUESTS.iter().enumerate() {
        let pages = request.first * 2..(request.first + request.count) * 2;
        for (page, head) in pages.flat_map(|page| [(page, 0), (page, 1)]) {
            let list = (index * LAYERS * KV_HEADS + LAYER * KV_HEADS + head) * 24;
            let place = if page < 2 { page } else { 2 + (page - 2) % 22 };
            steady[list + place] = (pool.len() / (2 * PAGE_TOKENS * HEAD_WORDS)) as u32;
            for token in page * PAGE_TOKENS..(page + 1) * PAGE_TOKENS {
                pool.extend(key(&keys, request.at + token, head));
            }
            pool.extend([[0x7fc0_7fc0; 4]; PAGE_TOKENS * HEAD_WORDS]);
        }
    }
    for seed in 0..20 {
        let (pool, summaries) = (words(&pool), words(&[POISON; SUMMARIES]));
        let (entries, directories) = (Buffer::from_slice(&entries()), Buffer::from_slice(&DIRECTORIES));
        let steady = Buffer::from_slice(&steady);
        let launch = Launch::new((REQUESTS.len() * KV_HEADS) as u32, BLOCK).seed(seed);
        let outcome = launch.run(|| {
            // SAFETY: the emulator checks every access.
            unsafe {
                farthest_key_step(
                    entries.view(),
                    steady.view(),
                    pool.view(),
                    directories.view(),
                    (LAYER * KV_HEADS) as u32,
                    (LAYERS * KV_HEADS) as u32,
                    KV_HEADS as u32,
                    HEAD_WORDS as u32,
                    PAGE_TOKENS as u32,
                    CHUNK_TOKENS as u32,
                    SEGMENT_CHUNKS as u32,
                    summaries.view_mut(),
                );
            }
        });
        outcome.unwrap_or_else(|fault| panic!("seed {seed}: {fault}"));
        check(&keys, &summaries);
    }
}
