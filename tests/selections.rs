//! What each method selects, against its score by definition in f64 over the keys themselves.

use std::sync::Arc;

use spinkv::KvShape;
use spinkv::algorithms::{Quest, ShadowKv, TokenTopK};
use spinkv::pipeline::{Budget, GroupMerge, Method, RequestId, SteadyZone};
use spinkv_tests::{Run, Sequence, Setup, Style, close};

const TOLERANCE: f64 = 1e-5;

const STEADY: SteadyZone = SteadyZone { sinks: 3, window: 12 };

/// A method, as these tests know it.
struct Case {
    method: Arc<dyn Method>,
    budget: Budget,
    /// Tokens of a partition.
    partition: usize,
    /// The pages that suit it.
    page_tokens: &'static [usize],
    scores: Scores,
    /// The selection of the first case of a budget at 200 tokens, to hold the budget itself to something.
    at_200: usize,
    outliers: usize,
}

/// How partitions are scored: of mean keys, or by the bounds of the keys.
#[derive(Clone, Copy, PartialEq)]
enum Scores {
    /// The softmax, over the partitions that are not read in any case, of the mean key's products; merged by the maximum.
    Means,
    /// The greatest product with a key in the bounds.
    Bounds(GroupMerge),
}

fn cases() -> Vec<Case> {
    let shadowkv = |budget, at_200, outliers| Case {
        method: Arc::new(ShadowKv { budget, steady: STEADY, outliers }),
        budget,
        partition: 8,
        page_tokens: &[1, 4, 8],
        scores: Scores::Means,
        at_200,
        outliers,
    };
    let quest = |budget, chunk, merge, at_200| Case {
        method: Arc::new(Quest { chunk, merge, ..Quest::new(budget, STEADY) }),
        budget,
        partition: chunk,
        page_tokens: if chunk == 16 { &[1, 8, 16] } else { &[4] },
        scores: Scores::Bounds(merge),
        at_200,
        outliers: 0,
    };
    let token_topk = |budget, at_200| Case {
        method: Arc::new(TokenTopK { budget, steady: STEADY }),
        budget,
        partition: 1,
        page_tokens: &[1, 4, 16],
        scores: Scores::Means,
        at_200,
        outliers: 0,
    };
    vec![
        shadowkv(Budget::Tokens(17), 2, 0),
        shadowkv(Budget::Tokens(47), 5, 0),
        shadowkv(Budget::Fraction(0.2), 5, 0),
        shadowkv(Budget::Fraction(0.01), 1, 0),
        shadowkv(Budget::Tokens(17), 2, 3),
        shadowkv(Budget::Fraction(0.1), 2, 9),
        quest(Budget::Tokens(40), 16, GroupMerge::Max, 2),
        quest(Budget::Tokens(64), 16, GroupMerge::Sum, 4),
        quest(Budget::Fraction(0.2), 4, GroupMerge::Mean, 10),
        token_topk(Budget::Tokens(15), 15),
        token_topk(Budget::Fraction(0.1), 20),
    ]
}

/// A key of a KV head in f64.
fn key(sequence: &Sequence, token: usize, kv_head: usize) -> impl Iterator<Item = f64> {
    let KvShape { kv_heads, head_dim, .. } = sequence.shape;
    sequence.keys[0][(token * kv_heads + kv_head) * head_dim..][..head_dim].iter().map(|key| f64::from(*key))
}

/// The mean key of a partition of `size` tokens.
fn mean(sequence: &Sequence, partition: usize, size: usize, kv_head: usize) -> Vec<f64> {
    let mut mean = vec![0.0; sequence.shape.head_dim];
    for token in partition * size..(partition + 1) * size {
        mean.iter_mut().zip(key(sequence, token, kv_head)).for_each(|(mean, key)| *mean += key / size as f64);
    }
    mean
}

/// The scores of `partitions` for the queries of `token`.
fn scores(case: &Case, sequence: &Sequence, token: usize, kv_head: usize, partitions: &[usize]) -> Vec<f64> {
    let KvShape { query_heads, kv_heads, head_dim, .. } = sequence.shape;
    let (queries, group) = (sequence.queries(0, token..token + 1), query_heads / kv_heads);
    let heads = (kv_head * group..(kv_head + 1) * group).map(|head| {
        let query = || queries[head * head_dim..][..head_dim].iter().map(|q| f64::from(*q));
        let of_means = |partition: &usize| -> f64 {
            query().zip(mean(sequence, *partition, case.partition, kv_head)).map(|(q, k)| q * k).sum()
        };
        let of_bounds = |partition: &usize| -> f64 {
            let tokens = partition * case.partition..(partition + 1) * case.partition;
            let products = tokens.map(|token| {
                query().zip(key(sequence, token, kv_head)).map(|(q, k)| q * k).collect::<Vec<_>>()
            });
            let most =
                |a: Vec<f64>, b: Vec<f64>| a.iter().zip(&b).map(|(a, b)| a.max(*b)).collect::<Vec<_>>();
            products.reduce(most).unwrap().iter().sum()
        };
        if case.scores == Scores::Means {
            let logits: Vec<f64> =
                partitions.iter().map(|partition| of_means(partition) / (head_dim as f64).sqrt()).collect();
            let highest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = logits.iter().map(|logit| (logit - highest).exp()).sum();
            logits.iter().map(|logit| (logit - highest).exp() / total).collect()
        } else {
            partitions.iter().map(of_bounds).collect::<Vec<f64>>()
        }
    });
    let merge = if let Scores::Bounds(merge) = case.scores { merge } else { GroupMerge::Max };
    let both = |a: f64, b: f64| if merge == GroupMerge::Max { a.max(b) } else { a + b };
    let merged =
        heads.reduce(|a, b| a.iter().zip(&b).map(|(a, b)| both(*a, *b)).collect()).unwrap_or_default();
    let share = if merge == GroupMerge::Mean { group as f64 } else { 1.0 };
    merged.iter().map(|score| score / share).collect()
}

/// The least cosine between a partition's keys and their mean.
fn least_cosine(sequence: &Sequence, partition: usize, size: usize, kv_head: usize) -> f64 {
    let mean = mean(sequence, partition, size, kv_head);
    let length = |vector: &[f64]| vector.iter().map(|element| element * element).sum::<f64>().sqrt();
    let cosine = |token| {
        let key: Vec<f64> = key(sequence, token, kv_head).collect();
        let product: f64 = key.iter().zip(&mean).map(|(a, b)| a * b).sum();
        product / (length(&key) * length(&mean))
    };
    (partition * size..(partition + 1) * size).map(cosine).fold(f64::INFINITY, f64::min)
}

/// `taken` are the best of `all` by `score`, but for what is as good as the last of them within `room`; whether they are so exactly.
fn are_best(
    all: &[usize],
    score: &[f64],
    taken: &[usize],
    room: impl Fn(f64) -> f64,
) -> Result<bool, String> {
    let mut best: Vec<usize> = (0..all.len()).collect();
    best.sort_by(|a, b| score[*b].total_cmp(&score[*a]));
    let mut best: Vec<usize> = best[..taken.len()].iter().map(|at| all[*at]).collect();
    best.sort_unstable();
    let (mut worst, mut refused) = (f64::INFINITY, f64::NEG_INFINITY);
    for (partition, score) in all.iter().zip(score) {
        let side = if taken.contains(partition) { &mut worst } else { &mut refused };
        *side = if taken.contains(partition) { side.min(*score) } else { side.max(*score) };
    }
    if worst < refused - room(refused) {
        return Err(format!("{taken:?} with {worst:e}, {refused:e} was refused"));
    }
    Ok(best == taken)
}

/// Zones as the words say, token by token, for partitions and pages that are whole units.
fn steady_tokens(tokens: usize, unit: usize) -> Vec<usize> {
    (0..tokens)
        .filter(|token| {
            let (first, end) = (token / unit * unit, token / unit * unit + unit);
            first < STEADY.sinks || end + STEADY.window > tokens
        })
        .collect()
}

/// The partitions that every step reads, of those that a prompt indexed.
fn check_outliers(
    case: &Case,
    run: &Run,
    id: RequestId,
    sequence: &Sequence,
    indexed: &[usize],
) -> [Vec<usize>; 2] {
    [0, 1].map(|kv_head| {
        let always = run.pipeline.backend().always(id, 0, kv_head).unwrap();
        let always: Vec<usize> = always.into_iter().map(|id| id as usize).collect();
        assert_eq!(always.len(), case.outliers.min(indexed.len()), "{always:?} of {indexed:?}");
        assert!(always.iter().all(|partition| indexed.contains(partition)), "{always:?} of {indexed:?}");
        let spread: Vec<f64> = indexed
            .iter()
            .map(|partition| -least_cosine(sequence, *partition, case.partition, kv_head))
            .collect();
        are_best(indexed, &spread, &always, |_| 1e-6)
            .unwrap_or_else(|wrong| panic!("{:?}: {wrong}", case.method));
        always
    })
}

#[test]
fn the_partitions_that_score_best_are_read_and_nothing_else() {
    let (mut rows, mut same) = (0, 0);
    for (number, case) in cases().iter().enumerate() {
        let (group, style) = ([1, 2, 4, 5][number % 4], Style::ALL[number % 3]);
        for page_tokens in case.page_tokens {
            let unit = case.partition.max(*page_tokens);
            let shape = KvShape::new(1, 2 * group, 2, 24).unwrap();
            for prompt in [1, 100, 180] {
                let sequence = Sequence::new(shape, style, prompt + 60, prompt as u64);
                let setup = Setup::new(shape, *page_tokens, Quest::new(case.budget, STEADY));
                let mut run = Setup { method: case.method.clone(), ..setup }.start();
                let id = run.start(&sequence, prompt);
                let partitions = |tokens: usize| -> Vec<usize> {
                    let steady = steady_tokens(tokens, unit);
                    (0..tokens / case.partition)
                        .filter(|partition| !steady.contains(&(partition * case.partition)))
                        .collect()
                };
                let always = check_outliers(case, &run, id, &sequence, &partitions(prompt));
                for token in prompt..sequence.tokens {
                    let context = format!(
                        "{:?}, group {group}, {style:?}, pages of {page_tokens}, token {token}",
                        case.method
                    );
                    let outputs = run.step(&[id]).unwrap();
                    let all = partitions(token + 1);
                    let limit = match case.budget {
                        Budget::Tokens(tokens) => tokens / case.partition,
                        Budget::Fraction(fraction) => {
                            ((fraction * (token + 1) as f64 + 1e-6) as usize / case.partition).max(1)
                        }
                    };
                    if token + 1 == 200 {
                        assert_eq!(limit, case.at_200, "{context}");
                    }
                    let mut seen = Vec::new();
                    for (kv_head, selected) in run.selected(id).into_iter().enumerate() {
                        let selected: Vec<usize> = selected.iter().map(|id| *id as usize).collect();
                        let always = &always[kv_head];
                        assert!(selected.is_sorted_by(|a, b| a < b), "{context}: {selected:?}");
                        assert!(always.iter().all(|partition| selected.contains(partition)), "{context}");
                        assert!(selected.iter().all(|partition| all.contains(partition)), "{context}");
                        assert_eq!(selected.len(), (limit + always.len()).min(all.len()), "{context}");
                        let beside = |partition: &usize| !always.contains(partition);
                        let others: Vec<usize> = all.iter().copied().filter(beside).collect();
                        let of_others = scores(case, &sequence, token, kv_head, &others);
                        let taken: Vec<usize> = selected.iter().copied().filter(beside).collect();
                        // Where f32 and f64 do not agree, the scores are as good as equal.
                        let exact =
                            are_best(&others, &of_others, &taken, |refused| 1e-4 * refused.abs() + 1e-36)
                                .unwrap_or_else(|wrong| panic!("{context}: {wrong}"));
                        (rows, same) = (rows + 1, same + usize::from(exact));

                        // A page that a token is on is read as a whole.
                        let mut read: Vec<usize> = selected
                            .iter()
                            .flat_map(|id| id * case.partition..(id + 1) * case.partition)
                            .flat_map(|token| {
                                token / page_tokens * page_tokens..(token / page_tokens + 1) * page_tokens
                            })
                            .chain(steady_tokens(token + 1, unit))
                            .collect();
                        read.sort_unstable();
                        read.dedup();
                        seen.push(read);
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

/// No more pages than a request is charged for, though each token may lie on a page of its own; and the tokens that weigh most.
#[test]
fn scattered_tokens_take_a_page_each_and_no_more_than_is_charged() {
    let shape = KvShape::new(1, 2, 1, 16).unwrap();
    let mut sequence = Sequence::new(shape, Style::Random, 420, 3);
    sequence.keys[0].iter_mut().for_each(|key| *key *= 0.01);
    // One token on each page of 8 has a great key.
    for token in (3..400).step_by(8) {
        sequence.keys[0][token * 16..][..16].fill(2.0);
    }
    sequence.queries[0].fill(1.0);
    let method = TokenTopK { budget: Budget::Tokens(20), steady: STEADY };
    let mut run = Setup::new(shape, 8, method).start();
    let id = run.start(&sequence, 400);
    assert_eq!(run.pipeline.admitted(id).unwrap().row.mandatory_pages, 20);
    for _ in 0..20 {
        let before = run.pipeline.counters();
        run.step(&[id]).unwrap();
        let selected = &run.selected(id)[0];
        assert!(selected.iter().all(|token| token % 8 == 3), "{selected:?}");
        let after = run.pipeline.counters();
        assert_eq!(after.hits + after.misses - before.hits - before.misses, 20, "a page each");
    }
    // Of few pages no more than there are can be needed.
    let plan = |tokens| {
        let mut run = Setup::new(shape, 8, method).start();
        let id = run.pipeline.admit(tokens).unwrap();
        run.pipeline.admitted(id).unwrap().row.mandatory_pages
    };
    assert_eq!((plan(20), plan(8 + 40 + 12), plan(8 + 8 * 19 + 12), plan(1000)), (0, 5, 19, 20));
}

/// A prompt of fewer partitions than outliers: all that it indexes are read, whatever comes after.
#[test]
fn outliers_stay_when_the_context_grows() {
    let shape = KvShape::new(2, 4, 2, 16).unwrap();
    let sequence = Sequence::new(shape, Style::Random, 300, 8);
    for outliers in [1, 5, 50] {
        let method = ShadowKv { budget: Budget::Tokens(16), steady: STEADY, outliers };
        let mut run = Setup::new(shape, 4, method).start();
        let id = run.start(&sequence, 70);
        // Chunks 1 to 6: 8 sinks, and 12 tokens of window.
        let always: Vec<Vec<u32>> = [(0, 0), (0, 1), (1, 0), (1, 1)]
            .map(|(layer, kv_head)| run.pipeline.backend().always(id, layer, kv_head).unwrap())
            .into();
        always.iter().for_each(|row| assert_eq!(row.len(), outliers.min(6)));
        assert!(outliers > 5 || always.iter().any(|row| *row != always[0]), "rows have their own");
        for token in 70..300 {
            run.step(&[id]).unwrap();
            let partitions = (token + 1 - 12) / 8 - 1;
            for (row, selected) in run.selected(id).iter().enumerate() {
                assert!(always[row].iter().all(|id| selected.contains(id)));
                assert_eq!(selected.len(), (2 + outliers.min(6)).min(partitions), "token {token}");
            }
        }
        run.audit(id);
        // Without a prompt there are none.
        let id = run.start(&sequence, 0);
        run.generate(id, 200);
        assert_eq!(run.pipeline.backend().always(id, 0, 0), Some(vec![]));
        assert_eq!(run.selected(id)[0].len(), 2);
    }
}
