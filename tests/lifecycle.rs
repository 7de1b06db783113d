//! Requests come, go, fail and share a machine, and no other request notices.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use spinkv::algorithms::{Dense, ShadowKv, StreamingLlm};
use spinkv::memory::{KvDtype, MemoryLimits, MemoryUsage, PageLayout, SLAB_PAGES};
use spinkv::partition::PartitionKind;
use spinkv::pipeline::{Budget, Candidates, Index, MAX_TOKENS, Method, Pick, RequestId, Select, SteadyZone};
use spinkv::{Error, KvConfig, KvShape};
use spinkv_tests::{Layers, Run, Sequence, Setup, Style, close};

/// Small enough that prompts of some dozens of tokens select and evict.
const STEADY: SteadyZone = SteadyZone { sinks: 4, window: 12 };
const SPARSE: ShadowKv = ShadowKv { budget: Budget::Tokens(24), steady: STEADY };

fn shape() -> KvShape {
    KvShape::new(2, 4, 2, 16).unwrap()
}

fn sequence(tokens: usize, seed: u64) -> Sequence {
    Sequence::new(shape(), Style::Random, tokens, seed)
}

fn setups() -> Vec<Setup> {
    vec![
        Setup::new(shape(), 8, SPARSE),
        Setup::new(shape(), 2, SPARSE),
        Setup::new(shape(), 16, Dense { steady: STEADY }),
        Setup::new(shape(), 4, StreamingLlm { steady: STEADY }),
    ]
}

/// What a request gives when it has the machine to itself: the prompt's outputs and those of all steps.
fn alone(setup: &Setup, sequence: &Sequence, prompt: usize) -> (Layers, Vec<Layers>) {
    let mut run = Setup { limits: MemoryLimits::default(), ..setup.clone() }.start();
    let id = run.admit(sequence).unwrap();
    let outputs = run.prompt(id, prompt, prompt).unwrap();
    (outputs, run.generate(id, sequence.tokens - prompt))
}

fn assert_all_returned(run: &Run) {
    assert_eq!(run.pipeline.usage(), MemoryUsage::default(), "a released request left something behind");
}

#[test]
fn a_ragged_batch_gives_each_request_what_it_gets_alone() {
    for setup in setups() {
        let requests = [(1, 1), (17, 2), (64, 3), (90, 4), (131, 5)]
            .map(|(prompt, seed)| (sequence(prompt + 40, seed), prompt));
        let mut run = setup.start();
        let mut live: Vec<(RequestId, Vec<Layers>)> = Vec::new();
        let mut batch = Vec::new();
        let mut steps = vec![0; requests.len()];
        for round in 0..60 {
            // One more request every four rounds, and the order changes all the time.
            if round % 4 == 0 && live.len() < requests.len() {
                let (sequence, prompt) = &requests[live.len()];
                let (prompt_out, out) = alone(&setup, sequence, *prompt);
                let id = run.admit(sequence).unwrap();
                assert_eq!(run.prompt(id, *prompt, *prompt).unwrap(), prompt_out);
                live.push((id, out));
            }
            batch.clear();
            batch.extend((0..live.len()).filter(|index| steps[*index] < 40 && (index + round) % 5 != 0));
            batch.reverse();
            let rotate = round % batch.len().max(1);
            batch.rotate_left(rotate);
            let ids: Vec<_> = batch.iter().map(|index| live[*index].0).collect();
            for (index, output) in batch.iter().zip(run.step(&ids).unwrap()) {
                assert_eq!(output, live[*index].1[steps[*index]], "request {index}, step {}", steps[*index]);
                steps[*index] += 1;
            }
        }
        assert!(steps.iter().all(|steps| *steps >= 30), "{steps:?}");
        live.iter().for_each(|(id, _)| run.pipeline.release(*id));
        assert_all_returned(&run);
    }
}

#[test]
fn a_request_cancelled_anywhere_leaves_the_others_as_they_were() {
    for setup in setups() {
        let kept = [sequence(70, 1), sequence(100, 2)];
        let expected = kept.each_ref().map(|sequence| alone(&setup, sequence, 40).1);
        let mut run = setup.start();
        let ids = kept.each_ref().map(|sequence| run.start(sequence, 40));
        let check = |run: &mut Run, steps: std::ops::Range<usize>| {
            for step in steps {
                for (index, output) in run.step(&ids).unwrap().into_iter().enumerate() {
                    assert_eq!(output, expected[index][step], "request {index}, step {step}");
                }
            }
        };

        // Before its first token, within a prompt's layer, between a prompt's layers.
        let other = sequence(120, 3);
        let id = run.admit(&other).unwrap();
        run.pipeline.release(id);
        let id = run.admit(&other).unwrap();
        let all = 0..100;
        let (keys, values) = (other.keys(0, all.clone()), other.values(0, all));
        let mut prefill = run.pipeline.prefill(id, 0, 100, keys, values).unwrap();
        let mut out = vec![0.0; other.queries(0, 0..30).len()];
        prefill.attend(30, other.queries(0, 0..30), &mut out).unwrap();
        run.pipeline.release(id);
        check(&mut run, 0..5);
        let id = run.admit(&other).unwrap();
        run.prompt_layer(id, 0, 100, 100).unwrap();
        check(&mut run, 5..10);
        run.pipeline.release(id);

        // Between steps, and between the layers of a step that it shares.
        let id = run.start(&other, 60);
        run.step(&[id]).unwrap();
        check(&mut run, 10..15);
        run.pipeline.release(id);
        let id = run.start(&other, 60);
        run.step_layer(&[ids[1], id], 0).unwrap();
        run.pipeline.release(id);
        let last = run.step_layer(&[ids[1]], 1).unwrap().remove(0);
        assert_eq!(last, expected[1][15][1]);
        run.step(&[ids[0]]).unwrap();
        check(&mut run, 16..30);

        assert!(matches!(run.step(&[id]), Err(Error::UnknownRequest(unknown)) if unknown == id));
        run.pipeline.release(id); // Twice is ignored.
        ids.iter().for_each(|id| run.pipeline.release(*id));
        assert_all_returned(&run);
    }
}

/// Memory of freed requests is used again by others; what they left in it must not show.
#[test]
fn a_long_traffic_of_requests_never_leaks_and_never_changes_a_result() {
    for setup in setups() {
        let sequences: Vec<_> = (0..6).map(|seed| sequence(30 + 20 * seed as usize, seed)).collect();
        let expected: Vec<_> = sequences.iter().map(|sequence| alone(&setup, sequence, 20)).collect();
        let most = setup.start().pipeline.plan(130).unwrap();
        let layout = PageLayout::new(setup.page_tokens, 16, setup.dtype).unwrap();
        let one = most.limits(&layout);
        // Room for the two longest: nothing may leak in 24 requests.
        let limits = MemoryLimits {
            gpu_pages: one.gpu_pages.map(|pages| 2 * pages),
            host_bytes: one.host_bytes.map(|bytes| 2 * bytes),
        };
        let mut run = Setup { limits, ..setup.clone() }.start();
        let mut previous: Option<RequestId> = None;
        for index in (0..24).map(|turn| turn * 5 % 6) {
            let id = run.admit(&sequences[index]).unwrap();
            assert_eq!(run.prompt(id, 20, 20).unwrap(), expected[index].0);
            let half = expected[index].1.len() / 2;
            assert_eq!(run.generate(id, half), expected[index].1[..half], "request {index}");
            if let Some(previous) = previous.replace(id) {
                run.pipeline.release(previous);
            }
            assert_eq!(run.generate(id, half), expected[index].1[half..2 * half], "request {index}");
        }
        run.pipeline.release(previous.unwrap());
        assert_all_returned(&run);
    }
}

#[test]
fn admission_beyond_the_gpu_pages_is_refused_and_costs_nobody_anything() {
    let setup = Setup::new(shape(), 8, SPARSE);
    let wanted = setup.start().pipeline.plan(200).unwrap();
    let least = wanted.rows * (wanted.row.steady_pages + wanted.row.mandatory_pages);
    assert!(least < wanted.gpu_pages());
    // The second request gets the pages that the first one leaves: one page of buffering a row.
    let total = wanted.gpu_pages() + least + wanted.rows + 3;
    let limits = MemoryLimits { gpu_pages: Some(total), host_bytes: None };
    let mut run = Setup { limits, ..setup.clone() }.start();
    let sequences = [sequence(200, 1), sequence(200, 2), sequence(200, 3)];
    let expected = sequences.each_ref().map(|sequence| alone(&setup, sequence, 150).1);
    let first = run.start(&sequences[0], 150);
    let second = run.start(&sequences[1], 150);
    assert_eq!(run.pipeline.admitted(first).unwrap(), &wanted);
    assert_eq!(run.pipeline.admitted(second).unwrap().row.buffering_pages, 1);

    let before = run.pipeline.usage();
    let error = run.admit(&sequences[2]).unwrap_err();
    let expected_error = Error::OutOfGpuPages {
        max_tokens: 200,
        needed: least,
        rows: 4,
        // 8 tokens of sinks; a tail of 12 to 19.
        steady: 1 + 3,
        mandatory: 3,
        free: 3,
        total,
    };
    assert_eq!(error, expected_error);
    assert_eq!(run.pipeline.usage(), before);
    let expected = |index: usize, step: usize| expected[index][step].clone();
    for step in 0..25 {
        let outputs = run.step(&[second, first]).unwrap();
        assert_eq!(outputs, [expected(1, step), expected(0, step)], "step {step}");
    }
    run.pipeline.release(first);
    let third = run.start(&sequences[2], 150);
    for step in 25..50 {
        let outputs = run.step(&[second, third]).unwrap();
        assert_eq!(outputs, [expected(1, step), expected(2, step - 25)], "step {step}");
    }
    run.pipeline.release(second);
    run.pipeline.release(third);
    assert_all_returned(&run);
}

#[test]
fn admission_beyond_the_host_memory_is_refused_and_costs_nobody_anything() {
    let setup = Setup::new(shape(), 1, SPARSE);
    // 200 pages of one token for each of 4 rows.
    let layout = PageLayout::new(1, 16, KvDtype::F32).unwrap();
    let slab = (SLAB_PAGES * layout.page_bytes()) as u64;
    let slabs = 4 * 200u64.div_ceil(SLAB_PAGES as u64);
    let limit = 2 * slabs * slab + slab / 2;
    let limits = MemoryLimits { gpu_pages: None, host_bytes: Some(limit) };
    let mut run = Setup { limits, ..setup.clone() }.start();
    let sequences = [sequence(200, 1), sequence(200, 2), sequence(200, 3)];
    let expected = sequences.each_ref().map(|sequence| alone(&setup, sequence, 100).1);
    let first = run.start(&sequences[0], 100);
    let second = run.start(&sequences[1], 100);
    let before = run.pipeline.usage();
    match run.admit(&sequences[2]).unwrap_err() {
        Error::OutOfHostMemory { needed, free, limit: reported, .. } => {
            assert_eq!((needed, free, reported), (slabs * slab, slab / 2, limit));
        }
        other => panic!("{other}"),
    }
    assert_eq!(run.pipeline.usage(), before);
    for (step, (of_first, of_second)) in expected[0].iter().zip(&expected[1]).enumerate() {
        let outputs = run.step(&[first, second]).unwrap();
        assert_eq!([&outputs[0], &outputs[1]], [of_first, of_second], "step {step}");
    }
    assert_eq!(run.pipeline.usage().host_pages_bytes, 2 * slabs * slab);
    run.pipeline.release(second);
    let third = run.start(&sequences[2], 100);
    assert_eq!(run.generate(third, 100), expected[2]);
    run.pipeline.release(first);
    run.pipeline.release(third);
    assert_all_returned(&run);
}

#[test]
fn a_request_fits_exactly_under_the_limits_of_its_plan() {
    for setup in setups() {
        let sequence = sequence(150, 1);
        let plan = setup.start().pipeline.plan(150).unwrap();
        let layout = PageLayout::new(setup.page_tokens, 16, setup.dtype).unwrap();
        let limits = plan.limits(&layout);
        let mut run = Setup { limits, ..setup.clone() }.start();
        let id = run.admit(&sequence).unwrap();
        assert_eq!(run.pipeline.admitted(id).unwrap(), &plan);
        assert_eq!(run.prompt(id, 100, 100).unwrap(), alone(&setup, &sequence, 100).0);
        assert_eq!(run.generate(id, 50), alone(&setup, &sequence, 100).1);
        assert_eq!(run.pipeline.usage().gpu_pages_bytes, (plan.gpu_pages() * layout.page_bytes()) as u64);
        assert!(run.pipeline.usage().host_pages_bytes <= limits.host_bytes.unwrap());
        let fewer = MemoryLimits { gpu_pages: Some(plan.rows * plan.row.steady_pages), ..limits };
        if plan.row.mandatory_pages > 0 {
            let error = Setup { limits: fewer, ..setup.clone() }.start().admit(&sequence).unwrap_err();
            assert!(matches!(error, Error::OutOfGpuPages { .. }), "{error}");
        }
        let less = MemoryLimits { host_bytes: limits.host_bytes.map(|bytes| bytes - 1), ..limits };
        let error = Setup { limits: less, ..setup.clone() }.start().admit(&sequence).unwrap_err();
        assert!(matches!(error, Error::OutOfHostMemory { .. }), "{error}");
    }
}

/// Room for one request on the GPU and for two on the host: what a refusal left reserved there would show as
/// another error the next time.
#[test]
fn a_refused_admission_leaves_nothing_reserved_on_the_other_tier() {
    for setup in setups() {
        let layout = PageLayout::new(setup.page_tokens, 16, setup.dtype).unwrap();
        let one = setup.start().pipeline.plan(150).unwrap().limits(&layout);
        let two = |bytes| 2 * bytes;
        let limits = MemoryLimits { host_bytes: one.host_bytes.map(two), ..one };
        let mut run = Setup { limits, ..setup.clone() }.start();
        let first = run.pipeline.admit(150).unwrap();
        let empty = run.pipeline.usage();
        for _ in 0..5 {
            let error = run.pipeline.admit(150).unwrap_err();
            assert!(matches!(error, Error::OutOfGpuPages { .. }), "{error}");
            assert_eq!(run.pipeline.usage(), empty);
        }
        run.pipeline.release(first);
        let again = run.pipeline.admit(150).unwrap();
        run.pipeline.release(again);
        assert_all_returned(&run);
    }
}

#[test]
fn a_request_too_long_for_any_machine_is_a_typed_error() {
    for setup in setups() {
        for tokens in [1 << 50, usize::MAX / 2, usize::MAX] {
            let limits = MemoryLimits { gpu_pages: Some(1000), host_bytes: Some(1 << 30) };
            let mut run = Setup { limits, ..setup.clone() }.start();
            let error = run.pipeline.admit(tokens).unwrap_err();
            assert_eq!(error, Error::ContextTooLong { max_tokens: tokens, limit: MAX_TOKENS });
            assert_all_returned(&run);
        }
    }
}

/// Everything that a wrong call could have changed.
fn state(run: &Run, ids: &[RequestId]) -> String {
    let rows: Vec<_> = ids.iter().map(|id| (run.pipeline.tokens(*id), run.selected(*id))).collect();
    format!("{:?}, {:?}, {rows:?}", run.pipeline.usage(), run.pipeline.counters())
}

#[test]
fn a_wrong_decode_call_is_named_and_the_next_right_one_gives_the_right_result() {
    let setup = Setup::new(shape(), 8, SPARSE);
    let sequences = [sequence(70, 1), sequence(82, 2)];
    let expected = sequences.each_ref().map(|sequence| alone(&setup, sequence, 60).1);
    let mut run = setup.start();
    let [a, b] = sequences.each_ref().map(|sequence| run.start(sequence, 60));
    let gone = run.start(&sequences[0], 5);
    run.pipeline.release(gone);
    let never = RequestId(77);
    let length = |what, expected, found| Error::TensorLength { what, expected, found };
    let order = |request, expected, found| Error::LayerOrder { request, expected, found };
    // Layer, batch, lengths of queries, keys, values and outputs.
    let calls: [(usize, &[RequestId], [usize; 4], Error); 12] = [
        (0, &[a, b, a], [192, 96, 96, 192], Error::DuplicateRequest(a)),
        (0, &[a, gone], [128, 64, 64, 128], Error::UnknownRequest(gone)),
        (0, &[never, a], [128, 64, 64, 128], Error::UnknownRequest(never)),
        (1, &[a, b], [128, 64, 64, 128], order(a, 0, 1)),
        (2, &[b], [64, 32, 32, 64], order(b, 0, 2)),
        (usize::MAX, &[b], [64, 32, 32, 64], order(b, 0, usize::MAX)),
        (0, &[a, b], [127, 64, 64, 128], length("queries", 128, 127)),
        (0, &[a, b], [64, 64, 64, 128], length("queries", 128, 64)),
        (0, &[a, b], [128, 65, 64, 128], length("keys", 64, 65)),
        (0, &[a, b], [128, 64, 0, 128], length("values", 64, 0)),
        (0, &[a, b], [128, 64, 64, 256], length("outputs", 128, 256)),
        (0, &[a], [128, 64, 64, 128], length("queries", 64, 128)),
    ];
    for step in 0..10 {
        for (layer, batch, lengths, error) in &calls {
            let before = state(&run, &[a, b]);
            let [queries, keys, values, out] = lengths.map(|length| vec![0.5; length]);
            let mut out = out;
            let found = run.pipeline.decode(*layer, batch, &queries, &keys, &values, &mut out);
            assert_eq!(found.as_ref(), Err(error));
            assert_eq!(state(&run, &[a, b]), before, "{error}");
            assert!(out.iter().all(|element| *element == 0.5), "{error}: outputs were written");
        }
        let first = run.step_layer(&[a, b], 0).unwrap();
        let again = run.step_layer(&[b, a], 0).unwrap_err();
        assert_eq!(again, order(b, 1, 0));
        let second = run.step_layer(&[a, b], 1).unwrap();
        for (index, expected) in expected.iter().enumerate() {
            assert_eq!([&first[index], &second[index]], [&expected[step][0], &expected[step][1]], "{step}");
        }
    }
    // `a` is at its limit, `b` has 12 tokens to go.
    let before = state(&run, &[a, b]);
    let zeros = [vec![0.0; 128], vec![0.0; 64], vec![0.0; 64]];
    let found = run.pipeline.decode(0, &[b, a], &zeros[0], &zeros[1], &zeros[2], &mut vec![0.0; 128]);
    assert_eq!(found, Err(Error::ContextFull { request: a, tokens: 1, held: 70, limit: 70 }));
    assert_eq!(state(&run, &[a, b]), before);
    assert_eq!(run.generate(b, 12), expected[1][10..]);
}

#[test]
fn a_wrong_prompt_call_is_named_and_the_next_right_one_gives_the_right_result() {
    let setup = Setup::new(shape(), 4, SPARSE);
    let sequence = sequence(80, 1);
    let (expected_prompt, expected) = alone(&setup, &sequence, 60);
    let mut run = setup.start();
    assert_eq!(run.pipeline.admit(0), Err(Error::EmptyRequest));
    let id = run.admit(&sequence).unwrap();
    let unknown = RequestId(id.0 + 1);
    let length = |what, expected, found| Error::TensorLength { what, expected, found };
    let calls = [
        (unknown, 0, 60, [1920, 1920], Error::UnknownRequest(unknown)),
        (id, 1, 60, [1920, 1920], Error::LayerOrder { request: id, expected: 0, found: 1 }),
        (id, 0, 0, [0, 0], Error::EmptyRequest),
        (id, 0, 81, [2592, 2592], Error::ContextFull { request: id, tokens: 81, held: 0, limit: 80 }),
        (id, 0, 60, [1919, 1920], length("keys", 1920, 1919)),
        (id, 0, 60, [1920, 3840], length("values", 1920, 3840)),
    ];
    let mut outputs = Vec::new();
    for layer in 0..2 {
        for (request, wrong_layer, tokens, lengths, error) in &calls {
            // In layer 1, what was wrong about the layer is the other way round.
            let error = match error {
                Error::LayerOrder { request, .. } if layer == 1 => {
                    Error::LayerOrder { request: *request, expected: 1, found: 0 }
                }
                other => other.clone(),
            };
            let given = if layer == 0 { *wrong_layer } else { 1 - *wrong_layer };
            let [keys, values] = lengths.map(|length| vec![0.5; length]);
            let before = state(&run, &[id]);
            let found = run.pipeline.prefill(*request, given, *tokens, &keys, &values).map(|_| ());
            assert_eq!(found, Err(error));
            assert_eq!(state(&run, &[id]), before);
        }

        // Wrong queries within a right call; then it is dropped, and begun anew.
        let (keys, values) = (sequence.keys(layer, 0..60), sequence.values(layer, 0..60));
        let before = state(&run, &[id]);
        let mut prefill = run.pipeline.prefill(id, layer, 60, keys, values).unwrap();
        let queries = sequence.queries(layer, 0..61);
        let mut out = vec![0.0; queries.len()];
        let length = |what, found: usize| Error::TensorLength { what, expected: 60 * 64, found: found * 64 };
        for (tokens, queries_given, out_given, expected) in [
            (61, 61, 61, Error::PromptQueries { request: id, found: 61, left: 60 }),
            (60, 61, 60, length("queries", 61)),
            (60, 60, 59, length("outputs", 59)),
        ] {
            let out = &mut out[..out_given * 64];
            let error = prefill.attend(tokens, &queries[..queries_given * 64], out).unwrap_err();
            assert_eq!(error, expected);
            assert!(out.iter().all(|element| *element == 0.0), "{error}: outputs were written");
        }
        prefill.attend(59, &queries[..59 * 64], &mut out[..59 * 64]).unwrap();
        let error = prefill.attend(2, &queries[..2 * 64], &mut out[..2 * 64]).unwrap_err();
        assert_eq!(error, Error::PromptQueries { request: id, found: 2, left: 1 });
        assert_eq!(state(&run, &[id]), before, "a prompt that was dropped before its last query");
        outputs.push(run.prompt_layer(id, layer, 60, 60).unwrap());
    }
    assert_eq!(outputs, expected_prompt);
    let before = state(&run, &[id]);
    let error = run.prompt(id, 3, 3).unwrap_err();
    assert_eq!(error, Error::PrefillNotEmpty { request: id, held: 60 });
    assert_eq!(state(&run, &[id]), before);
    assert_eq!(run.generate(id, 20), expected);
}

/// All layers of a request hold the same tokens, so a prompt's layers must be given the same number of them.
#[test]
fn a_prompt_whose_layers_differ_in_length_is_refused() {
    for tokens in [59, 61] {
        let mut run = Setup::new(shape(), 8, SPARSE).start();
        let id = run.admit(&sequence(80, 1)).unwrap();
        run.prompt_layer(id, 0, 60, 60).unwrap();
        let refused = run.prompt_layer(id, 1, tokens, tokens);
        assert!(matches!(refused, Err(Error::StepMismatch { .. })), "layer 1, {tokens} tokens: {refused:?}");
        run.prompt_layer(id, 1, 60, 60).unwrap();
    }
}

#[test]
fn a_decode_step_in_the_middle_of_a_prompt_is_refused() {
    let mut run = Setup::new(shape(), 8, SPARSE).start();
    let id = run.admit(&sequence(80, 1)).unwrap();
    run.prompt_layer(id, 0, 60, 60).unwrap();
    let refused = run.step_layer(&[id], 1);
    assert!(matches!(refused, Err(Error::StepMismatch { .. })), "{refused:?}");
    run.prompt_layer(id, 1, 60, 60).unwrap();
}

#[test]
fn a_prompt_in_the_middle_of_a_decode_step_is_refused() {
    let mut run = Setup::new(shape(), 8, SPARSE).start();
    let id = run.admit(&sequence(80, 1)).unwrap();
    run.step_layer(&[id], 0).unwrap();
    let refused = run.prompt_layer(id, 1, 60, 60);
    assert!(matches!(refused, Err(Error::StepMismatch { .. })), "{refused:?}");
    run.step_layer(&[id], 1).unwrap();
}

#[test]
fn parts_that_do_not_belong_together_are_refused() {
    let method = Arc::new(SPARSE);
    let layout = PageLayout::new(8, 32, KvDtype::F32).unwrap();
    let refused = KvConfig::new(shape(), layout, method).unwrap_err();
    let reason = "pages for head_dim 32 under a shape of head_dim 16".to_owned();
    assert_eq!(refused, Error::InvalidLayout { reason });
}

/// Picks the first candidates, or what no backend may accept.
#[derive(Debug, Default)]
struct Faulty(AtomicU8);

const SOUND: u8 = 0;

impl Method for Faulty {
    fn name(&self) -> &str {
        "faulty"
    }
    fn partition(&self) -> PartitionKind {
        PartitionKind::Chunk { tokens: 8 }
    }
    fn index(&self) -> Index<'_> {
        Index::Nothing
    }
    fn select(&self) -> Select<'_> {
        Select::Custom { picker: self, budget: Budget::Tokens(24) }
    }
    fn steady(&self) -> SteadyZone {
        STEADY
    }
}

impl Pick for Faulty {
    fn pick(&self, candidates: &Candidates<'_>, ids: &mut Vec<u32>) {
        let all = candidates.ids();
        match self.0.load(Ordering::Relaxed) {
            SOUND => ids.extend(all.take(candidates.limit)),
            1 => ids.push(all.end),
            2 => ids.push(all.start - 1),
            3 => ids.extend([all.start + 1, all.start]),
            4 => ids.extend([all.start, all.start]),
            _ => ids.extend(all.take(candidates.limit + 1)),
        }
    }
}

#[test]
fn a_method_that_picks_what_it_may_not_fails_its_batch_and_no_other_request() {
    for fault in 1..=5 {
        let method = Arc::new(Faulty::default());
        let setup = Setup { method: method.clone(), ..Setup::new(shape(), 4, SPARSE) };
        let sequences = [sequence(100, 1), sequence(90, 2), sequence(80, 3), sequence(70, 4)];
        let (_, expected) = alone(&setup, &sequences[2], 50);
        let mut run = setup.start();
        // With 60 tokens there are 5 candidates, with 50 as many as the budget allows: 3.
        let [a, b, c] =
            [(0, 60), (1, 60), (2, 50)].map(|(index, prompt)| run.start(&sequences[index], prompt));
        let mut found = run.generate(c, 10);

        method.0.store(fault, Ordering::Relaxed);
        let error = run.step(&[a, b]).expect_err("an invalid selection");
        match &error {
            Error::InvalidSelection { method, .. } => assert_eq!(method, "faulty"),
            other => panic!("{other}"),
        }
        let d = run.admit(&sequences[3]).unwrap();
        let error = run.prompt(d, 60, 60).expect_err("an invalid selection");
        assert!(matches!(error, Error::InvalidSelection { .. }), "{error}");

        method.0.store(SOUND, Ordering::Relaxed);
        for failed in [a, b, d] {
            assert_eq!(run.step(&[c, failed]), Err(Error::RequestFailed(failed)));
            assert_eq!(run.prompt(failed, 10, 10), Err(Error::RequestFailed(failed)));
        }
        found.extend(run.generate(c, 10));
        [a, b, d].iter().for_each(|failed| run.pipeline.release(*failed));
        found.extend(run.generate(c, 10));
        assert_eq!(found, expected, "fault {fault}");
        run.pipeline.release(c);
        assert_all_returned(&run);
    }
}

#[test]
fn the_size_of_the_cache_changes_no_result_and_no_page_is_ever_stale() {
    let scattered = ShadowKv { budget: Budget::Tokens(32), ..SPARSE };
    let growing = ShadowKv { budget: Budget::Fraction(0.15), ..SPARSE };
    for (page_tokens, method, dtype) in
        [(8, scattered, KvDtype::F32), (2, growing, KvDtype::F32), (4, scattered, KvDtype::Bf16)]
    {
        let sequence = sequence(400, 9);
        let mut first: Option<Vec<Layers>> = None;
        let mut misses = Vec::new();
        for buffering in [1e9, 5.0, 0.5, 0.0] {
            let setup = Setup { buffering, dtype, ..Setup::new(shape(), page_tokens, method) };
            let mut run = setup.start();
            let id = run.start(&sequence, 150);
            let mut outputs = Vec::new();
            for _ in 0..250 {
                outputs.extend(run.generate(id, 1));
                assert!(run.audit(id) > 0);
            }
            assert!(outputs == *first.get_or_insert_with(|| outputs.clone()), "buffering {buffering}");
            misses.push(run.pipeline.counters().misses);
        }
        assert!(misses[0] < misses[2] && misses[2] < misses[3], "all caches worked alike: {misses:?}");
    }
}

#[test]
fn buffering_that_is_no_amount_is_refused() {
    for buffering in [-1.0, f64::NAN, f64::NEG_INFINITY] {
        let mut run = Setup { buffering, ..Setup::new(shape(), 8, SPARSE) }.start();
        let error = run.admit(&sequence(80, 1)).unwrap_err();
        assert!(matches!(error, Error::InvalidBuffering { .. }), "{error}");
    }
}

/// The warm start, the steps and the pages that moved must add up, for every row.
#[test]
fn counters_add_up() {
    for page_tokens in [1, 8] {
        for buffering in [0.0, 1.0] {
            let setup = Setup { buffering, ..Setup::new(shape(), page_tokens, SPARSE) };
            let mut run = setup.start();
            let sequence = sequence(200, 4);
            let id = run.start(&sequence, 100);
            let pages = |run: &Run| {
                let partitions: usize = run.selected(id).iter().map(Vec::len).sum();
                (partitions * 8 / page_tokens) as u64
            };
            let warm = run.pipeline.counters();
            assert_eq!((warm.hits, warm.misses, warm.warm_pages), (0, 0, pages(&run)));
            let mut selected = 0;
            for _ in 100..200 {
                run.step(&[id]).unwrap();
                selected += pages(&run);
            }
            let counters = run.pipeline.counters();
            assert_eq!(counters.hits + counters.misses, selected);
            assert!(counters.hits > 0 && counters.misses > 0);
            assert_eq!(counters.warm_pages, warm.warm_pages);
            let rows = shape().rows();
            assert_eq!(counters.offloaded_pages, (rows * (200 / page_tokens)) as u64);
            // 100 tokens leave 84 to the chunks behind the window (12), 200 leave 184.
            assert_eq!(counters.adopted_pages, (rows * (184 - 88) / page_tokens) as u64);
            let came = counters.fetched_pages() + counters.adopted_pages;
            assert_eq!(came - counters.evicted_pages, run.audit(id) as u64, "pages came and went");
        }
    }
}

#[test]
fn a_prompt_cut_short_and_decoded_on_selects_the_same() {
    for dtype in [KvDtype::F32, KvDtype::Bf16] {
        for page_tokens in [1, 8] {
            let sequence = sequence(180, 6);
            let setup = Setup { dtype, ..Setup::new(shape(), page_tokens, SPARSE) };
            let mut whole = setup.start();
            let id = whole.admit(&sequence).unwrap();
            let prompt = whole.prompt(id, 150, 150).unwrap();
            let after_prompt = whole.selected(id);
            let mut expected = Vec::new();
            for _ in 150..180 {
                expected.push((whole.generate(id, 1).remove(0), whole.selected(id)));
            }
            for short in [0, 1, 15, 16, 17, 88, 149] {
                let mut run = setup.start();
                let id = run.admit(&sequence).unwrap();
                if short > 0 {
                    let outputs = run.prompt(id, short, short).unwrap();
                    for (layer, output) in outputs.iter().enumerate() {
                        let expected: Vec<_> = prompt[layer].iter().map(|x| f64::from(*x)).collect();
                        close(output, &expected[..output.len()], 1e-5).unwrap();
                    }
                }
                run.generate(id, 150 - short);
                assert_eq!(run.selected(id), after_prompt, "prompt of {short}");
                for (step, (outputs, selected)) in expected.iter().enumerate() {
                    let found = run.generate(id, 1).remove(0);
                    assert_eq!(&run.selected(id), selected, "prompt of {short}, step {step}");
                    for (found, expected) in found.iter().zip(outputs) {
                        let expected: Vec<_> = expected.iter().map(|x| f64::from(*x)).collect();
                        close(found, &expected, 1e-5).unwrap();
                    }
                }
            }
        }
    }
}

/// Queries of a prompt go through in chunks of any size; only its last query selects.
#[test]
fn how_a_prompts_queries_are_cut_changes_neither_selection_nor_steps() {
    let sequence = sequence(120, 7);
    for setup in setups() {
        let mut whole = setup.start();
        let id = whole.start(&sequence, 100);
        let selected = whole.selected(id);
        let expected = whole.generate(id, 20);
        for chunk in [1, 33, 99] {
            let mut run = setup.start();
            let id = run.admit(&sequence).unwrap();
            run.prompt(id, 100, chunk).unwrap();
            assert_eq!(run.selected(id), selected, "chunks of {chunk}");
            assert_eq!(run.generate(id, 20), expected, "chunks of {chunk}");
        }
    }
}

/// To nearest, ties to even, on the bits.
fn bf16_of(value: f32) -> f32 {
    let bits = value.to_bits();
    f32::from_bits((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff_0000)
}

#[test]
fn bf16_pages_are_exact_pages_of_rounded_keys_and_values() {
    for (style, page_tokens) in Style::ALL.into_iter().flat_map(|style| [1, 8].map(|pages| (style, pages))) {
        let sequence = Sequence::new(shape(), style, 200, 8);
        let mut rounded = sequence.clone();
        for layer in 0..2 {
            rounded.keys[layer].iter_mut().for_each(|element| *element = bf16_of(*element));
            rounded.values[layer].iter_mut().for_each(|element| *element = bf16_of(*element));
        }
        let exact = Setup::new(shape(), page_tokens, SPARSE);
        let bf16 = Setup { dtype: KvDtype::Bf16, ..exact.clone() };
        let (prompt, steps) = alone(&exact, &sequence, 100);
        let (bf16_prompt, bf16_steps) = alone(&bf16, &sequence, 100);
        assert_eq!(bf16_prompt, prompt, "prompts attend to unrounded keys and values");
        assert!(bf16_steps != steps, "bf16 pages rounded nothing");
        assert!(bf16_steps == alone(&exact, &rounded, 100).1, "{style:?}, pages of {page_tokens}");
    }
}

#[test]
fn bf16_pages_stay_near_exact_ones() {
    for style in [Style::Random, Style::Uniform] {
        let sequence = Sequence::new(shape(), style, 200, 8);
        let exact = Setup::new(shape(), 8, Dense { steady: STEADY });
        let expected = alone(&exact, &sequence, 100).1;
        let found = alone(&Setup { dtype: KvDtype::Bf16, ..exact }, &sequence, 100).1;
        for (found, expected) in found.iter().flatten().zip(expected.iter().flatten()) {
            let expected: Vec<_> = expected.iter().map(|element| f64::from(*element)).collect();
            close(found, &expected, 2e-2).unwrap_or_else(|off| panic!("{style:?}: {off}"));
        }
    }
}

#[test]
fn request_ids_are_never_used_twice() {
    let mut run = Setup::new(shape(), 8, SPARSE).start();
    let mut seen = Vec::new();
    for _ in 0..5 {
        let id = run.pipeline.admit(10).unwrap();
        assert!(!seen.contains(&id));
        seen.push(id);
        run.pipeline.release(id);
    }
    assert_all_returned(&run);
}
