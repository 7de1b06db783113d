use super::*;

fn yarn(factor: f64, original_max_position_embeddings: usize) -> YarnScaling {
    YarnScaling {
        factor,
        original_max_position_embeddings,
        beta_fast: 32.0,
        beta_slow: 1.0,
        attention_factor: 1.0,
        truncate: true,
    }
}

fn rope(theta: f64, head_dim: usize, scaling: YarnScaling) -> Rope {
    Rope::new(&RopeConfig { theta, scaling: Some(RopeScaling::Yarn(scaling)) }, head_dim)
}

/// Numbers of the published formula, worked out with 40 digits.
fn check(rope: &Rope, expected: &[(usize, f64)]) {
    for &(pair, frequency) in expected {
        let found = f64::from(rope.rotary().frequencies()[pair]);
        assert!((found / frequency - 1.0).abs() < 1e-6, "pair {pair}: {found}, not {frequency}");
    }
}

/// Qwen3, 32K stretched by 4: the ramp runs from pair 23 to pair 40.
#[test]
fn yarn_divides_slow_pairs_and_leaves_fast_ones() {
    let rope = rope(1e6, 128, yarn(4.0, 32768));
    assert_eq!(rope.rotary().frequencies().len(), 64);
    check(
        &rope,
        &[
            (0, 1.0),
            (12, 0.07498942093),
            (23, 0.006978305849),
            (24, 0.005375321491),
            (28, 0.001848276565),
            (32, 0.0006029411765),
            (39, 6.490394321e-5),
            (40, 4.445698525e-5),
            (41, 3.582531426e-5),
            (60, 5.928434264e-7),
        ],
    );
}

#[test]
fn yarn_without_truncation_has_a_ramp_between_dimensions() {
    let rope = rope(1e6, 128, YarnScaling { truncate: false, ..yarn(4.0, 32768) });
    let expected = [(23, 0.006978305849), (24, 0.005517270475), (28, 0.00188350244), (39, 6.187806812e-5)];
    check(&rope, &expected);
}

#[test]
fn yarn_takes_other_betas_bases_and_head_dims() {
    let rope = rope(1e4, 64, YarnScaling { beta_fast: 64.0, beta_slow: 2.0, ..yarn(16.0, 4096) });
    check(&rope, &[(8, 0.1), (10, 0.04812344033), (16, 0.004230769231), (20, 0.0004256912235)]);
    check(&rope, &[(22, 1.111424631e-4), (24, 6.25e-5), (30, 1.111424631e-5)]);
    assert_eq!(rope.rotary().frequencies().len(), 32);
}

/// Both ends of the ramp at one pair: no division by zero, a step instead.
#[test]
fn a_ramp_of_no_length_is_a_step() {
    // 4096 / 2 pi turns at pair 0; both ends are clamped to it.
    let rope = rope(1e4, 64, YarnScaling { beta_fast: 1e5, beta_slow: 4096.0 / TAU, ..yarn(2.0, 4096) });
    check(&rope, &[(0, 1.0), (1, 0.7498942093 / 2.0), (16, 0.005)]);
}

#[test]
fn the_attention_factor_lengthens_every_rotation() {
    let scaling = YarnScaling { attention_factor: 1.25, ..yarn(4.0, 32768) };
    let long = rope(1e6, 8, scaling);
    let plain = rope(1e6, 8, YarnScaling { attention_factor: 1.0, ..scaling });
    assert_eq!((long.rotary().magnitude(), plain.rotary().magnitude()), (1.25, 1.0));
    let turn = |rope: &Rope| {
        let mut heads: Vec<f32> = (0..3 * 2 * 8).map(|i| (i as f32 * 0.7).sin()).collect();
        rope.rotations([0, 5, 40_000].into_iter()).apply(0, 2, &mut heads);
        heads
    };
    for (long, plain) in turn(&long).iter().zip(turn(&plain)) {
        assert!((long - 1.25 * plain).abs() <= 1e-6, "{long}, {plain}");
    }
}

#[test]
fn without_yarn_nothing_is_lengthened() {
    let plain = Rope::new(&RopeConfig { theta: 1e6, scaling: None }, 128);
    assert_eq!(plain.rotary().magnitude(), 1.0);
    check(&plain, &[(0, 1.0), (32, 0.001), (48, 3.16227766e-5)]);
}
