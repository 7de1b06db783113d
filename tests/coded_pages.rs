//! Host pages in codes of one byte, against attention by its definition over elements that are rounded by theirs.

use std::sync::Arc;

use spinkv::algorithms::{Quest, RetroInfer, ShadowKv};
use spinkv::memory::{HostFormat, HostLayout, KvDtype, PageLayout, SUMMARY_ELEMENT_BYTES, footprint};
use spinkv::pipeline::{Budget, Method};
use spinkv::{Error, KvConfig};
use spinkv_tests::small::{SPARSE, STEADY, low_rank, shape};
use spinkv_tests::{Sequence, Setup, Style, close};

const FORMATS: [&str; 2] = ["fp8", "int8"];

fn format(name: &str) -> HostFormat {
    name.parse().unwrap()
}

/// The numbers from 0 on that a code has, ascending.
fn numbers(name: &str) -> Vec<f64> {
    if name == "int8" {
        return (0..=127).map(f64::from).collect();
    }
    let subnormal = (0..8).map(|m| f64::from(m) / 8.0 / 64.0);
    let normal = (-6..=8).flat_map(|e| (0..8).map(move |m| (1.0 + f64::from(m) / 8.0) * f64::from(e).exp2()));
    let mut all: Vec<f64> = subnormal.chain(normal).collect();
    // The last one's code is the NaN.
    assert_eq!(all.pop(), Some(480.0));
    all
}

/// Rounds the elements at `places` as one half of a page: to the nearest of the code's numbers, ties to even, times a power of two.
fn round(numbers: &[f64], elements: &mut [f32], places: impl Iterator<Item = usize> + Clone) {
    let greatest = places.clone().map(|at| f64::from(elements[at].abs())).fold(0.0, f64::max);
    let mut scale = 1.0;
    while greatest > scale * numbers.last().unwrap() {
        scale *= 2.0;
    }
    while greatest > 0.0 && greatest <= scale / 2.0 * numbers.last().unwrap() {
        scale /= 2.0;
    }
    for at in places {
        let size = f64::from(elements[at].abs()) / scale;
        let above = numbers.partition_point(|number| *number < size).min(numbers.len() - 1);
        let below = above.saturating_sub(1);
        let (up, down) = (numbers[above] - size, size - numbers[below]);
        let nearest = if up < down || (up == down && above % 2 == 0) { above } else { below };
        elements[at] = (numbers[nearest] * scale).copysign(f64::from(elements[at])) as f32;
    }
}

/// The sequence with the keys and values of all pages that are full at its end as they are read.
fn rounded(sequence: &Sequence, name: &str, page_tokens: usize) -> Sequence {
    let (numbers, mut sequence) = (numbers(name), sequence.clone());
    let (kv_heads, head_dim) = (sequence.shape.kv_heads, sequence.shape.head_dim);
    for tensor in sequence.keys.iter_mut().chain(&mut sequence.values) {
        for page in 0..sequence.tokens / page_tokens {
            for kv_head in 0..kv_heads {
                let places = (page * page_tokens..(page + 1) * page_tokens).flat_map(|token| {
                    (0..head_dim).map(move |i| (token * kv_heads + kv_head) * head_dim + i)
                });
                round(&numbers, tensor, places);
            }
        }
    }
    sequence
}

/// Full pages read as their codes say, wherever they are: steady, cached or fetched; a page that is not full, as it came.
#[test]
fn full_pages_are_read_as_their_codes_say_and_others_as_they_came() {
    let methods: [(Arc<dyn Method>, usize); 4] = [
        (Arc::new(SPARSE), 8),
        (Arc::new(ShadowKv { outliers: 3, ..SPARSE }), 4),
        (Arc::new(SPARSE), 1),
        (Arc::new(Quest::new(Budget::Tokens(48), STEADY)), 16),
    ];
    for (name, (method, page_tokens)) in
        FORMATS.iter().flat_map(|name| methods.iter().map(move |method| (*name, method)))
    {
        let setup = Setup { method: method.clone(), ..Setup::new(shape(), *page_tokens, SPARSE) };
        let setup = Setup { format: format(name), buffering: 0.5, ..setup };
        for prompt in [61, 90, 200] {
            let sequence = Sequence::new(shape(), Style::Random, prompt + 90, prompt as u64);
            let near = rounded(&sequence, name, *page_tokens);
            let width = shape().kv_heads * shape().head_dim;
            let mut run = setup.start();
            let id = run.start(&sequence, prompt);
            let mut moved = 0.0_f64;
            for token in prompt..sequence.tokens {
                let outputs = run.step(&[id]).unwrap();
                let full = (token + 1) / page_tokens * page_tokens;
                let map = run.pipeline.config().partition_map().clone();
                let zones = run.pipeline.config().zones(token + 1);
                let selected = run.selected(id);
                for (layer, output) in outputs[0].iter().enumerate() {
                    let mut mixed = near.clone();
                    mixed.keys[layer][full * width..].copy_from_slice(&sequence.keys[layer][full * width..]);
                    mixed.values[layer][full * width..]
                        .copy_from_slice(&sequence.values[layer][full * width..]);
                    let seen: Vec<Vec<usize>> = selected[2 * layer..][..2]
                        .iter()
                        .map(|ids| {
                            let mut pages = Vec::new();
                            map.expand(ids, &mut pages);
                            let read = |at: &usize| {
                                !zones.retrievable.contains(at)
                                    || pages.iter().any(|page| page.key as usize == at / page_tokens)
                            };
                            (0..=token).filter(read).collect()
                        })
                        .collect();
                    let expected = mixed.attention(layer, token, &seen);
                    close(output, &expected, 2e-5)
                        .unwrap_or_else(|off| panic!("{name}, {method:?}, token {token}, {layer}: {off}"));
                    let exact = sequence.attention(layer, token, &seen);
                    let off = expected.iter().zip(&exact).map(|(a, b)| (a - b).abs());
                    moved = moved.max(off.fold(0.0, f64::max));
                }
            }
            assert!(moved > 1e-3, "{name} loses something: {moved}");
            assert!(run.audit(id) > 0);
            run.pipeline.backend().check_tables();
            let counters = run.pipeline.counters();
            assert!(counters.misses > 0 && counters.adopted_pages > 0, "{counters:?}");
        }
    }
}

/// As without codes: not by a bit.
#[test]
fn the_size_of_the_cache_changes_nothing() {
    for (name, dtype) in
        FORMATS.iter().flat_map(|name| [KvDtype::F32, KvDtype::Bf16].map(|dtype| (name, dtype)))
    {
        let setup = Setup { dtype, format: format(name), ..Setup::new(shape(), 4, SPARSE) };
        let sequence = Sequence::new(shape(), Style::Peaked, 400, 5);
        let outputs = [0.0, 0.7, 100.0].map(|buffering| {
            let mut run = Setup { buffering, ..setup.clone() }.start();
            let id = run.start(&sequence, 250);
            (run.generate(id, 150), run.pipeline.counters().misses)
        });
        assert!(outputs[0].0 == outputs[1].0 && outputs[1].0 == outputs[2].0, "{name} {dtype:?}");
        assert!(outputs[0].1 > outputs[2].1, "caches of different use");
    }
}

#[test]
fn hosts_hold_a_byte_an_element_and_scales() {
    for page_tokens in [1, 4, 8] {
        let full = Setup { dtype: KvDtype::Bf16, ..Setup::new(shape(), page_tokens, SPARSE) };
        let coded = Setup { format: format("fp8"), ..full.clone() };
        let sequence = Sequence::new(shape(), Style::Random, 700, 7);
        let usage = [&full, &coded].map(|setup| {
            let mut run = setup.start();
            let id = run.start(&sequence, 600);
            run.generate(id, 20);
            let (config, plan) = (run.pipeline.config().clone(), *run.pipeline.admitted(id).unwrap());
            let usage = run.pipeline.usage();
            assert_eq!(usage, footprint(&config, &plan, 620, SUMMARY_ELEMENT_BYTES));
            let host = run.pipeline.backend().host_page(id, 1, 1, 3).unwrap();
            assert_eq!(host.len() * 16, config.host_layout().page_bytes());
            usage
        });
        let page_bytes = 2 * page_tokens * shape().head_dim;
        assert_eq!(
            usage[0].host.pages / (2 * page_bytes as u64),
            usage[1].host.pages / (page_bytes + 16) as u64
        );
        assert_eq!(usage[0].gpu, usage[1].gpu);
    }
}

#[test]
fn methods_whose_pages_are_not_kept_so_are_refused() {
    let refused = |method: Arc<dyn Method>| {
        let layout = PageLayout::new(8, 16, KvDtype::Bf16).unwrap();
        KvConfig::new(shape(), HostLayout::new(layout, format("int8")).unwrap(), method).unwrap_err()
    };
    let clusters = refused(Arc::new(RetroInfer::new(Budget::Tokens(64), STEADY)));
    assert!(
        matches!(&clusters, Error::InvalidMethod { reason, .. } if reason.contains("int8")),
        "{clusters}"
    );
    let layout = PageLayout::new(8, 16, KvDtype::Bf16).unwrap();
    let values = HostLayout::new(layout, HostFormat::Values).unwrap();
    let alone = KvConfig::new(shape(), values, Arc::new(SPARSE)).unwrap_err();
    assert!(
        matches!(&alone, Error::InvalidMethod { reason, .. } if reason.contains("values alone")),
        "{alone}"
    );
    let low_rank = refused(Arc::new(low_rank(SPARSE, 8, 16)));
    assert!(
        matches!(&low_rank, Error::InvalidMethod { reason, .. } if reason.contains("low rank")),
        "{low_rank}"
    );
}
