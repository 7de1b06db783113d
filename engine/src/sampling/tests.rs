use proptest::prelude::*;

use super::*;

fn sampler(params: SamplingParams) -> Sampler {
    Sampler::new(params).unwrap()
}

/// Logits of the given probabilities.
fn logits(probabilities: &[f32]) -> Vec<f32> {
    probabilities.iter().map(|p| p.ln()).collect()
}

/// How often each id comes up in `draws`.
fn counts(params: SamplingParams, logits: &[f32], draws: usize) -> Vec<usize> {
    let mut sampler = sampler(params);
    let mut counts = vec![0; logits.len()];
    for _ in 0..draws {
        counts[sampler.sample(logits).unwrap() as usize] += 1;
    }
    counts
}

/// The ids that come up at all; `draws` is large against the rarest in these tests.
fn support(params: SamplingParams, logits: &[f32]) -> Vec<usize> {
    let counts = counts(params, logits, 4000);
    (0..logits.len()).filter(|&id| counts[id] > 0).collect()
}

#[test]
fn greedy_takes_the_lowest_id_of_the_largest() {
    let mut greedy = sampler(SamplingParams::greedy());
    assert_eq!(greedy.sample(&[1.0, 3.0, 2.0, 3.0]).unwrap(), 1);
    assert_eq!(greedy.sample(&[-0.0, 0.0]).unwrap(), 0);
    assert_eq!(greedy.sample(&[f32::NAN, f32::INFINITY, -7.0, f32::NEG_INFINITY]).unwrap(), 2);
}

#[test]
fn no_finite_logit_is_an_error() {
    for params in [SamplingParams::greedy(), SamplingParams::default()] {
        let mut sampler = sampler(params);
        for logits in [&[][..], &[f32::NAN, f32::NAN], &[f32::INFINITY, f32::NEG_INFINITY]] {
            let error = sampler.sample(logits).unwrap_err();
            assert!(matches!(error, Error::NoFiniteLogit { len } if len == logits.len()));
        }
    }
}

#[test]
fn parameters_out_of_range_are_refused() {
    let name = |params: SamplingParams| match Sampler::new(params) {
        Err(Error::InvalidSampling { name, .. }) => name,
        other => panic!("{other:?}"),
    };
    let base = SamplingParams::default;
    for temperature in [-1.0, f32::NAN, f32::INFINITY] {
        assert_eq!(name(SamplingParams { temperature, ..base() }), "temperature");
    }
    assert_eq!(name(SamplingParams { top_k: Some(0), ..base() }), "top_k");
    for top_p in [0.0, -0.1, 1.1, f32::NAN] {
        assert_eq!(name(SamplingParams { top_p, ..base() }), "top_p");
    }
    for min_p in [-0.1, 1.1, f32::NAN] {
        assert_eq!(name(SamplingParams { min_p, ..base() }), "min_p");
    }
    let error = SamplingParams { top_p: 1.5, ..base() }.validate().unwrap_err();
    assert_eq!(error.to_string(), "sampling parameter top_p is 1.5; allowed: greater than 0, at most 1");
}

#[test]
fn frequencies_follow_the_softmax() {
    let draws = 40_000;
    for (temperature, expected) in [
        (1.0, [0.1, 0.2, 0.3, 0.4]),
        // The squares 1, 4, 9 and 16 over their sum.
        (0.5, [1.0 / 30.0, 4.0 / 30.0, 9.0 / 30.0, 16.0 / 30.0]),
    ] {
        let params = SamplingParams { temperature, ..Default::default() };
        let counts = counts(params, &logits(&[0.1, 0.2, 0.3, 0.4]), draws);
        for (count, p) in counts.into_iter().zip(expected) {
            // Five standard deviations.
            let slack = 5.0 * (draws as f64 * p * (1.0 - p)).sqrt();
            assert!((count as f64 - draws as f64 * p).abs() < slack, "{count} for {p}");
        }
    }
}

#[test]
fn top_k_keeps_the_likeliest_and_lower_ids_of_equals() {
    let top = |k, probabilities: &[f32]| {
        support(SamplingParams { top_k: Some(k), ..Default::default() }, &logits(probabilities))
    };
    assert_eq!(top(2, &[0.1, 0.4, 0.2, 0.3]), [1, 3]);
    assert_eq!(top(3, &[0.2, 0.2, 0.2, 0.2, 0.2]), [0, 1, 2]);
    assert_eq!(top(9, &[0.5, 0.5]), [0, 1]);
}

#[test]
fn top_p_keeps_the_smallest_set_that_reaches_p() {
    let top = |top_p, k| {
        let params = SamplingParams { top_p, top_k: k, ..Default::default() };
        support(params, &logits(&[0.125, 0.5, 0.125, 0.25]))
    };
    assert_eq!(top(0.001, None), [1]);
    assert_eq!(top(0.45, None), [1]);
    assert_eq!(top(0.55, None), [1, 3]);
    assert_eq!(top(0.7, None), [1, 3]);
    assert_eq!(top(0.8, None), [0, 1, 3]);
    assert_eq!(top(0.9, None), [0, 1, 2, 3]);
    // Of what top-k leaves, id 1 alone is two thirds.
    assert_eq!(top(0.6, Some(2)), [1]);
}

#[test]
fn min_p_is_relative_to_the_likeliest_that_the_others_leave() {
    let min = |min_p, temperature| {
        let params = SamplingParams { min_p, temperature, ..Default::default() };
        support(params, &logits(&[0.125, 0.5, 0.125, 0.25]))
    };
    assert_eq!(min(1.0, 1.0), [1]);
    assert_eq!(min(0.45, 1.0), [1, 3]);
    assert_eq!(min(0.2, 1.0), [0, 1, 2, 3]);
    // At half the temperature 0.25 is a quarter as likely as 0.5.
    assert_eq!(min(0.45, 0.5), [1]);
}

#[test]
fn extreme_temperatures_and_logits_stay_finite() {
    let mut cold = sampler(SamplingParams { temperature: f32::MIN_POSITIVE, ..Default::default() });
    assert_eq!(cold.sample(&[f32::MIN, 1.0, f32::MAX]).unwrap(), 2);
    let hot = SamplingParams { temperature: f32::MAX, ..Default::default() };
    assert_eq!(support(hot, &[0.0, 50.0, -50.0]), [0, 1, 2]);
}

/// Pins the random numbers: a change here changes every seeded generation.
#[test]
fn a_seed_gives_these_tokens() {
    let mut sampler = sampler(SamplingParams { seed: 42, ..Default::default() });
    let tokens: Vec<u32> = (0..12).map(|_| sampler.sample(&[0.0; 100]).unwrap()).collect();
    assert_eq!(tokens, [68, 95, 42, 62, 28, 14, 30, 80, 77, 23, 50, 90]);
}

prop_compose! {
    fn any_params()(
        temperature in 0.05f32..3.0,
        top_k in prop::option::of(1usize..80),
        top_p in 0.01f32..=1.0,
        min_p in 0.0f32..=1.0,
        seed in any::<u64>(),
    ) -> SamplingParams {
        SamplingParams { temperature, top_k, top_p, min_p, seed }
    }
}

fn any_logits() -> impl Strategy<Value = Vec<f32>> {
    // Few distinct values, so that ties are common.
    prop::collection::vec(prop_oneof![(-8i8..8).prop_map(f32::from), Just(f32::NAN), -20f32..20.0], 1..60)
}

proptest! {
    #[test]
    fn top_k_of_one_is_greedy(logits in any_logits(), params in any_params()) {
        let greedy = sampler(SamplingParams::greedy()).sample(&logits).ok();
        let top = sampler(SamplingParams { top_k: Some(1), ..params }).sample(&logits).ok();
        prop_assert_eq!(top, greedy);
    }

    #[test]
    fn one_seed_gives_one_sequence(logits in any_logits(), params in any_params()) {
        let (mut a, mut b) = (sampler(params.clone()), sampler(params));
        for _ in 0..8 {
            prop_assert_eq!(a.sample(&logits).ok(), b.sample(&logits).ok());
        }
    }

    /// The fast top-p against its definition, and the cuts in their documented order.
    #[test]
    fn draws_come_from_the_set_that_the_definition_keeps(logits in any_logits(), params in any_params()) {
        let mut order: Vec<usize> = (0..logits.len()).filter(|&id| logits[id].is_finite()).collect();
        prop_assume!(!order.is_empty());
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        order.truncate(params.top_k.unwrap_or(usize::MAX));
        let best = f64::from(logits[order[0]]);
        let weight = |id: usize| ((f64::from(logits[id]) - best) / f64::from(params.temperature)).exp();
        let total: f64 = order.iter().map(|&id| weight(id)).sum();
        let (mut sum, mut kept) = (0.0, Vec::new());
        for &id in &order {
            // A hair of slack, since the order of a sum decides its last bits.
            if params.top_p == 1.0 || sum < f64::from(params.top_p) * total * (1.0 + 1e-12) {
                kept.push(id);
            }
            sum += weight(id);
        }
        kept.retain(|&id| weight(id) >= f64::from(params.min_p));

        let mut sampler = sampler(params);
        for _ in 0..20 {
            let token = sampler.sample(&logits).unwrap() as usize;
            prop_assert!(kept.contains(&token), "{} not in {:?}", token, kept);
        }
        prop_assert!(sampler.candidates.len() + 1 >= kept.len(), "cut too much");
    }
}
