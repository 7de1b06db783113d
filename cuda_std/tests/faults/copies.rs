//! Asynchronous copies that are not waited for.

use crate::support::{every_seed_finds, every_seed_passes};
use crate::{Scratch, at, by, line, tid};
use cuda_std::copy;
use cuda_std::emulator::{Access, Buffer, FaultKind, Launch};
use cuda_std::prelude::*;

#[kernel]
pub unsafe fn fetch(from: Global<u32>, out: GlobalMut<u32>, wait: bool, barrier: bool, reader: u32) {
    let words = Scratch::words();
    copy::copy_async(words, tid(), from, tid()); // copies
    copy::commit_group();
    if wait {
        copy::wait_group::<0>();
    }
    if barrier {
        thread::sync_threads();
    }
    out.store(tid(), words.load(tid() ^ reader as usize)); // uses
    copy::wait_all();
}

#[test]
fn a_copys_destination_is_untouched_until_it_was_waited_for_and_ordered() {
    let from = Buffer::from_slice(&(0..64).collect::<Vec<_>>());
    let run = |wait, barrier, reader, seed| {
        let out = Buffer::poisoned(64);
        let launch = Launch::new(1, 64).shared(Scratch::BYTES).seed(seed);
        let result = launch.run(|| unsafe { fetch(from.view(), out.view_mut(), wait, barrier, reader) });
        result.inspect(|_| assert_eq!(out.get(5), Some(5 ^ reader)))
    };
    every_seed_passes(|seed| run(true, true, 33, seed));
    every_seed_passes(|seed| run(true, false, 0, seed));
    for (wait, barrier, reader) in
        [(false, false, 0), (false, true, 0), (false, true, 33), (true, false, 33), (true, false, 1)]
    {
        every_seed_finds(
            |seed| run(wait, barrier, reader, seed),
            |fault| {
                at(fault, "uses");
                match fault.kind {
                    FaultKind::PendingCopy { access: Access::Load, waited, other, .. } => {
                        assert_eq!(other.thread.x, fault.thread.x ^ reader);
                        assert_eq!(other.location.line(), line("copies"));
                        assert!(wait || !waited, "{fault}");
                    }
                    // The other thread has not even begun.
                    FaultKind::UninitialisedShared { .. } => assert!(!barrier && reader > 0, "{fault}"),
                    _ => panic!("{fault}"),
                }
            },
        );
    }
}

#[kernel]
pub unsafe fn two_groups(from: Global<u32>, out: GlobalMut<u32>, newest: u32) {
    let words = Scratch::words();
    copy::copy_async(words, tid(), from, tid());
    copy::commit_group();
    copy::copy_async(words, 32 + tid(), from, 32 + tid());
    copy::commit_group();
    // Not in a group at all.
    copy::copy_async(words, 64 + tid(), from, 32 + tid());
    match newest {
        2 => copy::wait_group::<2>(),
        1 => copy::wait_group::<1>(),
        0 => copy::wait_group::<0>(),
        _ => copy::wait_all(),
    }
    for group in 0..3 {
        out.store(group, words.load(32 * group + tid())); // of a group
    }
    copy::wait_all();
}

#[test]
fn a_wait_covers_all_groups_but_the_newest() {
    let from = Buffer::filled(64, 1);
    for (newest, covered) in [(2, 0), (1, 1), (0, 2), (99, 3)] {
        let run = |seed| {
            let out = Buffer::poisoned(3);
            let launch = Launch::new(1, 1).shared(Scratch::BYTES).seed(seed);
            let result = launch.run(|| unsafe { two_groups(from.view(), out.view_mut(), newest) });
            let written = (0..3).filter(|group| out.get(*group).is_some()).count();
            assert_eq!(written, covered, "seed {seed}");
            result
        };
        if covered == 3 {
            every_seed_passes(run);
            continue;
        }
        every_seed_finds(run, |fault| {
            let FaultKind::PendingCopy { index, waited: false, .. } = fault.kind else { panic!("{fault}") };
            assert_eq!(index, 32 * covered);
            at(fault, "of a group");
        });
    }
}

#[kernel]
pub unsafe fn overwrite(from: Global<u32>, wait: bool) {
    let words = Scratch::words();
    copy::copy_async(words, 0, from, 0);
    if wait {
        copy::wait_all();
    }
    words.store(0, 3); // overwrites the copy
    copy::wait_all();
}

#[test]
fn a_copys_destination_is_not_overwritten_before_the_wait() {
    let from = Buffer::from_slice(&[1]);
    let run = |wait, seed| {
        let launch = Launch::new(1, 1).shared(Scratch::BYTES).seed(seed);
        launch.run(|| unsafe { overwrite(from.view(), wait) })
    };
    every_seed_passes(|seed| run(true, seed));
    every_seed_finds(
        |seed| run(false, seed),
        |fault| {
            assert!(
                matches!(fault.kind, FaultKind::PendingCopy { access: Access::Store, waited: false, .. }),
                "{fault}"
            );
            at(fault, "overwrites the copy");
        },
    );
}

#[kernel]
pub unsafe fn refill(from: Global<u32>, barrier: bool) {
    let words = Scratch::words();
    copy::copy_async(words, tid(), from, tid());
    copy::wait_all();
    thread::sync_threads();
    words.load(63 - tid()); // still reads
    if barrier {
        thread::sync_threads();
    }
    copy::copy_async(words, tid(), from, tid()); // refills
    copy::wait_all();
}

#[test]
fn a_stage_is_not_refilled_while_others_read_it() {
    let from = Buffer::filled(64, 1);
    let run = |barrier, seed| {
        let launch = Launch::new(1, 64).shared(Scratch::BYTES).seed(seed);
        launch.run(|| unsafe { refill(from.view(), barrier) })
    };
    every_seed_passes(|seed| run(true, seed));
    every_seed_finds(
        |seed| run(false, seed),
        |fault| match fault.kind {
            FaultKind::SharedRace { access: Access::CopyDestination, .. } => at(fault, "refills"),
            FaultKind::PendingCopy { access: Access::Load, .. } => at(fault, "still reads"),
            _ => panic!("{fault}"),
        },
    );
}

#[kernel]
pub unsafe fn change_source(data: GlobalMut<u32>, wait: bool, writer: u32) {
    let words = Scratch::words();
    if tid() == 0 {
        copy::copy_async(words, 0, data.as_global(), 0); // from here
        if wait {
            copy::wait_all();
        }
    }
    thread::sync_threads();
    if tid() == writer as usize {
        data.store(0, 2); // changes the source
    }
    copy::wait_all();
}

#[test]
fn a_copys_source_is_not_changed_before_the_wait() {
    let run = |wait, writer, seed| {
        let data = Buffer::filled(1, 1);
        let launch = Launch::new(1, 64).shared(Scratch::BYTES).seed(seed);
        launch.run(|| unsafe { change_source(data.view_mut(), wait, writer) })
    };
    for writer in [0, 1, 40] {
        every_seed_passes(|seed| run(true, writer, seed));
    }
    // Another thread may come before or after the copying thread's own wait at the end.
    every_seed_finds(
        |seed| run(false, 0, seed),
        |fault| {
            let FaultKind::PendingCopy { access: Access::Store, other, .. } = fault.kind else {
                panic!("{fault}")
            };
            assert_eq!((other.access, other.thread.x), (Access::CopySource, 0));
            at(fault, "changes the source");
        },
    );
    every_seed_finds(
        |seed| run(false, 40, seed),
        |fault| {
            assert!(
                matches!(fault.kind, FaultKind::PendingCopy { .. } | FaultKind::GlobalWriteRace { .. }),
                "{fault}"
            );
            at(fault, "changes the source");
        },
    );
}

#[kernel]
pub unsafe fn forget(from: Global<u32>, wait: bool) {
    copy::copy_async(Scratch::words(), tid(), from, tid()); // forgotten
    copy::commit_group();
    if wait || tid() != 3 {
        copy::wait_group::<0>();
    }
}

#[test]
fn a_thread_waits_for_its_copies_before_it_returns() {
    let from = Buffer::filled(32, 1);
    let run = |wait, seed| {
        let launch = Launch::new(1, 32).shared(Scratch::BYTES).seed(seed);
        launch.run(|| unsafe { forget(from.view(), wait) })
    };
    every_seed_passes(|seed| run(true, seed));
    every_seed_finds(
        |seed| run(false, seed),
        |fault| {
            assert_eq!(fault.kind, FaultKind::CopyNotAwaited { copies: 1 });
            at(fault, "forgotten");
            by(fault, 0, 3);
        },
    );
}
