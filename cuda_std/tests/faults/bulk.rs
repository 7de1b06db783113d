//! Bulk copies and their barriers.

use crate::support::{every_seed_finds, every_seed_passes};
use crate::{at, by, line, tid};
use cuda_std::bulk::{self, Barrier};
use cuda_std::emulator::{Access, Buffer, Fault, FaultKind, Launch, Report, Space};
use cuda_std::prelude::*;
use cuda_std::shared_layout;

shared_layout! {
    pub struct Stage {
        barriers: [Barrier; 4],
        words: [u32; 64],
        more: [u32; 64],
    }
}

fn numbers(len: u32) -> Buffer<u32> {
    Buffer::from_slice(&(0..len).collect::<Vec<_>>())
}

fn launch(threads: u32, seed: u64) -> Launch {
    Launch { poll_limit: 1000, ..Launch::new(1, threads).shared(Stage::BYTES).seed(seed) }
}

/// What a kernel leaves out or gets wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Wrong {
    Nothing,
    Init,
    InitTwice,
    InitFence,
    Wait,
    Phase,
    TooFewBytes,
    TooManyBytes,
    NoArrival,
    TwoArrivals,
    TwoCopies,
    ManyBytes,
    Odd,
    Unaligned,
    UnalignedSource,
    Empty,
    BeyondSource,
    BeyondStage,
}

/// Two stages of 16 words, one after the other, through one barrier.
#[kernel]
pub unsafe fn fetch(from: Global<u32>, out: GlobalMut<u32>, wrong: Wrong) {
    let (barriers, words) = (Stage::barriers(), Stage::words());
    if wrong != Wrong::Init {
        bulk::init(barriers, 1, 1);
    }
    if wrong == Wrong::InitTwice {
        bulk::init(barriers, 1, 1); // once more
    }
    if wrong != Wrong::InitFence {
        bulk::fence();
    }
    for phase in 0..2 {
        match wrong {
            Wrong::NoArrival => {}
            Wrong::TooFewBytes => bulk::arrive_expect(barriers, 1, 48),
            Wrong::TooManyBytes => bulk::arrive_expect(barriers, 1, 80),
            Wrong::ManyBytes => bulk::arrive_expect(barriers, 1, 1 << 20),
            _ => bulk::arrive_expect(barriers, 1, 64),
        }
        if wrong == Wrong::TwoArrivals {
            bulk::arrive_expect(barriers, 1, 0); // arrives again
        }
        let (to, source, len) = match wrong {
            Wrong::Odd => (words, from, 15),
            Wrong::Unaligned => (words.slice(1, 16), from, 16),
            Wrong::UnalignedSource => (words, from.slice(1, 16), 16),
            Wrong::Empty => (words, from, 0),
            Wrong::BeyondSource => (words, from.slice(24, 8), 16),
            Wrong::BeyondStage => (words.slice(56, 8), from, 16),
            _ => (words, from.slice(16 * phase, 16), 16),
        };
        bulk::copy_in(to, source, len, barriers, 1); // starts to fetch
        if wrong == Wrong::TwoCopies {
            bulk::copy_in(Stage::more(), from, 16, barriers, 1);
        }
        if wrong != Wrong::Wait {
            bulk::wait(barriers, 1, if wrong == Wrong::Phase { 1 } else { phase as u32 }); // waits for the bytes
        }
        for word in 0..16 {
            out.store(16 * phase + word, words.load(word)); // reads the stage
        }
    }
}

fn run_fetch(wrong: Wrong, seed: u64) -> Result<Report, Fault> {
    let (from, out) = (numbers(32), Buffer::poisoned(32));
    let result = launch(1, seed).run(|| unsafe { fetch(from.view(), out.view_mut(), wrong) });
    result.inspect(|report| {
        assert_eq!(out.to_vec(), from.to_vec());
        assert_eq!((report.bulk_copies, report.global.bytes_loaded), (2, 128));
    })
}

#[test]
fn bytes_that_were_waited_for_are_there() {
    every_seed_passes(|seed| run_fetch(Wrong::Nothing, seed));
}

#[test]
fn a_copy_in_that_is_wrong_is_found_by_kind() {
    let byte = 8;
    let alignment =
        |bytes, global_byte, shared_byte| Some(FaultKind::BulkAlignment { bytes, global_byte, shared_byte });
    let outside = |space, access, index, start, len, buffer_len| {
        Some(FaultKind::OutOfBounds { space, access, index, start, len, buffer_len })
    };
    for (wrong, marker, kind) in [
        (Wrong::Init, "", Some(FaultKind::BarrierUninitialised { byte })),
        (Wrong::InitTwice, "once more", Some(FaultKind::BarrierInitialised { byte })),
        (Wrong::InitFence, "starts to fetch", Some(FaultKind::ProxyFence { byte })),
        (Wrong::Wait, "reads the stage", None),
        (Wrong::Phase, "waits for the bytes", Some(FaultKind::BarrierPhase { phase: 1, ended: 0 })),
        (Wrong::TooFewBytes, "starts to fetch", Some(FaultKind::BulkBytes { expected: 48, copied: 64 })),
        (Wrong::NoArrival, "waits for the bytes", None),
        (Wrong::TooManyBytes, "waits for the bytes", None),
        (Wrong::TwoCopies, "", Some(FaultKind::BulkBytes { expected: 64, copied: 128 })),
        (Wrong::TwoArrivals, "arrives again", Some(FaultKind::BarrierOverrun { arrivals: 1 })),
        (
            Wrong::ManyBytes,
            "",
            Some(FaultKind::BarrierLimit { what: "bytes", value: 1 << 20, limit: (1 << 20) - 1 }),
        ),
        (Wrong::Odd, "starts to fetch", alignment(60, 0, 128)),
        (Wrong::Unaligned, "starts to fetch", alignment(64, 0, 132)),
        (Wrong::UnalignedSource, "starts to fetch", alignment(64, 4, 128)),
        (Wrong::Empty, "starts to fetch", alignment(0, 0, 128)),
        (Wrong::BeyondSource, "starts to fetch", outside(Space::Global, Access::CopySource, 15, 24, 8, 32)),
        (
            Wrong::BeyondStage,
            "starts to fetch",
            outside(Space::Shared, Access::CopyDestination, 15, 56, 8, 64),
        ),
    ] {
        every_seed_finds(
            |seed| run_fetch(wrong, seed),
            |fault| {
                match (&kind, &fault.kind) {
                    (Some(kind), found) => assert_eq!(found, kind, "{wrong:?}: {fault}"),
                    (None, FaultKind::PendingCopy { access: Access::Load, waited: false, other, .. }) => {
                        assert_eq!((wrong, other.access), (Wrong::Wait, Access::CopyDestination));
                        assert_eq!(other.location.line(), line("starts to fetch"));
                    }
                    // The phase never ends.
                    (None, FaultKind::Livelock { .. }) => assert_ne!(wrong, Wrong::Wait),
                    _ => panic!("{wrong:?}: {fault}"),
                }
                if !marker.is_empty() {
                    at(fault, marker);
                }
            },
        );
    }
}

/// Thread 0 fetches, `waiters` wait, and thread `reader` reads.
#[kernel]
pub unsafe fn hand_on(from: Global<u32>, out: GlobalMut<u32>, waiters: u32, barrier: bool, reader: usize) {
    let (barriers, words) = (Stage::barriers(), Stage::words());
    if tid() == 0 {
        bulk::init(barriers, 0, 1);
        bulk::fence();
        bulk::arrive_expect(barriers, 0, 64);
        bulk::copy_in(words, from, 16, barriers, 0);
    }
    thread::sync_threads();
    if waiters >> tid() & 1 == 1 {
        bulk::wait(barriers, 0, 0);
    }
    if barrier {
        thread::sync_threads();
    }
    if tid() == reader {
        out.store(0, words.load(5)); // what was handed on
    }
    // So that the copy is waited for whoever reads.
    bulk::wait(barriers, 0, 0);
}

#[test]
fn a_phase_orders_those_who_wait_and_those_after_them() {
    let from = numbers(16);
    let run = |waiters, barrier, reader, seed| {
        let out = Buffer::poisoned(1);
        launch(32, seed)
            .run(|| unsafe { hand_on(from.view(), out.view_mut(), waiters, barrier, reader) })
            .inspect(|_| assert_eq!(out.get(0), Some(5)))
    };
    for (waiters, barrier, reader) in
        [(1, false, 0), (2, false, 1), (3, false, 0), (3, false, 1), (1, true, 9), (2, true, 0)]
    {
        every_seed_passes(|seed| run(waiters, barrier, reader, seed));
    }
    for (waiters, barrier, reader) in
        [(0, false, 0), (0, true, 0), (0, true, 9), (1, false, 1), (2, false, 0)]
    {
        every_seed_finds(
            |seed| run(waiters, barrier, reader, seed),
            |fault| {
                assert!(matches!(fault.kind, FaultKind::PendingCopy { access: Access::Load, .. }), "{fault}");
                at(fault, "what was handed on");
                by(fault, 0, reader as u32);
            },
        );
    }
}

/// Two stages, each with a barrier; thread 0 waits for both, thread 1 for the second.
#[kernel]
pub unsafe fn two_stages(from: Global<u32>, out: GlobalMut<u32>, reader_of_first: usize) {
    let (barriers, words, more) = (Stage::barriers(), Stage::words(), Stage::more());
    if tid() == 0 {
        bulk::init(barriers, 0, 1);
        bulk::init(barriers, 1, 1);
        bulk::fence();
    }
    thread::sync_threads();
    if tid() == 0 {
        bulk::arrive_expect(barriers, 0, 64);
        bulk::copy_in(words, from, 16, barriers, 0);
        bulk::arrive_expect(barriers, 1, 64);
        bulk::copy_in(more, from, 16, barriers, 1);
        bulk::wait(barriers, 0, 0);
    }
    bulk::wait(barriers, 1, 0);
    out.store(tid(), more.load(tid()));
    if tid() == reader_of_first {
        out.store(2, words.load(2)); // of the first stage
    }
}

#[test]
fn a_phase_of_another_barrier_orders_nothing() {
    let from = numbers(16);
    let run = |reader, seed| {
        let out = Buffer::poisoned(3);
        let result = launch(2, seed).run(|| unsafe { two_stages(from.view(), out.view_mut(), reader) });
        result.inspect(|_| assert_eq!(out.to_vec(), [0, 1, 2]))
    };
    every_seed_passes(|seed| run(0, seed));
    every_seed_finds(
        |seed| run(1, seed),
        |fault| {
            assert!(matches!(fault.kind, FaultKind::PendingCopy { access: Access::Load, .. }), "{fault}");
            at(fault, "of the first stage");
        },
    );
}

/// Thread 0 waits, and hands on to its warp.
#[kernel]
pub unsafe fn to_the_warp(from: Global<u32>, out: GlobalMut<u32>, sync: bool) {
    let (barriers, words) = (Stage::barriers(), Stage::words());
    if tid() == 0 {
        bulk::init(barriers, 0, 1);
        bulk::fence();
        bulk::arrive_expect(barriers, 0, 128);
        bulk::copy_in(words, from, 32, barriers, 0);
        bulk::wait(barriers, 0, 0);
    }
    if sync {
        warp::sync_warp(warp::FULL_MASK);
    } else {
        warp::warp_vote_all(warp::FULL_MASK, true);
    }
    out.store(tid(), words.load(31 - tid())); // of the warp
}

#[test]
fn sync_warp_hands_on_what_a_lane_waited_for_and_a_vote_does_not() {
    let from = numbers(32);
    let run = |sync, seed| {
        let out = Buffer::poisoned(32);
        launch(32, seed).run(|| unsafe { to_the_warp(from.view(), out.view_mut(), sync) })
    };
    every_seed_passes(|seed| run(true, seed));
    every_seed_finds(
        |seed| run(false, seed),
        |fault| {
            assert!(matches!(fault.kind, FaultKind::PendingCopy { waited: true, .. }), "{fault}");
            at(fault, "of the warp");
        },
    );
}

/// A barrier of two arrivals, without bytes: what thread 1 stored before its own is there.
#[kernel]
pub unsafe fn arrivals(out: GlobalMut<u32>, late: bool) {
    let (barriers, words) = (Stage::barriers(), Stage::words());
    if tid() == 0 {
        bulk::init(barriers, 0, 2);
    }
    thread::sync_threads();
    if tid() == 1 {
        if late {
            bulk::arrive_expect(barriers, 0, 0);
            words.store(0, 7);
        } else {
            words.store(0, 7);
            bulk::arrive_expect(barriers, 0, 0);
        }
    }
    if tid() == 0 {
        bulk::arrive_expect(barriers, 0, 0);
        bulk::wait(barriers, 0, 0);
        out.store(0, words.load(0)); // after both
    }
}

#[test]
fn arrivals_are_ordered_before_those_who_wait() {
    let run = |late, seed| {
        let out = Buffer::poisoned(1);
        let result = launch(2, seed).run(|| unsafe { arrivals(out.view_mut(), late) });
        result.inspect(|_| assert_eq!(out.get(0), Some(7)))
    };
    every_seed_passes(|seed| run(false, seed));
    every_seed_finds(
        |seed| run(true, seed),
        |fault| {
            assert!(
                matches!(fault.kind, FaultKind::SharedRace { .. } | FaultKind::UninitialisedShared { .. }),
                "{fault}"
            );
        },
    );
}

#[kernel]
pub unsafe fn use_at_once(barrier: bool) {
    if tid() == 0 {
        bulk::init(Stage::barriers(), 0, 64); // initialises
    }
    if barrier {
        thread::sync_threads();
    }
    bulk::arrive_expect(Stage::barriers(), 0, 0); // uses the barrier
}

#[test]
fn a_barrier_is_not_used_before_all_know_that_it_is_one() {
    let run = |barrier, seed| launch(64, seed).run(|| unsafe { use_at_once(barrier) });
    every_seed_passes(|seed| run(true, seed));
    every_seed_finds(
        |seed| run(false, seed),
        |fault| match fault.kind {
            FaultKind::BarrierUninitialised { byte: 0 } => at(fault, "uses the barrier"),
            FaultKind::SharedRace { .. } => {
                assert!([line("uses the barrier"), line("initialises")].contains(&fault.location.line()));
            }
            _ => panic!("{fault}"),
        },
    );
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Out {
    Right,
    /// No fence between store and copy.
    Unfenced,
    /// The fence before the store.
    FencedEarly,
    /// The fence in the copying thread, after the barrier.
    FencedLate,
    /// The source is stored to again before it is read.
    Overwritten,
    /// It is, after a wait for the groups before this one.
    WaitedForOther,
    /// The destination is stored to after a wait for the source.
    Written,
    /// Another thread reads the destination after that.
    Read,
    /// The thread returns at once.
    Forgotten,
}

/// Eight threads store, thread 0 copies out.
#[kernel]
pub unsafe fn write(out: GlobalMut<u32>, how: Out) {
    let words = Stage::words();
    if how == Out::FencedEarly {
        bulk::fence();
    }
    words.store(tid(), 10 + tid() as u32);
    if !matches!(how, Out::Unfenced | Out::FencedEarly | Out::FencedLate) {
        bulk::fence();
    }
    thread::sync_threads();
    if tid() == 0 {
        if how == Out::FencedLate {
            bulk::fence();
        }
        bulk::copy_out(out, words, 8); // writes
        bulk::commit_group();
        match how {
            Out::Overwritten | Out::Forgotten => {}
            Out::WaitedForOther => bulk::wait_group_read::<1>(),
            Out::Written | Out::Read => bulk::wait_group_read::<0>(),
            _ => bulk::wait_group::<0>(),
        }
        if how == Out::Forgotten {
            return;
        }
        words.store(3, 0); // stores to the source
        if how == Out::Written {
            out.store(4, 0); // stores to what is written
        }
    }
    thread::sync_threads();
    if tid() == 5 && how != Out::Forgotten {
        out.load(2); // reads what is written
    }
    bulk::wait_group::<0>();
}

#[test]
fn a_copy_out_is_fenced_and_waited_for() {
    let run = |how, seed| {
        let out = Buffer::poisoned(8);
        let result = launch(8, seed).run(|| unsafe { write(out.view_mut(), how) });
        result.inspect(|_| assert_eq!(out.to_vec(), (10..18).collect::<Vec<_>>()))
    };
    every_seed_passes(|seed| run(Out::Right, seed));
    every_seed_passes(|seed| run(Out::FencedLate, seed));
    for (how, marker) in [
        (Out::Unfenced, "writes"),
        (Out::FencedEarly, "writes"),
        (Out::Overwritten, "stores to the source"),
        (Out::WaitedForOther, "stores to the source"),
        (Out::Written, "stores to what is written"),
        (Out::Read, "reads what is written"),
        (Out::Forgotten, "writes"),
    ] {
        every_seed_finds(
            |seed| run(how, seed),
            |fault| {
                at(fault, marker);
                match (how, &fault.kind) {
                    (Out::Unfenced | Out::FencedEarly, FaultKind::ProxyFence { byte: 128 }) => {}
                    (Out::Forgotten, FaultKind::CopyNotAwaited { copies: 1 }) => by(fault, 0, 0),
                    (_, FaultKind::PendingCopy { waited: false, other, .. }) => {
                        assert_eq!(other.location.line(), line("writes"));
                    }
                    // Thread 0 has waited by then, and nothing orders the two.
                    (Out::Read, FaultKind::GlobalReadRace { other, .. }) => {
                        assert_eq!(other.access, Access::CopyDestination);
                    }
                    _ => panic!("{how:?}: {fault}"),
                }
            },
        );
    }
}

/// Thread 0 fetches, and something else happens before it waits.
#[kernel]
pub unsafe fn meddle(data: GlobalMut<u32>, how: u32) {
    let (barriers, words) = (Stage::barriers(), Stage::words());
    bulk::init(barriers, 0, 1);
    if how == 1 {
        bulk::fence();
        words.store(2, 9);
    }
    if how != 1 {
        bulk::fence();
    }
    bulk::arrive_expect(barriers, 0, 64);
    bulk::copy_in(words, data.as_global(), 16, barriers, 0); // copies in
    match how {
        2 => words.store(2, 9), // stores to the destination
        3 => data.store(2, 9),  // stores to the global source
        4 => bulk::copy_in(words, data.as_global(), 16, barriers, 0), // copies over a copy
        5 => bulk::copy_out(data, words, 16), // copies out what has not come
        6 => return,
        _ => {}
    }
    bulk::wait(barriers, 0, 0);
    data.store(2, 9);
    words.store(2, 9);
}

#[test]
fn both_sides_of_a_copy_in_are_left_alone_until_the_wait() {
    let run = |how, seed| {
        let data = numbers(16);
        launch(1, seed).run(|| unsafe { meddle(data.view_mut(), how) })
    };
    every_seed_passes(|seed| run(0, seed));
    for (how, marker) in [
        (1, "copies in"),
        (2, "stores to the destination"),
        (3, "stores to the global source"),
        (4, "copies over a copy"),
        (5, "copies out what has not come"),
        (6, "copies in"),
    ] {
        every_seed_finds(
            |seed| run(how, seed),
            |fault| {
                at(fault, marker);
                match (how, &fault.kind) {
                    (1, FaultKind::ProxyFence { byte: 128 })
                    | (6, FaultKind::CopyNotAwaited { copies: 1 }) => {}
                    (2..=5, FaultKind::PendingCopy { waited: false, other, .. }) => {
                        assert_eq!(other.location.line(), line("copies in"));
                    }
                    _ => panic!("{how}: {fault}"),
                }
            },
        );
    }
}

/// A ring of four stages of 16 words, three ahead; each is copied out from where it came.
#[kernel]
pub unsafe fn ring(from: Global<u32>, out: GlobalMut<u32>, pieces: usize, wrong: bool) {
    let (barriers, words) = (Stage::barriers(), Stage::words());
    for stage in 0..4 {
        bulk::init(barriers, stage, 1);
    }
    bulk::fence();
    let (mut started, mut done) = (0, 0);
    while done < pieces {
        if started < pieces && started < done + 3 {
            if wrong {
                bulk::wait_group_read::<2>();
            } else {
                bulk::wait_group_read::<1>();
            }
            bulk::arrive_expect(barriers, started % 4, 64);
            let stage = words.slice(started % 4 * 16, 16);
            bulk::copy_in(stage, from.slice(started * 16, 16), 16, barriers, started % 4); // into the ring
            started += 1;
        } else {
            bulk::wait(barriers, done % 4, (done / 4) as u32);
            bulk::copy_out(out.slice(done * 16, 16), words.slice(done % 4 * 16, 16), 16);
            bulk::commit_group();
            done += 1;
        }
    }
    bulk::wait_group_read::<0>();
}

#[test]
fn a_ring_goes_round_and_one_that_is_refilled_early_is_found() {
    let from = numbers(16 * 11);
    let run = |wrong, seed| {
        let out = Buffer::poisoned(16 * 11);
        let result = launch(1, seed).run(|| unsafe { ring(from.view(), out.view_mut(), 11, wrong) });
        result.inspect(|_| assert_eq!(out.to_vec(), from.to_vec()))
    };
    every_seed_passes(|seed| run(false, seed));
    every_seed_finds(
        |seed| run(true, seed),
        |fault| {
            assert!(matches!(fault.kind, FaultKind::PendingCopy { waited: false, .. }), "{fault}");
            at(fault, "into the ring");
        },
    );
}
