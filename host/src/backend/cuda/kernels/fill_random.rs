use spinkv_kernels::abi::fill_random;

use super::super::driver::{
    Argument, DeviceBuffer, LaunchShape, Result, Stream, check_operand, check_positive, launch_with,
};
use super::Kernels;
use crate::memory::Word;

/// A launch of `fill_random`: bf16 numbers of a nearly normal distribution around 0.
#[derive(Clone, Copy, Debug)]
pub struct FillRandom<'a> {
    /// 8 numbers a word.
    pub out: &'a DeviceBuffer<Word>,
    /// The numbers depend on it and their place alone.
    pub seed: u64,
    /// Their standard deviation. None is beyond 3.47 of it.
    pub deviation: f32,
}

impl FillRandom<'_> {
    /// Async: the numbers are there when `stream` has come this far. A buffer without words launches nothing.
    ///
    /// # Errors
    /// [`Operand`](super::super::driver::DriverError::Operand) for more than 2^32 - 1 words,
    /// [`Positive`](super::super::driver::DriverError::Positive) for a deviation that is not above 0 and finite, or a failed launch.
    pub fn launch(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        // Enough that a block waits while others work.
        const BLOCKS_A_PROCESSOR: u32 = 8;
        check_operand("fill_random words", self.out.len() as u64, 0..=u32::MAX.into())?;
        check_positive("fill_random deviation", self.deviation)?;
        let words = self.out.len() as u32;
        if words == 0 {
            return Ok(());
        }
        let blocks =
            words.div_ceil(fill_random::BLOCK).min(BLOCKS_A_PROCESSOR * kernels.multiprocessors.max(1));
        let arguments: [Argument; 5] = [
            self.out.into(),
            words.into(),
            (self.seed as u32).into(),
            ((self.seed >> 32) as u32).into(),
            fill_random::scale(self.deviation.into()).into(),
        ];
        // SAFETY: order and types are the kernel's, which writes `words` words of the buffer, as many as it has.
        unsafe {
            launch_with(
                &kernels.fill_random,
                &LaunchShape::linear(blocks, fill_random::BLOCK),
                stream,
                arguments,
            )
        }
    }
}
