//! Matrix products of a warpgroup, on Hopper's tensor cores (`wgmma`, sm_90a).
//!
//! A warpgroup is four warps of the block whose first thread's number is a multiple of 128. Its 128 threads start a product of 64 rows
//! together, which runs on its own from there: it reads one or both sides from shared memory, and adds to sums in the threads' registers.
//! The threads close the products that they have started into a group with [`commit_group`], and the sums are theirs again once
//! [`wait_group`] has given them back.
//!
//! | lanes do | what the hardware needs it for |
//! |---|---|
//! | [`bulk::fence`](crate::bulk::fence), then a barrier | products see what loads, stores and `cp.async` did in shared memory; bulk copies need none |
//! | [`fence`] | the first product, and any after a [`wait_group`], finds the registers as they were left |
//! | [`multiply`], [`multiply_add`] | the products; those with the same sums follow each other |
//! | [`commit_group`] | closes a group |
//! | [`wait_group`] | gives the sums back, and frees what the products read |
//! | [`hold`] | nothing: it keeps work that should overlap with products before the next wait |
//!
//! ```ignore
//! // A tile of an attention: scores = Q K^T, out += P V. Q is [64, 64], K and V [128, 64] of bf16 in shared memory.
//! let (q, k, v) = (Matrix::new(q_words, 0), Matrix::new(k_words, 0), Matrix::new(v_words, 0));
//! wgmma::fence(&mut scores);
//! wgmma::multiply(&mut scores, q.columns(0), k.columns(0)); // [f32; 64]: 128 keys
//! for step in 1..4 {
//!     wgmma::multiply_add(&mut scores, q.columns(step), k.columns(step));
//! }
//! wgmma::commit_group();
//! wgmma::wait_group::<0>(&mut scores);
//! // Sums 8 s to 8 s + 7 become the left side's columns 16 s to 16 s + 15: both lie in the same lanes.
//! let mut weights: [[u32; 4]; 8] = softmax(scores);
//! wgmma::fence((&mut out, &mut weights));
//! for step in 0..8 {
//!     wgmma::multiply_add(&mut out, weights[step], v.rows(step)); // [f32; 32]: 64 columns
//! }
//! wgmma::commit_group();
//! wgmma::wait_group::<0>((&mut out, &mut weights));
//! ```
//!
//! # Matrices in shared memory
//!
//! A [`Matrix`] is made of blocks of 64 columns. A row of a block is 128 bytes, 8 words of 16 bytes, and follows the row before. Words are
//! swizzled, so that neither a row's nor a column's words share banks: word `w` of row `r` stands at place `8 r + (w ^ r % 8)`, which is
//! [`Matrix::place`]. The first row of each block stands at a multiple of 1024 bytes of shared memory; a
//! [`shared_layout!`](crate::shared_layout) sees to that where matrices come first and have whole blocks of 8 rows.
//!
//! | side | slice | element `[i, j]` |
//! |---|---|---|
//! | left `[64, 16]` | [`columns(s)`](Matrix::columns) | row `i`, column `16 s + j` |
//! | right `[16, N]` | [`columns(s)`](Matrix::columns) | row `j`, column `16 s + i`: the matrix is transposed, as keys are (PTX: K-major) |
//! | right `[16, N]` | [`rows(s)`](Matrix::rows) | row `16 s + i`, column `j`: as values are (PTX: MN-major) |
//!
//! # Registers
//!
//! Thread `t` of the warpgroup is lane `l = t % 32` of warp `w = t / 32`; `g = 16 w + l / 4` and `p = 2 (l % 4)`.
//!
//! | part | row | columns |
//! |---|---|---|
//! | `a[0]`, `a[1]` of a left side | `g`, `g + 8` | `p`, `p + 1`, the first in the lower half |
//! | `a[2]`, `a[3]` of a left side | `g`, `g + 8` | `p + 8`, `p + 9` |
//! | `sums[4 j]`, `sums[4 j + 1]` | `g` | `8 j + p`, `8 j + p + 1` |
//! | `sums[4 j + 2]`, `sums[4 j + 3]` | `g + 8` | `8 j + p`, `8 j + p + 1` |
//!
//! # Sums
//! Products are exact. The order of the sums, and how they are rounded in between, is the hardware's and not specified; the emulator
//! adds in order, rounding to nearest even each time. The two agree where every sum is exact.
//!
//! # Safety
//! All threads of the warpgroup reach the same call, and bring the same slices. Slices lie within their views. From the start of a product
//! to the end of the wait for it nobody writes what it reads, and its thread leaves its registers alone: the sums, and a left side in
//! registers. A [`fence`] with those registers comes after what was last done to them, and [`wait_group`] gives back each array of sums
//! before the thread returns. Registers that pass through neither may be moved by the compiler to where the hardware would serialise all
//! products (ptxas: C7510), or worse.

use crate::{Shared, U32x4, face};

/// A matrix of bf16 in shared memory: blocks of 64 columns, see the [module](self#matrices-in-shared-memory).
#[derive(Clone, Copy)]
pub struct Matrix {
    words: Shared<U32x4>,
    stride: usize,
}

/// 16 columns of a [`Matrix`], and as many rows as the product takes: a left side, or a right side that is transposed.
#[derive(Clone, Copy)]
pub struct Columns(pub(crate) face::MatrixSlice);

/// 16 rows of a [`Matrix`], and as many columns as the product takes: a right side.
#[derive(Clone, Copy)]
pub struct Rows(pub(crate) face::MatrixSlice);

impl Matrix {
    /// The matrix whose first row's place 0 is the first of `words`. From one block of 64 columns to the next it is `stride` words, a
    /// multiple of 64; a matrix of one block has any, such as 0.
    #[inline(always)]
    pub fn new(words: Shared<U32x4>, stride: usize) -> Self {
        Self { words, stride }
    }

    /// Where word `word` of row `row` stands in its block, in words of 16 bytes, which hold 8 elements each.
    #[inline(always)]
    pub const fn place(row: usize, word: usize) -> usize {
        8 * row + (word ^ (row % 8))
    }

    /// The matrix from row `row` on, a multiple of 8.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    pub unsafe fn from_row(self, row: usize) -> Self {
        Self { words: Shared(face::matrix_from_row(self.words.0, row)), ..self }
    }

    /// Columns `16 * step` to `16 * step + 15`.
    ///
    /// PTX: a matrix descriptor with 1024 bytes between groups of 8 rows.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    pub unsafe fn columns(self, step: usize) -> Columns {
        Columns(face::matrix_columns(self.words.0, self.stride, step))
    }

    /// Rows `16 * step` to `16 * step + 15`.
    ///
    /// PTX: a matrix descriptor with 1024 bytes between groups of 8 rows, and 16 times the stride between blocks of 64 columns.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    pub unsafe fn rows(self, step: usize) -> Rows {
        Rows(face::matrix_rows(self.words.0, self.stride, step))
    }
}

/// The left side of a product, `[64, 16]`: in shared memory, or in the threads' registers as in the [table](self#registers).
#[derive(Clone, Copy)]
#[allow(missing_docs, reason = "the two places")]
pub enum Left {
    Shared(Columns),
    Registers([u32; 4]),
}

impl From<Columns> for Left {
    #[inline(always)]
    fn from(columns: Columns) -> Self {
        Self::Shared(columns)
    }
}

impl From<[u32; 4]> for Left {
    #[inline(always)]
    fn from(parts: [u32; 4]) -> Self {
        Self::Registers(parts)
    }
}

/// The right side of a product, `[16, N]`, in shared memory.
#[derive(Clone, Copy)]
#[allow(missing_docs, reason = "the two ways to lie")]
pub enum Right {
    Columns(Columns),
    Rows(Rows),
}

impl From<Columns> for Right {
    #[inline(always)]
    fn from(columns: Columns) -> Self {
        Self::Columns(columns)
    }
}

impl From<Rows> for Right {
    #[inline(always)]
    fn from(rows: Rows) -> Self {
        Self::Rows(rows)
    }
}

/// A thread's sums of a product with `N` columns: `N / 2`, for it has 64 rows and 128 threads.
pub trait Sums: Registers + face::SumsFace {}

impl Sums for [f32; 32] {}
impl Sums for [f32; 64] {}

/// What products keep in registers: sums, left sides, and arrays, pairs and references of them.
pub trait Registers {
    /// Holds the compiler to the order of what is done to them before and after; `waited` where that is a wait.
    #[doc(hidden)]
    unsafe fn pin(&mut self, waited: bool);
}

impl<const N: usize> Registers for [f32; N] {
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    unsafe fn pin(&mut self, waited: bool) {
        const { assert!(N.is_multiple_of(4), "sums are held four at a time") };
        face::pin_sums(self, waited);
    }
}

impl Registers for [u32; 4] {
    #[inline(always)]
    unsafe fn pin(&mut self, _: bool) {
        face::pin_left(self);
    }
}

impl<T: Registers, const N: usize> Registers for [T; N] {
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    unsafe fn pin(&mut self, waited: bool) {
        let mut at = 0;
        while at < N {
            self[at].pin(waited);
            at += 1;
        }
    }
}

impl<T: Registers> Registers for &mut T {
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    unsafe fn pin(&mut self, waited: bool) {
        T::pin(self, waited);
    }
}

impl<A: Registers, B: Registers> Registers for (A, B) {
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    unsafe fn pin(&mut self, waited: bool) {
        self.0.pin(waited);
        self.1.pin(waited);
    }
}

/// Keeps the arithmetic that made `registers` before what follows, and so beside the products that are under way: the compiler would else
/// put it off until a later wait is over.
///
/// PTX: none.
#[inline(always)]
pub unsafe fn hold(mut registers: impl Registers) {
    registers.pin(false);
}

/// Lets the products that follow find `registers` as they were left: their sums, and left sides. Needed before the first product and after
/// each [`wait_group`].
///
/// PTX: `wgmma.fence.sync.aligned`.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn fence(mut registers: impl Registers) {
    registers.pin(false);
    face::product_fence();
}

/// Starts `sums = left * right`, of 64 rows, 16 columns of the left side, and twice as many columns as a thread has sums.
///
/// PTX: `wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16` with 32 sums, `m64n128k16` with 64.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn multiply<S: Sums>(sums: &mut S, left: impl Into<Left>, right: impl Into<Right>) {
    sums.product(left.into(), right.into(), false);
}

/// Starts `sums += left * right`, as [`multiply`].
///
/// PTX: as [`multiply`].
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn multiply_add<S: Sums>(sums: &mut S, left: impl Into<Left>, right: impl Into<Right>) {
    sums.product(left.into(), right.into(), true);
}

/// Closes the products that the warp has started since the last group.
///
/// PTX: `wgmma.commit_group.sync.aligned`.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn commit_group() {
    face::product_commit_group();
}

/// Waits until at most `PENDING` of the warp's newest groups are under way, 0 to 7, and gives back `registers` of those that are over. What
/// the warp's part of their products read may be written again; a barrier tells that other warps.
///
/// PTX: `wgmma.wait_group.sync.aligned`.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn wait_group<const PENDING: u32>(mut registers: impl Registers) {
    const { assert!(PENDING < 8, "at most 7 groups can be left under way") };
    face::product_wait_group::<PENDING>();
    registers.pin(true);
}
