use std::collections::HashSet;

use half::bf16;
use spinkv_kernel_tests::fill_random::{FillRandomCase, philox};

use super::{SCHEDULES, SHAPES};

/// Of the authors' own known answers (Random123, `kat_vectors`).
#[test]
fn the_reference_is_philox() {
    let zero = [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8];
    let ones = [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd];
    let pi = [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1];
    assert_eq!(philox([0; 4], [0; 2]), zero);
    assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), ones);
    let counter = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
    assert_eq!(philox(counter, [0xa409_3822, 0x299f_31d0]), pi);
}

#[test]
fn fill_random_on_random_shapes() {
    for seed in 0..SHAPES {
        let case = FillRandomCase::random(seed);
        let found = case.emulate(seed).unwrap_or_else(|fault| panic!("seed {seed}: {fault}\n{case:?}"));
        case.check(&found).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}\n{case:?}"));
    }
}

#[test]
fn fill_random_does_not_depend_on_the_launch() {
    let case = |grid| FillRandomCase { words: 700, seed: 11, deviation: 0.02, grid };
    let first = case(1).emulate(0).unwrap();
    for schedule in 1..SCHEDULES / 10 {
        assert_eq!(case(1 + schedule as u32 % 4).emulate(schedule).unwrap(), first, "schedule {schedule}");
    }
}

#[test]
fn fill_random_is_nearly_normal_and_does_not_repeat() {
    let deviation = 0.02;
    let of = |seed| FillRandomCase { words: 20_000, seed, deviation, grid: 8 }.emulate(0).unwrap();
    let words = [of(1), of(2), of(1 << 32)].map(|words| words[..20_000].to_vec()).concat();
    assert_eq!(words.iter().collect::<HashSet<_>>().len(), words.len(), "no word twice, whatever the seed");
    let numbers: Vec<f64> =
        bytemuck::cast_slice::<u128, bf16>(&words).iter().map(|number| number.to_f64()).collect();
    let moment = |power: i32| {
        let sum: f64 = numbers.iter().map(|number| (number / f64::from(deviation)).powi(power)).sum();
        sum / numbers.len() as f64
    };
    // 480,000 numbers: a standard error of 0.0014 for the mean, 0.0018 for the variance and less for the kurtosis, which is 3 - 1.2 / 4
    // for the sum of four uniform ones.
    assert!(moment(1).abs() < 0.006, "mean {}", moment(1));
    assert!((moment(2) - 1.0).abs() < 0.01, "variance {}", moment(2));
    assert!((moment(4) - 2.7).abs() < 0.05, "kurtosis {}", moment(4));
    let most = numbers.iter().fold(0.0, |most: f64, number| most.max(number.abs()));
    assert!(most < 3.48 * f64::from(deviation) && most > 3.0 * f64::from(deviation), "greatest {most}");
    // Neighbours, within a block of bits and across words, know nothing of each other.
    for lag in [1, 2, 8] {
        let products = numbers.iter().zip(&numbers[lag..]).map(|(a, b)| a * b).sum::<f64>();
        let correlation = products / numbers.len() as f64 / f64::from(deviation * deviation);
        assert!(correlation.abs() < 0.006, "lag {lag}: {correlation}");
    }
}
