//! Clustering against its CPU reference, stage by stage; the host's pages are pinned memory.

use spinkv::backend::cuda::driver::{DeviceBuffer, PinnedArena};
use spinkv::backend::cuda::kernels::{ClusterPages, ClusterRun, ClusterScratch, ClusterShape, ClusterTables};
use spinkv::memory::Word;
use spinkv_kernel_tests::cluster::{ClusterCase, Stage, State};
use spinkv_kernels::abi::cluster::ITERATIONS;

use super::{Machine, Outcome, Test, ensure, test};

type Run<T> = Result<T, libtest_mimic::Failed>;

pub fn tests() -> Vec<Test> {
    vec![
        test("cluster::random_shapes", |machine| {
            machine.on_seeds(|seed| stages(machine, &ClusterCase::random(seed)).map(drop))
        }),
        test("cluster::a_long_run", |machine| stages(machine, &ClusterCase::long(machine.seed)).map(drop)),
        test("cluster::a_prompt", |machine| stages(machine, &ClusterCase::large(machine.seed)).map(drop)),
        test("cluster::assign_of_whole_numbers", |machine| {
            machine.on_seeds(|seed| {
                let (case, before) = ClusterCase::whole(seed);
                [Stage::Assign, Stage::AssignAll].into_iter().try_for_each(|stage| {
                    let device = Device::new(machine, &case, &before)?;
                    device.run(machine, &case, &[stage])?;
                    Ok(case.check(stage, &before, &device.state(machine, &case)?, true)?)
                })
            })
        }),
        test("cluster::the_kinds_that_there_are", |machine| {
            machine.on_seeds(|seed| {
                let case = ClusterCase::kinds(seed);
                Ok(case.check_kinds(&stages(machine, &case)?)?)
            })
        }),
        test("cluster::the_same_each_time", |machine| {
            let case = ClusterCase { iterations: ITERATIONS as usize, ..ClusterCase::large(machine.seed) };
            let before = case.state();
            let mut first = None;
            for at_once in [true, false, true] {
                let device = Device::new(machine, &case, &before)?;
                if at_once {
                    device.launch(machine, &case)?;
                } else {
                    device.run(machine, &case, &case.stages())?;
                }
                let state = device.state(machine, &case)?;
                let same = first.as_ref().is_none_or(|first| *first == state);
                ensure(same, format!("another state; all launches at once: {at_once}"))?;
                first = Some(state);
            }
            Ok(())
        }),
    ]
}

/// The state after all stages, each of them checked.
fn stages(machine: &Machine, case: &ClusterCase) -> Run<State> {
    let mut before = case.state();
    let device = Device::new(machine, case, &before)?;
    for stage in case.stages() {
        device.run(machine, case, &[stage])?;
        let after = device.state(machine, case)?;
        case.check(stage, &before, &after, false).map_err(|wrong| format!("{stage:?}: {wrong}"))?;
        before = after;
    }
    Ok(before)
}

/// A case's operands on the GPU.
struct Device {
    keys: DeviceBuffer<Word>,
    values: DeviceBuffer<Word>,
    scratch: ClusterScratch,
    directories: DeviceBuffer<u32>,
    row_pages: DeviceBuffer<u32>,
    partition_tokens: DeviceBuffer<u32>,
    summaries: DeviceBuffer<Word>,
    value_means: DeviceBuffer<Word>,
    host_slabs: DeviceBuffer<u32>,
    host_valid: DeviceBuffer<u32>,
    host_pages: PinnedArena,
}

impl Device {
    fn new(machine: &Machine, case: &ClusterCase, state: &State) -> Run<Self> {
        let stream = &machine.stream;
        let bytes: &[u8] = bytemuck::cast_slice(&state.host_pages);
        let mut host_pages = PinnedArena::reserve(&machine.context, bytes.len(), |_| {})?;
        host_pages.write(0, bytes)?;
        Ok(Self {
            keys: DeviceBuffer::from_slice(stream, &case.keys)?,
            values: DeviceBuffer::from_slice(stream, &case.values)?,
            scratch: ClusterScratch {
                sums: DeviceBuffer::from_slice(stream, &state.sums)?,
                means: DeviceBuffer::from_slice(stream, &state.means)?,
                centroids: DeviceBuffer::from_slice(stream, &state.centroids)?,
                biases: DeviceBuffer::from_slice(stream, &state.biases)?,
                assigned: DeviceBuffer::from_slice(stream, &state.assigned)?,
                sizes: DeviceBuffer::from_slice(stream, &state.sizes)?,
                firsts: DeviceBuffer::from_slice(stream, &state.firsts)?,
                members: DeviceBuffer::from_slice(stream, &state.members)?,
            },
            directories: DeviceBuffer::from_slice(stream, &case.directories)?,
            row_pages: DeviceBuffer::from_slice(stream, &state.row_pages)?,
            partition_tokens: DeviceBuffer::from_slice(stream, &state.partition_tokens)?,
            summaries: DeviceBuffer::from_slice(stream, &state.summaries)?,
            value_means: DeviceBuffer::from_slice(stream, &state.value_means)?,
            host_slabs: DeviceBuffer::from_slice(stream, &case.host_slabs)?,
            host_valid: DeviceBuffer::from_slice(stream, &state.host_valid)?,
            host_pages,
        })
    }

    fn of<'a>(&'a self, case: &ClusterCase) -> ClusterRun<'a> {
        ClusterRun {
            shape: ClusterShape {
                tokens: case.tokens as u32,
                kv_heads: case.kv_heads as u32,
                head_words: case.head_words as u32,
                spans: case.spans as u32,
                span_centroids: case.span_centroids as u32,
            },
            keys: &self.keys,
            values: &self.values,
            first: case.first as u32,
            scratch: &self.scratch,
            tables: ClusterTables {
                page_tokens: case.page_tokens as u32,
                directories: &self.directories,
                directory: case.directory as u32,
                first_row: case.first_row as u32,
                request_rows: case.request_rows as u32,
                segment_partitions: case.segment_partitions as u32,
                capacity: case.capacity as u32,
                row_pages: &self.row_pages,
                first_place: case.first_place as u32,
                partition_tokens: &self.partition_tokens,
                summaries: &self.summaries,
                value_means: &self.value_means,
            },
            pages: ClusterPages {
                host_slabs: &self.host_slabs,
                first_slab: case.first_slab as u32,
                slab_stride: case.slab_stride as u32,
                host_valid: &self.host_valid,
                host_pages: &self.host_pages,
                blocks: case.grid,
            },
        }
    }

    /// All launches.
    fn launch(&self, machine: &Machine, case: &ClusterCase) -> Outcome {
        // SAFETY: the case's tables name places and slabs that exist, each once; nothing else uses the buffers.
        unsafe { self.of(case).launch(&machine.kernels, &machine.stream)? };
        Ok(())
    }

    fn run(&self, machine: &Machine, case: &ClusterCase, stages: &[Stage]) -> Outcome {
        let Machine { kernels, stream, .. } = machine;
        let run = self.of(case);
        for stage in stages {
            // SAFETY: as above, and the stages are in order.
            unsafe {
                match stage {
                    Stage::Sums => run.sums(kernels, stream),
                    Stage::Start => run.start(kernels, stream),
                    Stage::Assign => run.assign(kernels, stream),
                    Stage::Update => run.update(kernels, stream),
                    Stage::AssignAll => run.assign_all(kernels, stream),
                    Stage::Pages => run.pages(kernels, stream),
                    Stage::List => run.list(kernels, stream),
                    Stage::Means => run.means(kernels, stream),
                    Stage::Store => run.store(kernels, stream),
                }?;
            }
        }
        Ok(())
    }

    fn state(&self, machine: &Machine, case: &ClusterCase) -> Run<State> {
        let stream = &machine.stream;
        let mut host_pages = case.state().host_pages;
        let scratch = &self.scratch;
        let state = State {
            sums: scratch.sums.to_vec(stream)?,
            means: scratch.means.to_vec(stream)?,
            centroids: scratch.centroids.to_vec(stream)?,
            biases: scratch.biases.to_vec(stream)?,
            assigned: scratch.assigned.to_vec(stream)?,
            sizes: scratch.sizes.to_vec(stream)?,
            row_pages: self.row_pages.to_vec(stream)?,
            firsts: scratch.firsts.to_vec(stream)?,
            partition_tokens: self.partition_tokens.to_vec(stream)?,
            summaries: self.summaries.to_vec(stream)?,
            value_means: self.value_means.to_vec(stream)?,
            members: scratch.members.to_vec(stream)?,
            host_valid: self.host_valid.to_vec(stream)?,
            host_pages: Vec::new(),
        };
        // Reading the rest has waited for the stream.
        self.host_pages.read(0, bytemuck::cast_slice_mut(&mut host_pages))?;
        Ok(State { host_pages, ..state })
    }
}
