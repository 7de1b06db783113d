//! The driver layer on a real driver: copies, order, and the errors that only a driver can give.

use spinkv::Error;
use spinkv::backend::cuda::driver::{
    DeviceBuffer, DriverError, Event, LaunchShape, Module, PinnedArena, PinnedBuffer, Stream, launch_with,
};
use spinkv::memory::{HostArena, HostPage, KvDtype, PageLayout, SLAB_PAGES, Word};

use super::{Machine, Outcome, Test, ensure, test};

pub fn tests() -> Vec<Test> {
    vec![
        test("driver::copies_keep_every_byte", copies_keep_every_byte),
        test("driver::a_host_arena_is_read_from_one_base", a_host_arena_is_read_from_one_base),
        test("driver::events_order_streams_and_measure", events_order_streams_and_measure),
        test("driver::out_of_gpu_memory_is_typed", out_of_gpu_memory_is_typed),
        test("driver::bad_modules_are_refused_with_a_log", bad_modules_are_refused_with_a_log),
        test("driver::bad_launches_are_refused", bad_launches_are_refused),
    ]
}

/// Host, device, arena and pinned buffers, there and back, with odd lengths and offsets.
fn copies_keep_every_byte(machine: &Machine) -> Outcome {
    let Machine { context, stream, .. } = machine;
    let elements: Vec<u32> = (0..100_003u32).map(|i| i.wrapping_mul(0x9e37_79b9)).collect();
    let device = DeviceBuffer::from_slice(stream, &elements)?;
    ensure(device.to_vec(stream)? == elements, "a slice did not come back")?;

    let mut part = vec![0; 777];
    device.read(stream, 1001, &mut part)?;
    ensure(part == elements[1001..1778], "a part did not come back")?;
    device.write(stream, 5, &[1, 2, 3])?;
    ensure(device.to_vec(stream)?[4..9] == [elements[4], 1, 2, 3, elements[8]], "a part was not written")?;

    let other = DeviceBuffer::<u32>::zeroed(stream, elements.len())?;
    other.copy_from(stream, 10, &device, 20, 1000)?;
    let copied = other.to_vec(stream)?;
    ensure(copied[10..1010] == device.to_vec(stream)?[20..1020] && copied[1010] == 0, "device to device")?;
    other.fill_bytes(stream, 0..7, 0xab)?;
    ensure(other.to_vec(stream)?[..8] == [[0xabab_abab; 7].as_slice(), &[0]].concat(), "poison")?;

    let pinned = PinnedBuffer::from_slice(context, &elements[..5000])?;
    let uploaded = DeviceBuffer::<u32>::zeroed(stream, 6000)?;
    let pinned = uploaded.upload(stream, 500, pinned)?.wait()?;
    ensure(uploaded.to_vec(stream)?[500..5500] == pinned[..], "upload")?;

    let mut arena = PinnedArena::reserve(context, 1 << 20, |_| {})?;
    arena.write(4096, bytemuck::cast_slice(&elements[..2048]))?;
    uploaded.copy_from_arena(stream, 100, &arena, 4096, 2048)?;
    ensure(uploaded.to_vec(stream)?[100..2148] == elements[..2048], "arena to device")?;
    Ok(())
}

/// The memory manager's host tier in pinned memory: what it wrote over several extensions, the GPU finds at one base.
fn a_host_arena_is_read_from_one_base(machine: &Machine) -> Outcome {
    let Machine { context, stream, .. } = machine;
    let layout = PageLayout::new(8, 128, KvDtype::Bf16)?;
    let memory = PinnedArena::with_capacity(context, 1 << 30)?;
    let mut arena = HostArena::new(layout, 2, None, memory);
    let mut slabs = Vec::new();
    for (layer, count) in [(0, 1), (0, 1), (1, 900), (0, 2000)] {
        slabs.extend(arena.take(layer, count)?);
    }
    for (number, slab) in slabs.iter().enumerate() {
        for index in 0..SLAB_PAGES {
            let words = vec![(number * SLAB_PAGES + index) as Word; layout.page_words()];
            arena.write(HostPage { slab: *slab, index }, &words);
        }
    }
    let words = arena.memory().len() / size_of::<Word>();
    let device = DeviceBuffer::<Word>::zeroed(stream, words)?;
    device.copy_from_arena(stream, 0, arena.memory(), 0, words)?;
    let (found, mut page) = (device.to_vec(stream)?, vec![0; layout.page_words()]);
    for (number, slab) in slabs.iter().enumerate() {
        for index in 0..SLAB_PAGES {
            let host = HostPage { slab: *slab, index };
            let first = arena.first_word(host);
            arena.read(host, &mut page);
            ensure(page == found[first..first + page.len()], format!("slab {number}, page {index}"))?;
        }
    }
    let refused = arena.take(0, 1 << 14);
    ensure(matches!(refused, Err(Error::OutOfHostMemory { .. })), format!("1 GiB and more: {refused:?}"))
}

fn events_order_streams_and_measure(machine: &Machine) -> Outcome {
    let Machine { context, stream, .. } = machine;
    let (first, second) = (Event::new(context)?, Event::new(context)?);
    let side = Stream::new(context)?;
    let large = DeviceBuffer::<u32>::zeroed(stream, 64 << 20)?;
    let result = DeviceBuffer::<u32>::zeroed(stream, 1)?;
    for round in 1..=20u8 {
        // The side stream must not read before the long fill of the main one is done.
        first.record(stream)?;
        large.fill_bytes(stream, 0..large.len(), round)?;
        second.record(stream)?;
        side.wait(&second)?;
        result.copy_from(&side, 0, &large, large.len() - 1, 1)?;
        side.synchronize()?;
        let expected = u32::from_ne_bytes([round; 4]);
        let found = result.to_vec(&side)?[0];
        ensure(
            found == expected,
            format!("round {round}: {found:#x} where {expected:#x} was filled before"),
        )?;
    }
    let ms = first.elapsed_ms(&second)?;
    ensure(ms > 0.0 && ms < 1000.0, format!("filling 256 MiB took {ms} ms"))
}

/// Free memory is no exact figure: the driver keeps pools of its own, and whoever else uses the GPU allocates too.
fn out_of_gpu_memory_is_typed(machine: &Machine) -> Outcome {
    const SLACK_BYTES: u64 = 64 << 20;
    let Machine { context, stream, .. } = machine;
    let before = context.memory()?.free_bytes;
    let wanted = 1usize << 42;
    match DeviceBuffer::<u8>::uninit(context, wanted) {
        Err(DriverError::OutOfGpuMemory { wanted: named, total, .. }) => {
            ensure(named == wanted as u64 && total > 0, "the error names other numbers")?;
        }
        other => return Err(format!("4 TiB gave {:?}", other.map(|buffer| buffer.bytes())).into()),
    }
    let lost = before.saturating_sub(context.memory()?.free_bytes);
    ensure(lost < SLACK_BYTES, format!("{lost} bytes less are free after a refused allocation"))?;
    let ordinary = vec![7u8; 1 << 20];
    let back = DeviceBuffer::from_slice(stream, &ordinary)?.to_vec(stream)?;
    ensure(back == ordinary, "the context is still good")
}

fn bad_modules_are_refused_with_a_log(machine: &Machine) -> Outcome {
    let text = ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry broken() { bra nowhere; }\n";
    match Module::from_ptx(&machine.context, text) {
        Err(DriverError::InvalidModule { log, .. }) => {
            ensure(log.contains("nowhere"), format!("the log says {log:?}"))
        }
        other => Err(format!("a broken module gave {other:?}").into()),
    }
}

fn bad_launches_are_refused(machine: &Machine) -> Outcome {
    let Machine { stream, kernels, context, .. } = machine;
    let function = kernels.functions().find(|function| function.name() == "gather").expect("a kernel");
    let shape = LaunchShape::linear(1, 32);
    // SAFETY: refused before anything runs.
    let refused = unsafe { launch_with(function, &shape, stream, [0u64.into(); 9]) };
    ensure(matches!(refused, Err(DriverError::ParameterSize { .. })), format!("parameters: {refused:?}"))?;
    // SAFETY: refused before anything runs.
    let refused = unsafe { launch_with(function, &shape, stream, [0u64.into(); 2]) };
    ensure(matches!(refused, Err(DriverError::ParameterCount { .. })), format!("parameters: {refused:?}"))?;
    let other = DeviceBuffer::from_slice(stream, &[1u32, 2, 3])?;
    let mut short = [0; 4];
    let refused = other.read(stream, 0, &mut short);
    ensure(
        matches!(refused, Err(DriverError::OutOfRange { .. })),
        format!("a read beyond the end: {refused:?}"),
    )?;
    let unknown = Module::from_ptx(context, spinkv_kernels::ptx("sm_80").unwrap_or_default())?
        .function("no_such_kernel");
    ensure(
        matches!(unknown, Err(DriverError::UnknownFunction { .. })),
        format!("an unknown kernel: {unknown:?}"),
    )
}
