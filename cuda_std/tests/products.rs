//! A warpgroup's products against plain loops, in every form.

#![allow(
    unsafe_op_in_unsafe_fn,
    clippy::missing_safety_doc,
    clippy::undocumented_unsafe_blocks,
    missing_docs,
    reason = "kernels of a few lines"
)]

use cuda_std::emulator::{Buffer, Launch};
use cuda_std::prelude::*;
use cuda_std::wgmma::{self, Left, Matrix, Right};
use cuda_std::{bulk, shared};

/// Rows of the left side, a warpgroup's 64 each, and what is summed over.
const ROWS: usize = 128;
const DEPTH: usize = 128;

/// Small integers, row by row.
fn matrix(rows: usize, columns: usize, factor: usize) -> Vec<f32> {
    (0..rows * columns).map(|at| ((at * factor + at / 7 * 3) % 15) as f32 - 7.0).collect()
}

/// The words of a matrix, each where it stands: blocks of 64 columns one after the other, with `gap` more words between them.
fn swizzled(of: &[f32], rows: usize, columns: usize, gap: usize) -> Vec<U32x4> {
    let mut words = vec![U32x4::default(); (8 * rows + gap) * (columns / 64)];
    let pair = |row: usize, column: usize| {
        let at = row * columns + column;
        of[at].to_bits() >> 16 | of[at + 1].to_bits() & 0xffff_0000
    };
    for row in 0..rows {
        for column in (0..columns).step_by(8) {
            let place = column / 64 * (8 * rows + gap) + 8 * row + ((column / 8 % 8) ^ (row % 8));
            let [x, y, z, w] = [0, 2, 4, 6].map(|more| pair(row, column + more));
            words[place] = U32x4 { x, y, z, w };
        }
    }
    words
}

/// `[ROWS, N]` of `left * right`; `left` is `[ROWS, DEPTH]`, and `right` is `[DEPTH, N]`, or `[N, DEPTH]` unless `by_rows`.
unsafe fn product<const SUMS: usize>(
    words: [Global<U32x4>; 2],
    len: [usize; 2],
    stride: [usize; 2],
    in_registers: Global<u32>,
    by_rows: bool,
    of_registers: bool,
    out: GlobalMut<f32>,
) where
    [f32; SUMS]: wgmma::Sums,
{
    let first_right = len[0].next_multiple_of(64) * 16;
    let sides = [shared::dynamic::<U32x4>(0, len[0]), shared::dynamic::<U32x4>(first_right, len[1])];
    let thread = thread::thread_idx_x() as usize;
    for side in 0..2 {
        for at in (thread..len[side]).step_by(256) {
            sides[side].store(at, words[side].load(at));
        }
    }
    bulk::fence();
    thread::sync_threads();
    let left = Matrix::new(sides[0], stride[0]).from_row(thread / 128 * 64);
    let right = Matrix::new(sides[1], stride[1]);
    let (warp, lane) = (thread / 32, thread % 32);
    let (row, pair) = (16 * warp + lane / 4, 2 * (lane % 4));
    let mut sums = [1.0; SUMS];
    wgmma::fence(&mut sums);
    for step in 0..DEPTH / 16 {
        let a = if of_registers {
            let word = |row: usize, column: usize| in_registers.load((row * DEPTH + 16 * step + column) / 2);
            Left::Registers([
                word(row, pair),
                word(row + 8, pair),
                word(row, pair + 8),
                word(row + 8, pair + 8),
            ])
        } else {
            left.columns(step).into()
        };
        let b: Right = if by_rows { right.rows(step).into() } else { right.columns(step).into() };
        if step == 0 {
            wgmma::multiply(&mut sums, a, b)
        } else {
            wgmma::multiply_add(&mut sums, a, b)
        }
        wgmma::commit_group();
    }
    wgmma::wait_group::<0>(&mut sums);
    for (at, sum) in sums.into_iter().enumerate() {
        let (row, column) = (row + at / 2 % 2 * 8, at / 4 * 8 + pair + at % 2);
        out.store(row * 2 * SUMS + column, sum);
    }
}

fn agrees<const SUMS: usize>(by_rows: bool, of_registers: bool, gap: usize)
where
    [f32; SUMS]: wgmma::Sums,
{
    let columns = 2 * SUMS;
    let (right_rows, right_columns) = if by_rows { (DEPTH, columns) } else { (columns, DEPTH) };
    let (left, right) = (matrix(ROWS, DEPTH, 5), matrix(right_rows, right_columns, 11));
    let words = [swizzled(&left, ROWS, DEPTH, gap), swizzled(&right, right_rows, right_columns, gap)];
    let (len, stride) = ([words[0].len(), words[1].len()], [8 * ROWS + gap, 8 * right_rows + gap]);
    let pairs: Vec<u32> =
        left.chunks(2).map(|pair| pair[0].to_bits() >> 16 | pair[1].to_bits() & 0xffff_0000).collect();
    let (words, pairs) = (words.map(|words| Buffer::from_slice(&words)), Buffer::from_slice(&pairs));
    let out = Buffer::poisoned(ROWS * columns);
    let launch = Launch::new(1, 256).shared((len[0] + len[1]) * 16);
    let kernel = || unsafe {
        let words = [words[0].view(), words[1].view()];
        product::<SUMS>(words, len, stride, pairs.view(), by_rows, of_registers, out.view_mut());
    };
    launch.run(kernel).unwrap();
    let expected: Vec<f32> = (0..ROWS * columns)
        .map(|at| {
            let (row, column) = (at / columns, at % columns);
            let of_right = |k: usize| right[if by_rows { k * columns + column } else { column * DEPTH + k }];
            (0..DEPTH).map(|k| left[row * DEPTH + k] * of_right(k)).sum()
        })
        .collect();
    assert_eq!(out.to_vec(), expected, "{SUMS} sums, by rows: {by_rows}, of registers: {of_registers}");
}

#[test]
fn every_form_agrees_with_loops() {
    for by_rows in [false, true] {
        for of_registers in [false, true] {
            for gap in [0, 64] {
                agrees::<32>(by_rows, of_registers, gap);
                agrees::<64>(by_rows, of_registers, gap);
            }
        }
    }
}

#[test]
fn places_of_eight_rows_are_those_of_the_swizzle() {
    let mut all: Vec<usize> = (0..64).map(|at| Matrix::place(at / 8, at % 8)).collect();
    assert_eq!(all[..16], [0, 1, 2, 3, 4, 5, 6, 7, 9, 8, 11, 10, 13, 12, 15, 14]);
    assert_eq!(Matrix::place(13, 3), 8 * 13 + 6);
    all.sort_unstable();
    assert_eq!(all, (0..64).collect::<Vec<_>>());
}
