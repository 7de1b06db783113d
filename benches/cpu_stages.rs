//! The CPU stages one by one, on one row of a Qwen3-14B shape (head width 128, 5 query heads a KV head), and a
//! whole layer step.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use spinkv::algorithms::ShadowKv;
use spinkv::backend::PromptChunk;
use spinkv::backend::cpu::{CpuBackend, attend, attend_prompt, mean_key, score, top_k};
use spinkv::memory::{
    Allocator, HostArena, HostPage, KvDtype, MemoryLimits, PageLayout, PagePool, PhysicalPage, PlainMemory,
    SLAB_PAGES, Word,
};
use spinkv::paging::{
    BucketedLru, Directory, Resolution, RowCache, RowSlots, SEGMENT_KEYS, SegmentPool, StepClock,
};
use spinkv::partition::SelectedPage;
use spinkv::pipeline::{Budget, GroupMerge, Pipeline, SteadyZone};
use spinkv::{KvConfig, KvShape};
use spinkv_benches::{Walk, random};

const HEAD_DIM: usize = 128;
const GROUP: usize = 5;
const CHUNK: usize = 8;

fn index(c: &mut Criterion) {
    let mut group = c.benchmark_group("index");
    let keys = random(CHUNK * HEAD_DIM, 1);
    let mut summary = vec![0.0; HEAD_DIM];
    group.throughput(Throughput::Bytes(size_of_val(keys.as_slice()) as u64));
    group.bench_function("mean_key/8_tokens", |b| b.iter(|| mean_key(black_box(&keys), &mut summary)));
    group.finish();
}

fn select(c: &mut Criterion) {
    let mut group = c.benchmark_group("select");
    let queries = random(GROUP * HEAD_DIM, 2);
    for context in [16_384, 131_072] {
        let partitions = context / CHUNK;
        let summaries = random(partitions * HEAD_DIM, 3);
        let (mut scores, mut logits) = (vec![0.0; partitions], vec![0.0; partitions]);
        group.throughput(Throughput::Bytes(size_of_val(summaries.as_slice()) as u64));
        group.bench_function(BenchmarkId::new("score", context), |b| {
            b.iter(|| {
                score(&queries, black_box(&summaries), HEAD_DIM, GroupMerge::Max, &mut scores, &mut logits)
            });
        });
        let mut ids = Vec::new();
        group.throughput(Throughput::Elements(partitions as u64));
        group.bench_function(BenchmarkId::new("top_256", context), |b| {
            b.iter(|| {
                ids.clear();
                top_k(black_box(&scores), 256, &mut ids);
            });
        });
    }
    group.finish();
}

/// A page's tokens are stored on the GPU, and the full page is written to the host.
fn offload(c: &mut Criterion) {
    let mut group = c.benchmark_group("offload");
    let layout = PageLayout::new(CHUNK, HEAD_DIM, KvDtype::Bf16).unwrap();
    let mut pool = PagePool::new(layout, None, Allocator::default());
    let page = pool.take(1).unwrap()[0];
    let mut arena = HostArena::new(layout, 1, None, PlainMemory::default());
    let slab = arena.take(0, 1).unwrap()[0];
    let (keys, values) = (random(CHUNK * HEAD_DIM, 12), random(CHUNK * HEAD_DIM, 13));
    group.throughput(Throughput::Bytes(layout.page_bytes() as u64));
    group.bench_function("page/8_tokens", |b| {
        b.iter(|| {
            let tokens = keys.chunks_exact(HEAD_DIM).zip(values.chunks_exact(HEAD_DIM));
            for (token, (key, value)) in tokens.enumerate() {
                layout.write_token(pool.page_mut(page), token, black_box(key), value);
            }
            arena.write(HostPage { slab, index: 3 }, pool.page(page));
        });
    });
    group.finish();
}

/// 256 pages, in ascending host order, from 64 MiB of host memory to as many places on the GPU.
fn gather(c: &mut Criterion) {
    let mut group = c.benchmark_group("retrieve");
    let layout = PageLayout::new(CHUNK, HEAD_DIM, KvDtype::Bf16).unwrap();
    let mut arena = HostArena::new(layout, 1, None, PlainMemory::default());
    let slabs = arena.take(0, 1024).unwrap();
    for (index, slab) in slabs.iter().enumerate() {
        let bytes = vec![index as Word; layout.page_words()];
        (0..SLAB_PAGES).for_each(|page| arena.write(HostPage { slab: *slab, index: page }, &bytes));
    }
    let mut pool = PagePool::new(layout, None, Allocator::default());
    let pages = pool.take(256).unwrap();
    let walk = Walk { keys: (slabs.len() * SLAB_PAGES) as u32, count: 256, overlap: 0.0, again: 0.0 };
    let keys = walk.selections(1, 14).remove(0);
    group.throughput(Throughput::Bytes((256 * layout.page_bytes()) as u64));
    group.bench_function("gather/256_pages", |b| {
        b.iter(|| {
            for (key, page) in keys.iter().zip(&pages) {
                let (slab, index) = (slabs[*key as usize / SLAB_PAGES], *key as usize % SLAB_PAGES);
                arena.read(HostPage { slab, index }, pool.page_mut(*page));
            }
        });
    });
    group.finish();
}

/// The tables' part of Retrieve in one decode step of 256 rows (32 requests x 8 KV heads, one layer), 256 ids each, on
/// one core, at 32K and 128K tokens of context, through the maps that the backends use. The selections keep seven
/// tenths of the step before, as measured for chunks of 8 tokens. What is new comes from anywhere (`scattered`), which
/// no cache likes, or nearly always from the last 16 steps (`calibrated`): that misses as rarely as the simulator's
/// calibrated traces do with six times the mandatory slots. The group prints both miss ratios.
fn resolve(c: &mut Criterion) {
    const REQUESTS: usize = 32;
    const HEADS: usize = 8;
    const SLOTS: u32 = 1536;
    let mut group = c.benchmark_group("resolve");
    group.throughput(Throughput::Elements((REQUESTS * HEADS * 256) as u64));
    for (keys, name, again) in [
        (4096, "scattered", 0.0),
        (16_384, "scattered", 0.0),
        (4096, "calibrated", 0.8),
        (16_384, "calibrated", 0.85),
    ] {
        let walk = Walk { keys, count: 256, overlap: 0.7, again };
        let selections: Vec<Vec<SelectedPage>> = walk
            .selections(512, 4)
            .into_iter()
            .map(|keys| keys.into_iter().map(|key| SelectedPage { key, tokens: CHUNK as u32 }).collect())
            .collect();
        let mut pool = SegmentPool::new(HEADS, Allocator::default());
        let segments = keys as usize / SEGMENT_KEYS;
        let request = |_| {
            let mut directory = Directory::new(segments, &Allocator::default()).unwrap();
            (0..segments).for_each(|_| directory.push(pool.take().unwrap()));
            let row = |_| RowCache::new((0..SLOTS).map(PhysicalPage).collect(), BucketedLru::<64>::default());
            (directory, (0..HEADS).map(row).collect::<Vec<_>>())
        };
        let mut requests: Vec<_> = (0..REQUESTS).map(request).collect();
        let mut resolution = Resolution::default();
        let mut clock = StepClock::default();
        let mut step = || {
            clock.tick();
            let mut misses = 0;
            for (index, (directory, rows)) in requests.iter_mut().enumerate() {
                for (row, cache) in rows.iter_mut().enumerate() {
                    // Each row is at another place of the same walk.
                    let at = clock.0 as usize + (index * HEADS + row) * 17;
                    let selection = &selections[at % selections.len()];
                    let map = &mut RowSlots { pool: &mut pool, directory, row };
                    cache.begin_step(clock);
                    cache.resolve(map, black_box(selection), &mut resolution).unwrap();
                    misses += resolution.copies.len();
                }
            }
            misses
        };
        // Full caches: every miss has a victim.
        let steps = 64;
        (0..steps).for_each(|_| {
            step();
        });
        let misses: usize = (0..steps).map(|_| step()).sum();
        let ratio = misses as f64 / (steps * REQUESTS * HEADS * 256) as f64;
        println!("resolve/{name}/{keys}_pages: {:.1} % of the ids miss", 100.0 * ratio);
        group.bench_function(format!("256_rows_x_256_ids_of_1536_slots/{name}/{keys}_pages"), |b| {
            b.iter(&mut step)
        });
    }
    group.finish();
}

fn attention(c: &mut Criterion) {
    let mut group = c.benchmark_group("attention");
    let layout = PageLayout::new(CHUNK, HEAD_DIM, KvDtype::Bf16).unwrap();
    let data = random(CHUNK * HEAD_DIM, 5);
    let pages: Vec<Vec<Word>> = (0..2048 / CHUNK)
        .map(|_| {
            let mut page = vec![0; layout.page_words()];
            for (token, key) in data.chunks_exact(HEAD_DIM).enumerate() {
                layout.write_token(&mut page, token, key, key);
            }
            page
        })
        .collect();
    let listed: Vec<(&[Word], usize)> = pages.iter().map(|page| (page.as_slice(), CHUNK)).collect();
    let queries = random(GROUP * HEAD_DIM, 6);
    let mut out = vec![0.0; GROUP * HEAD_DIM];
    group.throughput(Throughput::Bytes((pages.len() * layout.page_bytes()) as u64));
    group.bench_function("sparse/2048_tokens", |b| {
        b.iter(|| attend(&queries, black_box(&listed), &layout, &mut out));
    });

    let shape = KvShape::new(1, GROUP, 1, HEAD_DIM).unwrap();
    let chunk = PromptChunk { first: 3584, tokens: 512, context: 4096 };
    let (keys, values) = (random(chunk.context * HEAD_DIM, 7), random(chunk.context * HEAD_DIM, 8));
    let queries = random(chunk.tokens * GROUP * HEAD_DIM, 9);
    let mut out = vec![0.0; queries.len()];
    // Two products of 2 operations for each visible (query head, key) pair.
    let pairs = (0..chunk.tokens).map(|query| chunk.first + query + 1).sum::<usize>() * GROUP;
    group.throughput(Throughput::Elements((4 * pairs * HEAD_DIM) as u64));
    group.bench_function("prompt/512_queries_of_4096", |b| {
        b.iter(|| attend_prompt(&shape, &chunk, black_box(&queries), &keys, &values, &mut out));
    });
    group.finish();
}

fn layer_step(c: &mut Criterion) {
    let shape = KvShape::new(1, 2 * GROUP, 2, HEAD_DIM).unwrap();
    let layout = PageLayout::new(CHUNK, HEAD_DIM, KvDtype::Bf16).unwrap();
    let method =
        Arc::new(ShadowKv { budget: Budget::Tokens(2048), steady: SteadyZone::default(), outliers: 0 });
    let config = KvConfig::new(shape, layout, method).unwrap();
    let mut pipeline = Pipeline::new(CpuBackend::new(config, MemoryLimits::default()));
    let context = 16_384;
    let request = pipeline.admit(1 << 20).unwrap();
    let keys = random(context * 2 * HEAD_DIM, 10);
    let queries = random(context * 2 * GROUP * HEAD_DIM, 11);
    let mut out = vec![0.0; queries.len()];
    pipeline.prefill(request, 0, context, &keys, &keys).unwrap().attend(context, &queries, &mut out).unwrap();
    let mut step = 0;
    c.bench_function("layer_step/shadowkv_2048_of_16384_2_kv_heads", |b| {
        b.iter(|| {
            let at = step % 1000;
            let query = &queries[at * 2 * GROUP * HEAD_DIM..][..2 * GROUP * HEAD_DIM];
            let key = &keys[at * 2 * HEAD_DIM..][..2 * HEAD_DIM];
            step += 1;
            let out = &mut out[..2 * GROUP * HEAD_DIM];
            pipeline.decode(0, &[request], query, key, key, out).unwrap();
        });
    });
}

criterion_group!(benches, index, offload, select, resolve, gather, attention, layer_step);
criterion_main!(benches);
