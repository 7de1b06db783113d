//! The pipeline's outputs against attention by its definition.

use std::sync::Arc;

use spinkv::KvShape;
use spinkv::algorithms::{Dense, Quest, RetroInfer, ShadowKv, StreamingLlm, TokenTopK};
use spinkv::partition::PartitionMap;
use spinkv::pipeline::{Budget, KeyStore, Method, SteadyZone};
use spinkv_tests::small::low_rank;
use spinkv_tests::{Sequence, Setup, Style, close, dense_reference};

const TOLERANCE: f64 = 1e-5;

/// With rebuilt keys: a basis, coefficients and two rotations in f32 leave a key within some 1e-6 of what it was, which logits of some dozens
/// (of peaked queries) multiply.
const REBUILT: f64 = 5e-5;

/// Around the borders of pages, of chunks (8 and 16), of the window (64) and of sinks, window and chunk together (80 and 96).
const LENGTHS: [usize; 20] = [0, 1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 71, 72, 73, 79, 80, 81, 95, 96, 97];

/// The methods that select by a budget. Another one joins these tests with a line.
fn selecting(budget: Budget) -> Vec<Arc<dyn Method>> {
    let steady = SteadyZone::default();
    vec![
        Arc::new(ShadowKv { budget, steady, outliers: 0 }),
        Arc::new(ShadowKv { budget, steady, outliers: 2 }),
        Arc::new(RetroInfer { update: 128, ..RetroInfer::new(budget, steady) }),
        Arc::new(Quest::new(budget, steady)),
        Arc::new(TokenTopK { budget, steady }),
    ]
}

/// One setup for each way to select everything, with each page size that suits.
fn full_setups(shape: KvShape) -> Vec<(String, Setup)> {
    let mut methods: Vec<Arc<dyn Method>> = vec![Arc::new(Dense::default())];
    methods.extend([Budget::Tokens(4096), Budget::Fraction(1.0)].into_iter().flat_map(selecting));
    // At full rank a basis loses nothing, whatever it was made of.
    let shadowkv = ShadowKv { budget: Budget::Tokens(4096), steady: SteadyZone::default(), outliers: 0 };
    methods.push(Arc::new(low_rank(shadowkv, shape.kv_heads * shape.head_dim, shape.head_dim)));
    let mut setups = Vec::new();
    for (method, page_tokens) in
        methods.iter().flat_map(|method| [1, 2, 4, 8, 16].map(|page_tokens| (method, page_tokens)))
    {
        if PartitionMap::new(method.partition(), page_tokens, method.name()).is_ok() {
            let setup = Setup { method: method.clone(), ..Setup::new(shape, page_tokens, Dense::default()) };
            setups.push((format!("{method:?}, pages of {page_tokens}"), setup));
        }
    }
    setups
}

/// The exact outputs of all tokens of a sequence, by layer.
fn dense_layers(sequence: &Sequence) -> Vec<Vec<f64>> {
    (0..sequence.shape.layers)
        .map(|layer| {
            let all = 0..sequence.tokens;
            let (keys, values) = (sequence.keys(layer, all.clone()), sequence.values(layer, all.clone()));
            dense_reference(&sequence.shape, 0, sequence.queries(layer, all), keys, values)
        })
        .collect()
}

/// Runs sequences as one ragged batch, prompts in chunks of odd sizes, and compares every output.
fn check_full(setup: &Setup, requests: &[(Sequence, usize)], expected: &[Vec<Vec<f64>>], context: &str) {
    let mut run = setup.start();
    let tolerance = if setup.method.keys() == KeyStore::Full { TOLERANCE } else { REBUILT };
    let width = setup.shape.query_heads * setup.shape.head_dim;
    let mut ids = Vec::new();
    for (index, (sequence, prompt)) in requests.iter().enumerate() {
        let id = run.admit(sequence).unwrap();
        if *prompt > 0 {
            let outputs = run.prompt(id, *prompt, [5, 64, 1000][index % 3]).unwrap();
            for (layer, output) in outputs.iter().enumerate() {
                close(output, &expected[index][layer][..prompt * width], tolerance)
                    .unwrap_or_else(|off| panic!("{context}: prompt of {prompt}, layer {layer}: {off}"));
            }
        }
        ids.push(id);
    }
    let steps = requests[0].0.tokens - requests[0].1;
    for step in 0..steps {
        let outputs = run.step(&ids).unwrap();
        for (index, (_, prompt)) in requests.iter().enumerate() {
            for (layer, output) in outputs[index].iter().enumerate() {
                let token = prompt + step;
                close(output, &expected[index][layer][token * width..(token + 1) * width], tolerance)
                    .unwrap_or_else(|off| {
                        panic!("{context}: prompt {prompt}, token {token}, {layer}: {off}")
                    });
            }
        }
    }
}

#[test]
fn a_method_that_selects_everything_is_dense_attention_at_every_length_near_a_border() {
    for (group, style) in [1, 4, 5].into_iter().flat_map(|group| Style::ALL.map(|style| (group, style))) {
        let shape = KvShape::new(1, 2 * group, 2, 24).unwrap();
        let requests: Vec<_> = LENGTHS
            .iter()
            .map(|length| (Sequence::new(shape, style, length + 18, *length as u64), *length))
            .collect();
        let expected: Vec<_> = requests.iter().map(|(sequence, _)| dense_layers(sequence)).collect();
        for (name, setup) in full_setups(shape) {
            check_full(&setup, &requests, &expected, &format!("{name}, group {group}, {style:?}"));
        }
    }
}

#[test]
fn a_method_that_selects_everything_is_dense_attention_after_300_generated_tokens() {
    for (group, style) in [(4, Style::Random), (5, Style::Peaked), (1, Style::Uniform)] {
        let shape = KvShape::new(2, 2 * group, 2, 16).unwrap();
        let requests =
            [0, 72, 81].map(|length| (Sequence::new(shape, style, length + 300, length as u64), length));
        let expected = requests.each_ref().map(|(sequence, _)| dense_layers(sequence));
        for (name, setup) in full_setups(shape) {
            check_full(&setup, &requests, &expected, &format!("{name}, group {group}, {style:?}"));
        }
    }
}

/// Long enough for several tiles of queries and of keys, with chunk borders within and between tiles.
#[test]
fn a_long_prompt_is_dense_attention_however_its_queries_are_cut() {
    for style in Style::ALL {
        let shape = KvShape::new(1, 6, 2, 40).unwrap();
        let sequence = Sequence::new(shape, style, 601, 3);
        let expected = dense_layers(&sequence);
        for chunk in [1, 63, 64, 65, 256, 257, 601] {
            let mut run = Setup::new(shape, 8, Dense::default()).start();
            let id = run.admit(&sequence).unwrap();
            let outputs = run.prompt(id, 601, chunk).unwrap();
            close(&outputs[0], &expected[0], TOLERANCE)
                .unwrap_or_else(|off| panic!("{style:?}, chunks of {chunk}: {off}"));
        }
    }
}

/// Zones as the words say, token by token: context leaves the steady zone `unit` tokens at a time, once all of
/// them are behind the window; the sinks are rounded up.
fn steady_tokens(tokens: usize, steady: SteadyZone, unit: usize) -> Vec<usize> {
    (0..tokens)
        .filter(|token| {
            let (first, end) = (token / unit * unit, token / unit * unit + unit);
            first < steady.sinks || end + steady.window > tokens
        })
        .collect()
}

#[test]
fn streaming_llm_reads_sinks_and_window_and_nothing_else() {
    for (sinks, window) in [(4, 64), (0, 1), (1, 10), (9, 16)] {
        let steady = SteadyZone { sinks, window };
        for (page_tokens, style) in
            [(1, Style::Random), (4, Style::Peaked), (8, Style::Uniform), (16, Style::Random)]
        {
            let shape = KvShape::new(1, 4, 2, 16).unwrap();
            for prompt in [1, 9, 90, 200] {
                let sequence = Sequence::new(shape, style, prompt + 40, prompt as u64);
                let mut run = Setup::new(shape, page_tokens, StreamingLlm { steady }).start();
                let id = run.start(&sequence, prompt);
                for token in prompt..sequence.tokens {
                    let outputs = run.step(&[id]).unwrap();
                    let seen = vec![steady_tokens(token + 1, steady, page_tokens); 2];
                    let expected = sequence.attention(0, token, &seen);
                    close(&outputs[0][0], &expected, TOLERANCE).unwrap_or_else(|off| {
                        panic!("{steady:?}, pages of {page_tokens}, {style:?}, token {token}: {off}")
                    });
                }
                assert_eq!(run.pipeline.counters().hits + run.pipeline.counters().misses, 0);
            }
        }
    }
}

#[test]
fn names_give_the_methods_that_these_tests_check() {
    let steady = SteadyZone::default();
    let mut names = vec![Dense { steady }.name().to_owned(), StreamingLlm { steady }.name().to_owned()];
    names.extend(selecting(Budget::Tokens(1024)).iter().map(|method| method.name().to_owned()));
    names.dedup();
    // Needs gates, and has these tests in a file of its own.
    names.push(spinkv::algorithms::SEER_ATTENTION.to_owned());
    assert_eq!(names, spinkv::algorithms::NAMES, "a method without a reference here");
}
