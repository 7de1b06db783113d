//! A method from outside the crate, with an Index and a Select of its own, through the public face only.

use spinkv::memory::{KvDtype, PageLayout};
use spinkv::partition::PartitionKind;
use spinkv::pipeline::{
    Always, Budget, Candidates, GroupMerge, Index, Method, Partition, PartitionScore, Pick, Select,
    SteadyZone, Summarize,
};
use spinkv::{Error, KvConfig, KvShape};
use spinkv_tests::{Sequence, Setup, Style, close, dense_reference};

/// Quest-like (arXiv 2406.10774): a chunk is known by the least and the greatest value of each key element, which
/// bound its dot products with any query from above; the chunks with the greatest bounds are read.
#[derive(Clone, Copy, Debug)]
struct Bounds {
    chunk: usize,
    budget: Budget,
    steady: SteadyZone,
}

impl Method for Bounds {
    fn name(&self) -> &str {
        "bounds"
    }
    fn partition(&self) -> PartitionKind {
        PartitionKind::Chunk { tokens: self.chunk }
    }
    fn index(&self) -> Index<'_> {
        Index::Custom(self)
    }
    fn select(&self) -> Select<'_> {
        Select::Custom { picker: self, budget: self.budget }
    }
    fn steady(&self) -> SteadyZone {
        self.steady
    }
}

impl Summarize for Bounds {
    fn width(&self, head_dim: usize) -> usize {
        2 * head_dim
    }

    fn summarize(&self, partition: &Partition<'_>, summary: &mut [f32]) {
        let Partition { head_dim, keys, .. } = *partition;
        assert_eq!((keys.len(), summary.len()), (self.chunk * head_dim, 2 * head_dim));
        let (least, greatest) = summary.split_at_mut(head_dim);
        least.fill(f32::INFINITY);
        greatest.fill(f32::NEG_INFINITY);
        for key in keys.chunks_exact(head_dim) {
            for (element, value) in key.iter().enumerate() {
                least[element] = least[element].min(*value);
                greatest[element] = greatest[element].max(*value);
            }
        }
    }
}

impl Pick for Bounds {
    fn pick(&self, candidates: &Candidates<'_>, ids: &mut Vec<u32>) {
        let Candidates { queries, head_dim, summaries, count, limit, .. } = *candidates;
        assert_eq!(summaries.len(), count * 2 * head_dim);
        let bound = |summary: &[f32]| {
            let (least, greatest) = summary.split_at(head_dim);
            let of_query = |query: &[f32]| -> f32 {
                let ends = least.iter().zip(greatest);
                query.iter().zip(ends).map(|(q, (least, greatest))| (q * least).max(q * greatest)).sum()
            };
            queries.chunks_exact(head_dim).map(of_query).fold(f32::NEG_INFINITY, f32::max)
        };
        let bounds: Vec<f32> = summaries.chunks_exact(2 * head_dim).map(bound).collect();
        let mut order: Vec<usize> = (0..count).collect();
        order.sort_by(|a, b| bounds[*b].total_cmp(&bounds[*a]));
        ids.extend(order[..limit].iter().map(|index| candidates.first + *index as u32));
        ids.sort_unstable();
    }
}

const STEADY: SteadyZone = SteadyZone { sinks: 2, window: 20 };

#[test]
fn at_full_budget_it_is_dense_attention() {
    let shape = KvShape::new(1, 8, 2, 24).unwrap();
    for (chunk, page_tokens) in [(16, 4), (4, 4), (6, 2), (5, 1)] {
        let method = Bounds { chunk, budget: Budget::Fraction(1.0), steady: STEADY };
        for prompt in [1, 40, 100] {
            let sequence = Sequence::new(shape, Style::Random, prompt + 80, chunk as u64);
            let mut run = Setup::new(shape, page_tokens, method).start();
            let id = run.start(&sequence, prompt);
            for token in prompt..sequence.tokens {
                let out = run.generate(id, 1).remove(0).remove(0);
                let seen = 0..token + 1;
                let expected = dense_reference(
                    &shape,
                    token,
                    sequence.queries(0, token..token + 1),
                    sequence.keys(0, seen.clone()),
                    sequence.values(0, seen),
                );
                close(&out, &expected, 1e-5).unwrap_or_else(|off| panic!("{method:?}, token {token}: {off}"));
            }
        }
    }
}

/// The bound of a chunk for one KV head, from the keys themselves.
fn bound(
    sequence: &Sequence,
    dtype: KvDtype,
    token: usize,
    kv_head: usize,
    chunk: usize,
    size: usize,
) -> f64 {
    let KvShape { query_heads, kv_heads, head_dim, .. } = sequence.shape;
    let queries = sequence.queries(0, token..token + 1);
    let group = query_heads / kv_heads;
    let mut highest = f64::NEG_INFINITY;
    for head in kv_head * group..(kv_head + 1) * group {
        let mut sum = 0.0;
        for element in 0..head_dim {
            let query = f64::from(queries[head * head_dim + element]);
            let products = (chunk * size..(chunk + 1) * size).map(|token| {
                let key = sequence.keys[0][(token * kv_heads + kv_head) * head_dim + element];
                // Round to nearest even, by hand.
                let bits = key.to_bits();
                let rounded = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff_0000;
                let key = if dtype == KvDtype::Bf16 { f32::from_bits(rounded) } else { key };
                query * f64::from(key)
            });
            sum += products.fold(f64::NEG_INFINITY, f64::max);
        }
        highest = highest.max(sum);
    }
    highest
}

#[test]
fn at_a_small_budget_it_reads_the_chunks_with_the_greatest_bounds() {
    let shape = KvShape::new(1, 6, 2, 16).unwrap();
    for (dtype, page_tokens) in [(KvDtype::F32, 4), (KvDtype::Bf16, 2), (KvDtype::F32, 12)] {
        let (chunk, prompt) = (12, 70);
        let method = Bounds { chunk, budget: Budget::Tokens(40), steady: STEADY };
        let sequence = Sequence::new(shape, Style::Random, 250, 5);
        let setup = Setup { dtype, buffering: 0.3, ..Setup::new(shape, page_tokens, method) };
        let mut run = setup.start();
        let id = run.start(&sequence, prompt);
        for token in prompt..sequence.tokens {
            let out = run.generate(id, 1).remove(0).remove(0);
            run.audit(id);
            // Chunk 0 holds the sinks; the others leave when 20 tokens lie behind them.
            let end = (token + 1 - 20) / chunk;
            let mut seen = Vec::new();
            for (kv_head, selected) in run.selected(id).into_iter().enumerate() {
                let mut best: Vec<usize> = (1..end).collect();
                best.sort_by(|a, b| {
                    let [a, b] =
                        [a, b].map(|chunk| bound(&sequence, dtype, token, kv_head, *chunk, method.chunk));
                    b.total_cmp(&a)
                });
                best.truncate(3);
                best.sort();
                let selected: Vec<_> = selected.into_iter().map(|id| id as usize).collect();
                assert_eq!(selected, best, "token {token}, KV head {kv_head}");
                let tokens = best.iter().flat_map(|best| best * chunk..(best + 1) * chunk);
                seen.push((0..chunk).chain(tokens).chain(end * chunk..token + 1).collect());
            }
            let expected = sequence.attention(0, token, &seen);
            let tolerance = if dtype == KvDtype::F32 { 1e-5 } else { 2e-2 };
            close(&out, &expected, tolerance).unwrap_or_else(|off| panic!("token {token}: {off}"));
        }
        let counters = run.pipeline.counters();
        assert!(counters.misses > 0 && counters.hits > 0 && counters.evicted_pages > 0, "{counters:?}");
    }
}

#[test]
fn a_planted_key_is_found_far_outside_the_window() {
    let shape = KvShape::new(1, 4, 2, 16).unwrap();
    let method = Bounds { chunk: 8, budget: Budget::Tokens(24), steady: STEADY };
    for needle in [8, 100, 321, 450] {
        let mut sequence = Sequence::new(shape, Style::Random, 501, 5);
        // All elements of the needle's key are 4, of the last queries 3: no other key is near.
        sequence.keys[0][needle * 32..(needle + 1) * 32].fill(4.0);
        sequence.queries[0][500 * 64..].fill(3.0);
        let mut run = Setup::new(shape, 8, method).start();
        let id = run.start(&sequence, 500);
        let out = run.generate(id, 1).remove(0).remove(0);
        for row in run.selected(id) {
            assert!(row.contains(&(needle as u32 / 8)), "{needle} is not among {row:?}");
        }
        let value = |head: usize, element| sequence.values[0][(needle * 2 + head / 2) * 16 + element];
        let expected: Vec<_> = (0..4)
            .flat_map(|head| (0..16).map(move |i| (head, i)))
            .map(|(h, i)| f64::from(value(h, i)))
            .collect();
        close(&out, &expected, 1e-3).unwrap();
    }
}

/// A declarative method whose Index does not make what its Select reads.
#[derive(Debug)]
struct Mismatched {
    index: Index<'static>,
    score: PartitionScore,
}

impl Method for Mismatched {
    fn name(&self) -> &str {
        "mismatched"
    }
    fn partition(&self) -> PartitionKind {
        PartitionKind::Chunk { tokens: 8 }
    }
    fn index(&self) -> Index<'_> {
        self.index
    }
    fn select(&self) -> Select<'_> {
        Select::TopK { score: self.score, merge: GroupMerge::Max, budget: Budget::Tokens(512) }
    }
}

/// Has outliers, and no best ones beside which they would be read.
#[derive(Debug)]
struct AlwaysAlone;

impl Method for AlwaysAlone {
    fn name(&self) -> &str {
        "always-alone"
    }
    fn partition(&self) -> PartitionKind {
        PartitionKind::Chunk { tokens: 8 }
    }
    fn index(&self) -> Index<'_> {
        Index::MeanKey
    }
    fn select(&self) -> Select<'_> {
        Select::Nothing
    }
    fn always(&self) -> Always {
        Always::Outliers { partitions: 1 }
    }
}

#[test]
fn a_method_whose_numbers_cannot_work_is_refused_before_it_runs() {
    let shape = KvShape::new(1, 4, 2, 16).unwrap();
    let refused = |page_tokens: usize, method: std::sync::Arc<dyn Method>| {
        let layout = PageLayout::new(page_tokens, 16, KvDtype::F32).unwrap();
        KvConfig::new(shape, layout, method).unwrap_err()
    };
    let method = Bounds { chunk: 12, budget: Budget::Tokens(40), steady: STEADY };
    let error = refused(8, std::sync::Arc::new(method));
    let expected =
        Error::PageSizeDoesNotDivide { method: "bounds".into(), page_tokens: 8, partition_tokens: 12 };
    assert_eq!(error, expected);
    let error = refused(4, std::sync::Arc::new(Bounds { budget: Budget::Tokens(21), ..method }));
    assert_eq!(error, Error::BudgetBelowSteady { budget: 21, steady: 22, sinks: 2, window: 20 });
    let error = refused(4, std::sync::Arc::new(Bounds { budget: Budget::Fraction(1.5), ..method }));
    assert!(matches!(error, Error::InvalidBudget { .. }), "{error}");
    let steady = SteadyZone { sinks: 2, window: 0 };
    assert_eq!(refused(4, std::sync::Arc::new(Bounds { steady, ..method })), Error::WindowZero);
    let (dot_product, bound) = (PartitionScore::DotProduct, PartitionScore::Bound);
    for (index, score, found, expected) in [
        (Index::Nothing, dot_product, 0, 16),
        (Index::KeyBounds, dot_product, 32, 16),
        (Index::Nothing, bound, 0, 32),
        (Index::MeanKey, bound, 16, 32),
    ] {
        let error = refused(8, std::sync::Arc::new(Mismatched { index, score }));
        assert!(matches!(error, Error::InvalidMethod { .. }), "{error}");
        let text = error.to_string();
        assert!(
            text.contains(&format!("of {expected} elements")) && text.ends_with(&format!("makes {found}")),
            "{text}"
        );
    }
    let error = refused(8, std::sync::Arc::new(AlwaysAlone));
    assert!(
        matches!(error, Error::InvalidMethod { .. }) && error.to_string().contains("Outliers"),
        "{error}"
    );
}
