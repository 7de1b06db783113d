//! The pipeline's outputs against attention by its definition.

use spinkv::KvShape;
use spinkv::algorithms::{Dense, ShadowKv, StreamingLlm};
use spinkv::pipeline::{Budget, Method, SteadyZone};
use spinkv_tests::{Sequence, Setup, Style, close, dense_reference};

const TOLERANCE: f64 = 1e-5;

/// Around the borders of pages, of chunks, of the window (64) and of sinks, window and chunk together (80).
const LENGTHS: [usize; 14] = [0, 1, 7, 8, 9, 63, 64, 65, 71, 72, 73, 79, 80, 81];

/// One setup for each way to select everything.
fn full_setups(shape: KvShape) -> Vec<(String, Setup)> {
    let steady = SteadyZone::default();
    let mut setups = Vec::new();
    for page_tokens in [1, 2, 4, 8, 16] {
        setups.push(("dense".to_owned(), Setup::new(shape, page_tokens, Dense { steady })));
        if page_tokens <= 8 {
            for budget in [Budget::Tokens(4096), Budget::Fraction(1.0)] {
                let setup = Setup::new(shape, page_tokens, ShadowKv { budget, steady });
                setups.push((format!("shadowkv {budget}"), setup));
            }
        }
    }
    setups
        .into_iter()
        .map(|(name, setup)| (format!("{name}, pages of {}", setup.page_tokens), setup))
        .collect()
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
    let width = setup.shape.query_heads * setup.shape.head_dim;
    let mut ids = Vec::new();
    for (index, (sequence, prompt)) in requests.iter().enumerate() {
        let id = run.admit(sequence).unwrap();
        if *prompt > 0 {
            let outputs = run.prompt(id, *prompt, [5, 64, 1000][index % 3]).unwrap();
            for (layer, output) in outputs.iter().enumerate() {
                close(output, &expected[index][layer][..prompt * width], TOLERANCE)
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
                close(output, &expected[index][layer][token * width..(token + 1) * width], TOLERANCE)
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

/// ShadowKV's scores of the chunks `chunks` of one KV head: mean keys, softmax for each query head, maximum over
/// the group.
fn chunk_scores(sequence: &Sequence, token: usize, kv_head: usize, chunks: &[usize]) -> Vec<f64> {
    let KvShape { query_heads, kv_heads, head_dim, .. } = sequence.shape;
    let (queries, keys) = (sequence.queries(0, token..token + 1), &sequence.keys[0]);
    let group = query_heads / kv_heads;
    let mut scores = vec![0f64; chunks.len()];
    for head in kv_head * group..(kv_head + 1) * group {
        let mut logits = Vec::new();
        for chunk in chunks {
            let mut logit = 0.0;
            for element in 0..head_dim {
                let mut mean = 0.0;
                for token in chunk * 8..chunk * 8 + 8 {
                    mean += f64::from(keys[(token * kv_heads + kv_head) * head_dim + element]) / 8.0;
                }
                logit += mean * f64::from(queries[head * head_dim + element]);
            }
            logits.push(logit / (head_dim as f64).sqrt());
        }
        let highest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = logits.iter().map(|logit| (logit - highest).exp()).sum();
        for (score, logit) in scores.iter_mut().zip(&logits) {
            *score = score.max((logit - highest).exp() / total);
        }
    }
    scores
}

#[test]
fn shadowkv_reads_the_chunks_whose_landmarks_score_best() {
    let steady = SteadyZone { sinks: 3, window: 12 };
    let (mut rows, mut same) = (0, 0);
    let cases = [
        (Budget::Tokens(17), 2, 1, Style::Random),
        (Budget::Tokens(47), 5, 2, Style::Random),
        (Budget::Tokens(64), 8, 4, Style::Peaked),
        (Budget::Fraction(0.2), 5, 5, Style::Uniform),
        (Budget::Fraction(0.01), 1, 4, Style::Random),
    ];
    for (budget, expected_at_200, group, style) in cases {
        for page_tokens in [1, 4, 8] {
            let shape = KvShape::new(1, 2 * group, 2, 16).unwrap();
            for prompt in [1, 100, 180] {
                let sequence = Sequence::new(shape, style, prompt + 60, prompt as u64);
                let mut run = Setup::new(shape, page_tokens, ShadowKv { budget, steady }).start();
                let id = run.start(&sequence, prompt);
                for token in prompt..sequence.tokens {
                    let context = format!("{budget}, group {group}, {style:?}, {page_tokens}, token {token}");
                    let outputs = run.step(&[id]).unwrap();
                    let always = steady_tokens(token + 1, steady, 8);
                    let chunks: Vec<usize> =
                        (0..(token + 1) / 8).filter(|chunk| !always.contains(&(chunk * 8))).collect();
                    let limit = match budget {
                        Budget::Tokens(tokens) => tokens / 8,
                        Budget::Fraction(fraction) => ((fraction * (token + 1) as f64) as usize / 8).max(1),
                    };
                    if token + 1 == 200 {
                        assert_eq!(limit, expected_at_200);
                    }
                    let mut seen = Vec::new();
                    for (kv_head, selected) in run.selected(id).into_iter().enumerate() {
                        let scores = chunk_scores(&sequence, token, kv_head, &chunks);
                        assert_eq!(selected.len(), limit.min(chunks.len()), "{context}");
                        assert!(selected.is_sorted_by(|a, b| a < b), "{context}: {selected:?}");
                        let taken = |chunk: &usize| selected.contains(&(*chunk as u32));
                        assert_eq!(chunks.iter().filter(|chunk| taken(chunk)).count(), selected.len());
                        let mut best: Vec<usize> = (0..chunks.len()).collect();
                        best.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
                        let mut best: Vec<_> =
                            best[..selected.len()].iter().map(|i| chunks[*i] as u32).collect();
                        best.sort();
                        (rows, same) = (rows + 1, same + usize::from(best == selected));
                        // Where f32 and f64 do not agree, the scores are as good as equal.
                        let (mut worst, mut refused) = (f64::INFINITY, 0f64);
                        for (chunk, score) in chunks.iter().zip(&scores) {
                            let side = if taken(chunk) { &mut worst } else { &mut refused };
                            *side = if taken(chunk) { side.min(*score) } else { side.max(*score) };
                        }
                        assert!(
                            worst >= refused * (1.0 - 1e-4) - 1e-36,
                            "{context}: {worst:e} < {refused:e}"
                        );
                        let mut tokens = always.clone();
                        tokens.extend(
                            selected.iter().flat_map(|chunk| *chunk as usize * 8..*chunk as usize * 8 + 8),
                        );
                        seen.push(tokens);
                    }
                    let expected = sequence.attention(0, token, &seen);
                    close(&outputs[0][0], &expected, TOLERANCE)
                        .unwrap_or_else(|off| panic!("{context}: {off}"));
                }
            }
        }
    }
    assert!(same * 100 >= rows * 98, "of {rows} selections only {same} are the exact top k");
}

#[test]
fn names_give_the_methods_that_these_tests_check() {
    let steady = SteadyZone::default();
    let budget = Budget::Tokens(1024);
    let methods: [&dyn Method; 3] =
        [&Dense { steady }, &StreamingLlm { steady }, &ShadowKv { budget, steady }];
    assert_eq!(methods.map(Method::name), spinkv::algorithms::NAMES, "a method without a reference here");
}
