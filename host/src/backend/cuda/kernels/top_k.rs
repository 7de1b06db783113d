use spinkv_kernels::abi::select;

use super::super::driver::{
    Argument, DeviceBuffer, LaunchShape, Result, Stream, check_length, check_multiple, check_operand,
    check_range, launch_with,
};
use super::Kernels;
use crate::memory::Word;

/// A launch of `top_k`: the greatest scores of each row.
#[derive(Clone, Copy, Debug)]
pub struct TopK<'a> {
    /// `[rows, stride]`.
    pub scores: &'a DeviceBuffer<f32>,
    /// `[rows]`: scores of a row.
    pub counts: &'a DeviceBuffer<u32>,
    /// `[rows]`: how many are wanted.
    pub k: &'a DeviceBuffer<u32>,
    /// A multiple of 4.
    pub stride: u32,
    /// Scores to have room for in shared memory, a multiple of 4; of longer rows the keys are kept in `keys`. Usually
    /// [`Kernels::resident`] of the stride.
    pub resident: u32,
    /// `[rows, stride]` u32 if `resident` is below `stride`, else of any length.
    pub keys: &'a DeviceBuffer<Word>,
    /// Ids that a row has room for.
    pub capacity: u32,
    /// `[rows, capacity]`: ascending.
    pub ids: &'a DeviceBuffer<u32>,
    /// `[rows]`: how many ids of a row were written.
    pub selected: &'a DeviceBuffer<u32>,
}

impl TopK<'_> {
    /// Async: the ids are there when `stream` has come this far. No rows launch nothing.
    ///
    /// # Errors
    /// [`Length`](super::super::driver::DriverError::Length) if `counts`, `k` and `selected` disagree about the rows,
    /// [`Operand`](super::super::driver::DriverError::Operand) for a stride or a resident part that is no multiple of 4 or beyond its
    /// limit, [`OutOfRange`](super::super::driver::DriverError::OutOfRange) for a buffer that is too short, or a failed launch.
    ///
    /// # Safety
    /// When the launch runs, no count is above `stride`; until it has run nothing writes what it reads, and nothing uses what it
    /// writes.
    pub unsafe fn launch(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        let Self { stride, resident, capacity, .. } = *self;
        let rows = self.counts.len();
        check_length("top_k k", rows, self.k.len())?;
        check_length("top_k selected", rows, self.selected.len())?;
        check_operand("top_k rows", rows as u64, 0..=i32::MAX as u64)?;
        check_row([("top_k stride", stride), ("top_k resident", resident)])?;
        check_range("top_k scores", 0, rows * stride as usize, self.scores.len())?;
        check_range("top_k ids", 0, rows * capacity as usize, self.ids.len())?;
        let keys = if resident < stride { rows * stride as usize / 4 } else { 0 };
        check_range("top_k keys", 0, keys, self.keys.len())?;
        if rows == 0 {
            return Ok(());
        }
        let arguments: [Argument; 9] = [
            self.scores.into(),
            self.counts.into(),
            self.k.into(),
            stride.into(),
            resident.into(),
            self.keys.into(),
            capacity.into(),
            self.ids.into(),
            self.selected.into(),
        ];
        let shape = LaunchShape::linear(rows as u32, kernels.select_block(rows, stride, resident))
            .with_shared_bytes(select::shared_bytes(resident));
        // SAFETY: order and types are the kernel's; the caller answers for the counts.
        unsafe { launch_with(&kernels.top_k, &shape, stream, arguments) }
    }
}

/// Refuses rows that the kernels of a block a row cannot cut into words, or keep. The names are those of the two numbers.
pub(super) fn check_row([stride, resident]: [(&'static str, u32); 2]) -> Result<()> {
    // Threads step beyond a row's end before they look.
    check_operand(stride.0, stride.1.into(), 1..=u64::from(u32::MAX / 8))?;
    check_multiple(stride.0, stride.1.into(), 4)?;
    check_operand(resident.0, resident.1.into(), 0..=select::MAX_RESIDENT.into())?;
    check_multiple(resident.0, resident.1.into(), 4)
}
