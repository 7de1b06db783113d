//! RetroInfer's clusters, selections, estimates and outputs, by definition in f64.

use std::sync::Arc;

use spinkv::algorithms::RetroInfer;
use spinkv::pipeline::{Budget, RequestId, SteadyZone};
use spinkv::{Error, KvConfig, KvShape};
use spinkv_tests::{Run, Sequence, Setup, Style, close};

const STEADY: SteadyZone = SteadyZone { sinks: 3, window: 12 };

/// Means are rounded to f32, and then weigh as much as a whole page.
const TOLERANCE: f64 = 3e-5;

/// Tokens that become clusters at a time.
const UPDATE: usize = 128;

/// A partition as the sequence has it: its tokens and their means.
struct Cluster {
    tokens: Vec<usize>,
    key: Vec<f64>,
    value: Vec<f64>,
}

/// One head of a tensor `[tokens, heads, head_dim]`.
fn head(tensor: &[f32], token: usize, heads: usize, head: usize, head_dim: usize) -> Vec<f64> {
    tensor[(token * heads + head) * head_dim..][..head_dim].iter().map(|x| f64::from(*x)).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The partitions of a row, by the bytes of their host pages, each of which is a token's.
fn clusters(run: &Run, id: RequestId, sequence: &Sequence, kv_head: usize) -> Vec<Cluster> {
    let (backend, layout) = (run.pipeline.backend(), *run.pipeline.config().layout());
    let KvShape { kv_heads, head_dim, .. } = sequence.shape;
    let of = |tensor: &[f32], token| head(tensor, token, kv_heads, kv_head, head_dim);
    let counts = backend.cluster_tokens(id, 0, kv_head).unwrap();
    let mut all = Vec::new();
    for (key, count) in counts.into_iter().enumerate() {
        let page = backend.host_page(id, 0, kv_head, key as u32).expect("a partition's page is on the host");
        let mut tokens = Vec::new();
        for at in 0..count {
            let (mut key, mut value) = (vec![0.0; head_dim], vec![0.0; head_dim]);
            layout.read_key(&page, at, &mut key);
            layout.read_value(&page, at, &mut value);
            let same = |token: &usize| {
                let row = (token * kv_heads + kv_head) * head_dim;
                sequence.keys[0][row..row + head_dim] == key
                    && sequence.values[0][row..row + head_dim] == value
            };
            tokens.push((0..sequence.tokens).find(same).expect("a token of the sequence"));
        }
        let mean = |tensor: &[f32]| {
            let mut mean = vec![0.0; head_dim];
            for token in &tokens {
                mean.iter_mut()
                    .zip(of(tensor, *token))
                    .for_each(|(mean, x)| *mean += x / tokens.len() as f64);
            }
            mean
        };
        let (key, value) = (mean(&sequence.keys[0]), mean(&sequence.values[0]));
        all.push(Cluster { tokens, key, value });
    }
    all
}

/// Sums of e^product, and with values, for the queries of one head of a token; products come with a weight in tokens.
#[derive(Default)]
struct Softmax {
    parts: Vec<(f64, f64, Vec<f64>)>,
}

impl Softmax {
    fn add(&mut self, logit: f64, tokens: f64, value: Vec<f64>) {
        self.parts.push((logit, tokens, value));
    }

    fn output(&self) -> Vec<f64> {
        let highest = self.parts.iter().map(|(logit, ..)| *logit).fold(f64::NEG_INFINITY, f64::max);
        let (mut sum, mut out) = (0.0, vec![0.0; self.parts[0].2.len()]);
        for (logit, tokens, value) in &self.parts {
            let weight = tokens * (logit - highest).exp();
            sum += weight;
            out.iter_mut().zip(value).for_each(|(out, value)| *out += weight * value);
        }
        out.iter_mut().for_each(|out| *out /= sum);
        out
    }
}

/// Checks one step's selection, estimates and outputs of layer 0; returns how many partitions there were, were selected, were estimated.
fn check_step(
    run: &Run,
    id: RequestId,
    sequence: &Sequence,
    token: usize,
    out: &[f32],
    method: &RetroInfer,
) -> [usize; 3] {
    let KvShape { query_heads, kv_heads, head_dim, .. } = sequence.shape;
    let (group, page_tokens) = (query_heads / kv_heads, run.pipeline.config().layout().page_tokens());
    let sinks = STEADY.sinks.next_multiple_of(page_tokens);
    let left = (token + 1).saturating_sub(STEADY.window + sinks) / UPDATE * UPDATE;
    let (mut expected, mut counts) = (Vec::new(), [0; 3]);
    for kv_head in 0..kv_heads {
        let clusters = clusters(run, id, sequence, kv_head);
        // Each token that has left the steady zone, once; a run's clusters hold its tokens alone.
        let mut tokens: Vec<usize> = clusters.iter().flat_map(|cluster| cluster.tokens.clone()).collect();
        tokens.sort_unstable();
        assert_eq!(tokens, (sinks..sinks + left).collect::<Vec<_>>(), "token {token}, head {kv_head}");
        assert!(clusters.iter().all(|cluster| (1..=page_tokens).contains(&cluster.tokens.len())));

        let queries: Vec<Vec<f64>> = (kv_head * group..(kv_head + 1) * group)
            .map(|of| head(&sequence.queries[0], token, query_heads, of, head_dim))
            .collect();
        let scale = 1.0 / (head_dim as f64).sqrt();
        let mut scores = vec![0.0; clusters.len()];
        for query in &queries {
            let logits: Vec<f64> = clusters.iter().map(|cluster| dot(query, &cluster.key) * scale).collect();
            let total: f64 = logits.iter().map(|logit| logit.exp()).sum();
            scores.iter_mut().zip(&logits).for_each(|(score, logit)| *score += logit.exp() / total);
        }
        let selected = run.pipeline.backend().selected(id, 0, kv_head).unwrap();
        let estimated = run.pipeline.backend().estimated(id, 0, kv_head).unwrap();
        let Budget::Tokens(budget) = method.budget else { panic!("tests give tokens") };
        let limit =
            if budget / page_tokens * page_tokens >= left { clusters.len() } else { budget / page_tokens };
        assert_eq!(selected.len(), limit.min(clusters.len()));
        let wanted = (clusters.len() as f32 * method.estimated) as usize;
        assert_eq!(estimated.len(), wanted.min(clusters.len() - selected.len()));
        assert!(selected.iter().all(|id| !estimated.contains(id)));
        // What is taken is at least as good as what is not, up to rounding.
        let class = |id: u32| if selected.contains(&id) { 2 } else { usize::from(estimated.contains(&id)) };
        for (a, b) in (0..clusters.len() as u32).flat_map(|a| (0..clusters.len() as u32).map(move |b| (a, b)))
        {
            let (better, worse) = (scores[a as usize], scores[b as usize]);
            assert!(class(a) <= class(b) || better >= worse * (1.0 - 1e-5), "token {token}: {a} before {b}");
        }
        counts = [counts[0] + clusters.len(), counts[1] + selected.len(), counts[2] + estimated.len()];

        for query in &queries {
            let mut softmax = Softmax::default();
            let read = selected.iter().flat_map(|id| clusters[*id as usize].tokens.clone());
            let steady = (0..sinks.min(token + 1)).chain((sinks + left).min(token + 1)..token + 1);
            for token in steady.chain(read) {
                let key = head(&sequence.keys[0], token, kv_heads, kv_head, head_dim);
                let value = head(&sequence.values[0], token, kv_heads, kv_head, head_dim);
                softmax.add(dot(query, &key) * scale, 1.0, value);
            }
            for id in estimated {
                let Cluster { tokens, key, value } = &clusters[*id as usize];
                let logit = dot(query, key) * scale;
                let exact: f64 = tokens
                    .iter()
                    .map(|token| dot(query, &head(&sequence.keys[0], *token, kv_heads, kv_head, head_dim)))
                    .map(|product| (product * scale).exp())
                    .sum();
                let estimate = tokens.len() as f64 * logit.exp();
                assert!(estimate <= exact * (1.0 + 1e-9), "an estimate is never above what it stands for");
                softmax.add(logit, tokens.len() as f64, value.clone());
            }
            expected.extend(softmax.output());
        }
    }
    close(out, &expected, TOLERANCE).unwrap_or_else(|off| panic!("{method:?}, token {token}: {off}"));
    counts
}

#[test]
fn clusters_selections_estimates_and_outputs_are_those_of_the_definition() {
    for (style, group) in [(Style::Random, 2), (Style::Peaked, 4), (Style::Uniform, 1)] {
        for (page_tokens, budget, estimated) in [(8, 64, 0.232), (4, 24, 0.0), (16, 32, 1.0)] {
            let shape = KvShape::new(1, 2 * group, 2, 16).unwrap();
            let method =
                RetroInfer { estimated, update: UPDATE, ..RetroInfer::new(Budget::Tokens(budget), STEADY) };
            // Prompts around the first and the second border, and generated ones across the next.
            for prompt in [0, 1, 142, 143, 144, 145, 300] {
                let sequence = Sequence::new(shape, style, prompt + 170, prompt as u64);
                let mut run = Setup::new(shape, page_tokens, method).start();
                let id = run.start(&sequence, prompt);
                let (mut most, mut selects) = ([0; 3], false);
                for token in prompt..sequence.tokens {
                    let outputs = run.step(&[id]).unwrap();
                    let counts = check_step(&run, id, &sequence, token, &outputs[0][0], &method);
                    (0..3).for_each(|at| most[at] = most[at].max(counts[at]));
                    selects |= counts[1] < counts[0];
                    run.pipeline.backend().check_tables();
                }
                assert!(most[0] > 0 && most[1] > 0 && selects, "nothing was tested: {most:?}");
                assert_eq!(most[2] > 0, estimated > 0.0);
            }
        }
    }
}

/// More clusters than a segment has page keys.
#[test]
fn summaries_of_several_segments_are_one_list() {
    let shape = KvShape::new(1, 2, 1, 16).unwrap();
    let method = RetroInfer { update: UPDATE, ..RetroInfer::new(Budget::Tokens(40), STEADY) };
    let sequence = Sequence::new(shape, Style::Random, 1301, 5);
    let mut run = Setup::new(shape, 2, method).start();
    let id = run.start(&sequence, 1300);
    let outputs = run.step(&[id]).unwrap();
    let [partitions, ..] = check_step(&run, id, &sequence, 1300, &outputs[0][0], &method);
    assert!(partitions > 512, "{partitions}");
}

#[test]
fn estimates_bring_outputs_nearer_to_dense_ones() {
    let shape = KvShape::new(1, 4, 2, 16).unwrap();
    let sequence = Sequence::new(shape, Style::Uniform, 401, 9);
    let error = |estimated| {
        let method = RetroInfer { estimated, update: UPDATE, ..RetroInfer::new(Budget::Tokens(32), STEADY) };
        let mut run = Setup::new(shape, 8, method).start();
        let id = run.start(&sequence, 400);
        let outputs = run.step(&[id]).unwrap();
        let dense = sequence.attention(0, 400, &vec![(0..401).collect(); 2]);
        outputs[0][0].iter().zip(&dense).map(|(x, y)| (f64::from(*x) - y).powi(2)).sum::<f64>().sqrt()
    };
    let [none, some, all] = [0.0, 0.232, 1.0].map(error);
    // Keys so small that all tokens weigh alike: means lose nothing.
    assert!(some < 0.95 * none && all < 0.05 * none, "{none} {some} {all}");
}

#[test]
fn what_it_cannot_be_is_refused() {
    let shape = KvShape::new(1, 2, 1, 16).unwrap();
    let layout = *Setup::new(shape, 8, RetroInfer::new(Budget::Tokens(256), STEADY))
        .start()
        .pipeline
        .config()
        .layout();
    let of = |method: RetroInfer| KvConfig::new(shape, layout, Arc::new(method)).unwrap_err();
    let method = RetroInfer::new(Budget::Tokens(256), STEADY);
    for (method, reason) in [
        (RetroInfer { update: 200, ..method }, "a multiple of 128"),
        (RetroInfer { estimated: 1.5, ..method }, "from 0 to 1"),
    ] {
        let error = of(method);
        assert!(
            matches!(&error, Error::InvalidMethod { reason: found, .. } if found.contains(reason)),
            "{error}"
        );
    }
    let error = of(RetroInfer { update: 0, ..method });
    assert!(matches!(error, Error::PageSizeDoesNotDivide { partition_tokens: 0, .. }), "{error}");
}
