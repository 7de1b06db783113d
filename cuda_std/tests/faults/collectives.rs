//! Collectives that not all lanes reach.

use crate::support::{every_seed_finds, every_seed_passes};
use crate::{Scratch, at, by, tid};
use cuda_std::atomic::{Order, Scope};
use cuda_std::emulator::{FaultKind, Launch, Operation};
use cuda_std::prelude::*;

#[kernel]
pub unsafe fn not_mine(mask: u32) {
    warp::warp_vote_any(mask, true); // not mine
}

#[test]
fn a_lane_outside_its_own_mask_is_found() {
    let launch = Launch::new(1, 32);
    every_seed_passes(|seed| launch.seed(seed).run(|| unsafe { not_mine(u32::MAX) }));
    every_seed_finds(
        |seed| launch.seed(seed).run(|| unsafe { not_mine(!(1 << 9)) }),
        |fault| {
            assert_eq!(fault.kind, FaultKind::LaneNotInMask { mask: !(1 << 9), lane: 9 });
            at(fault, "not mine");
            by(fault, 0, 9);
        },
    );
}

#[kernel]
pub unsafe fn stay(lanes: u32, mask: u32) {
    if warp::lane_id() < lanes {
        warp::warp_reduce_add(mask, 1); // who stays
    }
}

#[test]
fn a_mask_that_names_lanes_that_returned_or_do_not_exist_is_found() {
    every_seed_passes(|seed| Launch::new(1, 64).seed(seed).run(|| unsafe { stay(20, 0x000f_ffff) }));
    every_seed_passes(|seed| Launch::new(1, 20).seed(seed).run(|| unsafe { stay(32, 0x000f_ffff) }));
    for (threads, lanes) in [(32, 20), (20, 32)] {
        every_seed_finds(
            |seed| Launch::new(1, threads).seed(seed).run(|| unsafe { stay(lanes, u32::MAX) }),
            |fault| {
                let FaultKind::MissingLanes { mask: u32::MAX, arrived } = fault.kind else {
                    panic!("{fault}")
                };
                assert_eq!(arrived & !0x000f_ffff, 0, "{fault}");
                assert!(arrived >> fault.thread.x & 1 != 0, "{fault}");
                at(fault, "who stays");
            },
        );
    }
}

#[kernel]
pub unsafe fn others_spin(leaver: u32) {
    let flag = Scratch::words();
    if tid() == 0 {
        flag.store(0, 0);
    }
    thread::sync_threads();
    if tid() == leaver as usize {
        return;
    }
    if tid() < 32 {
        warp::sync_warp(warp::FULL_MASK); // before the flag
        flag.atomic_exchange(0, 1, Order::Relaxed, Scope::Block);
    } else {
        while flag.atomic_load(0, Order::Relaxed, Scope::Block) == 0 {}
    }
}

#[test]
fn lanes_that_wait_for_one_that_returned_are_found_while_others_still_spin() {
    let launch = Launch::new(1, 64).shared(Scratch::BYTES);
    every_seed_passes(|seed| launch.seed(seed).run(|| unsafe { others_spin(99) }));
    every_seed_finds(
        |seed| launch.seed(seed).run(|| unsafe { others_spin(17) }),
        |fault| {
            assert!(matches!(fault.kind, FaultKind::MissingLanes { .. }), "{fault}");
            at(fault, "before the flag");
        },
    );
}

#[kernel]
pub unsafe fn ring(closed: bool) {
    let lane = warp::lane_id();
    if lane < 3 {
        // 0 waits for 1, 1 for 2, 2 for 0.
        let mask = if closed { 1 << lane | 1 << ((lane + 1) % 3) } else { 7 };
        warp::sync_warp(mask); // in a ring
    }
}

#[test]
fn lanes_that_wait_for_each_other_in_different_masks_are_found() {
    every_seed_passes(|seed| Launch::new(1, 32).seed(seed).run(|| unsafe { ring(false) }));
    every_seed_finds(
        |seed| Launch::new(1, 32).seed(seed).run(|| unsafe { ring(true) }),
        |fault| {
            let FaultKind::MissingLanes { mask, arrived } = fault.kind else { panic!("{fault}") };
            assert_eq!((mask.count_ones(), arrived), (2, 1 << fault.thread.x));
            at(fault, "in a ring");
        },
    );
}

#[kernel]
pub unsafe fn mismatch(how: u32) {
    let low = warp::lane_id() < 16;
    match how {
        0 => warp::sync_warp(warp::FULL_MASK),
        // Two operations.
        1 if low => {
            warp::warp_vote_any(warp::FULL_MASK, low);
        }
        1 => {
            warp::warp_vote_all(warp::FULL_MASK, low);
        }
        // Two places.
        2 if low => warp::sync_warp(warp::FULL_MASK),
        2 => warp::sync_warp(warp::FULL_MASK),
        // Two masks.
        _ => {
            let mask = if low { warp::FULL_MASK } else { 0xffff_ff00 };
            warp::warp_shuffle_xor(mask, 1_u32, 1, 32);
        }
    }
}

#[test]
fn lanes_in_different_collectives_of_one_mask_are_found() {
    every_seed_passes(|seed| Launch::new(1, 32).seed(seed).run(|| unsafe { mismatch(0) }));
    for how in 1..4 {
        every_seed_finds(
            |seed| Launch::new(1, 32).seed(seed).run(|| unsafe { mismatch(how) }),
            |fault| {
                let FaultKind::CollectiveMismatch { operation, mask, other_operation, other_mask, other } =
                    fault.kind
                else {
                    panic!("{fault}")
                };
                assert_ne!(fault.thread.x < 16, other.thread.x < 16, "{fault}");
                match how {
                    1 => assert_ne!(operation, other_operation),
                    2 => assert_ne!(fault.location.line(), other.location.line()),
                    _ => {
                        assert_eq!(operation, Operation::Shuffle);
                        assert_ne!(mask, other_mask);
                    }
                }
            },
        );
    }
}
