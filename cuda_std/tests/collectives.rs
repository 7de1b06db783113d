//! Collectives against plain models, over random masks, widths and values.

#![allow(
    unsafe_op_in_unsafe_fn,
    clippy::missing_safety_doc,
    clippy::undocumented_unsafe_blocks,
    missing_docs,
    reason = "kernels of a few lines"
)]

use cuda_std::emulator::{Buffer, Launch};
use cuda_std::prelude::*;
use proptest::prelude::*;

/// Runs `lane` once for each lane of one warp, and gives what each made.
fn one_warp<T: cuda_std::Value + Default>(seed: u64, lane: impl Fn(usize) -> T) -> Vec<T> {
    let out = Buffer::filled(32, T::default());
    let launch = Launch::new(1, 32).seed(seed);
    launch
        .run(|| {
            let me = warp::lane_id() as usize;
            let value = lane(me);
            // SAFETY: an element a lane.
            unsafe { out.view_mut().store(me, value) };
        })
        .unwrap();
    out.to_vec()
}

/// Splits the warp by masks that cover it: three sets at most, told apart by two bits a lane.
fn masks(split: &[u8]) -> Vec<u32> {
    let set =
        |of: u8| (0..32).filter(|lane| split[*lane as usize] == of).fold(0, |set, lane| set | 1_u32 << lane);
    split.iter().map(|of| set(*of)).collect()
}

fn lanes(mask: u32) -> impl Iterator<Item = usize> {
    (0..32).filter(move |lane| mask >> lane & 1 != 0)
}

fn few_values() -> impl Strategy<Value = Vec<u32>> {
    prop::collection::vec(prop_oneof![0..3_u32, Just(u32::MAX), any::<u32>()], 32)
}

fn splits() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        Just(vec![0; 32]),
        prop::collection::vec(0..2_u8, 32),
        prop::collection::vec(0..3_u8, 32),
        Just((0..32).map(|lane| lane / 16).collect::<Vec<_>>()),
    ]
}

/// The lane that a shuffle reads, said without clamps and segments: within groups of `width` lanes.
fn source(mode: u8, lane: usize, operand: u32, width: usize) -> usize {
    let (group, place, operand) = (lane / width * width, lane % width, operand as usize);
    match mode {
        0 => group + operand % width,
        1 => {
            // Past the own group: the lane's own value, unless the other is a lower one.
            let other = lane ^ (operand % 32);
            if other < group + width { other } else { lane }
        }
        2 if operand % 32 <= place => lane - operand % 32,
        3 if place + operand % 32 < width => lane + operand % 32,
        _ => lane,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn shuffles(
        values in prop::collection::vec(any::<u64>(), 32),
        operands in prop::collection::vec(0..40_u32, 32),
        uniform: bool,
        mode in 0..4_u8,
        width in 0..6_u32,
        split in splits(),
        seed: u64,
    ) {
        let masks = masks(&split);
        let width = 1 << width;
        let operand = |lane: usize| if uniform { operands[0] } else { operands[lane] };
        let shuffled = one_warp(seed, |lane| unsafe {
            let (mask, value, operand) = (masks[lane], values[lane], operand(lane));
            match mode {
                0 => warp::warp_shuffle_idx(mask, value, operand, width),
                1 => warp::warp_shuffle_xor(mask, value, operand, width),
                2 => warp::warp_shuffle_up(mask, value, operand, width),
                _ => warp::warp_shuffle_down(mask, value, operand, width),
            }
        });
        for lane in 0..32 {
            let source = source(mode, lane, operand(lane), width as usize);
            let source = if masks[lane] >> source & 1 != 0 { source } else { lane };
            prop_assert_eq!(shuffled[lane], values[source], "lane {} from {}", lane, source);
        }
    }

    #[test]
    fn votes(predicates: u32, split in splits(), seed: u64) {
        let masks = masks(&split);
        let votes = one_warp(seed, |lane| unsafe {
            let (mask, predicate) = (masks[lane], predicates >> lane & 1 != 0);
            let all = warp::warp_vote_all(mask, predicate);
            let any = warp::warp_vote_any(mask, predicate);
            let ballot = warp::warp_vote_ballot(mask, predicate);
            u64::from(all) << 33 | u64::from(any) << 32 | u64::from(ballot)
        });
        for (lane, mask) in masks.into_iter().enumerate() {
            let set = lanes(mask).filter(|lane| predicates >> lane & 1 != 0).count();
            let all = set == lanes(mask).count();
            let expected =
                u64::from(all) << 33 | u64::from(set > 0) << 32 | u64::from(predicates & mask);
            prop_assert_eq!(votes[lane], expected);
        }
    }

    #[test]
    fn matches(values in few_values(), high in few_values(), split in splits(), seed: u64) {
        let masks = masks(&split);
        let wide = |lane: usize| u64::from(high[lane]) << 32 | u64::from(values[lane]);
        let any = one_warp(seed, |lane| unsafe {
            let (mask, value) = (masks[lane], values[lane]);
            u64::from(warp::warp_match_any(mask, value)) << 32 | u64::from(warp::warp_match_any(mask, wide(lane)))
        });
        let all = one_warp(seed, |lane| unsafe {
            let (set, same) = warp::warp_match_all(masks[lane], values[lane]);
            let (wide_set, wide_same) = warp::warp_match_all(masks[lane], wide(lane));
            assert_eq!((same, wide_same), (set != 0, wide_set != 0));
            u64::from(set) << 32 | u64::from(wide_set)
        });
        for (lane, mask) in masks.into_iter().enumerate() {
            let with = |same: &dyn Fn(usize) -> bool| lanes(mask).filter(|other| same(*other)).fold(0, |set, lane| set | 1_u64 << lane);
            let narrow = with(&|other| values[other] == values[lane]);
            let wider = with(&|other| wide(other) == wide(lane));
            prop_assert_eq!(any[lane], narrow << 32 | wider);
            let whole = |set: u64| if set == u64::from(mask) { set } else { 0 };
            prop_assert_eq!(all[lane], whole(narrow) << 32 | whole(wider));
        }
    }

    #[test]
    fn reductions(values in few_values(), split in splits(), seed: u64) {
        let masks = masks(&split);
        let reduced = |reduce: &dyn Fn(u32, u32) -> u32| one_warp(seed, |lane| reduce(masks[lane], values[lane]));
        let model = |of: &dyn Fn(&[u32]) -> u32| -> Vec<u32> {
            let of_mask = |mask: &u32| of(&lanes(*mask).map(|lane| values[lane]).collect::<Vec<_>>());
            masks.iter().map(of_mask).collect()
        };
        unsafe {
            prop_assert_eq!(
                reduced(&|mask, value| warp::warp_reduce_add(mask, value)),
                model(&|values| values.iter().map(|value| u64::from(*value)).sum::<u64>() as u32)
            );
            prop_assert_eq!(
                reduced(&|mask, value| warp::warp_reduce_min(mask, value)),
                model(&|values| *values.iter().min().unwrap())
            );
            prop_assert_eq!(
                reduced(&|mask, value| warp::warp_reduce_max(mask, value)),
                model(&|values| *values.iter().max().unwrap())
            );
        }
        let bits = |value: &dyn Fn(usize, usize) -> bool| model(&|values| {
            (0..32).fold(0, |word, bit| {
                let set = values.iter().filter(|value| *value >> bit & 1 != 0).count();
                word | u32::from(value(set, values.len())) << bit
            })
        });
        unsafe {
            prop_assert_eq!(reduced(&|mask, value| warp::warp_reduce_and(mask, value)), bits(&|set, of| set == of));
            prop_assert_eq!(reduced(&|mask, value| warp::warp_reduce_or(mask, value)), bits(&|set, _| set > 0));
            prop_assert_eq!(reduced(&|mask, value| warp::warp_reduce_xor(mask, value)), bits(&|set, _| set % 2 == 1));
        }
    }

    #[test]
    fn sums_and_scans(values in few_values(), seed: u64) {
        let scans = one_warp(seed, |lane| unsafe {
            let inclusive = warp::warp_inclusive_scan_add(values[lane]);
            u64::from(inclusive) << 32 | u64::from(warp::warp_exclusive_scan_add(values[lane]))
        });
        let mut below = 0_u32;
        for lane in 0..32 {
            let with = below.wrapping_add(values[lane]);
            prop_assert_eq!(scans[lane], u64::from(with) << 32 | u64::from(below));
            below = with;
        }
        let floats: Vec<f32> = values.iter().map(|value| *value as f32 / 16.0).collect();
        let greatest = floats.iter().copied().fold(f32::MIN, f32::max);
        let maxima = one_warp(seed, |lane| unsafe { warp::warp_max(floats[lane]) });
        prop_assert!(maxima.iter().all(|max| *max == greatest));
        let sums = one_warp(seed, |lane| unsafe { warp::warp_sum(floats[lane]) });
        prop_assert!(sums.iter().all(|sum| sum.to_bits() == sums[0].to_bits()));
        let exact: f64 = floats.iter().copied().map(f64::from).sum();
        prop_assert!((f64::from(sums[0]) - exact).abs() <= 1e-5 * exact);
    }

    #[test]
    fn barriers_that_count(threads in 1..200_u32, set: u64, seed: u64) {
        let out = Buffer::<u32>::poisoned(3 * threads as usize);
        let launch = Launch::new(1, threads).seed(seed);
        launch.run(|| unsafe {
            let thread = thread::thread_idx_x();
            let predicate = set >> (thread % 64) & 1 != 0;
            let count = thread::sync_threads_count(predicate);
            let any = thread::sync_threads_or(predicate);
            let all = thread::sync_threads_and(predicate);
            let row = out.view_mut().rows(3).row(thread as usize);
            row.store(0, count);
            row.store(1, any.into());
            row.store(2, all.into());
        }).unwrap();
        let count = (0..threads).filter(|thread| set >> (thread % 64) & 1 != 0).count() as u32;
        for row in out.to_vec().chunks(3) {
            prop_assert_eq!(row, [count, u32::from(count > 0), u32::from(count == threads)]);
        }
    }
}

/// One table of the PTX manual's cases, by hand.
#[test]
fn shuffles_at_the_edges_of_their_groups() {
    let of = |shuffle: &dyn Fn(u32) -> u32| one_warp(1, |lane| shuffle(lane as u32));
    let all = warp::FULL_MASK;
    unsafe {
        let up = of(&|lane| warp::warp_shuffle_up(all, lane, 3, 8));
        assert_eq!(up[..11], [0, 1, 2, 0, 1, 2, 3, 4, 8, 9, 10]);
        let down = of(&|lane| warp::warp_shuffle_down(all, lane, 3, 8));
        assert_eq!(down[..11], [3, 4, 5, 6, 7, 5, 6, 7, 11, 12, 13]);
        let idx = of(&|lane| warp::warp_shuffle_idx(all, lane, 9, 8));
        assert_eq!(idx[..11], [1, 1, 1, 1, 1, 1, 1, 1, 9, 9, 9]);
        let xor = of(&|lane| warp::warp_shuffle_xor(all, lane, 4, 8));
        assert_eq!(xor[..11], [4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14]);
        // An xor out of the group: upwards it keeps its own, downwards it reads.
        let xor = of(&|lane| warp::warp_shuffle_xor(all, lane, 8, 8));
        assert_eq!(xor[..11], [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2]);
    }
}

#[test]
fn lanes_split_and_meet_again() {
    // Halves run loops of different lengths with collectives of their own, then all meet.
    for seed in 0..50 {
        let sums = one_warp(seed, |lane| unsafe {
            let mask = if lane < 16 { 0xffff } else { 0xffff_0000 };
            let mut sum = 0;
            for _ in 0..if lane < 16 { 3 } else { 7 } {
                sum += warp::warp_reduce_add(mask, 1);
            }
            warp::warp_reduce_add(warp::FULL_MASK, sum)
        });
        assert_eq!(sums, [16 * 48 + 16 * 112; 32]);
    }
}
