use cuda_std::copy::{commit_group, copy_async_or_zero, wait_all, wait_group};
use cuda_std::math::fma;
use cuda_std::prelude::*;
use cuda_std::shared;

use crate::abi::low_rank::product::{BLOCK, PARTS, STAGE_WORDS, STAGES, STEP_WORDS, STRIDE, TILE};
use crate::model::elements::{quad_of, word_of_quad};
use crate::unroll::unrolled;

/// Dot products of rows in f32: `out = a b^T`.
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `a` | `[rows, inner]` f32, in words | |
/// | `b` | `[columns, inner]` f32, in words | may be `a` |
/// | `rows` | at least 1 | |
/// | `columns` | a multiple of 4 | |
/// | `inner` | a multiple of 4 | |
/// | `out` | `[rows, columns]` f32, in words | written |
///
/// For matrices whose products must keep their digits and are few: fused f32, no tensor cores. Sums are in one order whatever the schedule.
///
/// # Mapping
/// A block has a tile of 32 x 32; 32 numbers of each row at a time pass through a ring in shared memory. Four groups of 64 threads take 8
/// of the 32 each, so that each thread has sums of 4 x 4 numbers and reads little for them; in the end the groups' sums are added in order.
///
/// # Launch
/// [`grid`](crate::abi::low_rank::product::grid) blocks of [`BLOCK`] threads,
/// [`SHARED_BYTES`](crate::abi::low_rank::product::SHARED_BYTES) of shared memory.
///
/// # Safety
/// The views have the shapes above; `out` overlaps neither factor.
#[kernel(collectives(barrier = 3))]
pub unsafe fn row_dots(
    a: Global<U32x4>,
    b: Global<U32x4>,
    rows: u32,
    columns: u32,
    inner: u32,
    out: GlobalMut<U32x4>,
) {
    multiply::<false>(a, b, rows, columns, inner, out);
}

/// Sums of rows in f32, each with weights of its own: `out = a b`.
///
/// | parameter | shape | meaning |
/// |---|---|---|
/// | `a` | `[rows, inner]` f32, in words | weights |
/// | `b` | `[inner, columns]` f32, in words | |
/// | `rows`, `columns`, `inner`, `out` | | as for [`row_dots`] |
///
/// # Launch
/// As for [`row_dots`], like all the rest.
///
/// # Safety
/// As there.
#[kernel(collectives(barrier = 3))]
pub unsafe fn row_sums(
    a: Global<U32x4>,
    b: Global<U32x4>,
    rows: u32,
    columns: u32,
    inner: u32,
    out: GlobalMut<U32x4>,
) {
    multiply::<true>(a, b, rows, columns, inner, out);
}

/// Numbers of a step.
const STEP: u32 = 4 * STEP_WORDS;

/// The body of both; `SUMS`: `b` is `[inner, columns]`.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
unsafe fn multiply<const SUMS: bool>(
    a: Global<U32x4>,
    b: Global<U32x4>,
    rows: u32,
    columns: u32,
    inner: u32,
    out: GlobalMut<U32x4>,
) {
    let across = columns.div_ceil(TILE);
    let first_row = thread::block_idx_x() / across * TILE;
    let first_column = thread::block_idx_x() % across * TILE;
    let ring = shared::dynamic::<U32x4>(0, (STAGES * STAGE_WORDS) as usize);
    let steps = inner.div_ceil(STEP);

    // A thread copies a word of each factor.
    let thread = thread::thread_idx_x();
    let (own, word) = (thread / STEP_WORDS, thread % STEP_WORDS);
    let ask = |step: u32, stage: u32| {
        if step < steps {
            let to = (stage * STAGE_WORDS + own * STRIDE + word) as usize;
            let (row, at) = (first_row + own, step * STEP_WORDS + word);
            let of = |row: u32, at: u32, width: u32| (row * (width / 4) + at) as usize;
            copy_async_or_zero(ring, to, a, of(row, at, inner), row < rows && 4 * at < inner);
            let to = to + (TILE * STRIDE) as usize;
            if SUMS {
                let (row, at) = (step * STEP + own, first_column / 4 + word);
                copy_async_or_zero(ring, to, b, of(row, at, columns), row < inner && 4 * at < columns);
            } else {
                let row = first_column + own;
                copy_async_or_zero(ring, to, b, of(row, at, inner), row < columns && 4 * at < inner);
            }
        }
        commit_group();
    };
    let mut ahead = 0;
    while ahead < STAGES - 1 {
        ask(ahead, ahead);
        ahead += 1;
    }

    // Of each 64 threads: which part of a step, which rows (and columns), eight apart, or four columns on end.
    let (part, down, along) = (thread / 64, thread % 64 / 8, thread % 8);
    let mut sums = [[0.0_f32; 4]; 4];
    let (mut step, mut stage, mut into) = (0, 0, STAGES - 1);
    while step < steps {
        wait_group::<{ STAGES - 2 }>();
        // All threads' copies are here then, and nobody reads the stage that is filled next any more.
        thread::sync_threads();
        ask(step + STAGES - 1, into);
        let left = ring.slice((stage * STAGE_WORDS) as usize, (TILE * STRIDE) as usize);
        let right = ring.slice((stage * STAGE_WORDS + TILE * STRIDE) as usize, (TILE * STRIDE) as usize);
        unrolled!(half < (STEP_WORDS / PARTS) as usize, {
            let at = part * (STEP_WORDS / PARTS) + half as u32;
            let row = |row: u32| quad_of(left.load(((down + 8 * row) * STRIDE + at) as usize));
            let weights = [row(0), row(1), row(2), row(3)];
            // Four columns of one inner number, or four inner numbers of one column.
            let numbers = |turn: u32| {
                let place =
                    if SUMS { (4 * at + turn) * STRIDE + along } else { (along + 8 * turn) * STRIDE + at };
                quad_of(right.load(place as usize))
            };
            let numbers = [numbers(0), numbers(1), numbers(2), numbers(3)];
            add_products::<SUMS>(&weights, &numbers, &mut sums);
        });
        stage = if stage + 1 == STAGES { 0 } else { stage + 1 };
        into = if into + 1 == STAGES { 0 } else { into + 1 };
        step += 1;
    }

    // What is in flight is beyond the last step; the ring is the sums' from here on.
    wait_all();
    thread::sync_threads();
    let parts = shared::dynamic::<f32>(0, (PARTS * TILE * TILE) as usize);
    unrolled!(row < 4, {
        let mut column = 0;
        while column < 4 {
            let of_tile = if SUMS { 4 * along + column as u32 } else { along + 8 * column as u32 };
            let at = (part * TILE + down + 8 * row as u32) * TILE + of_tile;
            parts.store(at as usize, sums[row][column]);
            column += 1;
        }
    });
    thread::sync_threads();
    let (row, quad) = (thread / (TILE / 4), thread % (TILE / 4));
    let mut all = [0.0; 4];
    unrolled!(number < 4, {
        let mut part = 0;
        while part < PARTS {
            let at = (part * TILE + row) * TILE + 4 * quad + number as u32;
            all[number] += parts.load(at as usize);
            part += 1;
        }
    });
    let (row, column) = (first_row + row, first_column + 4 * quad);
    if row < rows && column < columns {
        out.store((row * (columns / 4) + column / 4) as usize, word_of_quad(all));
    }
}

/// Adds 4 x 4 x 4 products, those of one inner number after another; `numbers` are by inner number if `SUMS`, else by column.
#[inline(always)]
fn add_products<const SUMS: bool>(
    weights: &[[f32; 4]; 4],
    numbers: &[[f32; 4]; 4],
    sums: &mut [[f32; 4]; 4],
) {
    let mut inner = 0;
    while inner < 4 {
        let mut row = 0;
        while row < 4 {
            let mut column = 0;
            while column < 4 {
                let number = if SUMS { numbers[inner][column] } else { numbers[column][inner] };
                sums[row][column] = fma(weights[row][inner], number, sums[row][column]);
                column += 1;
            }
            row += 1;
        }
        inner += 1;
    }
}

const _: () = assert!(BLOCK == TILE * STEP_WORDS && BLOCK == PARTS * 64 && STEP == TILE);
