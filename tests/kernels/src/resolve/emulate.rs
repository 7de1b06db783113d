use cuda_std::emulator::{Buffer, Launch};
use spinkv_kernels::abi;
use spinkv_kernels::retrieve::resolve;

use super::{Lists, ResolveCase, Tables};
use crate::emulated::words;
use crate::entry_words;

impl ResolveCase {
    /// Runs all steps, each in an order of its own, and calls `check` with the tables and lists after each.
    ///
    /// # Errors
    /// What the emulator found wrong, or `check`.
    pub fn emulate(&self, schedule: u64) -> Result<(), String> {
        let mut tables = DeviceTables::new(&self.tables);
        for (number, step) in self.steps.iter().enumerate() {
            if let Some(edited) = &step.tables {
                tables = DeviceTables::new(edited);
            }
            let poisoned = self.poisoned(number);
            let entries = words(&entry_words(&step.entries));
            let (ids, id_counts) = (Buffer::from_slice(&step.ids), Buffer::from_slice(&step.id_counts));
            let (pages, page_counts) =
                (Buffer::from_slice(&poisoned.pages), Buffer::from_slice(&poisoned.page_counts));
            let (copies, copy_counts) =
                (Buffer::from_slice(&poisoned.copies), Buffer::from_slice(&poisoned.copy_counts));
            let copy_keys = Buffer::from_slice(&poisoned.copy_keys);
            let arrived = Buffer::from_slice(&poisoned.arrived);
            let faults = Buffer::from_slice(&poisoned.faults);
            let shared =
                abi::resolve::shared_bytes(self.slot_capacity, self.segment_capacity, self.list_capacity)
                    as usize;
            let launch = Launch::new(self.rows(number) as u32, abi::resolve::BLOCK).shared(shared);
            let run = launch.seed(schedule + number as u64).run(|| {
                // SAFETY: the emulator checks every access.
                unsafe {
                    resolve(
                        entries.view(),
                        self.kv_heads,
                        step.layer,
                        self.request_rows,
                        ids.view(),
                        id_counts.view(),
                        self.id_stride,
                        self.page_partitions,
                        self.partition_pages,
                        tables.directories.view(),
                        tables.segments.view_mut(),
                        tables.owners.view_mut(),
                        tables.physical.view_mut(),
                        tables.states.view_mut(),
                        tables.steady.view_mut(),
                        tables.host_slabs.view(),
                        tables.host_valid.view(),
                        self.slot_capacity,
                        self.segment_capacity,
                        self.list_capacity,
                        pages.view_mut(),
                        Self::misses_last(number).into(),
                        page_counts.view_mut(),
                        copies.view_mut(),
                        copy_keys.view_mut(),
                        Self::keyed(number).into(),
                        copy_counts.view_mut(),
                        arrived.view_mut(),
                        faults.view_mut(),
                    );
                }
            });
            run.map_err(|fault| format!("step {number}: {fault}"))?;
            let lists = Lists {
                pages: pages.to_vec(),
                page_counts: page_counts.to_vec(),
                copies: copies.to_vec(),
                copy_keys: copy_keys.to_vec(),
                copy_counts: copy_counts.to_vec(),
                arrived: arrived.to_vec(),
                faults: faults.to_vec(),
            };
            self.check(number, &tables.to_host(), &lists)?;
        }
        Ok(())
    }
}

/// The tables of `resolve` in emulated global memory.
struct DeviceTables {
    directories: Buffer<u32>,
    segments: Buffer<u16>,
    owners: Buffer<u32>,
    physical: Buffer<u32>,
    states: Buffer<u32>,
    steady: Buffer<u32>,
    host_slabs: Buffer<u32>,
    host_valid: Buffer<u32>,
}

impl DeviceTables {
    fn new(tables: &Tables) -> Self {
        Self {
            directories: Buffer::from_slice(&tables.directories),
            segments: Buffer::from_slice(&tables.segments),
            owners: Buffer::from_slice(&tables.owners),
            physical: Buffer::from_slice(&tables.physical),
            states: Buffer::from_slice(&tables.states),
            steady: Buffer::from_slice(&tables.steady),
            host_slabs: Buffer::from_slice(&tables.host_slabs),
            host_valid: Buffer::from_slice(&tables.host_valid),
        }
    }

    fn to_host(&self) -> Tables {
        Tables {
            directories: self.directories.to_vec(),
            segments: self.segments.to_vec(),
            owners: self.owners.to_vec(),
            physical: self.physical.to_vec(),
            states: self.states.to_vec(),
            steady: self.steady.to_vec(),
            host_slabs: self.host_slabs.to_vec(),
            host_valid: self.host_valid.to_vec(),
        }
    }
}
