//! Races in global memory, and the read-only path.

use crate::support::{every_seed_finds, every_seed_passes};
use crate::{at, line};
use cuda_std::atomic::{Order, Scope};
use cuda_std::emulator::{Access, Buffer, Fault, FaultKind, Launch};
use cuda_std::prelude::*;

#[kernel]
pub unsafe fn claim(out: GlobalMut<u32>, stride: u32) {
    out.store((thread::block_idx_x() * stride + thread::thread_idx_x()) as usize, 1); // claims
}

#[test]
fn stores_of_two_threads_to_one_element_are_a_race() {
    let run = |blocks, threads, stride, seed| {
        let out = Buffer::poisoned(256);
        Launch::new(blocks, threads).seed(seed).run(|| unsafe { claim(out.view_mut(), stride) })
    };
    every_seed_passes(|seed| run(4, 32, 32, seed));
    every_seed_finds(
        |seed| run(4, 32, 31, seed),
        |fault| {
            let FaultKind::GlobalWriteRace { access: Access::Store, index, other } = fault.kind else {
                panic!("{fault}")
            };
            assert_eq!((fault.block.x * 31 + fault.thread.x) as usize, index);
            assert_eq!((other.block.x * 31 + other.thread.x) as usize, index);
            assert_ne!(other.block, fault.block);
            assert_eq!(other.location.line(), line("claims"));
            at(fault, "claims");
        },
    );
    // Blocks that never ran at the same time are unordered all the same.
    every_seed_finds(
        |seed| {
            let out = Buffer::poisoned(256);
            let launch = Launch { resident_blocks: 1, ..Launch::new(3, 1).seed(seed) };
            launch.run(|| unsafe { claim(out.view_mut(), 0) })
        },
        |fault| assert!(matches!(fault.kind, FaultKind::GlobalWriteRace { index: 0, .. }), "{fault}"),
    );
}

#[kernel]
pub unsafe fn through_global(scratch: GlobalMut<u32>, distance: u32, barrier: bool) {
    let i = thread::index_1d();
    scratch.store(i as usize, 1); // gives
    if barrier {
        thread::sync_threads();
    }
    let n = thread::grid_dim_x() * thread::block_dim_x();
    scratch.load(((i + distance) % n) as usize); // takes
}

#[test]
fn loads_of_what_others_wrote_are_a_race_unless_a_barrier_orders_them() {
    let run = |blocks, threads, distance, barrier, seed| {
        let scratch = Buffer::filled(64, 0);
        let launch = Launch::new(blocks, threads).seed(seed);
        launch.run(|| unsafe { through_global(scratch.view_mut(), distance, barrier) })
    };
    every_seed_passes(|seed| run(1, 64, 7, true, seed));
    every_seed_passes(|seed| run(4, 16, 0, false, seed));
    let check = |fault: &Fault| match fault.kind {
        FaultKind::GlobalReadRace { other, .. } => {
            assert_eq!(other.location.line(), line("gives"));
            at(fault, "takes");
        }
        FaultKind::GlobalWriteRace { other, .. } => {
            assert_eq!(other.location.line(), line("takes"));
            at(fault, "gives");
        }
        _ => panic!("{fault}"),
    };
    every_seed_finds(|seed| run(1, 64, 7, false, seed), check);
    // A barrier is of a block.
    every_seed_finds(|seed| run(4, 16, 16, true, seed), check);
}

#[kernel]
pub unsafe fn add_all(sum: GlobalMut<u32>, block_scope: bool, reset: bool) {
    if reset && thread::index_1d() == 0 {
        sum.store(0, 0); // resets
    }
    let scope = if block_scope { Scope::Block } else { Scope::Device };
    sum.atomic_add(0, 1, Order::Relaxed, scope); // adds
}

#[test]
fn atomics_race_across_blocks_if_their_scope_is_the_block_or_an_access_is_plain() {
    let run = |blocks, block_scope, reset, seed| {
        let sum = Buffer::filled(1, 0);
        let launch = Launch::new(blocks, 32).seed(seed);
        let result = launch.run(|| unsafe { add_all(sum.view_mut(), block_scope, reset) });
        result.inspect(|_| assert_eq!(sum.get(0), Some(32 * blocks)))
    };
    every_seed_passes(|seed| run(4, false, false, seed));
    every_seed_passes(|seed| run(1, true, false, seed));
    every_seed_finds(
        |seed| run(4, true, false, seed),
        |fault| {
            let FaultKind::GlobalWriteRace { access: Access::Atomic, other, .. } = fault.kind else {
                panic!("{fault}")
            };
            assert_eq!(other.access, Access::Atomic);
            assert_ne!(other.block, fault.block);
            at(fault, "adds");
        },
    );
    every_seed_finds(
        |seed| run(4, false, true, seed),
        |fault| {
            let FaultKind::GlobalWriteRace { other, .. } = fault.kind else { panic!("{fault}") };
            let mut lines = [fault.location.line(), other.location.line()];
            lines.sort();
            assert_eq!(lines, [line("resets"), line("adds")]);
        },
    );
}

#[kernel]
pub unsafe fn read_only(data: GlobalMut<U32x4>, from: u32, to: u32, cache: u32) {
    let i = thread::index_1d();
    if i == from {
        let cache = [LoadCache::ReadOnly, LoadCache::ReadOnlyOnce, LoadCache::ReadOnlyRun, LoadCache::Global]
            [cache as usize];
        data.as_global().load_with(0, cache); // read-only load
    }
    if i == to {
        data.store(0, U32x4::default()); // written
    }
}

#[test]
fn an_element_loaded_through_the_read_only_path_is_not_written_in_the_same_launch() {
    let run = |from, to, cache, seed| {
        let data = Buffer::filled(2, U32x4::default());
        Launch::new(2, 32).seed(seed).run(|| unsafe { read_only(data.view_mut(), from, to, cache) })
    };
    every_seed_passes(|seed| run(3, 99, 0, seed));
    // By one thread, in order: fine but for the read-only path.
    every_seed_passes(|seed| run(3, 3, 3, seed));
    for cache in 0..3 {
        every_seed_finds(
            |seed| run(3, 3, cache, seed),
            |fault| {
                let FaultKind::ReadOnlyWritten { access: Access::Store, index: 0, other } = fault.kind else {
                    panic!("{fault}")
                };
                assert_eq!(other.line(), line("read-only load"));
                at(fault, "written");
            },
        );
    }
    let data = Buffer::filled(2, U32x4::default());
    Launch::new(1, 1).run(|| unsafe { read_only(data.view_mut(), 9, 0, 0) }).unwrap();
    // The next launch may read it so.
    Launch::new(1, 1).run(|| unsafe { read_only(data.view_mut(), 0, 9, 0) }).unwrap();
}

#[kernel]
pub unsafe fn write_then_read_only(data: GlobalMut<U32x4>) {
    data.store(1, U32x4::default()); // first written
    data.as_global().load_with(1, LoadCache::ReadOnly); // then read
}

#[test]
fn the_read_only_path_does_not_see_the_launchs_own_stores() {
    let data = Buffer::filled(2, U32x4::default());
    let fault = Launch::default().run(|| unsafe { write_then_read_only(data.view_mut()) }).unwrap_err();
    let FaultKind::ReadOnlyWritten { access: Access::Load, index: 1, other } = fault.kind else {
        panic!("{fault}")
    };
    assert_eq!(other.line(), line("first written"));
    at(&fault, "then read");
}
