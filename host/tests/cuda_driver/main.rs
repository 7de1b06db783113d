//! The driver layer against a stand-in for the driver: what it asks for, in which order, and what it makes of the answers.
//! No GPU is needed, and none is used if there is one.
#![cfg(all(feature = "cuda", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]

mod backend;
mod blas;
mod host_memory;
mod kernels;
mod nccl;
mod restore;
mod step;

use std::ffi::{CStr, CString, c_char, c_void};
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use spinkv::backend::cuda::driver::{
    Argument, Context, Device, DeviceBuffer, DriverError, Event, Graph, LaunchShape, Module, PinProgress,
    PinnedArena, PinnedBuffer, Priority, Stream, launch_with,
};

/// The stand-in, which counts for the whole process: tests take turns.
struct Driver {
    log: extern "C" fn() -> *const c_char,
    reset: extern "C" fn(),
}

static DRIVER: OnceLock<Mutex<Driver>> = OnceLock::new();

/// Builds and loads the stand-in, before anything asks for the driver. The system's loader then takes it for the
/// driver, by its name.
fn load() -> Mutex<Driver> {
    let library = Path::new(env!("CARGO_TARGET_TMPDIR")).join("stand-in-libcuda.so");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cuda_driver/stand_in.c");
    let mut compiler = Command::new("cc");
    compiler.args(["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", source, "-o"]).arg(&library);
    assert!(compiler.status().expect("a C compiler").success());
    let name = CString::new(library.to_str().expect("a UTF-8 path")).expect("a path without NUL");
    // SAFETY: the library has no constructors; it is never unloaded.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW) };
    assert!(!handle.is_null(), "{} does not load", library.display());
    // SAFETY: the library has these functions, with these types.
    unsafe {
        let symbol = |name: &CStr| libc::dlsym(handle, name.as_ptr());
        Mutex::new(Driver {
            log: std::mem::transmute::<*mut c_void, extern "C" fn() -> *const c_char>(symbol(
                c"stand_in_log",
            )),
            reset: std::mem::transmute::<*mut c_void, extern "C" fn()>(symbol(c"stand_in_reset")),
        })
    }
}

fn driver() -> MutexGuard<'static, Driver> {
    let driver = DRIVER.get_or_init(load).lock().unwrap_or_else(PoisonError::into_inner);
    (driver.reset)();
    driver
}

impl Driver {
    /// The lines since the last call.
    fn log(&self) -> Vec<String> {
        // SAFETY: a C string of the stand-in, which writes it on this thread alone.
        let text = unsafe { CStr::from_ptr((self.log)()) }.to_str().expect("ASCII");
        let lines = text.lines().map(str::to_owned).collect();
        (self.reset)();
        lines
    }

    fn open(&self) -> (Context, Stream) {
        let context = Device::open(0).unwrap();
        let stream = Stream::new(&context).unwrap();
        self.log();
        (context, stream)
    }
}

#[test]
fn a_device_is_described_and_opened() {
    let driver = driver();
    let devices = Device::all().unwrap();
    assert_eq!(devices.len(), 2);
    let device = &devices[0];
    assert_eq!(
        (device.name.as_str(), device.compute_capability, device.multiprocessors),
        ("Stand-in", (9, 0), 132)
    );
    assert_eq!(device.ptx_arch().unwrap().name(), "sm_90a");
    assert_eq!(device.limits.grid, [0x7fff_ffff, 65535, 65535]);
    assert_eq!((device.limits.block, device.limits.threads_per_block), ([1024, 1024, 64], 1024));
    assert_eq!((device.limits.shared_bytes, device.limits.opt_in_shared_bytes), (48 << 10, 227 << 10));
    assert_eq!(Device::open(2).unwrap_err(), DriverError::UnknownDevice { ordinal: 2, count: 2 });

    let context = Device::open(0).unwrap();
    assert_eq!(context.driver_version().to_string(), "13.0");
    let stream = Stream::with_priority(&context, Priority::High).unwrap();
    let memory = context.memory().unwrap();
    assert_eq!((memory.free_bytes, memory.total_bytes), (1000, 9 << 20));
    drop(context);
    assert_eq!(driver.log(), ["retain", "stream flags 1 priority -5"]);
    drop(stream);
    assert_eq!(driver.log(), ["release"], "with the last that needs it");
}

#[test]
fn a_buffer_holds_what_is_written_and_waits_before_it_is_freed() {
    let driver = driver();
    let (context, stream) = driver.open();
    let buffer = DeviceBuffer::from_slice(&stream, &[1u32, 2, 3, 4, 5]).unwrap();
    assert_eq!(driver.log(), ["allocate 20", "copy 20", "wait"]);
    buffer.write(&stream, 3, &[40, 50]).unwrap();
    buffer.fill_bytes(&stream, 0..1, 0xff).unwrap();
    buffer.copy_from(&stream, 1, &buffer, 3, 1).unwrap();
    assert_eq!(buffer.to_vec(&stream).unwrap(), [u32::MAX, 40, 3, 40, 50]);
    let mut part = [0; 2];
    buffer.read(&stream, 1, &mut part).unwrap();
    assert_eq!(part, [40, 3]);

    let beyond = |what, start, len| DriverError::OutOfRange { what, start, len, limit: 5 };
    assert_eq!(buffer.write(&stream, 4, &[0, 0]), Err(beyond("write", 4, 2)));
    assert_eq!(buffer.read(&stream, usize::MAX, &mut part), Err(beyond("read", usize::MAX, 2)));
    assert_eq!(buffer.fill_bytes(&stream, 0..6, 0), Err(beyond("fill", 0, 6)));
    assert_eq!(buffer.copy_from(&stream, 0, &buffer, 3, 3), Err(beyond("copy", 3, 3)));
    let table: Vec<u32> = (0..12).collect();
    let table = DeviceBuffer::from_slice(&stream, &table).unwrap();
    driver.log();
    buffer.copy_rows_from(&stream, 1, &table, 5, (2, 2, 4)).unwrap();
    assert_eq!(driver.log(), ["copy 2 rows of 8"]);
    assert_eq!(buffer.to_vec(&stream).unwrap(), [u32::MAX, 5, 6, 9, 10]);
    assert_eq!(buffer.copy_rows_from(&stream, 2, &table, 5, (2, 2, 4)), Err(beyond("copy", 2, 4)));
    let limit = 12;
    let beyond = |what, start, len, limit| Err(DriverError::OutOfRange { what, start, len, limit });
    assert_eq!(buffer.copy_rows_from(&stream, 0, &table, 7, (2, 2, 4)), beyond("copy", 7, 6, limit));
    assert_eq!(buffer.copy_rows_from(&stream, 0, &table, 0, (1, 5, 4)), beyond("copied row", 0, 5, 4));
    drop(table);
    driver.log();
    drop(buffer);
    assert_eq!(driver.log(), ["synchronize", "free"]);

    let empty = DeviceBuffer::<u64>::zeroed(&stream, 0).unwrap();
    assert_eq!((empty.to_vec(&stream).unwrap(), empty.address()), (vec![], 0));
    let full = DeviceBuffer::<u8>::uninit(&context, (9 << 20) + 1).unwrap_err();
    assert_eq!(full, DriverError::OutOfGpuMemory { wanted: (9 << 20) + 1, free: 1000, total: 9 << 20 });
    let absurd = DeviceBuffer::<u64>::uninit(&context, usize::MAX).unwrap_err();
    assert!(matches!(absurd, DriverError::OutOfGpuMemory { wanted: u64::MAX, .. }), "{absurd}");
}

#[test]
fn a_part_is_the_same_memory_which_stays_while_either_lives() {
    let driver = driver();
    let (_context, stream) = driver.open();
    let whole = DeviceBuffer::from_slice(&stream, &(0..256).collect::<Vec<u32>>()).unwrap();
    driver.log();
    let part = whole.part(64..192).unwrap();
    assert_eq!((part.len(), part.bytes(), part.address()), (128, 512, whole.address() + 256));
    let empty = whole.part(64..64).unwrap();
    assert_eq!((empty.len(), empty.address()), (0, 0));
    assert_eq!(driver.log(), [""; 0], "nothing is allocated");
    part.write(&stream, 1, &[7]).unwrap();
    let mut found = [0; 3];
    whole.read(&stream, 64, &mut found).unwrap();
    assert_eq!(found, [64, 7, 66]);
    let beyond = |what, start, len, limit| DriverError::OutOfRange { what, start, len, limit };
    assert_eq!(part.write(&stream, 128, &[0]), Err(beyond("write", 128, 1, 128)), "the rest is not its");
    assert_eq!(whole.part(64..257).unwrap_err(), beyond("part", 64, 193, 256));
    assert_eq!(whole.part(320..321).unwrap_err(), beyond("part", 320, 1, 256));
    assert!(matches!(whole.part(63..192).unwrap_err(), DriverError::Multiple { .. }), "252 bytes in");
    assert_eq!(part.part(64..128).unwrap().address(), whole.address() + 512, "a part of a part");
    driver.log();
    drop((whole, empty));
    assert_eq!(driver.log(), [""; 0], "the part still needs it");
    assert_eq!(part.to_vec(&stream).unwrap()[..3], [64, 7, 66]);
    driver.log();
    drop(part);
    assert_eq!(driver.log(), ["synchronize", "free"]);
}

#[test]
fn a_transfer_keeps_pinned_memory_until_it_is_done() {
    let driver = driver();
    let (context, stream) = driver.open();
    let buffer = DeviceBuffer::<f32>::zeroed(&stream, 4).unwrap();
    let source = PinnedBuffer::from_slice(&context, &[1.0f32, 2.0]).unwrap();
    assert_eq!(driver.log(), ["allocate 16", "fill 16", "wait", "pinned 8 flags 3"]);
    let pending = buffer.upload(&stream, 1, source).unwrap();
    assert_eq!(driver.log(), ["event flags 2", "copy 8", "record"]);
    assert!(pending.is_done().unwrap());
    let source = pending.wait().unwrap();
    assert_eq!(driver.log(), ["wait for event"]);
    assert_eq!(&*source, [1.0, 2.0]);

    let source = buffer.upload_part(&stream, 3, source, 1).unwrap().wait().unwrap();
    assert_eq!(driver.log()[1], "copy 4");
    buffer
        .upload_part(&stream, 3, PinnedBuffer::from_slice(&context, &[0.0]).unwrap(), 1)
        .unwrap()
        .wait()
        .unwrap();
    let short = PinnedBuffer::from_slice(&context, &[3.0f32]).unwrap();
    let beyond = buffer.upload_part(&stream, 0, short, 2).unwrap_err();
    assert_eq!(beyond, DriverError::OutOfRange { what: "upload source", start: 0, len: 2, limit: 1 });

    let target = PinnedBuffer::zeroed(&context, 4).unwrap();
    let pending = buffer.download(&stream, 0, target).unwrap();
    assert_eq!(&*pending.wait().unwrap(), [0.0, 1.0, 2.0, 0.0]);
    driver.log();
    drop(buffer.download(&stream, 2, source).unwrap());
    assert_eq!(driver.log()[3..], ["synchronize", "free pinned"], "dropped early, it waits");
}

#[test]
fn an_arena_is_pinned_in_chunks_and_copied_across_them() {
    let driver = driver();
    let (context, stream) = driver.open();
    const CHUNK: usize = 256 << 20;
    let mut seen = Vec::new();
    let mut arena = PinnedArena::reserve(&context, 2 * CHUNK + 4096, |progress| seen.push(progress)).unwrap();
    let total_bytes = (2 * CHUNK + 4096) as u64;
    let steps = [CHUNK as u64, 2 * CHUNK as u64, total_bytes];
    assert_eq!(seen, steps.map(|pinned_bytes| PinProgress { pinned_bytes, total_bytes }));
    assert_eq!(driver.log()[1..], ["register 268435456 flags 3", "register 4096 flags 3"]);

    arena.write(CHUNK - 4, &[1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
    let buffer = DeviceBuffer::<u32>::zeroed(&stream, 4).unwrap();
    driver.log();
    buffer.copy_from_arena(&stream, 1, &arena, CHUNK - 4, 2).unwrap();
    assert_eq!(driver.log(), ["copy 4", "copy 4"]);
    let words = [1, 2, 3, 4, 5, 6, 7, 8u8].as_chunks::<4>().0.iter().map(|word| u32::from_ne_bytes(*word));
    assert_eq!(buffer.to_vec(&stream).unwrap(), [0].into_iter().chain(words).chain([0]).collect::<Vec<_>>());
    buffer.copy_to_arena(&stream, 2, &arena, 2 * CHUNK - 2, 1).unwrap();
    let mut bytes = [9; 6];
    arena.read(2 * CHUNK - 3, &mut bytes).unwrap();
    assert_eq!(bytes, [0, 5, 6, 7, 8, 0]);

    let limit = 2 * CHUNK + 4096;
    let beyond = DriverError::OutOfRange { what: "arena copy", start: limit - 4, len: 8, limit };
    assert_eq!(buffer.copy_from_arena(&stream, 0, &arena, limit - 4, 2), Err(beyond));
    driver.log();
    drop(arena);
    assert_eq!(driver.log(), ["synchronize", "unregister", "unregister", "unregister"]);
}

#[test]
fn an_arena_that_is_refused_gives_back_what_was_pinned() {
    let driver = driver();
    let (context, _) = driver.open();
    let wanted = (256 << 20) + 13;
    let refused = PinnedArena::reserve(&context, wanted, |_| {}).unwrap_err();
    let DriverError::PinnedMemoryRefused { wanted: found, pinned, code: 2, name } = refused else { panic!() };
    assert_eq!((found, pinned, name.as_str()), (wanted as u64, 256 << 20, "CUDA_ERROR_OUT_OF_MEMORY"));
    assert_eq!(driver.log()[1..], ["unregister", "synchronize"]);
    let absurd = PinnedArena::reserve(&context, 1 << 60, |_| {}).unwrap_err();
    assert!(
        matches!(absurd, DriverError::AddressSpaceRefused { wanted, .. } if wanted == 1 << 60),
        "{absurd}"
    );
}

const PTX: &str = "
.visible .entry scale(.param .u64 data, .param .u32 elements, .param .f32 factor) { ret; }
.visible .entry fault(.param .u64 data, .param .u32 elements, .param .f32 factor) { trap; }";

#[test]
fn a_module_that_is_refused_shows_the_compilers_log() {
    let driver = driver();
    let (context, _) = driver.open();
    let refused = Module::from_ptx(&context, "nonsense").unwrap_err();
    assert_eq!(
        refused.to_string(),
        "the PTX module was refused with code 218 (CUDA_ERROR_INVALID_PTX):\nline 1: a nonsense opcode"
    );
    let refused = Module::from_ptx(&context, "a\0b").unwrap_err();
    assert!(refused.to_string().contains("NUL byte at 1"), "{refused}");
}

#[test]
fn a_kernel_is_launched_with_its_arguments() {
    let driver = driver();
    let (context, stream) = driver.open();
    let module = Module::from_ptx(&context, PTX).unwrap();
    let scale = module.function("scale").unwrap();
    assert_eq!(module.function("scale").unwrap().name(), "scale");
    assert_eq!(driver.log(), ["load, line info 1", "look up scale"], "looked up once");
    let attributes = scale.attributes();
    assert_eq!(
        (attributes.registers, attributes.static_shared_bytes, attributes.max_threads),
        (32, 1024, 1024)
    );
    assert_eq!(scale.occupancy(256, 0), Ok(8));
    let unknown = module.function("missing").unwrap_err();
    assert_eq!(unknown, DriverError::UnknownFunction { name: "missing".to_owned() });

    let buffer = DeviceBuffer::<f32>::zeroed(&stream, 8).unwrap();
    driver.log();
    let launch = |shape: LaunchShape, elements: Argument| {
        // SAFETY: the stand-in's kernels touch nothing.
        unsafe { launch_with(&scale, &shape, &stream, [(&buffer).into(), elements, 2.5f32.into()]) }
    };
    launch(
        LaunchShape { grid: [2, 3, 4], block: [32, 2, 1], shared_bytes: 16, overlaps: false },
        8u32.into(),
    )
    .unwrap();
    let address = buffer.address();
    assert_eq!(driver.log(), [format!("launch scale 2 3 4, 32 2 1, 16: {address:#x} 8 2.50")]);

    let function = || "scale".to_owned();
    let wrong = launch(LaunchShape::linear(1, 32), 8u64.into());
    let size = DriverError::ParameterSize { function: function(), index: 1, expected: 4, found: 8 };
    assert_eq!(wrong, Err(size));
    let large = LaunchShape::linear(1, 32).with_shared_bytes(64 << 10);
    let shared = |wanted, limit| Err(DriverError::SharedMemory { function: function(), wanted, limit });
    assert_eq!(launch(large, 8u32.into()), shared(64 << 10, 47 << 10));
    assert_eq!(scale.allow_shared_bytes(227 << 10), shared(227 << 10, 226 << 10), "1 KiB is static");
    scale.allow_shared_bytes(64 << 10).unwrap();
    launch(large, 8u32.into()).unwrap();
    let expected = format!("launch scale 1 1 1, 32 1 1, 65536: {address:#x} 8 2.50");
    assert_eq!(driver.log(), ["set 8 to 65536", &expected]);
    drop(module);
    assert_eq!(driver.log(), [""; 0], "the function still needs it");
    drop(scale);
    assert_eq!(driver.log(), ["synchronize", "unload"]);
}

/// Code 226 is newer than CUDA 11.4, whose codes `cust` knows.
#[test]
fn a_kernel_that_fails_is_seen_by_later_calls_and_nothing_is_freed_under_it() {
    let driver = driver();
    let (context, stream) = driver.open();
    let buffer = DeviceBuffer::<f32>::zeroed(&stream, 8).unwrap();
    let fault = Module::from_ptx(&context, PTX).unwrap().function("fault").unwrap();
    let arguments = [Argument::from(&buffer), 8u32.into(), 2.5f32.into()];
    // SAFETY: the stand-in's kernels touch nothing.
    unsafe { launch_with(&fault, &LaunchShape::linear(1, 32), &stream, arguments) }.unwrap();
    let name = "a code that the driver does not name".to_owned();
    let error = |call| DriverError::Call { call, code: 226, name: name.clone() };
    assert_eq!(stream.synchronize(), Err(error("cuStreamSynchronize")));
    assert_eq!(stream.is_idle(), Err(error("cuStreamQuery")));
    assert_eq!(buffer.to_vec(&stream), Err(error("cuMemcpyDtoHAsync_v2")));
    drop((buffer, fault));
    assert!(!driver.log().iter().any(|line| line == "free" || line == "unload"));
}

#[test]
fn streams_are_ordered_by_events() {
    let driver = driver();
    let (context, stream) = driver.open();
    let (start, end) = (Event::new(&context).unwrap(), Event::new(&context).unwrap());
    start.record(&stream).unwrap();
    stream.wait(&start).unwrap();
    end.record(&stream).unwrap();
    assert!(!stream.is_idle().unwrap(), "the stand-in never is");
    end.synchronize().unwrap();
    assert_eq!(start.elapsed_ms(&end), Ok(1.5));
    let expected = ["event flags 0", "event flags 0", "record", "stream waits", "record", "wait for event"];
    assert_eq!(driver.log(), expected);
}

#[test]
fn a_graph_is_captured_once_and_replayed() {
    let driver = driver();
    let (context, stream) = driver.open();
    let buffer = DeviceBuffer::<u32>::zeroed(&stream, 4).unwrap();
    driver.log();
    let graph = Graph::capture(&stream, |stream| buffer.fill_bytes(stream, 0..4, 7)).unwrap();
    let log = driver.log();
    assert_eq!(log[0], "capture, mode 1");
    assert!(log[1].starts_with("fill"), "{log:?}");
    assert_eq!(log[2..], ["captured", "instantiate, flags 0", "upload", "destroy graph"]);
    for _ in 0..2 {
        // SAFETY: the stand-in's graph touches nothing.
        unsafe { graph.launch(&stream) }.unwrap();
        assert_eq!(driver.log(), ["replay"]);
    }
    drop(graph);
    assert_eq!(driver.log(), ["destroy executable"]);

    // Work that is refused ends the capture all the same.
    let failed = Graph::capture(&stream, |stream| buffer.fill_bytes(stream, 0..5, 7));
    assert!(matches!(failed, Err(DriverError::OutOfRange { .. })), "{failed:?}");
    assert_eq!(driver.log(), ["capture, mode 1", "captured", "destroy graph"]);
    drop(context);
}
