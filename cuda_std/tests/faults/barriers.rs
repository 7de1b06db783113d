//! Barriers that not all threads reach.

use crate::support::{every_seed_finds, every_seed_passes};
use crate::{at, by, line, tid};
use cuda_std::emulator::{Buffer, FaultKind, Launch};
use cuda_std::prelude::*;

#[kernel]
pub unsafe fn two_barriers(split: bool) {
    if split && tid() == 7 {
        thread::sync_threads(); // one
    } else {
        thread::sync_threads(); // or the other
    }
}

#[kernel]
pub unsafe fn two_kinds(split: bool) {
    if split && tid() < 16 {
        thread::sync_threads_count(true); // counts
    } else {
        thread::sync_threads_or(true); // ors
    }
}

#[test]
fn threads_at_different_barriers_are_found() {
    let launch = Launch::new(2, 64);
    every_seed_passes(|seed| launch.seed(seed).run(|| unsafe { two_barriers(false) }));
    every_seed_passes(|seed| launch.seed(seed).run(|| unsafe { two_kinds(false) }));
    every_seed_finds(
        |seed| launch.seed(seed).run(|| unsafe { two_barriers(true) }),
        |fault| {
            let FaultKind::BarrierMismatch { other } = fault.kind else { panic!("{fault}") };
            assert_eq!(fault.block, other.block);
            assert!((fault.thread.x == 7) != (other.thread.x == 7), "{fault}");
            let seven = if fault.thread.x == 7 { fault.location } else { other.location };
            assert_eq!(seven.line(), line("one"));
        },
    );
    every_seed_finds(
        |seed| launch.seed(seed).run(|| unsafe { two_kinds(true) }),
        |fault| assert!(matches!(fault.kind, FaultKind::BarrierMismatch { .. }), "{fault}"),
    );
}

#[kernel]
pub unsafe fn barrier_in_a_branch(all: bool) {
    if all || tid() < 16 {
        thread::sync_threads(); // in a branch
    }
    warp::sync_warp(warp::FULL_MASK); // for the warp
}

#[test]
fn a_barrier_that_some_cannot_reach_is_found() {
    let launch = Launch::new(1, 64);
    every_seed_passes(|seed| launch.seed(seed).run(|| unsafe { barrier_in_a_branch(true) }));
    every_seed_finds(
        |seed| launch.seed(seed).run(|| unsafe { barrier_in_a_branch(false) }),
        |fault| {
            let FaultKind::BarrierDivergence { waiting: 16, other } = fault.kind else { panic!("{fault}") };
            at(fault, "in a branch");
            by(fault, 0, 0);
            assert_eq!((other.thread.x, other.location.line()), (16, line("for the warp")));
        },
    );
}

#[kernel]
pub unsafe fn some_return(out: GlobalMut<u32>, keep: u32) {
    if tid() >= keep as usize {
        return;
    }
    out.store(tid(), thread::sync_threads_count(tid().is_multiple_of(2)));
    thread::sync_threads();
}

#[test]
fn threads_that_have_returned_are_exempt_from_barriers() {
    for keep in [1, 31, 32, 50, 64] {
        every_seed_passes(|seed| {
            let out = Buffer::poisoned(64);
            let launch = Launch::new(1, 64).seed(seed);
            let result = launch.run(|| unsafe { some_return(out.view_mut(), keep) });
            assert_eq!(out.get(0), Some(keep.div_ceil(2)));
            result.inspect(|report| assert_eq!(report.barriers, 2))
        });
    }
}
