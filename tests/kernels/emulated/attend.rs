use half::bf16;
use spinkv_kernel_tests::attend::AttendCase;

use super::{SCHEDULES, SHAPES};

#[test]
fn attend_on_random_shapes() {
    for seed in 0..SHAPES {
        let case = AttendCase::random(seed);
        let (outputs, lse) = case.emulate(seed).unwrap_or_else(|fault| panic!("seed {seed}: {fault}"));
        case.check(&outputs, &lse).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
    }
}

#[test]
fn attend_on_long_rows() {
    for seed in 0..6 {
        let case = AttendCase::long(seed);
        let (outputs, lse) = case.emulate(seed).unwrap_or_else(|fault| panic!("seed {seed}: {fault}"));
        case.check(&outputs, &lse).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
    }
}

#[test]
fn attend_hardly_depends_on_splits() {
    for seed in 0..4 {
        let mut case = AttendCase::long(seed);
        let (whole, whole_lse) = case.emulate(seed).unwrap();
        for splits in [2, 5, 12] {
            case.splits = splits;
            let (split, split_lse) = case.emulate(seed).unwrap();
            let [whole, split]: [&[bf16]; 2] = [&whole, &split].map(|words| bytemuck::cast_slice(words));
            let (mut off, mut norm) = (0.0, 0.0);
            for (whole, split) in
                whole.iter().zip(split).filter(|(whole, split)| whole.to_bits() != split.to_bits())
            {
                off += (f64::from(whole.to_f32()) - f64::from(split.to_f32())).powi(2);
            }
            for whole in whole.iter().filter(|whole| !whole.is_nan()) {
                norm += f64::from(whole.to_f32()).powi(2);
            }
            let off = (off / norm).sqrt();
            assert!(off <= 1e-3, "seed {seed}, {splits} splits: off by {off:e} of the norm");
            let off = whole_lse
                .iter()
                .zip(&split_lse)
                .map(|(whole, split)| (whole - split).abs())
                .fold(0.0, f32::max);
            assert!(off <= 1e-3, "seed {seed}, {splits} splits: a logarithm is off by {off:e}");
        }
    }
}

#[test]
fn attend_in_random_orders() {
    let case = AttendCase::small(SHAPES);
    let first = case.emulate(0).unwrap();
    case.check(&first.0, &first.1).unwrap();
    for schedule in 1..SCHEDULES {
        assert_eq!(case.emulate(schedule).unwrap(), first, "schedule {schedule}");
    }
}
