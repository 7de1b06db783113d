//! Keys kept in low rank, against the best subspace found another way and attention by its definition.

use std::sync::Arc;

use spinkv::algorithms::{Dense, LowRankKeys, MethodOptions, OwnOptions, ShadowKv, by_name};
use spinkv::memory::{KvDtype, MemoryLimits, PageLayout, SUMMARY_ELEMENT_BYTES, footprint};
use spinkv::pipeline::{Budget, LowRank, Method, SteadyZone};
use spinkv::{Error, KvConfig, KvShape, Rotary};
use spinkv_tests::small::{SPARSE, STEADY, low_rank, rotary, shape};
use spinkv_tests::{Sequence, Setup, Style, close};

const RANK: usize = 12;

/// Turns a head to `position` (or back, for a negative direction), in f64.
fn turn(rotary: &Rotary, head: &mut [f64], position: usize, direction: f64) {
    let half = head.len() / 2;
    for i in 0..half {
        let angle = f64::from(position as f32 * rotary.frequencies()[i]);
        let (sine, cosine) = (direction * angle.sin(), angle.cos());
        let (a, b) = (head[i], head[i + half]);
        (head[i], head[i + half]) = (a * cosine - b * sine, b * cosine + a * sine);
    }
}

/// A sequence whose keys, turned back, have `strong` directions of variance 1 and others of a twentieth.
fn sequence(shape: KvShape, strong: usize, tokens: usize, seed: u64) -> Sequence {
    let mut sequence = Sequence::new(shape, Style::Random, tokens, seed);
    let rotary = rotary(shape.head_dim);
    let width = shape.kv_heads * shape.head_dim;
    for (layer, keys) in sequence.keys.iter_mut().enumerate() {
        let directions = Sequence::new(shape, Style::Random, width, 100 + layer as u64).keys.swap_remove(0);
        for (token, keys) in keys.chunks_exact_mut(width).enumerate() {
            let mut plain = vec![0.0; width];
            for (at, direction) in directions.chunks_exact(width).enumerate() {
                let weight = if at < strong { 0.3 } else { 0.015 } * f64::from(keys[at]);
                plain.iter_mut().zip(direction).for_each(|(sum, of)| *sum += weight * f64::from(*of));
            }
            plain.chunks_exact_mut(shape.head_dim).for_each(|head| turn(&rotary, head, token, 1.0));
            keys.iter_mut().zip(plain).for_each(|(key, plain)| *key = plain as f32);
        }
    }
    sequence
}

/// The eigenvectors of a symmetric matrix, those of the greatest eigenvalues first: cyclic Jacobi, which shares nothing with the iteration.
fn eigenvectors(matrix: &[f64], n: usize) -> Vec<Vec<f64>> {
    let (mut a, mut vectors) = (matrix.to_vec(), vec![0.0; n * n]);
    (0..n).for_each(|i| vectors[i * n + i] = 1.0);
    for _ in 0..30 {
        for (p, q) in (0..n).flat_map(|p| (p + 1..n).map(move |q| (p, q))) {
            if a[p * n + q] == 0.0 {
                continue;
            }
            let theta = (a[q * n + q] - a[p * n + p]) / (2.0 * a[p * n + q]);
            let t = theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt());
            let c = 1.0 / (t * t + 1.0).sqrt();
            let s = t * c;
            let rotate = |x: &mut f64, y: &mut f64| (*x, *y) = (c * *x - s * *y, s * *x + c * *y);
            for k in 0..n {
                let (mut x, mut y) = (a[k * n + p], a[k * n + q]);
                rotate(&mut x, &mut y);
                (a[k * n + p], a[k * n + q]) = (x, y);
            }
            for k in 0..n {
                let (mut x, mut y) = (a[p * n + k], a[q * n + k]);
                rotate(&mut x, &mut y);
                (a[p * n + k], a[q * n + k]) = (x, y);
                let (mut x, mut y) = (vectors[p * n + k], vectors[q * n + k]);
                rotate(&mut x, &mut y);
                (vectors[p * n + k], vectors[q * n + k]) = (x, y);
            }
        }
    }
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|i, j| a[j * n + j].total_cmp(&a[i * n + i]));
    order.into_iter().map(|i| vectors[i * n..][..n].to_vec()).collect()
}

/// All keys of a layer as they are read once they have left the steady zone: projected onto the best subspace of the prompt's.
fn projected(sequence: &Sequence, layer: usize, prompt: usize, rank: usize) -> Vec<f32> {
    let KvShape { kv_heads, head_dim, .. } = sequence.shape;
    let (rotary, width) = (rotary(head_dim), kv_heads * head_dim);
    let mut plain: Vec<f64> = sequence.keys[layer].iter().map(|key| f64::from(*key)).collect();
    for (token, keys) in plain.chunks_exact_mut(width).enumerate() {
        keys.chunks_exact_mut(head_dim).for_each(|head| turn(&rotary, head, token, -1.0));
    }
    let mut gram = vec![0.0; width * width];
    for key in plain[..prompt * width].chunks_exact(width) {
        (0..width * width).for_each(|at| gram[at] += key[at / width] * key[at % width]);
    }
    let basis = eigenvectors(&gram, width);
    for (token, keys) in plain.chunks_exact_mut(width).enumerate() {
        let mut sum = vec![0.0; width];
        for vector in &basis[..rank] {
            let dot: f64 = keys.iter().zip(vector).map(|(a, b)| a * b).sum();
            sum.iter_mut().zip(vector).for_each(|(sum, element)| *sum += dot * element);
        }
        keys.copy_from_slice(&sum);
        keys.chunks_exact_mut(head_dim).for_each(|head| turn(&rotary, head, token, 1.0));
    }
    plain.into_iter().map(|key| key as f32).collect()
}

/// Whether chunk `chunk` of 8 is in the steady zone of a row of `tokens` tokens.
fn is_steady(chunk: usize, tokens: usize, steady: SteadyZone) -> bool {
    8 * chunk < steady.sinks || 8 * (chunk + 1) + steady.window > tokens
}

/// Steady tokens are read as they came; what was selected, as the best subspace has it: of the prompt, and of what is generated after it.
#[test]
fn what_is_read_is_the_prompts_best_subspace_beside_the_steady_zone() {
    for (page_tokens, prompt, outliers) in [(8, 90, 0), (4, 200, 3), (1, 61, 0), (8, 130, 2)] {
        let method = low_rank(ShadowKv { outliers, ..SPARSE }, RANK, 16);
        let setup = Setup { buffering: 0.5, ..Setup::new(shape(), page_tokens, method) };
        let sequence = sequence(shape(), RANK, prompt + 90, prompt as u64);
        let width = shape().kv_heads * shape().head_dim;
        let mut run = setup.start();
        let id = run.start(&sequence, prompt);
        let near: Vec<_> = (0..2).map(|layer| projected(&sequence, layer, prompt, RANK)).collect();
        let mut moved = 0.0_f64;
        for token in prompt..sequence.tokens {
            let outputs = run.step(&[id]).unwrap();
            let selected = run.selected(id);
            for (layer, output) in outputs[0].iter().enumerate() {
                let mut mixed = sequence.clone();
                for chunk in (0..=token / 8).filter(|chunk| !is_steady(*chunk, token + 1, STEADY)) {
                    let keys = 8 * chunk * width..8 * (chunk + 1) * width;
                    mixed.keys[layer][keys.clone()].copy_from_slice(&near[layer][keys]);
                }
                let seen: Vec<Vec<usize>> = selected[2 * layer..][..2]
                    .iter()
                    .map(|ids| {
                        let chunks = (0..=token / 8).filter(|chunk| {
                            is_steady(*chunk, token + 1, STEADY) || ids.contains(&(*chunk as u32))
                        });
                        chunks
                            .flat_map(|chunk| 8 * chunk..8 * (chunk + 1))
                            .filter(|at| *at <= token)
                            .collect()
                    })
                    .collect();
                let expected = mixed.attention(layer, token, &seen);
                close(output, &expected, 2e-5)
                    .unwrap_or_else(|off| panic!("pages of {page_tokens}, token {token}, {layer}: {off}"));
                let exact = sequence.attention(layer, token, &seen);
                let off = expected.iter().zip(&exact).map(|(a, b)| (a - b).abs());
                moved = moved.max(off.fold(0.0, f64::max));
            }
        }
        assert!(moved > 1e-3, "the rank loses something: {moved}");
        assert!(run.audit(id) > 0);
        run.pipeline.backend().check_tables();
        let counters = run.pipeline.counters();
        assert!(counters.misses > 0 && counters.adopted_pages > 0, "{counters:?}");
    }
}

#[test]
fn hosts_hold_values_alone_and_the_factors_are_counted() {
    for page_tokens in [1, 4, 8] {
        let full = Setup { dtype: KvDtype::Bf16, ..Setup::new(shape(), page_tokens, SPARSE) };
        let low = Setup { method: Arc::new(low_rank(SPARSE, RANK, 16)), ..full.clone() };
        let sequence = sequence(shape(), RANK, 700, 7);
        let usage = [&full, &low].map(|setup| {
            let mut run = setup.start();
            let id = run.start(&sequence, 600);
            run.generate(id, 20);
            let (config, plan) = (run.pipeline.config().clone(), *run.pipeline.admitted(id).unwrap());
            let usage = run.pipeline.usage();
            assert_eq!(usage, footprint(&config, &plan, 620, SUMMARY_ELEMENT_BYTES));
            let host = run.pipeline.backend().host_page(id, 1, 1, 3).unwrap();
            let layout = PageLayout::new(page_tokens, 16, KvDtype::Bf16).unwrap();
            let mut page = vec![0; layout.page_words()];
            page[layout.page_words() - host.len()..].copy_from_slice(&host);
            let mut value = [0.0; 16];
            layout.read_value(&page, 0, &mut value);
            let of_token = &sequence.values[1][(3 * page_tokens * 2 + 1) * 16..][..16];
            assert_eq!(value.to_vec(), of_token.iter().map(|v| KvDtype::Bf16.round(*v)).collect::<Vec<_>>());
            assert_eq!(host.len() * 16, config.host_layout().page_bytes());
            usage
        });
        assert_eq!(usage[0].host.pages, 2 * usage[1].host.pages);
        assert_eq!(usage[0].gpu.key_factors(), 0);
        // Two layers: coefficients of the tokens of each segment of 512 pages, and a basis.
        let segments = 620_usize.div_ceil(512 * page_tokens).max(1);
        let coefficients = 2 * segments * 512 * page_tokens * RANK * 4;
        assert_eq!(usage[1].gpu.key_coefficients, coefficients as u64);
        assert_eq!(usage[1].gpu.key_bases, (2 * RANK * 32 * 4) as u64);
    }
}

#[test]
fn ranks_and_embeddings_that_do_not_fit_are_refused_by_name() {
    let config = |method: LowRankKeys| {
        let layout = PageLayout::new(8, 16, KvDtype::F32).unwrap();
        KvConfig::new(shape(), layout, Arc::new(method)).map(|_| ())
    };
    assert_eq!(config(low_rank(SPARSE, 32, 16)), Ok(()));
    for rank in [0, 33, 160] {
        assert_eq!(config(low_rank(SPARSE, rank, 16)), Err(Error::KeyRank { rank, limit: 32 }));
    }
    let refused = config(low_rank(SPARSE, 8, 24)).unwrap_err();
    assert_eq!(refused, Error::GateRotary { of: "the model", expected: 16, found: 24 });
    let clusters = spinkv::algorithms::RetroInfer::new(Budget::Tokens(64), STEADY);
    let refused = config(low_rank(clusters, 8, 16)).unwrap_err();
    assert!(matches!(refused, Error::InvalidMethod { .. }), "{refused}");
}

#[test]
fn options_choose_how_keys_are_kept() {
    let with = |options: &[&str], rotary: Option<Arc<Rotary>>| {
        let mut own = OwnOptions::default();
        options.iter().for_each(|option| own.add(option).unwrap());
        by_name("shadowkv", &MethodOptions { own, rotary, ..MethodOptions::default() })
            .map(|method| format!("{method:?}"))
    };
    for (options, part) in [
        (&["keys=low-rank"][..], "rank: 160"),
        (&["rank=24"], "rank: 24"),
        (&["keys=low-rank", "rank=7", "outliers=2"], "rank: 7"),
    ] {
        let method = with(options, Some(rotary(16))).unwrap();
        assert!(method.contains(part), "{method}");
        assert_eq!(with(options, None), Err(Error::NoRotary { method: "shadowkv".to_owned() }));
    }
    for options in [&[][..], &["keys=full"], &["outliers=0"]] {
        assert!(!with(options, None).unwrap().contains("rank"));
    }
    for (options, expected) in [
        (&["keys=half"][..], ("keys", "half")),
        (&["keys=full", "rank=8"], ("keys", "full")),
        (&["rank=0"], ("rank", "0")),
        (&["rank=all"], ("rank", "all")),
    ] {
        match with(options, Some(rotary(16))).unwrap_err() {
            Error::InvalidMethodOption { option, value, .. } => assert_eq!((option, &*value), expected),
            other => panic!("{other}"),
        }
    }
}

/// One key that is no number would be in every factor of the layer: its request fails, by name, and the others go on.
#[test]
fn a_prompt_with_a_key_that_is_not_finite_fails_alone() {
    let setup = Setup::new(shape(), 8, low_rank(SPARSE, RANK, 16));
    let good = sequence(shape(), RANK, 150, 1);
    let mut bad = good.clone();
    bad.keys[1][77 * 32 + 3] = f32::INFINITY;
    let alone = {
        let mut run = setup.start();
        let id = run.start(&good, 100);
        run.generate(id, 20)
    };
    let mut run = setup.start();
    let (first, second) = (run.start(&good, 100), run.admit(&bad).unwrap());
    let refused = run.prompt(second, 100, 100).unwrap_err();
    assert_eq!(refused, Error::KeyNotFinite { request: second, layer: 1, token: 77 });
    assert_eq!(run.step(&[second]).unwrap_err(), Error::RequestFailed(second));
    run.pipeline.release(second);
    assert_eq!(run.generate(first, 20), alone);
    run.pipeline.release(first);
    spinkv_tests::small::assert_all_returned(&run);
}

/// Layers that read everything fetch what they do not hold, too.
#[test]
fn dense_attention_at_full_rank_is_what_it_was() {
    let dense = Dense { steady: STEADY };
    let sequence = sequence(shape(), 32, 220, 5);
    let outputs = [
        Setup::new(shape(), 8, dense),
        Setup::new(shape(), 8, LowRankKeys::new(Arc::new(dense), LowRank { rank: 32, rotary: rotary(16) })),
    ]
    .map(|setup| {
        let mut run = Setup { limits: MemoryLimits::default(), ..setup }.start();
        let id = run.start(&sequence, 120);
        run.generate(id, 100)
    });
    for (full, rebuilt) in outputs[0].iter().flatten().zip(outputs[1].iter().flatten()) {
        let full: Vec<f64> = full.iter().map(|element| f64::from(*element)).collect();
        close(rebuilt, &full, 2e-5).unwrap();
    }
    assert!(Dense { steady: STEADY }.keys() == spinkv::pipeline::KeyStore::Full);
}
