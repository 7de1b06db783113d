//! Atomics with orders they cannot have, loops without an end, and panics.

use crate::support::{every_seed_finds, every_seed_passes};
use crate::{at, tid};
use cuda_std::atomic::{Order, Scope};
use cuda_std::emulator::{Access, Buffer, FaultKind, Launch};
use cuda_std::prelude::*;

#[kernel]
pub unsafe fn refused_order(data: GlobalMut<u32>, store: bool, order: u32) {
    let order = [Order::Relaxed, Order::Acquire, Order::Release, Order::AcqRel][order as usize];
    if store {
        data.atomic_store(0, 1, order, Scope::Device); // refused store
    } else {
        data.atomic_load(0, order, Scope::Device); // refused load
    }
}

#[test]
fn orders_that_an_atomic_load_or_store_cannot_have_are_refused() {
    let data = Buffer::filled(1, 0);
    let run =
        |store, order| Launch::default().run(|| unsafe { refused_order(data.view_mut(), store, order) });
    for (store, order, name) in
        [(false, 2, "Release"), (false, 3, "AcqRel"), (true, 1, "Acquire"), (true, 3, "AcqRel")]
    {
        let fault = run(store, order).unwrap_err();
        let access = if store { Access::AtomicStore } else { Access::AtomicLoad };
        assert_eq!(fault.kind, FaultKind::OrderRefused { access, order: name });
        at(&fault, if store { "refused store" } else { "refused load" });
    }
    for (store, order) in [(false, 0), (false, 1), (true, 0), (true, 2)] {
        run(store, order).unwrap();
    }
}

#[kernel]
pub unsafe fn wait_for(flag: GlobalMut<u32>, waiters: u32, sleep: bool) {
    if thread::block_idx_x() < waiters {
        loop {
            let flag = flag.atomic_load(0, Order::Acquire, Scope::Device); // waits
            if flag != 0 {
                break;
            }
            if sleep {
                thread::nanosleep(100);
            }
        }
    } else {
        flag.atomic_store(0, 1, Order::Release, Scope::Device);
    }
}

#[test]
fn a_spin_that_nobody_ends_is_a_livelock_and_not_a_hang() {
    let run = |waiters, resident_blocks, sleep, seed| {
        let flag = Buffer::filled(1, 0);
        let launch = Launch { resident_blocks, poll_limit: 20_000, ..Launch::new(4, 1).seed(seed) };
        launch.run(|| unsafe { wait_for(flag.view_mut(), waiters, sleep) })
    };
    every_seed_passes(|seed| run(3, 4, seed % 2 == 0, seed));
    for seed in 0..10 {
        let fault = run(4, 4, seed % 2 == 0, seed).unwrap_err();
        assert!(matches!(fault.kind, FaultKind::Livelock { limit: 20_000, .. }), "{fault}");
        at(&fault, "waits");
    }
    // Blocks that are not resident end nobody's wait; some order has the setter among them.
    assert!((0..20).any(|seed| run(3, 1, true, seed).is_err()));
    assert!((0..20).any(|seed| run(3, 1, true, seed).is_ok()));
}

#[kernel]
pub unsafe fn take_all(locks: GlobalMut<u32>, give_back: bool) {
    loop {
        let holder = locks.atomic_compare_exchange(0, 0, 1, Order::Acquire, Scope::Device); // takes the lock
        if holder == 0 {
            break;
        }
    }
    if give_back {
        locks.atomic_exchange(0, 0, Order::Release, Scope::Device);
    }
}

#[test]
fn a_lock_that_is_never_given_back_is_a_livelock() {
    let run = |give_back, seed| {
        let locks = Buffer::filled(1, 0);
        let launch = Launch { poll_limit: 5_000, ..Launch::new(2, 2).seed(seed) };
        launch.run(|| unsafe { take_all(locks.view_mut(), give_back) })
    };
    every_seed_passes(|seed| run(true, seed));
    for seed in 0..10 {
        let fault = run(false, seed).unwrap_err();
        assert!(matches!(fault.kind, FaultKind::Livelock { limit: 5_000, .. }), "{fault}");
        at(&fault, "takes the lock");
    }
}

#[kernel]
pub unsafe fn work_while_others_poll(flag: GlobalMut<u32>, out: GlobalMut<u32>, plain: bool) {
    if thread::block_idx_x() == 0 {
        for i in 0..2000 {
            if plain {
                out.store(0, i);
            } else {
                out.atomic_add(0, 1, Order::Relaxed, Scope::Device);
            }
        }
        flag.atomic_store(0, 1, Order::Relaxed, Scope::Device);
    } else {
        while flag.atomic_load(0, Order::Relaxed, Scope::Device) == 0 {}
    }
}

#[test]
fn polls_are_no_livelock_while_others_get_on() {
    every_seed_passes(|seed| {
        let (flag, out) = (Buffer::filled(1, 0), Buffer::filled(1, 0));
        // Far fewer than there will be.
        let launch = Launch { poll_limit: 2_000, preemption: 0.5, ..Launch::new(4, 1).seed(seed) };
        launch.run(|| unsafe {
            work_while_others_poll(flag.view_mut(), out.view_mut(), seed.is_multiple_of(2));
        })
    });
}

#[kernel]
pub unsafe fn plain_spin(flag: GlobalMut<u32>) {
    while flag.load(0) == 0 {} // spins
}

#[test]
fn a_spin_on_plain_loads_ends_at_the_limit_of_steps() {
    let flag = Buffer::filled(1, 0);
    for preemption in [0.0, 0.1, 1.0] {
        let launch = Launch { step_limit: 10_000, preemption, ..Launch::new(1, 4) };
        let fault = launch.run(|| unsafe { plain_spin(flag.view_mut()) }).unwrap_err();
        assert!(matches!(fault.kind, FaultKind::Livelock { limit: 10_000, .. }), "{fault}");
        at(&fault, "spins");
    }
}

struct StoresOnDrop(GlobalMut<u32>);

impl Drop for StoresOnDrop {
    fn drop(&mut self) {
        // Runs while the thread unwinds; must neither suspend nor fault again.
        unsafe {
            self.0.store(1_000_000, 1);
            self.0.atomic_add(0, 1, Order::Relaxed, Scope::Device);
            thread::sync_threads();
        }
    }
}

#[kernel]
pub unsafe fn panics(out: GlobalMut<u32>, thread: u32, how: u32) {
    let table = [1_u32, 2, 3];
    let _guard = StoresOnDrop(out);
    if tid() as u32 == thread {
        match how {
            0 => panic!("value {} is wrong", how + 41), // panics
            1 => out.store(0, table[tid()]),            // indexes
            _ => out.store(99, 1),                      // faults
        }
    }
    thread::sync_threads();
    std::mem::forget(_guard);
}

#[test]
fn a_panic_is_a_fault_with_its_text_and_place() {
    let out = Buffer::filled(1, 0);
    let run = |thread, how, seed| {
        Launch::new(3, 64).seed(seed).run(|| unsafe { panics(out.view_mut(), thread, how) })
    };
    every_seed_passes(|seed| run(99, 0, seed));
    every_seed_finds(
        |seed| run(40, 0, seed),
        |fault| {
            assert_eq!(fault.kind, FaultKind::Panic { message: "value 41 is wrong".to_owned() });
            at(fault, "panics");
            assert_eq!(fault.thread.x, 40);
        },
    );
    every_seed_finds(
        |seed| run(5, 1, seed),
        |fault| {
            let FaultKind::Panic { message } = &fault.kind else { panic!("{fault}") };
            assert_eq!(message, "index out of bounds: the len is 3 but the index is 5");
            at(fault, "indexes");
        },
    );
    every_seed_finds(
        |seed| run(5, 2, seed),
        |fault| assert!(matches!(fault.kind, FaultKind::OutOfBounds { index: 99, .. }), "{fault}"),
    );
}

struct CountsDrops<'a>(&'a std::cell::Cell<u32>);

impl Drop for CountsDrops<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() + 1);
    }
}

#[test]
fn every_thread_that_began_is_unwound_after_a_fault() {
    let (began, ended) = (std::cell::Cell::new(0), std::cell::Cell::new(0));
    every_seed_finds(
        |seed| {
            Launch::new(8, 128).seed(seed).run(|| unsafe {
                began.set(began.get() + 1);
                let _held = CountsDrops(&ended);
                thread::sync_threads();
                if tid() == 100 {
                    warp::sync_warp(1);
                }
                thread::sync_threads();
            })
        },
        |fault| {
            assert_eq!(fault.kind, FaultKind::LaneNotInMask { mask: 1, lane: 4 });
            assert_eq!(began.replace(0), ended.replace(0));
        },
    );
}
