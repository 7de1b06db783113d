use super::SharedPointer;
use crate::U32x4;

unsafe extern "C" {
    fn __cuda_std_load_8x8x4(parts: *mut u32, row: u32);
    fn __cuda_std_load_transposed_8x8x4(parts: *mut u32, row: u32);
    fn __cuda_std_transpose_8x8(pair: u32) -> u32;
    fn __cuda_std_mma_m16n8k16_bf16(sums: *mut f32, a0: u32, a1: u32, a2: u32, a3: u32, b0: u32, b1: u32);
}

#[inline(always)]
pub unsafe fn mma_m16n8k16_bf16(a: [u32; 4], b: [u32; 2], mut c: [f32; 4]) -> [f32; 4] {
    __cuda_std_mma_m16n8k16_bf16(c.as_mut_ptr(), a[0], a[1], a[2], a[3], b[0], b[1]);
    c
}

#[inline(always)]
pub unsafe fn transpose_8x8(pair: u32) -> u32 {
    __cuda_std_transpose_8x8(pair)
}

#[inline(always)]
pub unsafe fn load_8x8x4(from: SharedPointer<U32x4>, row: usize) -> [u32; 4] {
    let mut parts = [0; 4];
    __cuda_std_load_8x8x4(parts.as_mut_ptr(), from.address(row));
    parts
}

#[inline(always)]
pub unsafe fn load_transposed_8x8x4(from: SharedPointer<U32x4>, row: usize) -> [u32; 4] {
    let mut parts = [0; 4];
    __cuda_std_load_transposed_8x8x4(parts.as_mut_ptr(), from.address(row));
    parts
}
