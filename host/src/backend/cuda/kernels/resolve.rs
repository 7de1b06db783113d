use spinkv_kernels::abi::{ENTRY_WORDS, Entry, MAX_SLOTS, PageCopy, resolve};

use super::super::driver::{
    Argument, DeviceBuffer, DriverError, LaunchShape, Result, Stream, check_length, check_multiple,
    check_operand, launch_with,
};
use super::Kernels;

/// The KV tables of all requests in GPU memory. Where those of a request begin is in its [`Entry`].
#[derive(Clone, Copy, Debug)]
pub struct KvTables<'a> {
    /// Segment numbers of each 512 page keys.
    pub directories: &'a DeviceBuffer<u32>,
    /// `[segments, request_rows, 512]`: the slot of each page key.
    pub segments: &'a DeviceBuffer<u16>,
    /// Page key of each slot.
    pub owners: &'a DeviceBuffer<u32>,
    /// Physical page of each slot.
    pub physical: &'a DeviceBuffer<u32>,
    /// Bytes of the slots, four a number.
    pub states: &'a DeviceBuffer<u32>,
    /// Physical pages of the steady zone.
    pub steady: &'a DeviceBuffer<u32>,
    /// Slabs of the host pages.
    pub host_slabs: &'a DeviceBuffer<u32>,
    /// Bits of the host pages that are complete.
    pub host_valid: &'a DeviceBuffer<u32>,
    /// Rows of a request: layers x KV heads.
    pub request_rows: u32,
}

/// How a selection's partitions lie on pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PartitionPages {
    /// A partition is so many pages.
    Pages(u32),
    /// So many partitions, neighbours, share a page.
    Shared(u32),
}

/// A launch of `resolve`: the pages of each row's selection, and what to copy, one layer of a decode step.
#[derive(Clone, Copy, Debug)]
pub struct Resolve<'a> {
    /// `[batch]`.
    pub entries: &'a DeviceBuffer<Entry>,
    /// KV heads of the layer.
    pub kv_heads: u32,
    /// The layer.
    pub layer: u32,
    /// `[batch * kv_heads, id stride]`: selected partitions, ascending.
    pub ids: &'a DeviceBuffer<u32>,
    /// `[batch * kv_heads]`: how many.
    pub id_counts: &'a DeviceBuffer<u32>,
    /// What they are.
    pub partitions: PartitionPages,
    /// The tables.
    pub tables: KvTables<'a>,
    /// The most slots of a row: at least every entry's `slots`.
    pub slot_capacity: u32,
    /// The most segments of a directory.
    pub segment_capacity: u32,
    /// `[batch * kv_heads, list capacity]`: physical pages of the selections, in their order.
    pub pages: &'a DeviceBuffer<u32>,
    /// Whether the misses are listed behind the pages that are here, for an [`Attend`](super::Attend) that begins with these.
    pub misses_last: bool,
    /// `[batch * kv_heads]`.
    pub page_counts: &'a DeviceBuffer<u32>,
    /// `[batch * kv_heads, list capacity]`: the misses.
    pub copies: &'a DeviceBuffer<PageCopy>,
    /// `[batch * kv_heads, list capacity]`: the misses' page keys, for a [`RebuildKeys`](super::RebuildKeys).
    pub copy_keys: Option<&'a DeviceBuffer<u32>>,
    /// `[batch * kv_heads]`.
    pub copy_counts: &'a DeviceBuffer<u32>,
    /// `[batch * kv_heads]`: set to 0, for [`Gather`](super::Gather) to count in.
    pub arrived: &'a DeviceBuffer<u32>,
    /// `[batch * kv_heads]`: why a row was left out; see [`resolve`](mod@resolve).
    pub faults: &'a DeviceBuffer<u32>,
}

impl Resolve<'_> {
    /// Whether rows of up to `slots` slots, directories of up to `segments` segments and lists of up to `list` pages fit a block of this
    /// device.
    ///
    /// # Errors
    /// [`SharedMemory`](DriverError::SharedMemory).
    pub fn check_capacity(kernels: &Kernels, slots: u32, segments: u32, list: u32) -> Result<()> {
        let (wanted, limit) = (resolve::shared_bytes(slots, segments, list), kernels.resolve.shared_limit());
        if wanted > limit {
            return Err(DriverError::SharedMemory { function: "resolve".to_owned(), wanted, limit });
        }
        Ok(())
    }

    /// Async: tables and lists are those after the step when `stream` has come this far.
    ///
    /// # Errors
    /// [`Operand`](super::super::driver::DriverError::Operand) for a size of 0, a layer that requests have not, or a capacity beyond
    /// [`MAX_LIST`](resolve::MAX_LIST) or [`MAX_SLOTS`], [`Multiple`](super::super::driver::DriverError::Multiple) for slots that are no
    /// multiple of 4,
    /// [`Length`](super::super::driver::DriverError::Length) for lists whose lengths do not fit the batch,
    /// [`SharedMemory`](super::super::driver::DriverError::SharedMemory) for capacities that a block cannot hold, or a failed launch.
    ///
    /// # Safety
    /// When the launch runs, entries, ids and tables are as the kernel's contract says, and nothing else uses tables or lists until it
    /// has run. A launch directly ahead of it that lets it go before its own end may write ids, how many they are, and host tables, and nothing else of what it reads.
    pub unsafe fn launch(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        let Self { kv_heads, layer, slot_capacity, segment_capacity, tables, .. } = *self;
        let any = 1..=u64::from(u32::MAX);
        check_operand("resolve entries", self.entries.len() as u64, any.clone())?;
        check_operand("resolve kv_heads", kv_heads.into(), any.clone())?;
        let layers = tables.request_rows / kv_heads;
        check_operand("resolve layers", layers.into(), any.clone())?;
        check_operand("resolve layer", layer.into(), 0..=u64::from(layers - 1))?;
        let rows = self.entries.len() * kv_heads as usize;
        check_operand("resolve rows", rows as u64, 1..=0x7fff_ffff)?;
        let (id_stride, list_capacity) = (self.ids.len() / rows, self.pages.len() / rows);
        check_operand("resolve ids of a row", id_stride as u64, any.clone())?;
        check_operand("resolve pages of a row", list_capacity as u64, 1..=resolve::MAX_LIST.into())?;
        check_operand("resolve ids", (rows * id_stride) as u64, any.clone())?;
        check_operand("resolve slot_capacity", slot_capacity.into(), 1..=u64::from(MAX_SLOTS / 4 * 4))?;
        check_multiple("resolve slot_capacity", slot_capacity.into(), 4)?;
        check_operand("resolve segment_capacity", segment_capacity.into(), 1..=MAX_SEGMENTS)?;
        for (what, expected, found) in [
            ("resolve ids", rows * id_stride, self.ids.len()),
            ("resolve id_counts", rows, self.id_counts.len()),
            ("resolve pages", rows * list_capacity, self.pages.len()),
            ("resolve page_counts", rows, self.page_counts.len()),
            ("resolve copies", rows * list_capacity, self.copies.len()),
            ("resolve copy_counts", rows, self.copy_counts.len()),
            ("resolve arrived", rows, self.arrived.len()),
            ("resolve faults", rows, self.faults.len()),
            ("resolve physical", tables.owners.len(), tables.physical.len()),
            ("resolve host_valid", tables.host_slabs.len(), tables.host_valid.len()),
            ("resolve states", tables.owners.len() / 4, tables.states.len()),
        ] {
            check_length(what, expected, found)?;
        }
        if let Some(copy_keys) = self.copy_keys {
            check_length("resolve copy_keys", rows * list_capacity, copy_keys.len())?;
        }
        let (page_partitions, partition_pages) = match self.partitions {
            PartitionPages::Pages(pages) => (1, pages),
            PartitionPages::Shared(partitions) => (partitions, 1),
        };
        check_operand("resolve partitions", u64::from(page_partitions.min(partition_pages)), any)?;
        let arguments: [Argument; 29] = [
            self.entries.into(),
            kv_heads.into(),
            layer.into(),
            tables.request_rows.into(),
            self.ids.into(),
            self.id_counts.into(),
            (id_stride as u32).into(),
            page_partitions.into(),
            partition_pages.into(),
            tables.directories.into(),
            tables.segments.into(),
            tables.owners.into(),
            tables.physical.into(),
            tables.states.into(),
            tables.steady.into(),
            tables.host_slabs.into(),
            tables.host_valid.into(),
            slot_capacity.into(),
            segment_capacity.into(),
            (list_capacity as u32).into(),
            self.pages.into(),
            u32::from(self.misses_last).into(),
            self.page_counts.into(),
            self.copies.into(),
            // Without them it is not touched.
            self.copy_keys.unwrap_or(self.copy_counts).into(),
            u32::from(self.copy_keys.is_some()).into(),
            self.copy_counts.into(),
            self.arrived.into(),
            self.faults.into(),
        ];
        let shape = LaunchShape::linear(rows as u32, resolve::BLOCK)
            .with_shared_bytes(resolve::shared_bytes(slot_capacity, segment_capacity, list_capacity as u32))
            .overlapping();
        // SAFETY: order and types are the kernel's; the caller answers for entries, ids and tables.
        unsafe { launch_with(&kernels.resolve, &shape, stream, arguments) }
    }
}

/// Directories of page keys of 24 bits: more than a row has.
const MAX_SEGMENTS: u64 = 1 << 15;

const _: () = assert!(size_of::<Entry>() == 16 * ENTRY_WORDS, "an entry is whole words");
