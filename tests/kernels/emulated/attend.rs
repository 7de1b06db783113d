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

/// Of a row's blocks those wait for its misses that have a tile with one of them, and no others: each is run with those before it, and nothing arrives.
#[test]
fn attend_waits_for_misses_when_it_has_got_to_them() {
    let (mut ended, mut waited) = (0, 0);
    for seed in 0..40 {
        let mut case = AttendCase::long(seed);
        case.splits = 7;
        let (page_tokens, entry) = (case.page_tokens, &case.entries[0]);
        let selected = (case.page_counts[0] as usize).min(case.list_capacity);
        if entry.tokens == 0 || selected < 4 {
            continue;
        }
        let sinks = (entry.tokens as usize).div_ceil(page_tokens).min(entry.sink_pages as usize);
        for missing in [1, 3, selected] {
            // Pages with biases are in another order.
            let first = if case.biases.is_empty() { (sinks + selected - missing) * page_tokens } else { 0 };
            let tiles = case.row_tokens(0).div_ceil(16);
            let share = tiles.div_ceil(case.splits);
            for split in 0..case.splits {
                let tiles = (split * share).min(tiles)..((split + 1) * share).min(tiles);
                let waits = !tiles.is_empty() && tiles.end * 16 > first;
                let outcome = case.emulate_missing(split + 1, missing as u32);
                assert_eq!(
                    outcome.is_err(),
                    waits,
                    "seed {seed}, {missing} of {selected} pages missing, split {split}: {:?}",
                    outcome.err().map(|fault| fault.to_string())
                );
                if waits {
                    waited += 1;
                    break;
                }
                ended += 1;
            }
        }
    }
    assert!(ended > 50 && waited > 50, "{ended} blocks ended, {waited} waited");
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
