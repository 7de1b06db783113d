use spinkv_kernels::abi::model::sample::{self, SampleParams};
use spinkv_kernels::abi::model::{MAX_WIDTH, QUAD};

use super::super::super::driver::{
    Argument, DeviceBuffer, LaunchShape, Result, Stream, check_multiple, check_operand, check_range,
    launch_with,
};
use super::super::Kernels;
use super::check_blocks;

/// A launch of `sample`: draws a token of each row by its logits.
#[derive(Clone, Copy, Debug)]
pub struct Sample<'a> {
    /// `[batch, stride]` or more.
    pub logits: &'a DeviceBuffer<f32>,
    /// Rows.
    pub batch: u32,
    /// Logits of a row.
    pub vocab: u32,
    /// At least `vocab`, a multiple of 4.
    pub stride: u32,
    /// `[batch]` or more: how, and the draws.
    pub params: &'a DeviceBuffer<SampleParams>,
    /// `[batch]` or more: [`NONE`](spinkv_kernels::abi::model::argmax::NONE) for a row without a finite logit.
    pub ids: &'a DeviceBuffer<u32>,
}

impl Sample<'_> {
    /// Async: the ids are there when `stream` has come this far. An empty batch launches nothing.
    ///
    /// # Errors
    /// [`Operand`](super::super::super::driver::DriverError::Operand) or
    /// [`Multiple`](super::super::super::driver::DriverError::Multiple) for a vocabulary or a stride that the kernel does not take, or too large a
    /// batch, [`OutOfRange`](super::super::super::driver::DriverError::OutOfRange) for a buffer that is too short, or a failed launch.
    ///
    /// # Safety
    /// When the launch runs, each row's parameters are in the ranges of the engine's `SamplingParams` and its draw is below
    /// 2^[`DRAW_BITS`](sample::DRAW_BITS); until it has run nothing writes what it reads, and nothing uses what it writes.
    pub unsafe fn launch(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        let Self { batch, vocab, stride, .. } = *self;
        check_operand("sample stride", stride.into(), 1..=MAX_WIDTH.into())?;
        check_multiple("sample stride", stride.into(), QUAD.into())?;
        check_operand("sample vocab", vocab.into(), 1..=stride.into())?;
        let blocks = check_blocks("sample batch", batch, 1)?;
        let batch = batch as usize;
        check_range("sample logits", 0, batch * stride as usize, self.logits.len())?;
        check_range("sample params", 0, batch, self.params.len())?;
        check_range("sample ids", 0, batch, self.ids.len())?;
        if blocks == 0 {
            return Ok(());
        }
        let arguments: [Argument; 5] =
            [self.logits.into(), vocab.into(), stride.into(), self.params.into(), self.ids.into()];
        let shape = LaunchShape::linear(blocks, sample::BLOCK).with_shared_bytes(sample::SHARED_BYTES);
        // SAFETY: order and types are the kernel's; the caller answers for the parameters.
        unsafe { launch_with(&kernels.model.sample, &shape, stream, arguments) }
    }
}
