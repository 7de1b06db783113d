//! Loads of what nothing has written.

use crate::support::{every_seed_finds, every_seed_passes};
use crate::{Scratch, at, tid};
use cuda_std::emulator::{Access, Buffer, FaultKind, Launch};
use cuda_std::prelude::*;

#[kernel]
pub unsafe fn load_first(values: Global<u32>, out: GlobalMut<u32>) {
    out.store(0, values.load(0)); // loads the first
}

#[test]
fn a_load_of_a_poisoned_element_is_found() {
    let values = Buffer::<u32>::poisoned(3);
    let out = Buffer::poisoned(1);
    let run = || Launch::default().run(|| unsafe { load_first(values.view(), out.view_mut()) });
    let fault = run().unwrap_err();
    assert_eq!(fault.kind, FaultKind::UninitialisedGlobal { access: Access::Load, index: 0 });
    at(&fault, "loads the first");
    assert_eq!(out.get(0), None);
    values.set(0, 9);
    run().unwrap();
    assert_eq!(out.get(0), Some(9));
    assert_eq!(values.get(1), None);
}

#[kernel]
pub unsafe fn shared_unwritten(threads: u32) {
    let words = Scratch::words();
    if tid() < threads as usize {
        words.store(tid(), 1);
    }
    thread::sync_threads();
    words.load((tid() + 1) % 64); // reads shared
}

#[test]
fn a_load_of_unwritten_shared_memory_is_found_in_every_block() {
    let run = |threads, seed| {
        let launch = Launch::new(6, 64).shared(Scratch::BYTES).seed(seed);
        launch.run(|| unsafe { shared_unwritten(threads) })
    };
    every_seed_passes(|seed| run(64, seed));
    every_seed_finds(
        |seed| run(63, seed),
        |fault| {
            let access = Access::Load;
            assert_eq!(fault.kind, FaultKind::UninitialisedShared { access, index: 63, byte: 252 });
            at(fault, "reads shared");
            assert_eq!(fault.thread.x, 62);
        },
    );
}

#[kernel]
pub unsafe fn only_the_first_block_writes() {
    if thread::block_idx_x() == 0 {
        Scratch::words().store(tid(), 1);
    }
    Scratch::words().load(tid());
}

#[test]
fn shared_memory_of_a_block_is_not_the_next_ones() {
    // One at a time, so that all blocks have the same memory.
    let launch = Launch { resident_blocks: 1, ..Launch::new(8, 32).shared(Scratch::BYTES) };
    every_seed_finds(
        |seed| launch.seed(seed).run(|| unsafe { only_the_first_block_writes() }),
        |fault| assert!(matches!(fault.kind, FaultKind::UninitialisedShared { .. }), "{fault}"),
    );
}
