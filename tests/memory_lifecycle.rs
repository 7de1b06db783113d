//! What went wrong in other systems that keep KV on two tiers, one test for each kind of bug that tables, lifecycles
//! or transfers can have.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use spinkv::backend::cpu::CpuBackend;
use spinkv::memory::{Direction, MemoryLimits, PageLayout, SUMMARY_ELEMENT_BYTES, footprint};
use spinkv::partition::PartitionKind;
use spinkv::pipeline::{Budget, Candidates, Index, Method, Pick, Pipeline, RequestId, Select, SteadyZone};
use spinkv::{Error, KvConfig};
use spinkv_tests::small::{SPARSE, STEADY, alone, assert_all_returned, sequence, setups, shape};
use spinkv_tests::{Run, Setup};

/// A run whose transfers complete only when somebody waits for them.
fn late(setup: &Setup, seed: u64) -> Run {
    let Setup { shape, page_tokens, dtype, ref method, limits, buffering, .. } = *setup;
    let layout = PageLayout::new(page_tokens, shape.head_dim, dtype).unwrap();
    let config = KvConfig::new(shape, layout, method.clone()).unwrap();
    let mut run = setup.start();
    let backend = CpuBackend::new(config, limits).with_late_transfers(seed);
    run.pipeline = Pipeline::new(backend).with_buffering(buffering);
    run
}

fn buffering(run: &Run, id: RequestId) -> usize {
    run.pipeline.admitted(id).unwrap().row.buffering_pages
}

/// A store watermark that counted the last sampled token published a page that no forward pass had completed (vLLM
/// 54193).
#[test]
fn watermark_counts_computed_tokens() {
    let setup = Setup::new(shape(), 8, SPARSE);
    let mut run = setup.start();
    // 23 tokens are computed; the 24th is known and its K and V are not.
    let id = run.start(&sequence(40, 1), 23);
    let published = |run: &Run| run.pipeline.backend().published_pages(id, 1, 1).unwrap();
    assert_eq!(published(&run), 2);
    run.step_layer(&[id], 0).unwrap();
    assert_eq!(published(&run), 2, "the last layer has not computed the token");
    run.step_layer(&[id], 1).unwrap();
    assert_eq!(published(&run), 3);
}

/// Decoded pages never reached the host and were evicted all the same (vLLM 56158).
#[test]
fn decoded_pages_are_evicted_only_when_the_host_has_them() {
    for setup in setups() {
        for buffering in [0.0, 0.5] {
            let setup = Setup { buffering, ..setup.clone() };
            let sequence = sequence(200, 3);
            let expected = alone(&setup, &sequence, 30).1;
            let mut run = late(&setup, 7);
            let id = run.start(&sequence, 30);
            for expected in expected {
                assert_eq!(run.generate(id, 1)[0], expected);
                run.pipeline.backend().check_tables();
            }
        }
    }
}

/// Blocks were given to another request while a transfer was in flight (vLLM 46951, 47282).
#[test]
fn freed_blocks_wait_for_transfers() {
    for seed in 0..10 {
        let setup = Setup::new(shape(), 8, SPARSE);
        let mut run = late(&setup, seed);
        let id = run.start(&sequence(120, 1), 100);
        let backend = run.pipeline.backend();
        let directions = backend.transfers().under_way().iter().map(|transfer| transfer.direction());
        let directions: Vec<_> = directions.collect();
        assert!(directions.contains(&Direction::ToGpu), "{directions:?}");
        run.pipeline.release(id);

        let census = run.pipeline.backend().page_census();
        assert!(census.used == 0 && census.in_flight > 0, "{census:?}");
        run.pipeline.backend().check_tables();
        // Another request finds enough that nobody touches, and the old transfers land beside it.
        let other = sequence(120, 2);
        let (prompt, steps) = alone(&setup, &other, 100);
        let id = run.admit(&other).unwrap();
        assert_eq!(run.pipeline.backend().page_census().in_flight, census.in_flight);
        assert_eq!(run.prompt(id, 100, 100).unwrap(), prompt);
        run.pipeline.backend_mut().complete_transfers(3);
        assert_eq!(run.generate(id, 10), steps[..10]);
        run.pipeline.backend_mut().complete_transfers(usize::MAX);
        assert_eq!(run.generate(id, 10), steps[10..]);
        assert_eq!(run.pipeline.backend().page_census().in_flight, 0);
        run.pipeline.release(id);
        run.pipeline.backend_mut().complete_transfers(usize::MAX);
        assert_all_returned(&run);
    }
}

/// A request that came back while its old transfers were alive broke an assertion (vLLM 46014), or the scheduler
/// waited for ever for pages that only those transfers held (45387).
#[test]
fn admission_waits_for_transfers_of_ended_requests() {
    let setup = Setup::new(shape(), 8, SPARSE);
    let start = setup.start();
    let limits = start.pipeline.plan(120).unwrap().limits(start.pipeline.config());
    let setup = Setup { limits, ..setup };
    let sequence = sequence(120, 1);
    let (prompt, steps) = alone(&setup, &sequence, 100);
    let mut run = late(&setup, 3);
    for _ in 0..5 {
        // Room for one: each needs every page and every slab of the one before.
        let id = run.admit(&sequence).unwrap();
        assert_eq!(run.prompt(id, 100, 100).unwrap(), prompt);
        assert_eq!(run.generate(id, 4), steps[..4]);
        run.pipeline.release(id);
        run.pipeline.backend().check_tables();
    }
}

/// Running = 0, waiting = N, for ever (vLLM 45387); nothing free and much that could be evicted (sglang 26357).
#[test]
fn admission_under_pressure_makes_progress() {
    let setup = Setup::new(shape(), 8, SPARSE);
    let plan = setup.start().pipeline.plan(200).unwrap();
    let least = plan.least_gpu_pages();
    // The first request fills the machine with buffering; five more fit if it gives that back.
    let limits = MemoryLimits { gpu_pages: Some(6 * least + 4), ..MemoryLimits::default() };
    let setup = Setup { limits, ..setup };
    for transfers in [None, Some(5)] {
        let mut run = transfers.map_or_else(|| setup.start(), |seed| late(&setup, seed));
        let sequences: Vec<_> = (0..6).map(|seed| sequence(200, seed)).collect();
        let expected: Vec<_> = sequences.iter().map(|sequence| alone(&setup, sequence, 150).1).collect();
        let mut ids = Vec::new();
        for (index, sequence) in sequences.iter().enumerate() {
            ids.push(run.start(sequence, 150));
            run.pipeline.backend().check_tables();
            // Fair at any time: nobody has two pages more than another of the same size.
            let shares: Vec<_> = ids.iter().map(|id| buffering(&run, *id)).collect();
            let (most, fewest) = (shares.iter().max().unwrap(), shares.iter().min().unwrap());
            assert!(most - fewest <= 1, "request {index}: {shares:?}");
        }
        assert_eq!(ids.iter().map(|id| buffering(&run, *id)).sum::<usize>(), 1);
        assert!(matches!(run.admit(&sequences[0]), Err(Error::OutOfGpuPages { .. })));
        for step in 0..10 {
            let outputs = run.step(&ids).unwrap();
            for (output, expected) in outputs.iter().zip(&expected) {
                assert_eq!(output, &expected[step]);
            }
        }
        // As the others end, the last one gets back what it wants, and with full caches nothing changes.
        let last = ids.pop().unwrap();
        for id in ids {
            run.pipeline.release(id);
        }
        if transfers.is_some() {
            run.pipeline.backend_mut().complete_transfers(usize::MAX);
        }
        assert_eq!(run.pipeline.admitted(last).unwrap(), &plan);
        assert_eq!(run.generate(last, 20), expected[5][10..30]);
    }
}

/// Mandatory pages are never taken, and the requests with the largest ratio of buffering to mandatory pages give.
#[test]
fn the_largest_ratio_gives_first_and_mandatory_pages_never() {
    let setup = Setup::new(shape(), 8, SPARSE);
    let start = setup.start();
    // 3 mandatory pages; the short request can only have 2 and wants no buffering.
    let (long, short) = (start.pipeline.plan(400).unwrap(), start.pipeline.plan(40).unwrap());
    let limits = MemoryLimits {
        gpu_pages: Some(long.gpu_pages() + long.least_gpu_pages() + short.gpu_pages()),
        ..MemoryLimits::default()
    };
    let mut run = Setup { limits, ..setup.clone() }.start();
    let first = run.pipeline.admit(400).unwrap();
    let small = run.pipeline.admit(40).unwrap();
    assert_eq!(buffering(&run, first), long.row.buffering_pages);
    let second = run.pipeline.admit(400).unwrap();
    assert_eq!(run.pipeline.admitted(small).unwrap(), &short);
    let half = long.row.buffering_pages / 2;
    assert_eq!([buffering(&run, first), buffering(&run, second)], [long.row.buffering_pages - half, half]);
    for id in [first, second] {
        assert_eq!(run.pipeline.admitted(id).unwrap().row.mandatory_pages, long.row.mandatory_pages);
    }
}

/// Slots that transfers pin cannot go; shrinking waits for them.
#[test]
fn a_cache_full_of_pins_shrinks_once_the_transfers_are_complete() {
    let setup = Setup::new(shape(), 1, SPARSE);
    let sequence = sequence(300, 1);
    let expected = alone(&setup, &sequence, 100).1;
    let plan = setup.start().pipeline.plan(300).unwrap();
    let limits = MemoryLimits { gpu_pages: Some(plan.gpu_pages()), ..MemoryLimits::default() };
    let mut run = late(&Setup { limits, ..setup }, 2);
    let first = run.start(&sequence, 100);
    // Each page is full at once, and nobody completes its transfer: what leaves the window stays pinned.
    assert_eq!(run.generate(first, 100), expected[..100]);
    let under_way = run.pipeline.backend().transfers().under_way().iter();
    let pages: usize = under_way.map(|transfer| transfer.len()).sum();
    let second = run.pipeline.admit(300).unwrap();
    let slots = run.pipeline.admitted(first).unwrap().row.slots();
    assert!(pages > plan.rows * (plan.row.steady_pages + slots), "{pages} pages are under way");
    assert!(slots < plan.row.slots() && buffering(&run, second) > 0);
    run.pipeline.backend().check_tables();
    assert_eq!(run.generate(first, 100), expected[100..]);
}

/// Selects one chunk a step, as the script says.
#[derive(Debug, Default)]
struct Scripted(AtomicU32);

impl Method for Scripted {
    fn name(&self) -> &str {
        "scripted"
    }
    fn partition(&self) -> PartitionKind {
        PartitionKind::Chunk { tokens: 8 }
    }
    fn index(&self) -> Index<'_> {
        Index::Nothing
    }
    fn select(&self) -> Select<'_> {
        Select::Custom { picker: self, budget: Budget::Tokens(16) }
    }
    fn steady(&self) -> SteadyZone {
        STEADY
    }
}

impl Pick for Scripted {
    fn pick(&self, _: &Candidates<'_>, ids: &mut Vec<u32>) {
        ids.push(self.0.load(Ordering::Relaxed));
    }
}

/// A clock that stood still made every page look equally old.
#[test]
fn the_page_unused_for_longest_leaves() {
    let script = Arc::new(Scripted::default());
    script.0.store(1, Ordering::Relaxed);
    // 2 mandatory slots and 1 of buffering.
    let setup = Setup { method: script.clone(), buffering: 0.5, ..Setup::new(shape(), 8, SPARSE) };
    let mut run = setup.start();
    let id = run.start(&sequence(120, 1), 100);
    // 2 and 3 fill the cache, 1 is used again, so 4 takes the place of 2, and 2 that of 3.
    for (chunk, hit) in [(2, false), (3, false), (1, true), (4, false), (1, true), (2, false), (4, true)] {
        script.0.store(chunk, Ordering::Relaxed);
        let before = run.pipeline.counters().hits;
        run.step(&[id]).unwrap();
        assert_eq!(run.pipeline.counters().hits > before, hit, "chunk {chunk}");
    }
}

/// The path that a full host takes ran for the first time after days (vLLM 54914).
#[test]
fn a_host_that_is_full_refuses_and_goes_on() {
    let setup = Setup::new(shape(), 8, SPARSE);
    let start = setup.start();
    let host_bytes = start.pipeline.plan(200).unwrap().limits(start.pipeline.config()).host_bytes;
    let limits = MemoryLimits { host_bytes: host_bytes.map(|bytes| 2 * bytes), ..MemoryLimits::default() };
    let setup = Setup { limits, ..setup };
    let mut run = late(&setup, 1);
    let expected = alone(&setup, &sequence(200, 1), 150).1;
    let ids = [run.start(&sequence(200, 1), 150), run.start(&sequence(200, 1), 150)];
    for expected in &expected {
        assert!(matches!(run.admit(&sequence(200, 2)), Err(Error::OutOfHostMemory { .. })));
        assert_eq!(run.step(&ids).unwrap(), [expected.clone(), expected.clone()]);
    }
    run.pipeline.release(ids[0]);
    // While transfers of the ended request still hold slabs.
    let id = run.start(&sequence(200, 1), 150);
    assert_eq!(run.generate(id, 50), expected);
}

/// A container without any budget for pinned memory ran at a fraction of a token a second (sglang 21880).
#[test]
fn a_host_without_memory_is_refused_by_name() {
    for host_bytes in [0, 1000] {
        let limits = MemoryLimits { host_bytes: Some(host_bytes), ..MemoryLimits::default() };
        let mut run = Setup { limits, ..Setup::new(shape(), 8, SPARSE) }.start();
        let refused = run.pipeline.admit(100).unwrap_err();
        assert!(matches!(refused, Error::OutOfHostMemory { limit, .. } if limit == host_bytes), "{refused}");
        assert_all_returned(&run);
    }
}

/// A request was admitted by its pages, and tables, summaries and the prompt's layers came on top.
#[test]
fn the_gpu_limit_counts_tables_summaries_and_the_prompts_layers() {
    let setup = Setup::new(shape(), 8, SPARSE);
    let start = setup.start();
    let (config, plan) = (start.pipeline.config(), start.pipeline.plan(300).unwrap());
    let whole = footprint(config, &plan, 300, SUMMARY_ELEMENT_BYTES).gpu;
    // K and V of 2 layers, 2 heads, 16 wide, 4 bytes.
    let prompt = 2 * 300 * 2 * 2 * 16 * 4;
    assert_eq!(plan.prompt_bytes(config), prompt);
    let buffering_bytes = (plan.rows * plan.row.buffering_pages * config.layout().page_bytes()) as u64;
    let least = whole.total() - buffering_bytes + prompt;
    let run = |bytes| {
        Setup { limits: MemoryLimits { gpu_bytes: Some(bytes), ..MemoryLimits::default() }, ..setup.clone() }
            .start()
    };
    match run(least - 1).pipeline.admit(300).unwrap_err() {
        Error::OutOfGpuMemory { needed, free, limit, prompt: counted, summaries, .. } => {
            assert_eq!((needed, free, limit), (least, least - 1, least - 1));
            assert_eq!((counted, summaries), (prompt, whole.summaries));
        }
        other => panic!("{other}"),
    }
    let mut tight = run(least);
    let id = tight.start(&sequence(300, 1), 200);
    assert_eq!(buffering(&tight, id), 0);
    // Once the prompt is through, its layers make room for buffering: with the next request that comes or goes.
    tight.step(&[id]).unwrap();
    let refused = tight.pipeline.admit(300);
    assert!(matches!(refused, Err(Error::OutOfGpuMemory { .. })), "{refused:?}");
    let small = tight.pipeline.admit(1).unwrap();
    tight.pipeline.release(small);
    assert!(buffering(&tight, id) > 0);
    assert!(tight.pipeline.usage().gpu.total() <= least);
    let mut roomy = run(whole.total() + prompt);
    let id = roomy.pipeline.admit(300).unwrap();
    assert_eq!(roomy.pipeline.admitted(id).unwrap(), &plan);
}

/// A buffer was sized by tokens, and the last page overran it (aibrix 2231); a prompt shorter than a block broke
/// (SeerAttention 36).
#[test]
fn lengths_around_pages_and_segments_are_right() {
    // Pages of 1 token: a segment's border is token 512, one that leaves the window at 524 or later.
    for (page_tokens, lengths) in
        [(8, vec![1, 7, 8, 9, 15, 16, 17, 24, 25]), (1, vec![519, 520, 521, 527, 528, 529, 536])]
    {
        let setup = Setup::new(shape(), page_tokens, SPARSE);
        for prompt in lengths {
            let sequence = sequence(prompt + 20, 4);
            let mut run = setup.start();
            let id = run.start(&sequence, prompt);
            let whole = alone(&setup, &sequence, prompt).1;
            for expected in whole {
                assert_eq!(run.generate(id, 1)[0], expected);
                run.pipeline.backend().check_tables();
                let tokens = run.pipeline.tokens(id).unwrap();
                let config = run.pipeline.config();
                let plan = run.pipeline.admitted(id).unwrap();
                // Allocated, measured in the tables, and by formula: the same.
                assert_eq!(run.pipeline.usage(), footprint(config, plan, tokens, SUMMARY_ELEMENT_BYTES));
            }
        }
    }
}

/// Whatever is allocated is what the formula says, for several requests and after they have come and gone.
#[test]
fn usage_is_the_sum_of_the_formulas() {
    for setup in setups() {
        let mut run = setup.start();
        let mut live: Vec<RequestId> = Vec::new();
        for (turn, tokens) in [60, 1, 200, 90, 33, 150].into_iter().enumerate() {
            live.push(run.start(&sequence(tokens, 1), tokens / 2));
            if turn % 3 == 2 {
                run.pipeline.release(live.remove(0));
            }
            let config = run.pipeline.config();
            let formulas = live.iter().map(|id| {
                let (plan, tokens) = (run.pipeline.admitted(*id).unwrap(), run.pipeline.tokens(*id).unwrap());
                footprint(config, plan, tokens, SUMMARY_ELEMENT_BYTES)
            });
            assert_eq!(run.pipeline.usage(), formulas.sum());
        }
    }
}

/// An allocation that failed half-way left the first half behind.
#[test]
fn a_refused_step_changes_nothing_and_can_be_tried_again() {
    let setup = Setup::new(shape(), 1, SPARSE);
    let sequences = [sequence(600, 1), sequence(600, 2)];
    let expected = sequences.each_ref().map(|sequence| alone(&setup, sequence, 500).1);
    let mut run = setup.start();
    let ids = sequences.each_ref().map(|sequence| run.start(sequence, 500));
    let mut refused = 0;
    for step in 0..100 {
        for grants in 0..6 {
            let before = run.pipeline.usage();
            run.pipeline.backend().allocator().refuse_after(grants);
            let outcome = run.step_layer(&ids, 0);
            run.pipeline.backend().allocator().refuse_after(u64::MAX);
            match outcome {
                Err(Error::AllocationFailed { .. }) => {
                    refused += 1;
                    assert_eq!(run.pipeline.usage(), before);
                    run.pipeline.backend().check_tables();
                }
                other => {
                    let layers = [other.unwrap(), run.step_layer(&ids, 1).unwrap()];
                    for (index, expected) in expected.iter().enumerate() {
                        assert_eq!(
                            layers.each_ref().map(|layer| &layer[index]),
                            [&expected[step][0], &expected[step][1]]
                        );
                    }
                    break;
                }
            }
        }
    }
    // A block of summaries and a segment for each of them, and host memory.
    assert!(refused >= 4, "{refused}");
}

/// A handle of an ended request reached another one's pages (aibrix 2231).
#[test]
fn a_stale_request_handle_is_refused() {
    let mut run = Setup::new(shape(), 8, SPARSE).start();
    let old = run.start(&sequence(60, 1), 40);
    run.pipeline.release(old);
    let new = run.start(&sequence(60, 1), 40);
    assert_ne!(old, new);
    assert_eq!(run.step(&[old]), Err(Error::UnknownRequest(old)));
    assert!(run.pipeline.backend().audit(old, 0, 0).is_none());
    assert!(matches!(run.pipeline.admitted(old), Err(Error::UnknownRequest(_))));
}
