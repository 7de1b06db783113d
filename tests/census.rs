//! Who is seen: keys are 0, so all tokens that a query sees weigh the same, and values are one-hot by token, so
//! the output says which tokens these were, and how often.

use std::ops::Range;

use spinkv::KvShape;
use spinkv::algorithms::{Dense, Quest, RetroInfer, ShadowKv, StreamingLlm, TokenTopK};
use spinkv::partition::PartitionKind;
use spinkv::pipeline::{Budget, Candidates, Index, Method, Pick, Select, SteadyZone};
use spinkv_tests::{Sequence, Setup, Style};

/// Each KV head's value is one-hot over another 48 tokens: up to 384 tokens are told apart.
const KV_HEADS: usize = 8;
const HEAD_DIM: usize = 48;
const GROUP: usize = 2;

/// All heads have the same queries and keys, so all rows select the same.
fn census_sequence(tokens: usize) -> Sequence {
    assert!(tokens <= KV_HEADS * HEAD_DIM);
    let shape = KvShape::new(1, KV_HEADS * GROUP, KV_HEADS, HEAD_DIM).unwrap();
    let mut sequence = Sequence::new(shape, Style::Random, tokens, 11);
    sequence.keys[0].fill(0.0);
    sequence.values[0].fill(0.0);
    let width = KV_HEADS * HEAD_DIM;
    for token in 0..tokens {
        sequence.values[0][token * width + token] = 1.0;
        let queries = &mut sequence.queries[0][token * width * GROUP..][..width * GROUP];
        queries.copy_within(0..HEAD_DIM, HEAD_DIM);
        (2..KV_HEADS * GROUP).for_each(|head| queries.copy_within(0..HEAD_DIM, head * HEAD_DIM));
    }
    sequence
}

/// The weight of each token in one query's output, which must be the same for all heads of a group.
fn weights(out: &[f32], tokens: usize) -> Vec<f32> {
    let (groups, _) = out.as_chunks::<{ GROUP * HEAD_DIM }>();
    let mut weights = Vec::new();
    for group in groups {
        assert_eq!(group[..HEAD_DIM], group[HEAD_DIM..], "heads of a group see the same");
        weights.extend(&group[..HEAD_DIM]);
    }
    assert!(weights[tokens..].iter().all(|weight| *weight == 0.0), "a token from the future was seen");
    weights.truncate(tokens);
    weights
}

/// Panics unless the tokens of `expected` were seen exactly once each, and no others at all.
fn assert_seen_once(out: &[f32], tokens: usize, expected: &[bool], context: &str) {
    let count = expected.iter().filter(|seen| **seen).count();
    for (token, (weight, expected)) in weights(out, tokens).into_iter().zip(expected).enumerate() {
        let times = weight * count as f32;
        let wanted = if *expected { 1.0 } else { 0.0 };
        assert!(
            (times - wanted).abs() < 1e-4,
            "{context}, {tokens} tokens: token {token} seen {times} times"
        );
    }
}

#[test]
fn with_a_budget_for_all_of_it_each_token_is_seen_exactly_once() {
    let steady = SteadyZone::default();
    for page_tokens in [1, 2, 4, 8] {
        let sequence = census_sequence(65 + 300);
        let mut setups = vec![Setup::new(sequence.shape, page_tokens, Dense { steady })];
        for budget in [Budget::Tokens(512), Budget::Fraction(1.0)] {
            setups.push(Setup::new(sequence.shape, page_tokens, ShadowKv { budget, steady, outliers: 2 }));
            let clusters = RetroInfer { update: 128, ..RetroInfer::new(budget, steady) };
            setups.push(Setup::new(sequence.shape, page_tokens, clusters));
            setups.push(Setup::new(sequence.shape, page_tokens, Quest::new(budget, steady)));
            setups.push(Setup::new(sequence.shape, page_tokens, TokenTopK { budget, steady }));
        }
        for setup in setups {
            for prompt in [0, 1, 7, 8, 9, 63, 64, 65] {
                let context = format!("{:?}, pages of {page_tokens}, prompt of {prompt}", setup.method);
                let mut run = setup.start();
                let id = run.admit(&sequence).unwrap();
                if prompt > 0 {
                    let outputs = run.prompt(id, prompt, 5).unwrap();
                    let width = KV_HEADS * GROUP * HEAD_DIM;
                    for (token, out) in outputs[0].chunks(width).enumerate() {
                        assert_seen_once(out, token + 1, &vec![true; token + 1], &context);
                    }
                }
                // 300 tokens of the first and the last prompt, 20 of the others.
                let steps = if [0, 65].contains(&prompt) { 300 } else { 20 };
                for (step, outputs) in run.generate(id, steps).into_iter().enumerate() {
                    let tokens = prompt + step + 1;
                    assert_seen_once(&outputs[0], tokens, &vec![true; tokens], &context);
                }
            }
        }
    }
}

/// Picks by a hash of the query's bits: all over the context, another set each step.
#[derive(Debug)]
struct Scattered {
    partition: PartitionKind,
    budget: Budget,
    steady: SteadyZone,
}

impl Method for Scattered {
    fn name(&self) -> &str {
        "scattered"
    }
    fn partition(&self) -> PartitionKind {
        self.partition
    }
    fn index(&self) -> Index<'_> {
        Index::Nothing
    }
    fn select(&self) -> Select<'_> {
        Select::Custom { picker: self, budget: self.budget }
    }
    fn steady(&self) -> SteadyZone {
        self.steady
    }
}

impl Pick for Scattered {
    fn pick(&self, candidates: &Candidates<'_>, ids: &mut Vec<u32>) {
        let hash = |id: u32| {
            let mixed = u64::from(candidates.queries[0].to_bits() ^ id.wrapping_mul(0x9e37_79b9));
            mixed.wrapping_mul(0xd6e8_feb8_6659_fd93) >> 20
        };
        ids.extend(candidates.ids());
        ids.sort_by_key(|id| hash(*id));
        ids.truncate(candidates.limit);
        ids.sort();
    }
}

/// The tokens of a row whose unit of leaving the steady zone is `unit`, as the words say: sinks rounded up, the
/// rest leaves by whole units behind the window.
fn is_steady(token: usize, tokens: usize, steady: SteadyZone, unit: usize) -> bool {
    let unit_start = token / unit * unit;
    unit_start < steady.sinks || unit_start + unit + steady.window > tokens
}

/// `ids` of a step select these tokens of the row.
fn selected_tokens(ids: &[u32], partition: usize, page_tokens: usize) -> impl Iterator<Item = Range<usize>> {
    ids.iter().map(move |id| {
        let (first, end) = (*id as usize * partition, (*id as usize + 1) * partition);
        // Whole pages are read, whatever part of them was selected.
        first / page_tokens * page_tokens..end.next_multiple_of(page_tokens)
    })
}

#[test]
fn with_a_small_budget_the_steady_zone_and_the_selection_are_seen_once_and_nothing_else() {
    let cases = [
        (PartitionKind::Chunk { tokens: 8 }, [1, 4, 8], SteadyZone { sinks: 4, window: 20 }),
        (PartitionKind::Chunk { tokens: 16 }, [2, 8, 16], SteadyZone { sinks: 0, window: 1 }),
        (PartitionKind::Token, [1, 4, 8], SteadyZone { sinks: 1, window: 9 }),
    ];
    for (partition, pages, steady) in cases {
        let mut evicted_pages = 0;
        let partition_tokens = if let PartitionKind::Chunk { tokens } = partition { tokens } else { 1 };
        for (page_tokens, budget) in pages
            .into_iter()
            .flat_map(|pages| [Budget::Tokens(40), Budget::Fraction(0.3)].map(|b| (pages, b)))
        {
            let unit = partition_tokens.max(page_tokens);
            for prompt in [0, 5, 70, 130] {
                let sequence = census_sequence(prompt + 150);
                let method = Scattered { partition, budget, steady };
                let context = format!("{method:?}, pages of {page_tokens}, prompt of {prompt}");
                let mut setup = Setup::new(sequence.shape, page_tokens, method);
                setup.buffering = 0.5;
                let mut run = setup.start();
                let id = run.start(&sequence, prompt);
                let mut selections = Vec::new();
                for tokens in prompt + 1..=sequence.tokens {
                    let outputs = run.step(&[id]).unwrap();
                    let selected = run.selected(id);
                    assert!(selected.iter().all(|row| *row == selected[0]), "{context}: rows differ");
                    let mut seen: Vec<_> =
                        (0..tokens).map(|token| is_steady(token, tokens, steady, unit)).collect();
                    assert!(seen[tokens - steady.window.min(tokens)..].iter().all(|seen| *seen));
                    for run in selected_tokens(&selected[0], partition_tokens, page_tokens) {
                        seen[run].fill(true);
                    }
                    assert_seen_once(&outputs[0][0], tokens, &seen, &context);
                    selections.push(selected[0].clone());
                }
                let sparse = selections.iter().filter(|ids| !ids.is_empty()).count();
                assert!(sparse > 50, "{context}: only {sparse} steps selected anything");
                evicted_pages += run.pipeline.counters().evicted_pages;
            }
        }
        assert!(evicted_pages > 0, "{partition}: the cache was never full");
    }
}

#[test]
fn what_streaming_llm_and_shadowkv_see_is_the_steady_zone_and_the_selection() {
    let steady = SteadyZone { sinks: 4, window: 20 };
    for page_tokens in [1, 8] {
        let sequence = census_sequence(70 + 100);
        let budget = Budget::Tokens(24);
        for (unit, setup) in [
            (page_tokens, Setup::new(sequence.shape, page_tokens, StreamingLlm { steady })),
            (8, Setup::new(sequence.shape, page_tokens, ShadowKv { budget, steady, outliers: 0 })),
        ] {
            let context = format!("{:?}, pages of {page_tokens}", setup.method);
            let mut run = setup.start();
            let id = run.start(&sequence, 70);
            for tokens in 71..=sequence.tokens {
                let outputs = run.step(&[id]).unwrap();
                let mut seen: Vec<_> =
                    (0..tokens).map(|token| is_steady(token, tokens, steady, unit)).collect();
                for run in selected_tokens(&run.selected(id)[0], 8, page_tokens) {
                    seen[run].fill(true);
                }
                assert_seen_once(&outputs[0][0], tokens, &seen, &context);
            }
        }
    }
}
