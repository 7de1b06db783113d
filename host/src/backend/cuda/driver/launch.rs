use std::ffi::c_void;

use bytemuck::Pod;

use super::raw::{LaunchAttribute, LaunchConfig, call};
use super::{DeviceBuffer, DriverError, Function, LaunchLimits, PinnedArena, PtxArch, Result, Stream};

/// How many blocks and threads run a kernel, and what shared memory each block gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaunchShape {
    /// Blocks in x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block in x, y and z.
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory of a block.
    pub shared_bytes: u32,
    /// Whether it may begin before the launch ahead of it in the stream has ended: once all blocks of that run and have called
    /// `cuda_std::thread::launch_dependents`. A kernel that does not call it is waited for to its end, as are copies; before compute capability
    /// 9.0 all are.
    pub overlaps: bool,
}

impl LaunchShape {
    /// `blocks` blocks of `threads` threads in one dimension, without dynamic shared memory.
    pub fn linear(blocks: u32, threads: u32) -> Self {
        Self { grid: [blocks, 1, 1], block: [threads, 1, 1], shared_bytes: 0, overlaps: false }
    }

    /// The same with dynamic shared memory.
    pub fn with_shared_bytes(self, shared_bytes: u32) -> Self {
        Self { shared_bytes, ..self }
    }

    /// The same, to overlap with the launch before it.
    pub fn overlapping(self) -> Self {
        Self { overlaps: true, ..self }
    }

    /// Refuses what the device or the kernel cannot run.
    fn check(&self, kernel: &KernelLimits<'_>, device: &LaunchLimits) -> Result<()> {
        const GRID: [&str; 3] = ["grid x", "grid y", "grid z"];
        const BLOCK: [&str; 3] = ["block x", "block y", "block z"];
        let within = |dimension, value: u64, limit: u32| {
            let (function, limit) = (kernel.name.to_owned(), u64::from(limit));
            let refused = DriverError::LaunchShape { function, dimension, value, limit };
            if (1..=limit).contains(&value) { Ok(()) } else { Err(refused) }
        };
        for axis in 0..3 {
            within(GRID[axis], self.grid[axis].into(), device.grid[axis])?;
            within(BLOCK[axis], self.block[axis].into(), device.block[axis])?;
        }
        let threads = self.block.iter().fold(1u64, |product, axis| product.saturating_mul(u64::from(*axis)));
        within("threads of a block", threads, kernel.max_threads.min(device.threads_per_block))?;
        if self.shared_bytes > kernel.shared_limit {
            let (function, wanted) = (kernel.name.to_owned(), self.shared_bytes);
            return Err(DriverError::SharedMemory { function, wanted, limit: kernel.shared_limit });
        }
        Ok(())
    }
}

/// What a kernel allows of what the device does.
struct KernelLimits<'a> {
    name: &'a str,
    max_threads: u32,
    shared_limit: u32,
}

/// A kernel parameter, by value: a number, or the address of GPU or pinned memory.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(8))]
pub struct Argument {
    /// The value in its first `bytes` bytes, aligned for all types.
    value: [u8; 8],
    bytes: usize,
    /// What the address belongs to, [`Context::id`](super::Context).
    context: Option<usize>,
}

macro_rules! number_arguments {
    ($($number:ty),*) => {$(
        impl From<$number> for Argument {
            fn from(number: $number) -> Self {
                let mut value = [0; 8];
                value[..size_of::<$number>()].copy_from_slice(&number.to_ne_bytes());
                Self { value, bytes: size_of::<$number>(), context: None }
            }
        }
    )*};
}
number_arguments!(u32, i32, f32, u64, i64, f64);

impl<T: Pod> From<&DeviceBuffer<T>> for Argument {
    fn from(buffer: &DeviceBuffer<T>) -> Self {
        Self { context: Some(buffer.context().id()), ..buffer.address().into() }
    }
}

impl From<&PinnedArena> for Argument {
    fn from(arena: &PinnedArena) -> Self {
        Self { context: Some(arena.context().id()), ..arena.device_address().into() }
    }
}

/// Async: runs a kernel with parameters in the kernel's order.
///
/// # Errors
/// [`DriverError::LaunchShape`], [`DriverError::SharedMemory`], [`DriverError::ParameterCount`],
/// [`DriverError::ParameterSize`], [`DriverError::OtherContext`], or a refused call.
///
/// # Safety
/// As for [`launch`]; that the arguments have the parameters' number and sizes is checked where the module's text could be
/// understood.
pub unsafe fn launch_with<const N: usize>(
    function: &Function,
    shape: &LaunchShape,
    stream: &Stream,
    mut arguments: [Argument; N],
) -> Result<()> {
    check_arguments(function.name(), function.parameters(), &arguments)?;
    let context = stream.context().id();
    if arguments.iter().any(|argument| argument.context.is_some_and(|id| id != context)) {
        return Err(DriverError::OtherContext { what: "a kernel's argument" });
    }
    let mut parameters = arguments.each_mut().map(|argument| argument.value.as_mut_ptr().cast());
    // SAFETY: each pointer leads to a value of this frame; the rest is the caller's part.
    unsafe { launch(function, shape, stream, &mut parameters) }
}

/// Async: runs a kernel with pointers to its parameters, in the kernel's order. The values are read before it returns.
///
/// Launch through [`launch_with`] where the parameters are numbers and addresses.
///
/// # Errors
/// [`DriverError::LaunchShape`], [`DriverError::SharedMemory`], [`DriverError::ParameterCount`],
/// [`DriverError::OtherContext`], or a refused call.
///
/// # Safety
/// 1. Each pointer leads to a value of the type of the kernel's parameter.
/// 2. With these values and this shape the kernel touches only memory that its buffers have, and reads and writes within
///    them what the host does not hold references to.
/// 3. If it overlaps, that holds beside the launch before it, too, as far as the kernel does not wait for what that does.
/// 4. What it touches is a [`DeviceBuffer`], a [`PinnedArena`] or memory that stays until the stream has come this far.
pub unsafe fn launch(
    function: &Function,
    shape: &LaunchShape,
    stream: &Stream,
    parameters: &mut [*mut c_void],
) -> Result<()> {
    function.context().check_same(stream.context(), "the kernel")?;
    check_count(function.name(), function.parameters(), parameters.len())?;
    let kernel = KernelLimits {
        name: function.name(),
        max_threads: function.attributes().max_threads,
        shared_limit: function.shared_limit(),
    };
    let context = function.context();
    shape.check(&kernel, &context.device().limits)?;
    context.make_current()?;
    let (function, stream, extra) = (function.raw(), stream.raw(), std::ptr::null_mut());
    let ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]) = (shape.grid, shape.block);
    let shared_bytes = shape.shared_bytes;
    // Kernels wait for what they overlap with only in PTX of sm_90 or newer, whatever the device could do.
    let overlaps = context.device().ptx_arch().is_ok_and(|arch| arch != PtxArch::Sm80);
    if shape.overlaps && overlaps {
        let mut overlaps = LaunchAttribute::OVERLAPS;
        let (grid, block) = (shape.grid, shape.block);
        let attributes = &raw mut overlaps;
        let config = LaunchConfig { grid, block, shared_bytes, stream, attributes, attribute_count: 1 };
        // SAFETY: as below; the configuration and its attribute are of this frame.
        return unsafe { call!(cuLaunchKernelEx(&config, function, parameters.as_mut_ptr(), extra)) };
    }
    // SAFETY: the function's module is loaded, and drop of it and of all buffers waits for the work. The parameters
    // are the caller's part.
    unsafe {
        call!(cuLaunchKernel(
            function,
            grid_x,
            grid_y,
            grid_z,
            block_x,
            block_y,
            block_z,
            shared_bytes,
            stream,
            parameters.as_mut_ptr(),
            extra,
        ))
    }
}

fn check_count(function: &str, parameters: Option<&[usize]>, found: usize) -> Result<()> {
    match parameters {
        Some(parameters) if parameters.len() != found => Err(DriverError::ParameterCount {
            function: function.to_owned(),
            expected: parameters.len(),
            found,
        }),
        _ => Ok(()),
    }
}

fn check_arguments(function: &str, parameters: Option<&[usize]>, arguments: &[Argument]) -> Result<()> {
    check_count(function, parameters, arguments.len())?;
    let sizes = parameters.unwrap_or_default().iter().zip(arguments).enumerate();
    for (index, (&expected, argument)) in sizes {
        if expected != argument.bytes {
            let (function, found) = (function.to_owned(), argument.bytes);
            return Err(DriverError::ParameterSize { function, index, expected, found });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEVICE: LaunchLimits = LaunchLimits {
        grid: [0x7fff_ffff, 65535, 65535],
        block: [1024, 1024, 64],
        threads_per_block: 1024,
        shared_bytes: 48 << 10,
        opt_in_shared_bytes: 227 << 10,
    };
    const KERNEL: KernelLimits<'_> =
        KernelLimits { name: "gather", max_threads: 512, shared_limit: 48 << 10 };

    fn check(shape: LaunchShape) -> Result<()> {
        shape.check(&KERNEL, &DEVICE)
    }

    fn refused(dimension: &'static str, value: u64, limit: u64) -> Result<()> {
        Err(DriverError::LaunchShape { function: "gather".to_owned(), dimension, value, limit })
    }

    #[test]
    fn shapes_within_the_limits_pass() {
        assert_eq!(check(LaunchShape::linear(0x7fff_ffff, 512)), Ok(()));
        assert_eq!(
            check(LaunchShape {
                grid: [1, 65535, 65535],
                block: [8, 1, 64],
                ..LaunchShape::linear(1, 1).with_shared_bytes(48 << 10)
            }),
            Ok(())
        );
    }

    #[test]
    fn shapes_beyond_a_limit_are_refused_by_the_dimension() {
        assert_eq!(check(LaunchShape::linear(0, 32)), refused("grid x", 0, 0x7fff_ffff));
        assert_eq!(check(LaunchShape::linear(1, 0)), refused("block x", 0, 1024));
        assert_eq!(check(LaunchShape::linear(1, 1025)), refused("block x", 1025, 1024));
        assert_eq!(check(LaunchShape::linear(1, 513)), refused("threads of a block", 513, 512));
        let block = |block| LaunchShape { block, ..LaunchShape::linear(1, 1) };
        assert_eq!(check(block([1, 1, 65])), refused("block z", 65, 64));
        assert_eq!(check(block([1024, 1024, 64])), refused("threads of a block", 1 << 26, 512));
        let tall = LaunchShape { grid: [1, 65536, 1], ..LaunchShape::linear(1, 1) };
        assert_eq!(check(tall), refused("grid y", 65536, 65535));
    }

    #[test]
    fn shared_memory_is_refused_until_it_is_allowed() {
        let shape = LaunchShape::linear(1, 32).with_shared_bytes(64 << 10);
        let (function, wanted, limit) = ("gather".to_owned(), 64 << 10, 48 << 10);
        assert_eq!(check(shape), Err(DriverError::SharedMemory { function, wanted, limit }));
        assert_eq!(shape.check(&KernelLimits { shared_limit: 64 << 10, ..KERNEL }, &DEVICE), Ok(()));
    }

    #[test]
    fn arguments_hold_their_value_where_the_driver_reads_it() {
        let read = |argument: Argument| argument.value[..argument.bytes].to_vec();
        assert_eq!(read(7u32.into()), 7u32.to_ne_bytes());
        assert_eq!(read((-7i32).into()), (-7i32).to_ne_bytes());
        assert_eq!(read(1.5f32.into()), 1.5f32.to_ne_bytes());
        assert_eq!(read((u64::MAX - 1).into()), (u64::MAX - 1).to_ne_bytes());
    }

    #[test]
    fn arguments_that_are_not_the_kernels_are_refused() {
        let arguments = [Argument::from(1u64), 2u32.into()];
        assert_eq!(check_arguments("gather", Some(&[8, 4]), &arguments), Ok(()));
        assert_eq!(check_arguments("gather", None, &arguments), Ok(()), "nothing is known");
        let function = || "gather".to_owned();
        let count = DriverError::ParameterCount { function: function(), expected: 3, found: 2 };
        assert_eq!(check_arguments("gather", Some(&[8, 4, 4]), &arguments), Err(count));
        let size = DriverError::ParameterSize { function: function(), index: 1, expected: 8, found: 4 };
        assert_eq!(check_arguments("gather", Some(&[8, 8]), &arguments), Err(size));
    }
}
