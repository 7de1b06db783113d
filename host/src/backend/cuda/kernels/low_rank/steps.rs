use spinkv_kernels::abi::WORD_ELEMENTS;
use spinkv_kernels::abi::low_rank::{MAX_RANK, complete_basis, inverse_factor, product, store_basis};

use super::super::super::driver::{
    Argument, DeviceBuffer, LaunchShape, Result, Stream, check_length, check_multiple, check_operand,
    check_range, launch_with,
};
use super::super::Kernels;
use crate::memory::Word;

/// What rows of `a` are to rows of `b` in a [`RowProduct`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weights {
    /// `b` is `[columns, inner]`: products are dot products of rows, `a b^T`.
    Dots,
    /// `b` is `[inner, columns]`: products are sums of its rows, `a b`.
    Sums,
}

/// A launch of `row_dots` or `row_sums`: a product in f32.
#[derive(Clone, Copy, Debug)]
pub struct RowProduct<'a> {
    /// `[rows, inner]`.
    pub a: &'a DeviceBuffer<f32>,
    /// `[columns, inner]` or `[inner, columns]`; may be `a`.
    pub b: &'a DeviceBuffer<f32>,
    /// Which of both.
    pub weights: Weights,
    /// Rows of `a`.
    pub rows: u32,
    /// A multiple of 4.
    pub columns: u32,
    /// A multiple of 4.
    pub inner: u32,
    /// `[rows, columns]`; another buffer.
    pub out: &'a DeviceBuffer<f32>,
}

impl RowProduct<'_> {
    /// Async: products are there when `stream` has come this far.
    ///
    /// # Errors
    /// [`Operand`](super::super::super::driver::DriverError::Operand) for a size of 0, or matrices beyond 32 bits of numbers,
    /// [`Multiple`](super::super::super::driver::DriverError::Multiple) for columns or inner numbers that are no multiple of 4,
    /// [`Length`](super::super::super::driver::DriverError::Length) for a buffer of another length, or a failed launch.
    ///
    /// # Safety
    /// Until the launch has run nothing writes what it reads, and nothing uses what it writes.
    pub unsafe fn launch(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        let Self { rows, columns, inner, .. } = *self;
        let most = u64::from(u32::MAX);
        let of = |rows: u32, columns: u32| u64::from(rows) * u64::from(columns);
        check_operand("product rows", rows.into(), 1..=most)?;
        check_operand("product columns", columns.into(), 1..=most)?;
        check_operand("product inner", inner.into(), 1..=most)?;
        check_multiple("product columns", columns.into(), 4)?;
        check_multiple("product inner", inner.into(), 4)?;
        for (what, len, buffer) in [
            ("product a", of(rows, inner), self.a),
            ("product b", of(columns, inner), self.b),
            ("product out", of(rows, columns), self.out),
        ] {
            check_operand(what, len, 1..=most)?;
            check_length(what, len as usize, buffer.len())?;
        }
        let blocks = product::grid(rows, columns);
        check_operand("product tiles", blocks, 1..=i32::MAX as u64)?;
        let arguments: [Argument; 6] =
            [self.a.into(), self.b.into(), rows.into(), columns.into(), inner.into(), self.out.into()];
        let shape =
            LaunchShape::linear(blocks as u32, product::BLOCK).with_shared_bytes(product::SHARED_BYTES);
        let function = match self.weights {
            Weights::Dots => &kernels.low_rank.row_dots,
            Weights::Sums => &kernels.low_rank.row_sums,
        };
        // SAFETY: order and types are the kernels'; the caller answers for who else uses the buffers.
        unsafe { launch_with(function, &shape, stream, arguments) }
    }
}

/// What becomes of vectors that nearly depend on those before them.
pub use crate::backend::cpu::low_rank::Pivots as SmallPivots;

/// A launch of `inverse_factor`: what makes vectors orthonormal.
#[derive(Clone, Copy, Debug)]
pub struct InverseFactor<'a> {
    /// `[rank, rank]`: the vectors' dot products.
    pub products: &'a DeviceBuffer<f32>,
    /// Vectors: at most [`MAX_RANK`].
    pub rank: u32,
    /// Of vectors that nearly depend on those before them.
    pub small: SmallPivots,
    /// `[rank, rank]`: written.
    pub factor: &'a DeviceBuffer<f32>,
}

impl InverseFactor<'_> {
    /// Async: the factor is there when `stream` has come this far.
    ///
    /// # Errors
    /// [`Operand`](super::super::super::driver::DriverError::Operand) for a rank that is not 1 to [`MAX_RANK`], [`Length`](super::super::super::driver::DriverError::Length) for a buffer of another
    /// length, [`SharedMemory`](super::super::super::driver::DriverError::SharedMemory) for a rank that a block of this device has no room for, or a failed launch.
    ///
    /// # Safety
    /// Until the launch has run nothing writes what it reads, and nothing uses what it writes.
    pub unsafe fn launch(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        let rank = self.rank;
        check_operand("inverse_factor rank", rank.into(), 1..=MAX_RANK.into())?;
        check_length("inverse_factor products", (rank * rank) as usize, self.products.len())?;
        check_length("inverse_factor factor", (rank * rank) as usize, self.factor.len())?;
        let drops = u32::from(self.small == SmallPivots::Dropped);
        let arguments: [Argument; 4] = [self.products.into(), rank.into(), drops.into(), self.factor.into()];
        let shape = LaunchShape::linear(1, inverse_factor::BLOCK)
            .with_shared_bytes(inverse_factor::shared_bytes(rank));
        // SAFETY: order and types are the kernel's; the caller answers for who else uses the buffers.
        unsafe { launch_with(&kernels.low_rank.inverse_factor, &shape, stream, arguments) }
    }
}

/// A launch of `complete_basis`: rows of zero become axes, less what the others have of them.
#[derive(Clone, Copy, Debug)]
pub struct CompleteBasis<'a> {
    /// `[rank, width]`: orthonormal rows, and empty ones.
    pub vectors: &'a DeviceBuffer<f32>,
    /// Rows.
    pub rank: u32,
    /// Elements of a row: as many as there are rows, or more.
    pub width: u32,
}

impl CompleteBasis<'_> {
    /// Async: the rows are there when `stream` has come this far.
    ///
    /// # Errors
    /// [`Operand`](super::super::super::driver::DriverError::Operand) for a rank that is not 1 to [`MAX_RANK`], or rows shorter than that or beyond 16 bits,
    /// [`Length`](super::super::super::driver::DriverError::Length) for a buffer of another length,
    /// [`SharedMemory`](super::super::super::driver::DriverError::SharedMemory) for rows that a block has no room for, or a failed launch.
    ///
    /// # Safety
    /// Until the launch has run nothing else uses the vectors.
    pub unsafe fn launch(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        let Self { vectors, rank, width } = *self;
        check_operand("complete_basis rank", rank.into(), 1..=MAX_RANK.into())?;
        check_operand("complete_basis width", width.into(), rank.into()..=u64::from(u16::MAX))?;
        check_length("complete_basis vectors", rank as usize * width as usize, vectors.len())?;
        let arguments: [Argument; 3] = [vectors.into(), rank.into(), width.into()];
        let shape = LaunchShape::linear(1, complete_basis::BLOCK)
            .with_shared_bytes(complete_basis::shared_bytes(rank, width));
        // SAFETY: order and types are the kernel's; the caller answers for who else uses the buffer.
        unsafe { launch_with(&kernels.low_rank.complete_basis, &shape, stream, arguments) }
    }
}

/// A launch of `store_basis`: a basis in bf16, in both layouts that it is read in.
#[derive(Clone, Copy, Debug)]
pub struct StoreBasis<'a> {
    /// `[rank, width]`.
    pub vectors: &'a DeviceBuffer<f32>,
    /// A multiple of 8.
    pub rank: u32,
    /// KV heads times head dimension: a multiple of 8.
    pub width: u32,
    /// `[rank, width / 8]` or more: the weights of the product ([`Linear`](super::super::Linear)) of keys with the basis.
    pub rows: &'a DeviceBuffer<Word>,
    /// Where it goes among the bases.
    pub place: u32,
    /// `[bases, width, rank / 8]`: what [`RebuildKeys`](super::RebuildKeys) reads.
    pub bases: &'a DeviceBuffer<Word>,
}

impl StoreBasis<'_> {
    /// Async: the basis is there when `stream` has come this far.
    ///
    /// # Errors
    /// [`Operand`](super::super::super::driver::DriverError::Operand) for a size of 0 or beyond 32 bits, [`Multiple`](super::super::super::driver::DriverError::Multiple) for one that is no
    /// multiple of 8, [`OutOfRange`](super::super::super::driver::DriverError::OutOfRange) for a buffer that does not fit, or a failed launch.
    ///
    /// # Safety
    /// Until the launch has run nothing writes what it reads, and nothing uses what it writes.
    pub unsafe fn launch(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        let Self { rank, width, place, .. } = *self;
        for (what, size) in [("store_basis rank", rank), ("store_basis width", width)] {
            check_operand(what, size.into(), 1..=u64::from(u16::MAX))?;
            check_multiple(what, size.into(), WORD_ELEMENTS as u64)?;
        }
        let words = rank as usize * width as usize / WORD_ELEMENTS;
        check_length("store_basis vectors", words * WORD_ELEMENTS, self.vectors.len())?;
        check_range("store_basis rows", 0, words, self.rows.len())?;
        check_range("store_basis bases", place as usize * words, words, self.bases.len())?;
        let arguments: [Argument; 6] = [
            self.vectors.into(),
            rank.into(),
            width.into(),
            self.rows.into(),
            place.into(),
            self.bases.into(),
        ];
        let shape = LaunchShape::linear(store_basis::grid(words as u32), store_basis::BLOCK);
        // SAFETY: order and types are the kernel's; the caller answers for who else uses the buffers.
        unsafe { launch_with(&kernels.low_rank.store_basis, &shape, stream, arguments) }
    }
}
