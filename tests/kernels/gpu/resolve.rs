//! `resolve` against the CPU's cache, step after step.

use spinkv::backend::cuda::driver::{DeviceBuffer, DriverError, Stream};
use spinkv::backend::cuda::kernels::{KvTables, PartitionPages, Resolve};
use spinkv_kernel_tests::resolve::{Lists, ResolveCase, ResolveStep, Tables};

use super::{Machine, Outcome, Test, test};

pub fn tests() -> Vec<Test> {
    vec![
        test("resolve::random_batches", |machine| {
            machine.on_seeds(|seed| resolve(machine, &ResolveCase::random(seed)))
        }),
        test("resolve::while_the_clock_goes_round", |machine| {
            resolve(machine, &ResolveCase::long(machine.seed))
        }),
        test("resolve::large_batch", |machine| resolve(machine, &ResolveCase::large(machine.seed))),
    ]
}

fn resolve(machine: &Machine, case: &ResolveCase) -> Outcome {
    let Machine { stream, .. } = machine;
    let mut tables = DeviceTables::new(stream, &case.tables)?;
    for (number, step) in case.steps.iter().enumerate() {
        if let Some(edited) = &step.tables {
            tables = DeviceTables::new(stream, edited)?;
        }
        let lists = resolve_step(machine, case, number, step, &tables)?;
        case.check(number, &tables.to_host(stream)?, &lists)?;
    }
    Ok(())
}

fn resolve_step(
    machine: &Machine,
    case: &ResolveCase,
    number: usize,
    step: &ResolveStep,
    tables: &DeviceTables,
) -> Result<Lists, Box<dyn std::error::Error>> {
    let Machine { stream, kernels, .. } = machine;
    let poisoned = case.poisoned(number);
    let pages = DeviceBuffer::from_slice(stream, &poisoned.pages)?;
    let page_counts = DeviceBuffer::from_slice(stream, &poisoned.page_counts)?;
    let copies = DeviceBuffer::from_slice(stream, &poisoned.copies)?;
    let copy_keys = DeviceBuffer::from_slice(stream, &poisoned.copy_keys)?;
    let copy_counts = DeviceBuffer::from_slice(stream, &poisoned.copy_counts)?;
    let arrived = DeviceBuffer::from_slice(stream, &poisoned.arrived)?;
    let faults = DeviceBuffer::from_slice(stream, &poisoned.faults)?;
    let launch = Resolve {
        entries: &DeviceBuffer::from_slice(stream, &step.entries)?,
        kv_heads: case.kv_heads,
        layer: step.layer,
        ids: &DeviceBuffer::from_slice(stream, &step.ids)?,
        id_counts: &DeviceBuffer::from_slice(stream, &step.id_counts)?,
        partitions: if case.page_partitions > 1 {
            PartitionPages::Shared(case.page_partitions)
        } else {
            PartitionPages::Pages(case.partition_pages)
        },
        tables: tables.of(case.request_rows),
        slot_capacity: case.slot_capacity,
        segment_capacity: case.segment_capacity,
        pages: &pages,
        misses_last: ResolveCase::misses_last(number),
        page_counts: &page_counts,
        copies: &copies,
        copy_keys: ResolveCase::keyed(number).then_some(&copy_keys),
        copy_counts: &copy_counts,
        arrived: &arrived,
        faults: &faults,
    };
    // SAFETY: the case's ids, entries and tables agree; nothing else uses the buffers.
    unsafe { launch.launch(kernels, stream)? };
    Ok(Lists {
        pages: pages.to_vec(stream)?,
        page_counts: page_counts.to_vec(stream)?,
        copies: copies.to_vec(stream)?,
        copy_keys: copy_keys.to_vec(stream)?,
        copy_counts: copy_counts.to_vec(stream)?,
        arrived: arrived.to_vec(stream)?,
        faults: faults.to_vec(stream)?,
    })
}

/// The tables of a case in GPU memory.
struct DeviceTables {
    directories: DeviceBuffer<u32>,
    segments: DeviceBuffer<u16>,
    owners: DeviceBuffer<u32>,
    physical: DeviceBuffer<u32>,
    states: DeviceBuffer<u32>,
    steady: DeviceBuffer<u32>,
    host_slabs: DeviceBuffer<u32>,
    host_valid: DeviceBuffer<u32>,
}

impl DeviceTables {
    fn new(stream: &Stream, tables: &Tables) -> Result<Self, DriverError> {
        Ok(Self {
            directories: DeviceBuffer::from_slice(stream, &tables.directories)?,
            segments: DeviceBuffer::from_slice(stream, &tables.segments)?,
            owners: DeviceBuffer::from_slice(stream, &tables.owners)?,
            physical: DeviceBuffer::from_slice(stream, &tables.physical)?,
            states: DeviceBuffer::from_slice(stream, &tables.states)?,
            // A zone may have no page at all.
            steady: DeviceBuffer::from_slice(stream, &[tables.steady.as_slice(), &[u32::MAX]].concat())?,
            host_slabs: DeviceBuffer::from_slice(stream, &tables.host_slabs)?,
            host_valid: DeviceBuffer::from_slice(stream, &tables.host_valid)?,
        })
    }

    fn of(&self, request_rows: u32) -> KvTables<'_> {
        KvTables {
            directories: &self.directories,
            segments: &self.segments,
            owners: &self.owners,
            physical: &self.physical,
            states: &self.states,
            steady: &self.steady,
            host_slabs: &self.host_slabs,
            host_valid: &self.host_valid,
            request_rows,
        }
    }

    fn to_host(&self, stream: &Stream) -> Result<Tables, DriverError> {
        let mut steady = self.steady.to_vec(stream)?;
        steady.pop();
        Ok(Tables {
            directories: self.directories.to_vec(stream)?,
            segments: self.segments.to_vec(stream)?,
            owners: self.owners.to_vec(stream)?,
            physical: self.physical.to_vec(stream)?,
            states: self.states.to_vec(stream)?,
            steady,
            host_slabs: self.host_slabs.to_vec(stream)?,
            host_valid: self.host_valid.to_vec(stream)?,
        })
    }
}
