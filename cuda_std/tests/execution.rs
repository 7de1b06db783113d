//! Schedules, indices, arithmetic, memory and what a report counts.

#![allow(
    unsafe_op_in_unsafe_fn,
    clippy::missing_safety_doc,
    clippy::undocumented_unsafe_blocks,
    missing_docs,
    reason = "kernels of a few lines"
)]

mod support;

use std::collections::HashSet;

use cuda_std::atomic::{Order, Scope};
use cuda_std::emulator::{Buffer, Launch, Report};
use cuda_std::prelude::*;
use cuda_std::{bf16, copy, math, shared_layout};
use proptest::prelude::*;
use support::every_seed_passes;

/// Each thread takes tickets; who got which is the order of things.
#[kernel]
pub unsafe fn tickets(next: GlobalMut<u32>, order: GlobalMut<u32>, each: u32) {
    for _ in 0..each {
        let ticket = next.atomic_add(0, 1, Order::Relaxed, Scope::Device);
        order.store(ticket as usize, thread::index_1d());
    }
}

fn order_of(launch: Launch) -> (Vec<u32>, Report) {
    let threads = launch.grid.0 * launch.block.0;
    let (next, order) = (Buffer::filled(1, 0), Buffer::poisoned(4 * threads as usize));
    let report = launch.run(|| unsafe { tickets(next.view_mut(), order.view_mut(), 4) }).unwrap();
    (order.to_vec(), report)
}

#[test]
fn a_seed_is_a_schedule() {
    let launch = Launch::new(6, 48);
    let mut digests = HashSet::new();
    let mut orders = HashSet::new();
    for seed in 0..50 {
        let (order, report) = order_of(launch.seed(seed));
        assert_eq!(order_of(launch.seed(seed)), (order.clone(), report));
        digests.insert(report.schedule);
        orders.insert(order);
    }
    assert_eq!((digests.len(), orders.len()), (50, 50));
}

#[test]
fn threads_warps_and_blocks_are_interleaved_in_every_order() {
    let block_of = |thread: &u32| thread / 48;
    let mut first_blocks = HashSet::new();
    let mut first_threads = HashSet::new();
    for seed in 0..100 {
        let (order, _) = order_of(Launch::new(6, 48).seed(seed));
        let changes = order.windows(2).filter(|pair| block_of(&pair[0]) != block_of(&pair[1])).count();
        assert!(changes > 50, "seed {seed}: {changes} changes of block");
        let mut done: Vec<u32> = Vec::new();
        for thread in &order {
            let block = block_of(thread);
            if !done.contains(&block) {
                done.push(block);
            }
        }
        first_blocks.insert(done[..2].to_vec());
        first_threads.insert(order[0]);
    }
    assert!(first_blocks.len() > 20, "{first_blocks:?}");
    assert!(first_threads.len() > 40, "{first_threads:?}");
}

#[test]
fn only_resident_blocks_run_together() {
    for resident_blocks in [1, 2] {
        let launch = Launch { resident_blocks, ..Launch::new(6, 8).seed(3) };
        let (order, _) = order_of(launch);
        for (at, thread) in order.iter().enumerate() {
            let begun: HashSet<_> = order[..=at].iter().map(|thread| thread / 8).collect();
            let ended = begun.iter().filter(|block| order[at..].iter().all(|thread| thread / 8 != **block));
            assert!(begun.len() - ended.count() <= resident_blocks, "thread {thread} at {at}");
        }
    }
}

#[kernel]
pub unsafe fn plain_order(last: GlobalMut<u32>, mine: GlobalMut<u32>) {
    for _ in 0..50 {
        mine.store(thread::thread_idx_x() as usize, 1);
    }
    // Whoever ends last.
    last.atomic_exchange(0, thread::thread_idx_x(), Order::Relaxed, Scope::Device);
}

#[test]
fn plain_accesses_are_interrupted_as_often_as_was_asked() {
    let turns = |preemption| {
        let (last, mine) = (Buffer::filled(1, 0), Buffer::poisoned(64));
        let launch = Launch { preemption, ..Launch::new(1, 64) };
        launch.run(|| unsafe { plain_order(last.view_mut(), mine.view_mut()) }).unwrap().turns
    };
    // A turn to begin, and one for the atomic.
    assert_eq!(turns(0.0), 128);
    assert_eq!(turns(1.0), 128 + 50 * 64);
    let some = turns(0.1) - 128;
    assert!((200..450).contains(&some), "{some} interruptions of 3200 accesses");
}

#[kernel]
pub unsafe fn indices(out: GlobalMut<u32>) {
    let threads = thread::block_dim_x() * thread::block_dim_y() * thread::block_dim_z();
    let thread = thread::thread_idx_x()
        + thread::block_dim_x() * (thread::thread_idx_y() + thread::block_dim_y() * thread::thread_idx_z());
    let block = thread::block_idx_x()
        + thread::grid_dim_x() * (thread::block_idx_y() + thread::grid_dim_y() * thread::block_idx_z());
    assert_eq!(warp::lane_id(), thread % 32);
    let lanes = (threads - thread / 32 * 32).min(32);
    assert_eq!(warp::warp_vote_ballot(warp::activemask(), true), u32::MAX >> (32 - lanes));
    assert!(thread::thread_idx_z() < thread::block_dim_z() && thread::block_idx_z() < thread::grid_dim_z());
    out.store((block * threads + thread) as usize, thread::index_1d());
}

#[test]
fn every_thread_of_every_block_runs_once_with_its_own_indices() {
    for (grid, block) in [((3, 2, 2), (5, 3, 4)), ((1, 1, 1), (1, 1, 1)), ((7, 1, 3), (32, 2, 1))] {
        let threads = grid.0 * grid.1 * grid.2 * block.0 * block.1 * block.2;
        let out = Buffer::<u32>::poisoned(threads as usize);
        let launch = Launch { grid, block, seed: 4, ..Launch::default() };
        let report = launch.run(|| unsafe { indices(out.view_mut()) }).unwrap();
        assert_eq!(report.threads, threads.into());
        assert_eq!(report.global.stores, threads.into());
        assert_eq!(out.to_vec()[0], 0);
    }
}

shared_layout! {
    struct Stages {
        tiles: [U32x4; 64],
        tail: [u8; 5],
        counts: [u64; 2],
    }
}

#[kernel]
pub unsafe fn counted(from: Global<U32x4>, out: GlobalMut<u64>) {
    let tiles = Stages::tiles();
    let thread = thread::thread_idx_x() as usize;
    copy::copy_async(tiles, thread, from, thread);
    copy::copy_async_or_zero(tiles, thread + 32, from, 1_000_000, false);
    copy::wait_all();
    let counts = Stages::counts();
    if thread < 2 {
        counts.store(thread, 0);
    }
    thread::sync_threads();
    let sum: u32 = tiles.load(63 - thread).to_array().iter().sum();
    counts.atomic_add(thread % 2, u64::from(sum), Order::Relaxed, Scope::Block);
    warp::sync_warp(warp::FULL_MASK);
    warp::warp_vote_any(warp::FULL_MASK, true);
    warp::warp_match_any(warp::FULL_MASK, 3_u32);
    warp::warp_reduce_add(warp::FULL_MASK, 3);
    warp::warp_sum(1.0);
    thread::sync_threads();
    if thread == 0 {
        out.store(thread::block_idx_x() as usize, counts.load(0) + counts.load(1));
    }
}

#[test]
fn a_report_counts_what_was_done() {
    assert_eq!(Stages::BYTES, 1024 + 128 + 128);
    let from = Buffer::filled(32, U32x4 { x: 1, y: 2, z: 3, w: 4 });
    let out = Buffer::poisoned(3);
    let launch = Launch::new(3, 32).shared(Stages::BYTES);
    let report = launch.run(|| unsafe { counted(from.view(), out.view_mut()) }).unwrap();
    // Tiles 32.. are zeroes, so nothing is summed.
    assert_eq!(out.to_vec(), [0; 3]);
    let (global, shared) = (report.global, report.shared);
    assert_eq!((global.loads, global.stores, global.atomics), (96, 3, 0));
    assert_eq!((global.bytes_loaded, global.bytes_stored), (96 * 16, 24));
    assert_eq!((shared.loads, shared.stores, shared.atomics), (3 * 34, 3 * 66, 96));
    assert_eq!(shared.bytes_loaded, 3 * (32 * 16 + 32 * 8 + 2 * 8));
    assert_eq!(shared.bytes_stored, 3 * (64 * 16 + 2 * 8 + 32 * 8));
    assert_eq!((report.threads, report.barriers, report.copies), (96, 6, 192));
    assert_eq!((report.warp_syncs, report.votes, report.matches, report.reductions), (3, 3, 3, 3));
    assert_eq!(report.shuffles, 15);
}

#[kernel]
pub unsafe fn stages(from: Global<u32>, out: GlobalMut<u32>, rounds: u32) {
    let tiles = Words::stages().slice(0, 96);
    let thread = thread::thread_idx_x() as usize;
    // Three stages of 32 words, two under way.
    for round in 0..2 {
        copy::copy_async(tiles, 32 * round + thread, from, 32 * round + thread);
        copy::commit_group();
    }
    for round in 0..rounds as usize {
        copy::wait_group::<1>();
        thread::sync_threads();
        let value = tiles.load(32 * (round % 3) + 31 - thread);
        let next = round + 2;
        copy::copy_async_or_zero(
            tiles,
            32 * (next % 3) + thread,
            from,
            32 * next + thread,
            next < rounds as usize,
        );
        copy::commit_group();
        out.store(32 * round + thread, value);
    }
    copy::wait_all();
}

shared_layout! {
    struct Words {
        stages: [u32; 96],
    }
}

#[test]
fn copies_in_stages_land_in_the_order_of_their_groups() {
    let from = Buffer::from_slice(&(0..320).collect::<Vec<u32>>());
    every_seed_passes(|seed| {
        let out = Buffer::poisoned(320);
        let launch = Launch::new(1, 32).shared(Words::BYTES).seed(seed);
        let result = launch.run(|| unsafe { stages(from.view(), out.view_mut(), 10) });
        result.inspect(|_| {
            let expected: Vec<u32> = (0..320).map(|i| i / 32 * 32 + 31 - i % 32).collect();
            assert_eq!(out.to_vec(), expected);
        })
    });
}

/// What one thread computes.
fn alone<T: cuda_std::Value>(compute: impl Fn() -> T) -> T {
    let out = Buffer::poisoned(1);
    // SAFETY: one thread, one element.
    Launch::default().run(|| unsafe { out.view_mut().store(0, compute()) }).unwrap();
    out.get(0).unwrap()
}

/// bf16 to the nearest, ties to even, by comparing with both neighbours in f64.
fn nearest_bf16(value: f32) -> u16 {
    if value.is_nan() {
        return 0x7fff;
    }
    let low = (value.to_bits() >> 16) as u16;
    let exact = |bits: u16| match bits & 0x7fff {
        // One past the greatest finite one, as far as rounding goes.
        0x7f80 => 2_f64.powi(128).copysign(f64::from(value)),
        _ => f64::from(f32::from_bits(u32::from(bits) << 16)),
    };
    if value.is_infinite() {
        return low;
    }
    let (below, above) = ((f64::from(value) - exact(low)).abs(), (exact(low + 1) - f64::from(value)).abs());
    if below < above || (below == above && low.is_multiple_of(2)) { low } else { low + 1 }
}

#[test]
fn bf16_rounds_to_nearest_even_and_has_one_nan() {
    let pick = [
        0,
        1,
        0x7f80_0000,
        0xff80_0000,
        0x7f7f_ffff,
        0x7fc0_0000,
        0xffff_ffff,
        0x7f80_0001,
        0x3f80_8000,
        0x3f81_8000,
        0x0000_8000,
    ];
    let mut bits = 0x1234_5678_u32;
    for at in 0..20_000 {
        bits = bits.wrapping_mul(0x915f_77f5).wrapping_add(0x3039);
        let value = f32::from_bits(*pick.get(at).unwrap_or(&(bits ^ bits >> 15)));
        assert_eq!(bf16::from_f32(value), nearest_bf16(value), "{value:e} {:#x}", value.to_bits());
        let pair = bf16::pack(value, -1.5);
        assert_eq!(pair, 0xbfc0_0000 | u32::from(nearest_bf16(value)));
        if !value.is_nan() {
            assert_eq!(bf16::unpack(pair), (bf16::to_f32(nearest_bf16(value)), -1.5));
        }
    }
}

#[test]
fn fused_multiply_add_rounds_once_and_gives_the_gpus_nan() {
    let (a, b) = (1.0 + f32::EPSILON, 1.0 - f32::EPSILON);
    assert_eq!(alone(|| math::fma(a, b, -1.0)), -f32::EPSILON * f32::EPSILON);
    assert_eq!(alone(|| math::fma(f32::INFINITY, 0.0, 1.0)).to_bits(), 0x7fff_ffff);
    assert_eq!(alone(|| math::fma(1e-38, 0.5, 0.0)), 5e-39);
}

#[kernel]
pub unsafe fn add_floats(values: GlobalMut<f32>, shared: bool) {
    let add = |to: &dyn Fn(f32) -> f32| to(f32::from_bits(3));
    if shared {
        let float = cuda_std::shared::dynamic::<f32>(0, 1);
        float.store(0, values.load(0));
        add(&|value| unsafe { float.atomic_add(0, value, Order::Relaxed, Scope::Block) });
        values.store(0, float.load(0));
    } else {
        add(&|value| unsafe { values.atomic_add(0, value, Order::Relaxed, Scope::Device) });
    }
}

#[test]
fn atomic_additions_of_floats_flush_subnormals_in_global_memory_alone() {
    for (start, shared, expected) in [
        (f32::from_bits(4), true, 7),
        (f32::from_bits(4), false, 0),
        (1.0, true, 0x3f80_0000),
        (f32::NAN, false, 0x7fff_ffff),
    ] {
        let values = Buffer::filled(1, start);
        Launch::default().shared(16).run(|| unsafe { add_floats(values.view_mut(), shared) }).unwrap();
        assert_eq!(values.get(0).unwrap().to_bits(), expected, "{start} {shared}");
    }
}

proptest! {
    #[test]
    fn atomics_on_one_element_are_as_if_in_some_order(values in prop::collection::vec(any::<u32>(), 64), seed: u64) {
        let start = [0, u32::MAX, 0, u32::MAX, 0, 0, 99];
        let data = Buffer::from_slice(&start);
        let signed = Buffer::filled(2, 0_i32);
        let olds = Buffer::<u32>::poisoned(64);
        let launch = Launch::new(2, 32).seed(seed);
        launch.run(|| unsafe {
            let i = thread::index_1d() as usize;
            let (value, data, signed) = (values[i], data.view_mut(), signed.view_mut());
            let (order, scope) = (Order::Relaxed, Scope::Device);
            data.atomic_add(0, value, order, scope);
            data.atomic_min(1, value, order, scope);
            data.atomic_max(2, value, order, scope);
            data.atomic_and(3, value, order, scope);
            data.atomic_or(4, value, order, scope);
            data.atomic_xor(5, value, order, scope);
            olds.view_mut().store(i, data.atomic_exchange(6, value, order, scope));
            signed.atomic_min(0, value as i32, order, scope);
            signed.atomic_max(1, value as i32, order, scope);
        }).unwrap();
        let fold = |start, with: fn(u32, u32) -> u32| values.iter().copied().fold(start, with);
        let data = data.to_vec();
        prop_assert_eq!(data[0], fold(0, u32::wrapping_add));
        prop_assert_eq!(data[1], fold(u32::MAX, u32::min));
        prop_assert_eq!(data[2], fold(0, u32::max));
        prop_assert_eq!(data[3], fold(u32::MAX, |a, b| a & b));
        prop_assert_eq!(data[4], fold(0, |a, b| a | b));
        prop_assert_eq!(data[5], fold(0, |a, b| a ^ b));
        // Each value was put in once and taken out once, or is in still.
        let mut seen = olds.to_vec();
        seen.push(data[6]);
        let mut put = values.clone();
        put.push(99);
        seen.sort_unstable();
        put.sort_unstable();
        prop_assert_eq!(seen, put);
        prop_assert_eq!(signed.get(0), values.iter().map(|value| *value as i32).min().map(|min| min.min(0)));
        prop_assert_eq!(signed.get(1), values.iter().map(|value| *value as i32).max().map(|max| max.max(0)));
    }
}

#[test]
fn buffers_keep_what_launches_wrote() {
    let data = Buffer::<u64>::poisoned(4);
    assert_eq!((data.len(), data.is_empty(), data.get(0)), (4, false, None));
    for round in 0..3 {
        let view = data.view_mut();
        Launch::new(1, 3).run(|| unsafe { view.store(thread::thread_idx_x() as usize, round) }).unwrap();
        assert_eq!(data.get(2), Some(round));
        assert_eq!(data.get(3), None);
    }
    data.set(3, 8);
    assert_eq!(data.to_vec(), [2, 2, 2, 8]);
    assert!(Buffer::<u8>::from_slice(&[]).is_empty());
}

#[test]
fn outside_of_a_launch_there_is_no_thread() {
    assert!(std::panic::catch_unwind(thread::thread_idx_x).is_err());
    let data = Buffer::filled(1, 0);
    let view = data.view();
    assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| unsafe { view.load(0) })).is_err());
}
