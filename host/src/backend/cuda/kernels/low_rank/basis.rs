use super::super::super::driver::{DeviceBuffer, Result, Stream, check_length, check_operand};
use super::super::Kernels;
use super::{CompleteBasis, Gram, InverseFactor, RowProduct, SmallPivots, StoreBasis, Weights, check_rank};
use crate::backend::cpu::low_rank::{ITERATIONS, start};
use crate::memory::Word;

/// What [`LowRankBasis`] works in; layers that follow each other share it.
#[derive(Debug)]
pub struct BasisScratch {
    rank: u32,
    width: u32,
    /// `[rank, width]`: where each iteration begins.
    start: DeviceBuffer<f32>,
    /// `[rank, width]`.
    vectors: DeviceBuffer<f32>,
    /// `[rank, width]`.
    images: DeviceBuffer<f32>,
    /// `[rank, rank]`.
    products: DeviceBuffer<f32>,
    /// `[rank, rank]`.
    factor: DeviceBuffer<f32>,
    /// Those of [`Gram`].
    sums: DeviceBuffer<f32>,
    /// `[width, width]`.
    gram: DeviceBuffer<f32>,
}

impl BasisScratch {
    /// Room for bases of `rank` vectors of `width` elements.
    ///
    /// # Errors
    /// [`Operand`](super::super::super::driver::DriverError::Operand) and
    /// [`Multiple`](super::super::super::driver::DriverError::Multiple) for a rank that kernels do not take or that is above the width, or
    /// a failed allocation.
    pub fn new(kernels: &Kernels, stream: &Stream, rank: u32, width: u32) -> Result<Self> {
        check_rank("low-rank basis rank", rank)?;
        check_operand("low-rank basis width", width.into(), u64::from(rank)..=u64::from(u16::MAX))?;
        let [many, few] = [rank * width, rank * rank].map(|len| len as usize);
        let buffer = |len: usize| DeviceBuffer::uninit(stream.context(), len);
        Ok(Self {
            rank,
            width,
            start: DeviceBuffer::from_slice(stream, &start(rank as usize, width as usize))?,
            vectors: buffer(many)?,
            images: buffer(many)?,
            products: buffer(few)?,
            factor: buffer(few)?,
            sums: buffer(Gram::sums(kernels, width))?,
            gram: buffer(width as usize * width as usize)?,
        })
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> u64 {
        let of =
            [&self.start, &self.vectors, &self.images, &self.products, &self.factor, &self.sums, &self.gram];
        of.iter().map(|buffer| buffer.bytes()).sum()
    }
}

/// The launches that find a layer's basis: those of [`Gram`], an iteration's of [`RowProduct`] and [`InverseFactor`], [`CompleteBasis`] and [`StoreBasis`].
#[derive(Clone, Copy, Debug)]
pub struct LowRankBasis<'a> {
    /// `[tokens, width / 8]` bf16 or more: keys before their rotary embedding, of all heads.
    pub keys: &'a DeviceBuffer<Word>,
    /// Tokens.
    pub tokens: u32,
    /// Of rank and width.
    pub scratch: &'a BasisScratch,
    /// `[rank, width / 8]` or more: the weights that give keys their coefficients.
    pub rows: &'a DeviceBuffer<Word>,
    /// Where it goes among the bases.
    pub place: u32,
    /// `[bases, width, rank / 8]`.
    pub bases: &'a DeviceBuffer<Word>,
}

impl LowRankBasis<'_> {
    /// Async: the basis is there, in both layouts, when `stream` has come this far. The same keys give the same bits on the same device.
    ///
    /// # Errors
    /// Those of the launches.
    ///
    /// # Safety
    /// Until all launches have run nothing writes the keys, and nothing uses the scratch and what they write.
    pub unsafe fn launch(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        let BasisScratch { rank, width, start, vectors, images, products, factor, sums, gram } = self.scratch;
        let (rank, width) = (*rank, *width);
        check_length("low-rank basis start", (rank * width) as usize, start.len())?;
        // SAFETY: the caller's word; launches on one stream follow each other.
        unsafe {
            Gram { keys: self.keys, tokens: self.tokens, width, sums, gram }.launch(kernels, stream)?;
            let image = |from| RowProduct {
                a: from,
                b: gram,
                weights: Weights::Dots,
                rows: rank,
                columns: width,
                inner: width,
                out: images,
            };
            let orthogonalise = |from, small, out| -> Result<()> {
                let (rows, columns) = (rank, rank);
                let weights = Weights::Dots;
                RowProduct { a: from, b: from, weights, rows, columns, inner: width, out: products }
                    .launch(kernels, stream)?;
                InverseFactor { products, rank, small, factor }.launch(kernels, stream)?;
                let weights = Weights::Sums;
                RowProduct { a: factor, b: from, weights, rows, columns: width, inner: rank, out }
                    .launch(kernels, stream)
            };
            for iteration in 0..ITERATIONS {
                image(if iteration == 0 { start } else { vectors }).launch(kernels, stream)?;
                orthogonalise(images, SmallPivots::Raised, vectors)?;
            }
            orthogonalise(vectors, SmallPivots::Dropped, images)?;
            orthogonalise(images, SmallPivots::Dropped, vectors)?;
            CompleteBasis { vectors, rank, width }.launch(kernels, stream)?;
            let Self { rows, place, bases, .. } = *self;
            StoreBasis { vectors, rank, width, rows, place, bases }.launch(kernels, stream)
        }
    }
}
