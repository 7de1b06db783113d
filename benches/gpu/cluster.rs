//! Clustering of a prompt's keys, stage by stage and as a whole.

use std::error::Error;

use half::bf16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinkv::backend::cuda::driver::{DeviceBuffer, PinnedArena, Result as DriverResult, Stream};
use spinkv::backend::cuda::kernels::{
    ClusterPages, ClusterRun, ClusterScratch, ClusterShape, ClusterTables, Kernels,
};
use spinkv::memory::Word;
use spinkv_kernels::abi::cluster::{ITERATIONS, NO_TOKEN, max_pages};
use spinkv_kernels::abi::{SLAB_PAGES, WORD_BYTES, WORD_ELEMENTS};

use crate::measure::{Bench, Shape};

/// Qwen3-14B: 8 KV heads of 128.
const KV_HEADS: u32 = 8;
const HEAD_WORDS: u32 = 16;
const PAGE_TOKENS: u32 = 8;
/// Sinks and window, which are no clusters'.
const SINKS: u32 = 4;
const STEADY: u32 = 68;
/// Kinds of keys.
const KINDS: usize = 1000;

/// A launch of a run.
type Stage<'a> = unsafe fn(&ClusterRun<'a>, &Kernels, &Stream) -> DriverResult<()>;

pub fn run(bench: &mut Bench) -> Result<(), Box<dyn Error>> {
    bench.group("cluster: k-means of a prompt's keys, 8 heads of 128; pages of 8 tokens");
    // An update of a decode step, and prompts.
    [1024 + STEADY, 8192, 32_768].into_iter().try_for_each(|tokens| prompt(bench, tokens))
}

fn prompt(bench: &mut Bench, prompt_tokens: u32) -> Result<(), Box<dyn Error>> {
    let (stream, kernels) = (bench.stream.clone(), bench.kernels.clone());
    let shape = ClusterShape::new(prompt_tokens - STEADY, KV_HEADS, HEAD_WORDS);
    let (tokens, clusters) = (shape.tokens, shape.clusters());
    let width = (KV_HEADS * HEAD_WORDS) as usize;
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let word = |rng: &mut ChaCha8Rng| -> [f32; WORD_ELEMENTS] {
        std::array::from_fn(|_| rng.random_range(-1.0..1.0))
    };
    let kinds: Vec<_> = (0..KINDS * HEAD_WORDS as usize).map(|_| word(&mut rng)).collect();
    // Of each token and head a kind, with noise of half its size.
    let mut keys: Vec<[bf16; WORD_ELEMENTS]> = Vec::with_capacity(prompt_tokens as usize * width);
    for _ in 0..prompt_tokens * KV_HEADS {
        let kind = rng.random_range(0..KINDS) * HEAD_WORDS as usize;
        for at in 0..HEAD_WORDS as usize {
            let noise = word(&mut rng);
            keys.push(std::array::from_fn(|of| bf16::from_f32(kinds[kind + at][of] + 0.5 * noise[of])));
        }
    }
    let content: &[Word] = bytemuck::cast_slice(&keys);
    let keys = DeviceBuffer::<Word>::from_slice(&stream, content)?;
    let values = DeviceBuffer::<Word>::from_slice(&stream, content)?;

    let pages = max_pages(tokens, clusters, PAGE_TOKENS);
    let capacity = pages;
    let scratch = ClusterScratch::new(&stream, tokens, KV_HEADS, HEAD_WORDS, PAGE_TOKENS)?;
    let partitions = (KV_HEADS * capacity) as usize;
    let summaries = DeviceBuffer::zeroed(&stream, partitions * HEAD_WORDS as usize)?;
    let value_means = DeviceBuffer::zeroed(&stream, partitions * HEAD_WORDS as usize)?;
    let partition_tokens = DeviceBuffer::zeroed(&stream, partitions)?;
    let row_pages = DeviceBuffer::<u32>::zeroed(&stream, 2 * KV_HEADS as usize)?;
    let slabs = pages.div_ceil(SLAB_PAGES);
    let host_slabs: Vec<u32> = (0..KV_HEADS * slabs).collect();
    let page_words = (2 * PAGE_TOKENS * HEAD_WORDS) as usize;
    let arena_words = host_slabs.len() * SLAB_PAGES as usize * page_words;
    let host_pages = PinnedArena::reserve(&bench.context, arena_words * WORD_BYTES, |_| {})?;
    let run = ClusterRun {
        shape,
        keys: &keys,
        values: &values,
        first: SINKS,
        scratch: &scratch,
        tables: ClusterTables {
            page_tokens: PAGE_TOKENS,
            directories: &DeviceBuffer::from_slice(&stream, &[0])?,
            directory: 0,
            first_row: 0,
            request_rows: KV_HEADS,
            segment_partitions: capacity,
            capacity,
            row_pages: &row_pages,
            first_place: 0,
            partition_tokens: &partition_tokens,
            summaries: &summaries,
            value_means: &value_means,
        },
        pages: ClusterPages {
            host_slabs: &DeviceBuffer::from_slice(&stream, &host_slabs)?,
            first_slab: 0,
            slab_stride: slabs,
            host_valid: &DeviceBuffer::zeroed(&stream, host_slabs.len())?,
            host_pages: &host_pages,
            blocks: 16,
        },
    };
    // SAFETY: the tables name places and slabs that exist, each once; nothing else uses the buffers.
    unsafe { run.launch(&kernels, &stream)? };
    let members = scratch.members.to_vec(&stream)?;
    let pages_after = row_pages.to_vec(&stream)?;
    let mut stored = 0;
    for head in 0..KV_HEADS {
        let row = &members[(head * pages * PAGE_TOKENS) as usize..][..(pages * PAGE_TOKENS) as usize];
        let of_row = pages_after[2 * head as usize + 1];
        stored += of_row;
        check_head(&host_pages, content, &row[..(of_row * PAGE_TOKENS) as usize], head, slabs)
            .map_err(|wrong| format!("{prompt_tokens} tokens, head {head}: {wrong}"))?;
    }

    let name = format!("{tokens} tokens, {clusters} clusters, {stored} pages");
    let heads = u64::from(tokens) * u64::from(KV_HEADS);
    let tensor = heads * u64::from(HEAD_WORDS) * WORD_BYTES as u64;
    let flops = |centroids: u32| 2 * heads * u64::from(centroids) * u64::from(HEAD_WORDS) * 8;
    let page_bytes = u64::from(stored) * (page_words * WORD_BYTES) as u64;
    let shape_of = || Shape::new(name.clone()).context(prompt_tokens);
    // SAFETY: as above, and all stages have run before.
    let launch = unsafe { launcher(&run, &kernels, &stream) };
    // `cluster_pages` counts on from run to run, so each begins anew.
    let pages_anew = || {
        row_pages.fill_bytes(&stream, 0..row_pages.len(), 0)?;
        launch(ClusterRun::pages)
    };
    let of_span = shape_of().flops(flops(shape.span_centroids));
    let of_all = shape_of().flops(flops(clusters));
    let tables = u64::from(clusters * KV_HEADS) * 20;
    bench.row("cluster_sums", shape_of(), tensor, None, |_| launch(ClusterRun::sums))?;
    bench.row("cluster_start", shape_of(), tensor / 16, None, |_| launch(ClusterRun::start))?;
    bench.row("cluster_assign, of a span", of_span, tensor, None, |_| launch(ClusterRun::assign))?;
    bench.row("cluster_update", shape_of(), tensor, None, |_| launch(ClusterRun::update))?;
    bench.row("cluster_assign, of all", of_all, tensor, None, |_| launch(ClusterRun::assign_all))?;
    bench.row("cluster_pages", shape_of(), tables, None, |_| pages_anew())?;
    pages_anew()?;
    let numbers = heads * 4;
    bench.row("cluster_list", shape_of(), 2 * numbers, None, |_| launch(ClusterRun::list))?;
    bench.row("cluster_means", shape_of(), 2 * tensor, None, |_| launch(ClusterRun::means))?;
    bench.row("cluster_store", shape_of(), page_bytes, None, |_| launch(ClusterRun::store))?;
    let all = shape_of().flops(u64::from(ITERATIONS) * flops(shape.span_centroids) + flops(clusters));
    // Without the store, whose time is the bus's.
    bench.row("cluster, all but store", all, 2 * tensor, None, |_| {
        launch(ClusterRun::sums)?;
        launch(ClusterRun::start)?;
        for _ in 0..ITERATIONS {
            launch(ClusterRun::assign)?;
            launch(ClusterRun::update)?;
        }
        launch(ClusterRun::assign_all)?;
        pages_anew()?;
        launch(ClusterRun::list)?;
        launch(ClusterRun::means)
    })?;
    Ok(())
}

/// Launches stages of `run`, one by one.
///
/// # Safety
/// As for all of them.
unsafe fn launcher<'a>(
    run: &'a ClusterRun<'a>,
    kernels: &'a Kernels,
    stream: &'a Stream,
) -> impl Fn(Stage<'a>) -> DriverResult<()> {
    // SAFETY: the caller's part.
    move |stage| unsafe { stage(run, kernels, stream) }
}

/// Refuses to time clusters that are wrong: every token of a head is in one place, and its pages on the host hold it.
fn check_head(
    arena: &PinnedArena,
    keys: &[Word],
    members: &[u32],
    head: u32,
    slabs: u32,
) -> Result<(), Box<dyn Error>> {
    let mut tokens: Vec<u32> = members.iter().copied().filter(|token| *token != NO_TOKEN).collect();
    tokens.sort_unstable();
    if !tokens.iter().copied().eq(0..tokens.len() as u32) {
        return Err("tokens are not each in one cluster".into());
    }
    let (head_words, half) = (HEAD_WORDS as usize, (PAGE_TOKENS * HEAD_WORDS) as usize);
    let mut page = vec![0 as Word; 2 * half];
    for (at, listed) in members.chunks(PAGE_TOKENS as usize).enumerate().step_by(61) {
        let place = (head * slabs * SLAB_PAGES) as usize + at;
        arena.read(place * 2 * half * WORD_BYTES, bytemuck::cast_slice_mut(&mut page))?;
        for (of, token) in listed.iter().enumerate() {
            let row = (token.wrapping_add(SINKS)) as usize * KV_HEADS as usize + head as usize;
            let expected = if *token == NO_TOKEN {
                &[0; HEAD_WORDS as usize][..]
            } else {
                &keys[row * head_words..][..head_words]
            };
            for tensor in page.chunks(half) {
                if tensor[of * head_words..][..head_words] != *expected {
                    return Err(format!("page {at}, token {of} of it").into());
                }
            }
        }
    }
    Ok(())
}
