//! Races in shared memory.

use crate::support::{every_seed_finds, every_seed_passes};
use crate::{Scratch, at, line, tid};
use cuda_std::atomic::{Order, Scope};
use cuda_std::emulator::{Access, Buffer, FaultKind, Launch};
use cuda_std::prelude::*;
use cuda_std::shared;

#[kernel]
pub unsafe fn hand_over(out: GlobalMut<u32>, barrier: bool) {
    let words = Scratch::words();
    words.store(tid(), tid() as u32); // hands over
    if barrier {
        thread::sync_threads();
    }
    out.store(tid(), words.load((tid() + 32) % 64)); // takes over
    thread::sync_threads(); // Nobody has returned when the others come.
}

#[test]
fn reading_what_another_warp_wrote_without_a_barrier_is_a_race() {
    let run = |barrier, seed| {
        let out = Buffer::poisoned(64);
        let launch = Launch::new(1, 64).shared(Scratch::BYTES).seed(seed);
        launch.run(|| unsafe { hand_over(out.view_mut(), barrier) })
    };
    every_seed_passes(|seed| run(true, seed));
    every_seed_finds(
        |seed| run(false, seed),
        |fault| match fault.kind {
            FaultKind::SharedRace { access, other, index, byte } => {
                assert_eq!((access, other.access, byte), (Access::Load, Access::Store, 4 * index), "{fault}");
                assert_eq!((fault.thread.x as usize + 32) % 64, index, "{fault}");
                assert_eq!(other.thread.x as usize, index, "{fault}");
                assert_eq!(other.location.line(), line("hands over"), "{fault}");
                at(fault, "takes over");
            }
            // The other warp may not have got that far at all.
            FaultKind::UninitialisedShared { .. } => at(fault, "takes over"),
            _ => panic!("{fault}"),
        },
    );
}

#[kernel]
pub unsafe fn reuse(barrier: bool) {
    let words = Scratch::words();
    words.store(tid(), 1);
    thread::sync_threads();
    words.load(255 - tid()); // reads before
    if barrier {
        thread::sync_threads();
    }
    words.store(tid(), 2); // overwrites
    thread::sync_threads(); // Nobody has returned when the others come.
}

#[test]
fn overwriting_what_others_still_read_is_a_race() {
    let run = |barrier, seed| {
        let launch = Launch::new(2, 256).shared(Scratch::BYTES).seed(seed);
        launch.run(|| unsafe { reuse(barrier) })
    };
    every_seed_passes(|seed| run(true, seed));
    every_seed_finds(
        |seed| run(false, seed),
        |fault| match fault.kind {
            FaultKind::SharedRace { access: Access::Store, other, .. } => {
                assert_eq!(other.access, Access::Load);
                assert_eq!(other.location.line(), line("reads before"));
                assert_eq!(other.thread.x + fault.thread.x, 255);
                at(fault, "overwrites");
            }
            FaultKind::SharedRace { access: Access::Load, other, .. } => {
                assert_eq!(other.location.line(), line("overwrites"));
                at(fault, "reads before");
            }
            _ => panic!("{fault}"),
        },
    );
}

#[kernel]
pub unsafe fn all_read_one_writes(barrier: bool) {
    let words = Scratch::words();
    if tid() == 0 {
        words.store(0, 1);
    }
    thread::sync_threads();
    words.load(0);
    warp::sync_warp(warp::FULL_MASK);
    if barrier {
        thread::sync_threads();
    }
    if tid() == 0 {
        words.store(0, 2);
    }
    thread::sync_threads(); // Nobody has returned when the others come.
}

#[test]
fn a_writer_that_is_ordered_after_its_own_warp_races_with_readers_of_others() {
    let run = |barrier, seed| {
        let launch = Launch::new(1, 256).shared(Scratch::BYTES).seed(seed);
        launch.run(|| unsafe { all_read_one_writes(barrier) })
    };
    every_seed_passes(|seed| run(true, seed));
    every_seed_finds(
        |seed| run(false, seed),
        |fault| assert!(matches!(fault.kind, FaultKind::SharedRace { .. }), "{fault}"),
    );
}

#[kernel]
pub unsafe fn both_store(same: bool) {
    Scratch::words().store(if same { tid() / 2 } else { tid() }, 1); // both store
    thread::sync_threads(); // Nobody has returned when the others come.
}

#[test]
fn two_stores_of_one_value_are_a_race_all_the_same() {
    let run =
        |same, seed| Launch::new(1, 32).shared(Scratch::BYTES).seed(seed).run(|| unsafe { both_store(same) });
    every_seed_passes(|seed| run(false, seed));
    every_seed_finds(
        |seed| run(true, seed),
        |fault| {
            let FaultKind::SharedRace { access: Access::Store, other, index, .. } = fault.kind else {
                panic!("{fault}")
            };
            assert_eq!(fault.thread.x as usize / 2, index);
            assert_eq!(other.thread.x, fault.thread.x ^ 1);
            at(fault, "both store");
        },
    );
}

#[kernel]
pub unsafe fn neighbours_in_bytes(wide: bool) {
    if wide && tid() == 3 {
        shared::dynamic::<u32>(0, 16).store(0, 0); // a word
    } else {
        shared::dynamic::<u8>(0, 64).store(tid(), 1); // a byte
    }
}

#[test]
fn neighbouring_bytes_do_not_race_and_overlapping_words_do() {
    let run =
        |wide, seed| Launch::new(1, 32).shared(64).seed(seed).run(|| unsafe { neighbours_in_bytes(wide) });
    every_seed_passes(|seed| run(false, seed));
    every_seed_finds(
        |seed| run(true, seed),
        |fault| {
            let FaultKind::SharedRace { other, .. } = fault.kind else { panic!("{fault}") };
            let mut lines = [fault.location.line(), other.location.line()];
            lines.sort();
            assert_eq!(lines, [line("a word"), line("a byte")]);
            assert!(fault.thread.x < 4 && other.thread.x < 4, "{fault}");
        },
    );
}

#[kernel]
pub unsafe fn within_a_warp(out: GlobalMut<u32>, how: u32) {
    let words = Scratch::words();
    words.store(tid(), 1);
    match how {
        0 => {
            warp::warp_vote_all(warp::FULL_MASK, true);
        }
        1 => {
            warp::warp_sum(1.0);
        }
        2 => warp::sync_warp(0xffff << (tid() & 16)),
        _ => warp::sync_warp(warp::FULL_MASK),
    }
    out.store(tid(), words.load(tid() ^ 16)); // from the other half
    thread::sync_threads(); // Nobody has returned when the others come.
}

#[test]
fn collectives_order_nothing_and_sync_warp_orders_its_lanes() {
    for how in 0..4 {
        let run = |seed| {
            let out = Buffer::poisoned(32);
            let launch = Launch::new(1, 32).shared(Scratch::BYTES).seed(seed);
            launch.run(|| unsafe { within_a_warp(out.view_mut(), how) })
        };
        if how == 3 {
            every_seed_passes(run);
            continue;
        }
        every_seed_finds(run, |fault| {
            at(fault, "from the other half");
            match fault.kind {
                FaultKind::SharedRace { other, .. } => assert_eq!(other.thread.x, fault.thread.x ^ 16),
                FaultKind::UninitialisedShared { .. } => assert_eq!(how, 2),
                _ => panic!("{fault}"),
            }
        });
    }
}

#[kernel]
pub unsafe fn atomic_and_plain(atomic: bool) {
    let words = Scratch::words();
    if tid() == 0 {
        words.store(0, 0);
    }
    thread::sync_threads();
    if atomic || tid() != 5 {
        words.atomic_add(0, 1, Order::Relaxed, Scope::Block); // atomically
    } else {
        words.store(0, 1); // plainly
    }
    thread::sync_threads(); // Nobody has returned when the others come.
}

#[test]
fn atomics_do_not_race_with_each_other_but_with_plain_accesses() {
    let run = |atomic, seed| {
        Launch::new(1, 64).shared(Scratch::BYTES).seed(seed).run(|| unsafe { atomic_and_plain(atomic) })
    };
    every_seed_passes(|seed| run(true, seed));
    every_seed_finds(
        |seed| run(false, seed),
        |fault| {
            let FaultKind::SharedRace { other, .. } = fault.kind else { panic!("{fault}") };
            let mut lines = [fault.location.line(), other.location.line()];
            lines.sort();
            assert_eq!(lines, [line("atomically"), line("plainly")], "{fault}");
            assert!(fault.thread.x == 5 || other.thread.x == 5, "{fault}");
        },
    );
}

#[kernel]
pub unsafe fn loads_and_atomics(plain: bool) {
    let words = Scratch::words();
    if tid() == 0 {
        words.atomic_store(0, 5, Order::Relaxed, Scope::Block);
    }
    thread::sync_threads();
    if tid() == 0 {
        if plain {
            words.load(0);
        }
        words.atomic_load(0, Order::Relaxed, Scope::Block);
    } else {
        words.atomic_add(0, 1, Order::Relaxed, Scope::Block);
    }
    thread::sync_threads();
    words.load(0);
}

#[test]
fn an_atomic_load_does_not_excuse_the_plain_one_before_it() {
    let run = |plain, seed| {
        Launch::new(1, 2).shared(Scratch::BYTES).seed(seed).run(|| unsafe { loads_and_atomics(plain) })
    };
    every_seed_passes(|seed| run(false, seed));
    every_seed_finds(
        |seed| run(true, seed),
        |fault| assert!(matches!(fault.kind, FaultKind::SharedRace { .. }), "{fault}"),
    );
}

#[kernel]
pub unsafe fn third_party(watched: bool) {
    let words = Scratch::words();
    if tid() == 0 {
        words.store(0, 0);
        words.store(1, 0);
    }
    thread::sync_threads();
    if tid() == 0 && watched {
        words.atomic_load(0, Order::Relaxed, Scope::Block); // watches
    }
    if tid() == 32 {
        words.atomic_add(0, 1, Order::Relaxed, Scope::Block);
        words.atomic_store(1, 1, Order::Release, Scope::Block);
    }
    if tid() == 64 {
        while words.atomic_load(1, Order::Acquire, Scope::Block) == 0 {}
        words.store(0, 9); // after the addition
    }
    thread::sync_threads();
}

#[test]
fn a_store_after_one_atomic_still_races_with_another() {
    let run = |watched, seed| {
        Launch::new(1, 65).shared(Scratch::BYTES).seed(seed).run(|| unsafe { third_party(watched) })
    };
    every_seed_passes(|seed| run(false, seed));
    every_seed_finds(
        |seed| run(true, seed),
        |fault| {
            let FaultKind::SharedRace { other, .. } = fault.kind else { panic!("{fault}") };
            let mut lines = [fault.location.line(), other.location.line()];
            lines.sort();
            assert_eq!(lines, [line("watches"), line("after the addition")], "{fault}");
        },
    );
}

#[kernel]
pub unsafe fn left_behind(barrier_first: bool) {
    let words = Scratch::words();
    if tid() >= 32 {
        words.store(tid(), 1); // and leaves
    }
    if barrier_first {
        thread::sync_threads();
    }
    if tid() >= 32 {
        return;
    }
    thread::sync_threads();
    words.load(tid() + 32); // after it left
}

#[test]
fn a_barrier_does_not_order_what_a_thread_did_before_it_returned() {
    let run = |first, seed| {
        Launch::new(1, 64).shared(Scratch::BYTES).seed(seed).run(|| unsafe { left_behind(first) })
    };
    every_seed_passes(|seed| run(true, seed));
    every_seed_finds(
        |seed| run(false, seed),
        |fault| {
            assert!(
                matches!(fault.kind, FaultKind::SharedRace { .. } | FaultKind::UninitialisedShared { .. }),
                "{fault}"
            );
            at(fault, "after it left");
        },
    );
}
