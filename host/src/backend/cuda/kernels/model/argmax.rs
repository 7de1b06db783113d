use spinkv_kernels::abi::model::{MAX_WIDTH, QUAD, argmax};

use super::super::super::driver::{
    Argument, DeviceBuffer, LaunchShape, Result, Stream, check_multiple, check_operand, check_range,
    launch_with,
};
use super::super::Kernels;
use super::check_blocks;

/// A launch of `argmax`: the greatest finite logit of each row.
#[derive(Clone, Copy, Debug)]
pub struct Argmax<'a> {
    /// `[batch, stride]` or more.
    pub logits: &'a DeviceBuffer<f32>,
    /// Rows.
    pub batch: u32,
    /// Logits of a row.
    pub vocab: u32,
    /// At least `vocab`, a multiple of 4.
    pub stride: u32,
    /// `[batch]` or more: scratch, 0 before and after.
    pub greatest: &'a DeviceBuffer<u64>,
    /// `[batch]` or more: scratch, 0 before and after.
    pub arrivals: &'a DeviceBuffer<u32>,
    /// `[batch]` or more: of equal logits the lowest id; [`NONE`](argmax::NONE) for a row without a finite one.
    pub ids: &'a DeviceBuffer<u32>,
}

impl Argmax<'_> {
    /// Async: the ids are there when `stream` has come this far. An empty batch launches nothing.
    ///
    /// # Errors
    /// [`Operand`](super::super::super::driver::DriverError::Operand) or
    /// [`Multiple`](super::super::super::driver::DriverError::Multiple) for a vocabulary or a stride that the kernel does not take, or too large a
    /// batch, [`OutOfRange`](super::super::super::driver::DriverError::OutOfRange) for a buffer that is too short, or a failed launch.
    ///
    /// # Safety
    /// When the launch runs, the scratch is 0; until it has run nothing writes what it reads, and nothing uses what it writes.
    pub unsafe fn launch(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        let Self { batch, vocab, stride, .. } = *self;
        check_operand("argmax stride", stride.into(), 1..=MAX_WIDTH.into())?;
        check_multiple("argmax stride", stride.into(), QUAD.into())?;
        check_operand("argmax vocab", vocab.into(), 1..=stride.into())?;
        let blocks = check_blocks("argmax blocks", batch, argmax::parts(vocab))?;
        let batch = batch as usize;
        check_range("argmax logits", 0, batch * stride as usize, self.logits.len())?;
        check_range("argmax greatest", 0, batch, self.greatest.len())?;
        check_range("argmax arrivals", 0, batch, self.arrivals.len())?;
        check_range("argmax ids", 0, batch, self.ids.len())?;
        if blocks == 0 {
            return Ok(());
        }
        let arguments: [Argument; 6] = [
            self.logits.into(),
            vocab.into(),
            stride.into(),
            self.greatest.into(),
            self.arrivals.into(),
            self.ids.into(),
        ];
        let shape = LaunchShape::linear(blocks, argmax::BLOCK).with_shared_bytes(argmax::SHARED_BYTES);
        // SAFETY: order and types are the kernel's; the caller answers for the scratch.
        unsafe { launch_with(&kernels.model.argmax, &shape, stream, arguments) }
    }
}
