use core::arch::asm;

use super::SharedPointer;
use crate::U32x4;
use crate::wgmma::{Columns, Left, Right, Rows};

/// What `wgmma` calls a matrix descriptor; lengths are in units of 16 bytes, as a view's are.
///
/// | bits | what |
/// |---|---|
/// | 0 to 13 | where the slice starts in shared memory |
/// | 16 to 29 | from one block of 64 columns to the next; of columns not used, and 1 |
/// | 32 to 45 | from one group of 8 rows to the next: 64 |
/// | 49 to 51 | place of the first row in the pattern of the swizzle: 0, since blocks start at multiples of 1024 bytes |
/// | 62 to 63 | the swizzle: 1, of 128 bytes |
#[derive(Clone, Copy)]
pub struct MatrixSlice(u64);

impl MatrixSlice {
    #[inline(always)]
    unsafe fn new(words: SharedPointer<U32x4>, first: usize, stride: usize) -> Self {
        // The sum comes last: what all slices of a matrix share is worked out once.
        let start = words.address(0) >> 4 & 0x3fff;
        Self(1 << 62 | 64 << 32 | u64::from(((stride as u32) << 16 | start) + first as u32))
    }
}

#[inline(always)]
pub unsafe fn matrix_from_row(words: SharedPointer<U32x4>, row: usize) -> SharedPointer<U32x4> {
    words.slice(8 * row, 0)
}

#[inline(always)]
pub unsafe fn matrix_columns(words: SharedPointer<U32x4>, stride: usize, step: usize) -> MatrixSlice {
    // The hardware swizzles addresses, and those of a step differ from those of the first in bits that the swizzle only reverses.
    MatrixSlice::new(words, step / 4 * stride + step % 4 * 2, 1)
}

#[inline(always)]
pub unsafe fn matrix_rows(words: SharedPointer<U32x4>, stride: usize, step: usize) -> MatrixSlice {
    MatrixSlice::new(words, step * 128, stride)
}

unsafe extern "C" {
    fn __cuda_std_wgmma_fence();
    fn __cuda_std_wgmma_commit_group();
    fn __cuda_std_wgmma_wait_group(pending: u32);
}

/// The products whose sums have one length.
pub trait SumsFace {
    unsafe fn product(&mut self, left: Left, right: Right, add: bool);
}

macro_rules! products {
    ($sums:literal: $of_shared:ident, $of_registers:ident) => {
        unsafe extern "C" {
            fn $of_shared(sums: *mut f32, a: u64, b: u64, add: u32, rows: u32);
            fn $of_registers(sums: *mut f32, a0: u32, a1: u32, a2: u32, a3: u32, b: u64, add: u32, rows: u32);
        }

        impl SumsFace for [f32; $sums] {
            #[inline(always)]
            unsafe fn product(&mut self, left: Left, right: Right, add: bool) {
                let sums = self.as_mut_ptr();
                let add = u32::from(add);
                // Constants, each in a call of its own: the instruction has the right side's layout as an immediate.
                match (left, right) {
                    (Left::Shared(Columns(a)), Right::Columns(Columns(b))) => {
                        $of_shared(sums, a.0, b.0, add, 0)
                    }
                    (Left::Shared(Columns(a)), Right::Rows(Rows(b))) => $of_shared(sums, a.0, b.0, add, 1),
                    (Left::Registers(a), Right::Columns(Columns(b))) => {
                        $of_registers(sums, a[0], a[1], a[2], a[3], b.0, add, 0);
                    }
                    (Left::Registers(a), Right::Rows(Rows(b))) => {
                        $of_registers(sums, a[0], a[1], a[2], a[3], b.0, add, 1);
                    }
                }
            }
        }
    };
}
products!(32: __cuda_std_wgmma_n64_ss, __cuda_std_wgmma_n64_rs);
products!(64: __cuda_std_wgmma_n128_ss, __cuda_std_wgmma_n128_rs);

#[inline(always)]
pub unsafe fn product_fence() {
    __cuda_std_wgmma_fence();
}

#[inline(always)]
pub unsafe fn product_commit_group() {
    __cuda_std_wgmma_commit_group();
}

#[inline(always)]
pub unsafe fn product_wait_group<const PENDING: u32>() {
    __cuda_std_wgmma_wait_group(PENDING);
}

/// No instruction: what is done to the four before stays before, and what is done after stays after.
macro_rules! pin_four {
    ($four:expr) => {{
        let [first, second, third, fourth] = $four;
        asm!(
            "// {first} {second} {third} {fourth}",
            first = inout(reg32) * first,
            second = inout(reg32) * second,
            third = inout(reg32) * third,
            fourth = inout(reg32) * fourth,
            options(nomem, nostack, preserves_flags)
        );
    }};
}

#[inline(always)]
pub unsafe fn pin_sums<const N: usize>(sums: &mut [f32; N], _waited: bool) {
    for four in sums.as_chunks_mut::<4>().0 {
        pin_four!(four);
    }
}

#[inline(always)]
pub unsafe fn pin_left(parts: &mut [u32; 4]) {
    pin_four!(parts);
}
