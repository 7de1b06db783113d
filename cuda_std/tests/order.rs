//! What orders accesses: chains of releases and acquires, within a block and across blocks.

#![allow(
    unsafe_op_in_unsafe_fn,
    clippy::missing_safety_doc,
    clippy::undocumented_unsafe_blocks,
    missing_docs,
    reason = "kernels of a few lines, some of them wrong"
)]

mod support;

use cuda_std::atomic::{Fence, Order, Scope, fence};
use cuda_std::emulator::{Buffer, Fault, FaultKind, Launch, Report};
use cuda_std::prelude::*;
use cuda_std::shared_layout;
use support::{every_seed_finds, every_seed_passes};

fn is_a_race(fault: &Fault) {
    let race = matches!(
        fault.kind,
        FaultKind::GlobalReadRace { .. } | FaultKind::GlobalWriteRace { .. } | FaultKind::SharedRace { .. }
    );
    assert!(race, "{fault}");
}

/// How a message is sent and received.
#[derive(Clone, Copy)]
struct Protocol {
    send_fence: Option<Scope>,
    send: Order,
    scope: Scope,
    receive: Order,
    receive_fence: Option<Scope>,
}

const RELAXED: Protocol = Protocol {
    send_fence: None,
    send: Order::Relaxed,
    scope: Scope::Device,
    receive: Order::Relaxed,
    receive_fence: None,
};
const FENCES: Protocol =
    Protocol { send_fence: Some(Scope::Device), receive_fence: Some(Scope::Device), ..RELAXED };
const OPERATIONS: Protocol = Protocol { send: Order::Release, receive: Order::Acquire, ..RELAXED };

/// Right, and wrong, across blocks.
const PROTOCOLS: [(Protocol, bool); 9] = [
    (OPERATIONS, true),
    (FENCES, true),
    (Protocol { send: Order::Release, receive_fence: Some(Scope::System), ..RELAXED }, true),
    (Protocol { send_fence: Some(Scope::Device), receive: Order::Acquire, ..RELAXED }, true),
    (RELAXED, false),
    (Protocol { receive: Order::Relaxed, ..OPERATIONS }, false),
    (Protocol { send: Order::Relaxed, ..OPERATIONS }, false),
    (Protocol { send_fence: Some(Scope::Block), ..FENCES }, false),
    (Protocol { scope: Scope::Block, ..OPERATIONS }, false),
];

impl Protocol {
    unsafe fn send(self, flag: GlobalMut<u32>) {
        if let Some(scope) = self.send_fence {
            fence(Fence::AcqRel, scope);
        }
        flag.atomic_store(0, 1, self.send, self.scope);
    }
    unsafe fn receive(self, flag: GlobalMut<u32>) {
        while flag.atomic_load(0, self.receive, self.scope) == 0 {
            thread::nanosleep(20);
        }
        if let Some(scope) = self.receive_fence {
            fence(Fence::SeqCst, scope);
        }
    }
}

/// Block 0 writes with all its threads, thread 0 sends; block 1 receives with a thread and reads with all.
unsafe fn message(data: GlobalMut<u32>, flag: GlobalMut<u32>, out: GlobalMut<u32>, protocol: Protocol) {
    let (thread, threads) = (thread::thread_idx_x(), thread::block_dim_x());
    if thread::block_idx_x() == 0 {
        data.store(thread as usize, thread + 7);
        thread::sync_threads();
        if thread == 0 {
            protocol.send(flag);
        }
    } else {
        if thread == threads - 1 {
            protocol.receive(flag);
        }
        thread::sync_threads();
        out.store(thread as usize, data.load(((thread + 1) % threads) as usize));
    }
}

#[test]
fn messages_between_blocks_need_a_release_and_an_acquire() {
    for (protocol, right) in PROTOCOLS {
        let run = |seed| -> Result<Report, Fault> {
            let (data, flag, out) = (Buffer::poisoned(48), Buffer::filled(1, 0), Buffer::poisoned(48));
            let launch = Launch::new(2, 48).seed(seed);
            let report = launch
                .run(|| unsafe { message(data.view_mut(), flag.view_mut(), out.view_mut(), protocol) })?;
            assert_eq!(out.get(1), Some(9));
            Ok(report)
        };
        if right { every_seed_passes(run) } else { every_seed_finds(run, is_a_race) }
    }
}

/// Block 0 releases and writes on; block 1 acquires and reads what was written before or after.
unsafe fn early_or_late(data: GlobalMut<u32>, flag: GlobalMut<u32>, late: u32, fences: bool) {
    let protocol = if fences { FENCES } else { OPERATIONS };
    if thread::block_idx_x() == 0 {
        data.store(0, 1);
        protocol.send(flag);
        data.store(1, 1);
    } else {
        protocol.receive(flag);
        data.load(late as usize);
    }
}

#[test]
fn a_release_does_not_cover_what_comes_after_it() {
    let run = |late, fences, seed| {
        let (data, flag) = (Buffer::filled(2, 0), Buffer::filled(1, 0));
        let launch = Launch::new(2, 1).seed(seed);
        launch.run(|| unsafe { early_or_late(data.view_mut(), flag.view_mut(), late, fences) })
    };
    for fences in [false, true] {
        every_seed_passes(|seed| run(0, fences, seed));
        every_seed_finds(|seed| run(1, fences, seed), is_a_race);
    }
}

/// Block 0 releases 1; then 2 is written without a release, by itself or by block 1; block 2 acquires the 2.
unsafe fn relayed(data: GlobalMut<u32>, flag: GlobalMut<u32>, itself: bool, rmw: bool) {
    let scope = Scope::Device;
    let block = thread::block_idx_x();
    if block == 0 {
        data.store(0, 1);
        flag.atomic_store(0, 1, Order::Release, scope);
    }
    if block == u32::from(!itself) {
        while flag.atomic_load(0, Order::Relaxed, scope) == 0 {}
        if rmw {
            flag.atomic_add(0, 1, Order::Relaxed, scope);
        } else {
            flag.atomic_store(0, 2, Order::Relaxed, scope);
        }
        flag.atomic_store(1, 1, Order::Relaxed, scope);
    }
    if block == 2 {
        while flag.atomic_load(1, Order::Relaxed, scope) == 0 {}
        assert_eq!(flag.atomic_load(0, Order::Acquire, scope), 2);
        data.load(0);
    }
}

#[test]
fn a_release_holds_on_through_read_modify_writes_and_own_stores_but_not_stores_of_others() {
    let run = |itself, rmw, seed| {
        let (data, flag) = (Buffer::filled(1, 0), Buffer::filled(2, 0));
        let launch = Launch::new(3, 1).seed(seed);
        launch.run(|| unsafe { relayed(data.view_mut(), flag.view_mut(), itself, rmw) })
    };
    every_seed_passes(|seed| run(false, true, seed));
    every_seed_passes(|seed| run(true, true, seed));
    every_seed_passes(|seed| run(true, false, seed));
    every_seed_finds(|seed| run(false, false, seed), is_a_race);
}

/// The block that comes last adds up what all have written.
unsafe fn last_block(
    parts: GlobalMut<u32>,
    count: GlobalMut<u32>,
    sum: GlobalMut<u32>,
    order: Order,
    barriers: bool,
) {
    let (thread, block, blocks) = (thread::thread_idx_x(), thread::block_idx_x(), thread::grid_dim_x());
    parts.store((block * 32 + thread) as usize, block);
    if barriers {
        thread::sync_threads();
    }
    let last = thread == 0 && count.atomic_add(0, 1, order, Scope::Device) == blocks - 1;
    if thread::sync_threads_or(last) {
        let mut total = 0;
        for other in 0..blocks {
            total += parts.load((other * 32 + thread) as usize);
        }
        let total = warp::warp_reduce_add(warp::FULL_MASK, total);
        if thread == 0 {
            sum.store(0, total);
        }
    }
}

#[test]
fn the_last_block_sees_all_others_through_one_counter() {
    let run = |order, barriers, seed| {
        let (parts, count, sum) = (Buffer::poisoned(32 * 9), Buffer::filled(1, 0), Buffer::poisoned(1));
        let views = || (parts.view_mut(), count.view_mut(), sum.view_mut());
        let launch = Launch::new(9, 32).seed(seed);
        let result = launch.run(|| unsafe {
            let (parts, count, sum) = views();
            last_block(parts, count, sum, order, barriers);
        });
        result.inspect(|_| assert_eq!(sum.get(0), Some(32 * 36)))
    };
    every_seed_passes(|seed| run(Order::AcqRel, true, seed));
    // The chain of releases goes through all blocks' read-modify-writes, but each needs both halves or nothing is learnt.
    every_seed_finds(|seed| run(Order::Release, true, seed), is_a_race);
    every_seed_finds(|seed| run(Order::Acquire, true, seed), is_a_race);
    every_seed_finds(|seed| run(Order::Relaxed, true, seed), is_a_race);
    // Thread 0 releases what it knows; without the barrier that is not what the others have written, if they have.
    every_seed_finds(
        |seed| run(Order::AcqRel, false, seed),
        |fault| {
            if !matches!(fault.kind, FaultKind::UninitialisedGlobal { .. }) {
                is_a_race(fault);
            }
        },
    );
}

/// All blocks wait for all others.
unsafe fn grid_barrier(values: GlobalMut<u32>, count: GlobalMut<u32>, rounds: u32, order: Order) {
    let (i, blocks) = (thread::index_1d(), thread::grid_dim_x());
    let threads = blocks * thread::block_dim_x();
    for round in 0..rounds {
        let from = values.load((round * threads + (i + 40) % threads) as usize);
        values.store(((round + 1) * threads + i) as usize, from + 1);
        thread::sync_threads();
        if thread::thread_idx_x() == 0 {
            count.atomic_add(0, 1, order, Scope::Device);
            while count.atomic_load(0, Order::Acquire, Scope::Device) < (round + 1) * blocks {
                thread::nanosleep(50);
            }
        }
        thread::sync_threads();
    }
}

#[test]
fn a_barrier_of_the_grid_orders_its_rounds() {
    let run = |order, seed| {
        let values = Buffer::filled(128 * 4, 0);
        let count = Buffer::filled(1, 0);
        let launch = Launch::new(4, 32).seed(seed);
        let result = launch.run(|| unsafe { grid_barrier(values.view_mut(), count.view_mut(), 3, order) });
        result.inspect(|_| assert!(values.to_vec()[384..].iter().all(|value| *value == 3)))
    };
    every_seed_passes(|seed| run(Order::Release, seed));
    every_seed_finds(|seed| run(Order::Relaxed, seed), is_a_race);
}

/// A counter behind a lock.
unsafe fn locked(counter: GlobalMut<u32>, lock: GlobalMut<u32>, acquire: Order, release: Order) {
    while lock.atomic_compare_exchange(0, 0, 1, acquire, Scope::Device) != 0 {
        thread::nanosleep(10);
    }
    counter.store(0, counter.load(0) + 1);
    lock.atomic_store(0, 0, release, Scope::Device);
}

#[test]
fn a_lock_orders_its_holders() {
    let run = |acquire, release, seed| {
        let (counter, lock) = (Buffer::filled(1, 0), Buffer::filled(1, 0));
        let launch = Launch::new(5, 8).seed(seed);
        let result = launch.run(|| unsafe { locked(counter.view_mut(), lock.view_mut(), acquire, release) });
        result.inspect(|_| assert_eq!(counter.get(0), Some(40)))
    };
    every_seed_passes(|seed| run(Order::Acquire, Order::Release, seed));
    every_seed_finds(|seed| run(Order::Relaxed, Order::Release, seed), is_a_race);
    every_seed_finds(|seed| run(Order::Acquire, Order::Relaxed, seed), is_a_race);
}

shared_layout! {
    struct Mailbox {
        words: [u32; 32],
        full: [u32; 1],
    }
}

/// Warp 0 hands over to warp 1 through shared memory, without a barrier of the block.
unsafe fn between_warps(out: GlobalMut<u32>, send: Order, receive: Order, sync: bool, scope: Scope) {
    let (words, full) = (Mailbox::words(), Mailbox::full());
    let (warp, lane) = (thread::thread_idx_x() / 32, warp::lane_id());
    if thread::thread_idx_x() == 0 {
        full.store(0, 0);
    }
    thread::sync_threads();
    if warp == 0 {
        words.store(lane as usize, lane * 3);
        if sync {
            warp::sync_warp(warp::FULL_MASK);
        }
        if lane == 0 {
            full.atomic_store(0, 1, send, scope);
        }
    } else {
        if lane == 31 {
            while full.atomic_load(0, receive, scope) == 0 {}
        }
        warp::sync_warp(warp::FULL_MASK);
        out.store(lane as usize, words.load(31 - lane as usize));
    }
}

#[test]
fn warps_of_a_block_hand_over_through_a_flag() {
    let run = |send, receive, sync, scope, seed| {
        let out = Buffer::poisoned(32);
        let launch = Launch::new(3, 64).shared(Mailbox::BYTES).seed(seed);
        // All blocks give the same, so each has a row of its own.
        let outs: Vec<_> = (0..2).map(|_| Buffer::poisoned(32)).collect();
        let result = launch.run(|| unsafe {
            let out = match thread::block_idx_x() {
                0 => &out,
                block => &outs[block as usize - 1],
            };
            between_warps(out.view_mut(), send, receive, sync, scope)
        });
        result.inspect(|_| assert_eq!(out.get(1), Some(90)))
    };
    let (release, acquire) = (Order::Release, Order::Acquire);
    every_seed_passes(|seed| run(release, acquire, true, Scope::Block, seed));
    every_seed_passes(|seed| run(release, acquire, true, Scope::Device, seed));
    every_seed_finds(|seed| run(Order::Relaxed, acquire, true, Scope::Block, seed), is_a_race);
    every_seed_finds(|seed| run(release, Order::Relaxed, true, Scope::Block, seed), is_a_race);
    let found = |fault: &Fault| {
        let race = matches!(fault.kind, FaultKind::SharedRace { .. } | FaultKind::UninitialisedShared { .. });
        assert!(race, "{fault}");
    };
    every_seed_finds(|seed| run(release, acquire, false, Scope::Block, seed), found);
}

/// Pairs of lanes synchronise in a chain: 0 with 1, 1 with 2, ..
unsafe fn chain_of_pairs(out: GlobalMut<u32>, broken: u32) {
    let words = Mailbox::words();
    let lane = warp::lane_id();
    if lane == 0 {
        words.store(0, 5);
    }
    for first in 0..31 {
        if first != broken && (lane == first || lane == first + 1) {
            warp::sync_warp(3 << first);
        }
    }
    if lane == 31 {
        out.store(0, words.load(0));
    }
}

#[test]
fn what_sync_warp_orders_is_handed_on() {
    let run = |broken, seed| {
        let out = Buffer::poisoned(1);
        let launch = Launch::new(1, 32).shared(Mailbox::BYTES).seed(seed);
        launch.run(|| unsafe { chain_of_pairs(out.view_mut(), broken) })
    };
    every_seed_passes(|seed| run(99, seed));
    for broken in [0, 13, 30] {
        every_seed_finds(
            |seed| run(broken, seed),
            |fault| {
                let race = matches!(
                    fault.kind,
                    FaultKind::SharedRace { .. } | FaultKind::UninitialisedShared { .. }
                );
                assert!(race, "{fault}");
            },
        );
    }
}

/// Lane 0 writes after it has met the others.
unsafe fn after_meeting(again: bool) {
    let words = Mailbox::words();
    let lane = warp::lane_id();
    words.store(lane as usize, 1);
    warp::sync_warp(warp::FULL_MASK);
    if lane == 0 {
        words.store(0, 2);
    }
    if again {
        warp::sync_warp(warp::FULL_MASK);
    }
    words.load(0);
}

#[test]
fn sync_warp_does_not_order_what_comes_after_it() {
    let run = |again, seed| {
        let launch = Launch::new(1, 32).shared(Mailbox::BYTES).seed(seed);
        launch.run(|| unsafe { after_meeting(again) })
    };
    every_seed_passes(|seed| run(true, seed));
    every_seed_finds(|seed| run(false, seed), is_a_race);
}
