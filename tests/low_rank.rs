//! Keys in low rank against exact eigenvalues: how much worse than the best, and what it means for a model's attention.

use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinkv::KvConfig;
use spinkv::backend::cpu::CpuBackend;
use spinkv::backend::cpu::low_rank::{LowRankFactors, gram};
use spinkv::memory::{KvDtype, MemoryLimits, PageLayout};
use spinkv::partition::PartitionKind;
use spinkv::pipeline::{
    Budget, Candidates, Index, Method, Partition, Pick, Pipeline, Select, SteadyZone, Summarize,
};
use spinkv_engine::model::Wanted;
use spinkv_tests::checkpoints::Bundled;

/// The eigenvalues of a symmetric matrix, greatest first: cyclic Jacobi, which shares nothing with the iteration.
fn eigenvalues(matrix: &[f64], n: usize) -> Vec<f64> {
    let mut a = matrix.to_vec();
    let scale: f64 = a.iter().map(|element| element * element).sum();
    loop {
        let mut off = 0.0;
        for p in 0..n {
            for q in p + 1..n {
                let of = a[p * n + q];
                off += of * of;
                if of == 0.0 {
                    continue;
                }
                let theta = (a[q * n + q] - a[p * n + p]) / (2.0 * of);
                let t = theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt());
                let c = 1.0 / (t * t + 1.0).sqrt();
                let s = t * c;
                for k in 0..n {
                    let (x, y) = (a[k * n + p], a[k * n + q]);
                    (a[k * n + p], a[k * n + q]) = (c * x - s * y, s * x + c * y);
                }
                for k in 0..n {
                    let (x, y) = (a[p * n + k], a[q * n + k]);
                    (a[p * n + k], a[q * n + k]) = (c * x - s * y, s * x + c * y);
                }
            }
        }
        if off <= 1e-24 * scale {
            break;
        }
    }
    let mut eigenvalues: Vec<f64> = (0..n).map(|i| a[i * n + i].max(0.0)).collect();
    eigenvalues.sort_by(|a, b| b.total_cmp(a));
    eigenvalues
}

/// What the factors lose of the keys, in squares.
fn lost(keys: &[f32], factors: &LowRankFactors, kv_heads: usize, head_dim: usize) -> f64 {
    let mut rebuilt = vec![0.0; head_dim];
    let of_key = |(at, key): (usize, &[f32])| -> f64 {
        factors.rebuild(at / kv_heads, at % kv_heads, &mut rebuilt, |_| ());
        key.iter().zip(&rebuilt).map(|(a, b)| f64::from(a - b).powi(2)).sum()
    };
    keys.chunks_exact(head_dim).enumerate().map(of_key).sum()
}

/// Of each rank the part of the keys' norm that is lost, and that over the least possible.
fn losses(keys: &[f32], kv_heads: usize, head_dim: usize, ranks: &[usize]) -> Vec<(f64, f64)> {
    let width = kv_heads * head_dim;
    let eigenvalues = eigenvalues(&gram(keys, width), width);
    let all: f64 = eigenvalues.iter().sum();
    let of_rank = |rank: &usize| {
        let factors = LowRankFactors::new(keys, kv_heads, head_dim, *rank).unwrap();
        let (lost, least) =
            (lost(keys, &factors, kv_heads, head_dim), eigenvalues[*rank..].iter().sum::<f64>());
        ((lost / all).sqrt(), (lost / least).sqrt())
    };
    ranks.iter().map(of_rank).collect()
}

/// `[tokens, width]`: a sum of random outer products of these weights, and noise.
fn random_keys(
    seed: u64,
    tokens: usize,
    width: usize,
    noise: f32,
    weights: impl Iterator<Item = f32>,
) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut normal = || -> f32 { (0..4).map(|_| rng.random_range(-0.87..0.87_f32)).sum() };
    let mut keys: Vec<f32> = (0..tokens * width).map(|_| noise * normal()).collect();
    for weight in weights {
        let direction: Vec<f32> = (0..width).map(|_| weight * normal() / (width as f32).sqrt()).collect();
        for key in keys.chunks_exact_mut(width) {
            let coefficient = normal();
            key.iter_mut().zip(&direction).for_each(|(element, of)| *element += coefficient * of);
        }
    }
    keys
}

#[test]
fn factors_of_random_keys_are_nearly_the_best() {
    // Weights that fall fast and slowly, over noise from next to nothing to more than them; the last have no direction that stands out.
    for (seed, noise, fall) in
        [(1, 1e-3, 0.7), (2, 1e-2, 0.9), (3, 0.1, 0.95), (4, 0.3, 0.97), (5, 1.0, 0.99), (6, 1.0, 0.0)]
    {
        let weights = (1..65).map(|i| 30.0 * f32::powi(fall, i));
        let keys = random_keys(seed, 700, 96, noise, weights);
        let losses = losses(&keys, 3, 32, &[1, 5, 16, 40, 64]);
        println!("noise {noise}, fall {fall}: {losses:.4?}");
        assert!(losses.iter().all(|(_, excess)| (0.999..1.02).contains(excess)), "{losses:?}");
    }
}

/// Channels hundreds of times as large as others, as keys have them.
#[test]
fn outlier_channels_do_not_hide_the_others() {
    let mut keys = random_keys(7, 500, 64, 0.1, [3.0; 20].into_iter());
    for key in keys.chunks_exact_mut(64) {
        key[7] += 300.0;
        key[50] *= 1000.0;
    }
    let losses = losses(&keys, 2, 32, &[2, 10, 20, 48]);
    assert!(losses.iter().all(|(_, excess)| (0.999..1.02).contains(excess)), "{losses:?}");
}

/// Notes a model's keys and last queries, and reads nothing but the steady zone.
#[derive(Debug, Default)]
struct Recorder {
    /// By layer and KV head, `[tokens, head_dim]`, turned.
    keys: Mutex<Vec<Vec<f32>>>,
    /// By layer and KV head, `[group, head_dim]`, turned.
    queries: Mutex<Vec<Vec<f32>>>,
}

const PAGE: usize = 8;
const LAYERS: usize = 4;
const KV_HEADS: usize = 2;

impl Method for Recorder {
    fn name(&self) -> &str {
        "recorder"
    }
    fn partition(&self) -> PartitionKind {
        PartitionKind::Chunk { tokens: PAGE }
    }
    fn index(&self) -> Index<'_> {
        Index::Custom(self)
    }
    fn select(&self) -> Select<'_> {
        Select::Custom { picker: self, budget: Budget::Tokens(PAGE) }
    }
    fn steady(&self) -> SteadyZone {
        SteadyZone { sinks: 0, window: PAGE }
    }
}

impl Summarize for Recorder {
    fn width(&self, _head_dim: usize) -> usize {
        8
    }
    fn summarize(&self, partition: &Partition<'_>, _summary: &mut [f32]) {
        let mut keys = self.keys.lock().unwrap();
        let of_row = &mut keys[partition.place.layer * KV_HEADS + partition.place.kv_head];
        let at = partition.first_token * partition.head_dim;
        of_row.resize(of_row.len().max(at + partition.keys.len()), 0.0);
        of_row[at..][..partition.keys.len()].copy_from_slice(partition.keys);
    }
}

impl Pick for Recorder {
    fn pick(&self, candidates: &Candidates<'_>, _ids: &mut Vec<u32>) {
        let row = candidates.place.layer * KV_HEADS + candidates.place.kv_head;
        self.queries.lock().unwrap()[row] = candidates.queries.to_vec();
    }
}

/// Turns a key to `position`, or back.
fn turn(key: &mut [f32], position: i64, theta: f64) {
    let half = key.len() / 2;
    for i in 0..half {
        let angle = position as f64 * theta.powf(-(i as f64) / half as f64);
        let (sine, cosine) = angle.sin_cos();
        let (a, b) = (f64::from(key[i]), f64::from(key[i + half]));
        (key[i], key[i + half]) = ((a * cosine - b * sine) as f32, (b * cosine + a * sine) as f32);
    }
}

fn softmax(query: &[f32], keys: &[f32]) -> Vec<f64> {
    let scale = 1.0 / (query.len() as f64).sqrt();
    let dot =
        |key: &[f32]| query.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>() * scale;
    let logits: Vec<f64> = keys.chunks_exact(query.len()).map(dot).collect();
    let greatest = logits.iter().copied().fold(f64::MIN, f64::max);
    let weights: Vec<f64> = logits.iter().map(|logit| (logit - greatest).exp()).collect();
    let sum: f64 = weights.iter().sum();
    weights.into_iter().map(|weight| weight / sum).collect()
}

/// How much of needle-tiny's keys is lost at each rank, and how far the last query's attention moves: half the sum of differences of its
/// weights, the mean over the heads, and the greatest.
#[test]
fn keys_of_a_model_are_kept() {
    let bundled = Bundled::open("needle-tiny");
    let (model, ids) = (&bundled.model, bundled.input_ids("needle_4k_0"));
    let (shape, theta) = (model.shape(), model.config().rope.theta);
    assert_eq!((shape.layers, shape.kv_heads), (LAYERS, KV_HEADS));
    let head_dim = shape.head_dim;
    let recorder = Arc::new(Recorder {
        keys: Mutex::new(vec![Vec::new(); LAYERS * KV_HEADS]),
        queries: Mutex::new(vec![Vec::new(); LAYERS * KV_HEADS]),
    });
    let layout = PageLayout::new(PAGE, head_dim, KvDtype::Bf16).unwrap();
    let config = KvConfig::new(shape, layout, recorder.clone()).unwrap();
    let mut pipeline = Pipeline::new(CpuBackend::new(config, MemoryLimits::default()));
    let request = pipeline.admit(ids.len()).unwrap();
    model.prefill(&mut pipeline, request, &ids, Wanted::Last, |_, _| ControlFlow::Continue(())).unwrap();

    let (keys, queries) = (recorder.keys.lock().unwrap(), recorder.queries.lock().unwrap());
    for layer in 0..LAYERS {
        let rows = &keys[layer * KV_HEADS..][..KV_HEADS];
        let tokens = rows[0].len() / head_dim;
        assert!(tokens > ids.len() - 3 * PAGE);
        let mut plain = vec![0.0; tokens * KV_HEADS * head_dim];
        for (at, plain) in plain.chunks_exact_mut(head_dim).enumerate() {
            let (token, head) = (at / KV_HEADS, at % KV_HEADS);
            plain.copy_from_slice(&rows[head][token * head_dim..][..head_dim]);
            turn(plain, -(token as i64), theta);
        }
        let ranks = [32, 64, 96, 128, 160];
        let losses = losses(&plain, KV_HEADS, head_dim, &ranks);
        for (rank, (lost, excess)) in ranks.into_iter().zip(losses) {
            let factors = LowRankFactors::new(&plain, KV_HEADS, head_dim, rank).unwrap();
            let (mut moved, mut most, mut heads) = (0.0, 0.0_f64, 0);
            for head in 0..KV_HEADS {
                let mut rebuilt = vec![0.0; tokens * head_dim];
                for (token, key) in rebuilt.chunks_exact_mut(head_dim).enumerate() {
                    factors.rebuild(token, head, key, |key| turn(key, token as i64, theta));
                }
                for query in queries[layer * KV_HEADS + head].chunks_exact(head_dim) {
                    let (exact, near) = (softmax(query, &rows[head]), softmax(query, &rebuilt));
                    let distance = 0.5 * exact.iter().zip(&near).map(|(a, b)| (a - b).abs()).sum::<f64>();
                    (moved, most, heads) = (moved + distance, most.max(distance), heads + 1);
                }
            }
            let moved = moved / f64::from(heads);
            println!(
                "layer {layer}, rank {rank}: {:.2} % of the keys lost, {excess:.4} of the least; attention moves by {moved:.4}, at most {most:.4}",
                100.0 * lost
            );
            assert!((0.999..1.02).contains(&excess), "layer {layer}, rank {rank}: {excess}");
        }
    }
}
