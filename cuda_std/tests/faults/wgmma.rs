//! Matrix products of a warpgroup.

use crate::support::{every_seed_finds, every_seed_passes};
use crate::{at, line, tid};
use cuda_std::emulator::{Access, Buffer, Fault, FaultKind, Launch, Report, Space};
use cuda_std::prelude::*;
use cuda_std::wgmma::{self, Matrix};
use cuda_std::{bulk, copy, shared_layout};

shared_layout! {
    pub struct Tiles {
        left: [U32x4; 512],
        right: [U32x4; 512],
        odd: [U32x4; 8],
        shifted: [U32x4; 512],
    }
}

/// What a kernel leaves out or gets wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Wrong {
    Nothing,
    ProxyFence,
    Barrier,
    Fence,
    FenceAfterWait,
    Commit,
    Wait,
    WaitForAll,
    WaitWithSums,
    Rescaled,
    ReadBeforeWait,
    Overwritten,
    OverwrittenAfterOwnWait,
    MissingThread,
    OneReturns,
    Step,
    Add,
    Place,
    Start,
    Stride,
    BeyondView,
    Uninitialised,
}

/// Twice the sum of four steps of 16, all elements 1: 128 in each thread's sums.
#[kernel]
pub unsafe fn twice(from: Global<U32x4>, out: GlobalMut<f32>, wrong: Wrong) {
    let (left, right) = (Tiles::left(), Tiles::right());
    let mut at = tid();
    while at < 512 {
        left.store(at, U32x4 { x: ONES, y: ONES, z: ONES, w: ONES });
        if wrong != Wrong::Uninitialised || at != 511 {
            copy::copy_async(right, at, from, at);
        }
        at += 128;
    }
    copy::wait_all();
    if wrong != Wrong::ProxyFence {
        bulk::fence();
    }
    if wrong == Wrong::OneReturns && tid() == 77 {
        return;
    }
    if wrong != Wrong::Barrier {
        thread::sync_threads();
    }
    let a = match wrong {
        Wrong::Start => Matrix::new(Tiles::shifted(), 0),
        Wrong::BeyondView => Matrix::new(left.slice(0, 500), 0),
        Wrong::Stride => Matrix::new(left, 520),
        _ => Matrix::new(left, 0),
    };
    let b = Matrix::new(right, 0);
    let mut sums = [0.0; 32];
    if wrong != Wrong::Fence {
        wgmma::fence(&mut sums);
    }
    if wrong == Wrong::MissingThread && tid() == 77 {
        thread::sync_threads();
    }
    for step in 0..4 {
        let of_left = if wrong == Wrong::Step && tid() == 77 { 3 - step } else { step };
        if wrong == Wrong::Add && tid() == 77 {
            wgmma::multiply(&mut sums, a.columns(of_left), b.rows(step));
        } else if wrong == Wrong::Place && tid() == 77 {
            wgmma::multiply_add(&mut sums, a.columns(of_left), b.rows(step));
        } else {
            wgmma::multiply_add(&mut sums, a.columns(of_left), b.rows(step)); // starts four
        }
    }
    if wrong != Wrong::Commit {
        wgmma::commit_group();
    }
    match wrong {
        Wrong::Wait => return,
        Wrong::WaitForAll => wgmma::wait_group::<1>(&mut sums), // waits for none
        Wrong::WaitWithSums => return wgmma::wait_group::<0>(&mut [0.0_f32; 32]),
        Wrong::Rescaled => sums.iter_mut().for_each(|sum| *sum *= 0.5),
        Wrong::ReadBeforeWait => return out.store(tid(), sums[0]),
        Wrong::Overwritten if tid() == 5 => right.store(3, U32x4::default()), // overwrites a side
        _ => {}
    }
    wgmma::wait_group::<0>(&mut sums); // waits for all
    if wrong == Wrong::OverwrittenAfterOwnWait {
        right.store(4 * tid() + 2, U32x4::default()); // overwrites after its own wait
    }
    if wrong != Wrong::FenceAfterWait {
        wgmma::fence(&mut sums);
    }
    let ones = [ONES; 4];
    for step in 0..4 {
        wgmma::multiply_add(&mut sums, ones, b.columns(step)); // starts four more
    }
    wgmma::commit_group();
    wgmma::wait_group::<0>(&mut sums);
    let sum: f32 = sums.iter().sum();
    out.store(tid(), sum);
}

/// Two bf16 of 1.
const ONES: u32 = 0x3f80_3f80;

fn run(wrong: Wrong, threads: u32, seed: u64) -> Result<Report, Fault> {
    let quad = U32x4 { x: ONES, y: ONES, z: ONES, w: ONES };
    let (from, out) = (Buffer::from_slice(&[quad; 512]), Buffer::filled(threads as usize, -1.0));
    let launch = Launch { poll_limit: 1000, ..Launch::new(1, threads).shared(Tiles::BYTES).seed(seed) };
    launch.run(|| unsafe { twice(from.view(), out.view_mut(), wrong) }).inspect(|report| {
        assert_eq!(out.to_vec(), [32.0 * 128.0; 128]);
        assert_eq!((report.matrix_products, report.product_steps), (8, 4 * 6));
    })
}

#[test]
fn sums_that_were_waited_for_are_there() {
    every_seed_passes(|seed| run(Wrong::Nothing, 128, seed));
}

fn finds(wrong: Wrong, marker: &str, is_it: impl Fn(&FaultKind) -> bool) {
    every_seed_finds(
        |seed| run(wrong, 128, seed),
        |fault| {
            assert!(is_it(&fault.kind), "{wrong:?}: {fault}");
            if !marker.is_empty() {
                at(fault, marker);
            }
        },
    );
}

#[test]
fn shared_memory_that_products_may_not_see_is_found() {
    finds(Wrong::ProxyFence, "starts four", |kind| matches!(kind, FaultKind::ProxyFence { .. }));
    finds(Wrong::Barrier, "starts four", |kind| {
        matches!(
            kind,
            FaultKind::SharedRace { access: Access::Operand, .. }
                | FaultKind::PendingCopy { access: Access::Operand, .. }
                | FaultKind::UninitialisedShared { access: Access::Operand, .. }
        )
    });
    finds(Wrong::Uninitialised, "starts four", |kind| {
        matches!(kind, FaultKind::UninitialisedShared { access: Access::Operand, .. })
    });
}

#[test]
fn products_out_of_order_are_found() {
    finds(Wrong::Fence, "starts four", |kind| *kind == FaultKind::ProductFence);
    finds(Wrong::FenceAfterWait, "starts four more", |kind| *kind == FaultKind::ProductFence);
    let pending = |changed| move |kind: &FaultKind| matches!(kind, FaultKind::ProductPending { started, changed: is } if *is == changed && started.line() == line("starts four"));
    finds(Wrong::Commit, "waits for all", pending(false));
    finds(Wrong::WaitForAll, "waits for none", pending(false));
    finds(Wrong::Rescaled, "waits for all", pending(true));
    let kept = |kind: &FaultKind| *kind == FaultKind::ProductNotAwaited { products: 1 };
    finds(Wrong::Wait, "starts four", kept);
    finds(Wrong::WaitWithSums, "starts four", kept);
    finds(Wrong::ReadBeforeWait, "starts four", kept);
}

#[test]
fn a_side_that_changes_too_early_is_found() {
    // The product's thread may have waited by then, but nothing orders the store with that. Nor with all waits after the own one.
    let by_a_product = |kind: &FaultKind| match kind {
        FaultKind::PendingCopy { access: Access::Store, waited: false, other, .. }
        | FaultKind::SharedRace { access: Access::Store, other, .. } => other.access == Access::Operand,
        _ => false,
    };
    finds(Wrong::Overwritten, "overwrites a side", by_a_product);
    finds(Wrong::OverwrittenAfterOwnWait, "overwrites after its own wait", by_a_product);
}

#[test]
fn threads_that_do_not_come_or_bring_something_else_are_found() {
    let missing = |kind: &FaultKind| matches!(kind, FaultKind::MissingThreads { arrived } if *arrived < 128);
    finds(Wrong::MissingThread, "starts four", missing);
    finds(Wrong::OneReturns, "", |kind| missing(kind) || matches!(kind, FaultKind::MissingLanes { .. }));
    every_seed_finds(
        |seed| run(Wrong::Nothing, 96, seed),
        |fault| {
            assert!(missing(&fault.kind), "{fault}");
            at(fault, "starts four");
        },
    );
    let mismatch = |kind: &FaultKind| matches!(kind, FaultKind::ProductMismatch { .. });
    finds(Wrong::Step, "starts four", mismatch);
    finds(Wrong::Add, "", mismatch);
    finds(Wrong::Place, "", mismatch);
}

#[test]
fn matrices_that_lie_elsewhere_are_found() {
    let start = 2 * 8192 + 128;
    finds(Wrong::Start, "", |kind| *kind == FaultKind::MatrixAlignment { byte: start, stride: 0 });
    finds(Wrong::Stride, "", |kind| *kind == FaultKind::MatrixAlignment { byte: 0, stride: 520 * 16 });
    finds(Wrong::BeyondView, "starts four", |kind| {
        matches!(
            kind,
            FaultKind::OutOfBounds {
                space: Space::Shared,
                access: Access::Operand,
                len: 500,
                buffer_len: 512,
                ..
            }
        )
    });
}
