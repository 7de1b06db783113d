//! The cache, the cut of a prompt and the page type change what they should, and nothing else.

use spinkv::algorithms::{Dense, ShadowKv};
use spinkv::memory::KvDtype;
use spinkv::pipeline::Budget;
use spinkv_tests::small::{SPARSE, STEADY, alone, sequence, setups, shape};
use spinkv_tests::{Layers, Run, Sequence, Setup, Style, close};

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
