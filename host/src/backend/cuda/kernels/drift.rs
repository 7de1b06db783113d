use spinkv_kernels::abi::{Entry, drift};

use super::super::driver::{
    Argument, DeviceBuffer, LaunchShape, Result, Stream, check_length, check_operand, launch_with,
};
use super::{Kernels, SelectPartitions};

/// A launch of `drift`: selections for measurements, in the place of those of [`SelectPartitions`].
#[derive(Clone, Copy, Debug)]
pub struct Drift<'a> {
    /// `[batch]`.
    pub entries: &'a DeviceBuffer<Entry>,
    /// Row of KV head 0: layer * `kv_heads`.
    pub first_row: u32,
    /// KV heads.
    pub kv_heads: u32,
    /// How fast they change: [`DriftRow::pace`](drift::DriftRow::pace).
    pub pace: u32,
    /// Ids that a row has room for.
    pub capacity: u32,
    /// `[batch * kv_heads, capacity]`: ascending.
    pub ids: &'a DeviceBuffer<u32>,
    /// `[batch * kv_heads]`: how many ids of a row were written.
    pub selected: &'a DeviceBuffer<u32>,
}

impl<'a> Drift<'a> {
    /// In the place of `select`, of layer `layer`.
    pub fn of(select: &SelectPartitions<'a>, layer: u32, pace: u32) -> Self {
        let SelectPartitions { entries, kv_heads, capacity, ids, selected, .. } = *select;
        Self { entries, first_row: layer.saturating_mul(kv_heads), kv_heads, pace, capacity, ids, selected }
    }

    /// Async: the ids are there when `stream` has come this far. An empty batch launches nothing.
    ///
    /// # Errors
    /// [`Operand`](super::super::driver::DriverError::Operand) for a size of 0 or too many rows, [`Length`](super::super::driver::DriverError::Length) for
    /// lists of other rows, or a failed launch.
    ///
    /// # Safety
    /// Until it has run nothing writes the entries, and nothing uses ids and counts.
    pub unsafe fn launch(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        let Self { entries, first_row, kv_heads, pace, capacity, ids, selected } = *self;
        check_operand("drift kv_heads", kv_heads.into(), 1..=u32::MAX.into())?;
        check_operand("drift capacity", capacity.into(), 1..=u32::MAX.into())?;
        let rows = entries.len() as u64 * u64::from(kv_heads);
        check_operand("drift batch * kv_heads", rows, 0..=i32::MAX as u64)?;
        check_operand(
            "drift first_row + kv_heads",
            u64::from(first_row) + u64::from(kv_heads),
            1..=u32::MAX.into(),
        )?;
        let rows = rows as usize;
        check_length("drift selected", rows, selected.len())?;
        check_length("drift ids", rows.saturating_mul(capacity as usize), ids.len())?;
        if rows == 0 {
            return Ok(());
        }
        let arguments: [Argument; 7] = [
            entries.into(),
            first_row.into(),
            kv_heads.into(),
            pace.into(),
            capacity.into(),
            ids.into(),
            selected.into(),
        ];
        // SAFETY: order and types are the kernel's, whose lists have its rows; the caller answers for who else uses them.
        unsafe {
            launch_with(&kernels.drift, &LaunchShape::linear(rows as u32, drift::BLOCK), stream, arguments)
        }
    }
}
