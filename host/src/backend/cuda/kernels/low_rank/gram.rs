use spinkv_kernels::abi::WORD_ELEMENTS;
use spinkv_kernels::abi::low_rank::gram;

use super::super::super::driver::{
    Argument, DeviceBuffer, LaunchShape, Result, Stream, check_length, check_multiple, check_operand,
    check_range, launch_with,
};
use super::super::Kernels;
use crate::memory::Word;

/// Launches of `gram` and `gram_sum`: the Gram matrix of a layer's keys, `K^T K`.
#[derive(Clone, Copy, Debug)]
pub struct Gram<'a> {
    /// `[tokens, width / 8]` bf16 or more.
    pub keys: &'a DeviceBuffer<Word>,
    /// Tokens.
    pub tokens: u32,
    /// KV heads times head dimension: a multiple of 8.
    pub width: u32,
    /// [`sums`](Self::sums): scratch.
    pub sums: &'a DeviceBuffer<f32>,
    /// `[width, width]`: written.
    pub gram: &'a DeviceBuffer<f32>,
}

impl Gram<'_> {
    /// Into how many shares the tokens are parted: two blocks a multiprocessor, whatever the number of tokens, so that the order of sums does
    /// not depend on it but through the shares' ends.
    fn shares(kernels: &Kernels, width: u32) -> u32 {
        (2 * kernels.multiprocessors / gram::tiles(width)).clamp(1, gram::MAX_SHARES)
    }

    /// Length of [`sums`](Self::sums) for keys of `width` elements.
    pub fn sums(kernels: &Kernels, width: u32) -> usize {
        4 * gram::sum_words(width, Self::shares(kernels, width)) as usize
    }

    /// Async: the matrix is there when `stream` has come this far; of no token it is zero.
    ///
    /// # Errors
    /// [`Operand`](super::super::super::driver::DriverError::Operand) for a width of 0, or keys or sums beyond 32 bits of words,
    /// [`Multiple`](super::super::super::driver::DriverError::Multiple) for one that is no multiple of 8,
    /// [`Length`](super::super::super::driver::DriverError::Length) and
    /// [`OutOfRange`](super::super::super::driver::DriverError::OutOfRange) for a buffer that does not fit, or a failed launch.
    ///
    /// # Safety
    /// Until the launches have run nothing writes the keys, and nothing uses sums and matrix.
    pub unsafe fn launch(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        let Self { tokens, width, .. } = *self;
        let most = u64::from(u32::MAX);
        // Elements of the matrix are counted in 32 bits.
        check_operand("gram width", width.into(), 1..=u64::from(u16::MAX))?;
        check_multiple("gram width", width.into(), WORD_ELEMENTS as u64)?;
        let (width_words, side) = (width / WORD_ELEMENTS as u32, width as usize);
        let words = u64::from(tokens) * u64::from(width_words);
        check_operand("gram words of keys", words, 0..=most)?;
        let shares = Self::shares(kernels, width);
        check_operand("gram words of sums", gram::sum_words(width, shares), 1..=most / 4)?;
        check_range("gram keys", 0, words as usize, self.keys.len())?;
        check_range("gram sums", 0, Self::sums(kernels, width), self.sums.len())?;
        check_length("gram matrix", side * side, self.gram.len())?;
        let arguments: [Argument; 5] =
            [self.keys.into(), tokens.into(), width_words.into(), shares.into(), self.sums.into()];
        let shape = LaunchShape::linear(shares * gram::tiles(width), gram::BLOCK)
            .with_shared_bytes(gram::SHARED_BYTES);
        // SAFETY: order and types are the kernel's; the caller answers for who else uses the buffers.
        unsafe { launch_with(&kernels.low_rank.gram, &shape, stream, arguments)? };
        let arguments: [Argument; 4] = [self.sums.into(), width.into(), shares.into(), self.gram.into()];
        let words = gram::tiles(width) * gram::TILE_SUMS;
        let shape = LaunchShape::linear(words / gram::SUM_BLOCK, gram::SUM_BLOCK);
        // SAFETY: as above.
        unsafe { launch_with(&kernels.low_rank.gram_sum, &shape, stream, arguments) }
    }
}
