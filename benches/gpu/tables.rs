//! One layer's KV tables in GPU memory, as a step finds them in the middle of generation.

use spinkv::backend::cuda::driver::{DeviceBuffer, Result, Stream};
use spinkv::backend::cuda::kernels::KvTables;
use spinkv_kernels::abi::{ABSENT_SLOT, Entry, NO_KEY, SEGMENT_KEYS, SLAB_PAGES, SLOT_HELD};

use crate::measure::Bench;

/// The clock of all requests.
pub const CLOCK: u32 = 40;

/// A table that a step changes: what it is before, and a copy for each set.
pub struct Restored<T: bytemuck::Pod> {
    pub before: DeviceBuffer<T>,
    sets: Vec<DeviceBuffer<T>>,
}

impl<T: bytemuck::Pod> Restored<T> {
    fn new(bench: &Bench, elements: &[T], sets: usize) -> Result<Self> {
        let before = DeviceBuffer::from_slice(&bench.stream, elements)?;
        let copy = |_| DeviceBuffer::uninit(&bench.context, elements.len());
        Ok(Self { before, sets: (0..sets).map(copy).collect::<Result<_>>()? })
    }

    fn reset(&self, stream: &Stream) -> Result<()> {
        let len = self.before.len();
        self.sets.iter().try_for_each(|set| set.copy_from(stream, 0, &self.before, 0, len))
    }
}

/// Rows that are all alike. A request's segments lie one after another, and so do a row's slabs: page `key` of row `row` is host page
/// `row * keys + key`.
#[derive(Clone, Copy)]
pub struct TableShape {
    pub requests: usize,
    pub kv_heads: usize,
    /// Page keys of a row: whole segments.
    pub keys: usize,
    pub slots: usize,
}

impl TableShape {
    pub fn rows(&self) -> usize {
        self.requests * self.kv_heads
    }

    /// Segments of a request.
    pub fn segments(&self) -> usize {
        self.keys / SEGMENT_KEYS as usize
    }

    /// What an entry says of a request's tables, but for the steady lists.
    pub fn entry(&self, request: usize) -> Entry {
        let (first_row, slabs) = (request * self.kv_heads, self.keys / SLAB_PAGES as usize);
        Entry {
            clock: CLOCK,
            directory: (request * self.segments()) as u32,
            first_slot: (first_row * self.slots) as u32,
            slot_stride: self.slots as u32,
            slots: self.slots as u32,
            first_slab: (first_row * slabs) as u32,
            slab_stride: slabs as u32,
            ..Entry::default()
        }
    }

    /// Where the segments have the slot of a row's page.
    fn segment_place(&self, row: usize, key: usize) -> usize {
        let (request, head) = (row / self.kv_heads, row % self.kv_heads);
        let segment = request * self.segments() + key / SEGMENT_KEYS as usize;
        (segment * self.kv_heads + head) * SEGMENT_KEYS as usize + key % SEGMENT_KEYS as usize
    }
}

/// A page in a slot.
#[derive(Clone, Copy)]
pub struct Held {
    pub key: usize,
    /// Steps since it was used: 1 to 63.
    pub age: u32,
}

/// Tables of which a step changes some; all pages are on the host.
pub struct Tables {
    shape: TableShape,
    pub directories: DeviceBuffer<u32>,
    segments: Restored<u16>,
    pub owners: Restored<u32>,
    pub physical: Restored<u32>,
    states: Restored<u32>,
    steady: Restored<u32>,
    host_slabs: DeviceBuffer<u32>,
    host_valid: DeviceBuffer<u32>,
}

impl Tables {
    /// Tables for `sets` launches between two resets, with empty caches: of all slots the physical pages, `[rows, slots]`, and the
    /// steady lists of all rows.
    pub fn new(
        bench: &Bench,
        shape: TableShape,
        sets: usize,
        physical: &[u32],
        steady: &[u32],
    ) -> Result<Self> {
        let (stream, slots) = (&bench.stream, physical.len());
        let counted = |count: usize| (0..count as u32).collect::<Vec<_>>();
        let slabs = counted(shape.rows() * shape.keys / SLAB_PAGES as usize);
        Ok(Self {
            shape,
            directories: DeviceBuffer::from_slice(stream, &counted(shape.requests * shape.segments()))?,
            segments: Restored::new(bench, &vec![ABSENT_SLOT; shape.rows() * shape.keys], sets)?,
            owners: Restored::new(bench, &vec![NO_KEY; slots], sets)?,
            physical: Restored::new(bench, physical, sets)?,
            states: Restored::new(bench, &vec![0; slots / 4], sets)?,
            steady: Restored::new(bench, steady, sets)?,
            host_slabs: DeviceBuffer::from_slice(stream, &slabs)?,
            host_valid: DeviceBuffer::from_slice(stream, &vec![0xffff; slabs.len()])?,
        })
    }

    /// From the next reset on each row holds other pages: one in each of its slots.
    pub fn hold(&self, stream: &Stream, held: &[Vec<Held>]) -> Result<()> {
        let mut segments = vec![ABSENT_SLOT; self.segments.before.len()];
        for (row, held) in held.iter().enumerate() {
            for (slot, page) in held.iter().enumerate() {
                segments[self.shape.segment_place(row, page.key)] = slot as u16;
            }
        }
        let all = || held.iter().flatten();
        let owners: Vec<u32> = all().map(|page| page.key as u32).collect();
        let states: Vec<u8> = all().map(|page| SLOT_HELD | ((CLOCK + 64 - page.age) % 64) as u8).collect();
        self.segments.before.write(stream, 0, &segments)?;
        self.owners.before.write(stream, 0, &owners)?;
        self.states.before.write(stream, 0, &bytemuck::pod_collect_to_vec::<u8, u32>(&states))
    }

    /// Undoes what steps have changed.
    pub fn reset(&self, stream: &Stream) -> Result<()> {
        self.segments.reset(stream)?;
        for table in [&self.owners, &self.physical, &self.states, &self.steady] {
            table.reset(stream)?;
        }
        Ok(())
    }

    /// Those of a set.
    pub fn of(&self, set: usize) -> KvTables<'_> {
        KvTables {
            directories: &self.directories,
            segments: &self.segments.sets[set],
            owners: &self.owners.sets[set],
            physical: &self.physical.sets[set],
            states: &self.states.sets[set],
            steady: &self.steady.sets[set],
            host_slabs: &self.host_slabs,
            host_valid: &self.host_valid,
            request_rows: self.shape.kv_heads as u32,
        }
    }
}
