//! Wrong calls and wrong methods are named, and change nothing that others see.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use spinkv::memory::{KvDtype, PageLayout};
use spinkv::partition::PartitionKind;
use spinkv::pipeline::{Budget, Candidates, Index, Method, Pick, RequestId, Select, SteadyZone};
use spinkv::{Error, KvConfig};
use spinkv_tests::small::{SPARSE, STEADY, alone, assert_all_returned, sequence, shape};
use spinkv_tests::{Run, Setup};

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
