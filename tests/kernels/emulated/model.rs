use cuda_std::emulator::Fault;
use spinkv_kernel_tests::model::{ArgmaxCase, EmbedCase, RmsNormCase, RotateCase, SampleCase, SwigluCase};
use spinkv_kernels::model::sin_cos;

/// Shapes of a kernel, each in an order of its own.
const SHAPES: u64 = 60;
/// Orders of one shape.
const SCHEDULES: u64 = 20;

/// Runs random shapes, and one of them in several orders, whose results must be the same to the bit.
fn run<T: PartialEq>(
    shapes: u64,
    schedules: u64,
    emulate: impl Fn(u64, u64) -> Result<T, Fault>,
    check: impl Fn(u64, &T) -> Result<(), String>,
) {
    for seed in 0..shapes {
        let found = emulate(seed, seed).unwrap_or_else(|fault| panic!("seed {seed}: {fault}"));
        check(seed, &found).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
    }
    let first = emulate(shapes, 0).unwrap();
    check(shapes, &first).unwrap();
    for schedule in 1..schedules {
        assert!(emulate(shapes, schedule).unwrap() == first, "schedule {schedule} changes the result");
    }
}

#[test]
fn embed_gives_the_tokens_rows() {
    run(
        SHAPES,
        SCHEDULES,
        |seed, schedule| EmbedCase::random(seed).emulate(schedule),
        |seed, found| EmbedCase::random(seed).check(found),
    );
}

#[test]
fn rms_norm_against_f64() {
    run(
        SHAPES,
        SCHEDULES,
        |seed, schedule| RmsNormCase::random(seed).emulate(schedule),
        |seed, found| RmsNormCase::random(seed).check(found),
    );
}

#[test]
fn rotate_against_f64() {
    run(
        SHAPES,
        SCHEDULES,
        |seed, schedule| RotateCase::random(seed).emulate(schedule),
        |seed, found| RotateCase::random(seed).check(found),
    );
}

#[test]
fn swiglu_against_f64() {
    run(
        SHAPES,
        SCHEDULES,
        |seed, schedule| SwigluCase::random(seed).emulate(schedule),
        |seed, found| SwigluCase::random(seed).check(found),
    );
}

#[test]
fn argmax_finds_the_lowest_id_of_the_greatest() {
    run(
        SHAPES,
        SCHEDULES,
        |seed, schedule| ArgmaxCase::random(seed).emulate(schedule),
        |seed, found| found.iter().try_for_each(|ids| ArgmaxCase::random(seed).check(ids)),
    );
}

#[test]
fn sample_draws_what_the_engine_would() {
    run(
        SHAPES / 3,
        SCHEDULES / 4,
        |seed, schedule| SampleCase::random(seed).emulate(schedule),
        |seed, found| SampleCase::random(seed).check(found),
    );
}

#[test]
fn sample_adds_up_exactly() {
    for seed in 0..6 {
        let case = SampleCase::even(seed);
        let ids = case.emulate(seed).unwrap_or_else(|fault| panic!("seed {seed}: {fault}"));
        case.check(&ids).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
    }
}

/// Angles of all sizes up to 2^20, densely, and the neighbours of many multiples of pi / 4, where quadrants meet.
#[test]
fn sines_and_cosines_are_within_2e_7() {
    let evenly = (0..4_000_000).map(|at| at as f32 * 0.262_144);
    let by_bits = (0..1_u32 << 23).step_by(3).map(|at| f32::from_bits(at * 156));
    let around = (0..1_u32 << 20).map(|at| (f64::from(at) * std::f64::consts::FRAC_PI_4) as f32);
    let around = around.flat_map(|angle| [angle.next_down().max(0.0), angle, angle.next_up()]);
    let (mut worst, mut count) = ((0.0, 0.0), 0);
    for angle in evenly.chain(by_bits).chain(around).filter(|angle| *angle <= (1 << 20) as f32) {
        let ((sine, cosine), (exact_sine, exact_cosine)) = (sin_cos(angle), f64::from(angle).sin_cos());
        let error = (f64::from(sine) - exact_sine).abs().max((f64::from(cosine) - exact_cosine).abs());
        if error > worst.0 {
            worst = (error, angle);
        }
        count += 1;
    }
    assert!(count > 8_000_000, "{count} angles");
    assert!(worst.0 < 2e-7, "off by {:e} at {:e}", worst.0, worst.1);
    assert_eq!(sin_cos(0.0), (0.0, 1.0));
}
