//! How long emulation takes, with all checks on. Prints; the bounds are generous, for slow and busy machines.

#![allow(
    unsafe_op_in_unsafe_fn,
    clippy::undocumented_unsafe_blocks,
    reason = "a kernel's body is one contract, and each launch here keeps it"
)]

use std::time::{Duration, Instant};

use cuda_std::emulator::{Buffer, Launch, Report};
use cuda_std::prelude::*;
use cuda_std::shared_layout;

shared_layout! {
    struct Partial {
        sums: [f32; 32],
    }
}

/// Sums the values of each block.
///
/// # Safety
/// `values` has an element a thread, `sums` one a block; blocks of 256 threads with `Partial::BYTES` of shared memory.
#[kernel(collectives(shuffle = 10, barrier = 1))]
pub unsafe fn block_sums(values: Global<f32>, sums: GlobalMut<f32>) {
    let thread = thread::thread_idx_x() as usize;
    let (warp, lane) = (thread / 32, thread % 32);
    let partial = Partial::sums();
    let sum = warp::warp_sum(values.load(thread::index_1d() as usize));
    if lane == 0 {
        partial.store(warp, sum);
    }
    thread::sync_threads();
    if warp == 0 {
        let sum = warp::warp_sum(if lane < 8 { partial.load(lane) } else { 0.0 });
        if lane == 0 {
            sums.store(thread::block_idx_x() as usize, sum);
        }
    }
}

/// Copies 16 bytes at a time.
///
/// # Safety
/// Both views have `len` elements.
#[kernel]
pub unsafe fn copy(from: Global<U32x4>, to: GlobalMut<U32x4>, len: u32) {
    let mut i = thread::index_1d();
    while i < len {
        to.store(i as usize, from.load_with(i as usize, LoadCache::Streaming));
        i += thread::grid_dim_x() * thread::block_dim_x();
    }
}

/// Adds up all values by atomics on one element.
///
/// # Safety
/// `values` has `len` elements, `sum` one.
#[kernel]
pub unsafe fn atomic_sum(values: Global<u32>, sum: GlobalMut<u32>, len: u32) {
    use cuda_std::atomic::{Order, Scope};
    let mut i = thread::index_1d();
    while i < len {
        sum.atomic_add(0, values.load(i as usize), Order::Relaxed, Scope::Device);
        i += thread::grid_dim_x() * thread::block_dim_x();
    }
}

/// Turns 32 by 32 tiles over, through shared memory.
///
/// # Safety
/// `from` and `to` are squares of `32 * grid_dim_x` elements a side; blocks of (32, 8) threads, a square grid.
#[kernel(collectives(barrier = 1))]
pub unsafe fn transpose(from: Global<f32>, to: GlobalMut<f32>) {
    let tile = Tile::elements();
    let side = 32 * thread::grid_dim_x() as usize;
    let (x, y) = (thread::thread_idx_x() as usize, thread::thread_idx_y() as usize);
    let (left, top) = (32 * thread::block_idx_x() as usize, 32 * thread::block_idx_y() as usize);
    for row in (y..32).step_by(8) {
        tile.store(33 * row + x, from.rows(side).row(top + row).load(left + x));
    }
    thread::sync_threads();
    for row in (y..32).step_by(8) {
        to.rows(side).row(left + row).store(top + x, tile.load(33 * x + row));
    }
}

shared_layout! {
    struct Tile {
        elements: [f32; 32 * 33],
    }
}

fn best(what: &str, limit: Duration, run: impl Fn() -> Report) {
    let times = (0..5).map(|_| {
        let start = Instant::now();
        (run(), start.elapsed())
    });
    let (report, time) = times.min_by_key(|(_, time)| *time).unwrap();
    let accesses = report.global.loads + report.global.stores + report.shared.loads + report.shared.stores;
    println!(
        "{what:<44} {:>8.2} ms, {:>8} turns, {accesses:>8} accesses",
        time.as_secs_f64() * 1e3,
        report.turns
    );
    assert!(time < limit, "{what} took {time:?}");
}

#[test]
fn emulation_is_fast_enough_for_many_seeds() {
    let values = Buffer::from_slice(&vec![1.0; 64 * 256]);
    let sums = Buffer::poisoned(64);
    best("64 blocks of 256 threads, two warp sums each", Duration::from_secs(1), || {
        let launch = Launch::new(64, 256).shared(Partial::BYTES);
        launch.run(|| unsafe { block_sums(values.view(), sums.view_mut()) }).unwrap()
    });
    assert!(sums.to_vec().iter().all(|sum| *sum == 256.0));

    let len = 1_000_000;
    let from = Buffer::filled(len, U32x4 { x: 1, y: 2, z: 3, w: 4 });
    let to = Buffer::poisoned(len);
    best("10^6 16-byte loads and stores", Duration::from_secs(10), || {
        Launch::new(64, 256).run(|| unsafe { copy(from.view(), to.view_mut(), len as u32) }).unwrap()
    });
    assert_eq!(to.get(len - 1), from.get(0));

    let values = Buffer::filled(100_000, 1);
    let sum = Buffer::filled(1, 0);
    best("10^5 atomics on one element", Duration::from_secs(5), || {
        Launch::new(16, 256).run(|| unsafe { atomic_sum(values.view(), sum.view_mut(), 100_000) }).unwrap()
    });
    assert_eq!(sum.get(0), Some(500_000));

    let side = 512;
    let from = Buffer::from_slice(&(0..side * side).map(|i| i as f32).collect::<Vec<_>>());
    let to = Buffer::poisoned(side * side);
    best("512 by 512 transposed in tiles", Duration::from_secs(10), || {
        let launch = Launch { grid: (16, 16, 1), block: (32, 8, 1), ..Launch::default() };
        launch.shared(Tile::BYTES).run(|| unsafe { transpose(from.view(), to.view_mut()) }).unwrap()
    });
    assert_eq!(to.get(side + 3), from.get(3 * side + 1));
}
