//! Matrix products of a warp, on the tensor cores, and the transpose and the loads that go with them.
//!
//! # Safety
//! All 32 lanes of the warp reach the same call. Loads read, as [views](crate::view#safety) do.

use crate::{Shared, U32x4, face};

/// `c + a * b`: `a` is 16 x 16 and `b` 16 x 8, both bf16; `c` and the result are 16 x 8, f32.
///
/// A lane holds parts of each, which its number `lane` names by `g = lane / 4` and `t = lane % 4`; of two bf16 in a word the lower
/// half comes first.
///
/// | part | row | columns |
/// |---|---|---|
/// | `a[0]`, `a[1]` | `g`, `g + 8` | `2 t`, `2 t + 1` |
/// | `a[2]`, `a[3]` | `g`, `g + 8` | `2 t + 8`, `2 t + 9` |
/// | `c[0]`, `c[1]` | `g` | `2 t`, `2 t + 1` |
/// | `c[2]`, `c[3]` | `g + 8` | `2 t`, `2 t + 1` |
///
/// `b[0]` is rows `2 t` and `2 t + 1` of column `g`, `b[1]` rows `2 t + 8` and `2 t + 9`.
///
/// Products are exact. The order of the sums, and how they are rounded in between, is the hardware's and not specified; the emulator
/// adds in order, rounding to nearest even each time. The two agree where every sum is exact.
///
/// PTX: `mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32`.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn mma_m16n8k16_bf16(a: [u32; 4], b: [u32; 2], c: [f32; 4]) -> [f32; 4] {
    face::mma_m16n8k16_bf16(a, b, c)
}

/// The transpose of an 8 x 8 matrix of 16-bit elements. A lane holds columns `2 t` and `2 t + 1` of row `g`, with `g` and `t` as above,
/// and gets them of the transpose: what was in `c`'s layout is then in `b`'s.
///
/// PTX: `movmatrix.sync.aligned.m8n8.trans.b16`.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn transpose_8x8(pair: u32) -> u32 {
    face::transpose_8x8(pair)
}

/// Four 8 x 8 matrices of 16-bit elements from shared memory, a row a word: lane `8 m + r` names row `r` of matrix `m`, at `row`. Of each
/// matrix the lane gets columns `2 t` and `2 t + 1` of row `g`, with `g` and `t` as above.
///
/// Rows of one matrix that lie in different eighths of 128 bytes are read at once.
///
/// PTX: `ldmatrix.sync.aligned.m8n8.x4.shared.b16`.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn load_8x8x4(from: Shared<U32x4>, row: usize) -> [u32; 4] {
    face::load_8x8x4(from.0, row)
}

/// The transposes of four matrices, whose rows lanes name as for [`load_8x8x4`]: the lane gets rows `2 t` and `2 t + 1` of column `g`.
///
/// PTX: `ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16`.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn load_transposed_8x8x4(from: Shared<U32x4>, row: usize) -> [u32; 4] {
    face::load_transposed_8x8x4(from.0, row)
}
