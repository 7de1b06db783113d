//! The CUDA driver, as the backend uses it: a small surface on which no safe call can use memory after it is freed.
//!
//! This module alone knows `cust` and the driver's raw functions.
//!
//! # Order and lifetime
//!
//! - Work on one [`Stream`] runs in the order in which it was given; streams are ordered among each other by [`Event`]s
//!   alone. Calls named *async* below return before the work is done; all others return after it.
//! - A buffer, module or pinned memory that is dropped first waits for all work of its context. So a kernel or copy
//!   under way may be forgotten about: what it uses stays until it is done. Allocate at start-up, not in a step.
//! - Device memory may be handed to several streams at once, through `&`. Work that is not ordered by events then races
//!   on the GPU; the elements are plain data ([`bytemuck::Pod`]), so the result is some bytes and never more than that.
//! - Host memory that the GPU reads or writes while the host goes on is either owned by the transfer until it is done
//!   ([`Pending`]) or an arena that hands out no references ([`PinnedArena`]).
//!
//! # Threads
//!
//! Everything is [`Send`] and [`Sync`]. The driver keeps a current context for each thread; every call here first makes
//! its own context current on the calling thread and leaves it so.
//!
//! # Example
//!
//! ```no_run
//! use spinkv::backend::cuda::driver::{Argument, Device, DeviceBuffer, LaunchShape, Module, Stream, launch_with};
//!
//! # let ptx = "";
//! let context = Device::open(0)?;
//! let stream = Stream::new(&context)?;
//! let source = DeviceBuffer::from_slice(&stream, &[1.0f32; 256])?;
//! let target = DeviceBuffer::<f32>::zeroed(&stream, 256)?;
//! let module = Module::from_ptx(&context, ptx)?;
//! let scale = module.function("scale")?;
//! // SAFETY: the kernel takes (source, target, elements, factor) and touches no more than `elements` of both.
//! unsafe {
//!     let arguments = [Argument::from(&source), (&target).into(), 256u32.into(), 2.0f32.into()];
//!     launch_with(&scale, &LaunchShape::linear(1, 256), &stream, arguments)?;
//! }
//! assert_eq!(target.to_vec(&stream)?, [2.0; 256]);
//! # Ok::<(), spinkv::backend::cuda::driver::DriverError>(())
//! ```
//!
//! # A kernel's own type
//!
//! A kernel is launched through a type that knows its parameters and shape and checks its operands. If that covers all that
//! the kernel touches, callers need no `unsafe`:
//!
//! ```
//! use spinkv::backend::cuda::driver::{
//!     Context, DeviceBuffer, Function, LaunchShape, Module, Result, Stream, check_length, check_operand, launch_with,
//! };
//!
//! # const PTX: &str = "";
//! /// `target[i] = factor * source[i]`. The field is private: it is this kernel and no other.
//! struct Scale(Function);
//!
//! impl Scale {
//!     const THREADS: u32 = 256;
//!
//!     fn load(context: &Context) -> Result<Self> {
//!         Ok(Self(Module::from_ptx(context, PTX)?.function("scale")?))
//!     }
//!
//!     /// Async: `target` is there when `stream` has come this far.
//!     fn launch(
//!         &self,
//!         stream: &Stream,
//!         source: &DeviceBuffer<f32>,
//!         target: &DeviceBuffer<f32>,
//!         factor: f32,
//!     ) -> Result<()> {
//!         check_operand("scale elements", source.len() as u64, 1..=u32::MAX.into())?;
//!         check_length("scale target", source.len(), target.len())?;
//!         let elements = source.len() as u32;
//!         let shape = LaunchShape::linear(elements.div_ceil(Self::THREADS), Self::THREADS);
//!         let arguments = [source.into(), target.into(), elements.into(), factor.into()];
//!         // SAFETY: order and types are the kernel's, which touches no more than `elements` of both; both have them.
//!         unsafe { launch_with(&self.0, &shape, stream, arguments) }
//!     }
//! }
//! ```
//!
//! Where a kernel follows what lies in device memory, launching is `unsafe`: see
//! [`kernels::Gather`](super::kernels::Gather).

mod arena;
mod buffer;
mod context;
mod device;
mod error;
mod event;
mod graph;
mod launch;
mod module;
mod pinned;
mod ptx;
mod raw;
mod stream;

pub use arena::{PinProgress, PinnedArena};
pub use buffer::DeviceBuffer;
pub use context::{Context, GpuMemory};
pub use device::{Device, DriverVersion, LaunchLimits, PtxArch, driver_version};
pub use error::{DriverError, Result, check_choice, check_length, check_multiple, check_operand};
pub(super) use error::{check_positive, check_range};
pub use event::Event;
pub use graph::Graph;
pub use launch::{Argument, LaunchShape, launch, launch_with};
pub use module::{Function, FunctionAttributes, Module};
pub use pinned::{Pending, PinnedBuffer};
pub use stream::{Priority, Stream};
