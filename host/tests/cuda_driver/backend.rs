//! The cuda backend without a GPU: what it refuses, launches and writes into tables and entries. The stand-in's kernels touch nothing.

#[path = "backend/operators.rs"]
mod operators;
#[path = "backend/prefixes.rs"]
mod prefixes;

use std::collections::BTreeSet;
use std::sync::Arc;

use spinkv::algorithms::{
    Dense, HeadRule, LowRankKeys, PerRow, Quest, RowRules, ShadowKv, StreamingLlm, TokenTopK,
};
use spinkv::backend::cuda::driver::{Context, DeviceBuffer, DriverError, Event, Priority, Stream};
use spinkv::backend::cuda::{Bus, CudaBackend, CudaBytes, CudaLimits, StepTensors};
use spinkv::backend::{Backend, Step};
use spinkv::memory::{HostLayout, KvDtype, PageLayout, RequestPlan, Word};
use spinkv::pipeline::{Budget, LowRank, Method, Pipeline, RequestId, SteadyZone};
use spinkv::{Error, KvConfig, KvShape, Rotary};
use spinkv_kernels::abi::Entry;

use super::{Driver, driver};

const STEADY: SteadyZone = SteadyZone { sinks: 4, window: 12 };
const LAYERS: usize = 2;

/// Selects 3 chunks of 8 tokens.
fn shadowkv() -> Arc<dyn Method> {
    Arc::new(ShadowKv { budget: Budget::Tokens(24), steady: STEADY, outliers: 0 })
}

/// The same beside 5 outliers.
fn with_outliers() -> Arc<dyn Method> {
    Arc::new(ShadowKv { budget: Budget::Tokens(24), steady: STEADY, outliers: 5 })
}

/// Selects 2 chunks of 16 tokens.
fn quest() -> Arc<dyn Method> {
    Arc::new(Quest::new(Budget::Tokens(32), STEADY))
}

/// Selects 24 tokens.
fn token_topk() -> Arc<dyn Method> {
    Arc::new(TokenTopK { budget: Budget::Tokens(24), steady: STEADY })
}

/// The first with a dense layer, and a head that reads the steady zone alone in the other.
fn per_row(method: Arc<dyn Method>) -> Arc<dyn Method> {
    let steady_heads = vec![HeadRule { layer: None, kv_head: 1 }];
    Arc::new(PerRow::new(method, RowRules { dense_layers: 1, steady_heads }))
}

/// A method over heads of 64 with keys in a rank.
fn low_rank(method: Arc<dyn Method>, rank: usize) -> Arc<dyn Method> {
    let frequencies = (0..32).map(|at| 1e4_f32.powf(-at as f32 / 32.0)).collect();
    let rotary = Arc::new(Rotary::new(frequencies, 1.0));
    Arc::new(LowRankKeys::new(method, LowRank { rank, rotary }))
}

fn config(page_tokens: usize, head_dim: usize, dtype: KvDtype, method: Arc<dyn Method>) -> KvConfig {
    let shape = KvShape::new(LAYERS, 4, 2, head_dim).unwrap();
    KvConfig::new(shape, PageLayout::new(page_tokens, head_dim, dtype).unwrap(), method).unwrap()
}

fn limits(requests: usize) -> CudaLimits {
    CudaLimits { requests, max_tokens: 200, buffering: 2.0, gpu_pages: None, host_bytes: None }
}

/// A pipeline of pages of 8 tokens, and tensors for batches.
struct Run {
    pipeline: Pipeline<CudaBackend>,
    context: Context,
}

impl Run {
    fn new(driver: &Driver, method: Arc<dyn Method>, limits: &CudaLimits) -> Self {
        Self::with_pages(driver, 8, method, limits)
    }

    fn with_pages(driver: &Driver, page_tokens: usize, method: Arc<dyn Method>, limits: &CudaLimits) -> Self {
        Self::over(driver, config(page_tokens, 64, KvDtype::Bf16, method), limits)
    }

    fn over(driver: &Driver, config: KvConfig, limits: &CudaLimits) -> Self {
        let (context, _) = driver.open();
        let backend = CudaBackend::new(&context, config, limits).unwrap();
        driver.log();
        Self { pipeline: Pipeline::new(backend).with_buffering(limits.buffering), context }
    }

    /// `[tokens, heads, 64]` bf16.
    fn tensor(&self, tokens: usize, heads: usize) -> DeviceBuffer<Word> {
        DeviceBuffer::uninit(&self.context, tokens * heads * 8).unwrap()
    }

    fn decode(&mut self, layer: usize, batch: &[RequestId]) -> Result<(), Error> {
        let [queries, mut out] = [(); 2].map(|()| self.tensor(batch.len(), 4));
        let [keys, values] = [(); 2].map(|()| self.tensor(batch.len(), 2));
        self.pipeline.decode(layer, batch, &queries, &keys, &values, &mut out)
    }

    fn step(&mut self, batch: &[RequestId]) {
        (0..LAYERS).for_each(|layer| self.decode(layer, batch).unwrap());
    }

    fn entries(&self, batch: usize) -> Vec<Entry> {
        let backend = self.pipeline.backend();
        backend.entries_of(batch).unwrap().to_vec(backend.stream()).unwrap()
    }
}

/// The kernels that were launched, in order, and `copy` for a copy of whole entries.
fn launches(log: &[String]) -> Vec<String> {
    let entry = size_of::<Entry>();
    let copied = |line: &str| line.strip_prefix("copy ").and_then(|bytes| bytes.parse::<usize>().ok());
    log.iter()
        .map(|line| line.strip_prefix("overlapping ").unwrap_or(line))
        .filter_map(|line| match line.strip_prefix("launch ") {
            Some(launch) => launch.split(' ').next().map(str::to_owned),
            None => copied(line)
                .filter(|bytes| bytes % entry == 0)
                .map(|bytes| format!("entries {}", bytes / entry)),
        })
        .collect()
}

#[test]
fn what_the_kernels_do_not_have_is_refused() {
    let driver = driver();
    let (context, _) = driver.open();
    let refused = |config, limits: CudaLimits| CudaBackend::new(&context, config, &limits).unwrap_err();
    let dense = || Arc::new(Dense { steady: STEADY });
    for (config, part) in [
        (config(8, 64, KvDtype::F32, dense()), "F32"),
        (config(8, 96, KvDtype::Bf16, dense()), "heads of 96"),
        (config(8, 24, KvDtype::Bf16, dense()), "heads of 24"),
        (config(4, 64, KvDtype::Bf16, dense()), "pages of 4"),
        (config(24, 64, KvDtype::Bf16, dense()), "pages of 24"),
        (config(128, 64, KvDtype::Bf16, dense()), "pages of 128"),
        (config(8, 64, KvDtype::Bf16, low_rank(shadowkv(), 40)), "rank of 40"),
    ] {
        let error = refused(config, limits(2));
        assert!(matches!(&error, Error::UnsupportedOnGpu { what } if what.contains(part)), "{part}: {error}");
    }
    let good = || config(8, 64, KvDtype::Bf16, shadowkv());
    assert_eq!(refused(good(), limits(0)), Error::EmptyRequest);
    assert_eq!(refused(good(), CudaLimits { max_tokens: 0, ..limits(1) }), Error::EmptyRequest);
    let long = refused(good(), CudaLimits { max_tokens: usize::MAX, ..limits(1) });
    assert!(matches!(long, Error::ContextTooLong { max_tokens: usize::MAX, .. }), "{long}");
    let negative = refused(good(), CudaLimits { buffering: -1.0, ..limits(1) });
    assert_eq!(negative, Error::InvalidBuffering { value: -1.0 });
    let many = refused(good(), limits(4097));
    assert!(matches!(&many, Error::UnsupportedOnGpu { what } if what.contains("8192 rows")), "{many}");
    assert_eq!(driver.log(), [""; 0], "before anything is allocated");
}

/// A block of `resolve` keeps its row's lists in shared memory. Requests without a cache have none.
#[test]
fn selections_that_no_block_can_hold_are_refused() {
    let driver = driver();
    let (context, _) = driver.open();
    let new = |budget| {
        let method = Arc::new(ShadowKv { budget, steady: STEADY, outliers: 0 });
        let limits = CudaLimits { max_tokens: 262_144, gpu_pages: Some(64), ..limits(1) };
        CudaBackend::new(&context, config(8, 64, KvDtype::Bf16, method), &limits).map(|_| ())
    };
    let wide = new(Budget::Fraction(0.9)).unwrap_err();
    let Error::Driver(DriverError::SharedMemory { function, wanted, limit }) = wide else { panic!("{wide}") };
    assert!(function == "resolve" && wanted > 4 * 4 * 28_000 && limit == 226 << 10, "{wanted} of {limit}");
    // These come as far as the tables, which the stand-in has no memory for; with the latter all pages stay.
    for budget in [Budget::Fraction(0.1), Budget::Tokens(262_144)] {
        let next = new(budget).unwrap_err();
        assert!(matches!(next, Error::Driver(DriverError::OutOfGpuMemory { .. })), "{next}");
    }
}

/// With as many of the longest requests as the backend was made for, what is counted is what is allocated.
#[test]
fn usage_adds_up_to_what_is_allocated() {
    let driver = driver();
    for method in [shadowkv(), with_outliers(), quest(), per_row(shadowkv()), per_row(with_outliers())] {
        let mut run = Run::new(&driver, method, &limits(2));
        for _ in 0..2 {
            let request = run.pipeline.admit(200).unwrap();
            assert!(!run.pipeline.backend().is_resident([request]));
        }
        let (usage, allocated) = (run.pipeline.usage(), run.pipeline.backend().allocated());
        assert_eq!(usage.gpu.pages(), allocated.pages);
        assert_eq!(usage.gpu.tables(), allocated.tables);
        assert_eq!(usage.gpu.summaries, allocated.summaries);
        // 25 pages are 2 slabs a row, each of 16 pages of 2 KiB.
        assert_eq!(usage.host.pages, 2 * (LAYERS as u64 * 2) * 2 * 16 * 2048);
        assert_eq!((usage.gpu.key_coefficients, usage.gpu.key_bases), (0, 0));
    }
}

/// The host has values alone, half the bytes; the GPU has coefficients of a segment of each request, and bases.
#[test]
fn keys_in_low_rank_are_counted() {
    let driver = driver();
    for rank in [32, 96] {
        let mut run = Run::new(&driver, low_rank(shadowkv(), rank), &limits(2));
        for _ in 0..2 {
            run.pipeline.admit(200).unwrap();
        }
        let (usage, allocated) = (run.pipeline.usage(), run.pipeline.backend().allocated());
        assert_eq!(usage.gpu.pages(), allocated.pages);
        assert_eq!(usage.gpu.tables(), allocated.tables);
        assert_eq!(usage.gpu.summaries, allocated.summaries);
        assert_eq!(usage.host.pages, 2 * (LAYERS as u64 * 2) * 2 * 16 * 1024);
        let coefficients = 2 * (LAYERS * 512 * 8 * rank * 2) as u64;
        let bases = 2 * (LAYERS * 2 * 64 * rank * 2) as u64;
        assert_eq!((usage.gpu.key_coefficients, usage.gpu.key_bases), (coefficients, bases));
        // What prompts find them with comes on top: keys turned back, at least.
        assert!(allocated.key_factors > coefficients + bases + 200 * 2 * 64 * 2, "{allocated:?}");
    }
}

/// Caches of rows that select give and take; a dense layer's have what can be selected, steady rows have none.
#[test]
fn rows_have_slots_by_how_far_they_reach() {
    let driver = driver();
    let run = Run::new(&driver, per_row(shadowkv()), &limits(1));
    let least = run.pipeline.plan(200).unwrap().least_gpu_pages();
    let room = CudaLimits { gpu_pages: Some(least + 2), ..limits(1) };
    let mut run = Run::new(&driver, per_row(shadowkv()), &room);
    let request = run.pipeline.admit(200).unwrap();
    assert_eq!(run.pipeline.admitted(request).unwrap().row.buffering_pages, 2);
    assert_eq!(run.pipeline.backend_mut().audit(request), Ok(0));
    (0..100).for_each(|_| run.step(&[request]));
    run.pipeline.release(request);
    assert!(run.pipeline.backend().is_empty());
    for (method, part) in [
        (per_row(Arc::new(Dense { steady: STEADY })), "dense"),
        (per_row(Arc::new(StreamingLlm { steady: STEADY })), "streaming-llm"),
    ] {
        let refused = CudaBackend::check(&config(8, 64, KvDtype::Bf16, method), &limits(1)).unwrap_err();
        assert!(matches!(&refused, Error::UnsupportedOnGpu { what } if what.contains(part)), "{refused}");
    }
}

#[test]
fn a_decode_step_launches_its_stages_in_order_and_uploads_entries_once() {
    let driver = driver();
    let all = ["chunk_mean_step", "append", "score", "select", "resolve", "gather", "attend_64"];
    let none = ["append", "resolve", "gather", "attend_64"];
    let bounds = ["chunk_bounds_step", "append", "score", "select", "resolve", "gather", "attend_64"];
    // Index reads keys as they came; who reads the pages behind it finds those that are rebuilt.
    let rebuilding = ["project_keys", "rebuild_keys_64"];
    let of_select = ["append", "score", "select", "resolve", "rebuild_keys_64", "gather", "attend_64"];
    let low_rank_all = [&["chunk_mean_step"][..], &rebuilding, &of_select].concat();
    let cases: [(Arc<dyn Method>, &[&str]); 7] = [
        (low_rank(shadowkv(), 64), &low_rank_all),
        (shadowkv(), &all),
        (with_outliers(), &all),
        (quest(), &bounds),
        (token_topk(), &all),
        (Arc::new(StreamingLlm { steady: STEADY }), &none),
        (Arc::new(Dense { steady: STEADY }), &["append", "attend_64"]),
    ];
    for (method, stages) in cases {
        let mut run = Run::new(&driver, method, &limits(2));
        let requests = [run.pipeline.admit(200).unwrap(), run.pipeline.admit(200).unwrap()];
        driver.log();
        let mut launched = |layer, batch: &[RequestId]| {
            run.decode(layer, batch).unwrap();
            launches(&driver.log())
        };
        let with = |entries: &[&'static str]| [entries, stages].concat();
        assert_eq!(launched(0, &requests), with(&["entries 2"]));
        assert_eq!(launched(1, &requests), with(&[]), "they are there");
        assert_eq!(launched(0, &requests[..1]), with(&["entries 1"]));
        assert_eq!(launched(0, &requests[1..]), with(&["entries 1"]));
        assert_eq!(launched(1, &requests[..1]), with(&["entries 1"]), "the other's were there");
        assert_eq!(launched(1, &requests[1..]), with(&["entries 1"]));
    }
}

/// As a graph captures it: what one stage hands to the next is checked before anything is launched.
#[test]
fn a_layers_stages_agree_for_every_method_and_format_of_host_pages() {
    let driver = driver();
    let methods: [Arc<dyn Method>; 6] = [
        shadowkv(),
        with_outliers(),
        quest(),
        token_topk(),
        per_row(shadowkv()),
        Arc::new(StreamingLlm { steady: STEADY }),
    ];
    let formats = ["full", "fp8", "int8"];
    let all = methods.iter().flat_map(|method| formats.map(|format| (method.clone(), format)));
    for (method, format) in all.chain([(low_rank(shadowkv(), 64), "full")]) {
        let shape = KvShape::new(LAYERS, 4, 2, 64).unwrap();
        let layout = PageLayout::new(8, 64, KvDtype::Bf16).unwrap();
        let pages = HostLayout::new(layout, format.parse().unwrap()).unwrap();
        let mut run = Run::over(&driver, KvConfig::new(shape, pages, method.clone()).unwrap(), &limits(2));
        run.pipeline.admit(200).unwrap();
        let [queries, out] = [(); 2].map(|()| run.tensor(1, 4));
        let [keys, values] = [(); 2].map(|()| run.tensor(1, 2));
        let tensors = StepTensors { queries: &queries, keys: &keys, values: &values, out: &out };
        driver.log();
        for layer in 0..LAYERS {
            // SAFETY: the stand-in's kernels touch nothing.
            let launched = unsafe { run.pipeline.backend().launch_layer(layer, 1, false, &tensors) };
            launched.unwrap_or_else(|error| panic!("{method:?}, {format}: {error}"));
        }
        let log = launches(&driver.log());
        let gather = if format == "full" { "gather" } else { "gather_coded" };
        assert_eq!(log.iter().filter(|kernel| **kernel == gather).count(), LAYERS, "{format}: {log:?}");
    }
}

/// Half a page arrives where keys are rebuilt, so attention cannot count words: it comes behind all of `gather`. Elsewhere it runs beside it.
#[test]
fn attention_overlaps_what_it_can_count() {
    let driver = driver();
    for (method, overlaps) in [(shadowkv(), true), (low_rank(shadowkv(), 32), false)] {
        let mut run = Run::new(&driver, method, &limits(1));
        let request = run.pipeline.admit(200).unwrap();
        driver.log();
        run.decode(0, &[request]).unwrap();
        let log = driver.log();
        let attend: Vec<_> = log.iter().filter(|line| line.contains("launch attend_64")).collect();
        assert_eq!(attend.len(), 1, "{log:?}");
        assert_eq!(attend[0].starts_with("overlapping "), overlaps, "{attend:?}");
        let gather = log.iter().find(|line| line.contains("launch gather ")).unwrap();
        let numbers: Vec<_> = gather.split(' ').collect();
        let [page_words, device_words, _, counted] = numbers[numbers.len() - 4..] else { unreachable!() };
        let words = if overlaps { ["128", "128", "1"] } else { ["64", "128", "0"] };
        assert_eq!([page_words, device_words, counted], words, "{gather}");
    }
}

/// The first token of a request without a prompt comes with bases of axes: vector `i` of rank 32 is element `i` of the first head.
#[test]
fn requests_without_a_prompt_keep_the_first_axes() {
    let driver = driver();
    let mut run = Run::new(&driver, low_rank(shadowkv(), 32), &limits(1));
    let request = run.pipeline.admit(200).unwrap();
    let basis = LAYERS * 2 * 64 * 32 * 2;
    let copies =
        |log: &[String]| log.iter().filter(|line| **line == format!("copy {}", basis / LAYERS)).count();
    driver.log();
    run.step(&[request]);
    assert_eq!(copies(&driver.log()), LAYERS, "a layer at a time");
    run.step(&[request]);
    assert_eq!(copies(&driver.log()), 0);
}

/// By the zones' definition: a page is steady as a sink, or while the window, rounded outwards to whole pages, reaches it.
#[test]
fn entries_follow_the_zones_token_by_token() {
    let driver = driver();
    // Tokens of a page, of what leaves the steady zone at a time, and of a partition; the most partitions.
    for (method, page, unit, partition, most) in [
        (shadowkv(), 8, 8, 8, 3),
        (with_outliers(), 8, 8, 8, 3),
        (quest(), 8, 16, 16, 2),
        (quest(), 16, 16, 16, 2),
        (token_topk(), 8, 8, 1, 24),
        (token_topk(), 16, 16, 1, 24),
        (Arc::new(StreamingLlm { steady: STEADY }) as _, 8, 8, 1, 0),
    ] {
        let selectable =
            |tokens: usize| (1..25).filter(|at| unit * (at + 1) + 12 <= tokens).count() as u32 * unit as u32;
        let of = |tokens: u32, size: usize| tokens / size as u32;
        let mut run = Run::with_pages(&driver, page, method, &limits(1));
        let request = run.pipeline.admit(200).unwrap();
        for tokens in 1..=200 {
            run.step(&[request]);
            driver.log();
            let entry = run.entries(1)[0];
            let (now, before) = (selectable(tokens), selectable(tokens - 1));
            assert_eq!((entry.tokens as usize, entry.clock as usize), (tokens, tokens % 64));
            let sinks = unit as u32;
            let leaving = (of(sinks + before, page), of(now - before, page));
            assert_eq!((entry.leaving_key, entry.leaving), leaving, "{tokens}");
            // StreamingLLM's partitions are tokens, of which it selects none.
            let selects = u32::from(most > 0);
            let partitions = selects * of(now, partition);
            assert_eq!(
                (entry.first_partition, entry.partitions, entry.limit),
                (of(sinks, partition), partitions, partitions.min(most)),
                "{tokens}"
            );
            let new = (of(sinks + before, partition), selects * of(now - before, partition));
            assert_eq!((entry.new_partition, entry.new_partitions), new, "{tokens}");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_and_costs_nothing() {
    let driver = driver();
    let mut run = Run::new(&driver, shadowkv(), &limits(2));
    let long = run.pipeline.admit(201).unwrap_err();
    assert_eq!(long, Error::ContextTooLong { max_tokens: 201, limit: 200 });
    assert!(run.pipeline.backend().is_empty());
    let held = [run.pipeline.admit(200).unwrap(), run.pipeline.admit(200).unwrap()];
    assert_eq!(run.pipeline.admit(8).unwrap_err(), Error::BatchTooLarge { requests: 3, limit: 2 });
    held.into_iter().for_each(|request| run.pipeline.release(request));
    assert!(run.pipeline.backend().is_empty());
    run.pipeline.admit(200).unwrap();
}

/// Room for the steady and mandatory pages of two requests and seven buffering pages a row, of which each wants six.
#[test]
fn caches_shrink_for_others_and_grow_back() {
    let driver = driver();
    let rows = LAYERS * 2;
    let limits = CudaLimits { gpu_pages: Some(2 * rows * (4 + 3) + rows * 7), ..limits(2) };
    let mut run = Run::new(&driver, shadowkv(), &limits);
    let buffering = |run: &Run, request| run.pipeline.admitted(request).unwrap().row.buffering_pages;
    let first = run.pipeline.admit(200).unwrap();
    assert_eq!(buffering(&run, first), 6);
    let second = run.pipeline.admit(200).unwrap();
    assert_eq!(
        (buffering(&run, first), buffering(&run, second)),
        (4, 3),
        "the first of equals gets the last page"
    );
    for request in [first, second] {
        assert_eq!(run.pipeline.backend_mut().audit(request), Ok(0), "tables agree, and nothing is cached");
    }
    run.pipeline.release(first);
    assert_eq!(buffering(&run, second), 6);
    assert_eq!(run.pipeline.backend_mut().audit(second), Ok(0));
    run.pipeline.release(second);
    assert!(run.pipeline.backend().is_empty());
}

/// Room for the steady pages of three requests and the mandatory ones of two.
#[test]
fn a_parked_request_gives_its_cache_and_gets_an_empty_one() {
    let driver = driver();
    let rows = LAYERS * 2;
    for method in [shadowkv(), per_row(shadowkv())] {
        let config = config(8, 64, KvDtype::Bf16, method);
        let plan = RequestPlan::new(&config, 200, 0.0).unwrap();
        let gpu_pages = Some(3 * rows * plan.row.steady_pages + 2 * plan.cache_pages());
        let mut run = Run::over(&driver, config, &CudaLimits { gpu_pages, ..limits(3) });
        let slots = |run: &Run, request| run.pipeline.admitted(request).unwrap().row.slots();
        let pages = |run: &Run| run.pipeline.usage().gpu.cache_pages / 2048;
        let [first, second] = [(); 2].map(|()| run.pipeline.admit(200).unwrap());
        assert!(matches!(run.pipeline.admit(200), Err(Error::OutOfGpuPages { .. })));
        let both = pages(&run);
        run.pipeline.park(first).unwrap();
        assert_eq!(run.pipeline.backend_mut().audit(first), Ok(0));
        assert!(slots(&run, second) > plan.row.mandatory_pages, "the others get what it had as buffering");
        assert!(matches!(run.pipeline.park(first), Err(Error::RequestParked(found)) if found == first));
        let third = run.pipeline.admit(200).unwrap();
        assert_eq!(pages(&run), 2 * plan.cache_pages() as u64, "the third has what the first gave");
        let short = run.pipeline.resume(first);
        assert!(matches!(short, Err(Error::OutOfGpuPages { .. })), "{short:?}");
        assert_eq!(run.pipeline.backend_mut().audit(first), Ok(0), "it is still parked");
        run.pipeline.release(third);
        run.pipeline.resume(first).unwrap();
        assert_eq!(pages(&run), both);
        assert!(slots(&run, first) >= plan.row.mandatory_pages);
        run.step(&[first, second]);
        for request in [first, second] {
            assert_eq!(run.pipeline.backend_mut().audit(request), Ok(0));
        }
        run.pipeline.park(second).unwrap();
        [first, second].into_iter().for_each(|request| run.pipeline.release(request));
        assert!(run.pipeline.backend().is_empty());
    }
}

#[test]
fn who_has_no_cache_is_parked_as_a_whole() {
    let driver = driver();
    let dense: Arc<dyn Method> = Arc::new(Dense { steady: STEADY });
    let config = config(8, 64, KvDtype::Bf16, dense.clone());
    let of_one = LAYERS * 2 * config.layout().pages(200);
    let gpu_pages = Some(2 * RequestPlan::new(&config, 200, 0.0).unwrap().gpu_pages());
    let mut run = Run::over(&driver, config, &CudaLimits { gpu_pages, ..limits(3) });
    let pages = |run: &Run| (run.pipeline.usage().gpu.pages() / 2048) as usize;
    let [first, second] = [(); 2].map(|()| run.pipeline.admit(200).unwrap());
    assert!(run.pipeline.backend().is_resident([first, second]));
    run.step(&[first, second]);
    assert!(matches!(run.pipeline.admit(200), Err(Error::OutOfGpuPages { .. })));
    driver.log();
    run.pipeline.park(first).unwrap();
    assert!(launches(&driver.log()).is_empty(), "its newest pages alone are copied");
    assert_eq!((pages(&run), run.pipeline.backend_mut().audit(first)), (of_one, Ok(0)));
    let third = run.pipeline.admit(200).unwrap();
    run.step(&[second, third]);
    assert!(matches!(run.pipeline.resume(first), Err(Error::OutOfGpuPages { .. })));
    run.pipeline.release(third);
    driver.log();
    run.pipeline.resume(first).unwrap();
    assert!(launches(&driver.log()).is_empty(), "the stand-in's kernels have written no page to the host");
    assert_eq!(pages(&run), 2 * of_one);
    run.step(&[first, second]);
    run.pipeline.park(second).unwrap();
    for request in [first, second] {
        assert_eq!(run.pipeline.backend_mut().audit(request), Ok(0));
        run.pipeline.release(request);
    }
    // Of these the last page is never complete, and has no slab.
    for max_tokens in [1, 5, 129, 135] {
        let request = run.pipeline.admit(max_tokens).unwrap();
        run.step(&[request]);
        run.pipeline.park(request).unwrap();
        assert_eq!(pages(&run), 0);
        run.pipeline.resume(request).unwrap();
        run.pipeline.release(request);
    }
    assert!(run.pipeline.backend().is_empty());
}

#[test]
fn who_has_other_pages_on_the_host_is_not_parked() {
    let driver = driver();
    // All that it may ever hold is selected.
    let mut run = Run::new(&driver, low_rank(shadowkv(), 32), &limits(1));
    let request = run.pipeline.admit(24).unwrap();
    assert!(run.pipeline.backend().is_resident([request]));
    assert_eq!(run.pipeline.park(request), Err(Error::ParkingUnsupported));
    run.step(&[request]);
}

#[test]
fn a_prompt_is_attended_chunk_by_chunk_and_kept_with_its_last_query() {
    let driver = driver();
    let selecting = ["store_prompt", "score", "select", "resolve", "gather"];
    let with = |index: &[&'static str]| [index, &selecting].concat();
    let outliers = with(&["chunk_mean", "chunk_spread", "top_k", "mark"]);
    // The basis of the whole prompt, and the coefficients of what it leaves to be selected; the keys of the pages that the last query selects.
    let orthogonalise = ["row_dots", "inverse_factor", "row_sums"];
    let iteration = [&["row_dots"][..], &orthogonalise].concat();
    let basis = [
        &["unrotate", "gram", "gram_sum"][..],
        &iteration.repeat(8),
        &orthogonalise.repeat(2),
        &["complete_basis", "store_basis", "gemm_wgmma"],
        &["chunk_mean", "store_prompt", "score", "select", "resolve", "rebuild_keys_64", "gather"],
    ]
    .concat();
    for (method, stages) in [
        (low_rank(shadowkv(), 32), &basis[..]),
        (shadowkv(), &with(&["chunk_mean"])),
        (with_outliers(), &outliers),
        (quest(), &with(&["chunk_bounds"])),
        (token_topk(), &with(&["chunk_mean"])),
        (Arc::new(StreamingLlm { steady: STEADY }) as _, &["store_prompt"]),
        (Arc::new(Dense { steady: STEADY }) as _, &["store_prompt"]),
    ] {
        let mut run = Run::new(&driver, method, &limits(1));
        let request = run.pipeline.admit(120).unwrap();
        let [keys, values] = [(); 2].map(|()| run.tensor(100, 2));
        let (queries, mut out) = (run.tensor(50, 4), run.tensor(50, 4));
        for layer in 0..LAYERS {
            let mut prompt = run.pipeline.prefill(request, layer, 100, &keys, &values).unwrap();
            driver.log();
            prompt.attend(50, &queries, &mut out).unwrap();
            let first = launches(&driver.log());
            assert!(matches!(&first[..], [kernel] if kernel.starts_with("prefill_")), "{first:?}");
            prompt.attend(50, &queries, &mut out).unwrap();
            let last: Vec<_> =
                launches(&driver.log()).into_iter().filter(|line| !line.starts_with("entries")).collect();
            assert_eq!(last[1..], *stages, "layer {layer}");
        }
        assert_eq!(run.pipeline.tokens(request), Ok(100));
        // The step behind it takes the prompt's places over.
        run.step(&[request]);
        let entry = run.entries(1)[0];
        assert_eq!((entry.tokens, entry.clock), (101, 2));
    }
}

#[test]
fn a_step_at_once_advances_all_or_fails_all() {
    let driver = driver();
    let mut run = Run::new(&driver, shadowkv(), &limits(2));
    let requests = [run.pipeline.admit(2).unwrap(), run.pipeline.admit(3).unwrap()];
    let mut step_of = |batch: &[RequestId], bucket: usize, fails: bool| {
        let begin = |backend: &mut CudaBackend, step: &Step<'_>| {
            assert_eq!(step.layer, 0);
            backend.begin_step(step, bucket)
        };
        run.pipeline.decode_at_once(batch, begin, |_| if fails { Err(Error::EmptyRequest) } else { Ok(()) })
    };
    let refused = Err(Error::BatchTooLarge { requests: 3, limit: 2 });
    assert_eq!(step_of(&requests, 3, true), refused, "before it began, so that nothing changed");
    let mut step = |batch: &[RequestId], fails: bool| step_of(batch, 2, fails);
    assert_eq!(step(&[requests[0], requests[0]], false), Err(Error::DuplicateRequest(requests[0])));
    assert_eq!(step(&requests, false), Ok(()));
    assert_eq!(step(&requests, false), Ok(()));
    let full = Error::ContextFull { request: requests[0], tokens: 1, held: 2, limit: 2 };
    assert_eq!(step(&requests, false), Err(full), "of which nothing changed");
    assert_eq!(step(&requests[1..], true), Err(Error::EmptyRequest));
    assert_eq!(step(&requests[1..], false), Err(Error::RequestFailed(requests[1])));
    assert_eq!(requests.map(|request| run.pipeline.tokens(request)), [Ok(2), Ok(2)]);
    let three = run.pipeline.backend_mut().begin_step(&Step { layer: 0, entries: &[] }, 3);
    assert_eq!(three, Err(Error::BatchTooLarge { requests: 3, limit: 2 }));
}

/// Requests too short to fill a page, or to have anything to select, keep all their pages steady, whatever the method.
#[test]
fn short_requests_run() {
    let driver = driver();
    let methods: [Arc<dyn Method>; 7] = [
        shadowkv(),
        low_rank(shadowkv(), 64),
        with_outliers(),
        quest(),
        token_topk(),
        Arc::new(StreamingLlm { steady: STEADY }),
        Arc::new(Dense { steady: STEADY }),
    ];
    for method in methods {
        for max_tokens in [1, 5, 8, 20, 27] {
            let mut run = Run::new(&driver, method.clone(), &CudaLimits { max_tokens, ..limits(1) });
            let request = run.pipeline.admit(max_tokens).unwrap();
            assert!(run.pipeline.backend().is_resident([request]), "{max_tokens}");
            (0..max_tokens).for_each(|_| run.step(&[request]));
            run.pipeline.release(request);
            assert!(run.pipeline.backend().is_empty());
        }
    }
}

/// A fraction of the context is rounded down anew at each length: a request is not resident though its last step selects everything.
#[test]
fn fractions_keep_a_cache() {
    let driver = driver();
    let fraction = ShadowKv { budget: Budget::Fraction(0.9), steady: STEADY, outliers: 0 };
    let mut run = Run::new(&driver, Arc::new(fraction), &limits(1));
    let request = run.pipeline.admit(200).unwrap();
    assert!(!run.pipeline.backend().is_resident([request]));
    for tokens in 1..=200 {
        run.step(&[request]);
        let entry = run.entries(1)[0];
        let limit = ((tokens * 9 / 10) / 8).max(1) as u32;
        assert_eq!(entry.limit, limit.min(entry.partitions), "{tokens}");
    }
}

/// What both halves of a batch name are tables, pages and summaries, whose rows they part, and nothing that a launch hands on.
#[test]
fn halves_of_a_batch_share_nothing_but_tables() {
    let driver = driver();
    let stages = ["chunk_mean_step", "append", "score", "select", "resolve", "gather", "attend_64"];
    // The stand-in has little memory: a layer of 4 KV heads is parted at 16.
    let of_20 = CudaLimits { max_tokens: 80, gpu_pages: Some(200), ..limits(20) };
    let config = |method| {
        let shape = KvShape::new(1, 4, 4, 64).unwrap();
        KvConfig::new(shape, PageLayout::new(8, 64, KvDtype::Bf16).unwrap(), method).unwrap()
    };
    for method in [shadowkv(), with_outliers()] {
        let mut run = Run::over(&driver, config(method), &of_20);
        run.pipeline.admit(80).unwrap();
        let backend = run.pipeline.backend();
        assert_eq!([15, 16, 17, 20].map(|batch| backend.half_of(batch)), [None, None, Some(16), Some(16)]);
        let [ready, fetched] = [(); 2].map(|()| Event::untimed(&run.context).unwrap());
        let copies = Stream::with_priority(&run.context, Priority::High).unwrap();
        let bus = Bus { stream: &copies, ready: &ready, fetched: &fetched };
        driver.log();
        let mut named = [0..16, 16..20].map(|half: std::ops::Range<usize>| {
            let [queries, out, keys, values] = [(); 4].map(|()| run.tensor(half.len(), 4));
            let tensors = StepTensors { queries: &queries, keys: &keys, values: &values, out: &out };
            let backend = run.pipeline.backend();
            // SAFETY: the stand-in runs nothing.
            unsafe { backend.launch_half(0, half, backend.stream(), &tensors, &bus) }.unwrap();
            let log = driver.log();
            assert_eq!(launches(&log), stages);
            // Attention waits for the pages: it would keep the other half's work from the GPU.
            assert!(parameters(&log, "gather").ends_with(&["0".to_owned()]));
            (log, [queries, out, keys, values])
        });
        let tables = |log: &[String]| {
            let resolve = parameters(log, "resolve")[9..17].to_vec();
            let gather = parameters(log, "gather")[4..6].to_vec();
            let index = parameters(log, "chunk_mean_step");
            let select = parameters(log, "select");
            // Summaries are the Index's last one; marks are Select's.
            let marks = select.into_iter().filter(|of| of.starts_with("0x")).skip(3).take(2);
            resolve
                .into_iter()
                .chain(gather)
                .chain(index.last().cloned())
                .chain(marks)
                .collect::<BTreeSet<_>>()
        };
        let addresses = |log: &[String]| -> BTreeSet<String> {
            let all = log.iter().filter_map(|line| line.split_once(": ")).flat_map(|(_, of)| of.split(' '));
            all.filter(|of| of.starts_with("0x") && *of != "0x0").map(str::to_owned).collect()
        };
        let [first, second] = named.each_mut().map(|(log, _)| std::mem::take(log));
        let (known, shared) = (tables(&first), &addresses(&first) & &addresses(&second));
        let other: Vec<_> = shared.difference(&known).collect();
        assert!(other.is_empty(), "{other:?} of both halves:\n{first:#?}\n{second:#?}");
    }
}

/// The parameters of the last launch of `kernel`.
fn parameters(log: &[String], kernel: &str) -> Vec<String> {
    let start = format!("launch {kernel} ");
    let is_of_kernel = |line: &&String| line.trim_start_matches("overlapping ").starts_with(&start);
    let line = log.iter().rev().find(is_of_kernel).expect("it was launched");
    line.split_once(": ").expect("parameters").1.split(' ').map(str::to_owned).collect()
}

/// Partitions of several pages and pages of several partitions; bounds are neither scaled nor softmaxed.
#[test]
fn kernels_are_told_how_partitions_and_pages_relate_and_how_they_are_scored() {
    let driver = driver();
    // Partitions of a page and pages of a partition, bounds, factor, tiles of the softmax.
    for (method, page_tokens, sharing, scores) in [
        (shadowkv(), 8, ["1", "1"], ["0", "0.12", "1"]),
        (quest(), 8, ["1", "2"], ["1", "1.00", "0"]),
        (quest(), 16, ["1", "1"], ["1", "1.00", "0"]),
        (token_topk(), 8, ["8", "1"], ["0", "0.12", "3"]),
        (token_topk(), 16, ["16", "1"], ["0", "0.12", "3"]),
    ] {
        let mut run = Run::with_pages(&driver, page_tokens, method, &limits(1));
        let request = run.pipeline.admit(200).unwrap();
        run.step(&[request]);
        let log = driver.log();
        assert_eq!(parameters(&log, "resolve")[7..9], sharing, "{page_tokens}");
        let (score, select) = (parameters(&log, "score"), parameters(&log, "select"));
        assert_eq!([&score[7], &score[11], &select[6]], scores.each_ref(), "{page_tokens}");
    }
}

/// What every step reads is known with the prompt, counts beside the budget, and is a request's own.
#[test]
fn outliers_of_a_prompt_are_selected_beside_the_budget() {
    let driver = driver();
    let mut run = Run::new(&driver, with_outliers(), &limits(3));
    let rows = LAYERS * 2;
    let mut requests = Vec::new();
    // At 100 tokens chunks 1 to 10 can be selected, at 30 one of them.
    for (prompt, partitions) in [(100, 10), (30, 1), (0, 0)] {
        let request = run.pipeline.admit(200).unwrap();
        assert_eq!(run.pipeline.admitted(request).unwrap().row.mandatory_pages, 3 + 5);
        let [keys, values] = [(); 2].map(|()| run.tensor(prompt, 2));
        let (queries, mut out) = (run.tensor(prompt, 4), run.tensor(prompt, 4));
        for layer in 0..if prompt > 0 { LAYERS } else { 0 } {
            driver.log();
            let mut prefill = run.pipeline.prefill(request, layer, prompt, &keys, &values).unwrap();
            prefill.attend(prompt, &queries, &mut out).unwrap();
            let log = driver.log();
            // First row and words; 22 partitions at most.
            let mark = parameters(&log, "mark");
            assert_eq!(mark[3..7], ["5".to_owned(), (2 * layer).to_string(), "2".to_owned(), "1".to_owned()]);
            let select = parameters(&log, "select");
            assert_eq!((&select[10], &*select[12], &*select[13]), (&mark[7], "1", "0"), "no mask");
            assert_eq!(select[14], (2 * layer).to_string());
        }
        requests.push((request, prompt, partitions.min(5)));
    }
    let mut places: Vec<u32> = Vec::new();
    for (request, prompt, always) in requests {
        for tokens in prompt + 1..=200 {
            run.step(&[request]);
            let entry = run.entries(1)[0];
            assert_eq!(entry.limit, entry.partitions.min(3 + always), "prompt of {prompt}, {tokens} tokens");
            assert_eq!(entry.first_marks % rows as u32, 0);
            places.push(entry.first_marks / rows as u32);
        }
    }
    places.dedup();
    places.sort_unstable();
    assert_eq!(places, [0, 1, 2]);
}
